"""What a target of `st_moe plan` is called, and what its devices have.

A target is a number of devices of one kind: `v5p:8x8x8` (the shape of a TPU
slice), `v5p-1024` (Cloud's name of it), `h100x16`, `cpu:8`. Names and numbers
only: `devices.py` makes devices of them, and this module loads no JAX.

Where the numbers are from:

  TPU: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x; rates of v4's
    links: the TPU v4 paper (arXiv 2304.01433). What of the memory a program can
    have: what libtpu 0.0.42 says when one needs more.
  GPU: NVIDIA's data sheets of the SXM boards, and of DGX A100, H100, H200 and
    B200 for the network (8 adapters a node). Memory: the bytes CUDA reports; a
    JAX process takes 75% of them unless XLA_PYTHON_CLIENT_MEM_FRACTION says
    otherwise.
"""

import dataclasses
import itertools
import math
import re

from st_moe.bench.peaks import peak_flops
from st_moe.errors import UserError, did_you_mean

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one JAX device has; on TPU7x that is half of a chip.

  Rates are bytes/s in one direction (vendors print both together); None: no
  such thing, or not published.
  """

  name: str
  platform: str  # 'tpu', 'cuda' or 'cpu', as JAX calls them
  kind: str  # JAX's device_kind, or a part of it
  devices_per_host: int
  hbm_bytes: int | None = None  # that a program can have
  hbm_rate: float | None = None
  interconnect_rate: float | None = None  # of all ICI links or NVLinks together
  network_rate: float | None = None  # of a host, between slices or nodes

  @property
  def peak(self) -> float | None:
    """Returns bfloat16 FLOP/s without sparsity."""
    return peak_flops(self.kind)


def _tpu(name, kind, devices_per_host, hbm, hbm_rate, links, network) -> Chip:
  return Chip(
    name,
    'tpu',
    kind,
    devices_per_host,
    int(hbm * _GIB),
    hbm_rate,
    links,
    network,
  )


def _gpu(name, kind, hbm_bytes, hbm_rate, links, network) -> Chip:
  return Chip(name, 'cuda', kind, 8, hbm_bytes, hbm_rate, links, network)


# Networks of TPU hosts: 4 chips x 50 Gb/s (v5p), x 100 Gb/s (v6e, tpu7x); on
# v5e a pod of 64 hosts has 6.4 Tb/s; v4's is not published.
CHIPS = {
  chip.name: chip
  for chip in (
    _tpu('v4', 'TPU v4', 4, 30.75, 1200e9, 300e9, None),
    _tpu('v5e', 'TPU v5 lite', 4, 15.75, 819e9, 200e9, 12.5e9),
    _tpu('v5p', 'TPU v5', 4, 95.74, 2765e9, 600e9, 25e9),
    _tpu('v6e', 'TPU v6 lite', 4, 31.25, 1638e9, 400e9, 50e9),
    _tpu('tpu7x', 'TPU7x', 8, 94.75, 3690e9, 300e9, 50e9),
    _gpu('a100-40', 'NVIDIA A100-SXM4-40GB', 42331013120, 1555e9, 300e9, 200e9),
    _gpu('a100-80', 'NVIDIA A100-SXM4-80GB', 85100068864, 2039e9, 300e9, 200e9),
    _gpu('h100', 'NVIDIA H100 80GB HBM3', 84929347584, 3350e9, 450e9, 400e9),
    _gpu('h200', 'NVIDIA H200', 151397597184, 4800e9, 450e9, 400e9),
    _gpu('b200', 'NVIDIA B200', 191514411008, 8000e9, 900e9, 400e9),
    Chip('cpu', 'cpu', 'cpu', devices_per_host=1),
  )
}

_OTHER_NAMES = {
  'v5litepod': 'v5e',
  'v5lite': 'v5e',
  'trillium': 'v6e',
  'ironwood': 'tpu7x',
  'v7x': 'tpu7x',
}


@dataclasses.dataclass(frozen=True)
class _Torus:
  """How slices of a TPU are shaped, and what the number in their name counts.

  3D slices of 64 chips or more are made of cubes of 4x4x4; smaller ones, and
  all 2D slices, have the shapes of `small`.
  """

  pod: int  # chips in the largest slice
  small: tuple[str, ...]
  counts: str  # in Cloud's names
  per_chip: int = 1  # of what is counted
  devices_per_chip: int = 1

  @property
  def cubes(self) -> bool:
    return self.pod > math.prod(_shape(self.small[-1]))

  def topology(self, chips: int) -> str | None:
    """Returns the standard shape of a slice; None if there is none."""
    for shape in self.small:
      if math.prod(_shape(shape)) == chips:
        return shape
    if not self.cubes or chips % 64 or not 64 <= chips <= self.pod:
      return None
    cubes = chips // 64
    shapes = (
      (a, b, cubes // (a * b))
      for a, b in itertools.product(range(1, math.isqrt(cubes) + 1), repeat=2)
      if a <= b and cubes % (a * b) == 0 and cubes // (a * b) >= b
    )
    return 'x'.join(str(4 * n) for n in min(shapes, key=sum))

  def allows(self, topology: str) -> bool:
    """Whether there are slices of this shape."""
    if topology in self.small:
      return True
    shape = _shape(topology)
    return (
      self.cubes
      and len(shape) == 3
      and all(n and n % 4 == 0 for n in shape)
      and shape == sorted(shape)
      and math.prod(shape) <= self.pod
    )

  def near(self, chips: int) -> list[int]:
    """Returns `chips` if it is a size, else the nearest below and above."""
    sizes = [math.prod(_shape(shape)) for shape in self.small]
    if self.cubes:
      sizes += range(64, self.pod + 1, 64)
    if chips in sizes:
      return [chips]
    below = [size for size in sizes if size < chips]
    above = [size for size in sizes if size > chips]
    return below[-1:] + above[:1]


_SMALL_2D = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SMALL_3D = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')
_CORES = 'TensorCores, two per chip'
_TORI = {
  'v4': _Torus(4096, _SMALL_3D, _CORES, per_chip=2),
  'v5e': _Torus(256, _SMALL_2D, 'chips'),
  'v5p': _Torus(8960, _SMALL_3D, _CORES, per_chip=2),
  'v6e': _Torus(256, _SMALL_2D, 'chips'),
  'tpu7x': _Torus(9216, _SMALL_3D, _CORES, per_chip=2, devices_per_chip=2),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices of one kind, as JAX counts them, over all slices."""

  name: str  # with its shape: 'v5p:8x8x8', 'h100x16', 'cpu:8'
  chip: Chip
  devices: int
  topology: str  # of one slice; nodes x 1 x GPUs of a node; CPU devices
  slices: int = 1

  @property
  def platform(self) -> str:
    return self.chip.platform

  @property
  def hosts(self) -> int:
    """Returns how many machines (TPU VMs, nodes of GPUs) this is."""
    if self.platform == 'cpu':
      return 1
    return self.slices * -(
      -self.devices // self.slices // self.chip.devices_per_host
    )


