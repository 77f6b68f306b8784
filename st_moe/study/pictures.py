"""Pictures of a study: arms beside the paper's, verdicts, curves."""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullFormatter,
)

from st_moe.report import BLUE, GREEN, GREY, ORANGE, RED

_FEW_POINTS = 30  # of a curve, which are marked
_COLOURS = {'agrees': GREEN, 'disagrees': RED}  # others are grey

CAPTIONS = {
  'arms.png': 'Each arm: runs, mean and 95% interval, and the paper',
  'claims.png': 'The claims: estimates with 95% intervals',
  'curves.png': 'Training: cross entropy and router z-loss, means over seeds',
}


def draw(summary: dict[str, Any]) -> dict[str, Figure]:
  """Returns the pictures for which there are numbers, by file name."""
  drawn = {}
  if any(arm['values'] for arm in summary['arms']):
    drawn['arms.png'] = _draw_arms(summary)
  if any(claim['low'] is not None for claim in summary['claims']):
    drawn['claims.png'] = _draw_claims(summary)
  if any(arm['curve'] for arm in summary['arms']):
    drawn['curves.png'] = _draw_curves(summary)
  return drawn


def _prepare(axes: Axes, title: str, label: str) -> None:
  axes.set_title(title, fontsize=11, loc='left', fontweight='bold')
  axes.set_xlabel(label, fontsize=9)
  axes.tick_params(labelsize=8)
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(color='#e4e4e4', linewidth=0.8)
  axes.set_axisbelow(True)


def _draw_arms(summary: dict[str, Any]) -> Figure:
  arms = summary['arms']
  papers = [arm['paper']['value'] for arm in arms]
  panels = 2 if any(value is not None for value in papers) else 1
  figure = Figure(figsize=(11, 1.4 + 0.32 * len(arms)), layout='constrained')
  ours, *theirs = np.atleast_1d(figure.subplots(1, panels, sharey=True))
  _prepare(ours, f'Here, scale {summary["scale"]}', summary['metric']['label'])
  for row, arm in enumerate(arms):
    values = [*arm['values'].values()]
    ours.plot(values, [row] * len(values), 'o', color=BLUE, alpha=0.4, ms=4)
    if arm['low'] is not None:
      ours.plot([arm['low'], arm['high']], [row, row], color=BLUE, lw=1.5)
    if arm['mean'] is not None:
      ours.plot([arm['mean']], [row], '|', color=BLUE, ms=12, mew=2)
  ours.set_yticks(range(len(arms)), [arm['name'] for arm in arms])
  ours.set_ylim(len(arms) - 0.5, -0.5)
  if theirs:
    _prepare(theirs[0], f'The paper, {summary["paper"]}', 'as printed')
    for row, arm in enumerate(arms):
      paper = arm['paper']
      if paper['value'] is not None:
        theirs[0].errorbar(
          paper['value'], row, xerr=paper['sd'], fmt='D', color=ORANGE, ms=5
        )
  return figure


def _draw_claims(summary: dict[str, Any]) -> Figure:
  """One row a claim; claims of other metrics in panels of their own."""
  metrics = list(dict.fromkeys(claim['metric'] for claim in summary['claims']))
  groups = [
    [claim for claim in summary['claims'] if claim['metric'] == metric]
    for metric in metrics
  ]
  heights = [len(group) + 1.2 for group in groups]
  figure = Figure(figsize=(11, 0.6 + 0.42 * sum(heights)), layout='constrained')
  panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)
  for axes, group in zip(panels[:, 0], groups, strict=True):
    _prepare(axes, '', group[0]['label'])
    axes.axvline(0, color=GREY, lw=1)
    for row, claim in enumerate(group):
      colour = _COLOURS.get(claim['verdict'], GREY)
      if claim['estimate'] is not None:
        axes.plot([claim['estimate']], [row], 'o', color=colour, ms=6)
      if claim['low'] is not None:
        axes.plot([claim['low'], claim['high']], [row, row], color=colour, lw=2)
      if claim['paper'] is not None:
        axes.plot([claim['paper']], [row], 'D', color=ORANGE, ms=5)
    axes.set_yticks(
      range(len(group)),
      [f'{claim["text"]}: {claim["verdict"]}' for claim in group],
    )
    axes.set_ylim(len(group) - 0.5, -0.5)
  handles = [
    panels[0, 0].plot([], [], marker, color=colour, label=label)[0]
    for marker, colour, label in (
      ('o-', GREEN, 'agrees'),
      ('o-', RED, 'disagrees'),
      ('o-', GREY, 'not resolved'),
      ('D', ORANGE, 'the paper'),
    )
  ]
  figure.legend(
    handles=handles, loc='outside lower center', ncols=4, fontsize=8,
    frameon=False,
  )  # fmt: skip
  return figure


def _draw_curves(summary: dict[str, Any]) -> Figure:
  figure = Figure(figsize=(11, 4.6), layout='constrained')
  loss, z_loss = figure.subplots(1, 2)
  _prepare(loss, 'Cross entropy in training', 'step')
  loss.set_ylabel('nats per target token', fontsize=9)
  _prepare(z_loss, 'Router z-loss, unweighted', 'step')
  z_loss.set_ylabel('logsumexp², mean over sparse layers', fontsize=9)
  z_loss.set_yscale('log')
  for axes in (loss, z_loss):
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}')
  colours = colormaps['turbo'](np.linspace(0.05, 0.95, len(summary['arms'])))
  for arm, colour in zip(summary['arms'], colours, strict=True):
    curve = arm['curve']
    for axes, name in ((loss, 'cross_entropy'), (z_loss, 'router_z_loss')):
      if curve:
        values = np.array(curve[name], float)  # None becomes NaN
        axes.plot(
          curve['step'],
          values,
          color=colour,
          lw=1.2,
          label=arm['name'],
          marker='o' if len(values) <= _FEW_POINTS else None,
          ms=3,
        )
  _plain_log_ticks(z_loss)
  handles, labels = loss.get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside lower center', ncols=6, fontsize=7,
    frameon=False,
  )  # fmt: skip
  return figure


def _plain_log_ticks(axes: Axes) -> None:
  """Writes the ticks of a log scale as plain numbers, some at any span."""
  plain = FuncFormatter(lambda value, _: f'{value:.6g}')
  low, high = axes.get_ylim()
  if high < 10 * low:  # less than a decade: a log locator may find no tick
    axes.yaxis.set_major_locator(MaxNLocator(6))
  else:
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
  axes.yaxis.set_major_formatter(plain)
  axes.yaxis.set_minor_formatter(NullFormatter())
