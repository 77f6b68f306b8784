"""Random access to the tokens of a cache: shards, and windows over them.

The tokens of a split are one stream. A window is found by its first token:
which shard, then by the shard's offsets which records.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from st_moe.data import cache_format
from st_moe.data.cache_format import Manifest, Shard
from st_moe.errors import UserError


class _ShardReader:
  """Token ranges of one shard; opens its file at the first read."""

  def __init__(self, folder: Path, shard: Shard, dtype: np.dtype):
    self.num_records = shard.records
    self._path = shard.data_path(folder)
    self._shard = shard
    self._dtype = dtype
    self._lock = threading.Lock()
    self._reader: ArrayRecordReader | None = None
    self._offsets = self._checked_offsets(shard.offsets_path(folder))
    if not self._path.is_file():
      raise self._broken('is missing')
    if (size := self._path.stat().st_size) != shard.bytes:
      raise self._broken(f'has {size} bytes instead of {shard.bytes}')

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns tokens [start, stop) of the shard as int32."""
    first = int(np.searchsorted(self._offsets, start, side='right')) - 1
    last = int(np.searchsorted(self._offsets, stop, side='left'))
    tokens = self.records(first, last)
    skipped = start - int(self._offsets[first])
    return tokens[skipped : skipped + stop - start]

  def records(self, first: int, last: int) -> np.ndarray:
    """Returns the tokens of records [first, last) as int32."""
    try:
      content = b''.join(self._open().read(first, last))
    except (RuntimeError, ValueError, IndexError) as error:
      raise self._broken('is damaged') from error
    tokens = np.frombuffer(content, self._dtype).astype(np.int32)
    if len(tokens) != self._offsets[last] - self._offsets[first]:
      raise self._broken('does not agree with its offsets file')
    return tokens

  def _open(self) -> ArrayRecordReader:
    with self._lock:
      if self._reader is None:
        # Random reads: reading ahead would decompress what nobody asked for.
        reader = ArrayRecordReader(str(self._path), 'readahead_buffer_size:0')
        if reader.num_records() != self._shard.records:
          raise self._broken('is damaged')
        self._reader = reader
      return self._reader

  def _checked_offsets(self, path: Path) -> np.ndarray:
    try:
      offsets = np.load(path, mmap_mode='r')
    except (OSError, ValueError, EOFError) as error:
      raise self._broken('is missing or damaged', path) from error
    shape = (self._shard.records + 1,)
    if offsets.shape != shape or offsets[-1] != self._shard.tokens:
      raise self._broken('does not agree with the manifest', path)
    return offsets

  def _broken(self, what: str, path: Path | None = None) -> UserError:
    path = path or self._path
    return UserError(
      f'cache shard {path} {what}; delete it and run the same `st_moe cache` '
      'command again, it writes only what is missing'
    )


class Windows:
  """The token stream of a split, cut into windows of `size` tokens."""

  def __init__(self, folder: Path, manifest: Manifest, split: str, size: int):
    if split not in manifest.splits:
      raise UserError(
        f'cache {folder} has the splits {", ".join(manifest.splits)}, not '
        f'{split}'
      )
    dtype = cache_format.token_dtype(manifest.token_bytes)
    shards = manifest.splits[split]
    self._shards = [_ShardReader(folder, shard, dtype) for shard in shards]
    # Tokens before each shard, and in all.
    self._starts = np.cumsum([0] + [shard.tokens for shard in shards])
    self._size = size
    if not self._starts[-1]:
      raise UserError(f'cache {folder} has no tokens in its {split} split')

  def __len__(self) -> int:
    return -(-int(self._starts[-1]) // self._size)

  def __getitem__(self, index: int) -> np.ndarray:
    """Returns int32 [size]; the last window may be shorter."""
    start = index * self._size
    stop = min(start + self._size, int(self._starts[-1]))
    shard = int(np.searchsorted(self._starts, start, side='right')) - 1
    pieces = []
    while start < stop:
      begin, end = int(self._starts[shard]), int(self._starts[shard + 1])
      piece_stop = min(stop, end)
      if start < piece_stop:
        pieces.append(
          self._shards[shard].read(start - begin, piece_stop - begin)
        )
      start, shard = piece_stop, shard + 1
    return np.concatenate(pieces)

  def records(self) -> Iterator[np.ndarray]:
    """Yields the tokens of each record: a document or a piece of one."""
    for reader in self._shards:
      for record in range(reader.num_records):
        yield reader.records(record, record + 1)
