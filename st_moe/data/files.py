"""Small file helpers of the data tower: atomic writes, hashes, cache folder."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache_root() -> Path:
  """Returns the folder for what can be made again: $XDG_CACHE_HOME/st_moe."""
  base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(base) / 'st_moe'


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Yields a temporary neighbour that becomes `path` if the block succeeds.

  A reader sees the old file or the whole new one, never a part; on an error
  nothing is left behind. The name is random, so that processes writing the
  same file do not meet, on machines that number their processes alike either.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
  """Writes a file that appears whole or not at all."""
  with replacing(path) as temporary:
    temporary.write_bytes(content)


def file_sha256(path: Path) -> str:
  """Returns the SHA-256 of a file's bytes, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
