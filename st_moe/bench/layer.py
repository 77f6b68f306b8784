"""`st_moe bench layer`: our layer with each backend, against two floors."""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from st_moe.bench import forms, pictures
from st_moe.bench.forms import BATCHED, DENSE, MODES
from st_moe.bench.results import (
  Output,
  as_json,
  mebibytes,
  medians,
  number,
  open_output,
)
from st_moe.bench.sizes import LayerSize, layer_sizes
from st_moe.bench.timing import CompiledForm, Sample, Spread, ratio, run_rounds
from st_moe.config import RunConfig, to_dict

_COLUMNS = (
  'form', 'wall ms', 'cpu ms', '/ batched floor', 'cpu', '/ dense floor',
  'temp MiB', 'FLOPs/ideal',
)  # fmt: skip


_COUNTED = 0.9  # of the ideal FLOPs
_DROPLESS = ', dropless'  # of the floors' names


def _kind(name: str) -> str:
  """Returns '' or ', dropless': which floors a form belongs to."""
  dropless = name in forms.DROPLESS or name.endswith(_DROPLESS)
  return _DROPLESS if dropless else ''


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One size in one mode.

  Attributes:
    size: of the layer.
    mode: 'forward' or 'forward+backward'.
    forms: compiled, by name, floors before their backends.
    samples: of each form, one per round.
    rows: of the experts' products, by floor: active rows of the dense ones,
      all buffers of the batched ones.
  """

  size: LayerSize
  mode: str
  forms: dict[str, CompiledForm]
  samples: dict[str, list[Sample]]
  rows: dict[str, int]

  def ratio(self, name: str, floor: str, clock: str = 'wall') -> Spread:
    """Returns the time of a form over that of its own DENSE or BATCHED."""
    base = self.samples[floor + _kind(name)]
    return ratio(self.samples[name], base, clock)

  def ideal(self, name: str) -> float:
    """Returns the FLOPs of the products that a form cannot do without."""
    rows = self.rows.get(name, self.rows[BATCHED + _kind(name)])
    return self.size.matmul_flops(rows, self.mode)

  def flops_ratio(self, name: str) -> float | None:
    """Returns compiled FLOPs over ideal; None where they are not counted.

    XLA counts the body of a loop once and a kernel not at all: what has fewer
    FLOPs than its products must have was not counted.
    """
    flops = self.forms[name].flops
    if flops is None or flops < _COUNTED * self.ideal(name):
      return None
    return flops / self.ideal(name)

  def backends(self) -> list[str]:
    """Returns the names of the forms that are no floors."""
    return [name for name in self.forms if name not in self.rows]


def run(args: argparse.Namespace, config: RunConfig) -> None:
  """Times every size, prints a table for each, writes JSON and a picture.

  Raises:
    UserError: for sizes or backends that there are not.
    RunStopped: when backends disagree.
  """
  sizes = layer_sizes(args, config.model)
  backends = forms.check_backends(args.backends, sizes)
  output = Output(open_output(args.output, 'layer'), 'layer', args.argv)
  measured = []
  for index, size in enumerate(sizes):
    output.say(f'[{index + 1}/{len(sizes)}] {size}: compiling')
    found = measure(size, backends, args.rounds, config.seed, output.say)
    measured += found
    for measurement in found:
      _print(output, measurement)
  output.finish(
    {'measurements': [_as_json(m) for m in measured]},
    pictures.draw_layer(measured),
  )


def measure(
  size: LayerSize,
  backends: tuple[str, ...],
  rounds: int,
  seed: int,
  say: Callable[[str], None] = print,
) -> list[Measurement]:
  """Compiles, compares, then times one size in both modes.

  Args:
    size: of the layer.
    backends: names.
    rounds: in which each form runs once.
    seed: of parameters and inputs.
    say: prints a line.

  Raises:
    RunStopped: when backends disagree.
  """
  begin = time.perf_counter()
  programs = forms.LayerForms(size, seed)
  ours = {
    mode: {name: CompiledForm(programs.moe(name)[mode]) for name in backends}
    for mode in MODES
  }
  agreement = _check_agreement(size, ours, seed)
  rows: dict[str, int] = {}
  compiled: dict[str, dict[str, CompiledForm]] = {mode: {} for mode in MODES}
  for kind in dict.fromkeys(map(_kind, backends)):
    members = [name for name in backends if _kind(name) == kind]
    output = ours[MODES[0]][members[0]].output
    active = forms.active_rows(size, members[0], output)
    each = math.ceil(active / size.num_experts)
    if not kind:
      each = size.slots // size.num_experts
    rows[DENSE + kind], rows[BATCHED + kind] = active, each * size.num_experts
    floors = (
      programs.dense_floor(DENSE + kind, active),
      programs.batched_floor(BATCHED + kind, each),
    )
    for mode in MODES:
      made = [CompiledForm(floor[mode]) for floor in floors]
      made += [ours[mode][name] for name in members]
      compiled[mode] |= {form.name: form for form in made}
    say(
      f'  {active} of {size.tokens * size.choices} choices reach an expert'
      + (kind or f', in {size.slots} slots')
    )
  seconds = time.perf_counter() - begin
  say(f'  {agreement}compiled and compared in {seconds:.0f} s; timing')
  measured = []
  for mode, both in compiled.items():
    for form in both.values():
      form.warm_up()
    samples = run_rounds(list(both.values()), rounds)
    measured.append(Measurement(size, mode, both, samples, rows))
  return measured


def _check_agreement(
  size: LayerSize, ours: dict[str, dict[str, CompiledForm]], seed: int
) -> str:
  """Compares backends that compute the same; says how near they are.

  Backends with a capacity are compared on the size that is timed, dropless
  ones with one of them on a batch of which nothing is dropped.

  Raises:
    RunStopped: when two disagree.
  """
  distances = []
  for mode, made in ours.items():
    outputs = {
      name: form.output for name, form in made.items() if not _kind(name)
    }
    if len(outputs) > 1:
      distances.append(forms.check_agreement(mode, size, outputs))
  dropless = [name for name in ours[MODES[0]] if _kind(name)]
  if dropless:
    reference = [name for name in forms.BACKENDS if not _kind(name)][-1]
    small = forms.LayerForms(forms.roomy(size), seed)
    for mode in MODES:
      outputs = {
        name: CompiledForm(small.moe(name)[mode]).output
        for name in (reference, *dropless)
      }
      distances.append(forms.check_agreement(mode, small.size, outputs))
  if not distances:
    return ''
  return f'backends agree within {max(distances):.1g}, '


def _print(output: Output, m: Measurement) -> None:
  rows = []
  for name, form in m.forms.items():
    samples = m.samples[name]
    rows.append(
      (
        name,
        *medians(samples),
        str(m.ratio(name, BATCHED)),
        number(m.ratio(name, BATCHED, 'cpu').median),
        str(m.ratio(name, DENSE)),
        mebibytes(form.temp_bytes),
        number(m.flops_ratio(name)),
      )
    )
  output.table(
    f'{m.mode}: medians of {len(samples)} rounds [quartiles]', _COLUMNS, rows
  )


def _as_json(m: Measurement) -> dict[str, Any]:
  return {
    'size': to_dict(m.size),
    'mode': m.mode,
    'capacity': m.size.capacity,
    'slots': m.size.slots,
    'rows': m.rows,
    'forms': {
      name: {
        **as_json(m.samples[name]),
        'compile_s': form.compile_seconds,
        'temp_bytes': form.temp_bytes,
        'flops': form.flops,
        'ideal_flops': m.ideal(name),
        'over_batched_floor': dataclasses.asdict(m.ratio(name, BATCHED)),
        'over_dense_floor': dataclasses.asdict(m.ratio(name, DENSE)),
      }
      for name, form in m.forms.items()
    },
  }
