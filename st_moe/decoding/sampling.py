"""One sequence per input, token by token: the likeliest, or drawn ones."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from st_moe import partitioning
from st_moe.blocks import DecodeCache
from st_moe.config import ModelConfig
from st_moe.decoding.methods import PAD_ID, Sampling
from st_moe.incremental import decode_step, init_cache


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


def without_padding(scores: jax.Array) -> jax.Array:
  """Sets padding of [batch, vocab] to -inf: it is no word."""
  is_pad = jnp.arange(scores.shape[-1]) == PAD_ID
  return jnp.where(is_pad, -jnp.inf, scores)


def sampling_logits(logits: jax.Array, method: Sampling) -> jax.Array:
  """Returns the logits of the distribution that is drawn from.

  Padding is left out; then act temperature, `top_k` and `top_p`, in the order
  of transformers.

  Args:
    logits: float32 [batch, vocab].
    method: of a temperature above 0.

  Returns:
    float32 [batch, vocab], -inf at what is not drawn.
  """
  logits = without_padding(logits) / method.temperature
  if method.top_k is not None:
    logits = _keep_top_k(logits, method.top_k)
  if method.top_p is not None:
    logits = _keep_top_p(logits, method.top_p)
  return logits


def choose_tokens(
  logits: jax.Array,
  method: Sampling,
  keys: jax.Array | None,
  index: jax.Array | int,
) -> jax.Array:
  """Chooses the next token of every sequence; never padding.

  Args:
    logits: float32 [batch, vocab].
    method: how to choose.
    keys: one for each sequence, [batch]; not needed by greedy decoding.
    index: [] position in the sequence, which the draw depends on.

  Returns:
    int32 [batch].
  """
  if method.temperature == 0.0:
    return jnp.argmax(without_padding(logits), axis=-1).astype(jnp.int32)

  def draw(logits, keys, index):
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
    kept = sampling_logits(logits, method)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

  return partitioning.on_each_device(
    draw,
    (logits, keys, jnp.asarray(index)),
    (('batch', None), ('batch',), ()),
    ('batch',),
  )


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
def sample(
  params: Any,
  encoder_input_tokens: jax.Array,
  keys: jax.Array | None,
  *,
  config: ModelConfig,
  max_length: int,
  eos_id: int,
  method: Sampling,
) -> jax.Array:
  """Returns int32 [batch, max_length]; arguments as of `generate`.

  Args:
    keys: one for each input, [batch]; not needed by greedy decoding.
  """
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
    token = choose_tokens(logits, method, keys, index)
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
