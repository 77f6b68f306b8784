"""One example of a task with answers, and what a task is."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# What was read from a model's text: the index of a choice, -1 for a text that
# is none of them; or the text itself where an answer is free.
Answer = int | str

INVALID = -1


@dataclasses.dataclass(frozen=True)
class Example:
  """Text to text, and what scoring needs to know.

  Attributes:
    inputs: what the model reads.
    targets: what it is trained to write; '<unk>' without a label (T5).
    choices: the texts among which one is right, in the order of the labels;
      () where an answer is free.
    label: index of the right choice; None: free, or not known.
    answers: every text that counts as right where an answer is free.
    group: examples that are scored together (a question of MultiRC).
    idx: as published: an int, a text, or a dict of them.
    extra: anything else that reading the answer needs (the referent of WSC).
  """

  inputs: str
  targets: str
  choices: tuple[str, ...] = ()
  label: int | None = None
  answers: tuple[str, ...] = ()
  group: str = ''
  idx: Any = None
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def labelled(self) -> bool:
    """Whether it can be scored."""
    return self.label is not None or bool(self.answers)


@dataclasses.dataclass(frozen=True)
class TfdsPlace:
  """Where tfds has a task: 'super_glue/cb', and its split for each of ours."""

  name: str
  splits: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class AnswerTask:
  """A task with answers.

  Attributes:
    name: 'superglue.cb'.
    files: for 'train', 'validation', 'test': paths below
      `DataConfig.task_dir`, the first that exists is read.
    tfds: where tfds has it; None: nowhere.
    examples: makes examples of a row (JSON object or tfds example), given where
      it stands ('CB/train.jsonl:3') and whether they are to be trained on. A
      row may give none (WSC's false ones in training) or many (MultiRC).
    read_answer: what a model's text says, given its example.
    score: metrics on a scale of 0 to 100, by name, of answers to examples.
    main_metrics: their mean is the task's score.
  """

  name: str
  files: Mapping[str, tuple[str, ...]]
  tfds: TfdsPlace | None
  examples: Callable[[Mapping[str, Any], str, bool], list[Example]]
  read_answer: Callable[[str, Example], Answer]
  score: Callable[[Sequence[Answer], Sequence[Example]], dict[str, float]]
  main_metrics: tuple[str, ...]
