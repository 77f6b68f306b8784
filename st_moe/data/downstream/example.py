"""One example of a task with answers, and what a task is."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from st_moe.data.downstream.published import Files

# What was read from a model's text: the index of a choice, -1 for a text that
# is none of them; or the text itself where an answer is free.
Answer = int | str

INVALID = -1


@dataclasses.dataclass(frozen=True)
class Example:
  """Text to text, and the answer that the text stands for.

  Attributes:
    inputs: what the model reads.
    targets: what it is trained to write; '<unk>' without a label (T5).
    choices: the texts among which one is right, in the order of the labels;
      the entities of ReCoRD; () where an answer is free.
    label: index of the right choice, or whether the answer is right (WSC);
      None: not known.
    answers: every text that counts as right where an answer is free.
    idx: as published: an int, or a dict of them.
    group: names examples that are scored together (the answers to a question
      of MultiRC, the answers of a query of ReCoRD, a pair of Winogender).
  """

  inputs: str
  targets: str
  choices: tuple[str, ...] = ()
  label: int | None = None
  answers: tuple[str, ...] = ()
  idx: Any = None
  group: str = ''

  @property
  def labelled(self) -> bool:
    """Whether it can be scored."""
    return self.label is not None or bool(self.answers)


def _as_it_is(row: Mapping[str, Any]) -> Mapping[str, Any]:
  return row


@dataclasses.dataclass(frozen=True)
class Prepared:
  """The same rows in tfds.

  Attributes:
    dataset: 'super_glue/cb'.
    splits: {split: what tfds calls it}; of others the names are the same.
    row: makes of one of tfds' rows, as plain Python values, what is published.
  """

  dataset: str
  splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
  row: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _as_it_is


@dataclasses.dataclass(frozen=True)
class AnswerTask:
  """A task with answers.

  Attributes:
    name: 'superglue.cb'.
    files: where its rows are published.
    prepared: where tfds has them.
    examples: makes examples of a row, given where it stands
      ('CB/train.jsonl:3') and whether they are to be trained on. A row may
      give none (WSC's false ones in training) or many (MultiRC).
    answer: what a model's text says, given its example.
    metrics: of answers to examples, by name, from 0 to 100.
    main_metrics: their mean is the task's score; (): all of them.
  """

  name: str
  files: Files
  prepared: Prepared
  examples: Callable[[Mapping[str, Any], str, bool], list[Example]]
  answer: Callable[[str, Example], Answer]
  metrics: Callable[[Sequence[Answer], Sequence[Example]], dict[str, float]]
  main_metrics: tuple[str, ...] = ()

  def score(self, metrics: Mapping[str, float]) -> float:
    """Returns the mean of the main metrics, as SuperGLUE averages them."""
    values = [metrics[name] for name in self.main_metrics or metrics]
    return sum(values) / len(values)
