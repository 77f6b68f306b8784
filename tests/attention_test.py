"""Attention, its masks, its cache, and relative position buckets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import attention, partitioning
from st_moe.config import MeshConfig
from st_moe.errors import UserError

# First distance of each bucket, 32 buckets and max distance 128: exact ones,
# then steps of a factor 128^(1/8) / 8^(1/8), or of 8^(1/16) one-directional.
BIDIRECTIONAL = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
CAUSAL = [
  *range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113,
]  # fmt: skip


def buckets(positions, **kwargs):
  return attention.relative_position_bucket(
    jnp.asarray(positions), num_buckets=32, max_distance=128, **kwargs
  )


def test_buckets_of_a_bidirectional_stack():
  distance = np.arange(300)
  expected = np.searchsorted(BIDIRECTIONAL, distance, side='right') - 1
  before = buckets(-distance, bidirectional=True)
  after = buckets(distance, bidirectional=True)
  np.testing.assert_array_equal(before, expected)
  # Later keys have the upper half; distance 0 is shared.
  np.testing.assert_array_equal(after, expected + 16 * (distance > 0))


def test_buckets_of_a_causal_stack():
  distance = np.arange(300)
  expected = np.searchsorted(CAUSAL, distance, side='right') - 1
  np.testing.assert_array_equal(
    buckets(-distance, bidirectional=False), expected
  )
  assert (buckets(distance, bidirectional=False) == 0).all()


def test_an_odd_bucket_is_the_last_of_a_causal_stack_and_never_used_else():
  # 7 of them: 3 + 4 for one direction; 1 + 2 for each of two.
  distance = np.arange(40)
  one = attention.relative_position_bucket(
    jnp.asarray(-distance), bidirectional=False, num_buckets=7, max_distance=48
  )
  starts = [0, 1, 2, 3, 6, 12, 24]  # factors of (48 / 3)^(1/4)
  np.testing.assert_array_equal(
    one, np.searchsorted(starts, distance, side='right') - 1
  )
  two = attention.relative_position_bucket(
    jnp.asarray([-40, -7, -1, 0, 1, 7, 40]),
    bidirectional=True,
    num_buckets=7,
    max_distance=48,
  )
  np.testing.assert_array_equal(two, [2, 2, 1, 0, 4, 5, 5])


@pytest.mark.parametrize('num_buckets, max_distance', [(1, 128), (32, 16)])
def test_buckets_without_room_are_refused(num_buckets, max_distance):
  with pytest.raises(UserError, match='buckets'):
    attention.relative_position_bucket(
      jnp.arange(3),
      bidirectional=False,
      num_buckets=num_buckets,
      max_distance=max_distance,
    )


def test_position_bias_is_looked_up_by_key_minus_query():
  module = attention.RelativePositionBias(
    num_heads=2, num_buckets=32, max_distance=128, bidirectional=True
  )
  table = jnp.stack([jnp.arange(32.0), -jnp.arange(32.0)])
  bias = module.apply(
    {'params': {'rel_embedding': table}}, jnp.arange(2), jnp.arange(3)
  )
  expected = np.array([[0, 17, 18], [1, 0, 17]])
  np.testing.assert_array_equal(bias, [[expected, -expected]])


def naive_attention(params, x, source, bias, visible, num_heads):
  """One head and one sequence at a time, in float64."""
  kernels = {
    name: np.asarray(params[name]['kernel'], np.float64)
    for name in ('query', 'key', 'value', 'out')
  }
  x, source = np.asarray(x, np.float64), np.asarray(source, np.float64)
  size = kernels['query'].shape[1] // num_heads
  rows = []
  for b in range(len(x)):
    heads = []
    for h in range(num_heads):
      part = slice(h * size, (h + 1) * size)
      q = x[b] @ kernels['query'][:, part]
      k = source[b] @ kernels['key'][:, part]
      v = source[b] @ kernels['value'][:, part]
      logits = q @ k.T + bias[h]  # no 1 / sqrt(d_kv)
      weights = np.exp(logits) * visible[b]
      heads.append(weights / weights.sum(axis=-1, keepdims=True) @ v)
    rows.append(np.concatenate(heads, axis=-1) @ kernels['out'])
  return np.stack(rows)


def attend(x, source, module=None, train=False, **kwargs):
  """Returns parameters and the output; everyone is in segment 1 unless said."""
  module = module or attention.Attention(num_heads=2, d_kv=4)
  causal = kwargs.pop('causal', False)

  @jax.jit
  def run(x, source, kwargs):
    keys = x if source is None else source
    segments = {
      'query_segments': jnp.ones(x.shape[:2], jnp.int32),
      'key_segments': jnp.ones(keys.shape[:2], jnp.int32),
    }
    variables = partitioning.unbox(
      module.init(jax.random.key(0), x, keys, train=False, **segments)
    )
    output = module.apply(
      variables,
      x,
      source,
      train=train,
      causal=causal,
      rngs={'dropout': jax.random.key(3)},
      **(segments | kwargs),
    )
    return variables['params'], output

  return run(x, source, kwargs)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def test_attention_equals_a_naive_one():
  x, source, bias = normal(1, 2, 3, 8), normal(2, 2, 5, 8), normal(3, 2, 3, 5)
  query_segments = np.array([[1, 1, 2], [1, 1, 1]])
  key_segments = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]])
  visible = query_segments[:, :, None] == key_segments[:, None, :]
  params, output = attend(
    x,
    source,
    bias=bias[None],
    query_segments=jnp.asarray(query_segments),
    key_segments=jnp.asarray(key_segments),
  )
  expected = naive_attention(params, x, source, np.asarray(bias), visible, 2)
  np.testing.assert_allclose(output.y, expected, rtol=1e-5, atol=1e-6)


def test_causal_attention_equals_a_naive_one():
  x = normal(1, 2, 4, 8)
  visible = np.broadcast_to(np.tri(4), (2, 4, 4))
  params, output = attend(x, x, causal=True)
  expected = naive_attention(params, x, x, np.zeros(2), visible, 2)
  np.testing.assert_allclose(output.y, expected, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_stays_finite():
  x = normal(1, 1, 3, 8)
  _, output = attend(x, x, query_segments=jnp.array([[1, 1, 5]]))
  assert jnp.isfinite(output.y).all()


def test_initial_deviations_fold_in_the_scaling_of_logits():
  """Mesh TensorFlow attention.py: query holds 1 / sqrt(d_kv)."""
  module = attention.Attention(num_heads=8, d_kv=16)
  params, _ = attend(jnp.ones((1, 2, 64)), jnp.ones((1, 2, 64)), module=module)
  expected = {
    'query': (64 * 16) ** -0.5,
    'key': 64**-0.5,
    'value': 64**-0.5,
    'out': (8 * 16) ** -0.5,
  }
  assert params.keys() == expected.keys()
  for name, stddev in expected.items():
    assert abs(float(params[name]['kernel'].std()) / stddev - 1) < 0.03, name


def test_attention_z_loss_sums_over_real_queries_and_heads():
  x = normal(1, 1, 3, 8)
  segments = jnp.array([[1, 1, 0]])
  module = attention.Attention(num_heads=2, d_kv=4, with_z_loss=True)
  params, output = attend(
    x, x, query_segments=segments, key_segments=segments, module=module
  )
  expected = 0.0
  for head in range(2):
    part = slice(4 * head, 4 * head + 4)
    q = np.asarray(x[0, :2] @ params['query']['kernel'][:, part])
    k = np.asarray(x[0, :2] @ params['key']['kernel'][:, part])
    expected += (np.log(np.exp(q @ k.T).sum(axis=-1)) ** 2).sum()
  np.testing.assert_allclose(output.z_loss, expected, rtol=1e-5)


def test_attention_z_loss_is_0_when_not_wanted():
  x = normal(1, 1, 3, 8)
  assert attend(x, x)[1].z_loss == 0.0


def test_one_dropout_mask_for_all_queries():
  """Keys are weighted alike by all queries, so outputs must agree."""
  x = jnp.broadcast_to(normal(1, 4, 1, 8), (4, 6, 8))
  source = normal(2, 4, 5, 8)
  module = attention.Attention(num_heads=2, d_kv=4, dropout_rate=0.5)
  noisy = attend(x, source, module, train=True)[1].y
  clean = attend(x, source, module)[1].y
  np.testing.assert_allclose(noisy, noisy[:, :1] + 0 * noisy, rtol=1e-5)
  assert not np.allclose(noisy, clean)


def test_cached_attention_equals_causal_attention():
  x = normal(1, 2, 4, 8)
  _, whole = attend(x, x, causal=True)
  empty = jnp.zeros((2, 4, 2, 4))
  cache = attention.KeyValue(empty, empty)
  for i in range(4):
    step = x[:, i : i + 1]
    filled = jnp.broadcast_to((jnp.arange(4) <= i).astype(jnp.int32), (2, 4))
    _, output = attend(
      step, step, key_segments=filled, cache=cache, index=jnp.int32(i)
    )
    cache = output.key_value
    np.testing.assert_allclose(
      output.y[:, 0], whole.y[:, i], rtol=1e-5, atol=1e-6
    )
  np.testing.assert_allclose(cache.key, whole.key_value.key, rtol=1e-5)


def test_attention_to_a_given_cache_needs_no_source():
  x, source = normal(1, 2, 3, 8), normal(2, 2, 5, 8)
  _, expected = attend(x, source)
  ones = jnp.ones((2, 5), jnp.int32)
  _, output = attend(x, None, cache=expected.key_value, key_segments=ones)
  np.testing.assert_allclose(output.y, expected.y, rtol=1e-6)


def test_logits_and_softmax_are_float32_in_a_bfloat16_model():
  x = normal(1, 2, 3, 8).astype(jnp.bfloat16)
  module = attention.Attention(num_heads=2, d_kv=4, dtype=jnp.bfloat16)
  y = attend(x, x, module=module)[1].y
  assert y.dtype == jnp.bfloat16
  seen = []
  ones = jnp.ones((2, 3), jnp.int32)
  query = normal(2, 2, 3, 2, 4).astype(jnp.bfloat16)
  logits = attention.attention_logits(query, query, None, ones, ones, False)
  assert logits.dtype == jnp.float32
  attention.attend(
    query,
    attention.KeyValue(query, query),
    None,
    ones,
    ones,
    causal=False,
    with_z_loss=False,
    dropout=lambda weights: seen.append(weights.dtype) or weights,
  )
  assert seen == [jnp.bfloat16]  # only what multiplies the values


@pytest.mark.parametrize('axis_types', ['auto', 'explicit'])
def test_heads_that_do_not_divide_over_the_model_axis_are_refused(axis_types):
  mesh = partitioning.make_mesh(
    MeshConfig(data=2, model=4, axis_types=axis_types)
  )
  split = functools.partial(attention.split_heads, num_heads=6)
  with (
    partitioning.use_mesh(mesh),
    pytest.raises(UserError, match=r'heads .*6.* not divisible by .*4'),
  ):
    jax.eval_shape(split, jax.ShapeDtypeStruct((2, 3, 24), jnp.float32))
