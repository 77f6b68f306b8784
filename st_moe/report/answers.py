"""The part of the page about tasks with answers: scores, labels, mistakes."""

import html
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from st_moe.report.run import Run

_MOST_LABELS = 8  # of a table of right and given labels
_MISTAKES = 3  # shown of each task
_SHOWN_CHARACTERS = 600  # of an input
_SHOWN_ANSWER = 200  # characters of an output

STYLE = """
h3 { font-size: 1rem; margin: 1.4rem 0 0.5rem; }
.scores td, .scores th { padding: 0.25rem 1.2rem 0.25rem 0; text-align: right;
  font-variant-numeric: tabular-nums; vertical-align: middle; }
.scores th { color: #555; font-weight: normal; font-size: 0.85rem; }
.scores td:nth-child(-n+2), .scores th:nth-child(-n+2) { text-align: left; }
.scores td:first-child { color: #222; font-weight: 600; }
.scores tr.first td { border-top: 1px solid #e4e4e4; }
.scores tr.mean td { border-top: 2px solid #ccc; font-weight: 600; }
.bar { position: relative; width: 11rem; height: 0.7rem; background: #eee;
  border-radius: 2px; }
.bar i { display: block; height: 100%; background: #0072B2;
  border-radius: 2px; }
.bar b { position: absolute; top: -0.2rem; bottom: -0.2rem; width: 2px;
  background: #D55E00; }
.up { color: #00715a; } .down { color: #a34700; }
.matrices { display: flex; flex-wrap: wrap; gap: 1rem 3rem; }
.matrix td, .matrix th { padding: 0.35rem 0.5rem; text-align: center;
  vertical-align: middle; font-weight: normal; font-size: 0.85rem;
  border: 2px solid white; box-sizing: border-box; height: 2.1rem; }
.matrix th + th, .matrix td { width: 7.6rem; min-width: 7.6rem;
  max-width: 7.6rem; overflow-wrap: anywhere; }
.matrix th { color: #555; } .matrix th:first-child { text-align: right; }
.matrix caption { text-align: left; font-weight: 600; padding-bottom: 0.3rem; }
.mistake { border-left: 3px solid #ddd; padding: 0.1rem 0 0.1rem 1rem;
  margin: 0.9rem 0; }
.mistake p { margin: 0.2rem 0; } .mistake .asked { color: #444;
  font-size: 0.9rem; white-space: pre-wrap; }
.tag { color: #777; font-size: 0.8rem; margin-right: 0.5rem; }
"""


def render(run: Run) -> str:
  """Returns the HTML about the best step's answers, '' without tasks."""
  scores = run.development
  if not scores:
    return ''
  parts = [
    '<h2>Development scores</h2>',
    f'<p>{_introduction(run, scores)}</p>',
    _score_table(run, scores),
  ]
  answers = {name: list(_answers(run, name)) for name in scores['tasks']}
  matrices = [
    _matrix(name, task['labels'], answers[name])
    for name, task in scores['tasks'].items()
    if answers[name] and 1 < len(task['labels']) <= _MOST_LABELS
  ]
  if matrices:
    parts += [
      '<h2>Right labels and given ones</h2>',
      f'<p>At step {scores["step"]:,}: a row for each right label, a column '
      'for each that the model gave; darker is a larger share of its row.</p>',
      f'<div class="matrices">{"".join(matrices)}</div>',
    ]
  mistakes = ''.join(
    _mistakes(name, rows, run.seen_of) for name, rows in answers.items()
  )
  if mistakes:
    parts += ['<h2>Some mistakes</h2>', mistakes]
  return '\n'.join(parts)


def _introduction(run: Run, scores: dict[str, Any]) -> str:
  best = run.summary.get('best')
  which = f'Step {scores["step"]:,}'
  if best:
    which += (
      f', the best by <code>{html.escape(best["metric"])}</code> '
      f'({best["value"]:.4g})'
    )
  if _best_is_last(run, scores):
    text = f'{which}, and the last.'
  else:
    text = f'{which}, and step {_last_step(run):,}, the last.'
  text += (
    ' Scores go from 0 to 100; the mark is that of the best constant answer.'
  )
  stopped = run.summary.get('stopped_early')
  if stopped:
    text += f' The run stopped early: {html.escape(stopped["why"])}.'
  return text


def _last_step(run: Run) -> int:
  return run.summary.get('step', run.rows[-1]['step'])


def _best_is_last(run: Run, scores: dict[str, Any]) -> bool:
  return scores['step'] == _last_step(run)


