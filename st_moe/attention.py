"""Multi-head attention with T5's relative position bias.

T5X `layers.py` and Mesh TensorFlow `attention.py`: no biases, no division by
sqrt(d_kv) (the initializer of `query` holds it), softmax in float32.

Who may look at whom is said by segment ids: a query sees the keys of its own
segment. Padding is segment 0; without packing every real token is segment 1.
That is all an attention kernel needs to know, so another implementation may
take the place of `attend`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from st_moe import partitioning
from st_moe.errors import UserError
from st_moe.layers import Dropout, Kernel

# Logit of a key that may not be seen; Mesh TensorFlow's.
MASKED_LOGIT = -1e9


@flax.struct.dataclass
class KeyValue:
  """Keys and values, each [batch, length, heads, d_kv]."""

  key: jax.Array
  value: jax.Array


@flax.struct.dataclass
class AttentionOutput:
  """Result of an attention layer.

  Attributes:
    y: [batch, query length, d_model].
    z_loss: [] sum over real queries and heads of logsumexp(logits)^2.
    key_value: what was attended to; the cache of the next decoding step.
  """

  y: jax.Array
  z_loss: jax.Array
  key_value: KeyValue


def _distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
  """Returns the bucket of each distance 0..max_distance.

  Half of the buckets hold one distance each; the others grow
  logarithmically up to `max_distance` (T5, section 2.1).

  Raises:
    UserError: when there is no room for either half.
  """
  exact = num_buckets // 2
  if exact < 1 or max_distance <= exact:
    raise UserError(
      f'{num_buckets} relative attention buckets for each direction need at '
      f'least 2, and a max distance above {exact}, got {max_distance}; see '
      'ModelConfig.relative_attention_num_buckets and _max_distance'
    )
  distance = np.arange(max_distance + 1)
  growth = np.log(np.maximum(distance, 1) / exact) / np.log(
    max_distance / exact
  )
  # The small number keeps exact powers on their side of the boundary.
  large = exact + np.floor(growth * (num_buckets - exact) + 1e-6).astype(int)
  return np.where(
    distance < exact, distance, np.minimum(large, num_buckets - 1)
  )


def relative_position_bucket(
  relative_position: jax.Array,
  *,
  bidirectional: bool,
  num_buckets: int,
  max_distance: int,
) -> jax.Array:
  """Maps relative positions to buckets.

  Args:
    relative_position: int, key position minus query position.
    bidirectional: whether later keys have buckets of their own (the upper
      half); otherwise they share the bucket of distance 0.
    num_buckets: in all.
    max_distance: from which on all distances share the last bucket.
  """
  offset = 0
  if bidirectional:
    num_buckets //= 2
    offset = jnp.where(relative_position > 0, num_buckets, 0)
    distance = jnp.abs(relative_position)
  else:
    distance = jnp.maximum(-relative_position, 0)
  buckets = jnp.asarray(_distance_buckets(num_buckets, max_distance))
  return offset + buckets[jnp.minimum(distance, max_distance)]


class RelativePositionBias(nn.Module):
  """A learned number for each head and bucket, of a stack or of one layer."""

  num_heads: int
  num_buckets: int
  max_distance: int
  bidirectional: bool

  @nn.compact
  def __call__(
    self, query_positions: jax.Array, key_positions: jax.Array
  ) -> jax.Array:
    """Returns the biases of all pairs of a query and a key.

    Each shard of the batch has its own copy, from the table on. The gradient
    is then added up across devices once, at the table, and not [heads, queries,
    keys] of it in every layer.

    Args:
      query_positions: int [queries].
      key_positions: int [keys].

    Returns:
      float32 [batch shards, heads, queries, keys].
    """
    table = partitioning.param(
      self,
      'rel_embedding',
      nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),  # T5X's
      (self.num_heads, self.num_buckets),
      ('heads', 'relpos_buckets'),
    )
    buckets = relative_position_bucket(
      key_positions[None, :] - query_positions[:, None],
      bidirectional=self.bidirectional,
      num_buckets=self.num_buckets,
      max_distance=self.max_distance,
    )
    # A product with one-hot vectors, not a lookup: the gradient of a lookup
    # adds up a few numbers at a time. Pairs on one axis: with two, XLA
    # transposes an operand of the gradient.
    one_hot = jax.nn.one_hot(
      buckets.ravel(), self.num_buckets, dtype=table.dtype
    )
    shards = partitioning.batch_shards()
    tables = partitioning.shard(
      jnp.broadcast_to(table, (shards, *table.shape)),
      *('batch', 'heads', 'relpos_buckets'),
    )
    bias = partitioning.einsum('bhn,pn->bhp', tables, one_hot)
    return partitioning.reshape(
      bias,
      (shards, self.num_heads, *buckets.shape),
      ('batch', 'heads', None, None),
    )


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
  """Reshapes [batch, length, joined_kv] to [batch, length, heads, d_kv].

  Raises:
    UserError: when heads do not divide over the model axis.
  """
  batch, length, joined = x.shape
  return partitioning.reshape(
    x,
    (batch, length, num_heads, joined // num_heads),
    ('batch', 'length', 'heads', 'kv'),
  )


def project(x: jax.Array, kernel: jax.Array, num_heads: int) -> jax.Array:
  """Returns [batch, length, heads, d_kv] for kernel [d_model, joined_kv]."""
  y = partitioning.project(x, kernel, ('embed', 'joined_kv'))
  return split_heads(y, num_heads)


def attention_logits(
  query: jax.Array,
  key: jax.Array,
  bias: jax.Array | None,
  query_segments: jax.Array,
  key_segments: jax.Array,
  causal: bool,
) -> jax.Array:
  """Returns float32 logits [batch, heads, queries, keys], masked.

  Args:
    query: [batch, queries, heads, d_kv].
    key: [batch, keys, heads, d_kv].
    bias: float32 [batch shards, heads, queries, keys], or None.
    query_segments: int [batch, queries].
    key_segments: int [batch, keys].
    causal: whether a query sees only keys at or before its own index.
  """
  logits = partitioning.einsum(
    'bqhk,bshk->bhqs', query, key, preferred_element_type=jnp.float32
  )
  if bias is not None:
    shape, shards = logits.shape, bias.shape[0]
    logits = partitioning.reshape(
      logits,
      (shards, shape[0] // shards, *shape[1:]),
      ('batch', None, 'heads', None, None),
    )
    logits = partitioning.reshape(
      logits + bias[:, None], shape, ('batch', 'heads', None, None)
    )
  visible = query_segments[:, :, None] == key_segments[:, None, :]
  if causal:
    steps = jnp.arange(query.shape[1])[:, None] >= jnp.arange(key.shape[1])
    visible &= steps
  return jnp.where(visible[:, None], logits, MASKED_LOGIT)


def attend(
  query: jax.Array,
  key_value: KeyValue,
  bias: jax.Array | None,
  query_segments: jax.Array,
  key_segments: jax.Array,
  *,
  causal: bool,
  with_z_loss: bool,
  dropout: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """The attention core; arguments as of `attention_logits`.

  Args:
    with_z_loss: whether to compute footnote 4's z-loss.
    dropout: acts on the weights [batch, heads, queries, keys].

  Returns:
    Averaged values [batch, queries, heads, d_kv], and the z-loss summed over
    real queries and heads (0 when not wanted).
  """
  logits = attention_logits(
    query, key_value.key, bias, query_segments, key_segments, causal
  )
  z_loss = jnp.zeros((), jnp.float32)
  if with_z_loss:
    real = (query_segments > 0)[:, None, :]  # [batch, 1, queries]
    z_loss = jnp.sum(real * jnp.square(jax.nn.logsumexp(logits, axis=-1)))
  weights = dropout(jax.nn.softmax(logits, axis=-1).astype(query.dtype))
  y = partitioning.einsum('bhqs,bshk->bqhk', weights, key_value.value)
  return y, z_loss


class Attention(nn.Module):
  """Self- or cross-attention over `source`, or over cached keys and values."""

  num_heads: int
  d_kv: int
  dropout_rate: float = 0.0
  with_z_loss: bool = False  # footnote 4
  dtype: Any = jnp.float32

  def _kernel(self, name: str, d_model: int, stddev: float) -> jax.Array:
    joined = self.num_heads * self.d_kv
    shape, axes = (d_model, joined), ('embed', 'joined_kv')
    if name == 'out':
      shape, axes = shape[::-1], axes[::-1]
    init = nn.initializers.normal(stddev)
    return Kernel(shape, axes, init, self.dtype, name=name)()

  def _key_value(self, source: jax.Array) -> KeyValue:
    d_model = source.shape[-1]
    return KeyValue(
      *(
        project(
          source, self._kernel(name, d_model, d_model**-0.5), self.num_heads
        )
        for name in ('key', 'value')
      )
    )

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    source: jax.Array | None,
    *,
    query_segments: jax.Array,
    key_segments: jax.Array,
    causal: bool = False,
    bias: jax.Array | None = None,
    cache: KeyValue | None = None,
    index: jax.Array | None = None,
    train: bool,
  ) -> AttentionOutput:
    """Attends from x.

    Args:
      x: [batch, queries, d_model].
      source: [batch, keys, d_model] to project keys and values from; None to
        attend to `cache` as it is. That may have a row for each n of x, one
        after another, in which it is looked at by all of them.
      query_segments: int [batch, queries].
      key_segments: int [batch, keys].
      causal: whether a query sees only keys at or before its own index.
      bias: float32 [batch shards, heads, queries, keys], or None.
      cache: keys and values of earlier steps; those of `source` are written
        at `index`.
      index: [] first position of `source` in the cache.
      train: whether dropout acts.
    """
    d_model, joined = x.shape[-1], self.num_heads * self.d_kv
    query_kernel = self._kernel('query', d_model, (d_model * self.d_kv) ** -0.5)
    query = project(x, query_kernel, self.num_heads)
    key_value = cache if source is None else self._key_value(source)
    if source is not None and cache is not None:
      key_value = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(
          old, new, index, axis=1
        ),
        cache,
        key_value,
      )
    shape = query.shape
    if source is None and len(cache.key) < len(query):  # of one query each
      rows = (len(cache.key), shape[0] // len(cache.key))
      query = partitioning.reshape(
        query, (*rows, *shape[2:]), ('batch', None, 'heads', 'kv')
      )
      query_segments = partitioning.reshape(
        query_segments, rows, ('batch', None)
      )
    # One dropout mask for all queries, as in Mesh TensorFlow and T5X.
    dropout = Dropout(self.dropout_rate, ('batch', 'heads', 'length', None))
    y, z_loss = attend(
      query,
      key_value,
      bias,
      query_segments,
      key_segments,
      causal=causal,
      with_z_loss=self.with_z_loss,
      dropout=functools.partial(dropout, train=train),
    )  # [batch, queries, heads, d_kv]
    y = partitioning.reshape(
      y, (*shape[:2], joined), ('batch', 'length', 'joined_kv')
    )
    # Adds partial sums over the model axis.
    y = partitioning.project(
      y,
      self._kernel('out', d_model, joined**-0.5),
      ('joined_kv', 'embed'),
    )
    return AttentionOutput(y=y, z_loss=z_loss, key_value=key_value)
