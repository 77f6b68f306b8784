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
  batch_size: int | None = None  # None: RunConfig.batch_size
  max_examples: int | None = None  # of each task, its first; None: all

  def check(self) -> None:
    self.require_positive('num_beams batch_size max_examples')

  @property
  def task_names(self) -> tuple[str, ...]:
    """The names of `tasks`; a text may name several, with commas."""
    names = self.tasks
    if isinstance(names, str):
      names = tuple(name.strip() for name in names.split(','))
    return tuple(name for name in names if name)
