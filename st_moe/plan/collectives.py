"""What a compiled step moves between devices: its collectives, counted.

Read from the text of the compiled program, from its entry through loops (times
their trips), calls, branches (each counted: at most one of them runs) and
fusions. Three things that XLA for TPU writes otherwise than it runs them:

  - A collective behind other work is written into a chain of fusions, again in
    each link; it is counted where AsyncCollectiveStart begins it.
  - A reduce-scatter is a fusion `all-reduce-scatter` of an all-reduce and the
    slice that is kept.
  - Between slices data go through the hosts: pairs of send and recv that name
    the collective they are a part of.

Bytes are those of the result on one device. Link bytes are what one device must
send for it on a ring of its group of n, the best there is for a large array:

  all-gather, all-to-all      (n - 1) / n x result
  reduce-scatter              (n - 1) x result
  all-reduce                  2 (n - 1) / n x result
  collective-permute          result

On a torus an all-to-all sends through neighbours, which costs more. So seconds
from link bytes are a lower bound, and nothing is said of what runs meanwhile.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from st_moe.plan import hlo
from st_moe.plan.targets import Chip

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
_CALLS = {  # how an instruction names the computations that it runs once
  'fusion': ('calls',),
  'call': ('to_apply',),
  'async-start': ('calls',),
  'conditional': (
    'branch_computations',
    'true_computation',
    'false_computation',
  ),
}
_BITS = {'pred': 8, 'bf16': 16, 'token': 0}  # others end in their bits
_SHAPE = re.compile(r'\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]')
_OPCODES = re.compile(
  rf' (?:(?:{"|".join(KINDS)})(?:-start)?|while|recv|{"|".join(_CALLS)})\('
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of transfer, in groups of devices that all do the same."""

  kind: str  # one of KINDS
  bytes: int  # of the result on one device, at one execution
  shape: str  # 'bf16[8,512,5120]', 'f32[64] and 3 more'
  group_size: int
  local_size: int  # of the group's devices, those joined by ICI or NVLink
  axes: tuple[str, ...]  # of the mesh, along which its groups are; () unknown
  op_name: str  # name scopes of the JAX operation, '' unknown
  count: int = 1  # executions per step

  @property
  def over_network(self) -> bool:
    """Whether it leaves a TPU slice or a node of GPUs."""
    return self.local_size < self.group_size

  @property
  def largest_array_bytes(self) -> int:
    """Bytes of the array that `shape` names, of those that go together."""
    return _size_and_shape(self.shape)[0]

  @property
  def total_bytes(self) -> int:
    return self.count * self.bytes

  @property
  def link_bytes(self) -> float:
    """Returns what a device sends in all executions, on a ring."""
    n = self.group_size
    factor = {
      'all-reduce': 2 * (n - 1) / n,
      'reduce-scatter': n - 1,
      'collective-permute': 1,
      'collective-broadcast': 1,
    }.get(self.kind, (n - 1) / n)
    return factor * self.total_bytes


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the devices of a program are, in the program's own numbering."""

  axes: Mapping[str, int]  # of the mesh: names and sizes, outermost first
  islands: tuple[int, ...]  # for each device, its TPU slice or node of GPUs


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The collectives of one step, largest total first."""

  collectives: tuple[Collective, ...]
  unknown_loops: int  # loops whose trips are not known; counted as one

  def largest(self, n: int) -> tuple[Collective, ...]:
    """Returns the n with the largest result of one execution."""
    return tuple(sorted(self.collectives, key=lambda c: -c.bytes)[:n])

  def bytes_by_kind(self) -> dict[str, int]:
    """Returns result bytes per device and step of every kind there is."""
    totals = collections.Counter()
    for collective in self.collectives:
      totals[collective.kind] += collective.total_bytes
    return dict(totals.most_common())

  def counts_by_kind(self) -> dict[str, int]:
    """Returns executions per step of every kind there is."""
    totals = collections.Counter()
    for collective in self.collectives:
      totals[collective.kind] += collective.count
    return dict(totals.most_common())


@dataclasses.dataclass(frozen=True)
class LinkSeconds:
  """Lower bounds of a step's time on either kind of link; None: no rate."""

  interconnect: float | None
  network: float | None


