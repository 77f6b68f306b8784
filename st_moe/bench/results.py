"""What a benchmark leaves: tables, and results.json with every number."""

import dataclasses
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from st_moe.bench.timing import LoadWatch, Sample, Spread, load_warning
from st_moe.errors import UserError
from st_moe.tables import print_table
from st_moe.workdir import git_state, versions, write_json

_HEAP = ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'GLIBC_TUNABLES')


def open_output(path: str | None, kind: str) -> Path:
  """Makes the folder of the results before anything is measured.

  Args:
    path: as given; None: runs/bench/KIND.
    kind: 'layer', 'step', 'generate' or 'peers'.

  Raises:
    UserError: when it cannot be made or written to.
  """
  folder = Path('runs', 'bench', kind) if path is None else Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(
      f'--output {folder} cannot be made a folder: {e.strerror}'
    ) from e
  if not os.access(folder, os.W_OK):
    raise UserError(f'--output {folder} cannot be written to')
  return folder


def machine() -> dict[str, Any]:
  """Returns what the numbers depend on: processor, devices, versions."""
  devices = jax.devices()
  return {
    'processor': _processor(),
    'cores': os.cpu_count(),
    'system': platform.platform(),
    'backend': jax.default_backend(),
    'device': devices[0].device_kind,
    'devices': len(devices),
    'heap': {name: os.environ.get(name) for name in _HEAP},
    'versions': versions(),
    'git': git_state(),
  }


def _processor() -> str:
  try:
    for line in Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def as_json(samples: Sequence[Sample]) -> dict[str, Any]:
  """Returns every round's numbers and their spread, in seconds."""
  return {
    'wall_s': [sample.wall for sample in samples],
    'cpu_s': [sample.cpu for sample in samples],
    'wall': dataclasses.asdict(Spread.of([s.wall for s in samples])),
    'cpu': dataclasses.asdict(Spread.of([s.cpu for s in samples])),
  }


def medians(samples: Sequence[Sample]) -> tuple[str, str]:
  """Returns the medians of wall and processor time, in milliseconds."""
  return (
    milliseconds(Spread.of([s.wall for s in samples]).median),
    milliseconds(Spread.of([s.cpu for s in samples]).median),
  )


class Output:
  """Prints while a benchmark runs, and writes its results at the end."""

  def __init__(self, folder: Path, kind: str, command: Sequence[str]):
    """Starts to watch the load.

    Args:
      folder: from `open_output`.
      kind: 'layer', 'step', 'generate' or 'peers'.
      command: what the user typed after the program's name.
    """
    self.folder = folder
    self._kind = kind
    self._command = list(command)
    self._load = LoadWatch()
    self._console = Console(highlight=False, soft_wrap=True)

  def say(self, text: str) -> None:
    """Prints one line."""
    self._console.print(text, markup=False)
    self._console.file.flush()

  def table(
    self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
  ) -> None:
    """Prints a table; the first column is text, the others are numbers."""
    print_table(self._console, title, columns, rows)

  def finish(self, results: dict[str, Any], figure: Any) -> None:
    """Writes results.json and the picture; says the load.

    Args:
      results: all numbers, ready for JSON.
      figure: of matplotlib.
    """
    load = self._load.stop()
    write_json(
      self.folder / 'results.json',
      {
        'kind': self._kind,
        'command': self._command,
        'machine': machine(),
        'load': load,
        **results,
      },
    )
    picture = self.folder / f'{self._kind}.png'
    figure.savefig(picture, dpi=130)
    used = load['other_cores']
    others = '' if used is None else f', others used {used} cores on average'
    self.say(
      f'load {load["load_before"]} before, {load["load_after"]} after, on '
      f'{load["cores"]} cores{others}'
    )
    if warning := load_warning(load):
      self.say(warning)
    self.say(f'results: {self.folder / "results.json"}, {picture}')


def milliseconds(seconds: float) -> str:
  """Returns '12.3', or '0.0123' below one."""
  return f'{1e3 * seconds:.3g}' if seconds < 0.1 else f'{1e3 * seconds:,.0f}'


def mebibytes(size: int | None) -> str:
  """Returns '75.1', or '-' when it is not known."""
  return '-' if size is None else f'{size / 2**20:.1f}'


def number(value: float | None) -> str:
  """Returns '1.05', or '-' when it is not known."""
  return '-' if value is None else f'{value:.2f}'
