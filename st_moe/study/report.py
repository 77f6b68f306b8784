"""The report of a study: JSON, markdown, a page, and pictures.

`DIR/report/` gets report.json, report.md and index.html, which stand by
themselves together with the pictures beside them.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from st_moe.study import pictures, results
from st_moe.study.declaration import find_study
from st_moe.study.summary import summarize
from st_moe.workdir import write_json

_NONE = '-'  # a cell without a value
_NAMED_ARMS = 8  # of a contrast, up to which all are named


def write_report(directory: Path) -> tuple[Path, dict[str, Any]]:
  """Reads the results of a study and writes its report.

  Returns:
    The page, and what report.json holds.

  Raises:
    UserError: the folder holds no study, or a file that is broken.
  """
  record = results.read_record(directory)
  study = find_study(record['study'])
  summary = summarize(study, record, results.read_results(directory))
  folder = directory / 'report'
  folder.mkdir(exist_ok=True)
  drawn = pictures.draw(summary)
  for name, figure in drawn.items():
    figure.savefig(folder / name, dpi=130)
  write_json(folder / 'report.json', summary)
  (folder / 'report.md').write_text(
    markdown(summary, list(drawn)), encoding='utf-8'
  )
  page = folder / 'index.html'
  page.write_text(web_page(summary, list(drawn)), encoding='utf-8')
  return page, summary


# MARK: tables, as texts


def _number(value: float | None, digits: int, sign: bool = False) -> str:
  if value is None:
    return _NONE
  return f'{value:+.{digits}f}' if sign else f'{value:.{digits}f}'


def _interval(row: dict[str, Any], digits: int, sign: bool = True) -> str:
  if row['low'] is None:
    return _NONE
  low, high = (_number(row[end], digits, sign) for end in ('low', 'high'))
  return f'{low} to {high}'


def _share(stable: int, runs: int) -> str:
  return f'{stable}/{runs}' if runs else _NONE


def arms_table(summary: dict[str, Any]) -> list[list[str]]:
  """Returns header and rows: what each arm came to, and the paper's number."""
  digits = summary['metric']['digits']
  rows = [
    ['arm', 'mean', 'sd', 'stable', 'paper', "paper's sd", "paper's stable"]
  ]
  for arm in summary['arms']:
    paper = arm['paper']
    rows.append(
      [
        arm['name'],
        _number(arm['mean'], digits),
        _number(arm['sd'], digits),
        _share(arm['stable_runs'], arm['runs']),
        _number(paper['value'], 3),
        _number(paper['sd'], 2),
        _share(*paper['stable']) if paper['stable'] else _NONE,
      ]
    )
  return rows


def differences_table(summary: dict[str, Any]) -> list[list[str]]:
  """Returns header and rows: each arm minus the reference."""
  digits = summary['metric']['digits']
  rows = [['arm', 'difference', '95% interval', 'seeds', 'paper']]
  for row in summary['differences']:
    rows.append(
      [
        row['arm'],
        _number(row['estimate'], digits, True),
        _interval(row, digits),
        f'{row["seeds"]} {row["method"]}',
        _number(row['paper'], 3, True),
      ]
    )
  return rows


def contrast_text(claim: dict[str, Any]) -> str:
  """Returns 'top2 - top1', '0.5 a + 0.5 b - c', or how many are averaged."""
  if len(claim['contrast']) > _NAMED_ARMS:
    signs = [weight > 0 for weight in claim['contrast'].values()]
    return f'mean of {signs.count(True)} arms - mean of {signs.count(False)}'
  words = []
  for arm, weight in claim['contrast'].items():
    sign = '-' if weight < 0 else '+'
    size = abs(weight)
    factor = '' if size == 1 else f'{size:.3g} '
    words.append(f'{sign} {factor}{arm}')
  return ' '.join(words).removeprefix('+ ')


def claims_table(summary: dict[str, Any]) -> list[list[str]]:
  """Returns header and rows: claims of the paper, and what became of them."""
  rows = [
    ['claim', 'judged by', 'estimate', '95% interval', 'paper', 'verdict']
  ]
  for claim in summary['claims']:
    margin = f'{claim["margin"]:g}'
    expects = {
      'above': 'above 0',
      'not_below': f'above -{margin}',
      'within': f'within {margin} of 0',
    }[claim['expects']]
    why = f' ({claim["why"]})' if claim['why'] else ''
    other = claim['metric'] != summary['metric']['name']
    metric = f' in {claim["label"]}' if other else ''
    rows.append(
      [
        claim['text'],
        f'{contrast_text(claim)} {expects}{metric}',
        _number(claim['estimate'], claim['digits'], True),
        _interval(claim, claim['digits']),
        _number(claim['paper'], 3, True),
        f'{claim["verdict"]}{why}',
      ]
    )
  return rows


