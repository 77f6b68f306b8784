"""Published files: where those of a task are, and the rows that they hold.

A reader yields (where a row stands, the row); where is a file and a line, or
a place in a JSON document, and begins every message about the row.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from st_moe.data.sources import reading
from st_moe.errors import UserError

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]

_BYTE_ORDER_MARK = '\ufeff'


def json_lines(path: Path, split: str) -> Rows:
  """Yields the rows of a file that has one JSON object a line."""
  del split
  for where, line in lines(path):
    if line.strip():
      yield where, json_object(line, where)


def lines(path: Path) -> Iterator[tuple[str, str]]:
  """Yields ('CB/train.jsonl:3', the line without its end) of a text file.

  Raises:
    UserError: it cannot be read, or is not UTF-8.
  """
  shown = show(path)
  with reading(path), path.open('rb') as file:
    for number, content in enumerate(file, 1):
      line = decoded(content.rstrip(b'\r\n'), f'{shown}:{number}')
      if number == 1:
        line = line.removeprefix(_BYTE_ORDER_MARK)
      yield f'{shown}:{number}', line


def read_text(path: Path) -> str:
  """Returns the text of a file.

  Raises:
    UserError: it cannot be read, or is not UTF-8.
  """
  with reading(path):
    content = path.read_bytes()
  return decoded(content, show(path)).removeprefix(_BYTE_ORDER_MARK)


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


def show(path: Path) -> str:
  """Returns a path as messages have it: 'CB/train.jsonl'."""
  return f'{path.parent.name}/{path.name}'


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
      root: holds the task's folder, at any depth of `folders`; or is that
        folder itself, by its name.
      split: one of `names`.
    """
    folders = [root / folder for folder in self.folders]
    if any(_alike(root.name, Path(folder).name) for folder in self.folders):
      folders.append(root)
    for folder in folders:
      for name in self.names[split]:
        if (folder / name).is_file():
          return folder / name
    return None


def _plain(name: str) -> str:
  return re.sub(r'[\W_]', '', name).lower()


def _alike(one: str, other: str) -> bool:
  return bool(_plain(one)) and _plain(one) == _plain(other)
