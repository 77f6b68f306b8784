"""Local text: finding the files, reading and checking their documents.

A document is a line, or a paragraph between blank lines; files may be
gzipped. All text is read once before a run starts, then every document is
known by number and fetched from disk when asked for. Whatever is wrong with a
file is a UserError that names the file and the line. Needs no TensorFlow.
"""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from st_moe.config import DataConfig
from st_moe.data.files import file_sha256
from st_moe.errors import UserError, did_you_mean

BUILT_IN = ('c4', 'c4_json', 'docstrings', 'mc4', 'text')  # tasks over text
MC4_PREFIX = 'mc4.'
# What to do without tfds.
C4_JSON_INSTEAD = "use task 'c4_json' with C4's json.gz shards"

# Read from a folder, for each task; any other name must be given, or matched
# by a glob.
SUFFIXES = {
  'text': ('.txt', '.text', '.md'),
  'c4_json': ('.json', '.jsonl'),
}

# Gzipped text is kept unpacked in memory, up to this many bytes in all.
MAX_UNPACKED_BYTES = 4 << 30
# More than this is known by sizes and dates instead of contents.
MAX_HASHED_BYTES = 1 << 30
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'


def is_built_in(task: str) -> bool:
  """Whether a task is ours, not one that is registered with seqio."""
  return task in BUILT_IN or task.startswith(MC4_PREFIX)


def unknown_task(name: str, others: Iterable[str] = ()) -> UserError:
  """Returns the error for a task that does not exist.

  Args:
    name: of the task.
    others: names that are registered with seqio.
  """
  near = did_you_mean(name, [*BUILT_IN, 'cache', *others])
  return UserError(
    f'unknown task {name!r}{near}; built in are {", ".join(BUILT_IN)}, cache, '
    'and tasks with answers (superglue, superglue.cb, glue and others, see '
    'README.md); --module=NAME imports a module that registers more with seqio'
  )


def check_splits(config: DataConfig) -> None:
  """Refuses a held-out split that is trained on."""
  if config.train_split == config.eval_split:
    raise UserError(
      f'train_split and eval_split are both {config.train_split!r}: held-out '
      'text must not be trained on'
    )


def resolve_files(
  patterns: Sequence[str] | str, suffixes: Sequence[str], field: str
) -> tuple[Path, ...]:
  """Finds the files that a setting names, sorted, each once.

  Args:
    patterns: files, globs (`**` included), or folders, which are searched
      through and through for `suffixes`, gzipped or not.
    suffixes: what counts inside a folder.
    field: the setting, for messages.

  Raises:
    UserError: nothing given, nothing found, or not on this machine.
  """
  if isinstance(patterns, str):
    patterns = (patterns,)
  if not patterns:
    raise UserError(f'{field} is empty: give files, globs or folders')
  found: dict[Path, Path] = {}
  for pattern in patterns:
    for path in _matches(pattern, suffixes, field):
      found.setdefault(path.resolve(), path)
  return tuple(sorted(found.values()))


def _matches(
  pattern: str, suffixes: Sequence[str], field: str
) -> Iterator[Path]:
  if '://' in pattern:
    raise UserError(
      f'{field}: {pattern} is not a local path; copy or mount it, or use a '
      'tfds task'
    )
  path = Path(pattern).expanduser()
  if path.is_file():
    yield path
    return
  if path.is_dir():
    endings = tuple(s + gz for s in suffixes for gz in ('', '.gz'))
    names = glob.glob(f'{glob.escape(str(path))}/**/*', recursive=True)
    files = [Path(n) for n in names if n.endswith(endings)]
    problem = f'folder {pattern} holds no {", ".join(suffixes)} file (.gz or '
    problem += 'not); name the files by a glob if they end otherwise'
  elif glob.has_magic(pattern):
    files = [Path(n) for n in glob.glob(str(path), recursive=True)]
    problem = f'no file matches {pattern}'
  else:
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    near = did_you_mean(path.name, (other.name for other in beside))
    raise UserError(f'{field}: {pattern} does not exist{near}')
  files = [file for file in files if file.is_file()]
  if not files:
    raise UserError(f'{field}: {problem}')
  yield from files


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """Files to train on and held-out files; one of the two may be none."""

  train: tuple[Path, ...]
  held_out: tuple[Path, ...]
  holdout_every: int

  def fingerprint(self, unread: bool = False) -> dict[str, Any]:
    """Returns plain values that name the content; see `fingerprint_files`."""
    found: dict[str, Any] = {}
    if self.train:
      found['train'] = fingerprint_files(self.train, unread)
    if self.held_out:
      return found | {'held_out': fingerprint_files(self.held_out, unread)}
    return found | {'holdout_every': self.holdout_every}


