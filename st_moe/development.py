"""Development sets of tasks with answers, while a run trains.

At each evaluation a line for each task; what the best step answered, in the
folder `best_answers` of the work directory: `TASK.jsonl` with every example,
and `scores.json`, written last.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from st_moe.best import ANSWERS_FOLDER
from st_moe.data.downstream import catalog
from st_moe.evaluate import outputs
from st_moe.evaluate.tasks import TaskResult, TaskScores
from st_moe.tables import print_table
from st_moe.workdir import read_json, write_json


def lines(scores: TaskScores) -> list[list[str]]:
  """Returns the parts of a line for each task, and for each mixture."""
  found = [_line(name, result) for name, result in scores.results.items()]
  for mean in _means(scores):
    words = f'mean of {mean["tasks"]} tasks {mean["score"]:.2f}'
    if mean['constant'] is not None:
      words += f' (constant {mean["constant"]:.2f})'
    found.append([f'{mean["name"]}:', words])
  return found


def _means(scores: TaskScores) -> list[dict[str, Any]]:
  """Returns the mean scores that are shown: of mixtures, else of all tasks.

  Each has a name, the scalar that it is, how many tasks, the mean of their
  scores and of their constant answers' (None where one has none).
  """
  groups = {name: f'eval/{name}/score' for name in scores.mixtures}
  members = dict(scores.mixtures)
  if len(scores.results) > 1 and not groups:
    groups, members = {'all': 'eval/score'}, {'all': tuple(scores.results)}
  found = []
  for name, scalar in groups.items():
    value = scores.mean(members[name])
    if value is not None:
      found.append(
        {
          'name': name,
          'scalar': scalar,
          'tasks': catalog.count_tasks(members[name]),
          'score': value,
          'constant': scores.constant_mean(members[name]),
        }
      )
  return found


def _line(name: str, result: TaskResult) -> list[str]:
  if not result.metrics:
    return [f'{name}:', 'no labels']
  best = result.majority
  parts = [
    f'{metric} {value:.2f}'
    + (f' (constant {best.metrics[metric]:.2f})' if best is not None else '')
    for metric, value in result.metrics.items()
  ]
  if result.no_answers:
    parts.append(f'no answer {result.no_answers:,}/{len(result.texts):,}')
  return [f'{name}:', *parts]


def write_answers(workdir: Path, scores: TaskScores, step: int) -> None:
  """Writes what the parameters of a step answered, in place of an older one.

  Args:
    workdir: of the run.
    scores: of its development sets.
    step: whose parameters.
  """
  folder = workdir / ANSWERS_FOLDER
  folder.mkdir(exist_ok=True)
  record = outputs.record(scores, step)
  for name, result in scores.results.items():
    path = folder / f'{name}.jsonl'
    temporary = path.with_name(f'{path.name}.tmp')
    with temporary.open('w', encoding='utf-8') as file:
      for row in outputs.answer_rows(result):
        file.write(json.dumps(row, ensure_ascii=False) + '\n')
    os.replace(temporary, path)
    record['tasks'][name]['labels'] = _labels(result)
  record['means'] = _means(scores)
  write_json(folder / 'scores.json', record)


def _labels(result: TaskResult) -> list[str]:
  """Returns the names of the labels of a classification, [] of other tasks."""
  if any(example.label is None for example in result.examples):
    return []
  choices = {example.choices for example in result.examples}
  if choices == {()}:  # WSC: whether what was written names the referent
    return ['another', 'the referent']
  return list(choices.pop()) if len(choices) == 1 else []


def read_scores(workdir: Path) -> dict[str, Any] | None:
  """Returns scores.json of the best step's answers, None without tasks."""
  path = workdir / ANSWERS_FOLDER / 'scores.json'
  return read_json(path) if path.is_file() else None


def print_scores(scores: Mapping[str, Any]) -> None:
  """Prints a table: the metrics of each task beside the best constant answer.

  Args:
    scores: from `read_scores`.
  """
  rows = []
  for name, task in scores['tasks'].items():
    head, best = [name, f'{task["examples"]:,}'], task['majority']
    for metric, value in task['metrics'].items():
      constant = '' if best is None else f'{best["metrics"][metric]:.2f}'
      rows.append([*head, metric, f'{value:.2f}', constant])
      head = ['', '']
  for mean in scores['means']:
    constant = '' if mean['constant'] is None else f'{mean["constant"]:.2f}'
    words = f'mean of {mean["tasks"]}'
    rows.append([mean['name'], '', words, f'{mean["score"]:.2f}', constant])
  print_table(
    Console(highlight=False),
    f'development scores at step {scores["step"]} and the best constant '
    'answer, 0 to 100:',
    ['task', 'examples', 'metric', 'model', 'constant'],
    rows,
  )
