"""Who is part of a job, how it is joined, and what is said when it is not."""

import os
import signal
import subprocess
import sys

import pytest
from small_job import ROOT, free_port

from st_moe import processes
from st_moe.errors import UserError
from st_moe.processes import Connection


@pytest.mark.parametrize(
  ('environ', 'expected'),
  [
    ({}, False),
    # A batch script of SLURM, then a process that srun started.
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8', 'SLURM_PROCID': '0'}, False),
    ({'SLURM_STEP_NUM_TASKS': '8', 'SLURM_PROCID': '3'}, True),
    ({'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'}, False),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, False),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
    # One TPU host, then two, then one in each of two slices.
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
    ({'TPU_PROCESS_ADDRESSES': 'a:8471,b:8471'}, True),
    ({'MEGASCALE_NUM_SLICES': '2', 'TPU_WORKER_HOSTNAMES': 'a'}, True),
    ({'MEGASCALE_NUM_SLICES': '1'}, False),
    ({'JAX_COORDINATOR_ADDRESS': 'a:1234'}, True),
    # Pods of an indexed Kubernetes job may as well be runs of their own.
    ({'KUBERNETES_SERVICE_HOST': 'k', 'JOB_COMPLETION_INDEX': '1'}, False),
  ],
)
def test_auto_takes_the_launchers_word(environ, expected):
  assert processes.is_job(environ) == expected


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (
      {'distributed': 'off', 'process_id': 1},
      '--distributed=off does not go with --process_id',
    ),
    ({'coordinator_address': 'a'}, '--coordinator_address=a must be HOST:PORT'),
    ({'num_processes': 0}, '--num_processes must be at least 1, got 0'),
    (
      {'num_processes': 2, 'process_id': 2},
      '--process_id must be 0 to 1, got 2',
    ),
    ({'process_id': -1}, '--process_id must be at least 0, got -1'),
    ({'timeout': 0}, '--connect_timeout must be at least 1, got 0'),
  ],
)
def test_flags_that_cannot_be_meant(flags, message):
  with pytest.raises(UserError, match=message):
    Connection(**flags).check()


def test_alone_there_is_nothing_to_agree_on():
  processes.connect(Connection(distributed='off'), stop_signals=True)
  assert not processes.joined() and processes.is_leader()
  assert processes.prefix() == ''
  assert processes.exchange({'a': 1}) == [{'a': 1}]
  assert processes.from_leader([2]) == [2]
  processes.check_same({'a': object()}, 'never said')
  assert processes.end_together(UserError('wrong')) == 'wrong'


def test_alone_the_first_signal_is_a_request_and_the_second_acts():
  before = signal.getsignal(signal.SIGTERM)
  with processes.StopSignals() as signals:
    assert not signals.requested(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.requested(2)
    assert signals.received == 'SIGTERM'
    assert signal.getsignal(signal.SIGTERM) == before
  assert signal.getsignal(signal.SIGTERM) == before


ENDING = """
import sys
from st_moe import processes

class Reader:
  def __del__(self):
    print('waited for')

def main():
  processes.keep_to_the_end(Reader())
  print('done')
  return 3

{start}
"""


@pytest.mark.parametrize(
  ('start', 'lines'),
  [
    ('processes.run_and_leave(main)', ['done']),
    ('sys.exit(main())', ['waited for', 'done']),
  ],
)
def test_a_command_does_not_wait_for_its_readers(start, lines):
  ended = subprocess.run(
    [sys.executable, '-c', ENDING.format(start=start)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert ended.returncode == 3, ended
  assert ended.stdout.split('\n')[:-1] == lines


def error_of(*flags: str) -> str:
  """Returns the one error line of a real process, which ends with status 2."""
  names = ('SLURM', 'OMPI', 'TPU', 'MEGASCALE', 'KUBERNETES', 'JAX_COORD')
  env = {k: v for k, v in os.environ.items() if not k.startswith(names)}
  ended = subprocess.run(
    [sys.executable, '-m', 'st_moe', 'pretrain', '--workdir=unused', *flags],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert (ended.returncode, ended.stdout) == (2, ''), ended
  (line,) = ended.stderr.splitlines()
  return line.removeprefix('error: ')


def test_a_job_that_nobody_describes():
  way_out = (
    'give --coordinator_address=HOST:PORT, --num_processes and --process_id, '
    'or --distributed=off to run alone'
  )
  assert error_of('--distributed=on') == (
    'this process cannot join its job (coordinator_address should be '
    f'defined.); {way_out}'
  )
  assert error_of('--coordinator_address=localhost:9', '--num_processes=2') == (
    'this process cannot join its job (The process id of the current process '
    f'must be defined.); {way_out}'
  )


@pytest.mark.parametrize(
  ('index', 'reason'),
  [
    (0, 'process 1 has not come'),
    (1, 'process 0 does not answer: Connection refused'),
  ],
)
def test_the_other_process_does_not_come(index, reason):
  address = f'localhost:{free_port()}'
  assert error_of(
    f'--coordinator_address={address}',
    '--num_processes=2',
    f'--process_id={index}',
    '--connect_timeout=1',
  ) == (
    'the processes of this job did not find each other in 1 s '
    f'(--coordinator_address={address}, --num_processes=2, '
    f'--process_id={index}); start all of them ({reason}), with the same '
    'address and number, and let them reach that port; --connect_timeout waits '
    'longer'
  )
