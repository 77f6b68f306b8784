"""The best step of a run: by which score, which it is, and when to stop.

The score is one of an evaluation's, by its name in `metrics.jsonl`. Of equal
scores, of which small development sets have many, that with the lower held-out
loss is the best, then the earliest: before a model has learned the form of an
answer all its scores are 0. Scores are kept with each checkpoint; which of
those on disk is the best is read from there (`find_best`), so that it holds
after a kill, a damaged file or a save that failed. `best.json` in the work
directory says which score decides, and is what a person reads.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from st_moe.errors import UserError, did_you_mean

BEST_FILE = 'best.json'
# What the best step answered to tasks with answers; see development.py.
ANSWERS_FOLDER = 'best_answers'
_LOSS = 'eval/loss'
# Which checkpoint of several: a number of steps, the best, or the newest.
Step = int | Literal['best'] | None


def rank(metric: str, scores: Mapping[str, float | None], step: int) -> tuple:
  """Returns what the best step has most of; to be compared.

  Losses count downward, all else upward. A score that is missing or not
  finite is the worst. The held-out loss decides between equal ones.

  Args:
    metric: name of the score that decides.
    scores: of an evaluation, by name.
    step: whose.
  """
  values = []
  for name in (metric, _LOSS):
    value = scores.get(name)
    if value is None or not math.isfinite(value):
      values.append(-math.inf)
    else:
      values.append(-value if name.endswith('loss') else value)
  return (*values, -step)


def choose_metric(name: str, measured: Sequence[str]) -> str:
  """Returns the score that decides, '' for none.

  Args:
    name: RunConfig.best_metric.
    measured: names of the scores that this run's evaluations have.

  Raises:
    UserError: when it is none of those.
  """
  if name == 'auto':
    return 'eval/score' if 'eval/score' in measured else _LOSS
  if name and name not in measured:
    raise UserError(
      f'RunConfig.best_metric {name!r} is no score of this run'
      f'{did_you_mean(name, measured)}; it has {", ".join(measured)}'
    )
  return name


@dataclasses.dataclass
class BestStep:
  """The best evaluation so far, and how many have passed since.

  Attributes:
    metric: the score that decides; '': none does.
    patience: evaluations without a better one that end the run; None: never.
    begin: step of the first evaluation that patience counts.
    step: of the best; None before there is one.
    value: its score.
    waited: evaluations since.
    loss: the held-out loss of the best; None: it has none.
  """

  metric: str
  patience: int | None = None
  begin: int = 0
  step: int | None = None
  value: float | None = None
  waited: int = 0
  loss: float | None = None

  def add(self, step: int, scores: Mapping[str, float]) -> bool:
    """Takes an evaluation; returns whether it is the best so far."""
    if not self.metric:
      return False
    new = rank(self.metric, scores, step)
    if self.step is not None:
      best = {_LOSS: self.loss, self.metric: self.value}
      old = rank(self.metric, best, self.step)
      if new <= old:
        self.waited += step >= self.begin
        return False
    elif math.isinf(new[0]):
      self.waited += step >= self.begin
      return False
    self.step, self.value, self.waited = step, float(scores[self.metric]), 0
    loss = scores.get(_LOSS)
    self.loss = loss if loss is not None and math.isfinite(loss) else None
    return True

  @property
  def over(self) -> bool:
    """Whether the run is to end."""
    return self.patience is not None and self.waited >= self.patience

  def why(self) -> str:
    """Returns why the run is over, in words."""
    if self.step is None:
      return f'{self.metric} was not finite in {self.waited} evaluations'
    return (
      f'{self.metric} has not been better than {self.value:.4f} at step '
      f'{self.step} in {self.waited} evaluations'
    )

  def record(self) -> dict[str, Any]:
    """Returns what best.json says."""
    return {'metric': self.metric, 'step': self.step, 'value': self.value}

  def state(self) -> dict[str, Any]:
    """Returns what a checkpoint keeps, ready for JSON."""
    return self.record() | {'waited': self.waited, 'loss': self.loss}

  def restore(self, state: Mapping[str, Any] | None, step: int) -> None:
    """Goes on from a step's `state()`, unless that was of another score."""
    if state and state['metric'] == self.metric:
      self.step, self.value = state['step'], state['value']
      self.loss = state.get('loss')
      self.waited = state['waited'] if step >= self.begin else 0


def scores_of(checkpoint: Path) -> dict[str, float]:
  """Returns the scores kept with a checkpoint, {} without an evaluation."""
  try:
    found = json.loads((checkpoint / 'metrics' / 'metrics').read_text())
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def find_best(directory: Path, steps: Sequence[int]) -> int:
  """Returns the step of the best checkpoint on disk.

  Args:
    directory: of the checkpoints; `best.json` lies beside it.
    steps: of those that are there.

  Raises:
    UserError: when nothing says which is the best.
  """
  path = directory.parent / BEST_FILE
  way_out = 'give a number of steps'
  if not path.is_file():
    raise UserError(
      f'{directory.parent} has no best step: it has no {BEST_FILE}, which a '
      f'run writes after an evaluation; {way_out} ({list(steps)})'
    )
  try:
    metric = json.loads(path.read_text())['metric']
  except (ValueError, TypeError, KeyError) as e:
    raise UserError(f'{path} is damaged; {way_out} ({list(steps)})') from e
  scores = {step: scores_of(directory / str(step)) for step in steps}
  scored = {step: own for step, own in scores.items() if metric in own}
  if not scored:
    raise UserError(
      f'no checkpoint in {directory} was scored by {metric}; {way_out} '
      f'({list(steps)})'
    )
  return max(scored, key=lambda step: rank(metric, scored[step], step))
