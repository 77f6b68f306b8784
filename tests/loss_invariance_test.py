"""How a model is run changes neither its loss nor its gradients.

Scan, unrolled scan, remat policies, meshes, and their combinations, against
the plain model on one device.
"""

import dataclasses
import functools

import jax
import pytest
from tiny_model import (
  ROUTER,
  assert_trees_close,
  init_params,
  loss_and_gradients,
  place,
  tiny_batch,
  tiny_config,
)

from st_moe import partitioning
from st_moe.config import MeshConfig
from st_moe.stacking import stack_layers, unstack_layers

PLAIN = tiny_config(
  num_encoder_layers=4, num_decoder_layers=1, attention_z_loss_weight=0.1
)


@functools.cache
def plain():
  return loss_and_gradients(PLAIN, init_params(PLAIN), tiny_batch())


def run(config, mesh_config=None):
  """Returns metrics and gradients in the plain model's form."""
  params = init_params(PLAIN)
  if config.scan_layers:
    params = stack_layers(params, config)
  if mesh_config is None:
    (_, metrics), gradients = loss_and_gradients(config, params, tiny_batch())
  else:
    mesh = partitioning.make_mesh(mesh_config)
    params = place(params, config, mesh, mesh_config)
    with partitioning.use_mesh(mesh, mesh_config):
      batch = partitioning.shard_batch(tiny_batch(), mesh)
      (_, metrics), gradients = loss_and_gradients(config, params, batch)
  gradients = jax.device_get(gradients)
  if config.scan_layers:
    gradients = unstack_layers(gradients, config)
  return metrics, gradients


def check(overrides, mesh_config=None):
  config = dataclasses.replace(PLAIN, **overrides)
  metrics, gradients = run(config, mesh_config)
  (_, expected_metrics), expected_gradients = plain()
  assert_trees_close(metrics, expected_metrics)
  assert_trees_close(gradients, expected_gradients)


SCAN = {'scan_layers': True}


@pytest.mark.parametrize(
  'overrides',
  [
    {'remat_policy': 'dots_saveable'},
    SCAN,
    SCAN | {'scan_unroll': 2, 'remat_policy': 'dots_saveable'},
    SCAN | {'remat_policy': 'full', 'dispatch': 'einsum'},
  ],
)
def test_scan_and_remat(overrides):
  check(overrides)


@pytest.mark.parametrize(
  'overrides, mesh',
  [
    (
      SCAN | {'remat_policy': 'full'},
      MeshConfig(expert=2, model=2, axis_types='auto', fsdp_experts=True),
    ),
    (
      SCAN | {'remat_policy': 'dots_saveable'},
      MeshConfig(expert=4, model=2, axis_types='explicit', fsdp_dense=True),
    ),
    (
      {'remat_policy': 'full'},
      MeshConfig(expert=4, axis_types='explicit', fsdp_experts=True),
    ),
    (
      SCAN | {'remat_policy': 'full'},
      MeshConfig(
        slice=2, expert=4, fsdp_dense=True, fsdp_dense_axes=('expert',)
      ),
    ),
    (
      SCAN | {'remat_policy': 'full'},
      MeshConfig(slice=2, expert=2, fsdp_experts=True, fsdp_slices=True),
    ),
  ],
)
def test_scan_and_remat_on_a_mesh(overrides, mesh):
  check(overrides, mesh)


def test_remat_draws_the_same_noise_twice():
  """A backward pass that dropped other units would change the gradients."""
  router = dataclasses.replace(ROUTER, train_choice_policy='random', jitter=0.1)
  config = tiny_config(
    router,
    dropout_rate=0.2,
    sparse_every=1,
    num_encoder_layers=1,
    num_decoder_layers=1,
  )
  params, batch = init_params(config), tiny_batch()
  rngs = {'dropout': jax.random.key(1), 'router': jax.random.key(2)}
  remat = dataclasses.replace(config, remat_policy='full')
  assert_trees_close(
    loss_and_gradients(remat, params, batch, rngs),
    loss_and_gradients(config, params, batch, rngs),
  )
