"""Text from the model: greedy decoding, sampling and beam search.

The whole loop runs on the device and stops when every sequence has ended
(T5X `decoding.py`). Decoding is in evaluation mode and dropless, the encoder
too: a sequence does not depend on its neighbours in the batch (unless experts
choose tokens).
"""

from typing import Any

import jax
import jax.numpy as jnp

from st_moe.config import ModelConfig
from st_moe.decoding.beam import beam_search
from st_moe.decoding.methods import GREEDY, PAD_ID, BeamSearch, Sampling
from st_moe.decoding.sampling import choose_tokens, sample, sampling_logits
from st_moe.errors import UserError

__all__ = [
  'GREEDY',
  'PAD_ID',
  'BeamSearch',
  'Sampling',
  'check_method',
  'choose_tokens',
  'generate',
  'keys_for',
  'sampling_logits',
]


def keys_for(rng: jax.Array, numbers: jax.Array) -> jax.Array:
  """Returns a key for each input, of its number: int [batch] -> [batch]."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, numbers)


def check_method(config: ModelConfig, method: Sampling | BeamSearch) -> None:
  """Refuses what a model cannot do.

  Raises:
    UserError: when `top_k` exceeds the vocabulary.
  """
  if isinstance(method, BeamSearch) or method.top_k is None:
    return
  if method.top_k > config.vocab_size:
    raise UserError(
      f'Sampling.top_k {method.top_k} exceeds ModelConfig.vocab_size '
      f'{config.vocab_size}'
    )


def generate(
  config: ModelConfig,
  params: Any,
  encoder_input_tokens: jax.Array,
  *,
  max_length: int,
  eos_id: int = 1,
  method: Sampling | BeamSearch = GREEDY,
  rng: jax.Array | None = None,
) -> jax.Array:
  """Generates an output for every input.

  Args:
    config: of the model, scanned or not.
    params: of `EncoderDecoder`, in the form that `config.scan_layers` says.
    encoder_input_tokens: int [batch, input length]; 0 is padding. A row of
      padding alone fills a batch up: nothing is generated for it.
    max_length: tokens to generate at most, end-of-sequence included.
    eos_id: ends a sequence; padding follows it.
    method: how to choose tokens, or to look for a sequence.
    rng: key for sampling, or a key for each input, [batch], on which alone its
      draws depend; of one key, those of the rows' numbers are taken.

  Returns:
    int32 [batch, max_length].

  Raises:
    UserError: when sampling has no key, `top_k` exceeds the vocabulary, or
      the batch does not divide over the mesh.
  """
  settings = {'config': config, 'max_length': max_length, 'eos_id': eos_id}
  if isinstance(method, BeamSearch):
    return beam_search(params, encoder_input_tokens, method=method, **settings)
  if method.temperature > 0.0 and rng is None:
    raise UserError(
      f'sampling with temperature {method.temperature} needs a random key; '
      'give rng, or temperature 0 for greedy decoding'
    )
  check_method(config, method)
  if method.temperature == 0.0:
    rng = None
  elif rng.ndim == 0:
    rng = keys_for(rng, jnp.arange(len(encoder_input_tokens)))
  return sample(params, encoder_input_tokens, rng, method=method, **settings)
