"""Makes the models in this folder, and what transformers computes with them.

`python tests/golden_hf/make.py` needs torch and transformers >= 5.18. The
continuous tests read its files; where torch is there, convert_hf_test.py also
makes larger models with `make_model` and compares with them on the spot.
"""

import copy
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SIZES = {
  'vocab_size': 37,
  'd_model': 12,
  'd_kv': 5,
  'd_ff': 20,
  'num_heads': 3,
  'num_layers': 3,  # generation of transformers needs as many, or more,
  'num_decoder_layers': 2,
  'relative_attention_num_buckets': 8,
  'relative_attention_max_distance': 20,
}
SWITCH = {
  'num_layers': 4,
  'num_decoder_layers': 4,
  'num_sparse_encoder_layers': 2,
  'num_sparse_decoder_layers': 2,
  'num_experts': 3,
  'expert_capacity': 64,
}
# Each: model_type, and what its config.json says beside the sizes.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
  't5_v1_1': (
    't5',
    {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
  ),
  't5_relu_tied': ('t5', {'feed_forward_proj': 'relu'}),
  'mt5': ('mt5', {'feed_forward_proj': 'gated-gelu'}),
  'ul2_bfloat16': (
    't5',
    {'feed_forward_proj': 'gated-silu', 'tie_word_embeddings': False},
  ),
  'switch_step_1': (
    'switch_transformers',
    SWITCH
    | {
      'num_layers': 2,
      'num_decoder_layers': 2,
      'expert_capacity': 3,
      'tie_word_embeddings': False,
    },
  ),
  'switch_step_2': ('switch_transformers', SWITCH),
  'switch_step_4': (
    'switch_transformers',
    SWITCH
    | {
      'num_sparse_encoder_layers': 1,
      'num_sparse_decoder_layers': 1,
      'expert_capacity': 2,
    },
  ),
  # Three sparse layers of five, one of three; neither repeats over its stack.
  'switch_uneven': (
    'switch_transformers',
    SWITCH
    | {
      'num_layers': 5,
      'num_decoder_layers': 3,
      'num_sparse_decoder_layers': 1,
      'expert_capacity': 4,
    },
  ),
}
LENGTHS = (13, 9, 4)  # of the inputs; targets are shorter
GENERATED = 8


def initial_model(
  model_type: str, settings: dict[str, Any], seed: int, larger: float = 1.0
) -> transformers.PreTrainedModel:
  """Returns a model as transformers draws it.

  Its `tie_word_embeddings = false` ties the output all the same; here it is
  drawn as the source says, with deviation 1.

  Args:
    model_type: of the configuration.
    settings: of the configuration.
    seed: of the weights.
    larger: what kernels and position biases are multiplied by; unless it is 1,
      norms are not ones either.
  """
  torch.manual_seed(seed)
  config = transformers.AutoConfig.for_model(
    model_type, decoder_start_token_id=0, **settings
  )
  model = transformers.AutoModelForSeq2SeqLM.from_config(config)
  if settings.get('tie_word_embeddings') is False:
    shape = model.shared.weight.shape
    model.lm_head.weight = torch.nn.Parameter(torch.randn(shape))
    for stack in (model.encoder, model.decoder):
      stack.embed_tokens.weight.data.copy_(model.shared.weight.data)
  if larger == 1.0:
    return model.eval()
  with torch.no_grad():
    for name, value in model.named_parameters():
      if 'layer_norm' in name:
        value.copy_(1 + 0.2 * torch.randn_like(value))
      elif 'shared' not in name and 'lm_head' not in name:
        value.mul_(1.0 if 'embed_tokens' in name else larger)
  return model.eval()


