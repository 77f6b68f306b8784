"""A tiny sparse model learns, and its step does what it promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
  assert_trees_close,
  init_params,
  make_batch,
  place,
  start,
  tiny_config,
)

from st_moe import partitioning
from st_moe.config import (
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  RouterConfig,
  RunConfig,
)
from st_moe.optimizer import learning_rate_schedule
from st_moe.train_step import loss_and_gradients, make_train_step, run_key

LENGTH = 8
END = 1
CONFIG = RunConfig(
  model=tiny_config(
    RouterConfig(group_size=32, train_choice_policy='all'),
    vocab_size=32,
    d_model=32,
    num_heads=4,
  ),
  optimizer=OptimizerConfig(schedule='constant', learning_rate=0.03),
  data=DataConfig(inputs_length=LENGTH, targets_length=LENGTH),
  mesh=MeshConfig(data=1, expert=1, model=1),
  batch_size=16,
  steps=400,
)
# The microbatches' model: one sparse layer in each stack.
SHALLOW = dataclasses.replace(
  CONFIG,
  model=dataclasses.replace(
    CONFIG.model, sparse_every=1, num_encoder_layers=1, num_decoder_layers=1
  ),
)


def copy_batch(rng, rows=16):
  """The targets are the inputs: random symbols, then the end.

  Cross-attention has no position biases. What a decoder at position i can look
  for is an input as far from the end as i is from the beginning; without an
  end it has to learn what stands after the last symbol in this very input.
  """
  tokens = rng.integers(2, 32, (rows, LENGTH)).astype(np.int32)
  tokens[:, -1] = END
  return make_batch(tokens, tokens)


def start_training(config):
  """Returns mesh, state and compiled step of a run."""
  run = start(config)
  schedule = learning_rate_schedule(config.optimizer, config.steps)
  step = jax.jit(
    make_train_step(config, run.optimizer, schedule),
    out_shardings=(run.shardings, None),
  )
  key = run_key(config.seed)
  return run.mesh, run.state, functools.partial(step, run_key=key)


@pytest.fixture(scope='module')
def training():
  return start_training(CONFIG)


def test_a_sparse_model_learns_to_copy(training):
  mesh, state, step = training
  rng = np.random.default_rng(0)
  with partitioning.use_mesh(mesh):
    history = []
    for _ in range(CONFIG.steps):
      state, result = step(state, copy_batch(rng))
      history.append(float(result['cross_entropy']))
  # Seven of eight targets are uniform over 30 ids: whatever does not look at
  # the input stays above log 30 * 7 / 8 = 2.98 nats.
  assert history[0] > 2.98
  assert np.mean(history[-20:]) < 0.2
  assert int(state.step) == CONFIG.steps
  stats = result['router']['encoder']
  assert stats.expert_load.shape == (1, 4)
  np.testing.assert_allclose(stats.expert_load.sum(), 1.0, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_counters(training):
  mesh, state, step = training
  with partitioning.use_mesh(mesh):
    broken = state.replace(
      params=jax.tree.map(lambda x: x.at[..., 0].set(jnp.inf), state.params)
    )
    after, result = step(broken, copy_batch(np.random.default_rng(0)))
  assert not np.isfinite(result['loss'])
  assert int(after.nonfinite_steps) == 1 and int(after.skipped_steps) == 1
  assert int(after.step) == 1
  for new, old in zip(
    jax.tree.leaves((after.params, after.opt_state)),
    jax.tree.leaves((broken.params, broken.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(new, old)
  # The next finite step goes on and ends the row.
  with partitioning.use_mesh(mesh):
    again, _ = step(
      after.replace(params=state.params), copy_batch(np.random.default_rng(0))
    )
  assert int(again.nonfinite_steps) == 0 and int(again.skipped_steps) == 1


def uneven_batch():
  """Rows of different lengths, so that every denominator differs by part."""
  batch = copy_batch(np.random.default_rng(1))
  for row in range(16):
    pad = row % 5
    for name in batch:
      batch[name][row, LENGTH - pad :] = 0
  return batch


@functools.cache
def whole_batch(normalization):
  """Returns gradients and metrics of the undivided batch on one device."""
  return in_parts(1, normalization)


def in_parts(microbatches, normalization='real_tokens', mesh_config=None):
  model = dataclasses.replace(
    SHALLOW.model,
    loss_normalization=normalization,
    attention_z_loss_weight=1e-3,
  )
  config = dataclasses.replace(SHALLOW, model=model, microbatches=microbatches)
  compiled = jax.jit(functools.partial(loss_and_gradients, config))
  params, batch = init_params(model), uneven_batch()
  if mesh_config is None:
    return compiled(params, batch, jax.random.key(0))
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:4])
  params = place(params, model, mesh, mesh_config)
  with partitioning.use_mesh(mesh):
    return compiled(
      params, partitioning.shard_batch(batch, mesh), jax.random.key(0)
    )


@pytest.mark.parametrize(
  ('parts', 'normalization'), [(2, 'all_tokens'), (4, 'real_tokens')]
)
def test_microbatches_give_the_loss_and_gradients_of_the_whole_batch(
  parts, normalization
):
  gradients, whole = whole_batch(normalization)
  split_gradients, split = in_parts(parts, normalization)
  for name in (
    'loss',
    'cross_entropy',
    'balance_loss',
    'router_z_loss',
    'attention_z_loss',
    'tokens',
  ):
    np.testing.assert_allclose(
      split[name], whole[name], rtol=1e-5, err_msg=name
    )
  assert_trees_close(split_gradients, gradients)
  for field in ('expert_load', 'entropy', 'fraction_dropped', 'num_tokens'):
    np.testing.assert_allclose(
      getattr(split['router']['encoder'], field),
      getattr(whole['router']['encoder'], field),
      rtol=1e-5,
      atol=1e-6,
      err_msg=field,
    )


@pytest.mark.parametrize('axis_types', ['auto', 'explicit'])
def test_microbatches_on_a_mesh_equal_one_device(axis_types):
  gradients, whole = whole_batch('real_tokens')
  split_gradients, split = in_parts(
    2,
    mesh_config=MeshConfig(data=2, expert=1, model=2, axis_types=axis_types),
  )
  np.testing.assert_allclose(split['loss'], whole['loss'], rtol=1e-5)
  assert_trees_close(split_gradients, gradients)
