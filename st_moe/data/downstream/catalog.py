"""Tasks with answers by name, and reading their examples from files.

`DataConfig.task_dir` is the folder in which the published archives were
unpacked: the files of CB are `CB/train.jsonl` and `CB/val.jsonl` there, or in
the folder `superglue` within it.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from st_moe.config import DataConfig
from st_moe.data.downstream import superglue
from st_moe.data.downstream.example import AnswerTask, Example
from st_moe.data.sources import reading
from st_moe.errors import UserError, did_you_mean

_TASKS = {task.name: task for task in superglue.TASKS}
# Mixtures, each of its tasks in proportion to its examples.
_MIXTURES = {'superglue': tuple(task.name for task in superglue.TASKS)}
_FILES = {
  'train': ('train.jsonl',),
  'validation': ('val.jsonl', 'dev.jsonl', 'validation.jsonl'),
  'test': ('test.jsonl',),
}


def names() -> list[str]:
  """Returns the names of all tasks and mixtures."""
  return [*_MIXTURES, *_TASKS]


def is_answer_task(name: str) -> bool:
  """Whether it is a task with answers, or a mixture of them."""
  return name in _TASKS or name in _MIXTURES


def expand(name: str) -> tuple[str, ...]:
  """Returns the tasks of a mixture; a task is itself."""
  return _MIXTURES.get(name, (name,))


def find_task(name: str) -> AnswerTask:
  """Returns a task by its name.

  Raises:
    UserError: there is none, with the nearest names.
  """
  if name not in _TASKS:
    raise UserError(
      f'there is no task with answers {name!r}{did_you_mean(name, names())}'
    )
  return _TASKS[name]


def find_file(name: str, split: str, config: DataConfig) -> Path:
  """Returns the file that a split of a task is read from.

  Raises:
    UserError: there is none, or no such split.
  """
  task = _TASKS[name]
  if config.task_dir is None:
    raise UserError(
      f'task {task.name!r} needs DataConfig.task_dir, the folder with '
      f'{task.folder}/{_FILES["train"][0]}'
    )
  if split not in _FILES:
    raise UserError(
      f'task {task.name!r} has no split {split!r} (it has {", ".join(_FILES)})'
    )
  root = Path(config.task_dir).expanduser()
  if not root.is_dir():
    raise UserError(f'DataConfig.task_dir: there is no folder {root}')
  benchmark = task.name.partition('.')[0]
  for folder in (root, root / benchmark):
    for file in _FILES[split]:
      path = folder / task.folder / file
      if path.is_file():
        return path
  raise UserError(
    f'task {task.name!r}: there is no {task.folder}/{_FILES[split][0]} in '
    f'{root}, nor in its folder {benchmark}; unpack the published archive '
    'there, or set DataConfig.task_dir'
  )


def load_examples(
  name: str, split: str, config: DataConfig, *, train: bool | None = None
) -> list[Example]:
  """Returns the examples of a task in the order of its file.

  Args:
    name: of the task.
    split: 'train', 'validation' or 'test'.
    config: says where the files are.
    train: whether they are to be trained on: then a false WSC row gives none,
      ReCoRD one for each answer, and all must have labels. None: whether the
      split is 'train'.

  Raises:
    UserError: a missing file, a line that is no row of the task, no example.
  """
  path = find_file(name, split, config).resolve()
  with reading(path):
    stat = path.stat()
  if train is None:
    train = split == 'train'
  return _read(name, path, train, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=32)
def _read(name: str, path: Path, train: bool, version: Any) -> list[Example]:
  """Reads a file; `version` tells a changed file from the one before."""
  task, examples = _TASKS[name], []
  shown = f'{path.parent.name}/{path.name}'
  with reading(path), path.open('rb') as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        where = f'{shown}:{number}'
        examples += task.examples(_row(line, where), where, train)
  if not examples:
    raise UserError(f'{path}: no example of {name}; is the file whole?')
  return examples


def _row(line: bytes, where: str) -> Mapping[str, Any]:
  try:
    row = json.loads(line)
  except (ValueError, UnicodeDecodeError) as error:
    raise UserError(
      f'{where}: not JSON ({error}); fix or remove the line'
    ) from None
  if not isinstance(row, dict):
    raise UserError(f'{where}: not a JSON object; one row a line is expected')
  return row
