"""Tasks with answers by name, and reading their examples.

`DataConfig.task_dir` is the folder in which the published archives were
unpacked: the files of CB are `CB/train.jsonl` and `CB/val.jsonl` there, or in
the folder `superglue` within it; or it is the folder `CB` itself. Without it
rows are read from `DataConfig.tfds_data_dir`, where tfds has prepared them.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from st_moe.config import DataConfig
from st_moe.data import prepared
from st_moe.data.downstream import (
  glue,
  pronouns,
  question_answering,
  reasoning,
  summaries,
  superglue,
)
from st_moe.data.downstream.example import AnswerTask, Example
from st_moe.data.downstream.published import Rows
from st_moe.data.sources import reading
from st_moe.errors import UserError, did_you_mean

_TASKS = {
  task.name: task
  for task in (
    *superglue.TASKS,
    *superglue.DIAGNOSTICS,
    pronouns.DPR,
    *glue.TASKS,
    question_answering.SQUAD_V2,
    *reasoning.ANLI,
    reasoning.WINOGRANDE,
    *reasoning.ARC,
    summaries.XSUM,
    summaries.CNN_DAILYMAIL,
    question_answering.NATURAL_QUESTIONS,
    question_answering.WEB_QUESTIONS,
    question_answering.TRIVIA_QA,
  )
}
# Each of its tasks in proportion to its examples. Of those, some are only
# trained on, or only scored: they have no other split.
_MIXTURES = {
  'superglue': tuple(task.name for task in superglue.TASKS),
  # super_glue_v102_proportional (t5/data/mixtures.py), without AX-b and AX-g,
  # whose weight is 0 there.
  'superglue_t5': (
    pronouns.DPR.name,
    *(task.name for task in superglue.TASKS),
  ),
  # Without WNLI, as T5's, and BERT's average: its development set contradicts
  # its training data.
  'glue': tuple(t.name for t in glue.TASKS if t.name != 'glue.wnli'),
  'anli': tuple(task.name for task in reasoning.ANLI),
  'arc': tuple(task.name for task in reasoning.ARC),
}
_UNCAPPED = ('superglue_t5',)
# What is scored as two tasks, and counts as one in means, as in GLUE's average.
_COUNTED_AS = {
  'glue.mnli_matched': 'glue.mnli',
  'glue.mnli_mismatched': 'glue.mnli',
}
_SCORED_SPLIT = 'validation'


def names() -> list[str]:
  """Returns the names of all tasks and mixtures."""
  return [*_MIXTURES, *_TASKS]


def is_answer_task(name: str) -> bool:
  """Whether it is a task with answers, or a mixture of them."""
  return name in _TASKS or name in _MIXTURES


def split_names(task: str) -> list[str]:
  """Returns the names in a `DataConfig.task`, without their rates."""
  return [part.partition(':')[0].strip() for part in task.split(',')]


def split_rates(task: str) -> list[tuple[str, float | None]]:
  """Returns the names in a `DataConfig.task` and their rates, None if not said.

  Raises:
    UserError: for what is no name and no name with a rate above 0.
  """
  parts = []
  for text in map(str.strip, task.split(',')):
    name, colon, rate = text.partition(':')
    try:
      value = float(rate) if colon else None
    except ValueError:
      value = 0.0
    if not name or (value is not None and not 0 < value < float('inf')):
      raise UserError(
        f'{text!r} is no part of a mixture: DataConfig.task takes '
        "'task' or 'task:rate', the rate above 0, for example "
        "'docstrings:1,text:3'"
      )
    parts.append((name.strip(), value))
  return parts


def members(name: str) -> tuple[str, ...]:
  """Returns all tasks of a mixture; a task is itself."""
  return _MIXTURES.get(name, (name,))


def expand(name: str) -> tuple[str, ...]:
  """Returns the tasks of a mixture that are scored; a task is itself.

  DPR, which has no validation split, is there to train WSC.
  """
  if name not in _MIXTURES:
    return (name,)
  return tuple(
    task for task in members(name) if _SCORED_SPLIT in _TASKS[task].files.names
  )


def mean_score(scores: Mapping[str, float]) -> float:
  """Returns the mean over tasks, by the rule of GLUE and SuperGLUE.

  Every task counts alike; both development sets of MNLI are one, with the mean
  of their scores.

  Args:
    scores: by name of the task; one with two metrics has their mean.
  """
  tasks: dict[str, list[float]] = {}
  for name, score in scores.items():
    tasks.setdefault(_COUNTED_AS.get(name, name), []).append(score)
  means = [sum(one) / len(one) for one in tasks.values()]
  return sum(means) / len(means)


def count_tasks(names: Iterable[str]) -> int:
  """Returns how many tasks these are to `mean_score`."""
  return len({_COUNTED_AS.get(name, name) for name in names})


def is_capped(name: str) -> bool:
  """Whether `max_examples_per_task` bounds what counts in a mixture."""
  return name not in _UNCAPPED


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


def splits(name: str, config: DataConfig) -> tuple[str, ...]:
  """Returns which splits of a task are read: to train on, and held out.

  Both where it is all of `config.task`; in a mixture those that it has.
  """
  wanted = (config.train_split, config.eval_split)
  if config.task.partition(':')[0].strip() == name:
    return wanted
  has = find_task(name).files.names
  return tuple(split for split in wanted if split in has) or wanted


def find_file(name: str, split: str, config: DataConfig) -> Path:
  """Returns the file that a split of a task is read from.

  Raises:
    UserError: there is none, or no such split.
  """
  files = find_task(name).files
  _check_split(name, split)
  root = Path(config.task_dir or '').expanduser()
  if not root.is_dir():
    raise UserError(
      f'DataConfig.task_dir: there is no folder {root} (from {Path.cwd()}); '
      'say where the files are: --gin.DataConfig.task_dir=FOLDER'
    )
  benchmark = name.partition('.')[0]

  def find(split: str) -> Path | None:
    return files.find(root, split) or files.find(root / benchmark, split)

  path = find(split)
  if path is not None:
    return path
  others = [other for other in files.names if find(other)]
  raise UserError(
    f'task {name!r}: there is no {files.folders[0]}/{files.names[split][0]} '
    f'in {root}, nor in its folder {benchmark}; unpack the published archive '
    'there, or set DataConfig.task_dir'
    + (
      f'; or take a split that is there ({", ".join(others)}), with '
      'DataConfig.train_split and eval_split and EvaluationConfig.split'
      if others
      else ''
    )
  )


def load_examples(
  name: str, split: str, config: DataConfig, *, train: bool | None = None
) -> list[Example]:
  """Returns the examples of a task in the order of its file.

  Args:
    name: of the task.
    split: 'train', 'validation' or 'test'.
    config: says where the files are; without `task_dir` the rows are tfds',
      in `tfds_data_dir`.
    train: whether they are to be trained on: then a false WSC row gives none,
      ReCoRD one for each answer, and all must have labels. None: whether the
      split is the one to train on.

  Raises:
    UserError: a missing file, a line that is no row of the task, no example.
  """
  if train is None:
    train = split == config.train_split
  if config.task_dir is not None:
    path = find_file(name, split, config).resolve()
    with reading(path):
      stat = path.stat()
    version = (stat.st_size, stat.st_mtime_ns)
    return _read_file(name, path, split, train, version)
  task = find_task(name)
  _check_split(name, split)
  wanted = f'{task.files.folders[0]}/{task.files.names[split][0]}'
  if config.tfds_data_dir is None:
    raise UserError(
      f'task {name!r} needs DataConfig.task_dir, the folder with {wanted}, or '
      f'DataConfig.tfds_data_dir with {task.prepared.dataset}'
    )
  version = prepared.tfds_version(
    name,
    task.prepared.dataset,
    config,
    f'DataConfig.task_dir to the folder with {wanted}',
  )
  return _read_tfds(name, config.tfds_data_dir, version, split, train)


def _check_split(name: str, split: str) -> None:
  has = find_task(name).files.names
  if split not in has:
    raise UserError(
      f'task {name!r} has no split {split!r} (it has {", ".join(has)}); set '
      'DataConfig.train_split and eval_split, or EvaluationConfig.split'
    )


@functools.lru_cache(maxsize=32)
def _read_file(
  name: str, path: Path, split: str, train: bool, version: Any
) -> list[Example]:
  """Reads a file; `version` tells a changed file from the one before."""
  task = _TASKS[name]
  return _examples(task, task.files.rows(path, split), train, str(path))


@functools.lru_cache(maxsize=32)
def _read_tfds(
  name: str, root: str, version: str, split: str, train: bool
) -> list[Example]:
  """Reads what tfds prepared."""
  task = _TASKS[name]
  dataset = task.prepared.dataset
  found = prepared.rows(
    name,
    dataset,
    version,
    task.prepared.splits.get(split, split),
    DataConfig(tfds_data_dir=root),
  )
  rows = ((where, task.prepared.row(row)) for where, row in found)
  return _examples(task, rows, train, f'{root}/{dataset}/{version}')


def _examples(
  task: AnswerTask, rows: Rows, train: bool, source: str
) -> list[Example]:
  examples = [
    example
    for where, row in rows
    for example in task.examples(row, where, train)
  ]
  if not examples:
    raise UserError(f'{source}: no example of {task.name}; is it whole?')
  return examples
