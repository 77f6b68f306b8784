"""English prose from the docstrings of Python files: the rules, one by one.

Standard library only, and no import of ours: `corpus.py` also runs this file
as a program of its own, once per core (paths on standard input, JSON lines on
standard output). That is faster than a process pool, and unlike one it asks
nothing of the program that calls it.
"""

import ast
import collections
import gc
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterator

# Raise this when a rule below changes: stored corpora are then made again.
RULES_VERSION = 1

MIN_DOCSTRING_CHARACTERS = 60
MIN_PARAGRAPH_CHARACTERS = 80
MIN_WORDS = 12
MIN_WORD_SHARE = 0.7  # of the characters, in words
MIN_COMMON_SHARE = 0.2  # of the words, in COMMON_WORDS
NOT_PROSE = ('>>>', '..', '|', '+-', '#')  # doctests, directives, tables
_COMMON = (
  'the of and to in a that is be if for with as this on by or an it not are '
  'from will can which at when used'
)
COMMON_WORDS = frozenset(_COMMON.split())

_WORD = re.compile('[A-Za-z]+')
_BLANK_LINES = re.compile(r'\n\s*\n')
# Where statements hold statements, in the order of `ast`'s own fields.
_BLOCKS = ('body', 'handlers', 'orelse', 'finalbody', 'cases')
_DOCUMENTED = (
  ast.Module,
  ast.ClassDef,
  ast.FunctionDef,
  ast.AsyncFunctionDef,
)


def is_english_prose(paragraph: str) -> bool:
  """Whether a paragraph, spaces collapsed, reads like English sentences."""
  if len(paragraph) < MIN_PARAGRAPH_CHARACTERS:
    return False
  if paragraph.startswith(NOT_PROSE):
    return False
  words = _WORD.findall(paragraph)
  if len(words) < MIN_WORDS:
    return False
  if sum(map(len, words)) < MIN_WORD_SHARE * len(paragraph):
    return False
  common = sum(word.lower() in COMMON_WORDS for word in words)
  return common >= MIN_COMMON_SHARE * len(words)


def prose_paragraphs(text: str) -> list[str]:
  """Returns the English paragraphs of a text, each on one line."""
  paragraphs = (' '.join(part.split()) for part in _BLANK_LINES.split(text))
  return [paragraph for paragraph in paragraphs if is_english_prose(paragraph)]


def _walk_statements(tree: ast.AST) -> Iterator[ast.AST]:
  """Yields statements in the order of `ast.walk`, which visits all nodes.

  Expressions hold no definitions; leaving them out is ten times faster.
  """
  todo = collections.deque([tree])
  while todo:
    node = todo.popleft()
    for block in _BLOCKS:
      todo.extend(getattr(node, block, ()))
    yield node


def docstrings(source: bytes) -> Iterator[str]:
  """Yields the cleaned docstrings of a file in the order of `ast.walk`.

  A file that does not parse yields nothing.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # invalid escapes in others' files
      tree = ast.parse(source)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return
  for node in _walk_statements(tree):
    if isinstance(node, _DOCUMENTED):
      text = ast.get_docstring(node)
      if text is not None and len(text) >= MIN_DOCSTRING_CHARACTERS:
        yield text.encode('utf-8', 'replace').decode()  # no lone surrogates


def file_prose(path: str) -> list[tuple[str, list[str]]]:
  """Returns (MD5 of the docstring, its English paragraphs) for one file."""
  try:
    with open(path, 'rb') as file:
      source = file.read()
  except OSError:
    return []
  found = []
  for text in docstrings(source):
    if paragraphs := prose_paragraphs(text):
      found.append((hashlib.md5(text.encode()).hexdigest(), paragraphs))
  return found


def main() -> None:
  """Reads paths from standard input, writes one JSON line for each."""
  gc.disable()  # syntax trees are large and hold no cycles
  for line in sys.stdin:
    print(json.dumps(file_prose(json.loads(line))))


if __name__ == '__main__':
  main()
