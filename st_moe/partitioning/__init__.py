"""Where arrays live: the mesh, the logical axes, and the words layers use.

Layers name logical axes; these files alone know mesh axes. `shard` and `einsum`
serve meshes with Auto axes (a constraint for the compiler) and with Explicit
axes (a type that is checked while tracing). Without a mesh they do nothing.

Layers say where data moves and nowhere else: contractions over a sharded axis
(`einsum(..., out=)`), the all-to-alls around experts and regrouping (`shard`,
`reshape`), and the gathering of sharded weights (`param`).
"""

from st_moe.partitioning.mesh import (
  BATCH_AXES,
  COMPUTE_RULES,
  MESH_AXES,
  batch_shards,
  check_divisible,
  describe,
  make_mesh,
  mesh_sizes,
  platform,
  spec,
  storage_rules,
  use_mesh,
)
from st_moe.partitioning.moves import (
  einsum,
  first_expert,
  gather_expert_axis,
  multiply_experts,
  on_each_device,
  project,
  reshape,
  scatter_expert_axis,
  shard,
  split_microbatches,
  sum_over_model_axis,
  take_rows,
  uniform,
)
from st_moe.partitioning.storage import (
  BatchPart,
  batch_part,
  batch_sharding,
  logical_axes,
  param,
  replicated,
  shard_batch,
  tree_shardings,
  unbox,
)

__all__ = [
  'BATCH_AXES',
  'COMPUTE_RULES',
  'MESH_AXES',
  'BatchPart',
  'batch_part',
  'batch_sharding',
  'batch_shards',
  'check_divisible',
  'describe',
  'einsum',
  'first_expert',
  'gather_expert_axis',
  'logical_axes',
  'make_mesh',
  'mesh_sizes',
  'multiply_experts',
  'on_each_device',
  'param',
  'platform',
  'project',
  'replicated',
  'reshape',
  'scatter_expert_axis',
  'shard',
  'shard_batch',
  'spec',
  'split_microbatches',
  'storage_rules',
  'sum_over_model_axis',
  'take_rows',
  'tree_shardings',
  'unbox',
  'uniform',
  'use_mesh',
]
