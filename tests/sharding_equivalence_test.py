"""One device, eight with Auto axes and eight with Explicit axes agree.

Loss, metrics and gradients of a training step, also with dropout and random
routing: noise is drawn by position, not by device.
"""

import dataclasses
import functools

import jax
import numpy as np
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

from st_moe import decoding, partitioning
from st_moe.config import MeshConfig
from st_moe.errors import UserError
from st_moe.stacking import stack_layers

NOISY = dataclasses.replace(ROUTER, train_choice_policy='random', jitter=0.1)
ONE_LAYER = {'num_encoder_layers': 1, 'num_decoder_layers': 1}
CONFIGS = {
  'dense': tiny_config(
    num_experts=0, dropout_rate=0.1, tie_embeddings=True, **ONE_LAYER
  ),
  'sparse': tiny_config(
    NOISY,
    sparse_every=1,
    dropout_rate=0.1,
    attention_z_loss_weight=0.1,
    dispatch='gather',
    **ONE_LAYER,
  ),
  'scanned': tiny_config(
    num_encoder_layers=1,
    sparse_every=1,
    dispatch='einsum',
    scan_layers=True,
  ),
}
# Name of the model, mesh (slice, data, expert, model), FSDP (2: between slices
# too). Scanned models are in loss_invariance_test, but for decoding.
CASES = [
  ('dense', (1, 4, 1, 2), True),
  ('sparse', (1, 2, 2, 2), False),
  ('sparse', (1, 2, 4, 1), True),
  ('sparse', (2, 2, 1, 2), True),
  ('sparse', (2, 2, 2, 1), 2),
  ('sparse', (4, 1, 2, 1), 2),
]


def rngs():
  return {'dropout': jax.random.key(1), 'router': jax.random.key(2)}


def parameters(name):
  config = CONFIGS[name]
  if not config.scan_layers:
    return init_params(config)
  return stack_layers(
    init_params(dataclasses.replace(config, scan_layers=False)), config
  )


@functools.cache
def on_one_device(name):
  return loss_and_gradients(
    CONFIGS[name], parameters(name), tiny_batch(), rngs()
  )


def make_mesh(shape, axis_types, fsdp):
  slices, data, expert, model = shape
  mesh_config = MeshConfig(
    slice=slices,
    data=data,
    expert=expert,
    model=model,
    axis_types=axis_types,
    fsdp_dense=bool(fsdp),
    fsdp_experts=bool(fsdp),
    fsdp_slices=fsdp == 2,
  )
  return mesh_config, partitioning.make_mesh(mesh_config)


@pytest.mark.parametrize('axis_types', ['auto', 'explicit'])
@pytest.mark.parametrize('name, shape, fsdp', CASES)
def test_eight_devices_equal_one(name, shape, fsdp, axis_types):
  mesh_config, mesh = make_mesh(shape, axis_types, fsdp)
  params = place(parameters(name), CONFIGS[name], mesh, mesh_config)
  with partitioning.use_mesh(mesh, mesh_config):
    batch = partitioning.shard_batch(tiny_batch(), mesh)
    (_, metrics), gradients = loss_and_gradients(
      CONFIGS[name], params, batch, rngs()
    )
  (_, expected_metrics), expected_gradients = on_one_device(name)
  assert_trees_close(metrics, expected_metrics)
  assert_trees_close(gradients, expected_gradients)
  for gradient, param in zip(  # gradients are where their parameters are
    jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True
  ):
    assert gradient.sharding.is_equivalent_to(param.sharding, param.ndim)


@pytest.mark.parametrize('axis_types', ['auto', 'explicit'])
@pytest.mark.parametrize(
  'name, method',
  [
    ('sparse', decoding.Sampling(top_p=0.9)),
    ('scanned', decoding.BeamSearch(num_beams=3)),
  ],
)
def test_decoding_on_eight_devices_equals_one(name, method, axis_types):
  inputs = tiny_batch()['encoder_input_tokens']
  generate = functools.partial(
    decoding.generate,
    CONFIGS[name],
    max_length=4,
    method=method,
    rng=jax.random.key(0),
  )
  mesh_config, mesh = make_mesh((1, 2, 2, 2), axis_types, True)
  params = place(parameters(name), CONFIGS[name], mesh, mesh_config)
  with partitioning.use_mesh(mesh):
    batch = partitioning.shard_batch({'inputs': inputs}, mesh)
    sharded = generate(params, batch['inputs'])
  np.testing.assert_array_equal(sharded, generate(parameters(name), inputs))


@pytest.mark.parametrize('axis_types', ['auto', 'explicit'])
def test_a_batch_that_does_not_divide_is_refused(axis_types):
  mesh_config, mesh = make_mesh((1, 8, 1, 1), axis_types, False)
  params = place(parameters('dense'), CONFIGS['dense'], mesh, mesh_config)
  with (
    partitioning.use_mesh(mesh),
    pytest.raises(UserError, match=r'batch .*\(6\) is not divisible by .* 8'),
  ):
    loss_and_gradients(CONFIGS['dense'], params, tiny_batch(rows=6))