def text_files(task: str, config: DataConfig) -> TextFiles:
  """Finds the files of 'text' or 'c4_json'; reads none of them.

  Held-out files alone will do, to evaluate on them.

  Raises:
    UserError: nothing given, nothing found, or a file that is both trained on
      and held out.
  """
  suffixes = SUFFIXES[task]
  train: tuple[Path, ...] = ()
  held_out: tuple[Path, ...] = ()
  if config.files or not config.eval_files:
    train = resolve_files(config.files, suffixes, 'DataConfig.files')
  if config.eval_files:
    held_out = resolve_files(
      config.eval_files, suffixes, 'DataConfig.eval_files'
    )
    check_disjoint(train, held_out)
  return TextFiles(train, held_out, config.holdout_every)


def check_disjoint(train: Sequence[Path], held_out: Sequence[Path]) -> None:
  """Refuses a file that is both trained on and held out."""
  both = {path.resolve() for path in train} & {p.resolve() for p in held_out}
  if both:
    raise UserError(
      f'{min(both)} is in both files and eval_files: held-out text must not '
      'be trained on; take it out of one of them'
    )


def fingerprint_files(
  files: Sequence[Path], unread: bool = False
) -> dict[str, str | int]:
  """Returns the number of files, their bytes, and one hash over them all.

  The hash covers names and contents; names, sizes and dates where the files
  are to stay `unread`, or are larger than 1 GB together.
  """
  digest = hashlib.sha256()
  stats = []
  for path in files:
    with reading(path):
      stats.append(path.stat())
  total = sum(stat.st_size for stat in stats)
  for path, stat in zip(files, stats, strict=True):
    content = f'{stat.st_size} {stat.st_mtime_ns}'
    if not unread and total <= MAX_HASHED_BYTES:
      with reading(path):
        content = file_sha256(path)
    digest.update(f'{path.name} {content}\n'.encode())
  return {'files': len(files), 'bytes': total, 'sha256': digest.hexdigest()}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
  """Turns what can go wrong while reading a file into a UserError."""
  try:
    yield
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise UserError(
      f'{path}: broken gzip file ({error}); fetch or pack it again'
    ) from error
  except OSError as error:
    raise UserError(
      f'{path} cannot be read: {error.strerror or error}'
    ) from error


def open_file(path: Path) -> BinaryIO:
  """Opens a file for reading, unpacked if its name ends in .gz."""
  if path.name.endswith('.gz'):
    return io.BufferedReader(gzip.open(path))
  return path.open('rb', buffering=1 << 20)


def read_lines(
  file: BinaryIO, path: Path, max_line_bytes: int
) -> Iterator[tuple[int, int, bytes]]:
  """Yields (number from 1, offset of its first byte, the line with its end).

  A byte order mark belongs to no line. Never holds more than
  `max_line_bytes` of a line, however long it is.
  """
  number = offset = 0
  while line := file.readline(max_line_bytes + 2):
    number += 1
    if number == 1 and line.startswith(_BYTE_ORDER_MARK):
      offset = len(_BYTE_ORDER_MARK)
      line = line[offset:]
    if len(line.rstrip(b'\r\n')) > max_line_bytes:
      raise UserError(
        f'{path}:{number}: line of more than {max_line_bytes} bytes; break '
        'it into documents, or raise DataConfig.max_line_bytes'
      )
    yield number, offset, line
    offset += len(line)


def decode(line: bytes, where: str) -> str:
  """Returns a line as text; `where` is its file and number, for messages."""
  try:
    return line.decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f'{where}: invalid UTF-8 (byte 0x{line[error.start]:02x} at '
      f'{error.start + 1}); convert the file, for example with '
      '`iconv -f LATIN1 -t UTF-8`'
    ) from None


