"""The pictures of `st_moe bench`, in the colours of report.py."""

import itertools
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from st_moe.bench.forms import BATCHED, DENSE, MODES
from st_moe.bench.timing import Spread
from st_moe.report import BLUE, GREEN, GREY, ORANGE, RED

_COLOURS = (BLUE, ORANGE, GREEN, RED)
_GREYS = ('#8c8c8c', '#c4c4c4')  # of floors
_ROW = 0.26  # inches per bar


def _prepare(axes: Axes, title: str, unit: str) -> None:
  axes.set_title(title, fontsize=11, loc='left', fontweight='bold')
  axes.set_xlabel(unit, fontsize=9)
  axes.tick_params(labelsize=8)
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(color='#e4e4e4', linewidth=0.8, axis='x')
  axes.set_axisbelow(True)


def _bar(axes: Axes, at: float, spread: Spread, **style: Any) -> None:
  """A bar to the median, its quartiles as a line, its value at the end."""
  axes.barh(at, spread.median, height=0.8, **style)
  axes.plot([spread.low, spread.high], [at, at], color='black', linewidth=1)
  axes.annotate(
    f'{spread.median:.2f}', (max(spread.high, spread.median), at),
    xytext=(4, 0), textcoords='offset points', va='center', fontsize=8,
    bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.8},
  )  # fmt: skip


def draw_layer(measured: Sequence[Any]) -> Figure:
  """Time over the batched floor, for each size, mode and form.

  Args:
    measured: `layer.Measurement`s; each size has one of each mode.
  """
  names = list(measured[0].backends())
  colours = dict(zip(names, _COLOURS, strict=False))
  for floor in measured[0].rows:
    if floor.startswith(DENSE):
      names.append(floor)
      colours[floor] = _GREYS[floor != DENSE]
  groups = {
    mode: [
      (m.size, {name: m.ratio(name, BATCHED) for name in names})
      for m in measured
      if m.mode == mode
    ]
    for mode in MODES
  }
  return _grouped_bars(
    groups, colours, 'time / time of the bare expert matmuls'
  )


def draw_peers(compared: Sequence[Any]) -> Figure:
  """Every peer's time over ours, for each size and mode.

  Args:
    compared: `peers.Comparison`s; each size has one of each mode.
  """
  names = list(dict.fromkeys(n for c in compared for n in c.samples))[1:]
  bare = [name for name in names if name.startswith('bare')]
  peers = [name for name in names if name not in bare]
  groups = {
    mode: [
      (c.size, {name: c.ratio(name) for name in list(c.samples)[1:]})
      for c in compared
      if c.mode == mode
    ]
    for mode in MODES
  }
  colours = dict(zip(peers, _COLOURS, strict=False))
  colours |= dict(zip(bare, _GREYS, strict=False))
  return _grouped_bars(groups, colours, 'time of the peer / time of ours')


def _grouped_bars(
  groups: dict[str, list[tuple[Any, dict[str, Spread]]]],
  colours: dict[str, str],
  unit: str,
) -> Figure:
  """One panel for each mode; in it, for each size, a bar for each form."""
  first = next(iter(groups.values()))
  rows = sum(len(bars) + 1 for _, bars in first)
  figure = Figure(figsize=(11, 1.4 + _ROW * rows), layout='constrained')
  panels = figure.subplots(1, len(groups), sharey=True)
  for axes, (mode, here) in zip(panels, groups.items(), strict=True):
    _prepare(axes, mode, unit)
    at, middles = 0, []
    for _, bars in here:
      middles.append(at + (len(bars) - 1) / 2)
      for name, spread in bars.items():
        _bar(axes, at, spread, color=colours[name])
        at += 1
      at += 1  # room between sizes
    axes.axvline(1.0, color=GREY, linewidth=1, linestyle='--')
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_yticks(middles, [_size_label(size) for size, _ in here])
  panels[0].invert_yaxis()
  figure.legend(
    [Patch(color=colour) for colour in colours.values()], list(colours),
    loc='outside lower center', ncols=len(colours), fontsize=8, frameon=False,
  )  # fmt: skip
  return figure


