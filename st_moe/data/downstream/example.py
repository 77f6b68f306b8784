"""One example of a task with answers, and what a task is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


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
  """

  inputs: str
  targets: str
  choices: tuple[str, ...] = ()
  label: int | None = None
  answers: tuple[str, ...] = ()
  idx: Any = None


@dataclasses.dataclass(frozen=True)
class AnswerTask:
  """A task with answers.

  Attributes:
    name: 'superglue.cb'.
    folder: of its files in the published archive, 'CB'.
    examples: makes examples of a row, given where it stands
      ('CB/train.jsonl:3') and whether they are to be trained on. A row may
      give none (WSC's false ones in training) or many (MultiRC).
  """

  name: str
  folder: str
  examples: Callable[[Mapping[str, Any], str, bool], list[Example]]
