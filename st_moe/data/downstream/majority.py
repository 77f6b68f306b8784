"""The best that one answer to everything can score: a bar for every model."""

import collections
import dataclasses
from collections.abc import Sequence

from st_moe.data.downstream.example import Answer, AnswerTask, Example

# Of free answers the most frequent ones are tried, if they are short: a summary
# of one text says nothing of another.
_MOST_TRIED = 3
_MOST_WORDS = 8


@dataclasses.dataclass(frozen=True)
class Majority:
  """One answer to all examples, and what it scores.

  Attributes:
    answer: index of a choice, or a text.
    metrics: the task's own, by name, from 0 to 100.
    score: their mean, as the task's.
  """

  answer: Answer
  metrics: dict[str, float]
  score: float


def majority(task: AnswerTask, examples: Sequence[Example]) -> Majority | None:
  """Returns the constant answer with the highest score on these examples.

  Every label that they have is tried: the best need not be the most frequent
  one (MultiRC's F1 counts "true" alone). Of free answers, the most frequent
  short ones, and none at all.

  Args:
    task: says how answers are scored.
    examples: those without a label are left out.

  Returns:
    None: there are no labels.
  """
  labelled = [example for example in examples if example.labelled]
  answers = _constants(labelled)
  found = [
    Majority(answer, metrics, task.score(metrics))
    for answer in answers
    for metrics in [task.metrics([answer] * len(labelled), labelled)]
  ]
  return max(found, key=lambda one: one.score) if found else None


def _constants(examples: Sequence[Example]) -> list[Answer]:
  """Returns answers worth trying, in a fixed order."""
  labels = {example.label for example in examples if example.label is not None}
  if labels:
    return sorted(labels)
  counts = collections.Counter(
    answer
    for example in examples
    for answer in set(example.answers)
    if len(answer.split()) <= _MOST_WORDS
  )
  often = sorted(counts, key=lambda answer: (-counts[answer], answer))
  return [*often[:_MOST_TRIED], ''] if examples else []
