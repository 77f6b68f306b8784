"""Models of odd sizes, as transformers draws them: what differs is rounding.

With the weights of its initializers outputs agree within 1e-4 at these sizes.
With larger ones, or a narrow model whose untied logits are near 20,
transformers itself is further than that from its own float64, so there float64
is the reference, and its float32 the measure.
"""

import jax
import numpy as np
import pytest
from convert_hf_test import INPUTS, assert_same_model, load, maker

from st_moe.transformer import apply_model, encode


def sizes(vocab, d_model, d_kv, d_ff, heads, encoder, decoder, buckets=32):
  return {
    'vocab_size': vocab,
    'd_model': d_model,
    'd_kv': d_kv,
    'd_ff': d_ff,
    'num_heads': heads,
    'num_layers': encoder,
    'num_decoder_layers': decoder,
    'relative_attention_num_buckets': buckets,
    'relative_attention_max_distance': 90,
  }


def sparse(encoder, decoder, experts, capacity):
  return {
    'num_sparse_encoder_layers': encoder,
    'num_sparse_decoder_layers': decoder,
    'num_experts': experts,
    'expert_capacity': capacity,
  }


SWITCH = 'switch_transformers'
UNTIED = {'tie_word_embeddings': False}
GATED = {'feed_forward_proj': 'gated-gelu'} | UNTIED
# Inputs have up to 41 tokens: 64 slots are never full, 3 and 4 are.
CASES = {
  't5_v1_1': ('t5', sizes(211, 52, 13, 77, 5, 3, 3) | GATED),
  't5_v1_1_larger': ('t5', sizes(997, 130, 17, 251, 7, 5, 4, 30) | GATED),
  't5_relu_tied': (
    't5',
    sizes(311, 70, 11, 131, 3, 4, 3, 18) | {'feed_forward_proj': 'relu'},
  ),
  'switch_step_1': (
    SWITCH, sizes(211, 52, 13, 77, 5, 2, 2) | sparse(2, 2, 5, 64)
  ),
  'switch_step_1_drops': (
    SWITCH, sizes(307, 76, 9, 91, 3, 3, 3) | sparse(3, 3, 7, 3)
  ),
  'switch_step_2': (
    SWITCH, sizes(211, 60, 13, 77, 5, 4, 4) | sparse(2, 2, 6, 64)
  ),
  'switch_step_2_drops': (
    SWITCH, sizes(503, 100, 21, 133, 5, 6, 6) | sparse(3, 3, 9, 4)
  ),
  'switch_step_2_untied': (
    SWITCH, sizes(503, 100, 21, 133, 5, 6, 6) | sparse(3, 3, 9, 4) | UNTIED
  ),
  'switch_step_4': (
    SWITCH, sizes(211, 52, 13, 77, 5, 4, 4) | sparse(1, 1, 5, 64)
  ),
  'switch_step_4_drops': (
    SWITCH, sizes(401, 92, 15, 119, 7, 8, 8) | sparse(2, 2, 8, 3)
  ),
}  # fmt: skip
SEED = 1
LENGTHS = (41, 23, 7, 30)  # of the inputs; targets are shorter
# Compiling generation takes long: two cases stand for all in fast runs.
FAST = ('t5_v1_1', 'switch_step_2_drops')
EACH = [
  pytest.param(case, marks=() if case in FAST else pytest.mark.slow)
  for case in CASES
]


@pytest.mark.parametrize('case', EACH)
def test_the_weights_of_the_initializers_give_the_same_outputs(case, tmp_path):
  make = maker()
  model_type, settings = CASES[case]
  model = make.initial_model(model_type, settings, SEED)
  model.save_pretrained(tmp_path)
  batch = make.make_batch(settings['vocab_size'], SEED, LENGTHS)
  config, params = load(tmp_path)
  assert config.tie_embeddings == settings.get('tie_word_embeddings', True)
  assert_same_model(config, params, batch | make.outputs(model, batch))


@pytest.mark.parametrize('case', EACH)
def test_larger_weights_are_rounded_no_worse_than_by_transformers(
  case, tmp_path
):
  make = maker()
  model_type, settings = CASES[case]
  model = make.initial_model(model_type, settings, SEED, larger=2.0)
  model.save_pretrained(tmp_path)
  batch = make.make_batch(settings['vocab_size'], SEED, LENGTHS)
  theirs = make.outputs(model, batch)
  exact = make.outputs(make.in_float64(model), batch)
  config, params = load(tmp_path)

  @jax.jit
  def run(params, batch):
    encoded = encode(config, params, batch['encoder_input_tokens'])
    return encoded, apply_model(config, params, batch, train=False).logits

  encoded, logits = run(params, {name: batch[name] for name in INPUTS})
  for name, ours, tokens in (
    ('encoded', encoded, 'encoder_input_tokens'),
    ('logits', logits, 'decoder_target_tokens'),
  ):
    real = batch[tokens] > 0
    want = exact[name][real]
    assert want.dtype == np.float64

    def error(found, want=want, real=real):
      """Root mean square: the largest of so few is a matter of luck."""
      return np.sqrt(np.square(np.asarray(found)[real] - want).mean())

    assert error(ours) <= 2 * error(theirs[name])
    assert error(ours) <= 2e-5 * np.abs(want).max()
