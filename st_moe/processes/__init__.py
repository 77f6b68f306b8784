"""Several processes, one run: joining them, agreeing, and ending together.

JAX's own service joins the processes (`jax.distributed`) and carries a stop
signal to all of them. Here is when it is called, and what keeps a job from
hanging: until the first step every process meets the others at a few points
(`exchange`, `check_same`), between which each works for itself. One that
finds an error brings it to the next meeting, and all end with it. Afterwards
(`settle`) a process that fails leaves at once, and JAX ends the others.

Nothing of JAX is imported or started in a process that is alone.
"""

import dataclasses
import importlib.metadata
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from st_moe import __version__
from st_moe.errors import UserError
from st_moe.processes.connection import Connection, is_job
from st_moe.processes.roll_call import Missing, WrongCall, roll_call

# JAX aborts without Python's knowledge when its own time is over: later.
_LATER_SECONDS = 60
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')
_SHOWN_CHARACTERS = 100  # of a value, in an error
# What XLA says when a process with which it computes is gone.
_LOST = ('Gloo', 'NCCL', 'UNAVAILABLE', 'Socket closed', 'Connection closed')


class AgreedError(UserError):
  """A UserError that every process of the job raises, with the same words."""


@dataclasses.dataclass
class _Job:
  """What this process is part of.

  Attributes:
    joined: whether it is a process of a job.
    settled: whether the meetings are over: others may be computing.
    broken: whether the others can no longer be waited for at the end.
    has_signals: whether JAX listens for SIGTERM.
    is_command: whether the process ends with the command that it runs.
    kept: what a process that is alone does not take apart at its end.
  """

  joined: bool = False
  settled: bool = False
  broken: bool = False
  has_signals: bool = False
  is_command: bool = False
  kept: list[Any] = dataclasses.field(default_factory=list)


_job = _Job()


# Joining


def connect(connection: Connection, *, stop_signals: bool) -> None:
  """Joins the job, if this process is part of one; before any use of JAX.

  Args:
    connection: the flags.
    stop_signals: whether SIGTERM is to stop all processes at one step, by
      `StopSignals`; else it ends this process.

  Raises:
    UserError: unclear flags, or the others were not there in time.
    AgreedError: processes that were numbered by hand have one number, or
      differ about how many there are.
  """
  connection.check()
  wanted = connection.distributed == 'on' or connection.given()
  if connection.distributed == 'auto':
    wanted = wanted or is_job(os.environ)
  if not wanted:
    return
  import jax

  jax.config.update('jax_enable_preemption_service', stop_signals)
  end = time.monotonic() + connection.timeout
  _call_the_roll(connection)
  failures: list[Exception] = []

  def initialize() -> None:
    try:
      jax.distributed.initialize(
        connection.coordinator_address,
        connection.num_processes,
        connection.process_id,
        initialization_timeout=connection.timeout + _LATER_SECONDS,
      )
    except Exception as e:  # whatever the cluster's detection raises
      failures.append(e)

  # In a thread: meanwhile this one hears signals and looks at the clock.
  thread = threading.Thread(target=initialize, daemon=True)
  thread.start()
  thread.join(max(1, end - time.monotonic()))
  if thread.is_alive():
    _job.broken = True
    raise _not_found(connection, 'one may be missing')
  if failures:
    raise UserError(
      f'this process cannot join its job ({_one_line(failures[0])}); give '
      '--coordinator_address=HOST:PORT, --num_processes and --process_id, or '
      '--distributed=off to run alone'
    )
  _job.joined, _job.has_signals = True, stop_signals
  _give_output_to_the_leader()


def _call_the_roll(connection: Connection) -> None:
  """Hears that all are there, each with a number of its own."""
  if len(connection.given()) < 3 or connection.num_processes == 1:
    return  # their cluster numbers them
  try:
    roll_call(
      connection.coordinator_address,
      connection.num_processes,
      connection.process_id,
      connection.timeout,
    )
  except WrongCall as e:
    raise AgreedError(str(e)) from e
  except Missing as e:
    raise _not_found(connection, str(e)) from e


