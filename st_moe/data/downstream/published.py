"""Published files: where those of a task are, and the rows that they hold.

A reader yields (where a row stands, the row); where is a file and a line, or
a place in a JSON document, and begins every message about the row.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from st_moe.data.sources import reading
from st_moe.errors import UserError

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]

_BYTE_ORDER_MARK = '\ufeff'

log = logging.getLogger(__name__)


def json_lines(path: Path, split: str) -> Rows:
  """Yields the rows of a file that has one JSON object a line."""
  del split
  for where, line in lines(path):
    if line.strip():
      yield where, json_object(line, where)


def table(
  path: Path,
  split: str,
  *,
  columns: Mapping[str, str],
  header: Sequence[str] | None = None,
  skip_short: bool = False,
) -> Rows:
  """Yields the rows of a file of values between tabs, without quoting.

  Args:
    path: of the file.
    split: any.
    columns: {name in the row: column of the file}. A column that the file
      does not have is not in the row. A 'label' of digits becomes a number;
      'idx' is the number of the row.
    header: names of the columns; None: the first line names them.
    skip_short: whether lines without some of `columns` are left out, and
      counted; otherwise they are an error.

  Raises:
    UserError: a line without some of the columns, unless they are skipped.
  """
  del split
  number, short, names = 0, 0, header
  for where, line in lines(path):
    if not line.strip():
      continue
    values = line.split('\t')
    if names is None:
      names = values
      continue
    found: dict[str, Any] = {
      name: values[names.index(column)]
      for name, column in columns.items()
      if column in names[: len(values)]
    }
    number += 1
    missing = [c for n, c in columns.items() if c in names and n not in found]
    if found.get('label', '').isdecimal():
      found['label'] = int(found['label'])
    if not missing:
      yield where, found | {'idx': number - 1}
    elif skip_short:
      short += 1
    else:
      raise UserError(
        f'{where}: {len(values)} values between tabs, and no {missing[0]!r} '
        f'(there are {len(names)} columns); fix or remove the line'
      )
  if short:
    log.warning('%s: lines without all columns, left out: %s', path, short)


def document(path: Path) -> Any:
  """Returns what a JSON file holds.

  Raises:
    UserError: it cannot be read, or is not JSON: with the line.
  """
  try:
    return json.loads(read_text(path))
  except json.JSONDecodeError as error:
    raise UserError(
      f'{path}:{error.lineno}: not JSON ({error}); fetch it again'
    ) from None


def lines(path: Path) -> Iterator[tuple[str, str]]:
  """Yields ('DIR/CB/train.jsonl:3', a line without its end) of a text file.

  Raises:
    UserError: it cannot be read, or is not UTF-8.
  """
  with reading(path), path.open('rb') as file:
    for number, content in enumerate(file, 1):
      line = decoded(content.rstrip(b'\r\n'), f'{path}:{number}')
      if number == 1:
        line = line.removeprefix(_BYTE_ORDER_MARK)
      yield f'{path}:{number}', line


def read_text(path: Path) -> str:
  """Returns the text of a file.

  Raises:
    UserError: it cannot be read, or is not UTF-8.
  """
  with reading(path):
    content = path.read_bytes()
  return decoded(content, str(path)).removeprefix(_BYTE_ORDER_MARK)


def decoded(content: bytes, where: str) -> str:
  """Returns UTF-8 as text.

  Raises:
    UserError: it is something else.
  """
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f'{where}: not UTF-8 (byte 0x{content[error.start]:02x}); fix the file, '
      'or fetch it again'
    ) from None


def json_object(text: str, where: str) -> dict[str, Any]:
  """Returns a JSON object.

  Raises:
    UserError: the text is none.
  """
  try:
    row = json.loads(text)
  except ValueError as error:
    raise UserError(
      f'{where}: not JSON ({error}); fix or remove the line'
    ) from None
  if not isinstance(row, dict):
    raise UserError(f'{where}: not a JSON object; one row a line is expected')
  return row


@dataclasses.dataclass(frozen=True)
class Files:
  """The files of a task, as its authors publish them.

  Attributes:
    folders: names by which the folder of the files goes, the published one
      first: ('CB',), ('ARC-V1-Feb2018-2/ARC-Easy', 'arc/ARC-Easy').
    names: {split: names of its file, the published one first}; what is read
      may lie in other files too, beside it.
    rows: reads a file, given the split.
  """

  folders: tuple[str, ...]
  names: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=lambda: {
      'train': ('train.jsonl',),
      'validation': ('val.jsonl', 'dev.jsonl', 'validation.jsonl'),
      'test': ('test.jsonl',),
    }
  )
  rows: Callable[[Path, str], Rows] = json_lines

  def find(self, root: Path, split: str) -> Path | None:
    """Returns the file of a split in a folder; None: it is not there.

    Args:
      root: holds one of `folders`, or is one by its name; or holds the file
        itself, if its name says whose it is ('train.jsonl' does not).
      split: one of `names`.
    """
    own = any(_alike(root.name, Path(folder).name) for folder in self.folders)
    for folder in (*self.folders, '.'):
      for name in self.names[split]:
        there = folder != '.' or own or not _says_only_split(name)
        if there and (root / folder / name).is_file():
          return root / folder / name
    return None


def _alike(one: str, other: str) -> bool:
  """Whether names differ in capitals, spaces and signs alone."""
  one, other = (re.sub(r'[\W_]', '', name).lower() for name in (one, other))
  return bool(one) and one == other


def _says_only_split(name: str) -> bool:
  """Whether the file of any task may have this name."""
  stem = Path(name).name.partition('.')[0]
  return stem in ('train', 'val', 'dev', 'validation', 'test')
