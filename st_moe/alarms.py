"""Live health of routers in training: alarms, and a record of loss spikes.

`Alarms` looks at what every step returns anyway, on the host: nothing is
computed on devices, and no step is waited for. An alarm is one line when it
begins, and again only after its cause was away for a while.

When a loss spikes or is not finite, the router statistics and the batches of
the last steps go to `alarms/` in the work directory: `step_N.json` (why, and
the scalars of those steps) and `step_N.npz` with 'router/<stack>/<field of
RouterStats>' [steps, sparse layers, ...] and 'batch/<feature>' [steps, rows,
length], the token ids. Of several processes each writes the rows it read, all
but the first as `step_N.process_I.npz`.
"""

import collections
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from st_moe import metrics, processes
from st_moe.config import HealthConfig, ModelConfig
from st_moe.stacking import sparse_layers

log = logging.getLogger(__name__)

FOLDER = 'alarms'
_REST = 100  # steps without its cause before an alarm may come again
_ROOM = 1.1  # of experts in use beside those that a token takes
_LEAST_DEVIATION = 0.02  # nats; a loss that hardly moves has no spikes below
_MOST_RECORDS = 20  # of a run, so that a bad one does not fill the disk


class _Alarm:
  """A condition on an array of things, and for which of them it has lasted."""

  def __init__(self, patience: int):
    """Begins without alarm.

    Args:
      patience: steps in a row until it is one; 0: never.
    """
    self._patience = patience
    self._bad: np.ndarray | None = None  # steps in a row with the condition
    self._good: np.ndarray | None = None  # and without
    self._on: np.ndarray | None = None

  def add(self, condition: np.ndarray) -> np.ndarray:
    """Takes a step's condition; returns where an alarm begins."""
    if self._bad is None or self._bad.shape != condition.shape:
      self._bad = np.zeros(condition.shape, int)
      self._good = np.zeros(condition.shape, int)
      self._on = np.zeros(condition.shape, bool)
    self._bad = np.where(condition, self._bad + 1, 0)
    self._good = np.where(condition, 0, self._good + 1)
    self._on &= self._good < _REST
    begins = ~self._on & (self._bad >= self._patience) & bool(self._patience)
    self._on |= begins
    return begins

  def state(self) -> list[Any] | None:
    if self._bad is None:
      return None
    return [x.tolist() for x in (self._bad, self._good, self._on)]

  def restore(self, state: list[Any] | None) -> None:
    if state is not None:
      self._bad, self._good = np.array(state[0]), np.array(state[1])
      self._on = np.array(state[2], bool)


@dataclasses.dataclass(frozen=True)
class _Step:
  """What is kept of a step: all of it lies on the host."""

  step: int
  scalars: dict[str, float]
  router: dict[str, Any]
  batch: dict[str, np.ndarray]