def _not_found(connection: Connection, reason: str) -> UserError:
  words = ', '.join(f'{k}={v}' for k, v in connection.given().items())
  return UserError(
    f'the processes of this job did not find each other in '
    f'{connection.timeout} s ({words or "all found by their cluster"}); start '
    f'all of them ({reason}), with the same address and number, and let them '
    'reach that port; --connect_timeout waits longer'
  )


def _give_output_to_the_leader() -> None:
  """Leaves standard output to what process 0 prints in Python.

  Not to XLA either, whose CPU transport reports every connection there.
  """
  sys.stdout.flush()
  encoding = sys.stdout.encoding
  terminal = os.dup(1) if is_leader() else os.open(os.devnull, os.O_WRONLY)
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 1)
  os.close(null)
  sys.stdout = os.fdopen(terminal, 'w', buffering=1, encoding=encoding)


def joined() -> bool:
  """Whether this is a process of a job."""
  return _job.joined


def is_leader() -> bool:
  """Whether this process writes the files that all share."""
  if not _job.joined:
    return True
  import jax

  return jax.process_index() == 0


def prefix() -> str:
  """Returns what goes before a warning: which process it is from."""
  if not _job.joined:
    return ''
  import jax

  return f'process {jax.process_index()}: '


def check_joined() -> None:
  """Refuses to run as a process that sees the devices of others.

  Raises:
    UserError: on a host of a TPU pod that was not told so.
  """
  import jax

  if jax.process_count() > 1 and not _job.joined:
    raise UserError(
      f'this is process {jax.process_index()} of {jax.process_count()} on '
      'these devices, and has not joined the others; add --distributed=on'
    )


# Meeting


