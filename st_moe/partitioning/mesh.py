"""The mesh, the logical axes of arrays, and which mesh axes they lie on."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from st_moe.config import MeshConfig
from st_moe.errors import UserError

MESH_AXES = ('slice', 'data', 'expert', 'model')
# Sequences are split over every axis that is not the model axis: expert
# parallelism shares the data-parallel devices (paper, appendix H).
BATCH_AXES = ('slice', 'data', 'expert')

# Logical axes of activations and, while they are used, of weights.
COMPUTE_RULES: dict[str, str | tuple[str, ...] | None] = {
  'batch': BATCH_AXES,
  'group': BATCH_AXES,  # tokens before and after the experts
  # The same groups while at the experts: every slice has all experts.
  'expert_group': ('slice', 'data'),
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


def storage_rules(
  config: MeshConfig, sizes: Mapping[str, int]
) -> dict[str, Any]:
  """Returns the rules for stored parameters and optimizer state.

  FSDP stores the `embed` axis of weights in parts, within a slice: the slow
  network between slices gathers no weights, but those of experts where
  `fsdp_slices` asks for it.

  Args:
    config: says what is stored in parts.
    sizes: of the mesh axes.
  """
  rules = dict(COMPUTE_RULES)
  if config.fsdp_dense:
    larger = 'data' if sizes['data'] > sizes['expert'] else 'expert'
    rules['embed'] = config.fsdp_dense_axes or (larger,)
  if config.fsdp_experts:
    # Neighbouring parts lie on different slices: gathered over those first, a
    # row is whole within its slice, and no part crosses twice.
    across = config.fsdp_slices and sizes['slice'] > 1
    rules['expert_embed'] = ('data', 'slice') if across else ('data',)
  return rules


def spec(names: Sequence[str | None], rules: dict[str, Any] | None = None) -> P:
  """Returns the PartitionSpec of logical axis `names`.

  Raises:
    KeyError: for a name that is no logical axis.
  """
  rules = COMPUTE_RULES if rules is None else rules
  return P(*(None if name is None else rules[name] for name in names))


def mesh_sizes(
  config: MeshConfig, num_devices: int, num_slices: int | None = None
) -> tuple[int, int, int, int]:
  """Returns the sizes of MESH_AXES, with -1 and slice 0 filled in.

  Args:
    config: the mesh.
    num_devices: over all slices.
    num_slices: of a TPU job, where a slice of the mesh must be one of these;
      None: any device is near any other.

  Raises:
    UserError: when the axes do not multiply to the number of devices, or the
      slices are not those of the job.
  """
  slices = config.slice or num_slices or 1
  sizes = [slices, config.data, config.expert, config.model]
  known = math.prod(n for n in sizes if n != -1)
  if -1 in sizes and num_devices % known == 0:
    sizes[sizes.index(-1)] = num_devices // known
  if math.prod(sizes) != num_devices:
    outer = f'slice {slices} x ' if slices > 1 else ''
    raise UserError(
      f'MeshConfig: {outer}data {config.data} x expert {config.expert} x model '
      f'{config.model} do not multiply to the number of devices, '
      f'{num_devices}; -1 is the rest'
    )
  if num_slices is not None and slices != num_slices:
    raise UserError(
      f'MeshConfig.slice is {slices}, but this job has {num_slices} TPU '
      'slice(s); leave it at 0'
    )
  return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Builds the (slice, data, expert, model) mesh over `devices`.

  Args:
    config: the sizes of its axes.
    devices: of this run or of an ahead-of-time topology; None: all.

  Raises:
    UserError: see `mesh_sizes`.
  """
  devices = list(jax.devices() if devices is None else devices)
  num_slices = None
  if devices[0].platform == 'tpu':
    devices.sort(key=_slice_index)  # stable: by id within a slice
    num_slices = _slice_index(devices[-1]) + 1
  slices, *inner = mesh_sizes(config, len(devices), num_slices)
  axis_type = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}[
    config.axis_types
  ]
  # `jax.make_mesh` cannot split an axis of a TPU's torus: 32 experts on 4x4x4.
  array = np.stack(
    [
      mesh_utils.create_device_mesh(
        inner, list(part), allow_split_physical_axes=True
      )
      for part in np.split(np.array(devices, dtype=object), slices)
    ]
  )
  return Mesh(array, MESH_AXES, axis_types=(axis_type,) * len(MESH_AXES))


def describe(sizes: Mapping[str, int]) -> str:
  """Returns 'data 8 x expert 64 x model 1'; slices where there are several."""
  return ' x '.join(
    f'{axis} {size}'
    for axis, size in sizes.items()
    if axis != 'slice' or size > 1
  )


def _slice_index(device: Any) -> int:
  """Returns the TPU slice of a device; a job of one slice may name none."""
  return getattr(device, 'slice_index', 0)


# Rules for the gradients of weights: those of `storage_rules`.
gradient_rules: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar(
  'gradient_rules', default=COMPUTE_RULES
)
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  'platform', default=None
)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, config: MeshConfig | None = None) -> Iterator[None]:
  """Context in which `shard`, `einsum` and `param` act on `mesh`.

  Args:
    mesh: the device mesh.
    config: its configuration, where gradients are taken of weights that are
      stored in parts (FSDP): each device then adds up its own part only.
  """
  rules = COMPUTE_RULES if config is None else storage_rules(config, mesh.shape)
  tokens = [
    (gradient_rules, gradient_rules.set(rules)),
    (_platform, _platform.set(mesh.devices.flat[0].platform)),
  ]
  try:
    with jax.set_mesh(mesh):
      yield
  finally:
    for variable, token in tokens:
      variable.reset(token)


def platform() -> str:
  """Returns what is computed on, 'cpu', 'gpu' or 'tpu': the mesh in use.

  A program compiled ahead of time is for other devices than this machine's.
  """
  name = _platform.get() or jax.default_backend()
  return 'gpu' if name in ('cuda', 'rocm') else name


def current():
  """Returns the mesh in use, or None."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def is_explicit(mesh) -> bool:
  return AxisType.Explicit in mesh.axis_types


def axis_size(mesh, axes: str | tuple[str, ...] | None) -> int:
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[axis] for axis in axes)


def batch_shards(mesh=None) -> int:
  """Returns into how many parts the batch is split (1 without a mesh)."""
  mesh = current() if mesh is None else mesh
  return 1 if mesh is None else axis_size(mesh, BATCH_AXES)


def check_divisible(
  shape: Sequence[int], names: Sequence[str | None], rules=None, mesh=None
) -> None:
  """Raises UserError if a dimension cannot be split evenly over its axes."""
  mesh = current() if mesh is None else mesh
  rules = COMPUTE_RULES if rules is None else rules
  for size, name in zip(shape, names, strict=True):
    parts = axis_size(mesh, rules[name]) if name is not None else 1
    if size % parts:
      raise UserError(
        f'the {name} dimension of {tuple(shape)} ({size}) is not divisible by '
        f'the {parts} devices of mesh axes {rules[name]}'
      )
