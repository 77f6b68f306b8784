"""Where arrays live: the mesh, the logical axes, and the words layers use.

Layers name logical axes; this file alone knows mesh axes. `shard` and `einsum`
serve meshes with Auto axes (a constraint for the compiler) and with Explicit
axes (a type that is checked while tracing). Without a mesh they do nothing.

Layers say where data moves and nowhere else: contractions over a sharded axis
(`einsum(..., out=)`), the all-to-alls around experts and regrouping (`shard`,
`reshape`), and the gathering of sharded weights (`param`).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from st_moe.config import MeshConfig
from st_moe.errors import UserError

MESH_AXES = ('data', 'expert', 'model')
# Sequences are split over every axis that is not the model axis: expert
# parallelism shares the data-parallel devices (paper, appendix H).
BATCH_AXES = ('data', 'expert')

# Logical axes of activations and, while they are used, of weights.
COMPUTE_RULES: dict[str, str | tuple[str, ...] | None] = {
  'batch': BATCH_AXES,
  'group': BATCH_AXES,  # tokens before and after the experts
  'expert_group': 'data',  # the same groups while at the experts
  'expert': 'expert',
  'capacity': None,
  'length': None,
  'embed': None,
  'expert_embed': None,
  'mlp': 'model',
  'heads': 'model',
  'kv': None,
  'joined_kv': 'model',
  'vocab': 'model',
  'relpos_buckets': None,
  'router_experts': None,
  'layers': None,
}


def storage_rules(config: MeshConfig) -> dict[str, Any]:
  """Returns the rules for stored parameters and optimizer state.

  FSDP stores the `embed` axis of weights in parts over 'data'.
  """
  rules = dict(COMPUTE_RULES)
  if config.fsdp_dense:
    rules['embed'] = 'data'
  if config.fsdp_experts:
    rules['expert_embed'] = 'data'
  return rules


def spec(names: Sequence[str | None], rules: dict[str, Any] | None = None) -> P:
  """Returns the PartitionSpec of logical axis `names`.

  Raises:
    KeyError: for a name that is no logical axis.
  """
  rules = COMPUTE_RULES if rules is None else rules
  return P(*(None if name is None else rules[name] for name in names))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Builds the (data, expert, model) mesh over `devices` (default: all).

  Raises:
    UserError: when the axes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [config.data, config.expert, config.model]
  known = math.prod(n for n in sizes if n != -1)
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise UserError(
      f'MeshConfig: data {config.data} x expert {config.expert} x model '
      f'{config.model} does not fit: the axes must multiply to the number of '
      f'devices, {len(devices)} here (-1: the rest)'
    )
  axis_type = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}[
    config.axis_types
  ]
  # `jax.make_mesh` cannot split an axis of a TPU's torus: 32 experts on 4x4x4.
  array = mesh_utils.create_device_mesh(
    sizes, devices, allow_split_physical_axes=True
  )
  return Mesh(array, MESH_AXES, axis_types=(axis_type,) * 3)


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
  """Context in which `shard`, `einsum` and `param` act on `mesh`."""
  return jax.set_mesh(mesh)


def _current():
  """Returns the mesh in use, or None."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def _is_explicit(mesh) -> bool:
  return AxisType.Explicit in mesh.axis_types


def _axis_size(mesh, axes: str | tuple[str, ...] | None) -> int:
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[axis] for axis in axes)


def batch_shards(mesh=None) -> int:
  """Returns into how many parts the batch is split (1 without a mesh)."""
  mesh = _current() if mesh is None else mesh
  return 1 if mesh is None else _axis_size(mesh, BATCH_AXES)


def check_divisible(
  shape: Sequence[int], names: Sequence[str | None], rules=None, mesh=None
) -> None:
  """Raises UserError if a dimension cannot be split evenly over its axes."""
  mesh = _current() if mesh is None else mesh
  rules = COMPUTE_RULES if rules is None else rules
  for size, name in zip(shape, names, strict=True):
    parts = _axis_size(mesh, rules[name]) if name is not None else 1
    if size % parts:
      raise UserError(
        f'the {name} dimension of {tuple(shape)} ({size}) is not divisible by '
        f'the {parts} devices of mesh axes {rules[name]}'
      )


def shard(x: jax.Array, *names: str | None) -> jax.Array:
  """Places `x` by its logical axes; here the data moves.

  Raises:
    UserError: when a dimension does not divide over its mesh axes.
  """
  mesh = _current()
  if mesh is None:
    return x
  check_divisible(x.shape, names, mesh=mesh)
  if _is_explicit(mesh):
    return jax.sharding.reshard(x, spec(names))
  return jax.lax.with_sharding_constraint(x, spec(names))


