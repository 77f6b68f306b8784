"""What a run reports while it trains: router health, log files, progress.

`metrics.jsonl` has one JSON object per line: the step, scalars by name, and
arrays (expert load) by name. A number that is not finite is `null`. Several
lines may share a step; equal runs write equal lines, except those of timing,
which are written apart. TensorBoard events beside it hold the same scalars.

Names: 'loss' and its terms, 'learning_rate', 'gradient_norm',
'tokens_per_second', 'eval/...', and for each sparse layer
'router/<stack>/<layer>/<field of RouterStats>'.
"""

import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from st_moe.config import ModelConfig
from st_moe.errors import UserError
from st_moe.stacking import sparse_layers

log = logging.getLogger(__name__)

METRICS_FILE = 'metrics.jsonl'
_TENSORBOARD_FLUSH_SECONDS = 30.0


# MARK: router health


@dataclasses.dataclass(frozen=True)
class RouterHealth:
  """Router statistics by name, ready to be written.

  Attributes:
    scalars: 'router/<stack>/<layer>/entropy' and so on for every sparse
      layer, and over all of them 'router/entropy' (mean, nats),
      'router/fraction_dropped' (mean) and 'router/max_load' (largest).
    arrays: 'router/<stack>/<layer>/expert_load' [experts] and so on.
  """

  scalars: dict[str, float]
  arrays: dict[str, list[float]]


def router_health(stats: dict[str, Any], config: ModelConfig) -> RouterHealth:
  """Names the statistics of every sparse layer by its place in the stack.

  `max_load` is added to the fields of RouterStats: the largest share of the
  assignments that an expert gets, as a multiple of an even share.

  Args:
    stats: 'encoder' and 'decoder', each a RouterStats whose fields have a
      leading axis of sparse layers in depth order, or None.
    config: tells which layers those are.
  """
  scalars: dict[str, float] = {}
  arrays: dict[str, list[float]] = {}
  overall: dict[str, list[float]] = {}
  for stack, fields in stats.items():
    if fields is None:
      continue
    fields = {
      field.name: np.asarray(getattr(fields, field.name))
      for field in dataclasses.fields(fields)
      if field.name != 'decisions'
    }
    load = fields['expert_load']  # [sparse layers, experts]
    fields['max_load'] = load.max(axis=-1) * load.shape[-1]
    layers = sparse_layers(config, stack)
    for name, values in fields.items():
      for layer, value in zip(layers, values, strict=True):
        key = f'router/{stack}/{layer}/{name}'
        if value.ndim:
          arrays[key] = [_short(x) for x in value]
        else:
          scalars[key] = float(value)
          overall.setdefault(name, []).append(float(value))
  if overall:
    scalars['router/entropy'] = float(np.mean(overall['entropy']))
    scalars['router/fraction_dropped'] = float(
      np.mean(overall['fraction_dropped'])
    )
    scalars['router/max_load'] = max(overall['max_load'])
  return RouterHealth(scalars, arrays)


def _short(value: np.ndarray) -> float:
  """Returns the float with the fewest digits that is this float32."""
  return float(str(np.float32(value)))


# MARK: files


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
  """Returns the written values, one dict per step, in order of steps.

  Raises:
    UserError: when there are none.
  """
  path = Path(workdir) / METRICS_FILE
  if not path.is_file():
    raise UserError(f'{path} does not exist; was anything trained there?')
  steps: dict[int, dict[str, Any]] = {}
  for line in path.read_bytes().splitlines():
    row = _parse(line)
    if row is not None:
      steps.setdefault(row['step'], {}).update(row)
  if not steps:
    raise UserError(f'{path} is empty: no step was logged yet')
  return [steps[step] for step in sorted(steps)]