class Alarms:
  """Looks at every step of a run; warns, and writes what led to a spike."""

  def __init__(self, config: HealthConfig, model: ModelConfig, workdir: Path):
    """Begins with nothing seen.

    Args:
      config: the thresholds.
      model: of the run.
      workdir: its directory.
    """
    self._config, self._model = config, model
    self._folder = Path(workdir) / FOLDER
    patience = config.collapse_steps
    self._alarms = {
      f'{stack} {kind}': _Alarm(steps)
      for stack in ('encoder', 'decoder')
      for kind, steps in (
        ('dead', config.dead_expert_steps),
        ('used', patience if config.min_experts_used else 0),
        ('entropy', patience if config.min_entropy else 0),
        ('logits', 1 if config.max_logit else 0),
      )
    }
    self._losses: collections.deque[float] = collections.deque(
      maxlen=config.spike_window
    )
    self._history: collections.deque[_Step] = collections.deque(
      maxlen=config.history_steps
    )
    self._quiet_until = 0  # no record before this step

  def state(self) -> dict[str, Any]:
    """Returns what a resumed run goes on with, as plain values."""
    return {
      'alarms': {name: alarm.state() for name, alarm in self._alarms.items()},
      'losses': list(self._losses),
      'quiet_until': self._quiet_until,
    }

  def restore(self, state: dict[str, Any] | None) -> None:
    """Goes on from `state`; None, of an older checkpoint: from nothing."""
    if state is None:
      return
    for name, alarm in self._alarms.items():
      alarm.restore(state['alarms'].get(name))
    self._losses.extend(state['losses'])
    self._quiet_until = state['quiet_until']

  def add(
    self,
    step: int,
    scalars: dict[str, float],
    router: dict[str, Any],
    batch: dict[str, np.ndarray],
  ) -> None:
    """Takes a finished step; warns and writes where there is cause.

    Args:
      step: steps done, this one included.
      scalars: 'loss', 'gradient_norm' and so on.
      router: 'encoder' and 'decoder', each RouterStats in numpy with a leading
        axis of sparse layers, or None.
      batch: this process's rows, by feature.
    """
    for stack, stats in router.items():
      if stats is not None:
        self._look(step, stack, stats)
    self._history.append(_Step(step, scalars, router, batch))
    cause = self._cause(scalars)
    if cause and self._config.history_steps and step >= self._quiet_until:
      self._quiet_until = step + self._config.history_steps
      self._record(step, cause)

  # MARK: routers

  def _look(self, step: int, stack: str, stats: Any) -> None:
    config, load = self._config, stats.expert_load  # [layers, experts]
    experts = load.shape[-1]
    choices = getattr(self._model, f'{stack}_router').num_choices
    with np.errstate(divide='ignore', invalid='ignore'):
      logs = np.where(load > 0, np.log(load), 0.0)
    used = np.exp(-(load * logs).sum(axis=-1))
    # Where every token takes about all experts nothing can collapse.
    least = max(_ROOM * choices, config.min_experts_used * experts)
    largest = np.maximum(stats.max_logit, np.sqrt(stats.z_loss))
    entropy = stats.entropy / math.log(experts) if experts > 1 else None
    # Padding alone chooses nothing, and says nothing.
    seen = stats.num_tokens > 0

    dead = self._begins(stack, 'dead', (load == 0) & seen[:, None])
    for layer in np.flatnonzero(dead.any(axis=-1)):
      names = ', '.join(map(str, np.flatnonzero(dead[layer])))
      self._warn(
        step, stack, layer,
        f'no token chose expert {names} for {config.dead_expert_steps} steps; '
        'if it does not come back, raise RouterConfig.balance_loss_weight',
      )  # fmt: skip
    if least < experts:
      for layer in np.flatnonzero(
        self._begins(stack, 'used', (used < least) & seen)
      ):
        self._warn(
          step, stack, layer,
          f'the router has collapsed: {used[layer]:.1f} of {experts} experts '
          f'are in use, for {config.collapse_steps} steps; raise '
          'RouterConfig.balance_loss_weight or lower the learning rate',
        )  # fmt: skip
    if entropy is not None:
      for layer in np.flatnonzero(
        self._begins(stack, 'entropy', (entropy < config.min_entropy) & seen)
      ):
        self._warn(
          step, stack, layer,
          f'the entropy of the router has collapsed: '
          f'{stats.entropy[layer]:.4f} nats, for {config.collapse_steps} steps '
          f'(even: {math.log(experts):.2f}); raise RouterConfig.z_loss_weight',
        )  # fmt: skip
    for layer in np.flatnonzero(
      self._begins(stack, 'logits', largest > config.max_logit)
    ):
      self._warn(
        step, stack, layer,
        f'router logits reach {largest[layer]:.3g}, beyond '
        f'HealthConfig.max_logit {config.max_logit:g}; raise '
        'RouterConfig.z_loss_weight or lower the learning rate',
      )  # fmt: skip

  def _begins(self, stack: str, kind: str, condition: np.ndarray) -> np.ndarray:
    return self._alarms[f'{stack} {kind}'].add(condition)

  def _warn(self, step: int, stack: str, layer: int, text: str) -> None:
    if processes.is_leader():
      index = sparse_layers(self._model, stack)[layer]
      log.warning('step %d: %s layer %d: %s', step, stack, index, text)

  # MARK: spikes

  def _cause(self, scalars: dict[str, float]) -> str:
    """Returns why this step is to be recorded, or nothing."""
    loss, window = scalars['loss'], self._config.spike_window
    if scalars['nonfinite_steps']:
      return (
        f'loss {loss:g} or gradient norm {scalars["gradient_norm"]:g} is not '
        'finite'
      )
    cause, before = '', np.array(self._losses)
    if self._config.spike_deviations and len(before) >= max(2, window // 2):
      mean, deviation = before.mean(), before.std()
      distance = (loss - mean) / max(deviation, _LEAST_DEVIATION)
      if distance > self._config.spike_deviations:
        cause = (
          f'loss {loss:.4f} is {distance:.1f} standard deviations above the '
          f'mean {mean:.4f} of the last {len(before)} steps'
        )
    self._losses.append(loss)
    return cause

  def _record(self, step: int, cause: str) -> None:
    """Writes the history of a step, unless a run before this one has."""
    path = self._folder / f'step_{step}.json'
    process = jax.process_index()
    if process:
      path = self._folder / f'step_{step}.process_{process}.npz'
    mine = path.name.replace(f'step_{step}.', 'step_*.')
    try:
      written = len(list(self._folder.glob(mine)))
      if written >= _MOST_RECORDS:
        where = f'{self._folder} has {written} records: no more are written'
      elif path.exists():
        where = f'recorded before: {path}'
      else:
        self._folder.mkdir(exist_ok=True)
        arrays = _stack('batch', [step.batch for step in self._history])
        if process:
          np.savez_compressed(path, **arrays)
        else:
          self._write(path, cause, arrays)
        where = (
          f'router statistics and tokens of {len(self._history)} steps: {path}'
        )
    except OSError as e:  # a full disk does not stop training
      where = f'{path} cannot be written ({e.strerror})'
    if processes.is_leader():
      log.warning('step %d: %s; %s', step, cause, where)

  def _write(
    self, path: Path, cause: str, arrays: dict[str, np.ndarray]
  ) -> None:
    """Writes statistics and the batches in `arrays`, then why."""
    for stack in self._history[-1].router:
      parts = [step.router[stack] for step in self._history]
      if parts[-1] is not None:
        arrays |= _stack(f'router/{stack}', [_fields(part) for part in parts])
    np.savez_compressed(path.with_suffix('.npz'), **arrays)
    rows = []
    for step in self._history:
      health = metrics.router_health(step.router, self._model)
      scalars = step.scalars | health.scalars
      rows.append(
        {'step': step.step}
        | {k: v if math.isfinite(v) else None for k, v in scalars.items()}
      )
    content = {
      'step': self._history[-1].step,
      'cause': cause,
      'processes': jax.process_count(),
      'steps': rows,
    }
    # Last, so that a record with its JSON is whole.
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def _fields(stats: Any) -> dict[str, np.ndarray]:
  """Returns the statistics of a stack by name."""
  values = {
    field.name: getattr(stats, field.name)
    for field in dataclasses.fields(stats)
  }
  return {name: value for name, value in values.items() if value is not None}


def _stack(prefix: str, parts: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  """Returns arrays by '<prefix>/<name>' with a leading axis of steps."""
  return {
    f'{prefix}/{name}': np.stack([part[name] for part in parts])
    for name in parts[-1]
  }
