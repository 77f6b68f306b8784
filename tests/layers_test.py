"""RMSNorm, dropout, embedding, FFN and output head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import paths

from st_moe import layers, partitioning


def init(module, *args, **kwargs):
  rngs = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
  return partitioning.unbox(module.init(rngs, *args, **kwargs))


def test_rms_norm_divides_by_the_root_mean_square():
  norm = layers.RMSNorm(epsilon=1e-6)
  x = jnp.array([[3.0, 4.0, 0.0, 0.0]])  # mean square 25 / 4
  variables = {'params': {'scale': jnp.array([1.0, 2.0, 1.0, 1.0])}}
  np.testing.assert_allclose(
    norm.apply(variables, x), [[1.2, 3.2, 0.0, 0.0]], rtol=1e-6
  )


def test_rms_norm_keeps_the_mean():
  x = jnp.full((1, 4), 7.0)
  norm = layers.RMSNorm()
  np.testing.assert_allclose(norm.apply(init(norm, x), x), x / 7, rtol=1e-5)


def test_rms_norm_epsilon_bounds_small_inputs():
  x = jnp.full((1, 4), 1e-3)  # mean square equals epsilon
  norm = layers.RMSNorm(epsilon=1e-6)
  np.testing.assert_allclose(
    norm.apply(init(norm, x), x), np.full((1, 4), 0.5**0.5), rtol=1e-5
  )


def test_rms_norm_without_scale_has_no_parameter():
  x = jnp.ones((1, 4))
  assert init(layers.RMSNorm(use_scale=False), x) == {}
  assert paths(init(layers.RMSNorm(), x)) == {'params/scale'}


def test_rms_norm_of_bfloat16_is_computed_in_float32():
  x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16) * 300
  norm = layers.RMSNorm(use_scale=False)
  expected = norm.apply({}, x.astype(jnp.float32)).astype(jnp.bfloat16)
  assert norm.apply({}, x).dtype == jnp.bfloat16
  assert (norm.apply({}, x) == expected).all()


def drop(rate, x, train=True, seed=0, **kwargs):
  return layers.Dropout(rate, **kwargs).apply(
    {}, x, train=train, rngs={'dropout': jax.random.key(seed)}
  )


def test_dropout_has_one_mask_for_all_positions():
  y = drop(0.5, jnp.ones((4, 7, 64)))
  assert (y == y[:, :1]).all()
  assert not (y[0] == y[1]).all()


def test_dropout_keeps_the_expectation():
  y = drop(0.25, jnp.ones((64, 1, 1024)))
  kept = y > 0
  np.testing.assert_allclose(y[kept], 4 / 3, rtol=1e-6)
  # 65536 draws: the standard deviation of the mean is 0.0017.
  assert abs(float(kept.mean()) - 0.75) < 0.008


def test_dropout_needs_no_key_outside_training_or_at_rate_0():
  x = jnp.ones((2, 3, 4))
  assert (layers.Dropout(0.5).apply({}, x, train=False) == x).all()
  assert (layers.Dropout(0.0).apply({}, x, train=True) == x).all()


def test_embedding_looks_up_rows():
  table = jnp.arange(12.0).reshape(4, 3)
  ids = jnp.array([[3, 0], [1, 1]])
  expected = [[[9, 10, 11], [0, 1, 2]], [[3, 4, 5], [3, 4, 5]]]
  assert layers.embed(table, ids).tolist() == expected


def test_embedding_has_unit_deviation():
  table = init(layers.Embed(500, 64))['params']['embedding']
  assert abs(float(table.std()) - 1.0) < 0.02


def test_geglu_is_the_product_of_gelu_and_linear_branches():
  mlp = layers.Mlp(d_ff=5, activations=('gelu', 'linear'))
  x = jax.random.normal(jax.random.key(2), (2, 3, 4))
  variables = init(mlp, x, train=False)
  wi_0, wi_1, wo = (
    np.asarray(variables['params'][name]['kernel'], np.float64)
    for name in ('wi_0', 'wi_1', 'wo')
  )
  h = np.asarray(x, np.float64) @ wi_0
  gelu = h / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
  expected = (gelu * (np.asarray(x, np.float64) @ wi_1)) @ wo
  np.testing.assert_allclose(
    mlp.apply(variables, x, train=False), expected, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize(
  'activations, names',
  [(('relu',), {'wi', 'wo'}), (('silu', 'linear'), {'wi_0', 'wi_1', 'wo'})],
)
def test_mlp_kernels_have_the_names_of_t5x(activations, names):
  mlp = layers.Mlp(d_ff=5, activations=activations)
  variables = init(mlp, jnp.ones((1, 2, 4)), train=False)
  assert paths(variables) == {f'params/{name}/kernel' for name in names}


def test_relu_mlp():
  mlp = layers.Mlp(d_ff=2, activations=('relu',))
  wi = jnp.array([[1.0, -1.0], [1.0, 0.0]])
  wo = jnp.array([[1.0, 2.0], [3.0, 4.0]])
  params = {'wi': {'kernel': wi}, 'wo': {'kernel': wo}}
  y = mlp.apply({'params': params}, jnp.array([[[2.0, 1.0]]]), train=False)
  assert y.tolist() == [[[3.0, 6.0]]]  # hidden units 3 and relu(-2)


def test_mlp_dropout_acts_on_hidden_units():
  """With one hidden unit, either everything is dropped or all is doubled."""
  mlp = layers.Mlp(d_ff=1, activations=('linear',), dropout_rate=0.5)
  x = jnp.ones((32, 3, 4))
  variables = init(mlp, x, train=False)
  clean = mlp.apply(variables, x, train=False)
  noisy = mlp.apply(
    variables, x, train=True, rngs={'dropout': jax.random.key(0)}
  )
  ratio = np.asarray(noisy / clean)
  dropped = np.isclose(ratio, 0.0).all(axis=(1, 2))
  doubled = np.isclose(ratio, 2.0).all(axis=(1, 2))
  assert (dropped | doubled).all()
  assert dropped.any() and doubled.any()


def test_mlp_kernels_have_the_deviation_of_mesh_tensorflow():
  """sqrt(scale / fan_in), times 0.8796 for the cut at two deviations."""
  mlp = layers.Mlp(d_ff=256, init_scale=0.1)
  params = init(mlp, jnp.ones((1, 1, 64)), train=False)['params']
  for name, fan_in in (('wi_0', 64), ('wi_1', 64), ('wo', 256)):
    expected = 0.8796 * (0.1 / fan_in) ** 0.5
    assert abs(float(params[name]['kernel'].std()) / expected - 1) < 0.02


def test_logits_are_float32_sums_of_bfloat16_products():
  x = jax.random.normal(jax.random.key(0), (2, 3, 64), jnp.bfloat16)
  w = jax.random.normal(jax.random.key(1), (64, 9), jnp.bfloat16)
  logits = layers.untied_logits(x, w)
  assert logits.dtype == jnp.float32
  expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)


def test_tied_logits_are_scaled_by_the_root_of_d_model():
  x = jnp.full((1, 1, 16), 2.0)
  table = jnp.stack([jnp.ones(16), -jnp.ones(16)])
  assert layers.tied_logits(x, table).tolist() == [[[8.0, -8.0]]]