def read_column(workdir: Path, name: str) -> list[float]:
  """Returns the finite values of one metric in order of steps.

  Raises:
    UserError: when nothing was written at all.
  """
  values = (row.get(name) for row in read_metrics(workdir))
  return [value for value in values if value is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
  """Returns a line as a dict; None for one that a killed run left torn."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) and 'step' in row else None


class MetricsWriter:
  """Appends to metrics.jsonl and to TensorBoard events; process 0 only.

  A full disk does not stop training: lines wait in memory until they can be
  written.
  """

  def __init__(self, workdir: Path, *, tensorboard: bool):
    """Opens the files of a work directory.

    Args:
      workdir: existing directory.
      tensorboard: whether to write events to `<workdir>/tensorboard`.
    """
    self._active = jax.process_index() == 0
    self._path = Path(workdir) / METRICS_FILE
    self._waiting: list[bytes] = []
    self._events = None
    if self._active:
      self._open()
      if tensorboard:
        self._events = _EventFile(Path(workdir) / 'tensorboard')

  def _open(self) -> None:
    self._file = self._path.open('ab', buffering=0)
    self._size = self._file.tell()  # of what was written whole

  def truncate_after(self, step: int) -> None:
    """Forgets what was written after `step`; called once, before writing.

    A run that goes on from an older checkpoint writes those steps again.
    Drops the torn line that a killed run may have left.
    """
    if not self._active:
      return
    self._file.close()
    lines = self._path.read_bytes().splitlines()
    kept = []
    for line in lines:
      row = _parse(line)
      if row is not None and row['step'] <= step:
        kept.append(line + b'\n')
    temporary = self._path.with_name(f'{METRICS_FILE}.tmp')
    with temporary.open('wb') as file:
      file.write(b''.join(kept))
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, self._path)
    self._open()
    if self._events is not None:
      self._events.purge_after(step)

  def write(
    self,
    step: int,
    scalars: dict[str, float],
    arrays: dict[str, list[float]] | None = None,
  ) -> None:
    """Appends one line.

    Args:
      step: steps done.
      scalars: by name.
      arrays: by name; not sent to TensorBoard.
    """
    if not self._active:
      return
    row: dict[str, Any] = {'step': step}
    for name, value in scalars.items():
      row[name] = _finite(float(value))
    for name, values in (arrays or {}).items():
      row[name] = [_finite(float(value)) for value in values]
    self._waiting.append(json.dumps(row, allow_nan=False).encode() + b'\n')
    self._write_waiting()
    if self._events is not None:
      self._events.add(step, scalars)

  def _write_waiting(self) -> None:
    """Writes whole lines, or none of them and keeps them for later."""
    data = b''.join(self._waiting)
    try:
      written = self._file.write(data)
      if written != len(data):
        raise OSError('the disk is full')
    except OSError as e:
      self._file.truncate(self._size)
      if len(self._waiting) == 1:  # the first that could not be written
        log.warning('%s cannot be written (%s); will retry', self._path, e)
      return
    self._size += len(data)
    self._waiting.clear()

  def flush(self) -> None:
    """Puts everything on the disk, before a checkpoint says it was logged."""
    if not self._active:
      return
    if self._waiting:
      self._write_waiting()
    os.fsync(self._file.fileno())
    if self._events is not None:
      self._events.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    if not self._active:
      return
    self.flush()
    self._file.close()
    if self._events is not None:
      self._events.close()


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


class _EventFile:
  """TensorBoard events, by tensorboardX's synchronous writer.

  Its SummaryWriter is not used: its `flush` leaves events in a queue.
  """

  def __init__(self, directory: Path):
    self._directory = directory
    self._purge_step: int | None = None
    self._writer = None
    self._flushed = time.monotonic()

  def purge_after(self, step: int) -> None:
    """Makes TensorBoard forget what older files say about later steps."""
    if any(self._directory.glob('events.*')):
      self._purge_step = step + 1

  def _create(self):
    from tensorboardX.event_file_writer import EventsWriter

    self._directory.mkdir(parents=True, exist_ok=True)
    # Two files of one second must not have the same name.
    files = len(list(self._directory.glob('events.*')))
    return EventsWriter(str(self._directory / 'events'), f'.{files}')

  def add(self, step: int, scalars: dict[str, float]) -> None:
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    now = time.time()
    if self._writer is None:
      self._writer = self._create()
      if self._purge_step is not None:
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(
          Event(wall_time=now, step=self._purge_step, session_log=restart)
        )
    values = [
      Summary.Value(tag=name, simple_value=value)
      for name, value in scalars.items()
    ]
    self._writer.write_event(
      Event(wall_time=now, step=step, summary=Summary(value=values))
    )
    if time.monotonic() - self._flushed > _TENSORBOARD_FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    self._flushed = time.monotonic()
    if self._writer is not None:
      self._writer.flush()

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()


# MARK: progress


class Progress:
  """Shows how a run is doing, on a terminal or line by line.

  On a terminal three lines are kept up to date: how far; loss and speed; the
  health of the routers. Elsewhere every update prints one line.
  """

  def __init__(
    self,
    total_steps: int,
    *,
    start: int = 0,
    file: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Begins at step `start` of `total_steps`.

    Args:
      total_steps: of the run.
      start: steps done before.
      file: where to write; None: standard output.
      clock: seconds, for the time left.
    """
    self._total = total_steps
    self._step = start
    self._clock = clock
    # Steps and seconds of training alone, up to the last mark.
    self._trained_steps, self._trained_seconds = 0, 0.0
    self._mark: tuple[int, float] | None = None  # step, time
    self._console = Console(file=file, highlight=False, soft_wrap=True)
    self._shown = jax.process_index() == 0
    self._live: Live | None = None

  def __enter__(self) -> 'Progress':
    if self._step >= self._total:
      return self  # nothing is left to train
    if self._shown and self._console.is_terminal:
      self._live = Live(
        console=self._console, auto_refresh=False, transient=False
      )
      real = sys.stdout, sys.stderr
      self._live.start()  # replaces sys.stdout and sys.stderr
      self._live.update(Text(f'step {self._step:,}: compiling'), refresh=True)
      self._redirect_log(real, (sys.stdout, sys.stderr))
    elif self._shown:
      self._print(['compiling the training step'])
    return self

  def __exit__(self, *error) -> None:
    if self._live is not None:
      shown = sys.stdout, sys.stderr
      self._live.stop()
      self._redirect_log(shown, (sys.stdout, sys.stderr))

  def _redirect_log(
    self, old: tuple[TextIO, TextIO], new: tuple[TextIO, TextIO]
  ) -> None:
    """Sends log lines where they do not run into the lines shown."""
    for handler in logging.getLogger().handlers:
      for was, now in zip(old, new, strict=True):
        if isinstance(handler, logging.StreamHandler) and handler.stream is was:
          handler.setStream(now)
          break

  def begin(self, step: int) -> None:
    """Counts the time from now on: until `step` there was more than training.

    Compiling, an evaluation and saving say nothing of the steps that are left.
    """
    self._mark = step, self._clock()

  def update(
    self,
    step: int,
    scalars: dict[str, float],
    health: RouterHealth | None = None,
  ) -> None:
    """Shows the state of a run after `step`.

    Args:
      step: steps done.
      scalars: 'loss' and, when known, 'tokens_per_second'.
      health: of the routers, if there are any.
    """
    self._step = step
    if not self._shown:
      return
    left = [f'left {time_left}' for time_left in self._time_left()]
    numbers = describe(scalars)
    routers = describe(health.scalars) if health is not None else []
    if self._live is None:
      self._print([f'step {step}/{self._total}', *numbers, *left, *routers])
      return
    bar = ProgressBar(total=self._total, completed=step, width=30)
    head = Table.grid(padding=(0, 2))
    head.add_row(f'step {step:,}/{self._total:,}', bar, *left)
    lines = [head, Text('  '.join(numbers))]
    if routers:
      lines.append(Text('routers  ' + '  '.join(routers), style='dim'))
    self._live.update(Group(*lines), refresh=True)

  def note(
    self,
    step: int,
    scores: dict[str, float],
    lines: Sequence[Sequence[str]] = (),
  ) -> None:
    """Prints lines that stay: the scores of an evaluation, and more of it."""
    if self._shown:
      values = describe(scores, _SHOWN_SCORES)
      for line in (('held out:', *values), *lines):
        self._print([f'step {step}/{self._total}', *line])

  def _print(self, parts: list[str]) -> None:
    self._console.print(Text('  '.join(parts)))
    self._console.file.flush()

  def _time_left(self) -> list[str]:
    """Returns what is left as one text, or none before a pace is known."""
    now = self._clock()
    if self._mark is not None:
      self._trained_steps += self._step - self._mark[0]
      self._trained_seconds += now - self._mark[1]
    self._mark = self._step, now
    if self._step == self._total or self._trained_steps <= 0:
      return []
    pace = self._trained_seconds / self._trained_steps
    return [duration(pace * (self._total - self._step))]


# What is shown of the scalars, in order: name, label, format.
_SHOWN = (
  ('loss', 'loss', '{:.4f}'),
  ('learning_rate', 'lr', '{:.2e}'),
  ('tokens_per_second', 'tokens/s', '{:,.0f}'),
  ('router/fraction_dropped', 'dropped', '{:.1%}'),
  ('router/entropy', 'entropy', '{:.2f} nats'),
  ('router/max_load', 'max load', '{:.2f}x'),
)


# The same of an evaluation.
_SHOWN_SCORES = (
  ('eval/loss', 'loss', '{:.4f}'),
  ('eval/neg_log_perplexity', 'negative log perplexity of text', '{:.4f}'),
  ('eval/accuracy', 'accuracy', '{:.1%}'),
)


def describe(
  scalars: dict[str, float],
  shown: Sequence[tuple[str, str, str]] = _SHOWN,
) -> list[str]:
  """Returns the scalars worth showing, as 'loss 4.2000' and so on."""
  return [
    f'{label} {form.format(scalars[name])}'
    for name, label, form in shown
    if name in scalars
  ]


def duration(seconds: float) -> str:
  """Returns '45s', '3m20s', '2h05m' or '3d04h'."""
  seconds = round(seconds)
  for unit, below, size, small in (
    ('d', 'h', 86400, 3600),
    ('h', 'm', 3600, 60),
    ('m', 's', 60, 1),
  ):
    if seconds >= size:
      return f'{seconds // size}{unit}{seconds % size // small:02d}{below}'
  return f'{seconds}s'
