"""A tiny sparse model learns, and its step does what it promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import partitioning
from st_moe.config import (
  DataConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RouterConfig,
  RunConfig,
)
from st_moe.optimizer import learning_rate_schedule, make_optimizer
from st_moe.train_state import abstract_state, create_state, state_shardings
from st_moe.train_step import init_key, loss_and_gradients, make_train_step
from st_moe.transformer import EncoderDecoder

LENGTH = 8
ROUTER = RouterConfig(group_size=32, train_choice_policy='all')
CONFIG = RunConfig(
  model=ModelConfig(
    vocab_size=32,
    d_model=32,
    d_ff=32,
    d_kv=8,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_experts=4,
    sparse_every=2,
    encoder_router=ROUTER,
    decoder_router=ROUTER,
  ),
  optimizer=OptimizerConfig(schedule='constant', learning_rate=0.03),
  data=DataConfig(inputs_length=LENGTH, targets_length=LENGTH),
  mesh=MeshConfig(data=1, expert=1, model=1),
  batch_size=16,
  steps=200,
)


def copy_batch(rng, rows=16):
  """The targets are the inputs."""
  tokens = rng.integers(2, 32, (rows, LENGTH)).astype(np.int32)
  return {
    'encoder_input_tokens': tokens,
    'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': tokens,
    'decoder_loss_weights': np.ones_like(tokens),
  }


def start(config):
  """Returns mesh, state and compiled step of a run."""
  devices = jax.devices()[
    : config.mesh.data * config.mesh.expert * config.mesh.model
  ]
  mesh = partitioning.make_mesh(config.mesh, devices)
  model = EncoderDecoder(config.model)
  shapes = abstract_state(config, model)
  shardings = state_shardings(shapes, mesh, config.mesh)
  optimizer = make_optimizer(config.optimizer, shapes.axes, config.steps)
  state = create_state(
    config, model, optimizer, init_key(config.seed), shardings
  )
  schedule = learning_rate_schedule(config.optimizer, config.steps)
  step = jax.jit(
    make_train_step(config, optimizer, schedule),
    out_shardings=(shardings, None),
  )
  return mesh, state, step


def test_a_sparse_model_learns_to_copy():
  mesh, state, step = start(CONFIG)
  rng = np.random.default_rng(0)
  with partitioning.use_mesh(mesh):
    history = []
    for _ in range(CONFIG.steps):
      state, result = step(state, copy_batch(rng))
      history.append(float(result['cross_entropy']))
  # Targets are uniform over 30 ids: whatever does not look at the input stays
  # above log 30 = 3.4 nats.
  assert history[0] > np.log(30)
  assert np.mean(history[-10:]) < np.log(30) - 1.0
  assert int(state.step) == CONFIG.steps
  stats = result['router']['encoder']
  assert stats.expert_load.shape == (1, 4)
  np.testing.assert_allclose(stats.expert_load.sum(), 1.0, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_counters():
  mesh, state, step = start(CONFIG)
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


@pytest.mark.parametrize('normalization', ['real_tokens', 'all_tokens'])
@pytest.mark.parametrize('parts', [2, 4])
def test_microbatches_give_the_loss_and_gradients_of_the_whole_batch(
  parts, normalization
):
  model = dataclasses.replace(
    CONFIG.model,
    loss_normalization=normalization,
    attention_z_loss_weight=1e-3,
  )
  config = dataclasses.replace(CONFIG, model=model)
  _, state, _ = start(config)
  batch = uneven_batch()

  def run(microbatches):
    run_config = dataclasses.replace(config, microbatches=microbatches)
    return jax.jit(
      lambda params: loss_and_gradients(
        run_config, params, batch, jax.random.key(0)
      )
    )(state.params)

  gradients, whole = run(1)
  split_gradients, split = run(parts)
  for name in (
    'loss',
    'cross_entropy',
    'balance_loss',
    'router_z_loss',
    'tokens',
  ):
    np.testing.assert_allclose(
      split[name], whole[name], rtol=1e-5, err_msg=name
    )
  for (path, a), b in zip(
    jax.tree.leaves_with_path(gradients),
    jax.tree.leaves(split_gradients),
    strict=True,
  ):
    np.testing.assert_allclose(
      b, a, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path)
    )
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
  batch = uneven_batch()
  _, state, _ = start(CONFIG)
  gradients, whole = jax.jit(
    lambda p: loss_and_gradients(CONFIG, p, batch, jax.random.key(0))
  )(state.params)
  config = dataclasses.replace(
    CONFIG,
    microbatches=2,
    mesh=MeshConfig(data=2, expert=1, model=2, axis_types=axis_types),
  )
  mesh, sharded, _ = start(config)
  with partitioning.use_mesh(mesh):
    split_gradients, split = jax.jit(
      lambda p, b: loss_and_gradients(config, p, b, jax.random.key(0))
    )(sharded.params, partitioning.shard_batch(batch, mesh))
  np.testing.assert_allclose(split['loss'], whole['loss'], rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(gradients), jax.tree.leaves(split_gradients), strict=True
  ):
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
