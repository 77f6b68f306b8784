"""Programs timed in turns: rounds, ratios, and how far to trust them.

On a machine that does other work, seconds drift from minute to minute; the
ratio of two programs that ran one after the other drifts much less. So every
form runs once in each round, the order moves on by one from round to round,
and what is reported is the median over rounds of the ratio within a round,
with its quartiles.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

# A sample lasts at least this long; shorter programs are called repeatedly.
MIN_SAMPLE_SECONDS = 0.02
MAX_CALLS = 200
# Above this share of its cores in use by others, a machine is not quiet.
_QUIET = 0.25


@dataclasses.dataclass(frozen=True)
class Sample:
  """Seconds of one call: by the clock, and of processor time.

  Processor time is that of all threads of the process that computes; on an
  accelerator it is only the time to launch.
  """

  wall: float
  cpu: float


class Form(Protocol):
  """Something that can be called and timed."""

  name: str

  def measure(self) -> Sample:
    """Runs it; returns the seconds of one call."""


@dataclasses.dataclass(frozen=True)
class Program:
  """A function and its arguments, not compiled yet."""

  name: str
  function: Callable[..., Any]
  arguments: tuple[Any, ...]


class CompiledForm:
  """A program compiled by XLA, with what the compiler says of it.

  Attributes:
    name: of the program.
    output: of the first call.
    compile_seconds: of tracing and compiling.
    temp_bytes: scratch memory of the executable; None where not told.
    flops: as XLA counts them; None where not told.
  """

  def __init__(self, program: Program):
    """Compiles the program and calls it once."""
    self.name = program.name
    self._arguments = program.arguments
    begin = time.perf_counter()
    lowered = jax.jit(program.function).lower(*program.arguments)
    self._compiled = lowered.compile()
    self.compile_seconds = time.perf_counter() - begin
    self.temp_bytes = temp_bytes(self._compiled)
    self.flops = flops(self._compiled)
    self.output = self._call()
    self._calls = 1

  def _call(self) -> Any:
    return jax.block_until_ready(self._compiled(*self._arguments))

  def warm_up(self) -> None:
    """Calls it once more and decides how many calls make a sample."""
    self.output = None  # frees memory: it was looked at before
    begin = time.perf_counter()
    self._call()
    seconds = max(time.perf_counter() - begin, 1e-9)
    self._calls = min(MAX_CALLS, math.ceil(MIN_SAMPLE_SECONDS / seconds))

  def measure(self) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(self._calls):
      self._call()
    return Sample(
      (time.perf_counter() - wall) / self._calls,
      (time.process_time() - cpu) / self._calls,
    )


def temp_bytes(compiled: Any) -> int | None:
  """Returns the scratch memory of an executable, in bytes, if it is told."""
  analysis = compiled.memory_analysis()
  return getattr(analysis, 'temp_size_in_bytes', None)


def flops(compiled: Any) -> float | None:
  """Returns the FLOPs of an executable as XLA counts them, if it does.

  It counts the body of a loop once, and knows nothing of hand-written kernels.
  """
  analysis = compiled.cost_analysis()
  return (analysis or {}).get('flops')


def run_rounds(
  forms: Sequence[Form], rounds: int, pause: float = 0.0
) -> dict[str, list[Sample]]:
  """Times every form once per round; the order moves on by one each round.

  A round before the first is not counted.

  Args:
    forms: what is timed.
    rounds: that are counted.
    pause: seconds of rest before every sample.

  Returns:
    {name of a form: one sample per round}.
  """
  samples: dict[str, list[Sample]] = {form.name: [] for form in forms}
  for index in range(-1, rounds):
    first = max(index, 0) % len(forms)
    for form in (*forms[first:], *forms[:first]):
      time.sleep(pause)
      sample = form.measure()
      if index >= 0:
        samples[form.name].append(sample)
  return samples


@dataclasses.dataclass(frozen=True)
class Spread:
  """The middle of some numbers, and the quartiles around it."""

  median: float
  low: float
  high: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Spread':
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return cls(float(median), float(low), float(high))

  def __str__(self) -> str:
    return f'{self.median:.2f} [{self.low:.2f} {self.high:.2f}]'


def ratio(
  samples: Sequence[Sample], base: Sequence[Sample], clock: str = 'wall'
) -> Spread:
  """Returns the ratio of two forms, round by round.

  Args:
    samples: of a form.
    base: of the form it is compared with, from the same rounds.
    clock: 'wall' or 'cpu'.
  """
  return Spread.of(
    [
      getattr(a, clock) / max(getattr(b, clock), 1e-9)
      for a, b in zip(samples, base, strict=True)
    ]
  )


class LoadWatch:
  """How busy the machine was with other work while we measured."""

  def __init__(self):
    self._average = _load_average()
    self._start = _busy_seconds(), _own_seconds(), time.monotonic()

  def stop(self) -> dict[str, Any]:
    """Returns the load averages before and after, and what others used.

    'other_cores' is the number of cores that other processes kept busy
    (Linux; else None). The load average after the run has our own work in it.
    """
    busy, own, begin = self._start
    other = None
    if busy is not None:
      seconds = max(time.monotonic() - begin, 1e-9)
      others = (_busy_seconds() - busy) - (_own_seconds() - own)
      other = round(max(others / seconds, 0.0), 2)
    return {
      'cores': os.cpu_count(),
      'load_before': self._average,
      'load_after': _load_average(),
      'other_cores': other,
    }


def load_warning(load: dict[str, Any]) -> str | None:
  """Returns a line about a busy machine, or None for a quiet one.

  Args:
    load: from `LoadWatch.stop`.
  """
  limit = _QUIET * load['cores']
  before, other = load['load_before'], load['other_cores']
  if other is None:
    quiet = before is None or before <= limit
    what = f'the load average was {before} before'
  else:
    quiet = other <= limit
    what = f'other processes used {other} of {load["cores"]} cores'
  if quiet:
    return None
  return (
    f'warning: {what}; times are not to be trusted, ratios a little, and torch '
    'suffers more than XLA'
  )


def _load_average() -> float | None:
  return round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None


def _busy_seconds() -> float | None:
  """Returns the seconds that all cores together have worked since boot."""
  try:
    fields = Path('/proc/stat').read_text().splitlines()[0].split()[1:]
  except OSError:
    return None
  user, nice, system, _, _, irq, softirq, *_ = map(int, fields)
  return (user + nice + system + irq + softirq) / os.sysconf('SC_CLK_TCK')


def _own_seconds() -> float:
  times = os.times()
  return sum(times[:4])  # ours and that of children that have ended
