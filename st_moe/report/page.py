"""The page about a run: one HTML file that needs nothing beside it."""

import base64
import html
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from st_moe.data.downstream.catalog import is_answer_task, split_names
from st_moe.report import answers
from st_moe.report.run import Run

_CAPTIONS = {
  'tasks.png': 'Scores on development sets; dotted: the best constant answer',
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
td:nth-child(2):last-child { overflow-wrap: anywhere; }
img { width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: 0.9rem; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto;
  font-size: 0.85rem; }
.command { overflow-x: auto; } .command span { white-space: nowrap; }
"""

# A picture of so many pixels is as wide as the page, which is so many rem.
_FULL_PIXELS, _PAGE_REM = 1430, 60.0

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
    values = _in_force(part, config)
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
  return rows


def _in_force(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of a part, without those that nothing looks at."""
  values = dict(config.get(part, {}))
  if part == 'model' and values.get('num_experts') == 0:
    values.pop('sparse_every', None)
  if part == 'optimizer' and values.get('schedule') == 'constant':
    values.pop('warmup_steps', None)
  if part == 'data':
    names = split_names(str(values.get('task', '')))
    if all(map(is_answer_task, names)):
      values.pop('objective', None)
    if values.get('vocabulary') == 'auto' and config.get('initial_checkpoint'):
      own = 'cache' in names  # which has its own, whatever the weights have
      values['vocabulary'] = 'of the cache' if own else 'of the weights'
  return values


def _commands(info: Mapping[str, Any]) -> str:
  """Returns what began the run, and what it last went on with."""
  starts = [*info.get('restarts', []), info]
  given = [start['command'] for start in starts if start.get('command')]
  if not given:
    return ''
  text = f'<p>Command:</p>\n{_command(given[0])}'
  if given[-1] != given[0]:
    text += f'\n<p>Last gone on with:</p>\n{_command(given[-1])}'
  return text


def _command(words: Sequence[str]) -> str:
  """Returns a command that is broken between its words only."""
  words = [Path(words[0]).name, *words[1:]]
  spans = (f'<span>{html.escape(shlex.quote(word))}</span>' for word in words)
  text = f'<code>{" ".join(spans)}</code>'
  return f'<p class="command">{text}</p>'


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


def _figure(name: str, content: bytes) -> str:
  """Returns a picture that is part of the page, all at one scale."""
  data = base64.b64encode(content).decode()
  pixels = int.from_bytes(content[16:20], 'big')  # the width in a PNG's header
  widest = min(_PAGE_REM, _PAGE_REM * pixels / _FULL_PIXELS)
  return (
    f'<figure><img src="data:image/png;base64,{data}" alt="{_CAPTIONS[name]}" '
    f'style="max-width:{widest:.1f}rem">'
    f'<figcaption>{_CAPTIONS[name]}</figcaption></figure>'
  )


def render_page(run: Run, title: str, pictures: Mapping[str, bytes]) -> str:
  """Returns the HTML of the report.

  Args:
    run: which.
    title: of the page.
    pictures: PNG files by name, in order; they become part of the page.
  """
  style = _STYLE + (answers.STYLE if run.development else '')
  figures = {name: _figure(name, data) for name, data in pictures.items()}
  parts = [
    '<!DOCTYPE html>',
    '<html lang="en"><head><meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width">',
    f'<title>{html.escape(title)}</title><style>{style}</style></head><body>',
    f'<h1>{html.escape(title)}</h1>',
  ]
  if run.development:
    first = figures.pop('tasks.png', '')
    about = answers.render(run)
    parts.append(about.replace('</table>', f'</table>\n{first}', 1))
  parts += [
    '<h2>Final numbers</h2>',
    _table(_final_numbers(run)),
    '<h2>Curves</h2>',
    *figures.values(),
    _samples(run),
  ]
  settings = _settings(run)
  if settings:
    full = json.dumps(run.info, indent=2, sort_keys=True)
    parts += [
      '<h2>Configuration</h2>',
      _table(settings),
      _commands(run.info),
      f'<details><summary>run.json</summary><pre>{html.escape(full)}</pre>'
      '</details>',
    ]
  return '\n'.join([*parts, '</body></html>', ''])
