"""How tasks with answers are scored."""

import dataclasses
from typing import Literal

from st_moe.checks import Checked


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Checked):
  """Scoring by tasks' own metrics, while fine-tuning and by `evaluate`."""

  # Names of tasks with answers ('superglue.cb', 'superglue'); (): those of
  # DataConfig.task that have answers.
  tasks: tuple[str, ...] | str = ()
  split: str = 'validation'
  # 'generate' text and read the answer from it, as T5 does; 'rank' the choices
  # that an example has by their likelihood (examples without generate).
  method: Literal['generate', 'rank'] = 'generate'
  # 1: greedy. Above: beam search, scores divided by length ** length_penalty.
  num_beams: int = 1
  length_penalty: float = 1.0
  batch_size: int | None = None  # None: RunConfig.batch_size
  max_examples: int | None = None  # of each task, its first; None: all

  def check(self) -> None:
    self.require_positive('num_beams batch_size max_examples')
