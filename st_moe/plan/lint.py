"""What a plan warns of: settings that waste memory, links or arithmetic."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax

from st_moe.config import MeshConfig, ModelConfig, RunConfig
from st_moe.plan.collectives import Collective, Traffic
from st_moe.routing import expert_capacity, num_groups
from st_moe.stacking import STACKS, depth, sparse_layers, superblock_size
from st_moe.train_state import parameter_counts
from st_moe.train_step import StepProgram

# Dispatch by one-hot products above this share of all FLOPs is worth a word
# (the paper's groups keep it near 1%).
_DISPATCH_SHARE = 0.1
# Rounding the slots of an expert up may add this much.
_ROUNDING = 1.1
# An all-reduce inside a slice of arrays as large as this is of something that
# lies in parts, or could.
_LARGE_ALL_REDUCE = 16 * 2**20
# One that runs once a step costs little time, but its array is whole for a
# moment: below this, that is small beside any step that fills a device.
_LARGE_ONCE = 256 * 2**20
_SHOWN = 3  # shapes of all-reduces; the rest in one line
# The experts of one layer, brought together on a device, may take this much of
# its memory.
_GATHERED_SHARE = 0.1
# TPU arrays are tiles of 8 x 128; a dimension cut below that moves padding.
_TILE = (8, 128)
_SMALL_WEIGHT = 2**20  # elements; smaller weights do not matter


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something to look at.

  Attributes:
    rule: its name.
    text: what, with numbers, and what would change it.
  """

  rule: str
  text: str


def lint_shapes(
  config: RunConfig,
  program: StepProgram,
  shards: int,
  flops: dict[str, float],
  loops: Sequence[str],
  *,
  mesh: Mapping[str, int],
  available: int | None,
  tiled: bool,
) -> list[Finding]:
  """Returns what shapes alone show.

  Args:
    config: the run.
    program: its step, traced.
    shards: over which the batch is split.
    flops: from `costs.traced_flops`.
    loops: from `costs.uncounted_parts`.
    mesh: sizes of its axes.
    available: bytes on a device; None: not known.
    tiled: whether arrays lie in tiles, as on TPU.
  """
  findings = _groups(config, shards)
  findings += _gathered_experts(config, program, mesh, available)
  if tiled:
    findings += _tiles(program)
  if loops:
    findings.append(
      Finding(
        'FLOPs',
        f'{", ".join(loops)}: how often loops run depends on the routing, so '
        "the model's FLOPs stand for the program's, which are more (rows that "
        "fill blocks, remat); ModelConfig.dispatch = 'gather' is counted whole",
      )
    )
  dispatch = flops.get('dispatch, combine', 0.0) / sum(flops.values())
  if dispatch > _DISPATCH_SHARE:
    findings.append(
      Finding(
        'dispatch',
        f'dispatch is {dispatch:.0%} of the FLOPs; use ModelConfig.dispatch = '
        "'gather' or a smaller RouterConfig.group_size",
      )
    )
  for stack in STACKS if config.model.num_experts else ():
    layers = depth(config.model, stack)
    size = superblock_size(config.model, stack)
    if config.model.scan_layers and size == layers > 1:
      findings.append(
        Finding(
          'unbalanced layers',
          f'{stack}: {len(sparse_layers(config.model, stack))} sparse layers '
          f'in {layers} repeat no pattern, so the scan holds all of them; make '
          'sparse_every divide the number of layers',
        )
      )
  return findings


def _groups(config: RunConfig, shards: int) -> list[Finding]:
  """Looks at routing groups and the slots of experts."""
  findings = []
  for stack in STACKS if config.model.num_experts else ():
    router = getattr(config.model, f'{stack}_router')
    length = config.data.lengths[stack]
    tokens = config.batch_size // config.microbatches * length
    wanted = router.group_size or length
    size = tokens // num_groups(tokens, wanted, shards)
    if size != wanted:
      findings.append(
        Finding(
          'groups',
          f'{stack}: groups have {size} tokens, not the group_size of '
          f'{wanted}, and training will have them so: {tokens:,} tokens of a '
          f'(micro)batch do not make a multiple of {shards} such groups'
          f'{_batch_that_does(config, length, wanted * shards)}',
        )
      )
    if config.model.dispatch == 'ragged' or router.kind != 'token_choice':
      continue
    capacity = expert_capacity(
      router, size, config.model.num_experts, train=True
    )
    exact = size * router.train_capacity_factor / config.model.num_experts
    if capacity > _ROUNDING * exact:
      findings.append(
        Finding(
          'capacity',
          f'{stack}: {exact:.2f} slots per expert are rounded to {capacity}, '
          f'{capacity / exact - 1:.0%} more work and memory; a larger '
          f'group_size than {size} rounds less',
        )
      )
  return findings


def larger_expert_axes(
  model: ModelConfig, mesh: Mapping[str, int]
) -> list[int]:
  """Returns the sizes above its own that the `expert` axis could have."""
  places = mesh['data'] * mesh['expert']
  return [
    n
    for n in range(mesh['expert'] + 1, (model.num_experts or 0) + 1)
    if model.num_experts % n == 0 and places % n == 0
  ]