def _score_table(run: Run, scores: dict[str, Any]) -> str:
  with_last = not _best_is_last(run, scores)

  def last_of(scalar: str) -> float | None:
    values = run.column(scalar)[1]
    return values[-1] if with_last and len(values) else None

  rows = []
  for name, task in scores['tasks'].items():
    shown, constant = name, task['majority']
    for metric, value in task['metrics'].items():
      bar = None if constant is None else constant['metrics'][metric]
      rows.append(
        _score_row(
          [shown, metric],
          value,
          last_of(f'eval/{name}/{metric}'),
          bar,
          kind='first' if shown else '',
          with_last=with_last,
        )
      )
      shown = ''
  for mean in scores['means']:
    rows.append(
      _score_row(
        [mean['name'], f'mean of {mean["tasks"]}'],
        mean['score'],
        last_of(mean['scalar']),
        mean['constant'],
        kind='mean',
        with_last=with_last,
      )
    )
  heads = ['task', 'metric', 'best step', '']
  heads += ['last step'] if with_last else []
  heads += ['constant', 'best - constant']
  head = ''.join(f'<th>{text}</th>' for text in heads)
  return (
    f'<table class="scores"><tr>{head}</tr>\n' + '\n'.join(rows) + '</table>'
  )


def _score_row(
  names: Sequence[str],
  value: float,
  last: float | None,
  constant: float | None,
  *,
  kind: str,
  with_last: bool,
) -> str:
  width = min(max(value, 0.0), 100.0)
  mark = difference = shown = ''
  if constant is not None:
    place = min(max(constant, 0.0), 100.0)
    mark = f'<b style="left:{place:.1f}%"></b>'
    shown = f'{constant:.2f}'
    way = 'up' if value >= constant else 'down'
    difference = f'<span class="{way}">{value - constant:+.2f}</span>'
  cells = [
    *(html.escape(name) for name in names),
    f'{value:.2f}',
    f'<div class="bar"><i style="width:{width:.1f}%"></i>{mark}</div>',
    *(['' if last is None else f'{last:.2f}'] if with_last else []),
    shown,
    difference,
  ]
  inner = ''.join(f'<td>{cell}</td>' for cell in cells)
  return f'<tr class="{kind}">{inner}</tr>'


def _answers(run: Run, name: str) -> Iterator[dict[str, Any]]:
  """Yields what the best step answered to each example of a task."""
  path = run.answers_folder / f'{name}.jsonl'
  if path.is_file():
    with path.open(encoding='utf-8') as file:
      yield from map(json.loads, file)


def _matrix(
  name: str, labels: Sequence[str], answers: Sequence[dict[str, Any]]
) -> str:
  """Returns a table of right labels (rows) and given ones (columns)."""
  counts = [[0] * (len(labels) + 1) for _ in labels]
  for row in answers:
    counts[row['label']][row['answer']] += 1  # -1, the last: no label
  columns = list(labels)
  if any(row[-1] for row in counts):
    columns.append('no label')
  head = ''.join(f'<th>{html.escape(label)}</th>' for label in columns)
  rows = []
  for index, (label, row) in enumerate(zip(labels, counts, strict=True)):
    cells = []
    for column in range(len(columns)):
      share = row[column] / max(sum(row), 1)
      colour = '0, 114, 178' if column == index else '213, 94, 0'
      ink = 'white' if share > 0.6 else '#222'
      cells.append(
        f'<td style="background:rgba({colour},{0.04 + 0.9 * share:.2f});'
        f'color:{ink}">{row[column]:,}</td>'
      )
    rows.append(f'<tr><th>{html.escape(label)}</th>{"".join(cells)}</tr>')
  return (
    f'<table class="matrix"><caption>{html.escape(name)}</caption>'
    f'<tr><th></th>{head}</tr>{"".join(rows)}</table>'
  )


def _mistakes(
  name: str,
  answers: Sequence[dict[str, Any]],
  seen_of: Callable[[str], tuple[int, int] | None],
) -> str:
  """Returns some wrong answers of a task, from all over its examples.

  Args:
    name: of the task.
    answers: to all its examples.
    seen_of: see `Run.seen_of`.
  """
  wrong = [
    row for row in answers if row['score'] is not None and row['score'] < 100
  ]
  if not wrong:
    return ''
  apart = max(1, len(wrong) // _MISTAKES)
  blocks = [
    '<div class="mistake">'
    f'<p class="asked">{_short(row["inputs"], _SHOWN_CHARACTERS)}'
    f'{_cut(seen_of(row["inputs"]))}</p>'
    f'<p><span class="tag">right</span>{_short(row["targets"])} '
    f'&emsp;<span class="tag">model</span>{_short(row["prediction"]) or "-"}'
    '</p></div>'
    for row in wrong[::apart][:_MISTAKES]
  ]
  return (
    f'<h3>{html.escape(name)}: {len(wrong):,} of {len(answers):,}</h3>\n'
    + '\n'.join(blocks)
  )


def _cut(seen: tuple[int, int] | None) -> str:
  """Returns how much of an input the model saw, '' where it saw all."""
  if seen is None or seen[0] >= seen[1]:
    return ''
  return (
    f' <span class="tag">(the model saw the first {seen[0]:,} of '
    f'{seen[1]:,} tokens)</span>'
  )


def _short(text: str, most: int = _SHOWN_ANSWER) -> str:
  text = ' '.join(text.split())
  if len(text) > most:
    text = text[: most - 4] + ' ...'
  return html.escape(text)