def in_float64(
  model: transformers.PreTrainedModel,
) -> transformers.PreTrainedModel:
  """Returns a copy in float64 throughout.

  `double()` alone leaves the mean squares of norms and the routers in float32.
  """

  def norm(self, x: torch.Tensor) -> torch.Tensor:
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return self.weight * (x * torch.rsqrt(mean_square + self.variance_epsilon))

  exact = copy.deepcopy(model).double()
  for module in exact.modules():
    if hasattr(module, 'variance_epsilon'):
      module.forward = functools.partial(norm, module)
    if hasattr(module, 'expert_capacity'):
      module.dtype = torch.float64
  return exact


def make_model(
  model_type: str, settings: dict[str, Any], seed: int
) -> transformers.PreTrainedModel:
  """Returns a random model whose every weight matters.

  As transformers draws them, norms are all ones, and routers hardly decide.
  """
  torch.manual_seed(seed)
  config = transformers.AutoConfig.for_model(
    model_type, decoder_start_token_id=0, **settings
  )
  model = transformers.AutoModelForSeq2SeqLM.from_config(config)
  deviations = {'router': 1.0, 'relative': 1.0, '.q.': 0.3, '.k.': 0.3}
  with torch.no_grad():
    for name, value in model.named_parameters():
      if 'layer_norm' in name:
        value.copy_(1 + 0.2 * torch.randn_like(value))
      for part, deviation in deviations.items():
        if part in name:
          value.copy_(deviation * torch.randn_like(value))
  if model_type == 'mt5' or settings.get('tie_word_embeddings') is False:
    shape = model.shared.weight.shape
    model.lm_head.weight = torch.nn.Parameter(0.5 * torch.randn(shape))
    # An untied Switch Transformer does not tie the stacks' embeddings either.
    for stack in (model.encoder, model.decoder):
      stack.embed_tokens.weight.data.copy_(model.shared.weight.data)
  return model.eval()


def make_batch(
  vocab_size: int, seed: int, lengths: Sequence[int] = LENGTHS
) -> dict[str, np.ndarray]:
  """Returns padded random tokens, inputs of the given lengths."""
  rng = np.random.default_rng(seed)

  def tokens(lengths: np.ndarray) -> np.ndarray:
    ids = rng.integers(2, vocab_size, (len(lengths), lengths.max()))
    return (ids * (np.arange(lengths.max()) < lengths[:, None])).astype(
      np.int32
    )

  targets = tokens(np.array(lengths) // 2 + 3)
  return {
    'encoder_input_tokens': tokens(np.array(lengths)),
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
  }


def outputs(
  model: transformers.PreTrainedModel, batch: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns encoder output, logits and greedily generated tokens."""
  tokens = torch.tensor(batch['encoder_input_tokens']).long()
  mask = (tokens > 0).long()
  with torch.no_grad():
    found = model(
      input_ids=tokens,
      attention_mask=mask,
      decoder_input_ids=torch.tensor(batch['decoder_input_tokens']).long(),
    )
    generated = model.generate(
      input_ids=tokens,
      attention_mask=mask,
      max_new_tokens=GENERATED,
      do_sample=False,
      num_beams=1,
      suppress_tokens=[0],  # padding is no word
    )[:, 1:]
  return {
    'encoded': found.encoder_last_hidden_state.numpy(),
    'logits': found.logits.numpy(),
    'generated': np.pad(
      generated.numpy(), ((0, 0), (0, GENERATED - generated.shape[1]))
    ),
  }


def main(folder: Path) -> None:
  for seed, (name, (model_type, settings)) in enumerate(CASES.items()):
    model = make_model(model_type, SIZES | settings, seed)
    place = folder / name
    if name.endswith('bfloat16'):
      model.to(torch.bfloat16).save_pretrained(place)
      model = model.to(torch.float32)
    else:
      model.save_pretrained(place)
    (place / 'generation_config.json').unlink()
    batch = make_batch(SIZES['vocab_size'], seed)
    np.savez_compressed(place / 'batch.npz', **batch, **outputs(model, batch))
  versions = {m.__name__: m.__version__ for m in (torch, transformers)}
  (folder / 'versions.json').write_text(json.dumps(versions) + '\n')


if __name__ == '__main__':
  main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