def _gathered_experts(
  config: RunConfig,
  program: StepProgram,
  mesh: Mapping[str, int],
  available: int | None,
) -> list[Finding]:
  """Looks at experts that are stored in parts and used whole."""
  model = config.model
  larger = larger_expert_axes(model, mesh)
  stored_whole = not config.mesh.fsdp_experts or mesh['data'] == 1
  if stored_whole or not larger or available is None:
    return []
  layers = sum(len(sparse_layers(model, stack)) for stack in STACKS)
  experts = model.num_experts // mesh['expert']
  width = 2 if model.activation_dtype == 'bfloat16' else 4
  total = width * parameter_counts(program.shapes)['expert'] // layers
  gathered = total // (mesh['expert'] * mesh['model'])
  if gathered <= _GATHERED_SHARE * available:
    return []
  return [
    Finding(
      'experts',
      f'every device gathers {experts} experts of a layer where they are used, '
      f'{gathered / 2**30:.2f} GiB of {available / 2**30:.2f}; with '
      f'--mesh=data=-1,expert={larger[-1]} it is '
      f'{gathered * mesh["expert"] / larger[-1] / 2**30:.2f} GiB',
    )
  ]


def _batch_that_does(config: RunConfig, length: int, tokens: int) -> str:
  """Returns '; a batch of N rows does' where one of like size does.

  Args:
    config: the run.
    length: of a row, in tokens.
    tokens: a microbatch's must be a multiple of these.
  """
  step = tokens // math.gcd(tokens, length) * config.microbatches
  rows = step * max(1, round(config.batch_size / step))
  likely = rows <= 2 * config.batch_size
  return f'; a batch of {rows:,} rows does' if likely else ''


def _tiles(program: StepProgram) -> list[Finding]:
  """Looks for weights cut into parts below the hardware's tile."""
  worst: dict[tuple[int, int], str] = {}
  for (path, leaf), sharding in zip(
    jax.tree_util.tree_leaves_with_path(program.shapes.shapes.params),
    jax.tree.leaves(program.shardings.params),
    strict=True,
  ):
    if leaf.ndim < 2 or math.prod(leaf.shape) < _SMALL_WEIGHT:
      continue
    part = sharding.shard_shape(leaf.shape)
    for axis, tile in zip((-2, -1), _TILE, strict=True):
      if part[axis] < min(tile, leaf.shape[axis]):
        where = jax.tree_util.keystr(path, simple=True, separator='/')
        worst.setdefault((leaf.shape[axis], part[axis]), where)
  return [
    Finding(
      'tiles',
      f'{where} and others: {whole} are cut into parts of {part}, padded to '
      f'the tile of {_TILE[0]} x {_TILE[1]}; fewer axes in '
      'MeshConfig.fsdp_dense_axes, or a smaller axis, waste less',
    )
    for (whole, part), where in worst.items()
  ]


def lint_traffic(traffic: Traffic, mesh: MeshConfig) -> list[Finding]:
  """Returns what the compiled program's collectives show."""
  by_shape: dict[str, list[Collective]] = {}
  for c in traffic.collectives:
    # Over the network nothing else is possible; over `model` alone the parts of
    # a layer's output are added up, not gradients.
    if c.kind != 'all-reduce' or c.over_network or c.axes == ('model',):
      continue
    least = _LARGE_ONCE if c.count == 1 else _LARGE_ALL_REDUCE
    if c.largest_array_bytes >= least:
      by_shape.setdefault(c.shape, []).append(c)
  alike = sorted(
    by_shape.values(), key=lambda some: -sum(c.total_bytes for c in some)
  )
  texts = [_added_up(some, mesh) for some in alike[:_SHOWN]]
  if rest := [c for some in alike[_SHOWN:] for c in some]:
    size = sum(c.total_bytes for c in rest)
    texts.append(
      f'{len(alike) - _SHOWN} more shapes are added up on every device, '
      f'{size / 2**30:.2f} GiB; --json names all'
    )
  findings = [Finding('all-reduce', text) for text in texts]
  if traffic.unknown_loops:
    findings.append(
      Finding(
        'loops',
        f'{traffic.unknown_loops} loops of the program have trips that are not '
        'known; what they move counts once',
      )
    )
  return findings


def _added_up(alike: Sequence[Collective], mesh: MeshConfig) -> str:
  """Says what all-reduces of one shape cost, and what makes them less."""
  count = sum(c.count for c in alike)
  size = sum(c.total_bytes for c in alike) / 2**30
  often = 'once a step' if count == 1 else f'{count} times a step'
  return (
    f'{alike[0].shape} is added up on every device, {often} ({size:.2f} GiB, '
    f'{_scope(alike[0].op_name)}), and is whole there for a moment; '
    f'{_scatters(mesh)}'
  )


def _scatters(mesh: MeshConfig) -> str:
  """Returns what makes a reduce-scatter of a gradient's all-reduce."""
  if not mesh.fsdp_dense:
    return 'MeshConfig.fsdp_dense = True scatters gradients'
  if len(mesh.fsdp_dense_axes or ()) > 1:
    return (
      'FSDP over one axis scatters it: leave MeshConfig.fsdp_dense_axes at None'
    )
  return 'a larger MeshConfig.model cuts it'


def _scope(op_name: str) -> str:
  """Returns the last modules of a name scope."""
  return '/'.join(op_name.split('/')[-3:]) or 'no name'
