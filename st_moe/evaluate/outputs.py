"""What the scoring of tasks leaves: a table, answers, files to be submitted."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from st_moe.data.downstream import catalog, submission
from st_moe.data.downstream.example import Answer, Example
from st_moe.errors import UserError
from st_moe.evaluate.tasks import TaskResult, TaskScores
from st_moe.tables import print_table
from st_moe.workdir import write_json

_FOLDER = 'evaluations'  # of a work directory
_COLUMNS = ('task', 'split', 'examples', 'no answer')


@dataclasses.dataclass(frozen=True)
class Folders:
  """Where the answers go.

  Attributes:
    workdir: of the model.
    output: for answers and scores; None: in `workdir`, by step and split.
    submission: for SuperGLUE's files; None: none are wanted.
  """

  workdir: Path
  output: Path | None
  submission: Path | None

  def check(self, examples: Mapping[str, Sequence[Example]]) -> None:
    """Makes the folders; refuses what cannot be written, before it is made.

    Args:
      examples: that will be answered, by task.

    Raises:
      UserError: naming the folder, or a task that cannot be submitted.
    """
    if self.submission is not None:
      for name, some in examples.items():
        submission.check(name, some)
      _make(self.submission, '--submission')
    _make(self.output or self.workdir / _FOLDER, '--output')

  def write(self, scores: TaskScores, record: dict[str, Any]) -> None:
    """Writes the answers, the scores and what is to be submitted."""
    splits = {result.split for result in scores.results.values()}
    folder = self.output
    if folder is None:
      name = f'step_{record["step"]}_{"_".join(sorted(splits))}'
      folder = _new(self.workdir / _FOLDER / name)
      _make(folder, '--output')
    for name, result in scores.results.items():
      path = folder / f'{name}.jsonl'
      with path.open('w', encoding='utf-8') as file:
        for row in answer_rows(result):
          file.write(json.dumps(row, ensure_ascii=False) + '\n')
    write_json(folder / 'scores.json', record)
    print(f'every answer, and the scores: {folder}')
    if self.submission is not None:
      self._submit(self.submission, scores)

  def _submit(self, folder: Path, scores: TaskScores) -> None:
    for name, result in scores.results.items():
      submission.write(folder, name, result.answers, result.examples)
    print(f'to be submitted, files of {len(scores.results)} task(s): {folder}')
    invalid = {n: r.no_answers for n, r in scores.results.items()}
    if any(invalid.values()):
      counts = ', '.join(f'{n} {c:,}' for n, c in invalid.items() if c)
      print(f'texts that are no label are sent as the first label: {counts}')
    if absent := submission.missing(list(scores.results)):
      print(f'a whole submission also has {", ".join(absent)}')


def _new(folder: Path) -> Path:
  """Returns the folder, or its name with a number that is not taken."""
  numbered = (
    folder.with_name(f'{folder.name}_{i}') for i in itertools.count(2)
  )
  return next(
    name for name in itertools.chain([folder], numbered) if not name.exists()
  )


def _make(folder: Path, flag: str) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / '.writable').touch()
    (folder / '.writable').unlink()
  except OSError as e:
    raise UserError(
      f'{folder} cannot be written ({e.strerror}); give another {flag}=DIR'
    ) from e


def answer_rows(result: TaskResult) -> Iterator[dict[str, Any]]:
  """Yields a row for each example: what was asked, wanted and answered."""
  for index, example in enumerate(result.examples):
    row: dict[str, Any] = {
      'idx': example.idx,
      'inputs': example.inputs,
      'targets': example.targets if example.labelled else None,
      'prediction': result.texts[index],
      'answer': result.answers[index],
      'score': result.example_score(index),
    }
    if example.label is not None:
      row['label'] = example.label
    if example.answers:
      row['answers'] = list(example.answers)
    if result.log_likelihoods[index]:
      likelihoods = zip(
        example.choices, result.log_likelihoods[index], strict=True
      )
      row['log_likelihoods'] = [list(pair) for pair in likelihoods]
    yield row


def record(scores: TaskScores, step: int) -> dict[str, Any]:
  """Returns all scores as plain values, ready for JSON."""
  tasks = {}
  for name, result in scores.results.items():
    tasks[name] = {
      'split': result.split,
      'examples': len(result.examples),
      'labelled': result.labelled,
      'metrics': result.metrics,
      'score': result.score,
      'no_answers': result.no_answers,
      'majority': (
        None if result.majority is None else vars(result.majority).copy()
      ),
    }
  return {'step': step, 'tasks': tasks} | scores.scalars()


def print_scores(scores: TaskScores, step: int, workdir: Path) -> None:
  """Prints a table: each metric beside that of the best constant answer."""
  rows: list[list[str]] = []
  for name, result in scores.results.items():
    rows += _rows(name, result)
  for name, tasks in scores.mixtures.items():
    rows.append(_mean_row(name, scores, tasks))
  if len(scores.results) > 1 and not scores.mixtures:
    rows.append(_mean_row('all', scores, list(scores.results)))
  print_table(
    Console(highlight=False),
    f'\nstep {step} of {workdir}, and the best constant answer; 0 to 100:',
    [*_COLUMNS, 'metric', 'model', 'constant', 'which is'],
    rows,
  )


def _rows(name: str, result: TaskResult) -> list[list[str]]:
  count, labelled = f'{len(result.examples):,}', result.labelled
  if 0 < labelled < len(result.examples):
    count = f'{labelled:,} of {count}'
  head = [name, result.split, count, f'{result.no_answers:,}']
  if not result.metrics:
    return [[*head, 'no labels', '', '', '']]
  best, rows = result.majority, []
  answer = '' if best is None else _shown(best.answer, result)
  for metric, value in result.metrics.items():
    constant = '' if best is None else f'{best.metrics[metric]:.2f}'
    rows.append([*head, metric, f'{value:.2f}', constant, answer])
    head, answer = [''] * len(head), ''
  return rows


def _shown(answer: Answer, result: TaskResult) -> str:
  """Returns a constant answer as the task writes it."""
  choices = result.examples[0].choices
  if isinstance(answer, str):
    return repr(answer)
  return choices[answer] if choices else str(bool(answer))  # WSC: is it right?


def _mean_row(name: str, scores: TaskScores, tasks: Sequence[str]) -> list[str]:
  means = (scores.mean(tasks), scores.constant_mean(tasks))
  shown = ['' if mean is None else f'{mean:.2f}' for mean in means]
  head = [name, *[''] * (len(_COLUMNS) - 1)]
  return [*head, f'mean of {catalog.count_tasks(tasks)}', *shown, '']
