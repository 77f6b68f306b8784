"""The sparse layer as a whole: experts, router inputs, groups, decoding."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import partitioning
from st_moe.config import RouterConfig
from st_moe.errors import UserError
from st_moe.moe import MoeLayer, Router

BATCH, LENGTH, WIDTH, D_FF, NUM_EXPERTS = 4, 8, 16, 24, 4
KEEP_ALL = RouterConfig(
  group_size=16, train_choice_policy='all', eval_choice_policy='all'
)
# Room for every token at every expert.
ROOMY = dataclasses.replace(
  KEEP_ALL, train_capacity_factor=8.0, eval_capacity_factor=8.0
)


def make_layer(router=KEEP_ALL, **changes):
  settings = {
    'num_experts': NUM_EXPERTS,
    'd_ff': D_FF,
    'activations': ('gelu', 'linear'),
    'router': router,
  }
  return MoeLayer(**(settings | changes))


def init(layer, **kwargs):
  x = jnp.zeros((BATCH, LENGTH, WIDTH))
  variables = layer.init(jax.random.key(0), x, None, train=False, **kwargs)
  return partitioning.unbox(variables['params'])


@pytest.fixture(scope='module')
def x():
  return jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))


def geglu(params, x, expert=0):
  """An ordinary FFN with the weights of one expert (equation 3)."""
  wi_0, wi_1, wo = (
    params['expert'][name]['kernel'][expert] for name in ('wi_0', 'wi_1', 'wo')
  )
  return (jax.nn.gelu(x @ wi_0, approximate=True) * (x @ wi_1)) @ wo


def test_parameters_have_t5x_names_shapes_and_axes():
  layer = make_layer(dataclasses.replace(KEEP_ALL, expert_bias='additive'))
  boxed = jax.eval_shape(
    lambda: layer.init(
      jax.random.key(0), jnp.zeros((4, 8, WIDTH)), None, train=False
    )
  )['params']
  assert jax.tree.map(lambda a: a.shape, partitioning.unbox(boxed)) == {
    'router': {'kernel': (16, 4)},
    'expert': {
      'wi_0': {'kernel': (4, 16, 24)},
      'wi_1': {'kernel': (4, 16, 24)},
      'wo': {'kernel': (4, 24, 16)},
      'bias': (4, 24),
    },
  }
  assert partitioning.logical_axes(boxed) == {
    'router': {'kernel': ('embed', 'router_experts')},
    'expert': {
      'wi_0': {'kernel': ('expert', 'expert_embed', 'mlp')},
      'wi_1': {'kernel': ('expert', 'expert_embed', 'mlp')},
      'wo': {'kernel': ('expert', 'mlp', 'expert_embed')},
      'bias': ('expert', 'mlp'),
    },
  }
  assert set(init(make_layer(activations=('relu',)))['expert']) == {'wi', 'wo'}


def test_kernels_are_drawn_by_their_fan_in_whatever_the_experts():
  layer = make_layer(num_experts=64, d_ff=400, init_scale=0.1)
  params = init(layer)
  for name, fan_in in (('wi_0', WIDTH), ('wo', 400)):
    kernel = params['expert'][name]['kernel']
    expected = 0.8796 * np.sqrt(0.1 / fan_in)
    np.testing.assert_allclose(kernel.std(), expected, rtol=0.02)


@pytest.mark.parametrize('backend', ['einsum', 'gather'])
@pytest.mark.parametrize('choices', [1, 2])
def test_equal_experts_are_one_dense_ffn(x, backend, choices):
  """Renormalised gates sum to 1; the gate of the only expert is 1."""
  num_experts = 1 if choices == 1 else NUM_EXPERTS
  router = dataclasses.replace(ROOMY, num_choices=choices)
  layer = make_layer(router, num_experts=num_experts, dispatch=backend)
  params = init(layer)
  params['expert'] = jax.tree.map(
    lambda a: jnp.broadcast_to(a[:1], a.shape), params['expert']
  )
  mask = jnp.arange(LENGTH) < jnp.asarray([8, 8, 5, 0])[:, None]

  def sparse(params, x):
    return layer.apply({'params': params}, x, mask, train=True)[0]

  def dense(params, x):
    return geglu(params, x) * mask[..., None]

  np.testing.assert_allclose(
    jax.jit(sparse)(params, x), dense(params, x), rtol=1e-5, atol=1e-6
  )

  def gradients(layer):
    def objective(params, x):
      return jnp.sum(layer(params, x) ** 2)

    return jax.jit(jax.grad(objective, argnums=(0, 1)))(params, x)

  (got, got_x), (expected, expected_x) = gradients(sparse), gradients(dense)
  np.testing.assert_allclose(got_x, expected_x, rtol=1e-4, atol=1e-5)
  for name in ('wi_0', 'wi_1', 'wo'):
    np.testing.assert_allclose(
      got['expert'][name]['kernel'].sum(axis=0),
      expected['expert'][name]['kernel'].sum(axis=0),
      rtol=1e-4,
      atol=1e-4,
    )


def test_dropped_tokens_give_zero(x):
  router = dataclasses.replace(
    KEEP_ALL, num_choices=1, eval_capacity_factor=0.5, min_expert_capacity=1
  )
  layer = make_layer(router)
  y, stats = layer.apply({'params': init(layer)}, x, None, train=False)
  zero = np.asarray((y == 0).all(axis=-1))
  assert 0.4 < zero.mean() < 1
  np.testing.assert_allclose(stats.fraction_dropped, zero.mean(), atol=1e-6)


@pytest.mark.parametrize('kind', ['additive', 'multiplicative'])
def test_expert_bias_starts_neutral_and_acts_on_the_hidden_units(x, kind):
  router = dataclasses.replace(ROOMY, num_choices=1, expert_bias=kind)
  layer = make_layer(router, num_experts=1)
  params = init(layer)
  y, _ = layer.apply({'params': params}, x, None, train=False)
  np.testing.assert_allclose(y, geglu(params, x), rtol=1e-5, atol=1e-6)
  bias = jax.random.normal(jax.random.key(2), (1, D_FF))
  params['expert']['bias'] = bias
  y, _ = layer.apply({'params': params}, x, None, train=False)
  wi_0, wi_1, wo = (
    params['expert'][name]['kernel'][0] for name in ('wi_0', 'wi_1', 'wo')
  )
  hidden = jax.nn.gelu(x @ wi_0, approximate=True) * (x @ wi_1)
  hidden = hidden + bias if kind == 'additive' else hidden * bias
  np.testing.assert_allclose(y, hidden @ wo, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dispatch', ['gather', 'ragged'])
def test_expert_dropout_acts_on_single_hidden_units_in_training_only(dispatch):
  router = dataclasses.replace(ROOMY, num_choices=1)
  layer = make_layer(
    router,
    num_experts=1,
    activations=('linear',),
    d_ff=WIDTH,
    expert_dropout_rate=0.25,
    dispatch=dispatch,
  )
  eye = {'kernel': jnp.eye(WIDTH)[None]}
  params = init(layer) | {'expert': {'wi': eye, 'wo': eye}}
  ones = jnp.ones((BATCH, LENGTH, WIDTH))
  y, _ = layer.apply({'params': params}, ones, None, train=False)
  np.testing.assert_allclose(y, ones)
  y, _ = layer.apply(
    {'params': params},
    ones,
    None,
    train=True,
    rngs={'dropout': jax.random.key(3)},
  )
  y = np.asarray(y)
  np.testing.assert_allclose(y[y > 0], 1 / 0.75, rtol=1e-6)
  deviation = np.sqrt(0.25 * 0.75 / y.size)
  np.testing.assert_allclose((y == 0).mean(), 0.25, atol=4 * deviation)
  assert len(np.unique(y.reshape(-1, WIDTH), axis=0)) > LENGTH  # elementwise


def test_jitter_multiplies_the_router_input_in_training_only():
  router = Router(
    WIDTH, dataclasses.replace(KEEP_ALL, jitter=0.2), init_scale=1.0
  )
  variables = {'params': {'kernel': jnp.eye(WIDTH)}}
  ones = jnp.ones((2, 500, WIDTH))
  key = {'router': jax.random.key(0)}
  quiet = router.apply(variables, ones, None, train=False)
  np.testing.assert_array_equal(quiet, ones)
  noise = np.asarray(router.apply(variables, ones, None, train=True, rngs=key))
  assert 0.8 <= noise.min() < 0.81 and 1.19 < noise.max() <= 1.2
  np.testing.assert_allclose(noise.mean(), 1.0, atol=0.005)
  np.testing.assert_allclose(noise.std(), 0.2 / np.sqrt(3), rtol=0.02)


def test_jitter_does_not_reach_the_experts(x):
  router = dataclasses.replace(ROOMY, num_choices=1, jitter=0.5)
  layer = make_layer(router, num_experts=1)
  params = init(layer)
  y, _ = layer.apply(
    {'params': params}, x, None, train=True, rngs={'router': jax.random.key(0)}
  )
  np.testing.assert_allclose(y, geglu(params, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('mode', 'expected', 'to_x', 'to_words'),
  [
    ('none', 'x', True, False),
    ('add', 'sum', True, True),
    ('add_stop_grad', 'sum', True, False),
    ('concat', 'both', True, True),
    ('concat_stop_grad', 'both', True, False),
    ('embed_only', 'words', False, True),
  ],
)
def test_word_embeddings_in_the_router(mode, expected, to_x, to_words):
  keys = jax.random.split(jax.random.key(0), 4)
  x, words = (jax.random.normal(key, (1, 6, WIDTH)) for key in keys[:2])
  a, b = (jax.random.normal(key, (WIDTH, 4)) for key in keys[2:])
  kernel = jnp.concatenate([a, b]) if expected == 'both' else a
  logits = {
    'x': x @ a,
    'sum': (x + words) @ a,
    'both': x @ a + words @ b,
    'words': words @ a,
  }[expected]
  router = Router(
    4, dataclasses.replace(KEEP_ALL, word_embedding=mode), init_scale=1.0
  )

  def apply(x, words):
    return router.apply({'params': {'kernel': kernel}}, x, words, train=True)

  np.testing.assert_allclose(apply(x, words), logits, rtol=1e-4, atol=1e-5)
  gradients = jax.grad(lambda *args: jnp.sum(apply(*args)), (0, 1))(x, words)
  assert [bool((g != 0).any()) for g in gradients] == [to_x, to_words]
  shapes = jax.eval_shape(
    lambda: router.init(jax.random.key(0), x, words, train=False)
  )
  kernel_shape = partitioning.unbox(shapes['params'])['kernel'].shape
  assert kernel_shape == kernel.shape


def test_word_embeddings_are_grouped_with_their_tokens(x):
  router = dataclasses.replace(KEEP_ALL, word_embedding='embed_only')
  layer, plain = make_layer(router), make_layer()
  params = init(plain)
  _, stats = layer.apply(
    {'params': params}, jnp.ones_like(x), None, train=False, token_embeddings=x
  )
  _, expected = plain.apply({'params': params}, x, None, train=False)
  np.testing.assert_array_equal(stats.expert_kept, expected.expert_kept)


def test_bfloat16_router_rounds_its_inputs_and_keeps_float32_weights(x):
  config = dataclasses.replace(KEEP_ALL, dtype='bfloat16')
  params = init(make_layer(config))
  assert params['router']['kernel'].dtype == jnp.float32
  variables = {'params': params['router']}
  rough = Router(NUM_EXPERTS, config, 1.0).apply(variables, x, None, train=True)
  exact = Router(NUM_EXPERTS, KEEP_ALL, 1.0).apply(
    variables, x, None, train=True
  )
  assert rough.dtype == exact.dtype == jnp.float32
  np.testing.assert_allclose(rough, exact, rtol=0.05, atol=0.05)
  assert (rough != exact).any()


def test_bfloat16_layer_keeps_its_router_in_float32(x):
  layer = make_layer(dtype=jnp.bfloat16)
  params = init(layer)
  half = x.astype(jnp.bfloat16)
  y, stats = layer.apply({'params': params}, half, None, train=False)
  assert y.dtype == jnp.bfloat16
  _, expected = make_layer().apply(
    {'params': params}, half.astype(jnp.float32), None, train=False
  )
  np.testing.assert_allclose(stats.z_loss, expected.z_loss, rtol=1e-6)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(stats))


def test_decoding_drops_nothing_and_ignores_neighbours(x):
  """All sequences want the same expert, which has one slot by its factor."""
  router = dataclasses.replace(
    RouterConfig(), eval_capacity_factor=0.1, min_expert_capacity=1
  )
  layer = make_layer(router)
  params = init(layer)
  token = jnp.broadcast_to(x[:1, :1], (BATCH, 1, WIDTH))
  step = jax.jit(
    lambda token, decode: layer.apply(
      {'params': params}, token, None, train=False, decode=decode
    ),
    static_argnums=1,
  )
  crowded, stats = step(token, False)
  assert stats.fraction_dropped > 0
  decoded, stats = step(token, True)
  assert stats.fraction_dropped == 0
  np.testing.assert_allclose(
    decoded, jnp.broadcast_to(crowded[:1], decoded.shape), atol=1e-6
  )
  others = token.at[1:].set(x[1:, :1])
  np.testing.assert_array_equal(step(others, True)[0][0], decoded[0])


def test_evaluation_ignores_neighbours_while_slots_suffice(x):
  layer = make_layer(dataclasses.replace(ROOMY, eval_choice_policy='threshold'))
  apply = jax.jit(
    lambda x: layer.apply({'params': params}, x, None, train=False)[0]
  )
  params = init(layer)
  np.testing.assert_array_equal(apply(x)[0], apply(x.at[1:].multiply(-2.0))[0])
  np.testing.assert_array_equal(apply(x), apply(x))


def test_a_group_of_one_sequence_never_crosses_sequences(x):
  tight = {'eval_capacity_factor': 0.5, 'min_expert_capacity': 1}
  shared = make_layer(dataclasses.replace(KEEP_ALL, **tight))
  own = make_layer(dataclasses.replace(KEEP_ALL, group_size=None, **tight))
  params = init(own)
  changed = x.at[0].multiply(-2.0)

  def change_of_second(layer):
    before, after = (
      layer.apply({'params': params}, inputs, None, train=False)[0][1]
      for inputs in (x, changed)
    )
    return np.abs(before - after).max()

  assert change_of_second(own) == 0
  assert change_of_second(shared) > 0


def test_random_policy_at_evaluation_needs_a_key(x):
  layer = make_layer(dataclasses.replace(KEEP_ALL, eval_choice_policy='random'))
  params = init(layer)  # needs no key of its own
  with pytest.raises(UserError, match="'random' needs a 'router' random key"):
    layer.apply({'params': params}, x, None, train=False)
  layer.apply(
    {'params': params}, x, None, train=False, rngs={'router': jax.random.key(0)}
  )


class Stack(nn.Module):
  """Three sparse layers with residuals, as a loop or as a scan with remat."""

  scan: bool

  @nn.compact
  def __call__(self, x):
    def body(layer, x, _):
      y, stats = layer(x, None, train=True)
      return x + y, stats

    if not self.scan:
      collected = []
      for i in range(3):
        x, stats = body(make_layer(name=f'layer_{i}'), x, None)
        collected.append(stats)
      return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
    return nn.scan(
      nn.remat(body, prevent_cse=False),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'router': True},
      length=3,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(make_layer(name='layers'), x, None)


def test_scan_with_remat_equals_a_loop(x):
  stacked = partitioning.unbox(
    Stack(scan=True).init(jax.random.key(0), x)['params']
  )
  unstacked = {
    f'layer_{i}': jax.tree.map(lambda a, i=i: a[i], stacked['layers'])
    for i in range(3)
  }

  def run(scan, params):
    def objective(params, x):
      y, stats = Stack(scan).apply({'params': params}, x)
      return jnp.sum(y**2) + stats.balance_loss.sum(), (y, stats)

    return jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, x)

  (got, got_x), got_outputs = run(True, stacked)
  (expected, expected_x), expected_outputs = run(False, unstacked)
  restacked = jax.tree.map(
    lambda *leaves: jnp.stack(leaves),
    *(expected[f'layer_{i}'] for i in range(3)),
  )
  for a, b in zip(
    jax.tree.leaves((got['layers'], got_x, got_outputs)),
    jax.tree.leaves((restacked, expected_x, expected_outputs)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
