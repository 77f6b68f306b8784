"""The sparse layer of ST-MoE-L compiled for 64 TPU chips, ahead of time."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

from st_moe import partitioning
from st_moe.config import MeshConfig, RouterConfig
from st_moe.moe import MoeLayer
from st_moe.plan.devices import TPU_ENVIRONMENT
from st_moe.routing import expert_capacity

# ST-MoE-L's experts; two groups of 2048 tokens on every chip.
D_MODEL, D_FF, NUM_EXPERTS = 1024, 2816, 32
ROUTER = RouterConfig(group_size=2048)
MESH = MeshConfig(data=2, expert=32, model=1)
CHIPS, GROUPS = 64, 128


@pytest.fixture(scope='module')
def compiled():
  """Forward and backward on v5p:4x4x4, bfloat16."""
  pytest.importorskip('libtpu')
  from jax.experimental import topologies

  with pytest.MonkeyPatch.context() as patch:
    for name, value in TPU_ENVIRONMENT.items():
      patch.setenv(name, value)
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name='v5p:4x4x4'
    )
  mesh = partitioning.make_mesh(MESH, topology.devices)
  layer = MoeLayer(
    NUM_EXPERTS,
    D_FF,
    ('gelu', 'linear'),
    ROUTER,
    dispatch='gather',
    dtype=jnp.bfloat16,
  )
  x = jax.ShapeDtypeStruct(
    (GROUPS, ROUTER.group_size, D_MODEL),
    jnp.bfloat16,
    sharding=partitioning.batch_sharding(mesh),
  )

  def objective(params, x, key):
    rngs = {'router': key}
    y, stats = layer.apply({'params': params}, x, None, train=True, rngs=rngs)
    y = y.astype(jnp.float32)
    return jnp.sum(y * y) + stats.balance_loss + stats.z_loss

  key = jax.eval_shape(lambda: jax.random.key(0))  # nothing runs on the chips
  with partitioning.use_mesh(mesh):
    boxed = jax.eval_shape(
      lambda key, x: layer.init(
        {'params': key, 'router': key}, x, None, train=True
      )['params'],
      key,
      jax.ShapeDtypeStruct(x.shape, x.dtype),
    )
    shapes = partitioning.unbox(boxed)
    shardings = partitioning.tree_shardings(
      shapes, partitioning.logical_axes(boxed), mesh, MESH
    )
    params = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      shapes,
      shardings,
    )
    step = jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))
    return step.lower(params, x, key).compile()


def test_activations_move_in_four_all_to_alls(compiled):
  moves = collections.Counter(
    re.findall(
      r' (all-to-all|all-gather|collective-permute|ragged-all-to-all)'
      r'(?:-start)?\(',
      compiled.as_text(),
    )
  )
  assert moves == {'all-to-all': 4}


def test_flops_are_those_of_the_experts(compiled):
  tokens = GROUPS * ROUTER.group_size
  capacity = expert_capacity(ROUTER, ROUTER.group_size, NUM_EXPERTS, train=True)
  experts = 2 * NUM_EXPERTS * GROUPS * capacity * D_MODEL * D_FF * 3
  router = 2 * tokens * D_MODEL * NUM_EXPERTS
  ideal = 3 * (experts + router) / CHIPS
  assert ideal <= compiled.cost_analysis()['flops'] <= 1.05 * ideal