def _shape(topology: str) -> list[int]:
  return [int(n) for n in topology.split('x')]


# A name is a kind of device, a separator, and a number or a shape.
_NAME = re.compile(
  r'(?P<kind>[a-z][a-z0-9]*(?:-[48]0(?=[:x]))?)'
  r'(?P<mark>[:x-])'
  r'(?P<size>[0-9]+(?:x[0-9]+)*)'
)
_EXAMPLES = 'v5p:8x8x8, v5p-1024, v5litepod-256, h100x16 or cpu:8'


def parse_target(text: str, slices: int = 1) -> Target:
  """Returns the target called `text`, `slices` times.

  Args:
    text: a TPU slice by its shape (`v5p:8x8x8`) or by Cloud's name (`v5p-1024`
      counts TensorCores, `v5litepod-256` chips), GPUs in nodes of 8 (`h100x16`
      or `h100:16`), or CPU devices (`cpu:8`).
    slices: TPU slices of that shape, joined by the data center's network.

  Raises:
    UserError: for an unknown name or a size that does not exist, with what is
      nearest; for several slices of what is no TPU.
  """
  match = _NAME.fullmatch(text.strip().lower())
  written = match['kind'] if match else re.split('[:-]', text.lower())[0]
  kind = _OTHER_NAMES.get(written, written)
  if match is None or kind not in CHIPS:
    raise UserError(
      f'{text!r} is no target{_hint(written, kind)}; say {_EXAMPLES}; known '
      f'are {", ".join([*CHIPS, *_OTHER_NAMES])}'
    )
  if slices < 1:
    raise UserError(f'the number of slices must be positive; got {slices}')
  chip = CHIPS[kind]
  if chip.platform == 'tpu':
    return _tpu_target(text, chip, match['mark'], match['size'], slices)
  if slices > 1:
    raise UserError(
      f'only TPUs come in slices; say how many devices there are of {kind} '
      f'in all, such as {_named(chip, 16)}, instead of {slices} slices'
    )
  count = match['size']
  if match['mark'] == '-' or not count.isdigit() or int(count) < 1:
    raise UserError(
      f'{text!r}: how many devices of {kind}? Say, for 16, {_named(chip, 16)}'
    )
  return _nodes_target(text, chip, int(count))


