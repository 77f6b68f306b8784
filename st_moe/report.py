"""Pictures and a page about a run, drawn from the files it wrote.

Reads `metrics.jsonl`, and `run.json` and `summary.json` where they exist;
writes `report/`: curves, expert load, router health, `index.html`.
"""

import dataclasses
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
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

from st_moe.metrics import read_metrics
from st_moe.workdir import read_json

# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
GREY = '#666666'
_DPI = 130
_FEW_POINTS = 30  # up to which single points are marked
_ANNOTATED_EXPERTS = 16  # up to which a cell of the heat map has its number
_LOG_RANGE = 20.0  # a larger span is drawn on a log scale
_PLAIN = FuncFormatter(lambda value, _: f'{value:g}')


@dataclasses.dataclass(frozen=True)
class Run:
  """What the files of a work directory say.

  Attributes:
    rows: one dict per step, from metrics.jsonl.
    info: run.json, or empty.
    summary: summary.json, or empty.
  """

  rows: list[dict[str, Any]]
  info: dict[str, Any]
  summary: dict[str, Any]

  def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of a scalar; NaN where it was not finite."""
    pairs = [(row['step'], row[name]) for row in self.rows if name in row]
    values = [math.nan if value is None else value for _, value in pairs]
    return np.array([step for step, _ in pairs]), np.array(values, float)

  def last(self, name: str) -> float | None:
    """Returns the last finite value of a scalar, that of the summary first."""
    if name in self.summary:
      return self.summary[name]
    values = self.column(name)[1]
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None

  def layers(self) -> list[str]:
    """Returns 'encoder/3' and so on for every sparse layer, encoder first."""
    found = set()
    for row in self.rows:
      for name in row:
        parts = name.split('/')
        if name.startswith('router/') and len(parts) == 4:
          found.add((parts[1] != 'encoder', parts[1], int(parts[2])))
    return [f'{stack}/{layer}' for _, stack, layer in sorted(found)]

  def load(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps [times] and relative load [times, experts] of a layer.

    The load is the share of an expert as a multiple of an even share.
    """
    name = f'router/{layer}/expert_load'
    steps, loads = [], []
    for row in self.rows:
      if name in row:
        steps.append(row['step'])
        loads.append([math.nan if x is None else x for x in row[name]])
    loads = np.array(loads, float)
    return np.array(steps), loads * loads.shape[-1]


def write_report(workdir: Path) -> Path:
  """Draws the report of a run; returns the page.

  Raises:
    UserError: when `workdir` holds no metrics, or a file that is not JSON.
  """
  workdir = Path(workdir)
  run = Run(
    rows=read_metrics(workdir),
    info=_read_if_there(workdir / 'run.json'),
    summary=_read_if_there(workdir / 'summary.json'),
  )
  directory = workdir / 'report'
  directory.mkdir(exist_ok=True)
  pictures = {'curves.png': draw_curves(run)}
  if run.layers():
    pictures['expert_load.png'] = draw_expert_load(run)
    pictures['router.png'] = draw_router(run)
  for name, figure in pictures.items():
    figure.savefig(directory / name, dpi=_DPI)
  page = directory / 'index.html'
  page.write_text(
    render_page(run, workdir.resolve().name, list(pictures)), encoding='utf-8'
  )
  return page


def _read_if_there(path: Path) -> dict[str, Any]:
  return read_json(path) if path.is_file() else {}


# MARK: pictures


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


# MARK: page

