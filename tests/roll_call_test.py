"""Processes that were numbered by hand are heard before JAX joins them."""

import concurrent.futures
import socket
import threading
import time

import pytest
from small_job import Job, fail, free_port

from st_moe.processes.roll_call import Missing, WrongCall, roll_call

SECONDS = 20


@pytest.fixture
def address():
  return f'localhost:{free_port()}'


def call_all(address, *numbers, seconds=SECONDS):
  """Returns what each of (index, count) gets: None, or its error."""

  def one(number):
    index, count = number
    try:
      return roll_call(address, count, index, seconds)
    except (WrongCall, Missing) as e:
      return e

  with concurrent.futures.ThreadPoolExecutor(len(numbers)) as pool:
    return list(pool.map(one, numbers))


def later(seconds, action):
  timer = threading.Timer(seconds, action)
  timer.start()
  return timer


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0)])
def test_all_are_there_and_the_port_is_free_again(address, order):
  begin = time.monotonic()
  for _ in range(3):  # a run that is started again at once
    assert call_all(address, *((i, 3) for i in order)) == [None, None, None]
    with socket.create_server(('', int(address.rpartition(':')[2]))):
      pass
  assert time.monotonic() - begin < SECONDS


def test_the_first_process_may_come_last(address):
  found = []
  timer = later(1, lambda: found.append(roll_call(address, 2, 0, SECONDS)))
  assert call_all(address, (1, 2)) == [None]
  timer.join()
  assert found == [None]


@pytest.mark.parametrize('index', [0, 1])
def test_two_processes_with_one_number_are_told_so_at_once(address, index):
  begin = time.monotonic()
  found = call_all(address, (0, 3), (index, 3), (1, 3))
  assert {(type(e), str(e)) for e in found} == {
    (
      WrongCall,
      f'two processes were started with --process_id={index}, on '
      f'{socket.gethostname()}; each of the 3 has its own, 0 to 2',
    )
  }
  assert time.monotonic() - begin < SECONDS / 2


def test_processes_that_differ_about_their_number(address):
  found = call_all(address, (0, 3), (1, 2))
  assert {(type(e), str(e)) for e in found} == {
    (
      WrongCall,
      'process 1 has --num_processes=2, process 0 has 3; start every process '
      'with the same flags',
    )
  }


def test_who_does_not_come_is_named(address):
  first, third, fourth = call_all(address, (0, 5), (2, 5), (3, 5), seconds=1.5)
  assert str(first) == 'processes 1, 4 have not come'
  assert str(third) == str(fourth)
  assert str(third) == 'process 0 waits too, another may be missing'
  (alone,) = call_all(address, (1, 2), seconds=0.5)
  assert str(alone) == 'process 0 does not answer: Connection refused'


@pytest.mark.parametrize('order', [(1, 2), (2, 1)])
def test_a_process_that_ended_while_it_waited_may_come_again(address, order):
  def leave():
    with pytest.raises(Missing):
      roll_call(address, 3, 1, 0.5)

  first = later(0, lambda: roll_call(address, 3, 0, SECONDS))
  leave()
  others = []
  for index in order:  # one after the other, in this order
    others.append(later(0, lambda i=index: roll_call(address, 3, i, SECONDS)))
    time.sleep(0.5)
  for thread in (first, *others):
    thread.join(SECONDS / 2)
    assert not thread.is_alive()


def test_whoever_else_connects_is_not_counted(address):
  first = later(0, lambda: roll_call(address, 2, 0, SECONDS))
  host, _, port = address.rpartition(':')
  for said in (b'', b'GET / HTTP/1.1\r\n\r\n', b'[1]\n', b'{"index": "x"}\n'):
    while True:
      try:
        stranger = socket.create_connection((host, int(port)))
        break
      except ConnectionRefusedError:  # not listening yet
        time.sleep(0.05)
    with stranger:
      stranger.sendall(said)
  assert call_all(address, (1, 2)) == [None]
  first.join()


def test_something_else_at_the_address_of_process_0():
  with socket.create_server(('localhost', 0)) as other:
    threading.Thread(target=lambda: greet(other), daemon=True).start()
    address = f'localhost:{other.getsockname()[1]}'
    (error,) = call_all(address, (1, 2), seconds=1)
  assert str(error) == 'something else than process 0 answers there'


def greet(listener):
  while True:
    try:
      connection, _ = listener.accept()
    except OSError:
      return
    with connection:
      connection.sendall(b'SSH-2.0\r\n')


def test_two_real_processes_with_one_number(tmp_path):
  workdir = tmp_path / 'run'
  lines = fail(
    ['pretrain', f'--workdir={workdir}'], own={1: ['--process_id=0']}
  )
  assert lines == 2 * [
    'error: two processes were started with --process_id=0, on '
    f'{socket.gethostname()}; each of the 2 has its own, 0 to 1'
  ]
  assert not workdir.exists()


def test_a_process_whose_flags_are_wrong_is_named_by_the_first(tmp_path):
  """It ends before it can tell the others, who wait for it."""
  ended = Job(
    ['pretrain', f'--workdir={tmp_path / "run"}', '--connect_timeout=8'],
    processes=2,
    devices=1,
    own={1: ['--no_such_flag']},
  ).end()
  assert [one.status for one in ended] == [2, 2]
  assert 'error: pretrain has no argument --no_such_flag' in ended[1].err
  assert 'in 8 s' in ended[0].err
  assert 'start all of them (process 1 has not come)' in ended[0].err