def einsum(
  equation: str,
  *operands: jax.Array,
  out: Sequence[str | None] | None = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """`jnp.einsum` whose result is placed by logical axes `out`.

  Needed wherever a contracted axis is sharded: the partial sums are added
  across devices into that placement.
  """
  mesh = _current()
  if mesh is not None and out is not None and _is_explicit(mesh):
    return jnp.einsum(
      equation,
      *operands,
      preferred_element_type=preferred_element_type,
      out_sharding=spec(out),
    )
  y = jnp.einsum(
    equation, *operands, preferred_element_type=preferred_element_type
  )
  return y if out is None else shard(y, *out)


def reshape(
  x: jax.Array, shape: Sequence[int], names: Sequence[str | None]
) -> jax.Array:
  """Row-major reshape whose result is placed by logical axes `names`."""
  mesh = _current()
  if mesh is not None and _is_explicit(mesh):
    check_divisible(shape, names, mesh=mesh)
    return jax.lax.reshape(x, tuple(shape), out_sharding=spec(names))
  return shard(x.reshape(tuple(shape)), *names)


def project(
  x: jax.Array,
  kernel: jax.Array,
  names: tuple[str, str],
  *,
  transpose: bool = False,
  preferred_element_type: Any = None,
) -> jax.Array:
  """Multiplies every position by a matrix; partial sums are added up.

  Batch and length go as one axis of rows: with two, XLA:CPU transposes a whole
  operand for the kernel's gradient.

  Args:
    x: [batch, length, I].
    kernel: [I, O]; [O, I] if transposed.
    names: logical axes of I and O.
    transpose: whether the kernel is.
    preferred_element_type: of the result; None: x's.

  Returns:
    [batch, length, O].
  """
  batch, length, inputs = x.shape
  rows = reshape(x, (batch * length, inputs), ('batch', names[0]))
  y = einsum(
    'ni,oi->no' if transpose else 'ni,io->no',
    rows,
    kernel,
    out=('batch', names[1]),
    preferred_element_type=preferred_element_type,
  )
  shape = (batch, length, y.shape[-1])
  return reshape(y, shape, ('batch', 'length', names[1]))


def uniform(
  key: jax.Array,
  shape: Sequence[int],
  names: Sequence[str | None],
  low: float = 0.0,
  high: float = 1.0,
) -> jax.Array:
  """Uniform float32 draws in [low, high), placed by logical axes `names`.

  Each device draws its own part; the numbers do not depend on the mesh.
  """
  mesh = _current()
  if mesh is not None and _is_explicit(mesh):
    check_divisible(shape, names, mesh=mesh)
    return jax.random.uniform(
      key, shape, minval=low, maxval=high, out_sharding=spec(names)
    )
  return shard(jax.random.uniform(key, shape, minval=low, maxval=high), *names)


def take_rows(
  table: jax.Array, ids: jax.Array, names: Sequence[str | None]
) -> jax.Array:
  """Returns `table[ids]` placed by logical axes `names`.

  The rows of the table may be sharded (a vocabulary): each device looks up its
  own, and the results are added up.
  """
  mesh = _current()
  if mesh is not None and _is_explicit(mesh):
    check_divisible((*ids.shape, *table.shape[1:]), names, mesh=mesh)
    return table.at[ids].get(out_sharding=spec(names))
  return shard(table[ids], *names)


def on_each_device(
  function: Callable[..., jax.Array],
  arguments: Sequence[Any],
  axes: Sequence[Any],
  out: Sequence[str | None],
) -> jax.Array:
  """Calls `function` on each device's own parts, for moves by hand.

  Inside, nothing moves but what the functions below move.

  Args:
    function: from the parts of `arguments` to a part of the result.
    arguments: arrays, trees of arrays, or None.
    axes: like `arguments`, with logical axis names for each array.
    out: logical axes of the result.

  Raises:
    UserError: when a dimension does not divide over its mesh axes.
  """

  def is_names(axes: Any) -> bool:
    return isinstance(axes, tuple) and all(
      name is None or isinstance(name, str) for name in axes
    )

  if _current() is None:
    return function(*arguments)
  axes = tuple(axes)
  placed = jax.tree.map(
    lambda names, x: shard(x, *names), axes, tuple(arguments), is_leaf=is_names
  )
  specs = jax.tree.map(spec, axes, is_leaf=is_names)
  return jax.shard_map(
    function, in_specs=specs, out_specs=spec(out), check_vma=False
  )(*placed)


def first_expert(experts_here: int) -> jax.Array | int:
  """Returns the first of this device's experts, in `on_each_device`."""
  if _current() is None:
    return 0
  return jax.lax.axis_index('expert') * experts_here


def gather_expert_axis(x: jax.Array) -> jax.Array:
  """Joins the parts [groups, ...] of a row of the 'expert' axis."""
  if _expert_devices() == 1:
    return x
  return jax.lax.all_gather(x, 'expert', axis=0, tiled=True)


def scatter_expert_axis(x: jax.Array) -> jax.Array:
  """Adds up a row of the 'expert' axis; undoes `gather_expert_axis`."""
  if _expert_devices() == 1:
    return x
  return jax.lax.psum_scatter(x, 'expert', scatter_dimension=0, tiled=True)


def sum_over_model_axis(x: jax.Array) -> jax.Array:
  """Adds up partial products over the 'model' axis, in `on_each_device`."""
  mesh = _current()
  if mesh is None or mesh.shape['model'] == 1:
    return x
  return jax.lax.psum(x, 'model')


def _expert_devices() -> int:
  mesh = _current()
  return 1 if mesh is None else mesh.shape['expert']


def param(
  module: nn.Module,
  name: str,
  init: Callable[..., jax.Array],
  shape: Sequence[int],
  axes: Sequence[str],
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Declares a float32 parameter; returns it cast and placed for computing.

  Args:
    module: the Linen module that owns it (inside `@nn.compact`).
    name: as T5X spells it.
    init: `init(key, shape, float32)`.
    shape: without the layers axis that a scan adds.
    axes: one logical axis per dimension.
    dtype: of the returned value.

  FSDP weights are gathered here, in `dtype`.
  """
  assert len(shape) == len(axes), (name, shape, axes)
  value = module.param(
    name,
    nn.with_logical_partitioning(init, tuple(axes)),
    tuple(shape),
    jnp.float32,
  )
  return shard(value.astype(dtype), *axes)


def logical_axes(boxed: Any) -> Any:
  """Returns, for a tree of boxed parameters, its tree of axis-name tuples."""
  return jax.tree.map(
    lambda box: tuple(box.names),
    boxed,
    is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
  )


def unbox(boxed: Any) -> Any:
  """Returns the plain parameter tree."""
  return jax.tree.map(
    lambda box: box.value,
    boxed,
    is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
  )


def tree_shardings(
  abstract: Any, axes: Any, mesh: Mesh, config: MeshConfig
) -> Any:
  """Returns a NamedSharding for every leaf.

  Args:
    abstract: tree of arrays or ShapeDtypeStructs.
    axes: the same tree with a tuple of logical axis names per leaf; () for a
      scalar or anything replicated.
    mesh: the device mesh.
    config: its configuration (FSDP switches).

  Raises:
    UserError: when a stored dimension does not divide over its mesh axes.
  """
  rules = storage_rules(config)

  def one(leaf, names):
    if names:
      check_divisible(leaf.shape, names, rules, mesh)
    return NamedSharding(mesh, spec(names, rules))

  return jax.tree.map(one, abstract, axes)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the batch axes; every other dimension whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


@dataclasses.dataclass(frozen=True)
class BatchPart:
  """Which of the equal parts of every batch a process reads.

  Attributes:
    index: of the part, from 0.
    count: of parts; fewer than processes where a row of the mesh has devices
      of several, which then read the same part.
  """

  index: int
  count: int


def batch_part(mesh: Mesh) -> BatchPart:
  """Returns the part of the rows that this process's devices hold.

  Raises:
    UserError: when processes share some rows of the mesh and not others.
  """
  shards = batch_sharding(mesh).devices_indices_map((batch_shards(mesh),))
  rows: dict[int, set[int]] = {}
  for device, (piece,) in shards.items():
    rows.setdefault(device.process_index, set()).add(piece.start or 0)
  parts = sorted(set(map(frozenset, rows.values())), key=min)
  sizes = list(map(len, parts))
  if sum(sizes) != batch_shards(mesh) or len(set(sizes)) > 1:
    raise UserError(
      f'the mesh {dict(mesh.shape)} does not go with {len(rows)} processes: '
      'some share a part of the batch only in part; make MeshConfig.model '
      'divide, or be a multiple of, the devices of a process'
    )
  own = frozenset(rows[jax.process_index()])
  return BatchPart(parts.index(own), len(parts))


def shard_batch(
  batch: dict[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Makes global arrays of this process's rows, split over the batch axes.

  Args:
    batch: numpy arrays [rows of this process's `batch_part`, ...].
    mesh: the device mesh.
  """
  sharding = batch_sharding(mesh)
  return {
    key: jax.make_array_from_process_local_data(sharding, value)
    for key, value in batch.items()
  }


def split_microbatches(x: jax.Array, parts: int) -> jax.Array:
  """Cuts [batch, ...] into [parts, batch / parts, ...] without moving rows.

  Every device cuts its own rows, in order, so that a microbatch holds whole
  routing groups whenever the whole batch does.
  """
  shards = batch_shards()
  rest = x.shape[1:]
  free = (None,) * len(rest)
  rows = x.shape[0] // (shards * parts)
  x = reshape(x, (shards, parts, rows, *rest), ('batch', None, None, *free))
  x = jnp.moveaxis(x, 1, 0)  # [parts, shards, rows, ...]
  return reshape(x, (parts, shards * rows, *rest), (None, 'batch', *free))
