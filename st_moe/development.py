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
from st_moe.evaluate import outputs
from st_moe.evaluate.tasks import TaskResult, TaskScores
from st_moe.tables import print_table
from st_moe.workdir import read_json, write_json


def lines(scores: TaskScores) -> list[list[str]]:
  """Returns the parts of a line for each task, and for each mixture."""
  found = [_line(name, result) for name, result in scores.results.items()]
  means = {name: scores.mean(tasks) for name, tasks in scores.mixtures.items()}
  if len(scores.results) > 1 and not means:
    means = {'all': scores.mean(list(scores.results))}
  for name, mean in means.items():
    if mean is not None:
      found.append([f'{name}:', f'mean of tasks {mean:.2f}'])
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
  record['mixtures'] = {name: list(t) for name, t in scores.mixtures.items()}
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
  for name, tasks in _means(scores).items():
    if f'eval/{name}' in scores:
      bars = [scores['tasks'][task]['majority'] for task in tasks]
      constant = ''
      if None not in bars:
        constant = f'{sum(one["score"] for one in bars) / len(bars):.2f}'
      value = f'{scores[f"eval/{name}"]:.2f}'
      shown = name.removesuffix('/score').replace('score', 'all')
      rows.append([shown, '', f'mean of {len(tasks)}', value, constant])
  print_table(
    Console(highlight=False),
    f'development scores at step {scores["step"]}, from 0 to 100, and those of '
    'the best constant answer',
    ['task', 'examples', 'metric', 'model', 'constant'],
    rows,
  )


def _means(scores: Mapping[str, Any]) -> dict[str, list[str]]:
  """Returns the tasks of each mean that is shown, by its scalar's name."""
  mixtures = scores['mixtures']
  if mixtures:
    return {f'{name}/score': tasks for name, tasks in mixtures.items()}
  tasks = list(scores['tasks'])
  return {'score': tasks} if len(tasks) > 1 else {}
