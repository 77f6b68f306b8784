"""SuperGLUE's submission files: what its server takes for each task.

A file of JSON lines for each task, unlabelled test examples by their published
numbers. Labels are words where the published files have words: BoolQ and WiC
"true" and "false", WSC "True" and "False", COPA numbers, MultiRC numbers under
its passages and questions, ReCoRD texts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from st_moe.data.downstream.example import INVALID, Answer, Example
from st_moe.errors import UserError

_LOWER = ('false', 'true')
_CAPITAL = ('False', 'True')
_ENTAILMENT = ('entailment', 'not_entailment')

Rows = list[dict[str, Any]]


def _labels(
  words: Sequence[Any],
) -> Callable[[Sequence[Answer], Sequence[Example]], Rows]:
  def rows(answers: Sequence[Answer], examples: Sequence[Example]) -> Rows:
    return [
      {'idx': example.idx, 'label': words[_valid(answer)]}
      for answer, example in zip(answers, examples, strict=True)
    ]

  return rows


def _record(answers: Sequence[Answer], examples: Sequence[Example]) -> Rows:
  return [
    {'idx': example.idx['query'], 'label': answer}
    for answer, example in zip(answers, examples, strict=True)
  ]


def _multirc(answers: Sequence[Answer], examples: Sequence[Example]) -> Rows:
  passages: dict[Any, dict[Any, list[dict[str, Any]]]] = {}
  for answer, example in zip(answers, examples, strict=True):
    idx = example.idx
    questions = passages.setdefault(idx['paragraph'], {})
    questions.setdefault(idx['question'], []).append(
      {'idx': idx['answer'], 'label': _valid(answer)}
    )
  return [
    {
      'idx': passage,
      'passage': {
        'questions': [
          {'idx': question, 'answers': labels}
          for question, labels in questions.items()
        ]
      },
    }
    for passage, questions in passages.items()
  ]


def _valid(answer: Answer) -> int:
  """A text that is no label is sent as the first one."""
  return 0 if answer == INVALID else int(answer)


_TASKS: Mapping[str, tuple[str, Callable[..., Rows]]] = {
  'superglue.boolq': ('BoolQ', _labels(_LOWER)),
  'superglue.cb': ('CB', _labels(('entailment', 'contradiction', 'neutral'))),
  'superglue.copa': ('COPA', _labels((0, 1))),
  'superglue.multirc': ('MultiRC', _multirc),
  'superglue.record': ('ReCoRD', _record),
  'superglue.rte': ('RTE', _labels(_ENTAILMENT)),
  'superglue.wic': ('WiC', _labels(_LOWER)),
  'superglue.wsc': ('WSC', _labels(_CAPITAL)),
  'superglue.axb': ('AX-b', _labels(_ENTAILMENT)),
  'superglue.axg': ('AX-g', _labels(_ENTAILMENT)),
}


def missing(names: Sequence[str]) -> list[str]:
  """Returns the files of a whole submission that these tasks do not fill."""
  return [file for task, (file, _) in _TASKS.items() if task not in names]


def check(name: str, examples: Sequence[Example]) -> None:
  """Refuses what cannot be submitted.

  Raises:
    UserError: a task that is none of SuperGLUE's, or examples without the
      numbers by which the server knows them.
  """
  if name not in _TASKS:
    raise UserError(
      f'{name} has no submission file: SuperGLUE takes {", ".join(_TASKS)}'
    )
  for example in examples:
    numbers = example.idx
    parts = numbers.values() if isinstance(numbers, dict) else [numbers]
    if None in parts:
      raise UserError(
        f"{name}: a row has no 'idx', by which SuperGLUE knows it; take the "
        'published file'
      )


def write(
  folder: Path,
  name: str,
  answers: Sequence[Answer],
  examples: Sequence[Example],
) -> Path:
  """Writes the file of one task.

  Args:
    folder: that is there.
    name: of the task, checked.
    answers: as the task reads them; an invalid one is sent as the first label.
    examples: in the order of the published file.
  """
  file, rows = _TASKS[name]
  path = folder / f'{file}.jsonl'
  lines = (json.dumps(row) + '\n' for row in rows(answers, examples))
  path.write_text(''.join(lines), encoding='utf-8')
  return path
