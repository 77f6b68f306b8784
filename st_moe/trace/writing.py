"""What `st_moe trace` leaves: trace.json, trace.md, trace.html, a short table.

The page is page.html with trace.json inside: it works from disk, without a
network, and shows the numbers of the JSON because it has no others.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from st_moe.stacking import STACKS
from st_moe.tables import print_table
from st_moe.trace import statistics
from st_moe.trace.words import SPACE
from st_moe.workdir import write_json

# Columns of the table in the terminal that other numbers take, and its width
# in a pipe.
_NUMBERS, _PIPE = 54, 130
_PAGE = Path(__file__).with_name('page.html')
RULE = {
  'lift': statistics.LIFT,
  'part': statistics.PART,
  'taken': statistics.TAKEN,
}

# Table 14 of the paper: ST-MoE-L, 32 experts, six sparse layers a stack.
_PAPER = {
  'encoder': (2.2, 1.8, 1.6, 1.7, 1.7, 1.2),
  'decoder': (3.4, 3.4, 3.4, 3.4, 3.4, 3.4),
}
_PAPER_UNIFORM = 3.5


def write(output: Path, trace: Mapping[str, Any]) -> None:
  """Writes the three files into an existing folder."""
  write_json(output / 'trace.json', trace)
  (output / 'trace.md').write_text(markdown(trace), encoding='utf-8')
  (output / 'trace.html').write_text(page(trace), encoding='utf-8')


def page(trace: Mapping[str, Any]) -> str:
  """Returns the page, self-contained."""
  # Nothing in the text may end the element it stands in.
  data = json.dumps(trace, sort_keys=True).replace('<', '\\u003c')
  return _PAGE.read_text(encoding='utf-8').replace('@DATA@', data)


def print_summary(trace: Mapping[str, Any], console: Console) -> None:
  """Prints one line for each sparse layer."""
  rows = []
  room = (console.width if console.is_terminal else _PIPE) - _NUMBERS
  for stack, numbers in _stacks(trace):
    for layer in numbers['layers']:
      named = [
        f'{expert["expert"]}: {kind}'
        for expert in layer['experts']
        for kind in expert['specialised']
      ]
      rows.append(
        (
          f'{stack} {layer["layer"]}',
          _nats(layer['entropy']['sentinels']),
          _nats(layer['entropy']['others']),
          f'{layer["max_load"]:.2f}x',
          f'{layer["unrouted_share"]:.2%}',
          _as_many_as_fit(named, room),
        )
      )
  print_table(
    console,
    f'entropy of first choices in nats, {trace["uniform_entropy"]:.2f} is even '
    f'use of {trace["num_experts"]} experts; max load is of all choices',
    ('layer', 'sentinels', 'others', 'max load', 'no expert', 'takes mostly'),
    rows,
  )


def _as_many_as_fit(names: Sequence[str], room: int) -> str:
  """Returns 'a, b and 3 more' in at most so many characters where it can."""
  for count in range(len(names), 0, -1):
    more = len(names) - count
    text = ', '.join(names[:count]) + (f' and {more} more' if more else '')
    if len(text) <= room:
      return text
  return f'{len(names)} experts' if names else 'none'


def _stacks(trace: Mapping[str, Any]) -> list[tuple[str, Any]]:
  """Returns the stacks from below, whatever the order of JSON."""
  stacks = trace['stacks']
  return [(name, stacks[name]) for name in STACKS if name in stacks]


def markdown(trace: Mapping[str, Any]) -> str:
  """Returns the trace as markdown, without the text itself."""
  source = trace['source']
  parts = [
    '# Which tokens go to which expert',
    f'Checkpoint `{source["checkpoint"]}` at step {source["step"]:,}, on '
    f'{source["text"]}: {source["rows"]:,} rows; {source["capacity_text"]}. '
    'Choices are counted before capacity.',
    '## Entropy of sentinels (Table 14)',
    _entropies(trace),
  ]
  for stack, numbers in _stacks(trace):
    for layer in numbers['layers']:
      parts.append(f'## {stack} layer {layer["layer"]}')
      parts.append(_layer(numbers, layer))
  parts += [
    '## What the words mean',
    'An expert is named for a class whose share of its first choices is at '
    f'least {RULE["lift"]:g} times that of all tokens, if the class makes '
    f'{RULE["part"]:.0%} of the expert or the expert takes {RULE["taken"]:.0%} '
    'of the class. Classes are English word lists and rules of spelling '
    '(`st_moe/trace/words.py`). Typical tokens are ordered by their part of '
    "the divergence of the expert's tokens from all, count x ln(lift); the "
    'number is the lift. A … stands before letters that go on a word, a ␣ '
    'before other signs that begin one.',
  ]
  return '\n\n'.join(parts) + '\n'


def _entropies(trace: Mapping[str, Any]) -> str:
  uniform = trace['uniform_entropy']
  rows = []
  for stack, numbers in _stacks(trace):
    for layer in numbers['layers']:
      values = layer['entropy']
      rows.append(
        (
          f'{stack} {layer["layer"]}',
          *(_nats(values[k]) for k in ('sentinels', 'others')),
          *(_nats(values[f'all_choices_{k}']) for k in ('sentinels', 'others')),
        )
      )
  counts = ', '.join(
    f'{numbers["sentinels"]:,} in the {stack}'
    for stack, numbers in _stacks(trace)
  )
  paper = '; '.join(
    f'{stack} {", ".join(map(str, values))}' for stack, values in _PAPER.items()
  )
  table = _table(
    ('layer', 'sentinels', 'other tokens', 'sentinels, all choices',
     'other tokens, all choices'),
    rows,
  )  # fmt: skip
  return (
    f'Nats; even use of all experts gives ln {trace["num_experts"]} = '
    f'{uniform:.3f}. Sentinels: {counts}.\n\n{table}\n\nThe paper, ST-MoE-L '
    f'with 32 experts (uniform {_PAPER_UNIFORM}): {paper}.'
  )


def _layer(numbers: Mapping[str, Any], layer: Mapping[str, Any]) -> str:
  rows = []
  for expert in layer['experts']:
    tokens = ' '.join(
      f'{_code(token["piece"])} {token["lift"]:.1f}'
      for token in expert['tokens'][:8]
    )
    rows.append(
      (
        str(expert['expert']),
        f'{expert["load"]:.1%}',
        *(f'{expert[k]:,}' for k in ('first', 'other', 'dropped')),
        ', '.join(expert['specialised']),
        tokens,
      )
    )
  examples = [
    f'- {expert["expert"]}: ' + ' · '.join(map(_example, expert['examples']))
    for expert in layer['experts']
    if expert['examples']
  ]
  lost = ', '.join(
    f'{_code(token["piece"])} {token["count"]:,} of {token["of"]:,}'
    for token in layer['unrouted_tokens']
  )
  return '\n'.join(
    [
      _table(
        ('expert', 'share', 'first', 'other', 'no slot', 'takes mostly',
         'typical tokens, lift'),
        rows,
      ),
      '',
      'In context:',
      '',
      *examples,
      '',
      f'{layer["unrouted"]:,} of {numbers["tokens"]:,} tokens reach no expert'
      + (f': {lost}.' if lost else '.'),
    ]
  )  # fmt: skip


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  cells = [tuple(cell.replace('|', '\\|') for cell in row) for row in rows]
  lines = [columns, ('---',) * len(columns), *cells]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _code(piece: str) -> str:
  """Returns a piece as code, between more backticks than it has."""
  text = _word(piece).replace('\n', '\\n')
  fence = '`' * (1 + max(map(len, re.findall('`+', text)), default=0))
  space = ' ' if len(fence) > 1 else ''  # which markdown takes off again
  return f'{fence}{space}{text}{space}{fence}'


def _word(piece: str) -> str:
  """Returns a piece by itself, with the marks that the page has.

  A … before letters that go on a word, a ␣ before other signs that begin one.
  """
  if piece == SPACE:
    return '␣'
  text = piece.replace(SPACE, '')
  letters = unicodedata.category(text[0])[0] in 'LN' if text else False
  if letters == piece.startswith(SPACE) or re.fullmatch('<.*>', text):
    return text
  return f'…{text}' if letters else f'␣{text}'


def _example(example: Mapping[str, str]) -> str:
  def plain(text: str) -> str:
    for character in '\\`*_<>|':
      text = text.replace(character, f'\\{character}')
    return ' '.join(text.split())

  return (
    f'{plain(example["before"])} **{_code(example["token"])}** '
    f'{plain(example["after"])}'
  )


def _nats(value: float | None) -> str:
  return 'no tokens' if value is None else f'{value:.3f}'
