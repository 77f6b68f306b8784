"""Whom a pronoun means: WSC of SuperGLUE, and DPR in its format.

T5 trains WSC on the rows whose referent is right, and on the Definite Pronoun
Resolution data of Rahman and Ng (2012) beside them (`wsc_simple` and
`definite_pronoun_resolution_simple` in t5/data/preprocessors.py).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from st_moe.data.downstream import answers, metrics
from st_moe.data.downstream.example import AnswerTask, Example, Prepared
from st_moe.data.downstream.formats import BOOLS, classified
from st_moe.data.downstream.published import Files, Rows, lines
from st_moe.data.downstream.rows import label_index, texts, wrong_row
from st_moe.errors import UserError


def _wsc(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  """The pronoun stands between stars; the target is what it may refer to.

  Whether it does is the label: those that do not are not trained on. The
  position of the pronoun counts words; in four published texts it is another
  word, and the nearest place of the pronoun is taken.
  """
  try:
    words = row['text'].rstrip().split(' ')
    referent, pronoun = texts(
      row['target'], ('span1_text', 'span2_text'), where
    )
    at = int(row['target']['span2_index'])
  except (AttributeError, KeyError, TypeError, ValueError):
    raise wrong_row(
      where, 'text, target.span1_text, span2_text and span2_index'
    ) from None
  places = [i for i, word in enumerate(words) if _bare(word) == _bare(pronoun)]
  if not places:
    raise wrong_row(where, f'pronoun {pronoun!r} in its text')
  label = label_index(row, BOOLS, where, required=train)
  if train and not label:
    return []
  referent = _as_in_text(referent, row['text'], row['target'])
  place = min(places, key=lambda i: abs(i - at))
  rest = words[place][len(pronoun) :]
  words[place] = f'*{pronoun}* {rest}'.rstrip()
  inputs = ' '.join(['wsc:', *words])
  return [Example(inputs, referent, label=label, idx=row.get('idx'))]


def _as_in_text(referent: str, text: str, target: Mapping[str, Any]) -> str:
  """Returns a referent as its text has it, where that is easily found.

  88 published ones begin with another capital than the text, end in a full
  stop or hold a line break. tfds' `wsc.fixed`, which T5 reads, repairs them.
  """
  words, at = text.split(), target.get('span1_index')
  if referent in text or not isinstance(at, int) or not 0 <= at < len(words):
    return referent
  first = referent[:1]
  first = first.lower() if words[at][0].islower() else first.upper()
  repaired = f'{first}{referent[1:]}'.rstrip('.').replace('\n', ' ')
  return repaired if repaired in text else referent


def _bare(word: str) -> str:
  return re.sub(r'^\W+|\W+$', '', word).lower()


def _dpr_rows(path: Path, split: str) -> Rows:
  """Yields the rows of a file of sentence, pronoun, candidates, answer.

  Each stands on a line of its own; an empty line ends the row.
  """
  del split
  row: list[str] = []
  start = ''
  for where, line in (*lines(path), ('', '')):
    if line.strip():
      start = start if row else where
      row.append(line.strip())
    elif row:
      yield start, _dpr_row(row, start)
      row = []


def _dpr_row(row: list[str], where: str) -> dict[str, Any]:
  if len(row) != 4:
    raise UserError(
      f'{where}: {len(row)} lines before an empty one; a row of DPR is a '
      'sentence, a pronoun, two candidates and the right one, a line each'
    )
  sentence, pronoun, both, right = row
  candidates = [text.strip() for text in both.split(',')]
  if len(candidates) != 2 or right not in candidates:
    raise UserError(
      f'{where}: {right!r} is none of the two candidates {both!r}'
    )
  return {
    'sentence': sentence,
    'pronoun': pronoun,
    'candidates': candidates,
    'label': candidates.index(right),
  }


def _dpr(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  """The first place of the pronoun stands between stars.

  A pronoun that T5 does not find (it wants a space before, and a space, a
  comma or a full stop behind it) stays without them, as in T5.
  """
  sentence, pronoun = texts(row, ('sentence', 'pronoun'), where)
  candidates = row.get('candidates')
  if not (
    isinstance(candidates, list)
    and all(isinstance(text, str) for text in candidates)
  ):
    raise wrong_row(where, "list of texts 'candidates'")
  label = label_index(row, candidates, where, required=train)
  marked = re.sub(
    rf' ({re.escape(pronoun)})([ .,])', r' *\1*\2', sentence, count=1
  )
  return [classified(f'wsc: {marked}', tuple(candidates), label)]


def _wsc_from_tfds(row: Mapping[str, Any]) -> dict[str, Any]:
  return {**row, 'target': row}


WSC = AnswerTask(
  'superglue.wsc',
  Files(('WSC',)),
  Prepared('super_glue/wsc.fixed', row=_wsc_from_tfds),  # T5's
  _wsc,
  answers.wsc,
  metrics.accuracy,
)
DPR = AnswerTask(
  'superglue.dpr',
  Files(
    ('DPR', 'dpr', 'definite_pronoun_resolution'),
    {'train': ('train.c.txt',), 'test': ('test.c.txt',)},
    _dpr_rows,
  ),
  Prepared('definite_pronoun_resolution'),
  _dpr,
  answers.choice,
  metrics.accuracy,
)
