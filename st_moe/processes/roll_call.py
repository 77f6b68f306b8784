"""Processes that were started by hand say their numbers before JAX joins them.

JAX's service ends a process from C++, with a stack trace, when another one has
its number, and lets the others wait. So process 0 first hears every process,
at the address where that service will be, and answers all of them: with
nothing, or with the one error of the job. Launchers number their processes
themselves; only those of `--process_id` are called.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Iterable

_LONGEST = 4096  # bytes of a call or an answer
_PATIENCE = 1.0  # seconds for the words of whoever connects
_PAUSE = 0.2  # seconds until the next try


class WrongCall(Exception):
  """Processes were numbered wrongly; every one of them gets these words."""


class Missing(Exception):
  """Not all processes were there in time; says what is known of them."""


class _Silence(TimeoutError):
  """Something listens and does not answer yet."""


@dataclasses.dataclass(frozen=True)
class _Call:
  """What a process has said, and where it waits for the answer."""

  connection: socket.socket
  index: int
  count: int
  host: str

  def is_there(self) -> bool:
    """Whether the process still waits: one that has ended may come again."""
    self.connection.setblocking(False)
    try:
      return self.connection.recv(1, socket.MSG_PEEK) != b''
    except BlockingIOError:
      return True
    except OSError:
      return False


def roll_call(address: str, count: int, index: int, seconds: float) -> None:
  """Returns when all processes of a job have called.

  Args:
    address: HOST:PORT of process 0, where nothing listens yet.
    count: processes of the job, as this one was told.
    index: of this process.
    seconds: to wait for the others.

  Raises:
    WrongCall: two processes have one number, or not all know of as many.
    Missing: the others were not there in time.
  """
  end = time.monotonic() + seconds
  register = _Register(address, count, end) if index == 0 else None
  reason = 'process 0 does not answer'
  while time.monotonic() < end:
    try:
      error = _call(address, count, index, end)
    except (OSError, ValueError) as e:
      reason = _reason(e)
      time.sleep(min(_PAUSE, max(0, end - time.monotonic())))
      continue
    if register is not None:
      register.answered.wait(None if error is None else 2 * _PATIENCE)
    if error is not None:
      raise WrongCall(error)
    return
  missing = register.missing() if register is not None else None
  raise Missing(missing or reason)


def _reason(error: OSError | ValueError) -> str:
  if isinstance(error, ValueError):
    return 'something else than process 0 answers there'
  if isinstance(error, _Silence):
    return 'process 0 waits too, another may be missing'
  return f'process 0 does not answer: {error.strerror or error}'


def _split(address: str) -> tuple[str, int]:
  host, _, port = address.rpartition(':')
  return host.strip('[]'), int(port)


def _call(address: str, count: int, index: int, end: float) -> str | None:
  """Says a process's number; returns the error of the job, if it has one.

  Raises:
    OSError: nothing is there, or no answer in time.
    ValueError: whatever is there gave another answer.
  """
  left = max(0.01, end - time.monotonic())
  with socket.create_connection(_split(address), timeout=left) as connection:
    said = {'index': index, 'count': count, 'host': socket.gethostname()}
    connection.sendall(json.dumps(said).encode() + b'\n')
    connection.settimeout(max(0.01, end - time.monotonic()))
    try:
      answer = _read(connection)
    except TimeoutError as e:
      raise _Silence from e
    error = answer['error'] if set(answer) == {'error'} else 0
    if not isinstance(error, str | None):
      raise ValueError(f'no answer: {answer}')
    return error


def _read(connection: socket.socket) -> dict:
  """Returns the line that comes, a JSON object; ValueError if it is none."""
  line = b''
  while not line.endswith(b'\n'):
    part = connection.recv(_LONGEST)
    line += part
    if not part or len(line) > _LONGEST:
      raise ValueError('not a line')
  content = json.loads(line)
  if not isinstance(content, dict):
    raise ValueError('not an object')
  return content


class _Register:
  """Process 0 hears all, itself too, in a thread.

  Attributes:
    answered: set when all have their answer; if it is no error, then the port
      is free again.
  """

  def __init__(self, address: str, count: int, end: float):
    # JAX's service will listen there.
    bound = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS') or address
    self._host = _split(bound)[0] if bound != address else ''
    self._port, self._count, self._end = _split(bound)[1], count, end
    self._calls: dict[int, _Call] = {}
    self.answered = threading.Event()
    threading.Thread(target=self._hear_all, daemon=True).start()

  def missing(self) -> str | None:
    """Returns which processes have not come; None: it heard nobody."""
    absent = [i for i in range(self._count) if i not in self._calls]
    if len(absent) in (0, self._count):
      return None
    names = ', '.join(map(str, absent[:8])) + (', ...' if absent[8:] else '')
    several = len(absent) > 1
    return (
      f'process{"es" * several} {names} {"have" if several else "has"} not come'
    )

  def _listen(self) -> socket.socket | None:
    """Returns a listener, as soon as the port is free."""
    where = (self._host, self._port)
    dual = self._host in ('', '::') and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ':' in self._host else socket.AF_INET
    while time.monotonic() < self._end:
      try:
        return socket.create_server(where, family=family, dualstack_ipv6=dual)
      except OSError:
        time.sleep(_PAUSE)
    return None

  def _hear_all(self) -> None:
    listener = self._listen()
    if listener is None:
      return
    error = None
    with listener:
      while not self._complete() or error is not None:
        listener.settimeout(max(0.01, self._end - time.monotonic()))
        try:
          connection, _ = listener.accept()
        except OSError:
          return
        call = _heard(connection)
        if call is None:
          connection.close()
        elif error is not None:
          _answer([call], error)
        elif (error := self._wrong(call)) is None:
          self._calls[call.index] = call
        else:
          _answer([*self._calls.values(), call], error)
          self.answered.set()
      _answer(self._calls.values(), None)
    self.answered.set()

  def _complete(self) -> bool:
    """Whether all have come, and none has ended since."""
    if len(self._calls) == self._count:
      self._calls = {i: c for i, c in self._calls.items() if c.is_there()}
    return len(self._calls) == self._count

  def _wrong(self, call: _Call) -> str | None:
    """Returns what a new call is wrong about."""
    if call.count != self._count:
      return (
        f'process {call.index} has --num_processes={call.count}, process 0 has '
        f'{self._count}; start every process with the same flags'
      )
    earlier = self._calls.get(call.index)
    if earlier is None or not earlier.is_there():
      return None
    hosts = ' and '.join(dict.fromkeys((earlier.host, call.host)))
    return (
      f'two processes were started with --process_id={call.index}, on {hosts}; '
      f'each of the {self._count} has its own, 0 to {self._count - 1}'
    )


def _heard(connection: socket.socket) -> _Call | None:
  """Returns the call of whoever has connected; None: it is no process."""
  try:
    connection.settimeout(_PATIENCE)
    said = _read(connection)
    numbers = int(said['index']), int(said['count'])
    return _Call(connection, *numbers, str(said['host'])[:100])
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _answer(calls: Iterable[_Call], error: str | None) -> None:
  """Answers, and lets the others hang up: then the port is free at once."""
  for call in calls:
    with contextlib.suppress(OSError):
      call.connection.settimeout(_PATIENCE)
      call.connection.sendall(json.dumps({'error': error}).encode() + b'\n')
  for call in calls:
    with contextlib.suppress(OSError), call.connection:
      call.connection.recv(1)
