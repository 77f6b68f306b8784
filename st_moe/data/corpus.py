"""The offline corpus: English docstrings of the Python installation.

Needs no network and no file of ours. A document is the prose of one Python
file (or of one pydoc topic): its docstrings' English paragraphs, in order,
without any paragraph seen before. Whole files are documents so that held-out
documents share no function with the training text.

What is found depends on the installed packages, so a run records `sha256`.
st_moe's own files are left out: the corpus must not change while one edits
them, nor depend on how the package was installed.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from st_moe.data import docstrings
from st_moe.data.files import default_cache_root, write_atomically

log = logging.getLogger(__name__)

_OWN_PACKAGE = 'st_moe'
_SKIPPED_IN_STDLIB = {'site-packages', 'test', 'tests', 'idle_test'}
_SKIPPED_IN_PACKAGES = {'test', 'tests', _OWN_PACKAGE}

FileProse = list[tuple[str, list[str]]]  # MD5 of a docstring, its paragraphs


@dataclasses.dataclass(frozen=True)
class Documents:
  """Texts with their origin.

  Attributes:
    texts: the documents; paragraphs are separated by blank lines.
    sha256: hash over the texts, in hexadecimal.
    sources: documents from each source: 'stdlib', 'site_packages', 'pydoc'.
  """

  texts: tuple[str, ...]
  sha256: str
  sources: dict[str, int]


def docstring_documents(
  include_site_packages: bool = True, cache_root: Path | None = None
) -> Documents:
  """Collects the docstring corpus, or reads it back from the cache.

  Args:
    include_site_packages: also the installed packages, not only the standard
      library and pydoc's topics.
    cache_root: where results are kept; None: $XDG_CACHE_HOME/st_moe.

  Returns:
    The documents, in an order that is the same on every call.
  """
  root = default_cache_root() if cache_root is None else Path(cache_root)
  path = root / 'docstrings' / f'{_key(include_site_packages)}.json'
  if (stored := _read(path)) is not None:
    return stored
  log.info('reading the docstrings of this Python (once: kept in %s)', root)
  documents = _collect(include_site_packages)
  # A cache that cannot be written (read-only home) costs time, not the run.
  with contextlib.suppress(OSError):
    write_atomically(path, json.dumps(dataclasses.asdict(documents)).encode())
  return documents


def _key(include_site_packages: bool) -> str:
  """Names the corpus by what it is made from: Python, packages, rules."""
  packages = []
  if include_site_packages:
    # Folders `name-version.dist-info`: fast, and all that pip itself knows.
    packages = sorted(
      path.name
      for path in Path(sysconfig.get_paths()['purelib']).glob('*-info')
      if not path.name.startswith(f'{_OWN_PACKAGE}-')
    )
  parts = [str(docstrings.RULES_VERSION), sys.version, *packages]
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:32]


def _read(path: Path) -> Documents | None:
  """Returns a stored corpus; None where absent or damaged."""
  try:
    fields = json.loads(path.read_bytes())
    documents = Documents(
      tuple(fields['texts']), fields['sha256'], fields['sources']
    )
    return documents if _hash(documents.texts) == documents.sha256 else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _hash(texts: Iterable[str]) -> str:
  digest = hashlib.sha256()
  for text in texts:
    content = text.encode()
    digest.update(len(content).to_bytes(8, 'little') + content)
  return digest.hexdigest()


def _collect(include_site_packages: bool) -> Documents:
  paths = sysconfig.get_paths()
  stdlib = _python_files(Path(paths['stdlib']), _SKIPPED_IN_STDLIB)
  packages = []
  if include_site_packages:
    packages = _python_files(Path(paths['purelib']), _SKIPPED_IN_PACKAGES)
  files = _prose_of_files([*stdlib, *packages])

  seen_docstrings: set[str] = set()
  seen_paragraphs: set[str] = set()
  texts: list[str] = []
  sources = {}
  for name, group in (
    ('stdlib', files[: len(stdlib)]),
    ('site_packages', files[len(stdlib) :]),
    ('pydoc', _pydoc_topics()),
  ):
    before = len(texts)
    texts += _documents(group, seen_docstrings, seen_paragraphs)
    sources[name] = len(texts) - before
  return Documents(tuple(texts), _hash(texts), sources)


def _python_files(root: Path, skipped: set[str]) -> list[Path]:
  """Returns the files below `root` in sorted order of their paths."""
  found = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [name for name in subfolders if name not in skipped]
    found += [Path(folder, name) for name in names if name.endswith('.py')]
  return sorted(found)


def _pydoc_topics() -> list[FileProse]:
  try:
    from pydoc_data.topics import topics
  except ImportError:  # stripped from some small installations
    return []
  return [
    [('topic ' + name, docstrings.prose_paragraphs(topics[name]))]
    for name in sorted(topics)
  ]


def _documents(
  files: Iterable[FileProse],
  seen_docstrings: set[str],
  seen_paragraphs: set[str],
) -> Iterator[str]:
  """Yields one document per file that still has new prose."""
  for file in files:
    new = []
    for digest, paragraphs in file:
      if digest in seen_docstrings:
        continue
      seen_docstrings.add(digest)
      for paragraph in paragraphs:
        if paragraph not in seen_paragraphs:
          seen_paragraphs.add(paragraph)
          new.append(paragraph)
    if new:
      yield '\n\n'.join(new)


def _prose_of_files(paths: Sequence[Path]) -> list[FileProse]:
  """Runs `docstrings.file_prose` over files, on all cores, in their order."""
  workers = min(os.cpu_count() or 1, 1 + len(paths) // 100)
  if workers == 1 or not sys.executable:
    return [docstrings.file_prose(str(path)) for path in paths]
  command = [sys.executable, '-I', '-S', docstrings.__file__]
  found: list[FileProse] = [[] for _ in paths]
  with contextlib.ExitStack() as stack:
    running = []
    for worker in range(workers):
      requests = stack.enter_context(tempfile.TemporaryFile('w+'))
      answers = stack.enter_context(tempfile.TemporaryFile('w+'))
      requests.writelines(
        json.dumps(str(path)) + '\n' for path in paths[worker::workers]
      )
      requests.seek(0)
      process = subprocess.Popen(command, stdin=requests, stdout=answers)
      stack.callback(process.kill)  # no orphan after Ctrl-C
      running.append((process, answers))
    for worker, (process, answers) in enumerate(running):
      if process.wait() != 0:
        raise RuntimeError(f'{docstrings.__file__} ended {process.returncode}')
      answers.seek(0)
      found[worker::workers] = map(json.loads, answers)
  return found


_SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=[A-Z])')
_PLAIN_SENTENCE = re.compile(r"[A-Z][A-Za-z]*([ ,;'-]+[A-Za-z]+)+[.!?]")


def short_sentences(
  texts: Iterable[str], count: int, min_words: int = 8, max_words: int = 20
) -> list[str]:
  """Cuts short plain sentences out of texts, at most one from each text.

  Args:
    texts: documents of English prose.
    count: how many sentences at most.
    min_words: shortest sentence, in space-separated words.
    max_words: longest sentence.
  """
  found: list[str] = []
  for text in texts:
    if len(found) == count:
      break
    for sentence in _SENTENCE_END.split(' '.join(text.split())):
      in_range = min_words <= len(sentence.split()) <= max_words
      if in_range and _PLAIN_SENTENCE.fullmatch(sentence):
        found.append(sentence)
        break
  return found
