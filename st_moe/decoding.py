"""Text from the model: greedy decoding and sampling.

The whole loop runs on the device and stops when every sequence has ended
(T5X `decoding.py`). Decoding is in evaluation mode and dropless, the encoder
too: a sequence does not depend on its neighbours in the batch (unless experts
choose tokens).
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from st_moe import partitioning
from st_moe.blocks import DecodeCache
from st_moe.config import ModelConfig
from st_moe.errors import UserError
from st_moe.incremental import decode_step, init_cache

PAD_ID = 0


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token (greedy).
    top_k: choose among this many likeliest tokens; None: among all.
    top_p: choose among the likeliest tokens that together have this
      probability, the one that reaches it included; None: among all.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not self.temperature >= 0.0:
      raise UserError(
        f'Sampling.temperature must be >= 0, got {self.temperature}'
      )
    if self.top_k is not None and self.top_k < 1:
      raise UserError(f'Sampling.top_k must be >= 1, got {self.top_k}')
    if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
      raise UserError(f'Sampling.top_p must be in (0, 1], got {self.top_p}')


GREEDY = Sampling(temperature=0.0)


def _keep_top_k(logits: jax.Array, k: int) -> jax.Array:
  """Sets all but the k highest of [batch, vocab] to -inf; ties stay."""
  lowest = jax.lax.top_k(logits, k)[0][:, -1:]
  return jnp.where(logits < lowest, -jnp.inf, logits)


def _keep_top_p(logits: jax.Array, p: float) -> jax.Array:
  """Sets all but the likeliest of [batch, vocab] to -inf; ties stay."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  probs = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probs, axis=-1) - probs  # probability of likelier ones
  kept = jnp.where(before < p, ordered, jnp.inf)
  return jnp.where(
    logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits
  )


def choose_tokens(
  logits: jax.Array, method: Sampling, rng: jax.Array | None
) -> jax.Array:
  """Chooses the next token of every sequence; never padding.

  Args:
    logits: float32 [batch, vocab].
    method: how to choose.
    rng: key; not needed by greedy decoding.

  Returns:
    int32 [batch].
  """
  is_pad = jnp.arange(logits.shape[-1]) == PAD_ID
  logits = jnp.where(is_pad, -jnp.inf, logits)
  if method.temperature == 0.0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / method.temperature
  if method.top_k is not None:
    logits = _keep_top_k(logits, method.top_k)
  if method.top_p is not None:
    logits = _keep_top_p(logits, method.top_p)
  return jax.random.categorical(rng, logits, axis=-1).astype(jnp.int32)


@flax.struct.dataclass
class _LoopState:
  """What the decoding loop carries.

  Attributes:
    outputs: int32 [batch, max length], padding where nothing is written yet.
    token: int32 [batch], the next decoder input.
    active: bool [batch], sequences that have not ended.
    cache: of the decoder.
  """

  outputs: jax.Array
  token: jax.Array
  active: jax.Array
  cache: DecodeCache


@functools.partial(
  jax.jit, static_argnames=('config', 'max_length', 'eos_id', 'method')
)
def _generate(
  params: Any,
  encoder_input_tokens: jax.Array,
  rng: jax.Array | None,
  *,
  config: ModelConfig,
  max_length: int,
  eos_id: int,
  method: Sampling,
) -> jax.Array:
  batch = encoder_input_tokens.shape[0]

  def unfinished(state: _LoopState) -> jax.Array:
    return (state.cache.index < max_length) & jnp.any(state.active)

  def step(state: _LoopState) -> _LoopState:
    index = state.cache.index
    logits, cache = decode_step(
      config, params, state.cache, state.token, state.active
    )
    # All-gather: choosing looks at the whole vocabulary.
    logits = partitioning.shard(logits, 'batch', None)
    key = None if rng is None else jax.random.fold_in(rng, index)
    token = choose_tokens(logits, method, key)
    token = jnp.where(state.active, token, PAD_ID)
    return _LoopState(
      outputs=jax.lax.dynamic_update_slice_in_dim(
        state.outputs, token[:, None], index, axis=1
      ),
      token=token,
      active=state.active & (token != eos_id),
      cache=cache,
    )

  start = _LoopState(
    outputs=partitioning.shard(
      jnp.full((batch, max_length), PAD_ID, jnp.int32), 'batch', 'length'
    ),
    token=partitioning.shard(jnp.full(batch, PAD_ID, jnp.int32), 'batch'),
    active=partitioning.shard(
      jnp.any(encoder_input_tokens != PAD_ID, axis=1), 'batch'
    ),
    cache=init_cache(config, params, encoder_input_tokens, max_length),
  )
  return jax.lax.while_loop(unfinished, step, start).outputs


def generate(
  config: ModelConfig,
  params: Any,
  encoder_input_tokens: jax.Array,
  *,
  max_length: int,
  eos_id: int = 1,
  method: Sampling = GREEDY,
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
    method: how to choose tokens.
    rng: key for sampling.

  Returns:
    int32 [batch, max_length].

  Raises:
    UserError: when sampling has no key, `top_k` exceeds the vocabulary, or
      the batch does not divide over the mesh.
  """
  if method.temperature > 0.0 and rng is None:
    raise UserError(
      f'sampling with temperature {method.temperature} needs a random key; '
      'give rng, or temperature 0 for greedy decoding'
    )
  if method.top_k is not None and method.top_k > config.vocab_size:
    raise UserError(
      f'Sampling.top_k {method.top_k} exceeds ModelConfig.vocab_size '
      f'{config.vocab_size}'
    )
  return _generate(
    params,
    encoder_input_tokens,
    rng,
    config=config,
    max_length=max_length,
    eos_id=eos_id,
    method=method,
  )
