"""Jobs of several real CPU processes on this machine, for tests."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240  # no process of a test takes as long

# A model that compiles in seconds; its second choices are drawn at random.
SMALL_RUN = (
  '--gin_file=models/tiny.gin',
  '--gin_file=runs/pretrain.gin',
  '--gin.TASK=cache',
  '--gin.VOCABULARY=byte',
  '--gin.STEPS=8',
  '--gin.BATCH_SIZE=8',
  '--gin.LEARNING_RATE=0.01',
  '--gin.OptimizerConfig.schedule=constant',
  '--gin.ModelConfig.vocab_size=384',
  '--gin.ModelConfig.d_model=32',
  '--gin.ModelConfig.d_ff=32',
  '--gin.ModelConfig.d_kv=8',
  '--gin.ModelConfig.num_experts=4',
  '--gin.ModelConfig.num_encoder_layers=1',
  '--gin.ModelConfig.num_decoder_layers=1',
  '--gin.ModelConfig.sparse_every=1',
  '--gin.MeshConfig.data=2',
  '--gin.MeshConfig.expert=2',
  '--gin.MeshConfig.model=2',
  '--gin.DataConfig.inputs_length=32',
  '--gin.DataConfig.targets_length=14',
  '--gin.RunConfig.log_every=1',
  '--gin.RunConfig.eval_every=4',
  '--gin.RunConfig.eval_batches=1',
  '--gin.RunConfig.checkpoint_every=4',
  '--gin.RunConfig.keep_last=9',
  '--gin.RunConfig.num_samples=0',
  '--gin.RunConfig.unigram_batches=1',
  '--gin.RunConfig.tensorboard=False',
)


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Ended:
  """How one process ended: exit status, standard output and error."""

  status: int
  out: str
  err: str


class Job:
  """Processes of one run that have been started."""

  def __init__(
    self,
    command: Sequence[str],
    *,
    processes: int,
    devices: int,
    own: Mapping[int, Sequence[str]] | None = None,
    folders: Mapping[int, Path] | None = None,
  ):
    """Starts them.

    Args:
      command: words behind `st_moe`.
      processes: how many.
      devices: of each process.
      own: more words for some processes, by number.
      folders: in which some of them begin, by number.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    env = os.environ | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
      'XLA_FLAGS': re.sub(r'--xla_force_host_platform\S+', '', flags),
    }
    port = free_port()
    self.children = []
    for index in range(processes):
      job = [
        f'--coordinator_address=localhost:{port}',
        f'--num_processes={processes}',
        f'--process_id={index}',
      ]
      more = (own or {}).get(index, ())
      self.children.append(
        subprocess.Popen(
          [sys.executable, '-m', 'st_moe', *command]
          + (job if processes > 1 else [])
          + list(more),
          cwd=(folders or {}).get(index, ROOT),
          env=env,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )

  def send(self, number: signal.Signals, *indices: int) -> None:
    for index in indices:
      self.children[index].send_signal(number)

  def wait_until(self, ready) -> None:
    """Waits for a condition while all processes run."""
    end = time.monotonic() + SECONDS
    while not ready():
      alive = [child.poll() is None for child in self.children]
      assert all(alive) and time.monotonic() < end, self.end()
      time.sleep(0.02)

  def end(self) -> list[Ended]:
    """Waits for the end of all; kills what does not end."""
    ended = []
    end = time.monotonic() + SECONDS
    for child in self.children:
      try:
        out, err = child.communicate(timeout=max(1, end - time.monotonic()))
      except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
      ended.append(Ended(child.returncode, out, err))
    return ended

  def succeed(self) -> list[Ended]:
    ended = self.end()
    assert [one.status for one in ended] == [0] * len(ended), ended
    return ended


def fail(command: Sequence[str], **how) -> list[str]:
  """Returns the error lines of two processes that both refuse to run."""
  ended = Job(command, processes=2, devices=4, **how).end()
  assert [one.status for one in ended] == [2, 2], ended
  lines = [one.err.splitlines() for one in ended]
  assert [len(one) for one in lines] == [1, 1], lines
  return [one[0] for one in lines]