def _head(summary: dict[str, Any]) -> list[str]:
  """Returns sentences about the whole."""
  seeds = ', '.join(map(str, summary['seeds'])) or 'none yet'
  word = 'seed' if len(summary['seeds']) == 1 else 'seeds'
  head = [
    f'Stands for {summary["paper"]}. {summary["setting"]}'.strip(),
    f'Scale {summary["scale"]}, {word} {seeds}. Compared is the '
    f'{summary["metric"]["label"]}.',
    *(f'On {maker}.' for maker in summary['made_by']),
  ]
  return [*head, *(f'Warning: {text}.' for text in summary['warnings'])]


_METHOD = (
  'Differences are between runs of one seed, which begin alike and read the '
  "same batches, with Student's 95% interval over seeds; where arms share no "
  "seeds, Welch's; of shares of stable runs, Newcombe's. Intervals are not "
  'adjusted for the number of claims. The paper trained far larger models for '
  'longer: signs may be compared, sizes not.'
)


# MARK: markdown


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
  header, *body = ([cell.replace('|', '\\|') for cell in row] for row in rows)
  lines = [header, ['---', *['---:'] * (len(header) - 1)], *body]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def markdown(summary: dict[str, Any], drawn: Sequence[str]) -> str:
  """Returns report.md."""
  parts = [f'# {summary["title"]}', *_head(summary)]
  parts += [f'```bash\n{summary["command"]}\n```']
  parts += ['## Verdicts', _markdown_table(claims_table(summary))]
  parts += ['## Arms', _markdown_table(arms_table(summary))]
  if summary['differences']:
    parts += [
      f'## Differences to {summary["reference"]}',
      _markdown_table(differences_table(summary)),
    ]
  parts += [f'![{pictures.CAPTIONS[name]}]({name})' for name in drawn]
  if unstable := _unstable(summary):
    parts += ['## Unstable runs', '\n'.join(f'- {line}' for line in unstable)]
  parts += ['## How it is judged', _METHOD, summary['stability']]
  if summary['notes']:
    parts += ['## Notes', '\n'.join(f'- {note}' for note in summary['notes'])]
  return '\n\n'.join(parts) + '\n'


def _unstable(summary: dict[str, Any]) -> list[str]:
  return [
    f'{arm["name"]}, seed {seed}: {why}'
    for arm in summary['arms']
    for seed, why in arm['unstable'].items()
  ]


# MARK: page

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto;
  max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
th { text-align: left; border-bottom: 1px solid #999; }
td, th { padding: 0.2rem 1rem 0.2rem 0; vertical-align: top; }
.agrees { color: #00664b; font-weight: 600; }
.disagrees { color: #a04000; font-weight: 600; }
img { width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: 0.9rem; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; }
"""


def _web_table(rows: Sequence[Sequence[str]]) -> str:
  header, *body = rows
  lines = [''.join(f'<th>{html.escape(cell)}</th>' for cell in header)]
  for row in body:
    cells = []
    for cell in row:
      known = cell if cell in ('agrees', 'disagrees') else ''
      kind = f' class="{known}"' if known else ''
      cells.append(f'<td{kind}>{html.escape(cell)}</td>')
    lines.append(''.join(cells))
  return (
    '<table>\n' + '\n'.join(f'<tr>{line}</tr>' for line in lines) + '\n</table>'
  )


def web_page(summary: dict[str, Any], drawn: Sequence[str]) -> str:
  """Returns index.html, which shows the pictures beside it."""

  def paragraphs(texts: Sequence[str]) -> str:
    return '\n'.join(f'<p>{html.escape(text)}</p>' for text in texts)

  def items(texts: Sequence[str]) -> str:
    lines = '\n'.join(f'<li>{html.escape(text)}</li>' for text in texts)
    return f'<ul>{lines}</ul>'

  title = html.escape(summary['title'])
  parts = [
    '<!DOCTYPE html>',
    '<html lang="en"><head><meta charset="utf-8">',
    f'<title>{title}</title><style>{_STYLE}</style></head><body>',
    f'<h1>{title}</h1>',
    paragraphs(_head(summary)),
    f'<pre>{html.escape(summary["command"])}</pre>',
    '<h2>Verdicts</h2>',
    _web_table(claims_table(summary)),
    '<h2>Arms</h2>',
    _web_table(arms_table(summary)),
  ]
  if summary['differences']:
    parts += [
      f'<h2>Differences to {html.escape(summary["reference"])}</h2>',
      _web_table(differences_table(summary)),
    ]
  parts += [
    f'<figure><img src="{name}" alt="{pictures.CAPTIONS[name]}">'
    f'<figcaption>{pictures.CAPTIONS[name]}</figcaption></figure>'
    for name in drawn
  ]
  if unstable := _unstable(summary):
    parts += ['<h2>Unstable runs</h2>', items(unstable)]
  parts += [
    '<h2>How it is judged</h2>',
    paragraphs([_METHOD, summary['stability']]),
  ]
  if summary['notes']:
    parts += ['<h2>Notes</h2>', items(summary['notes'])]
  return '\n'.join([*parts, '</body></html>', ''])
