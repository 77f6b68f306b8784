"""A split's text in pieces, documents or files, any run of which can be read.

A shard of a token cache is a run of consecutive pieces. Where pieces are
files, or tfds's documents, the process that writes a shard opens only the
files of that shard.
"""

import abc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from st_moe.data.sources import reading
from st_moe.errors import UserError

Unit = Literal['documents', 'files']


class Pieces(abc.ABC):
  """The text of a split.

  Attributes:
    unit: what a piece is.
  """

  unit: Unit

  @abc.abstractmethod
  def __len__(self) -> int:
    """Returns the number of pieces."""

  @abc.abstractmethod
  def read(self, start: int, stop: int) -> Iterator[str]:
    """Yields the documents of pieces [start, stop), each time the same."""

  def end_at(self, stop: int) -> bool:
    """Whether nothing comes after piece stop - 1."""
    return len(self) == stop


class Numbered(Pieces):
  """Documents of a sequence: each is read by its number."""

  unit = 'documents'

  def __init__(self, texts: Sequence[str]):
    self._texts = texts

  def __len__(self) -> int:
    return len(self._texts)

  def read(self, start: int, stop: int) -> Iterator[str]:
    for i in range(start, min(stop, len(self))):
      yield self._texts[i]


class Streamed(Pieces):
  """Documents that come one after the other.

  Those before a run are read and thrown away, unless the runs are read in
  order: then they share one pass.
  """

  unit = 'documents'

  def __init__(self, texts: Iterable[str]):
    """Builds it from what can be iterated again and again."""
    self._texts = texts
    self._stream: Iterator[str] = iter(())
    self._position: int | None = None  # in the stream

  def __len__(self) -> int:
    return sum(1 for _ in self._texts)

  def read(self, start: int, stop: int) -> Iterator[str]:
    if self._position is None or start < self._position:
      self._stream, self._position = iter(self._texts), 0
    for _ in itertools.islice(self._stream, start - self._position):
      self._position += 1
    for text in itertools.islice(self._stream, stop - start):
      self._position += 1
      yield text

  def end_at(self, stop: int) -> bool:
    return next(self.read(stop, stop + 1), None) is None


class Files(Pieces):
  """Files; only those that are asked for are ever opened."""

  unit = 'files'

  def __init__(
    self, files: Sequence[Path], texts: Callable[[int], Iterable[str]]
  ):
    """Builds it from the files and what gives the documents of one."""
    self._files = files
    self._texts = texts

  def __len__(self) -> int:
    return len(self._files)

  def read(self, start: int, stop: int) -> Iterator[str]:
    """Yields the documents of some files.

    Raises:
      UserError: a file that is broken, or that changed while it was read.
    """
    for number in range(start, stop):
      path = self._files[number]
      before = _state(path)
      yield from self._texts(number)
      if _state(path) != before:
        raise UserError(
          f'{path} changed while it was read; start again, and leave the file '
          'alone'
        )


def _state(path: Path) -> tuple[int, int]:
  with reading(path):
    stat = path.stat()
  return stat.st_size, stat.st_mtime_ns


def pieces_of(documents: 'Pieces | Iterable[str]') -> Pieces:
  """Returns documents as pieces: by number if they are a sequence."""
  if isinstance(documents, Pieces):
    return documents
  if isinstance(documents, Sequence):
    return Numbered(documents)
  return Streamed(documents)