def layout(mesh: Any) -> Layout:
  """Returns the layout of a program that is compiled for a `jax` mesh."""
  devices = mesh.devices.flat
  return Layout(
    dict(mesh.shape),
    tuple(
      (getattr(device, 'slice_index', None) or 0)
      if device.platform == 'tpu'
      else device.process_index
      for device in devices
    ),
  )


def link_seconds(collectives: Iterable[Collective], chip: Chip) -> LinkSeconds:
  """Returns the least time that the links of a chip need for collectives.

  Over the network the adapters of a host are shared: groups with one device a
  host are as many as the host has devices, and a ring within a host leaves it
  once.
  """
  local, network = 0.0, 0.0
  for c in collectives:
    if not c.over_network:
      local += c.link_bytes
    elif c.kind in ('all-to-all', 'ragged-all-to-all'):
      away = (c.group_size - c.local_size) / c.group_size
      network += away * c.total_bytes * chip.devices_per_host
    else:
      network += c.link_bytes * max(1, chip.devices_per_host / c.local_size)

  def seconds(size: float, rate: float | None) -> float | None:
    return size / rate if rate else (None if size else 0.0)

  return LinkSeconds(
    seconds(local, chip.interconnect_rate), seconds(network, chip.network_rate)
  )


def read_collectives(text: str, where: Layout | None = None) -> Traffic:
  """Returns what one run of a compiled program moves.

  Args:
    text: `compiled.as_text()`.
    where: the layout of its devices; without it axes are not known, and all
      devices count as joined by ICI or NVLink.
  """
  counter = _Counter(hlo.parse(text), where)
  totals = counter.count(counter.program.entry)
  found = [
    dataclasses.replace(collective, count=count)
    for collective, count in totals.items()
  ]
  found.sort(key=lambda c: (-c.total_bytes, c.kind, c.shape, c.op_name))
  return Traffic(tuple(found), len(counter.unknown_loops))


class _Counter:
  """Counts the collectives of each computation once, whoever runs it."""

  def __init__(self, program: hlo.Program, where: Layout | None):
    self.program = program
    self.where = where
    self.unknown_loops: set[str] = set()
    self._counts: dict[str, collections.Counter] = {}

  def count(self, name: str) -> collections.Counter:
    """Returns {collective: executions} of one run of a computation."""
    if name not in self._counts:
      computation = self.program.computations[name]
      total = collections.Counter()
      for line in computation.lines:
        if _OPCODES.search(line):
          self._add(total, computation, hlo.instruction(line))
      self._counts[name] = total
    return self._counts[name]

  def _add(
    self,
    total: collections.Counter,
    computation: hlo.Computation,
    found: hlo.Instruction,
  ) -> None:
    """Adds what an instruction moves, itself or by what it runs."""
    if found.opcode == 'while':
      trips = self.program.trips(found, computation)
      if trips is None:
        trips = 1
        self.unknown_loops.add(found.name)
      for collective, count in self.count(
        found.computations('body')[0]
      ).items():
        total[collective] += trips * count
    elif found.opcode == 'recv':
      if collective := _between_slices(found):
        total[collective] += 1
    elif found.opcode.removesuffix('-start') in KINDS:
      if _begins(computation, found):
        total[self._collective(computation, found)] += 1
    else:
      for attribute in _CALLS.get(found.opcode, ()):
        for name in found.computations(attribute):
          for collective, count in self.count(name).items():
            if not collective.op_name:
              collective = dataclasses.replace(
                collective, op_name=found.op_name
              )
            total[collective] += count

  def _collective(
    self, computation: hlo.Computation, found: hlo.Instruction
  ) -> Collective:
    kind = found.opcode.removesuffix('-start')
    result = found.type
    if found.opcode.endswith('-start') and kind != 'all-reduce':
      result = _elements(found.type)[1]  # (operands, results, ...)
    if computation.name.startswith('all-reduce-scatter'):
      kind, result = 'reduce-scatter', computation.type
    group = group_of(found.line, self.program.devices)
    axes, local = (), len(group)
    if self.where is not None:
      axes = _axes(group, self.where.axes)
      islands = collections.Counter(self.where.islands[i] for i in group)
      local = max(islands.values())
    size, shape = _size_and_shape(result)
    return Collective(kind, size, shape, len(group), local, axes, found.op_name)


