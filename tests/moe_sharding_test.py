"""The sparse layer on a (data, expert, model) mesh of eight devices."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import partitioning
from st_moe.config import MeshConfig, RouterConfig
from st_moe.errors import UserError
from st_moe.moe import MoeLayer

# Four groups of 64 tokens, on one device and on a mesh of four batch shards
# (eight shards make eight groups).
BATCH, LENGTH, WIDTH, D_FF, NUM_EXPERTS, GROUP = 8, 32, 16, 32, 4, 64
PAPER = RouterConfig(  # random second choices, noise everywhere
  group_size=GROUP,
  min_expert_capacity=1,
  jitter=0.1,
  expert_bias='multiplicative',
)
ROUTERS = {
  'paper': PAPER,
  'batch priority': dataclasses.replace(PAPER, priority='probability'),
  'expert choice': dataclasses.replace(PAPER, kind='expert_choice'),
}


def make_layer(router, backend='gather'):
  return MoeLayer(
    NUM_EXPERTS,
    D_FF,
    ('gelu', 'linear'),
    router,
    dispatch=backend,
    expert_dropout_rate=0.1,
  )


def make_inputs():
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
  mask = jax.random.uniform(keys[1], (BATCH, LENGTH)) > 0.2
  return x, mask


def make_step(router, backend):
  """Returns (value, gradients) of params and inputs; training, with noise."""
  layer = make_layer(router, backend)

  def objective(params, x, mask):
    rngs = {'router': jax.random.key(1), 'dropout': jax.random.key(2)}
    y, stats = layer.apply({'params': params}, x, mask, train=True, rngs=rngs)
    loss = jnp.mean(y**2) + stats.balance_loss + 0.01 * stats.z_loss
    return loss, (y, stats)

  return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)


@functools.cache
def init(router):
  x, mask = make_inputs()
  variables = make_layer(router).init(jax.random.key(3), x, mask, train=False)
  return variables['params']


@functools.cache
def on_one_device(router, backend):
  params = partitioning.unbox(init(router))
  return jax.jit(make_step(router, backend))(params, *make_inputs())


def place(config, router):
  """Returns a mesh, and parameters and inputs on it."""
  mesh = partitioning.make_mesh(config)
  boxed = init(router)
  params = partitioning.unbox(boxed)
  shardings = partitioning.tree_shardings(
    params, partitioning.logical_axes(boxed), mesh, config
  )
  return mesh, (
    jax.device_put(params, shardings),
    *jax.device_put(make_inputs(), partitioning.batch_sharding(mesh)),
  )


def compile_on_mesh(router, backend, axis_types, shape=(2, 2, 2)):
  """Returns the compiled step and its arguments, placed on the mesh."""
  mesh, arguments = place(MeshConfig(1, *shape, axis_types=axis_types), router)
  with partitioning.use_mesh(mesh):
    step = jax.jit(make_step(router, backend))
    return step.lower(*arguments).compile(), arguments


@pytest.mark.parametrize(
  ('name', 'backend', 'axis_types'),
  [
    ('paper', 'gather', 'auto'),
    ('paper', 'gather', 'explicit'),
    ('paper', 'einsum', 'auto'),
    ('paper', 'einsum', 'explicit'),
    ('batch priority', 'gather', 'explicit'),
    ('expert choice', 'gather', 'explicit'),
  ],
)
def test_a_mesh_gives_the_numbers_of_one_device(name, backend, axis_types):
  router = ROUTERS[name]
  compiled, arguments = compile_on_mesh(router, backend, axis_types)
  got = jax.tree.leaves(compiled(*arguments))
  expected = jax.tree.leaves(on_one_device(router, backend))
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5
    )
  # There and back, forward and backward; nothing else moves activations.
  assert moves(compiled) == {'all-to-all': 4}


def moves(compiled):
  """Counts the collectives of a compiled program, sums over devices aside."""
  return collections.Counter(
    re.findall(
      r' (all-to-all|all-gather|collective-permute|ragged-all-to-all)'
      r'(?:-start)?\(',
      compiled.as_text(),
    )
  )


@pytest.mark.parametrize('axis_types', ['auto', 'explicit'])
@pytest.mark.parametrize('shape', [(2, 2, 2), (2, 4, 1), (1, 4, 2)])
def test_forward_has_two_all_to_alls(shape, axis_types):
  layer = make_layer(PAPER, 'auto')
  config = MeshConfig(1, *shape, axis_types=axis_types)
  mesh, arguments = place(config, PAPER)
  with partitioning.use_mesh(mesh):
    forward = jax.jit(
      lambda params, x, mask: layer.apply(
        {'params': params}, x, mask, train=False
      )
    )
    compiled = forward.lower(*arguments).compile()
  assert moves(compiled) == {'all-to-all': 2}


@pytest.mark.parametrize(
  'shape, axis_types, expected',
  [
    # Tokens, experts, flags and gates to the experts' devices and noise.
    ((2, 2, 2), 'explicit', {'all-gather'}),
    ((1, 4, 2), 'auto', {'all-gather'}),
    ((4, 1, 2), 'auto', set()),  # every device has all experts
  ],
)
def test_dropless_on_a_mesh_gives_the_numbers_of_one_device(
  shape, axis_types, expected
):
  compiled, arguments = compile_on_mesh(PAPER, 'ragged', axis_types, shape)
  got = jax.tree.leaves(compiled(*arguments))
  for a, b in zip(
    got, jax.tree.leaves(on_one_device(PAPER, 'ragged')), strict=True
  ):
    np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5
    )
  assert set(moves(compiled)) == expected


def test_experts_that_do_not_divide_over_their_axis_are_an_error():
  mesh = partitioning.make_mesh(MeshConfig(data=2, expert=4, model=1))
  layer = MoeLayer(6, D_FF, ('relu',), PAPER)
  x, mask = make_inputs()
  with (
    partitioning.use_mesh(mesh),
    pytest.raises(UserError, match='expert dimension .* not divisible by'),
  ):
    jax.eval_shape(
      lambda x, mask: layer.init(jax.random.key(0), x, mask, train=False),
      x,
      mask,
    )


def test_each_batch_shard_holds_at_least_one_group():
  """Asked for groups of 128, eight shards of 32 tokens make groups of 32."""
  router = RouterConfig(group_size=128, train_choice_policy='all')
  layers = {
    size: MoeLayer(
      NUM_EXPERTS, D_FF, ('relu',), dataclasses.replace(router, group_size=size)
    )
    for size in (32, 128)
  }
  x, mask = make_inputs()
  variables = partitioning.unbox(
    layers[32].init(jax.random.key(0), x, mask, train=False)
  )

  def run(size):
    return jax.jit(
      lambda x: layers[size].apply(variables, x, None, train=True)[0]
    )

  mesh = partitioning.make_mesh(MeshConfig(data=4, expert=2, model=1))
  with partitioning.use_mesh(mesh):
    sharded = run(128)(jax.device_put(x, partitioning.batch_sharding(mesh)))
  np.testing.assert_allclose(sharded, run(32)(x), atol=1e-5)
  assert np.abs(sharded - run(128)(x)).max() > 0.01  # fewer, larger groups
