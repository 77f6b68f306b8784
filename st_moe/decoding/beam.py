"""Beam search, equal to that of `generate` in transformers, token by token.

At every step the likeliest 2 x num_beams continuations of an input's unfinished
sequences are looked at. Those among the first num_beams that end are finished,
and compete by score with the finished ones that are there; the likeliest that
do not end go on. With one end-of-sequence, 2 x num_beams leave enough of them.

The rows of different inputs do not meet: each device chooses for its own. The
cache of self-attention is put in the order of the sequences that go on; keys
and values of the encoded input are there once for all sequences of an input.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from st_moe import partitioning
from st_moe.blocks import DecodeCache, LayerCache
from st_moe.config import ModelConfig
from st_moe.decoding.methods import PAD_ID, BeamSearch
from st_moe.decoding.sampling import without_padding
from st_moe.incremental import decode_step, init_cache


@flax.struct.dataclass
class _Beams:
  """Sequences of every input, each list in descending order of scores.

  Attributes:
    running: int32 [batch, beams, max length], unfinished sequences, and
      padding.
    running_scores: float32 [batch, beams], their log-likelihoods; -inf where
      there is none yet.
    finished: int32 [batch, beams, max length].
    finished_scores: float32 [batch, beams], log-likelihoods over the penalty;
      -inf where there is none yet.
    open: bool [batch], inputs whose finished sequences may change.
  """

  running: Any
  running_scores: Any
  finished: Any
  finished_scores: Any
  open: Any


_SEQUENCES = ('batch', None, 'length')
_BEAM_AXES = _Beams(
  running=_SEQUENCES,
  running_scores=('batch', None),
  finished=_SEQUENCES,
  finished_scores=('batch', None),
  open=('batch',),
)


def _take(x: jax.Array, beams: jax.Array) -> jax.Array:
  """Returns [batch, n, ...] of x [batch, beams, ...] and beams [batch, n]."""
  return jax.vmap(lambda row, at: row[at])(x, beams)


def _choose(
  beams: _Beams,
  log_probs: jax.Array,
  index: jax.Array,
  penalties: jax.Array,
  eos_id: int,
  stop: str,
) -> tuple[_Beams, jax.Array]:
  """Goes on by one token.

  Args:
    beams: of the step before.
    log_probs: float32 [batch * beams, vocab] of the next token.
    index: int [] position of the next token.
    penalties: float32 [max length], for sequences of 1, 2, ... tokens.
    eos_id: ends a sequence.
    stop: when the finished sequences of an input may change no more. 'full':
      when all are there. 'now', 'longest': when, besides, the likeliest
      unfinished one has no better score, of its length now or the longest.

  Returns:
    The next step's beams, and int32 [batch, beams], from which each goes on.
  """
  batch, num_beams, max_length = beams.running.shape
  vocab = log_probs.shape[-1]
  scores = beams.running_scores[..., None] + log_probs.reshape(
    (batch, num_beams, vocab)
  )
  scores, places = jax.lax.top_k(scores.reshape((batch, -1)), 2 * num_beams)
  parents, tokens = places // vocab, places % vocab
  sequences = jax.lax.dynamic_update_slice_in_dim(
    _take(beams.running, parents), tokens[..., None], index, axis=2
  )
  ends = (tokens == eos_id) | (index + 1 == max_length)

  running_scores, at = jax.lax.top_k(
    jnp.where(ends, -jnp.inf, scores), num_beams
  )
  running, parents = _take(sequences, at), _take(parents, at)

  is_first = jnp.arange(2 * num_beams) < num_beams
  counts = ends & is_first & beams.open[:, None]
  new_scores = jnp.where(counts, scores / penalties[index], -jnp.inf)
  finished_scores, at = jax.lax.top_k(
    jnp.concatenate([beams.finished_scores, new_scores], axis=1), num_beams
  )
  finished = _take(jnp.concatenate([beams.finished, sequences], axis=1), at)

  worst = finished_scores[:, -1]  # -inf unless all are there
  hoped = max_length - 1 if stop == 'longest' else index
  best = running_scores[:, 0] / penalties[hoped]
  still_open = beams.open & (best > worst)
  if stop == 'full':
    still_open &= worst == -jnp.inf
  return (
    _Beams(running, running_scores, finished, finished_scores, still_open),
    parents,
  )


def _cache_axes(config: ModelConfig) -> tuple[str, ...]:
  names = ('batch', 'length', 'heads', 'kv')
  return ('layers', *names) if config.scan_layers else names


def _reorder(config: ModelConfig, x: jax.Array, parents: jax.Array):
  """Takes rows [batch * beams] of keys or values, in a device's own part."""
  if config.scan_layers:
    take = functools.partial(_reorder_rows, parents=parents)
    return jax.vmap(take)(x)
  return _reorder_rows(x, parents)


