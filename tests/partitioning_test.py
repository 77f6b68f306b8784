"""Logical axes become placements, on Auto and on Explicit meshes alike."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from st_moe import partitioning
from st_moe.config import MeshConfig
from st_moe.errors import UserError

AXIS_TYPES = ('auto', 'explicit')


def mesh(axis_types='auto', **sizes):
  sizes = sizes or {'slice': 2, 'expert': 2, 'model': 2}
  return partitioning.make_mesh(MeshConfig(axis_types=axis_types, **sizes))


def _without_data(spec):
  """Axes of one device may be named or not."""
  return tuple(
    tuple(axis for axis in entry if axis != 'data')
    if isinstance(entry, tuple)
    else entry
    for entry in spec
  )


def test_minus_one_takes_the_rest_of_the_devices():
  assert dict(mesh(data=-1, expert=4, model=1).shape) == {
    'slice': 1,
    'data': 2,
    'expert': 4,
    'model': 1,
  }


def test_slices_are_the_outermost_parts_of_the_devices():
  found = mesh(slice=2, data=-1, expert=2, model=1)
  assert found.axis_names == ('slice', 'data', 'expert', 'model')
  ids = [[device.id for device in part.flat] for part in found.devices]
  assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_tpu_job_says_how_many_slices_there_are():
  sizes = partitioning.mesh_sizes
  assert sizes(MeshConfig(expert=4), 16, num_slices=2) == (2, 2, 4, 1)
  assert sizes(MeshConfig(slice=2, expert=4), 16, num_slices=2)[0] == 2
  with pytest.raises(UserError, match='slice is 4, but this job has 2 TPU'):
    sizes(MeshConfig(slice=4), 16, num_slices=2)


def test_axes_that_do_not_multiply_to_the_devices_are_refused():
  with pytest.raises(
    UserError, match='data 3 x expert 1 x model 1 .* devices, 8'
  ):
    mesh(data=3, expert=1, model=1)
  with pytest.raises(
    UserError, match='data -1 x expert 3 x model 1 .* devices, 8'
  ):
    mesh(data=-1, expert=3, model=1)


@pytest.mark.parametrize('axis_types', AXIS_TYPES)
def test_shard_places_an_array_by_its_logical_axes(axis_types):
  x = np.arange(8 * 4, dtype=np.float32).reshape(8, 4)
  with partitioning.use_mesh(mesh(axis_types)):
    y = jax.jit(lambda x: partitioning.shard(x, 'batch', 'mlp'))(x)
  assert _without_data(y.sharding.spec) == (('slice', 'expert'), 'model')
  np.testing.assert_array_equal(y, x)


def test_shard_refuses_what_does_not_divide():
  with (
    partitioning.use_mesh(mesh()),
    pytest.raises(UserError, match=r'batch dimension of \(6, 4\) \(6\) .* 4'),
  ):
    partitioning.shard(jnp.zeros((6, 4)), 'batch', None)


def test_an_unknown_logical_axis_is_an_error():
  with partitioning.use_mesh(mesh()), pytest.raises(KeyError, match='bach'):
    partitioning.shard(jnp.zeros((8, 4)), 'bach', None)


def test_without_a_mesh_nothing_is_placed():
  x = jnp.ones((3, 5))
  assert partitioning.shard(x, 'batch', 'mlp') is x
  assert partitioning.batch_shards() == 1


@pytest.mark.parametrize('axis_types', AXIS_TYPES)
def test_einsum_adds_partial_sums_over_a_sharded_axis(axis_types):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(8, 6)), rng.normal(size=(6, 4))
  m = mesh(axis_types)

  def f(x, w):
    x = partitioning.shard(x, 'batch', 'mlp')
    w = partitioning.shard(w, 'mlp', 'embed')
    return partitioning.einsum('bf,fd->bd', x, w, out=('batch', 'embed'))

  with partitioning.use_mesh(m):
    y = jax.jit(f)(x.astype(np.float32), w.astype(np.float32))
  np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
  # PartitionSpecs are compared without trailing Nones.
  assert _without_data(y.sharding.spec)[:1] == (('slice', 'expert'),)


@pytest.mark.parametrize('axis_types', AXIS_TYPES)
def test_reshape_regroups_in_row_major_order(axis_types):
  x = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
  with partitioning.use_mesh(mesh(axis_types)):
    y = jax.jit(
      lambda x: partitioning.reshape(
        partitioning.shard(x, 'batch', None), (4, 12), ('group', 'length')
      )
    )(x)
  np.testing.assert_array_equal(y, x.reshape(4, 12))


@pytest.mark.parametrize('axis_types', AXIS_TYPES)
def test_every_device_cuts_its_own_rows_into_microbatches(axis_types):
  rows = jnp.arange(16)  # 4 shards of 4 rows: [0..3], [4..7], ...
  with partitioning.use_mesh(mesh(axis_types)):
    parts = jax.jit(
      lambda x: partitioning.split_microbatches(
        partitioning.shard(x, 'batch'), 2
      )
    )(rows)
  np.testing.assert_array_equal(
    parts, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
  )


def test_without_a_mesh_microbatches_are_consecutive_rows():
  np.testing.assert_array_equal(
    partitioning.split_microbatches(jnp.arange(6), 3), [[0, 1], [2, 3], [4, 5]]
  )


class _Layer(nn.Module):
  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(1.0)
    w = partitioning.param(self, 'wi', init, (4, 6), ('embed', 'mlp'))
    e = partitioning.param(
      self, 'expert', init, (2, 4, 6), ('expert', 'expert_embed', 'mlp'),
      dtype=jnp.bfloat16,
    )  # fmt: skip
    return x @ w, e


def test_parameters_are_float32_labelled_and_stored_in_parts():
  boxed = jax.eval_shape(_Layer().init, jax.random.key(0), jnp.ones((8, 4)))
  axes = partitioning.logical_axes(boxed)['params']
  assert axes == {
    'wi': ('embed', 'mlp'),
    'expert': ('expert', 'expert_embed', 'mlp'),
  }
  shapes = partitioning.unbox(boxed)['params']
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {
    jnp.dtype('float32')
  }

  def specs(data=2, expert=2, model=2, **fsdp):
    config = MeshConfig(data=data, expert=expert, model=model, **fsdp)
    shardings = partitioning.tree_shardings(
      shapes, axes, partitioning.make_mesh(config), config
    )
    return {name: sharding.spec for name, sharding in shardings.items()}

  assert specs() == {
    'wi': P(None, 'model'),
    'expert': P('expert', None, 'model'),
  }
  both = ('data', 'expert')
  assert specs(fsdp_dense=True, fsdp_dense_axes=both, fsdp_experts=True) == {
    'wi': P(both, 'model'),
    'expert': P('expert', 'data', 'model'),
  }
  assert specs(fsdp_dense=True, fsdp_dense_axes=('data',)) == {
    'wi': P('data', 'model'),
    'expert': P('expert', None, 'model'),
  }
  across = specs(slice=2, model=1, fsdp_experts=True, fsdp_slices=True)
  assert across['expert'] == P('expert', ('data', 'slice'), 'model')
  # Without axes: the larger one.
  assert specs(fsdp_dense=True)['wi'] == P(('expert',), 'model')
  larger_data = specs(data=4, expert=2, model=1, fsdp_dense=True)
  assert larger_data['wi'] == P(('data',), 'model')


def test_a_parameter_that_does_not_divide_is_refused():
  config = MeshConfig(data=1, expert=1, model=8)
  shape = jax.ShapeDtypeStruct((4, 6), jnp.float32)
  with pytest.raises(UserError, match=r'mlp dimension of \(4, 6\) \(6\) .* 8'):
    partitioning.tree_shardings(
      {'w': shape},
      {'w': ('embed', 'mlp')},
      partitioning.make_mesh(config),
      config,
    )


def test_a_batch_is_split_over_data_and_expert_axes():
  m = mesh()
  batch = partitioning.shard_batch({'x': np.arange(8)}, m)
  assert batch['x'].sharding.spec == P(('slice', 'data', 'expert'))
  np.testing.assert_array_equal(batch['x'], np.arange(8))