_CAPTIONS = {
  'curves.png': 'Losses, score, learning rate and gradient norm',
  'expert_load.png': 'Which share of the tokens each expert is chosen for',
  'router.png': 'How decided the routers are, what they drop, their logits',
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td { padding: 0.15rem 1.5rem 0.15rem 0; vertical-align: top; }
td:first-child { color: #555; }
img { width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: 0.9rem; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto;
  font-size: 0.85rem; white-space: pre-wrap; }
"""

# Final numbers: label, name, format.
_FINAL = (
  ('training loss', 'loss', '{:.4f}'),
  ('held-out loss, nats per target', 'eval/loss', '{:.4f}'),
  ('held-out negative log perplexity, text', 'eval/neg_log_perplexity',
   '{:.4f}'),
  ('the same of the unigram distribution', 'eval/unigram_neg_log_perplexity',
   '{:.4f}'),
  ('held-out accuracy', 'eval/accuracy', '{:.1%}'),
  ('tokens per second', 'tokens_per_second', '{:,.0f}'),
  ('tokens with no expert', 'router/fraction_dropped', '{:.2%}'),
  ('router entropy, nats', 'router/entropy', '{:.3f}'),
  ('highest expert load, 1 = even', 'router/max_load', '{:.2f}'),
  ('steps skipped (not finite)', 'skipped_steps', '{:.0f}'),
)  # fmt: skip

# The configuration in brief: label and paths in run.json.
_SETTINGS = (
  ('model', ('d_model', 'd_ff', 'num_heads', 'num_encoder_layers',
             'num_decoder_layers', 'num_experts', 'sparse_every')),
  ('optimizer', ('name', 'schedule', 'learning_rate', 'warmup_steps')),
  ('data', ('task', 'vocabulary', 'objective', 'inputs_length',
            'targets_length')),
)  # fmt: skip


def _final_numbers(run: Run) -> list[tuple[str, str]]:
  rows = [('steps', f'{run.rows[-1]["step"]:,}')]
  for label, name, form in _FINAL:
    value = run.last(name)
    if value is not None:
      rows.append((label, form.format(value)))
  return rows


def _settings(run: Run) -> list[tuple[str, str]]:
  rows = []
  if 'parameters' in run.info:
    counts = run.info['parameters']
    rows.append(
      ('parameters', ', '.join(f'{key} {n:,}' for key, n in counts.items()))
    )
  config = run.info.get('config', {})
  for part, names in _SETTINGS:
    values = config.get(part, {})
    known = [f'{name} {values[name]}' for name in names if name in values]
    if known:
      rows.append((part, ', '.join(known)))
  known = [
    f'{name} {config[name]}'
    for name in ('steps', 'batch_size', 'microbatches', 'seed')
    if name in config
  ]
  if known:
    rows.append(('run', ', '.join(known)))
  if 'command' in run.info:
    rows.append(('command', ' '.join(run.info['command'])))
  return rows


def _table(rows: list[tuple[str, str]]) -> str:
  cells = (
    f'<tr><td>{html.escape(label)}</td><td>{html.escape(value)}</td></tr>'
    for label, value in rows
  )
  return '<table>\n' + '\n'.join(cells) + '\n</table>'


def _samples(run: Run) -> str:
  blocks = [
    _table([('text', sample['text']), ('filled', sample['model'])])
    for sample in run.summary.get('samples', [])
  ]
  if not blocks:
    return ''
  return (
    '<h2>Masked sentences, filled by the model</h2>\n'
    '<p>The masked spans stand in brackets: above what was there, below what '
    'the model wrote, - for nothing.</p>\n' + '<hr>\n'.join(blocks)
  )


def render_page(run: Run, title: str, pictures: Sequence[str]) -> str:
  """Returns the HTML of the report, which shows `pictures` beside it."""
  figures = '\n'.join(
    f'<figure><img src="{name}" alt="{_CAPTIONS[name]}">'
    f'<figcaption>{_CAPTIONS[name]}</figcaption></figure>'
    for name in pictures
  )
  parts = [
    '<!DOCTYPE html>',
    '<html lang="en"><head><meta charset="utf-8">',
    f'<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>',
    f'<h1>{html.escape(title)}</h1>',
    '<h2>Final numbers</h2>',
    _table(_final_numbers(run)),
    '<h2>Curves</h2>',
    figures,
    _samples(run),
  ]
  settings = _settings(run)
  if settings:
    full = json.dumps(run.info, indent=2, sort_keys=True)
    parts += [
      '<h2>Configuration</h2>',
      _table(settings),
      f'<details><summary>run.json</summary><pre>{html.escape(full)}</pre>'
      '</details>',
    ]
  return '\n'.join([*parts, '</body></html>', ''])