def _gather(content: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns what each process has brought, JSON values, in order."""
  import numpy as np
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(content).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([data.size], np.int32))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[: int(size)].tobytes())
    for row, size in zip(rows, sizes.ravel(), strict=True)
  ]


def _all_bring(content: dict[str, Any]) -> list[Any]:
  """Returns the values of all processes, unless one has brought an error."""
  found = _gather(content)
  errors = [one.get('error') for one in found]
  if any(errors):
    raise AgreedError(_joint_error(errors))
  return [one['value'] for one in found]


def _joint_error(errors: list[str | None]) -> str:
  """Returns one text for the errors of some or all processes."""
  if len(set(errors)) == 1:
    return errors[0]
  first = next(i for i, error in enumerate(errors) if error)
  more = sum(map(bool, errors)) - 1
  return f'process {first}: {errors[first]}' + (
    f' ({more} more had errors)' if more else ''
  )


def exchange(value: Any) -> list[Any]:
  """Returns the values of all processes, in order; [value] if it is alone.

  Args:
    value: ready for JSON.

  Raises:
    AgreedError: another process had a UserError since the last meeting.
  """
  return _all_bring({'value': value}) if _job.joined else [value]


def from_leader(value: Any) -> Any:
  """Returns the value of process 0; others may give None. See `exchange`."""
  return exchange(value)[0]


def check_same(values: Mapping[str, Any], remedy: str) -> None:
  """Refuses to go on when processes differ.

  Args:
    values: by the name that is shown.
    remedy: what to do about a difference.

  Raises:
    AgreedError: on all processes, naming the first difference and both values.
  """
  if not _job.joined:
    return
  everyone = exchange({name: repr(value) for name, value in values.items()})
  first = everyone[0]
  for index, other in enumerate(everyone):
    for name in [*first, *(other.keys() - first.keys())]:
      here, there = other.get(name), first.get(name)
      if here != there:
        raise AgreedError(
          f'process {index} has {name} = {_short(here)}, process 0 has '
          f'{_short(there)}; {remedy}'
        )


def software() -> dict[str, str]:
  """Returns the versions that processes must share, as `check_same` wants."""
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  versions['st_moe'] = __version__
  return {f'the version of {k}': version for k, version in versions.items()}


def to_host(x: Any) -> Any:
  """Returns a jax.Array, of all devices, in numpy: whole in every process."""
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(x, tiled=True)


def settle() -> None:
  """The last meeting: from here on processes compute together."""
  exchange(None)
  _job.settled = True


def _short(value: str | None) -> str:
  text = 'nothing' if value is None else value
  if len(text) <= _SHOWN_CHARACTERS:
    return text
  return text[:_SHOWN_CHARACTERS] + '...'


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:200]


# Ending


def end_together(error: UserError) -> str:
  """Tells the other processes of an error; returns what to print."""
  if isinstance(error, AgreedError) or not _job.joined:
    return str(error)
  if _job.settled:
    _job.broken = True
    return prefix() + str(error)
  try:
    _all_bring({'error': str(error)})
  except AgreedError as agreed:
    return str(agreed)
  raise AssertionError('an error was brought and not found')


def abandon() -> None:
  """Says that this process ends alone: the others may be waiting for it."""
  _job.broken = True


def keep_to_the_end(readers: Any) -> None:
  """Says that nothing is to be waited for when the command is done.

  tf.data takes many seconds to stop reading ahead: a process that ends anyway
  holds on to its readers, and ends at once.

  Args:
    readers: that are not used again.
  """
  if _job.is_command and not _job.joined:
    _job.kept.append(readers)


def run_and_leave(main: Callable[[], int]) -> NoReturn:
  """Runs the program and ends this process with the status it returns.

  In a job a process waits for the others before it ends, unless it has failed
  alone. Then JAX ends those, at once or after 100 seconds without its sign of
  life.
  """
  _job.is_command = True
  try:
    status = main()
  except Exception as e:
    if not _job.joined:
      raise
    abandon()
    status = _report(e)
  if _job.broken or _job.kept:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def _report(error: Exception) -> int:
  """Prints an unexpected error; returns the exit status: try again."""
  if not any(word in str(error) for word in _LOST):
    traceback.print_exception(error)
    return 1
  print(
    f'stopped: {prefix()}the processes can no longer compute together, most '
    f'likely because one has ended ({_one_line(error)}); see what the others '
    'say, and start all again to go on from the last checkpoint',
    file=sys.stderr,
  )
  return 1


class StopSignals:
  """Turns SIGTERM or Ctrl-C into a request to save and stop.

  A process that is alone takes the first signal as a request; a second one
  acts at once. In a job JAX hears SIGTERM, on any process, from when that has
  joined, and sets a step that none has reached yet, after which all stop.
  """

  def __init__(self):
    self.received: str | None = None
    self._asked = 0  # steps for which JAX was asked
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> 'StopSignals':
    numbers = [signal.SIGINT]
    numbers += [] if _job.has_signals else [signal.SIGTERM]
    for number in numbers:
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def _handle(self, number: int, frame: Any) -> None:
    if _job.has_signals:
      os.kill(os.getpid(), signal.SIGTERM)  # JAX hears this one
    else:
      self.received = signal.Signals(number).name
    self._restore()  # a second signal acts at once

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __exit__(self, *error: Any) -> None:
    self._restore()

  def requested(self, step: int) -> bool:
    """Whether to stop now; to be asked once at every step.

    Args:
      step: steps done; the same in all processes, one more at each call.
    """
    if not _job.has_signals:
      return self.received is not None
    from jax.experimental import multihost_utils

    # JAX counts from 0 and stops at one number: a run that goes on from a
    # checkpoint passes all before, lest that number is one of them.
    while self._asked <= step:
      if multihost_utils.reached_preemption_sync_point(self._asked):
        self.received = 'SIGTERM'
      self._asked += 1
    return self.received is not None