def _hint(written: str, kind: str) -> str:
  if kind in CHIPS:
    return ', its size is missing or misspelt'
  longer = [name for name in CHIPS if written and name.startswith(written)]
  if longer:
    return f'; did you mean {" or ".join(longer)}?'
  return did_you_mean(written, [*CHIPS, *_OTHER_NAMES])


def _named(chip: Chip, devices: int) -> str:
  return f'{chip.name}{":" if chip.platform == "cpu" else "x"}{devices}'


def _nodes_target(text: str, chip: Chip, devices: int) -> Target:
  if chip.platform == 'cpu':
    return Target(_named(chip, devices), chip, devices, str(devices))
  node = chip.devices_per_host
  if devices > node and devices % node:
    below = devices // node * node
    raise UserError(
      f'{text!r}: a node has {node} GPUs, so more of them come in multiples of '
      f'{node}; near: {_named(chip, below)} or {_named(chip, below + node)}'
    )
  topology = f'{max(1, devices // node)}x1x{min(devices, node)}'
  return Target(_named(chip, devices), chip, devices, topology)


def _tpu_target(
  text: str, chip: Chip, mark: str, size: str, slices: int
) -> Target:
  torus = _TORI[chip.name]
  if mark == ':':
    topology, chips = size, math.prod(_shape(size))
    if not torus.allows(topology):
      large = ', or AxBxC in multiples of 4 with A <= B <= C'
      raise UserError(
        f'{text!r} is no slice of {chip.name}: shapes are '
        f'{", ".join(torus.small)}{large if torus.cubes else ""}, up to '
        f'{torus.pod} chips; near: '
        + ' or '.join(
          f'{chip.name}:{torus.topology(n)}' for n in torus.near(chips)
        )
      )
  else:
    kind = text.strip().lower().split('-')[0]
    count = int(size) if mark == '-' and size.isdigit() else 0
    chips, rest = divmod(count, torus.per_chip)
    topology = None if rest else torus.topology(chips)
    if topology is None:
      raise UserError(
        f'{text!r} is no size of {chip.name}: names end in the number of '
        f'{torus.counts}; near: '
        + ' or '.join(f'{kind}-{torus.per_chip * n}' for n in torus.near(chips))
        if count
        else f'{text!r}: say {chip.name}:{torus.small[-1]} for a shape, or '
        f'{chip.name}-N for a number of {torus.counts}'
      )
  devices = slices * chips * torus.devices_per_chip
  return Target(f'{chip.name}:{topology}', chip, devices, topology, slices)