class TextDocuments(Sequence[str]):
  """The documents of text files, by number, in the order of the files.

  Building it reads every byte once (2 seconds a GB, and the disk) and
  checks encoding and line lengths; it keeps 16 bytes a document. Gzipped
  files are kept unpacked in memory.
  """

  def __init__(
    self,
    files: Sequence[Path],
    document: Literal['line', 'paragraph'],
    max_line_bytes: int,
    may_be_empty: bool = False,
  ):
    """Reads and checks all files.

    Raises:
      UserError: unreadable or broken files, invalid UTF-8, lines or
        paragraphs that are too long, or no document in all of them, unless
        they `may_be_empty`.
    """
    self.files = tuple(files)
    self._unpacked: dict[int, bytes] = {}
    starts, ends = array('q'), array('q')
    self._first = [0]  # number of each file's first document, then the total
    for i, path in enumerate(self.files):
      with reading(path):
        file = self._open(i, path)
        lines = read_lines(file, path, max_line_bytes)
        if document == 'line':
          _index_lines(lines, path, starts, ends)
        else:
          _index_paragraphs(lines, path, max_line_bytes, starts, ends)
        file.close()
      self._first.append(len(starts))
    self._starts = np.frombuffer(starts, np.int64)
    self._ends = np.frombuffer(ends, np.int64)
    if not len(self) and not may_be_empty:
      more = f' and {len(files) - 1} more' if len(files) > 1 else ''
      raise UserError(
        f'{files[0]}{more}: empty, or only blank lines; give files with text'
      )

  def _open(self, i: int, path: Path) -> BinaryIO:
    file = open_file(path)
    if not path.name.endswith('.gz'):
      return file
    room = MAX_UNPACKED_BYTES - sum(map(len, self._unpacked.values()))
    with file:
      content = file.read(room + 1)
    if len(content) > room:
      raise UserError(
        f'{path}: gzipped text of more than {MAX_UNPACKED_BYTES} bytes in '
        'all; unpack it with gunzip, plain text is read from disk'
      )
    self._unpacked[i] = content
    return io.BytesIO(content)

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, number: int) -> str:
    """Returns one document.

    Raises:
      UserError: the file changed since it was checked.
    """
    i = int(np.searchsorted(self._first, number, side='right')) - 1
    start, end = int(self._starts[number]), int(self._ends[number])
    if i in self._unpacked:
      return self._unpacked[i][start:end].decode()
    path = self.files[i]
    with reading(path), path.open('rb', buffering=0) as file:
      file.seek(start)
      content = file.read(end - start)
    try:
      if len(content) == end - start:
        return content.decode()
    except UnicodeDecodeError:
      pass
    raise UserError(
      f'{path} changed while it was in use; start again, and leave the file '
      'alone'
    )


def _index_lines(
  lines: Iterator[tuple[int, int, bytes]],
  path: Path,
  starts: array,
  ends: array,
) -> None:
  """Appends where each line that is not blank begins and ends."""
  for number, offset, line in lines:
    decode(line, f'{path}:{number}')
    if line.strip():
      starts.append(offset)
      ends.append(offset + len(line.rstrip(b'\r\n')))


def _index_paragraphs(
  lines: Iterator[tuple[int, int, bytes]],
  path: Path,
  max_bytes: int,
  starts: array,
  ends: array,
) -> None:
  """Appends where each run of lines that are not blank begins and ends."""
  inside = False
  begin = 0  # line number
  for number, offset, line in lines:
    decode(line, f'{path}:{number}')
    if not line.strip():
      inside = False
      continue
    end = offset + len(line.rstrip(b'\r\n'))
    if inside:
      ends[-1] = end
    else:
      inside, begin = True, number
      starts.append(offset)
      ends.append(end)
    if end - starts[-1] > max_bytes:
      raise UserError(
        f'{path}:{begin}: paragraph of more than {max_bytes} bytes; set '
        "DataConfig.document = 'line', or raise DataConfig.max_line_bytes"
      )


class Subset(Sequence[str]):
  """Some of the documents: the i-th is document `number(i)` of the whole."""

  def __init__(
    self,
    documents: Sequence[str],
    length: int,
    number: Callable[[int], int],
  ):
    self._documents = documents
    self._length = length
    self._number = number

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, i: int) -> str:
    if not 0 <= i < self._length:
      raise IndexError(i)
    return self._documents[self._number(i)]


@dataclasses.dataclass(frozen=True)
class Split:
  """Documents to train on, and others that are held out."""

  train: Sequence[str]
  held_out: Sequence[str]


def hold_out(documents: Sequence[str], every: int, what: str) -> Split:
  """Holds out every `every`-th document: numbers every - 1, 2 every - 1, ...

  Raises:
    UserError: fewer than `every` documents.
  """
  count = len(documents)
  if count < every:
    few = f'{count} documents are' if count > 1 else '1 document is'
    lower = f'set --gin.DataConfig.holdout_every={count} or less'
    raise UserError(
      f'{what}: {few} too few to hold out one in {every} (a document is a '
      "line, or with DataConfig.document = 'paragraph' a paragraph); "
      f'{lower if count > 1 else "give more"}, or give '
      '--gin.DataConfig.eval_files=FILES'
    )
  held_out = count // every
  return Split(
    train=Subset(
      documents, count - held_out, lambda i: int(i) + int(i) // (every - 1)
    ),
    held_out=Subset(documents, held_out, lambda i: (int(i) + 1) * every - 1),
  )