def _begins(computation: hlo.Computation, found: hlo.Instruction) -> bool:
  """Whether a collective starts here, not in an earlier link of its chain."""
  if 'async_collective_fusion_config' not in found.line:
    return True
  return any(
    'custom_call_target="AsyncCollectiveStart"' in line
    and found.name in hlo.instruction(line).operands
    for line in computation.lines
  )


def _between_slices(found: hlo.Instruction) -> Collective | None:
  """Returns the transfer between TPU slices that a `recv` ends."""
  kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', found.line)
  if kind is None:
    return None
  slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', found.line)
  size, shape = _size_and_shape(_elements(found.type)[0])
  name = kind[1].lower().replace('_', '-')
  return Collective(
    name if name in KINDS else 'collective-permute',
    size,
    shape,
    slices[1].count(',') + 1 if slices else 2,
    1,
    ('slice',),
    found.op_name,
  )


def _elements(result: str) -> list[str]:
  """Splits the type of a tuple into those of its elements."""
  elements, depth, begin = [], 0, 1
  for i, mark in enumerate(result):
    if mark in '([{':
      depth += 1
    elif mark in ')]}':
      depth -= 1
    if (mark == ',' and depth == 1) or (mark == ')' and depth == 0):
      elements.append(result[begin:i].strip())
      begin = i + 1
  return elements


def _size_and_shape(result: str) -> tuple[int, str]:
  """Returns the bytes of a type, and its largest array for people."""
  arrays = []
  for kind, shape in _SHAPE.findall(result):
    digits = re.search(r'\d+', kind)
    bits = _BITS[kind] if kind in _BITS else int(digits[0])
    sizes = [int(n.lstrip('<=')) for n in shape.split(',') if n]
    arrays.append((math.prod(sizes) * bits // 8, f'{kind}[{shape}]'))
  size, shape = max(arrays)
  more = len(arrays) - 1
  name = shape + (f' and {more} more' if more else '')
  return sum(size for size, _ in arrays), name


_LIST = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_IOTA = re.compile(
  r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
)
_MESH = re.compile(
  r'replica_groups=mesh\[(?P<mesh>[^\]]*)\]'
  r'(?:, device_ids=\(\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?'
  r' \{(?P<axes>[^}]*)\}'
)
_PAIRS = re.compile(r'source_target_pairs=\{\{(\d+),(\d+)\}')


def group_of(line: str, devices: int) -> list[int]:
  """Returns the first group of devices that a collective joins.

  The groups are written as lists, `{{0,1},{2,3}}`; as an iota reshaped and
  transposed, `[8,2]<=[2,8]T(1,0)`; or as axes of a mesh of such an iota,
  `mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}`, where an axis may be cut,
  `'a':(1)2`: from the part that 1 comes before, 2 devices. A permutation is
  pairs; a group is the sender and the receiver.
  """
  if match := _PAIRS.search(line):
    return [int(match[1]), int(match[2])]
  if (match := _LIST.search(line)) and match[1]:
    return _numbers(match[1])
  if match := _IOTA.search(line):
    ids = _iota(match[3], match[4])
    return ids.reshape(int(match[1]), int(match[2]))[0].tolist()
  if match := _MESH.search(line):
    return _mesh_group(match, devices)
  return list(range(devices))


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def _iota(dims: str, order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _mesh_group(match: re.Match, devices: int) -> list[int]:
  names = re.findall(r"'([^']+)'=(\d+)", match['mesh'])
  sizes = {name: int(size) for name, size in names}
  ids = _iota(match['dims'] or str(math.prod(sizes.values())), match['order'])
  taken = dict.fromkeys(sizes, slice(0, 1))
  for name, before, size in re.findall(
    r"'([^']+)'(?::\((\d+)\)(\d+))?", match['axes']
  ):
    stride = sizes[name] // (int(before) * int(size)) if size else 1
    count = int(size) if size else sizes[name]
    taken[name] = slice(0, count * stride, stride)
  return (
    ids.reshape(list(sizes.values()))[tuple(taken.values())].ravel().tolist()
  )


def _axes(group: Sequence[int], axes: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which the places of a group differ."""
  places = np.unravel_index(group, list(axes.values()))
  return tuple(
    name
    for name, place in zip(axes, places, strict=True)
    if np.unique(place).size > 1
  )
