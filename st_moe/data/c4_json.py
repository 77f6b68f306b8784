"""C4 in the AllenAI layout: `c4-train.*.json.gz` shards read as a stream.

A line holds one JSON object with a `text`. The shards are too large to read
ahead: the first records of each are checked before a run starts, the rest as
it streams. Whatever is wrong is a UserError that names shard and line. Needs
no TensorFlow.
"""

import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from st_moe.data.sources import decode, open_file, read_lines, reading
from st_moe.errors import UserError

_CHECKED_RECORDS = 16  # of each shard, before a run starts
_CHUNK_RECORDS = 64  # of a shard, handed out at once


class JsonDocuments:
  """The documents of C4 JSON shards, shard by shard, as a stream.

  Where no held-out files are given, every `holdout_every`-th document of the
  shards is held out, counted from a different start in each shard.
  """

  def __init__(
    self,
    files: Sequence[Path],
    max_line_bytes: int,
    holdout_every: int | None = None,
  ):
    self.files = tuple(files)
    self._max_line_bytes = max_line_bytes
    self._holdout_every = holdout_every

  def check(self) -> 'JsonDocuments':
    """Reads the first records of every shard; returns the documents.

    Raises:
      UserError: a broken shard or record, or no record in all of them.
    """
    found = 0
    for shard in range(len(self.files)):
      for _ in self._records(shard, stop=_CHECKED_RECORDS):
        found += 1
    if not found:
      raise UserError(f'{self.files[0]}: no record with a text in these files')
    return self

  def part(self, held_out: bool) -> 'JsonPart':
    """Returns the documents to train on, or those that are held out."""
    return JsonPart(self, held_out)

  def shard_texts(self, shard: int, held_out: bool) -> Iterator[str]:
    """Yields the documents of one shard and part."""
    for number, text in self._records(shard):
      if self._is_held_out(shard, number) == held_out:
        yield text

  def _is_held_out(self, shard: int, number: int) -> bool:
    every = self._holdout_every
    return every is not None and (shard + number) % every == 0

  def _records(
    self, shard: int, stop: int | None = None
  ) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text) of records whose text is not blank."""
    path = self.files[shard]
    with reading(path), open_file(path) as file:
      for number, _, line in read_lines(file, path, self._max_line_bytes):
        if line.strip():
          text = _json_text(line, f'{path}:{number}')
          if text.strip():
            yield number, text
        if number == stop:
          return


def _json_text(line: bytes, where: str) -> str:
  content = decode(line, where)
  try:
    record = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise UserError(
      f'{where}: broken JSON ({error}); each line holds one object like '
      '{"text": "..."}'
    ) from None
  if not isinstance(record, dict) or not isinstance(record.get('text'), str):
    keys = ', '.join(record) if isinstance(record, dict) else 'no object'
    raise UserError(
      f"{where}: no field 'text' that is a string (found: {keys or 'nothing'})"
    )
  # JSON can spell half a surrogate pair, UTF-8 cannot.
  return record['text'].encode('utf-8', 'replace').decode()


@dataclasses.dataclass(frozen=True)
class JsonPart:
  """The training or the held-out documents of some shards."""

  documents: JsonDocuments
  held_out: bool

  @property
  def files(self) -> tuple[Path, ...]:
    return self.documents.files

  def shard(self, shard: int) -> Iterator[str]:
    return self.documents.shard_texts(shard, self.held_out)

  def __iter__(self) -> Iterator[str]:
    """Yields all documents, shard after shard."""
    for shard in range(len(self.files)):
      yield from self.shard(shard)


class JsonChunks:
  """Random access to documents, in chunks, for tf.data.

  `read(shard, k)` is a function of its arguments alone, so that a saved
  position (shard, k) is enough to go on; asking for the next chunk of a shard
  is fast, any other reads the shard again from its beginning.
  """

  def __init__(self, part: JsonPart):
    self._part = part
    self._open: dict[int, tuple[int, Iterator[str]]] = {}
    self._lock = threading.Lock()

  def read(self, shard: int, k: int) -> list[str]:
    """Returns chunk `k`; [] after the last."""
    with self._lock:
      position, texts = self._open.pop(shard, (-1, iter(())))
    if position != k:
      texts = self._part.shard(shard)
      texts = itertools.islice(texts, k * _CHUNK_RECORDS, None)
    chunk = list(itertools.islice(texts, _CHUNK_RECORDS))
    if chunk:
      with self._lock:
        self._open[shard] = k + 1, texts
    return chunk
