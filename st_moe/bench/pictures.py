"""The pictures of `st_moe bench`, in the colours of report.py."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from st_moe.bench.forms import BATCHED, DENSE, MODES
from st_moe.bench.timing import Spread
from st_moe.report import BLUE, GREEN, GREY, ORANGE, RED

_COLOURS = (BLUE, ORANGE, GREEN, RED)
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
  names = [*measured[0].backends(), DENSE]
  colours = dict(zip(names, [*_COLOURS, *_COLOURS], strict=False))
  colours[DENSE] = '#b0b0b0'
  sizes = list(dict.fromkeys(m.size for m in measured))
  rows = len(sizes) * (len(names) + 1)
  figure = Figure(figsize=(11, 1.6 + _ROW * rows), layout='constrained')
  panels = figure.subplots(1, len(MODES), sharey=True)
  for axes, mode in zip(panels, MODES, strict=True):
    _prepare(axes, mode, 'time / time of the bare expert matmuls')
    here = [m for m in measured if m.mode == mode]
    for index, m in enumerate(here):
      for at, name in enumerate(names):
        _bar(
          axes, index * (len(names) + 1) + at, m.ratio(name, BATCHED),
          color=colours[name], label=None if index else name,
        )  # fmt: skip
    axes.axvline(1.0, color=GREY, linewidth=1, linestyle='--')
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
  middle = (len(names) - 1) / 2
  panels[0].set_yticks(
    [i * (len(names) + 1) + middle for i in range(len(sizes))],
    [_size_label(size) for size in sizes],
  )
  panels[0].invert_yaxis()
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside lower center', ncols=len(labels),
    fontsize=8, frameon=False,
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
  figure = Figure(figsize=(11, 3.8), layout='constrained')
  time, work = figure.subplots(1, 2)
  seconds = results['step']['wall']['median']
  _prepare(time, f'Time of a step, {1e3 * seconds:,.4g} ms', 'percent')
  _prepare(work, f'Model FLOPs of a step, {total:.3g}', 'percent')
  _shares(time, shares, BLUE)
  _shares(work, {part: n / total for part, n in flops.items()}, GREEN)
  return figure


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


def draw_peers(compared: Sequence[Any]) -> Figure:
  """Every peer's time over ours, for each size and mode.

  Args:
    compared: `peers.Comparison`s; each size has one of each mode.
  """
  names = list(dict.fromkeys(n for c in compared for n in c.samples))[1:]
  colours = dict(zip(names, _COLOURS, strict=False))
  per_mode = {mode: [c for c in compared if c.mode == mode] for mode in MODES}
  rows = sum(len(c.samples) for c in per_mode[MODES[0]])
  figure = Figure(figsize=(11, 1.6 + _ROW * rows), layout='constrained')
  panels = figure.subplots(1, len(MODES), sharey=True)
  labels: dict[str, Any] = {}
  for axes, (mode, here) in zip(panels, per_mode.items(), strict=True):
    _prepare(axes, mode, 'time of the peer / time of ours')
    at, middles = 0, []
    for comparison in here:
      peers = list(comparison.samples)[1:]
      middles.append(at + (len(peers) - 1) / 2)
      for name in peers:
        _bar(axes, at, comparison.ratio(name), color=colours[name])
        labels[name] = axes.patches[-1]
        at += 1
      at += 1  # room between sizes
    axes.axvline(1.0, color=GREY, linewidth=1, linestyle='--')
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_yticks(middles, [_size_label(c.size) for c in here])
  panels[0].invert_yaxis()
  figure.legend(
    labels.values(), labels.keys(), loc='outside lower center',
    ncols=len(labels), fontsize=8, frameon=False,
  )  # fmt: skip
  return figure


def _size_label(size: Any) -> str:
  return (
    f'E {size.num_experts}, top-{size.choices}\n'
    f'{size.groups} x {size.group_size} tokens\n'
    f'd {size.d_model}, f {size.d_ff}'
  )
