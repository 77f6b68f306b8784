"""`st_moe bench layer`: our layer with each backend, against two floors."""

import argparse
import dataclasses
from typing import Any

from st_moe.bench import forms, pictures
from st_moe.bench.forms import BATCHED, DENSE, MODES
from st_moe.bench.results import (
  Output,
  as_json,
  mebibytes,
  milliseconds,
  number,
  open_output,
)
from st_moe.bench.sizes import LayerSize, layer_sizes
from st_moe.bench.timing import CompiledForm, Spread, ratio, run_rounds
from st_moe.config import RunConfig, to_dict

_COLUMNS = (
  'form', 'wall ms', 'cpu ms', '/ batched floor', 'cpu', '/ dense floor',
  'temp MiB', 'FLOPs/ideal',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One size in one mode.

  Attributes:
    size: of the layer.
    mode: 'forward' or 'forward+backward'.
    forms: compiled, by name; both floors first.
    samples: of each form, one per round.
    rows: slots that tokens took.
  """

  size: LayerSize
  mode: str
  forms: dict[str, CompiledForm]
  samples: dict[str, list[Any]]
  rows: int

  def ratio(self, name: str, base: str, clock: str = 'wall') -> Spread:
    """Returns the time of a form over that of another."""
    return ratio(self.samples[name], self.samples[base], clock)

  def ideal(self, name: str) -> float:
    """Returns the FLOPs of the products that a form cannot do without."""
    rows = self.rows if name == DENSE else self.size.slots
    return self.size.matmul_flops(rows, self.mode)

  def flops_ratio(self, name: str) -> float | None:
    """Returns compiled FLOPs over ideal; None where they are not counted."""
    flops = self.forms[name].flops
    return None if flops is None else flops / self.ideal(name)

  def backends(self) -> list[str]:
    """Returns the names of the forms that are no floors."""
    return [name for name in self.forms if name not in (DENSE, BATCHED)]


def run(args: argparse.Namespace, config: RunConfig) -> None:
  """Times every size, prints a table for each, writes JSON and a picture.

  Raises:
    UserError: for sizes or backends that there are not.
    RunStopped: when backends disagree.
  """
  sizes = layer_sizes(args, config.model)
  backends = forms.check_backends(args.backends)
  output = Output(open_output(args.output, 'layer'), 'layer', args.argv)
  measured = []
  for index, size in enumerate(sizes):
    output.say(f'[{index + 1}/{len(sizes)}] {size}')
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
  say: Any = print,
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
  programs = forms.LayerForms(size, seed)
  ours = {
    mode: {name: CompiledForm(programs.moe(name)[mode]) for name in backends}
    for mode in MODES
  }
  distance = max(
    forms.check_agreement(
      mode, size, {name: form.output for name, form in ours[mode].items()}
    )
    for mode in MODES
  )
  rows = forms.active_rows(size, ours[MODES[0]][backends[0]].output)
  floors = (programs.dense_floor(rows), programs.batched_floor())
  compiled = {
    mode: {f[mode].name: CompiledForm(f[mode]) for f in floors} | ours[mode]
    for mode in MODES
  }
  seconds = sum(
    form.compile_seconds for both in compiled.values() for form in both.values()
  )
  agree = f'backends agree within {distance:.1g}, ' if len(ours) > 1 else ''
  say(
    f'  {rows} of {size.slots} slots taken, {agree}compiled in {seconds:.0f} s'
  )
  measured = []
  for mode, both in compiled.items():
    for form in both.values():
      form.warm_up()
    samples = run_rounds(list(both.values()), rounds)
    measured.append(Measurement(size, mode, both, samples, rows))
  return measured


def _print(output: Output, m: Measurement) -> None:
  rows = []
  for name, form in m.forms.items():
    samples = m.samples[name]
    rows.append(
      (
        name,
        milliseconds(Spread.of([s.wall for s in samples]).median),
        milliseconds(Spread.of([s.cpu for s in samples]).median),
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
    'active_rows': m.rows,
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
