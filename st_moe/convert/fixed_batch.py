"""One fixed batch through a written model, and through its source's own code.

On one device a model is run layer by layer, each read when its turn comes, so
that the largest array is the measure of memory, not the model.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from st_moe import layers, partitioning, trees
from st_moe.blocks import Block, StackInputs, norm, relpos_bias
from st_moe.config import ModelConfig
from st_moe.stacking import depth, sparse_layers
from st_moe.transformer import apply_model, encode, token_segments

ROWS, INPUTS, TARGETS = 4, 24, 12
_WORDS = 1024  # of the vocabulary, at a time
_SEED = 20220217  # the day of the paper


@dataclasses.dataclass(frozen=True)
class Outputs:
  """What a model makes of the batch, float32.

  Attributes:
    encoded: [rows, INPUTS, d_model].
    logits: [rows, TARGETS, vocab].
  """

  encoded: np.ndarray
  logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
  """Largest differences at real tokens, and the size of what was compared."""

  encoded: float
  logits: float
  largest_encoded: float
  largest_logit: float

  def small(self) -> bool:
    """Whether rounding explains it."""
    return self.encoded <= 1e-3 * max(1.0, self.largest_encoded) and (
      self.logits <= 1e-3 * max(1.0, self.largest_logit)
    )


def make_batch(vocab_size: int, rows: int = ROWS) -> dict[str, np.ndarray]:
  """Returns random tokens, rows of different lengths: seqio's features."""
  rng = np.random.default_rng(_SEED)

  def tokens(size: int) -> np.ndarray:
    lengths = size - np.arange(rows) * size // (2 * rows)
    ids = rng.integers(2, vocab_size, (rows, size))
    return (ids * (np.arange(size) < lengths[:, None])).astype(np.int32)

  inputs, targets = tokens(INPUTS), tokens(TARGETS)
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
  }


def compare(
  batch: dict[str, np.ndarray], ours: Outputs, theirs: Outputs
) -> Difference:
  """Compares outputs where there are tokens."""
  encoder = batch['encoder_input_tokens'] > 0
  decoder = batch['decoder_target_tokens'] > 0
  return Difference(
    encoded=float(np.abs(ours.encoded - theirs.encoded)[encoder].max()),
    logits=float(np.abs(ours.logits - theirs.logits)[decoder].max()),
    largest_encoded=float(np.abs(theirs.encoded)[encoder].max()),
    largest_logit=float(np.abs(theirs.logits)[decoder].max()),
  )


def with_capacity(config: ModelConfig, capacity: int | None) -> ModelConfig:
  """Returns a model in float32 with so many slots per expert; None: no limit.

  Training and generation settings stay as they are.
  """
  routers = {
    f'{stack}_router': dataclasses.replace(
      getattr(config, f'{stack}_router'),
      **(
        {'eval_dropless': True}
        if capacity is None
        else {
          'eval_dropless': False,
          'generation_dropless': False,
          'capacity_formula': 'fixed',
          'fixed_capacity': capacity,
        }
      ),
    )
    for stack in ('encoder', 'decoder')
  }
  if not config.num_experts:
    routers = {}
  return dataclasses.replace(config, activation_dtype='float32', **routers)


def run_whole(
  config: ModelConfig, params: Any, batch: dict[str, np.ndarray]
) -> Outputs:
  """Runs a model whose parameters are on their devices."""

  def run(params: Any, batch: dict[str, jax.Array]) -> tuple:
    encoded = encode(config, params, batch['encoder_input_tokens'])
    return encoded, apply_model(config, params, batch, train=False).logits

  encoded, logits = jax.jit(run)(params, batch)
  return Outputs(np.asarray(encoded), np.asarray(logits))


def run_by_layers(
  config: ModelConfig,
  names: Iterable[str],
  read: Callable[[str], np.ndarray],
  batch: dict[str, np.ndarray],
) -> Outputs:
  """Runs a written-out model, reading one layer at a time.

  Args:
    config: of the model; `scan_layers` is false.
    names: of its parameters.
    read: returns a parameter.
    batch: as `make_batch` returns it.
  """
  names = tuple(names)

  def under(prefix: str) -> dict[str, Any]:
    start = len(prefix) + 1
    return trees.nested(
      {n[start:]: read(n) for n in names if n.startswith(f'{prefix}/')}
    )

  def embedded(tokens: np.ndarray) -> jax.Array:
    return jnp.asarray(read('token_embedder/embedding')[tokens])

  segments = token_segments(batch['encoder_input_tokens'], None)
  encoded = _run_stack(
    config, 'encoder', under, embedded(batch['encoder_input_tokens']),
    segments=segments,
  )  # fmt: skip
  y = _run_stack(
    config, 'decoder', under, embedded(batch['decoder_input_tokens']),
    segments=token_segments(batch['decoder_target_tokens'], None),
    encoded=encoded,
    encoded_segments=segments,
  )  # fmt: skip
  return Outputs(np.asarray(encoded), _logits(config, read, y))


def _logits(
  config: ModelConfig, read: Callable[[str], np.ndarray], y: jax.Array
) -> np.ndarray:
  """Returns logits of y [rows, length, d_model], a part of the words each time.

  The projection is the largest array of most models: one copy is enough.
  """
  name = 'token_embedder/embedding'
  if not config.tie_embeddings:
    name = 'decoder/logits_dense/kernel'
  weights = read(name)
  parts = []
  for start in range(0, config.vocab_size, _WORDS):
    words = slice(start, start + _WORDS)
    if config.tie_embeddings:
      part = layers.tied_logits(y, weights[words])
    else:
      part = layers.untied_logits(y, weights[:, words])
    # Waits: parts under way at once would each hold a copy of their weights.
    parts.append(np.asarray(part))
  return np.concatenate(parts, axis=-1)


def _run_stack(
  config: ModelConfig,
  stack: str,
  under: Callable[[str], dict[str, Any]],
  x: jax.Array,
  *,
  segments: jax.Array,
  **encoded: jax.Array,
) -> jax.Array:
  """Runs the layers of a stack and its norm, as `transformer` does."""
  positions = jnp.arange(x.shape[1])
  bias = None
  if config.relative_position_biases == 'shared':
    bias = relpos_bias(config, stack).apply(
      {'params': under(f'{stack}/relpos_bias')}, positions, positions
    )
  inputs = StackInputs(
    segments=segments,
    key_segments=segments,
    positions=positions,
    key_positions=positions,
    bias=bias,
    token_embeddings=x,
    **encoded,
  )

  @functools.partial(jax.jit, static_argnames='sparse')
  def layer(params: Any, x: jax.Array, sparse: bool) -> jax.Array:
    block = Block(config, stack, sparse, train=False)
    return block.apply({'params': params}, x, inputs, None)[0]

  sparse = sparse_layers(config, stack)
  for i in range(depth(config, stack)):
    # Waits: each layer under way holds a copy of its weights.
    x = layer(under(f'{stack}/layers_{i}'), x, i in sparse).block_until_ready()
  scale = under(f'{stack}/{stack}_norm')
  jax.clear_caches()  # the program of a layer is 40 MB, and not needed again
  return norm(config, None).apply({'params': scale}, x)


def rows_for(mesh: jax.sharding.Mesh | None) -> int:
  """Returns how many rows divide over a mesh; ROWS without one."""
  if mesh is None:
    return ROWS
  with partitioning.use_mesh(mesh):
    return ROWS * partitioning.batch_shards()
