"""Log lines that are a function of the run, not of its interruptions."""

import logging
import math
import time
from typing import Any

import jax
import numpy as np

from st_moe import metrics
from st_moe.alarms import Alarms
from st_moe.config import RunConfig
from st_moe.errors import RunStopped

log = logging.getLogger(__name__)


class StepLog:
  """Turns the results of steps into log lines.

  Results are read one step late, so that the device never waits for the host.
  The scalars of the unfinished interval are saved with a checkpoint: a resumed
  run writes the very lines that an unbroken one would have written.
  """

  def __init__(
    self,
    config: RunConfig,
    writer: metrics.MetricsWriter,
    progress: metrics.Progress,
    rows: list[dict[str, float]],
    alarms: Alarms,
  ):
    self.rows = rows  # scalars of the steps since the last log line
    self._config = config
    self._writer = writer
    self._progress = progress
    self._alarms = alarms
    self._pending: list[tuple[int, Any, dict[str, np.ndarray]]] = []
    self._restart_clock()

  def _restart_clock(self) -> None:
    self._started: float | None = None
    self._tokens = 0.0
    self._waited = 0.0

  def add(
    self,
    step: int,
    result: dict[str, Any],
    waited: float,
    batch: dict[str, np.ndarray],
  ) -> None:
    """Takes the result of a dispatched step; finishes those before it.

    Args:
      step: steps done, this one included.
      result: of the training step; arrays still being computed.
      waited: seconds the step waited for data.
      batch: this process's rows of it.

    Raises:
      RunStopped: after too many non-finite steps in a row.
    """
    self._waited += waited
    self._pending.append((step, result, batch))
    while len(self._pending) > 1:
      self._finish(*self._pending.pop(0))
    if self._is_logged(step):
      self.flush()

  def flush(self) -> None:
    """Finishes every step that was added."""
    while self._pending:
      self._finish(*self._pending.pop(0))

  def pause(self) -> None:
    """Leaves what follows (evaluation, saving) out of the step time."""
    self.flush()
    self._restart_clock()

  def _finish(
    self, step: int, result: dict[str, Any], batch: dict[str, np.ndarray]
  ) -> None:
    result = jax.device_get(result)
    router = result.pop('router')
    row = {key: float(value) for key, value in result.items()}
    self.rows.append(row)
    now = time.monotonic()
    if self._started is None:  # the first step pays for compiling
      self._started, self._waited = now, 0.0
      self._progress.begin(step)
    else:
      self._tokens += row['tokens']
    self._alarms.add(step, row, router, batch)
    if row['nonfinite_steps']:
      self._warn(step, row)
    if self._is_logged(step):
      self._write(step, router, now)

  def _is_logged(self, step: int) -> bool:
    return step % self._config.log_every == 0 or step == self._config.steps

  def _warn(self, step: int, row: dict[str, float]) -> None:
    in_a_row = int(row['nonfinite_steps'])
    limit = self._config.max_nonfinite_steps
    log.warning(
      'step %d: loss %s, gradient norm %s: step skipped, state unchanged '
      '(%d in a row, the run stops at %d)',
      step,
      row['loss'],
      row['gradient_norm'],
      in_a_row,
      limit,
    )
    if in_a_row >= limit:
      raise RunStopped(
        f'{in_a_row} steps in a row up to step {step} had a loss or gradients '
        'that are not finite; lower OptimizerConfig.learning_rate or look at '
        'metrics.jsonl, then start again to go on from the last checkpoint'
      )

  def _write(self, step: int, router: Any, now: float) -> None:
    health = metrics.router_health(router, self._config.model)
    self._writer.write(
      step, interval_means(self.rows) | health.scalars, health.arrays
    )
    seconds = now - self._started
    speed = {}
    if self._tokens and seconds > 0:
      speed = {
        'tokens_per_second': self._tokens / seconds,
        'data_wait_fraction': self._waited / seconds,
      }
      self._writer.write(step, speed)  # apart: differs from run to run
    self._progress.update(step, interval_means(self.rows) | speed, health)
    self.rows.clear()
    # Writing is left out of the step time: the first time it loads a library.
    self._started, self._tokens, self._waited = time.monotonic(), 0.0, 0.0


# Counters and settings, of which a log line shows the latest value.
_LATEST = ('learning_rate', 'nonfinite_steps', 'skipped_steps')


def interval_means(rows: list[dict[str, float]]) -> dict[str, float]:
  """Returns the mean of each scalar over its finite values."""
  means = {}
  for key in rows[-1]:
    values = [row[key] for row in rows if math.isfinite(row[key])]
    if key in _LATEST:
      means[key] = rows[-1][key]
    else:
      means[key] = float(np.mean(values)) if values else math.nan
  return means
