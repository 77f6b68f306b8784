"""How a process is told of its job: by flags, or by what a launcher sets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from st_moe.errors import UserError


@dataclasses.dataclass(frozen=True)
class Connection:
  """The flags with which a process joins a job.

  Attributes:
    distributed: 'auto', 'on' or 'off'.
    coordinator_address: HOST:PORT of process 0; None: the cluster's.
    num_processes: of the job; None: the cluster's.
    process_id: of this process; None: the cluster's.
    timeout: seconds to wait for the others.
  """

  distributed: str = 'auto'
  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  timeout: int = 300

  def given(self) -> dict[str, Any]:
    """Returns what a user said about the job, by flag."""
    flags = {
      '--coordinator_address': self.coordinator_address,
      '--num_processes': self.num_processes,
      '--process_id': self.process_id,
    }
    return {name: value for name, value in flags.items() if value is not None}

  def check(self) -> None:
    """Refuses flags that cannot be meant.

    Raises:
      UserError: naming them.
    """
    given = self.given()
    if given and self.distributed == 'off':
      raise UserError(f'--distributed=off does not go with {", ".join(given)}')
    if self.coordinator_address is not None:
      host, _, port = self.coordinator_address.rpartition(':')
      if not host or not port.isdigit():
        raise UserError(
          f'--coordinator_address={self.coordinator_address} must be HOST:PORT '
          'of process 0, such as 10.0.0.1:8476'
        )
    if self.num_processes is not None and self.num_processes < 1:
      raise UserError(
        f'--num_processes must be at least 1, got {self.num_processes}'
      )
    if self.process_id is not None:
      if self.process_id < 0:
        raise UserError(
          f'--process_id must be at least 0, got {self.process_id}'
        )
      if (
        self.num_processes is not None and self.process_id >= self.num_processes
      ):
        raise UserError(
          f'--process_id must be 0 to {self.num_processes - 1}, got '
          f'{self.process_id}'
        )
    if self.timeout < 1:
      raise UserError(
        f'--connect_timeout must be at least 1, got {self.timeout}'
      )


def is_job(environ: Mapping[str, str]) -> bool:
  """Whether a launcher says that this is one of several processes.

  Only what launchers set for the processes themselves counts: in a batch
  script of SLURM, outside `srun`, there is one process whatever the job's size.
  """

  def count(name: str) -> int:
    value = environ.get(name, '')
    return int(value) if value.isdigit() else 0

  workers = (
    environ.get('TPU_PROCESS_ADDRESSES')
    or environ.get('TPU_WORKER_HOSTNAMES')
    or ''
  )
  return (
    'JAX_COORDINATOR_ADDRESS' in environ
    or ('SLURM_PROCID' in environ and count('SLURM_STEP_NUM_TASKS') > 1)
    or count('OMPI_COMM_WORLD_SIZE') > 1
    or count('MEGASCALE_NUM_SLICES') > 1
    or ',' in workers
  )