def _reorder_rows(x: jax.Array, parents: jax.Array) -> jax.Array:
  beams = x.reshape((*parents.shape, *x.shape[1:]))
  return _take(beams, parents).reshape(x.shape)


def beam_search(
  params: Any,
  encoder_input_tokens: jax.Array,
  *,
  config: ModelConfig,
  max_length: int,
  eos_id: int,
  method: BeamSearch,
) -> jax.Array:
  """Returns the best sequence of every input; arguments as of `generate`."""
  penalty = method.length_penalty
  stop = 'now'
  if method.early_stopping is True:
    stop = 'full'
  elif method.early_stopping == 'never' and penalty > 0:
    stop = 'longest'
  return _search(
    params,
    encoder_input_tokens,
    np.array([(i + 1) ** penalty for i in range(max_length)], np.float32),
    config=config,
    eos_id=eos_id,
    num_beams=method.num_beams,
    stop=stop,
  )


@functools.partial(
  jax.jit, static_argnames=('config', 'eos_id', 'num_beams', 'stop')
)
def _search(
  params: Any,
  encoder_input_tokens: jax.Array,
  penalties: jax.Array,
  *,
  config: ModelConfig,
  eos_id: int,
  num_beams: int,
  stop: str,
) -> jax.Array:
  """Returns int32 [batch, max length]; the last arguments as of `_choose`."""
  batch, max_length = encoder_input_tokens.shape[0], len(penalties)

  def unfinished(state: tuple[_Beams, DecodeCache]) -> jax.Array:
    beams, cache = state
    return (cache.index < max_length) & jnp.any(beams.open)

  def choose(beams, logits, index, penalties, keys_and_values):
    log_probs = without_padding(jax.nn.log_softmax(logits, axis=-1))
    beams, parents = _choose(beams, log_probs, index, penalties, eos_id, stop)
    reordered = jax.tree.map(
      lambda x: _reorder(config, x, parents), keys_and_values
    )
    return beams, reordered

  def step(
    state: tuple[_Beams, DecodeCache],
  ) -> tuple[_Beams, DecodeCache]:
    beams, cache = state
    index = cache.index
    # The first decoder input is padding, as the running sequences are then.
    last = jax.lax.dynamic_index_in_dim(
      beams.running, jnp.maximum(index - 1, 0), axis=2, keepdims=False
    )
    logits, cache = decode_step(
      config,
      params,
      cache,
      partitioning.reshape(last, (batch * num_beams,), ('batch',)),
      partitioning.reshape(
        jnp.broadcast_to(beams.open[:, None], (batch, num_beams)),
        *((batch * num_beams,), ('batch',)),
      ),
    )
    own = [layer.self_attention for layer in cache.layers]
    own_axes = jax.tree.map(lambda _: _cache_axes(config), own)
    beams, own = partitioning.on_each_device(
      choose,
      (beams, logits, index, penalties, own),
      (_BEAM_AXES, ('batch', None), (), ('length',), own_axes),
      (_BEAM_AXES, own_axes),
    )
    layers = tuple(
      LayerCache(keys_and_values, layer.cross_attention)
      for keys_and_values, layer in zip(own, cache.layers, strict=True)
    )
    return beams, cache.replace(layers=layers)

  nothing = partitioning.shard(
    jnp.full((batch, num_beams, max_length), PAD_ID, jnp.int32), *_SEQUENCES
  )
  no_score = jnp.full((batch, num_beams), -jnp.inf)
  start = _Beams(
    running=nothing,
    running_scores=partitioning.shard(
      no_score.at[:, 0].set(0.0), 'batch', None
    ),
    finished=nothing,
    finished_scores=partitioning.shard(no_score, 'batch', None),
    open=partitioning.shard(
      jnp.any(encoder_input_tokens != PAD_ID, axis=1), 'batch'
    ),
  )
  cache = init_cache(
    config, params, encoder_input_tokens, max_length, rows=num_beams
  )
  beams, _ = jax.lax.while_loop(unfinished, step, (start, cache))
  return beams.finished[:, 0]
