"""Adafactor against Mesh TensorFlow's rule in numpy, layers, schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from st_moe import optimizer as opt
from st_moe.config import MeshConfig, OptimizerConfig
from st_moe.errors import UserError
from st_moe.partitioning import make_mesh, tree_shardings, use_mesh

# Small enough to factor in a test.
ADAFACTOR = OptimizerConfig(min_dim_size_to_factor=2, warmup_steps=0)

# One parameter of every kind, unscanned.
SHAPES = {
  'wi': ((3, 4, 6), ('expert', 'expert_embed', 'mlp')),
  'bias': ((3, 6), ('expert', 'mlp')),
  'kernel': ((4, 6), ('embed', 'mlp')),
  'square': ((4, 4), ('embed', 'joined_kv')),
  'scale': ((4,), ('embed',)),
}
AXES = {name: axes for name, (_, axes) in SHAPES.items()}


def random_tree(rng, scale=1.0, lead=()):
  return {
    name: np.float32(scale * rng.standard_normal((*lead, *shape)))
    for name, (shape, _) in SHAPES.items()
  }


def run(config, axes, params, grads):
  """Returns the parameters after each of the steps."""
  tx = opt.make_optimizer(config, axes, total_steps=100)

  @jax.jit
  def step(params, state, grad):
    updates, state = tx.update(grad, state, params)
    return optax.apply_updates(params, updates), state

  state, history = tx.init(params), []
  for grad in grads:
    params, state = step(params, state, grad)
    history.append(params)
  return history


def reference(config, params, grads, dims, by_expert=()):
  """Mesh TensorFlow's AdafactorOptimizer for one array, in float64 numpy.

  Args:
    config: the settings.
    params: one parameter of one layer.
    grads: its gradient at each step.
    dims: the largest and the second-largest dimension, None if not factored.
    by_expert: axes of one expert, if experts are separate parameters.
  """
  p = np.float64(params)
  rms_axes = by_expert or tuple(range(p.ndim))

  def rms(x):
    return np.sqrt(np.mean(x**2, axis=rms_axes, keepdims=True))

  row = column = full = momentum = 0.0
  history = []
  for t, grad in enumerate(grads):
    g = np.float64(grad)
    beta = 1 - (t + 1.0) ** -0.8
    g2 = g**2 + 1e-30
    if dims:
      row = beta * row + (1 - beta) * g2.mean(axis=dims[0], keepdims=True)
      column = beta * column + (1 - beta) * g2.mean(axis=dims[1], keepdims=True)
      v = row * column / row.mean(axis=dims[1], keepdims=True)
    else:
      v = full = beta * full + (1 - beta) * g2
    x = g / np.sqrt(v)
    if config.clipping_threshold:
      x = x / np.maximum(1.0, rms(x) / config.clipping_threshold)
    x = x * (1.0 / np.sqrt(max(t, 1)))  # rsqrt without warm-up
    if config.multiply_by_parameter_scale:
      x = x * np.maximum(rms(p), config.epsilon2)
    if config.beta1:
      momentum = config.beta1 * momentum + (1 - config.beta1) * x
      x = momentum
    if config.weight_decay and p.ndim - bool(by_expert) >= 2:
      x = x + config.weight_decay * p / np.sqrt(max(t, 1))
    p = p - x
    history.append(p)
  return history


# Largest first; `wi` is factored over mlp and expert_embed in either rule.
DIMS = {
  'wi': (2, 1),
  'bias': (1, 0),
  'kernel': (1, 0),
  'square': (0, 1),
  'scale': None,
}


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'clipping_threshold': 0.1},
    {'clipping_threshold': None, 'multiply_by_parameter_scale': False},
    {'beta1': 0.9},
    {'factored': False},
  ],
  ids=['paper', 'clip 0.1', 'no clip, no scale', 'momentum', 'unfactored'],
)
def test_adafactor_equals_mesh_tensorflow_step_by_step(changes):
  config = dataclasses.replace(ADAFACTOR, **changes)
  rng = np.random.default_rng(0)
  params = random_tree(rng)
  params['scale'] = np.zeros(4, np.float32)  # epsilon2 sets its scale
  grads = [random_tree(rng, scale) for scale in (1e-3, 5.0, 0.1, 2.0)]
  history = run(config, AXES, params, grads)
  for name in SHAPES:
    expected = reference(
      config,
      params[name],
      [grad[name] for grad in grads],
      DIMS[name] if config.factored else None,
    )
    for step, want in enumerate(expected):
      np.testing.assert_allclose(
        history[step][name], want, rtol=1e-5, atol=1e-6, err_msg=name
      )


def test_experts_as_batch_axis_clips_and_scales_each_expert():
  config = dataclasses.replace(ADAFACTOR, experts_as_batch_axis=True)
  rng = np.random.default_rng(1)
  loud = np.array([1.0, 30.0, 0.01], np.float32)[:, None, None]
  params = {'wi': np.float32(rng.standard_normal((3, 4, 6)) * loud)}
  grads = [
    {'wi': np.float32(rng.standard_normal((3, 4, 6)) * loud)} for _ in range(3)
  ]
  axes = {'wi': AXES['wi']}
  got = run(config, axes, params, grads)[-1]['wi']
  for expert in range(3):
    alone = reference(
      config, params['wi'][expert], [g['wi'][expert] for g in grads], (1, 0)
    )
    np.testing.assert_allclose(got[expert], alone[-1], rtol=1e-5, atol=1e-6)
  # Mesh TensorFlow's rule moves the quiet expert by the scale of the loud.
  whole = run(ADAFACTOR, axes, params, grads)[-1]['wi']
  assert (
    np.abs(whole[2] - params['wi'][2]).max()
    > 10 * np.abs(got[2] - params['wi'][2]).max()
  )


def test_many_experts_are_among_the_factored_dimensions():
  # 8 experts of 4 x 6: the two largest dimensions are expert and mlp.
  axes = {'wi': ('expert', 'expert_embed', 'mlp')}
  shape = {'wi': jax.ShapeDtypeStruct((8, 4, 6), jnp.float32)}
  whole = jax.eval_shape(opt.make_optimizer(ADAFACTOR, axes, 1).init, shape)
  slots = whole[1].slots['wi']
  assert slots.factored_dims == (0, 2)
  assert (slots.row.shape, slots.column.shape) == ((4, 6), (8, 4))
  config = dataclasses.replace(ADAFACTOR, experts_as_batch_axis=True)
  by_expert = jax.eval_shape(opt.make_optimizer(config, axes, 1).init, shape)
  slots = by_expert[1].slots['wi']
  assert slots.factored_dims == (2, 1)
  assert (slots.row.shape, slots.column.shape) == ((8, 4), (8, 6))


def test_second_largest_dimension_decides_whether_to_factor():
  config = OptimizerConfig()  # min_dim_size_to_factor 128
  axes = {name: ('embed', 'mlp') for name in ('wide', 'narrow')}
  shapes = {
    'wide': jax.ShapeDtypeStruct((128, 500), jnp.float32),
    'narrow': jax.ShapeDtypeStruct((127, 500), jnp.float32),
  }
  state = jax.eval_shape(opt.make_optimizer(config, axes, 1).init, shapes)
  slots = state[1].slots
  assert slots['wide'].row.shape == (128,)
  assert slots['wide'].column.shape == (500,)
  assert slots['wide'].full is None
  assert slots['narrow'].full.shape == (127, 500)


@pytest.mark.parametrize('by_expert', [False, True])
@pytest.mark.parametrize('momentum', [None, 0.9])
def test_scanned_layers_are_updated_as_separate_layers(by_expert, momentum):
  config = dataclasses.replace(
    ADAFACTOR,
    experts_as_batch_axis=by_expert,
    beta1=momentum,
    weight_decay=0.1,
  )
  rng = np.random.default_rng(2)
  layers = 3
  # Layers of very different size: one RMS over the stack would show.
  size = np.float32([1e-4, 1.0, 50.0])

  def draw():
    tree = random_tree(rng, lead=(layers,))
    return {
      k: v * size.reshape(-1, *[1] * (v.ndim - 1)) for k, v in tree.items()
    }

  params, grads = draw(), [draw() for _ in range(3)]
  scanned = {name: ('layers', *axes) for name, axes in AXES.items()}
  stacked = run(config, scanned, params, grads)[-1]
  for layer in range(layers):

    def one(tree, layer=layer):
      return {name: value[layer] for name, value in tree.items()}

    alone = run(config, AXES, one(params), [one(g) for g in grads])[-1]
    for name in SHAPES:
      np.testing.assert_array_max_ulp(
        np.asarray(stacked[name][layer]), np.asarray(alone[name]), maxulp=1
      )


def test_weight_decay_shrinks_matrices_and_spares_scales_and_biases():
  params = {
    name: np.ones(shape, np.float32) for name, (shape, _) in SHAPES.items()
  }
  grads = [jax.tree.map(np.zeros_like, params)]
  for name in ('adafactor', 'adamw'):
    config = OptimizerConfig(
      name=name, schedule='constant', learning_rate=0.5, weight_decay=0.1
    )
    after = run(config, AXES, params, grads)[-1]
    for key in ('wi', 'kernel', 'square'):
      np.testing.assert_allclose(after[key], 0.95, rtol=1e-6)
    for key in ('bias', 'scale'):
      np.testing.assert_array_equal(after[key], 1.0)


def test_max_grad_norm_clips_the_gradients_together():
  config = OptimizerConfig(
    name='adamw', schedule='constant', learning_rate=1.0, max_grad_norm=1.0
  )
  axes = {'a': ('embed',), 'b': ('embed',)}
  tx = opt.make_optimizer(config, axes, 10)
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  grads = {'a': jnp.array([30.0]), 'b': jnp.array([40.0])}
  _, state = tx.update(grads, tx.init(params), params)
  mu = optax.tree.get(state, 'mu')
  np.testing.assert_allclose(mu['a'], [0.1 * 0.6], rtol=1e-6)
  np.testing.assert_allclose(mu['b'], [0.1 * 0.8], rtol=1e-6)


def test_adamw_first_step_is_the_learning_rate_against_the_sign():
  config = OptimizerConfig(
    name='adamw', schedule='constant', learning_rate=0.01
  )
  params = {'w': np.zeros((2, 2), np.float32)}
  grads = [{'w': np.float32([[3, -0.2], [1e-2, -50]])}]
  after = run(config, {'w': ('embed', 'mlp')}, params, grads)[-1]['w']
  np.testing.assert_allclose(after, [[-0.01, 0.01], [-0.01, 0.01]], rtol=1e-5)


# MARK: schedules


def values(config, steps, total_steps=100):
  schedule = opt.learning_rate_schedule(config, total_steps)
  return [float(schedule(jnp.int32(step))) for step in steps]


def test_rsqrt_is_flat_for_ten_thousand_steps_and_then_falls():
  np.testing.assert_allclose(
    values(OptimizerConfig(), [0, 1, 9999, 10000, 40000, 500000]),
    [0.01, 0.01, 0.01, 0.01, 0.005, 1.41421356e-3],
    rtol=1e-6,
  )


def test_rsqrt_without_warmup_starts_at_the_learning_rate():
  config = OptimizerConfig(warmup_steps=0, learning_rate=3.0)
  np.testing.assert_allclose(values(config, [0, 1, 4]), [3, 3, 1.5], rtol=1e-6)


def test_constant_schedule_has_no_warmup():
  config = OptimizerConfig(schedule='constant', learning_rate=1e-3)
  np.testing.assert_allclose(values(config, [0, 7, 10**6]), [1e-3] * 3)


def test_linear_rises_then_falls_to_the_end_rate_and_stays():
  config = OptimizerConfig(
    schedule='linear', learning_rate=1.0, end_learning_rate=0.2, warmup_steps=4
  )
  np.testing.assert_allclose(
    values(config, [0, 1, 4, 8, 12, 50], total_steps=12),
    [0, 0.25, 1.0, 0.6, 0.2, 0.2],
    rtol=1e-6,
  )


def test_cosine_ends_at_decay_steps_whatever_the_run():
  config = OptimizerConfig(
    schedule='cosine',
    learning_rate=2.0,
    end_learning_rate=1.0,
    warmup_steps=0,
    decay_steps=10,
  )
  np.testing.assert_allclose(
    values(config, [0, 5, 10, 99]), [2.0, 1.5, 1.0, 1.0], rtol=1e-6
  )


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_warmup_that_never_ends_is_refused_with_both_numbers(schedule):
  config = OptimizerConfig(schedule=schedule, warmup_steps=10000)
  with pytest.raises(UserError, match=r'warmup_steps 10000 .* 500 steps'):
    opt.learning_rate_schedule(config, 500)


# MARK: placement


@pytest.mark.parametrize('name', ['adafactor', 'adamw'])
def test_every_leaf_of_the_state_has_an_axis_name_per_dimension(name):
  config = OptimizerConfig(name=name, min_dim_size_to_factor=2, beta1=0.9)
  scanned = {key: ('layers', *axes) for key, axes in AXES.items()}
  shapes = {
    key: jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    for key, (shape, _) in SHAPES.items()
  }
  tx = opt.make_optimizer(config, scanned, 10)
  state = jax.eval_shape(tx.init, shapes)
  axes = opt.opt_state_axes(state, shapes, scanned)
  leaves, tree = jax.tree.flatten(state)
  for leaf, names in zip(leaves, tree.flatten_up_to(axes), strict=True):
    assert len(names) == leaf.ndim
  if name == 'adafactor':
    wi = axes[1].slots['wi']
    assert wi.row == ('layers', 'expert', 'expert_embed')
    assert wi.column == ('layers', 'expert', 'mlp')
    assert wi.momentum == ('layers', 'expert', 'expert_embed', 'mlp')
    square = axes[1].slots['square']
    assert square.row == ('layers', 'joined_kv')
    assert square.column == ('layers', 'embed')
    assert axes[1].slots['scale'].full == ('layers', 'embed')
    assert axes[1].count == ()
  else:
    adam = next(s for s in axes[1] if hasattr(s, 'mu'))
    assert adam.mu == adam.nu == scanned
    assert adam.count == ()


@pytest.mark.parametrize('kind', ['auto', 'explicit'])
def test_update_on_a_mesh_equals_one_device_and_keeps_placement(kind):
  shapes = {
    'wi': ((2, 4, 4, 8), ('layers', 'expert', 'expert_embed', 'mlp')),
    'kernel': ((4, 8), ('embed', 'joined_kv')),
    'scale': ((4,), ('embed',)),
  }
  axes = {key: names for key, (_, names) in shapes.items()}
  config = dataclasses.replace(ADAFACTOR, max_grad_norm=1.0, beta1=0.5)
  mesh_config = MeshConfig(
    data=2,
    expert=2,
    model=2,
    axis_types=kind,
    fsdp_dense=True,
    fsdp_experts=True,
  )
  mesh = make_mesh(mesh_config)
  rng = np.random.default_rng(3)

  def draw():
    return {
      key: np.float32(rng.standard_normal(shape))
      for key, (shape, _) in shapes.items()
    }

  params, grads = draw(), draw()
  expected = run(config, axes, params, [grads, grads])[-1]
  tx = opt.make_optimizer(config, axes, 100)
  state_axes = opt.opt_state_axes(jax.eval_shape(tx.init, params), params, axes)
  shardings = tree_shardings(params, axes, mesh, mesh_config)
  state = tx.init(params)
  state_shardings = tree_shardings(state, state_axes, mesh, mesh_config)
  state = jax.device_put(state, state_shardings)
  placed = jax.device_put(params, shardings)
  grads = jax.device_put(grads, shardings)

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  with use_mesh(mesh):
    for _ in range(2):
      placed, state = step(placed, state, grads)
  for key in shapes:
    np.testing.assert_allclose(placed[key], expected[key], rtol=1e-5, atol=1e-6)
    assert placed[key].sharding.is_equivalent_to(
      shardings[key], placed[key].ndim
    )
