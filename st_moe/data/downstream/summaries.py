"""Summaries: XSum and CNN/DailyMail, `summarize: ARTICLE` (T5's `summarize`).

T5 has CNN/DailyMail alone; XSum has the same form here. Both are published as
one file for each article, and lists that say which of them make a split. Rows
of JSON with the same fields are read too.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from st_moe.data.downstream import answers, metrics
from st_moe.data.downstream.example import AnswerTask, Example, Prepared
from st_moe.data.downstream.formats import UNLABELLED
from st_moe.data.downstream.published import (
  Files,
  Rows,
  document,
  json_lines,
  lines,
  read_text,
)
from st_moe.data.downstream.rows import texts, wrong_row
from st_moe.errors import UserError

log = logging.getLogger(__name__)

_XSUM_SPLITS = 'XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json'
_XSUM_FILES = (
  'bbc-summary-data/{}.summary',
  'xsum-extracts-from-downloads/{}.data',
)
_XSUM_PART = re.compile(r'\[(?:SN|XSUM)\]([A-Z-]+)\[(?:SN|XSUM)\]')
# Left over from the pages of the BBC (tfds' xsum.py leaves them out too).
_XSUM_BUTTONS = frozenset(
  (
    'Share this with', 'Email', 'Facebook', 'Messenger', 'Twitter',
    'Pinterest', 'WhatsApp', 'Linkedin', 'LinkedIn', 'Copy this link',
    'These are external links and will open in a new window',
  )
)  # fmt: skip

_STORY_FOLDERS = ('cnn/stories', 'dailymail/stories')
_SENTENCE_ENDS = ('.', '!', '?', "'", '`', '"', '\u2019', '\u201d', ')')


def _summary(
  row: Mapping[str, Any], where: str, train: bool, article: str, summary: str
) -> list[Example]:
  (text,) = texts(row, (article,), where)
  idx, inputs = row.get('id'), f'summarize: {text}'
  if not train and row.get(summary) is None:
    return [Example(inputs, UNLABELLED, idx=idx)]
  (target,) = texts(row, (summary,), where)
  return [Example(inputs, target, answers=(target,), idx=idx)]


def _xsum(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  return _summary(row, where, train, 'document', 'summary')


def _cnn_dailymail(
  row: Mapping[str, Any], where: str, train: bool
) -> list[Example]:
  return _summary(row, where, train, 'article', 'highlights')


def _xsum_rows(path: Path, split: str) -> Rows:
  """Reads the articles that the authors' list of splits names."""
  if path.suffix == '.jsonl':
    yield from json_lines(path, split)
    return
  numbers = document(path)
  if not isinstance(numbers, dict) or not isinstance(numbers.get(split), list):
    raise wrong_row(str(path), f'list {split!r} of articles')
  for file in _files(path, map(str, numbers[split]), _XSUM_FILES):
    where = str(file)
    kept = [
      line
      for line in read_text(file).split('\n')
      if line.strip() and line not in _XSUM_BUTTONS
    ]
    parts = _XSUM_PART.split('\n'.join(kept))
    found = dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))
    summary = found.get('FIRST-SENTENCE', found.get('INTRODUCTION'))
    if summary is None or 'RESTBODY' not in found:
      raise wrong_row(where, 'FIRST-SENTENCE and RESTBODY')
    yield (
      where,
      {'document': found['RESTBODY'], 'summary': summary, 'id': file.stem},
    )


def _cnn_dailymail_rows(path: Path, split: str) -> Rows:
  """Reads the stories of See et al.'s lists: a file is the SHA-1 of its URL.

  As in tfds (and in make_datafiles.py of abisee/cnn-dailymail, without its
  lower case): lines without an end get a full stop, the article is joined by
  spaces and the highlights by newlines; a story without one of them is none.
  """
  if path.suffix == '.jsonl':
    yield from json_lines(path, split)
    return
  root = path.parent.parent if path.parent.name == 'url_lists' else path.parent
  urls = (line.strip() for _, line in lines(path))
  hashes = (hashlib.sha1(url.encode()).hexdigest() for url in urls if url)
  patterns = [f'{folder}/{{}}.story' for folder in _STORY_FOLDERS]
  for file in _files(root / path.name, hashes, patterns):
    article, highlights = _story(read_text(file))
    if article and highlights:
      yield (
        str(file),
        {'article': article, 'highlights': highlights, 'id': file.stem},
      )


def _story(text: str) -> tuple[str, str]:
  article: list[str] = []
  highlights: list[str] = []
  into = article
  for line in text.split('\n'):
    line = line.strip()
    if line.startswith('@highlight'):
      into = highlights
    elif line:
      ended = line.endswith(_SENTENCE_ENDS) or '@highlight' in line
      into.append(line if ended else f'{line}.')
  return ' '.join(article), '\n'.join(highlights)


def _files(
  listed: Path, names: Iterator[str], patterns: tuple[str, ...] | list[str]
) -> Iterator[Path]:
  """Yields the files of a list that are there; the others are counted.

  Raises:
    UserError: there is none of their folders.
  """
  root = listed.parent
  folders = [root / Path(pattern).parent for pattern in patterns]
  if not any(folder.is_dir() for folder in folders):
    raise UserError(
      f'{root}: there is none of the folders '
      f'{", ".join(str(folder.relative_to(root)) for folder in folders)} with '
      f'the articles of {listed.name}; unpack them there'
    )
  missing = count = 0
  for name in names:
    count += 1
    paths = (root / pattern.format(name) for pattern in patterns)
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
      missing += 1
    else:
      yield found
  if missing:
    log.warning(
      '%s: %s of %s articles are not there, and are left out',
      listed,
      f'{missing:,}',
      f'{count:,}',
    )


XSUM = AnswerTask(
  'xsum',
  Files(
    ('xsum', 'XSum-Dataset'),
    {
      'train': (_XSUM_SPLITS, 'train.jsonl'),
      'validation': (_XSUM_SPLITS, 'validation.jsonl', 'val.jsonl'),
      'test': (_XSUM_SPLITS, 'test.jsonl'),
    },
    _xsum_rows,
  ),
  Prepared('xsum'),
  _xsum,
  answers.free_text,
  metrics.rouge,
  ('rouge2',),  # the paper's
)

CNN_DAILYMAIL = AnswerTask(
  'cnn_dailymail',
  Files(
    ('cnn_dailymail', 'cnn-dailymail', 'cnn_dm'),
    {
      split: (f'url_lists/all_{short}.txt', f'all_{short}.txt', *rows)
      for split, short, rows in (
        ('train', 'train', ('train.jsonl',)),
        ('validation', 'val', ('validation.jsonl', 'val.jsonl')),
        ('test', 'test', ('test.jsonl',)),
      )
    },
    _cnn_dailymail_rows,
  ),
  Prepared('cnn_dailymail'),
  _cnn_dailymail,
  answers.free_text,
  metrics.rouge,
  ('rouge2',),
)
