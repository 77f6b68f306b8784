"""Pictures of a run: its curves, the load of experts, the health of routers."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullLocator,
)

from st_moe.report.run import Run

# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
GREY = '#666666'
_FEW_POINTS = 30  # up to which single points are marked
_ANNOTATED_EXPERTS = 16  # up to which a cell of the heat map has its number
_LOG_RANGE = 20.0  # a larger span is drawn on a log scale
_PLAIN = FuncFormatter(lambda value, _: f'{value:g}')


def _prepare(axes: Axes, title: str, unit: str) -> None:
  axes.set_title(title, fontsize=11, loc='left', fontweight='bold')
  axes.set_ylabel(unit, fontsize=9)
  axes.tick_params(labelsize=8)
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(color='#e4e4e4', linewidth=0.8)
  axes.set_axisbelow(True)
  _step_axis(axes)


def _step_axis(axes: Axes) -> None:
  axes.set_xlabel('step', fontsize=9)
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  axes.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}')


def _line(axes: Axes, run: Run, name: str, **style: Any) -> bool:
  """Draws a scalar over steps; returns whether there was anything to draw."""
  steps, values = run.column(name)
  if not np.isfinite(values).any():
    return False
  marker = 'o' if len(steps) <= _FEW_POINTS else None
  defaults = {'marker': marker, 'markersize': 3.5, 'linewidth': 1.4}
  axes.plot(steps, values, **(defaults | style))
  return True


def draw_curves(run: Run) -> Figure:
  """Losses, the score against the unigram baseline, rate, gradient norm."""
  figure = Figure(figsize=(11, 7), layout='constrained')
  loss, score, rate, norm = figure.subplots(2, 2).flat
  _prepare(loss, 'Loss', 'nats per target token')
  _line(loss, run, 'loss', color=ORANGE, label='training, with auxiliary terms')
  _line(loss, run, 'cross_entropy', color=BLUE, label='training, cross entropy')
  _line(
    loss, run, 'eval/loss', color=RED, marker='D', linestyle='--',
    label='held-out, cross entropy',
  )  # fmt: skip

  _prepare(score, 'Negative log perplexity, held-out text', 'nats per token')
  values = run.column('eval/neg_log_perplexity')[1]
  label = f'model ({values[-1]:.4f})' if len(values) else 'model'
  _line(
    score, run, 'eval/neg_log_perplexity', color=BLUE, marker='D', label=label
  )
  unigram = run.last('eval/unigram_neg_log_perplexity')
  if unigram is not None:
    score.axhline(
      unigram, color=GREY, linestyle='--', label=f'unigram ({unigram:.4f})'
    )

  _prepare(rate, 'Learning rate', 'learning rate')
  _line(rate, run, 'learning_rate', color=GREEN, marker=None)
  rate.set_ylim(bottom=0)
  _prepare(norm, 'Gradient norm', 'global L2 norm')
  _line(norm, run, 'gradient_norm', color=GREEN, marker=None)
  norms = run.column('gradient_norm')[1]
  norms = norms[np.isfinite(norms) & (norms > 0)]
  if len(norms) and norms.max() > _LOG_RANGE * norms.min():
    norm.set_yscale('log')
    norm.set_ylabel('global L2 norm, log scale', fontsize=9)
    norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norm.yaxis.set_major_formatter(_PLAIN)
    norm.yaxis.set_minor_locator(NullLocator())
  for axes in figure.axes:
    axes.set_xlim(0, 1.02 * run.rows[-1]['step'])
  for axes in (loss, score):
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=8, frameon=False)
    else:
      _say_nothing_there(axes)
  return figure


def _say_nothing_there(axes: Axes) -> None:
  axes.text(
    0.5, 0.5, 'not measured yet', transform=axes.transAxes, ha='center',
    color=GREY,
  )  # fmt: skip


def draw_expert_load(run: Run) -> Figure:
  """Load of every expert: layer by layer at the end, and over time."""
  layers = run.layers()
  loads = {layer: run.load(layer) for layer in layers}
  last = _padded([load[-1] for _, load in loads.values()])
  experts = last.shape[-1]
  highest = max(np.nanmax(load) for _, load in loads.values())
  norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, highest))
  colours = colormaps['PuOr_r']  # purple: idle; orange: overloaded
  heights = [0.42 * len(layers) + 0.2, *[1.0] * len(layers)]
  figure = Figure(
    figsize=(11, sum(heights) + 0.4 * len(heights) + 0.6), layout='constrained'
  )
  axes, *below = figure.subplots(len(heights), 1, height_ratios=heights)
  image = axes.imshow(last, aspect='auto', cmap=colours, norm=norm)
  axes.set_title(
    f'Load per expert at step {loads[layers[0]][0][-1]:,}',
    fontsize=11, loc='left', fontweight='bold',
  )  # fmt: skip
  axes.set_yticks(range(len(layers)), [_layer_title(x) for x in layers])
  axes.set_xlabel('expert', fontsize=9)
  axes.xaxis.set_major_locator(MaxNLocator(min(experts, 16), integer=True))
  axes.tick_params(labelsize=8)
  if experts <= _ANNOTATED_EXPERTS:
    _write_numbers(axes, last, norm)
  for rows, (layer, (steps, load)) in zip(below, loads.items(), strict=True):
    rows.pcolormesh(
      _edges(steps), np.arange(load.shape[-1] + 1) - 0.5, load.T,
      cmap=colours, norm=norm,
    )  # fmt: skip
    rows.set_title(f'{_layer_title(layer)}, over time', fontsize=9, loc='left')
    rows.set_ylabel('expert', fontsize=8)
    rows.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    rows.invert_yaxis()
    rows.tick_params(labelsize=8, labelbottom=rows is below[-1])
  _step_axis(below[-1])
  bar = figure.colorbar(image, ax=[axes, *below], fraction=0.03, pad=0.01)
  bar.set_label('share of assignments, 1 = even', fontsize=9)
  bar.ax.tick_params(labelsize=8)
  return figure


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
  """Stacks rows, which may differ in length, with NaN where there is none."""
  table = np.full((len(rows), max(map(len, rows))), np.nan)
  for i, row in enumerate(rows):
    table[i, : len(row)] = row
  return table


def _edges(steps: np.ndarray) -> np.ndarray:
  """Returns the borders of intervals that end at `steps`."""
  first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
  return np.concatenate([[first], steps])


def _write_numbers(axes: Axes, table: np.ndarray, norm: TwoSlopeNorm) -> None:
  for (row, column), value in np.ndenumerate(table):
    if np.isfinite(value):
      dark = abs(float(norm(value)) - 0.5) > 0.3
      axes.text(
        column, row, f'{value:.2f}', ha='center', va='center', fontsize=8,
        color='white' if dark else 'black',
      )  # fmt: skip


def _layer_title(layer: str) -> str:
  stack, index = layer.split('/')
  return f'{stack} layer {index}'


def draw_router(run: Run) -> Figure:
  """Entropy, dropped tokens and z-loss of every sparse layer over time."""
  figure = Figure(figsize=(12, 4.2), layout='constrained')
  entropy, dropped, z_loss = figure.subplots(1, 3)
  layers = run.layers()
  panels = (
    (entropy, 'entropy', 'Router entropy', 'nats'),
    (dropped, 'fraction_dropped', 'Tokens with no expert', 'percent'),
    (z_loss, 'z_loss', 'Router z-loss, unweighted', 'logsumexp², mean'),
  )
  for axes, name, title, unit in panels:
    _prepare(axes, title, unit)
    for layer, (colour, style) in zip(
      layers, _layer_styles(layers), strict=True
    ):
      _line(
        axes, run, f'router/{layer}/{name}', color=colour, linestyle=style,
        marker=None, label=_layer_title(layer),
      )  # fmt: skip
    axes.set_ylim(bottom=0)
  dropped.yaxis.set_major_formatter(lambda y, _: f'{100 * y:g}')
  experts = run.load(layers[0])[1].shape[-1]
  even = math.log(experts)
  entropy.axhline(even, color=GREY, linestyle=':', linewidth=1)
  entropy.annotate(
    f'uniform over {experts} experts', (0.02, even), xytext=(0, 3),
    xycoords=('axes fraction', 'data'), textcoords='offset points',
    fontsize=8, color=GREY,
  )  # fmt: skip
  entropy.set_ylim(top=1.12 * even)
  handles, labels = entropy.get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside lower center', ncols=min(6, len(labels)),
    fontsize=8, frameon=False,
  )  # fmt: skip
  return figure


def _layer_styles(layers: Sequence[str]) -> list[tuple[Any, str]]:
  """Returns colour and dash: encoders solid blues, decoders dashed oranges."""
  styles = []
  for layer in layers:
    stack = layer.split('/')[0]
    same = [other for other in layers if other.startswith(f'{stack}/')]
    depth = (same.index(layer) + 1) / len(same)
    if stack == 'encoder':
      styles.append((colormaps['Blues'](0.35 + 0.6 * depth), '-'))
    else:
      styles.append((colormaps['Oranges'](0.35 + 0.5 * depth), '--'))
  return styles


# MARK: tasks with answers


def draw_tasks(run: Run) -> Figure:
  """The scores of each task over time, constant answers and the best step."""
  scores = run.development
  panels = [
    (mean['name'], {'score': (mean['scalar'], mean['constant'])})
    for mean in scores['means']
  ]
  for name, task in scores['tasks'].items():
    best = task['majority']
    lines = {
      metric: (
        f'eval/{name}/{metric}',
        None if best is None else best['metrics'][metric],
      )
      for metric in task['metrics']
    }
    panels.append((name, lines))
  columns = min(3, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = Figure(
    figsize=(1 + 3.7 * columns, 0.3 + 2.9 * rows), layout='constrained'
  )
  grid = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes, (title, lines) in zip(grid, panels, strict=False):
    _draw_task(axes, run, title, lines)
  for axes in grid[len(panels) :]:
    axes.set_axis_off()
  return figure


def _draw_task(
  axes: Axes,
  run: Run,
  title: str,
  lines: Mapping[str, tuple[str, float | None]],
) -> None:
  """Draws the metrics of a task.

  Args:
    axes: to draw on.
    run: whose scalars.
    title: of the task.
    lines: for each metric its scalar, and what a constant answer scores.
  """
  _prepare(axes, title, 'from 0 to 100')
  colours = (BLUE, GREEN, ORANGE, RED)
  for i, ((metric, (scalar, constant)), colour) in enumerate(
    zip(lines.items(), itertools.cycle(colours), strict=False)
  ):
    # Later ones are thinner, so that equal ones show below them.
    width = max(1.4, 1.4 * (len(lines) - i))
    _line(axes, run, scalar, color=colour, label=metric, linewidth=width)
    if constant is not None:
      axes.axhline(constant, color=colour, linestyle=':', linewidth=1.2)
  axes.set_ylim(-3, 103)
  axes.set_xlim(0, 1.02 * run.rows[-1]['step'])
  if run.best_step is not None:
    axes.axvline(run.best_step, color=GREY, linewidth=1, alpha=0.6)
    axes.annotate(
      'best', (run.best_step, 1.0), xycoords=('data', 'axes fraction'),
      xytext=(3, -2), textcoords='offset points', fontsize=8, color=GREY,
      va='top',
    )  # fmt: skip
  if lines:
    axes.legend(fontsize=8, frameon=False)
