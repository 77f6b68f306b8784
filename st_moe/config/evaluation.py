"""How tasks with answers are scored."""

import dataclasses
from typing import Literal

from st_moe.checks import Checked


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Checked):
  """Scoring of tasks with answers by their own metrics."""

  # Tasks with answers or mixtures of them ('superglue.cb', 'superglue'); ():
  # those of DataConfig.task.
  tasks: tuple[str, ...] | str = ()
  split: str = 'validation'
  # 'generate' writes text and reads the answer from it, as T5 does. 'rank'
  # takes the likeliest of the choices that an example has; examples without
  # choices (WSC) are generated.
  method: Literal['generate', 'rank'] = 'generate'
  # Of what is generated. 1: the likeliest token, again and again. Above: beam
  # search, whose log-likelihoods are divided by length ** length_penalty.
  num_beams: int = 1
  length_penalty: float = 1.0
  # When a search ends, as in transformers: False: when no unfinished text is
  # better; True: when there are num_beams finished ones; 'never': when none
  # can become better.
  early_stopping: bool | Literal['never'] = False
  batch_size: int | None = None  # None: RunConfig.batch_size
  max_examples: int | None = None  # of each task, its first; None: all

  def check(self) -> None:
    self.require_positive('num_beams batch_size max_examples')
    self.require(
      self.num_beams > 1 or self.early_stopping is False,
      f'early_stopping {self.early_stopping!r} ends a search, and num_beams is '
      '1; to end a run that gets no better set RunConfig.early_stopping',
    )

  @property
  def task_names(self) -> tuple[str, ...]:
    """The names of `tasks`; a text may name several, with commas."""
    names = self.tasks
    if isinstance(names, str):
      names = tuple(name.strip() for name in names.split(','))
    return tuple(name for name in names if name)