def draw_step(results: dict[str, Any]) -> Figure:
  """Where a step's time goes, and where its model FLOPs are.

  Args:
    results: of `step.run`, as written to results.json.
  """
  shares = results['shares']
  flops = results['model_flops']
  total = sum(flops.values())
  compared = results['compared']
  panels = 3 if compared else 2
  figure = Figure(figsize=(5.5 * panels, 3.8), layout='constrained')
  time, work, *rest = figure.subplots(1, panels)
  seconds = results['step']['wall']['median']
  _prepare(time, f'Time of a step, {1e3 * seconds:,.4g} ms', 'percent')
  _prepare(work, f'Model FLOPs of a step, {total:.3g}', 'percent')
  _shares(time, shares, BLUE)
  _shares(work, {part: n / total for part, n in flops.items()}, GREEN)
  if compared:
    _compared(rest[0], compared)
  return figure


def _compared(axes: Axes, compared: dict[str, dict[str, Any]]) -> None:
  """One bar for each step with other settings, over the one as given."""
  _prepare(
    axes, 'Other settings', 'time of a token / that of the step as given'
  )
  for at, found in enumerate(compared.values()):
    spread = Spread(**found['token_time_over_given'])
    _bar(axes, at, spread, color=ORANGE)
  axes.axvline(1.0, color=GREY, linewidth=1, linestyle='--')
  axes.set_yticks(
    range(len(compared)), [name.replace(' ', '\n') for name in compared]
  )
  axes.margins(x=0.12, y=0.3)
  axes.set_xlim(left=0)
  axes.invert_yaxis()


def _shares(axes: Axes, shares: dict[str, float], colour: str) -> None:
  """One bar for each part, the largest first."""
  shares = dict(sorted(shares.items(), key=lambda item: -item[1]))
  for at, share in enumerate(shares.values()):
    axes.barh(at, 100 * share, height=0.7, color=colour)
    axes.annotate(
      f'{100 * share:.1f}', (100 * share, at), xytext=(4, 0),
      textcoords='offset points', va='center', fontsize=8,
    )  # fmt: skip
  axes.set_yticks(range(len(shares)), list(shares))
  axes.margins(x=0.12)
  axes.set_xlim(left=0)
  axes.invert_yaxis()


def draw_generation(measured: Sequence[Any]) -> Figure:
  """Tokens a second by the number of inputs, a line for each method.

  Args:
    measured: `generate.Measured`s.
  """
  figure = Figure(figsize=(7, 4.2), layout='constrained')
  axes = figure.subplots()
  _prepare(axes, 'Generation', 'inputs at a time')
  axes.set_ylabel('tokens a second', fontsize=9)
  axes.grid(color='#e4e4e4', linewidth=0.8)
  methods: dict[int, list[Any]] = {}
  for one in sorted(measured, key=lambda one: one.form.batch_size):
    methods.setdefault(one.form.num_beams, []).append(one)
  for (beams, line), colour in zip(
    methods.items(), itertools.cycle(_COLOURS), strict=False
  ):
    speeds = [one.tokens_per_second for one in line]
    middle = [speed.median for speed in speeds]
    axes.errorbar(
      [one.form.batch_size for one in line], middle,
      yerr=[
        [speed.median - speed.low for speed in speeds],
        [speed.high - speed.median for speed in speeds],
      ],
      marker='o', color=colour, capsize=3,
      label='greedy' if beams == 1 else f'{beams} beams',
    )  # fmt: skip
  sizes = sorted({one.form.batch_size for one in measured})
  axes.set_xscale('log', base=2)
  axes.set_xticks(sizes, list(map(str, sizes)))
  axes.set_ylim(bottom=0)
  axes.legend(fontsize=8, frameon=False)
  return figure


def _size_label(size: Any) -> str:
  return (
    f'E {size.num_experts}, top-{size.choices}\n'
    f'{size.groups} x {size.group_size} tokens\n'
    f'd {size.d_model}, f {size.d_ff}'
  )
