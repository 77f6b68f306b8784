"""What a grid costs, before anything is trained: FLOPs, and time.

FLOPs are those of the model (bench/flops.py, which `st_moe plan` counts by).
Times are at the published rate of a target, which no step reaches; on this
machine, at the rate of a matrix product that is timed for it.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from st_moe import tables
from st_moe.bench.flops import step_flops
from st_moe.config import RunConfig
from st_moe.metrics import duration
from st_moe.plan.targets import parse_target
from st_moe.study.declaration import Study
from st_moe.study.grid import (
  SCALES,
  Run,
  Settings,
  left_to_do,
  steps_to_train,
)

_SIZE = 1024  # of the matrices that are multiplied
_SECONDS = 0.6  # of multiplying; the quickest counts, others were disturbed


@dataclasses.dataclass(frozen=True)
class Rate:
  """FLOP/s, and of what."""

  flops: float
  text: str


def rate_of(topology: str | None) -> Rate:
  """Returns the rate of a target of `st_moe plan`, or of this machine.

  Raises:
    UserError: no such target.
  """
  if topology is not None:
    target = parse_target(topology, 1)
    if target.chip.peak is not None:
      return Rate(
        target.chip.peak * target.devices, f'the peak rate of {topology}'
      )
  left, quickest = np.ones((_SIZE, _SIZE), np.float32), math.inf
  end = time.perf_counter() + _SECONDS
  while time.perf_counter() < end:
    begin = time.perf_counter()
    left @ left
    quickest = min(quickest, time.perf_counter() - begin)
  flops = 2.0 * _SIZE**3 / quickest
  return Rate(flops, "the best rate of this machine's float32 products now")


def run_flops(config: RunConfig) -> float:
  """Returns the model FLOPs of the training steps of a run."""
  return steps_to_train(config) * sum(step_flops(config, 1).values())


def _counted(count: int, word: str) -> str:
  return f'{count} {word}' if count == 1 else f'{count} {word}s'


def print_grid(
  study: Study,
  settings: Settings,
  runs: Sequence[Run],
  directory: Path | None,
  topology: str | None,
) -> None:
  """Prints what would be run, and what it would cost.

  Args:
    study: of the grid.
    settings: of all arms.
    runs: that this process would do.
    directory: of the study, whose results are not done again; None: none yet.
    topology: a target of `st_moe plan`; None: this machine.
  """
  rate = rate_of(topology)
  todo = left_to_do(directory, runs) if directory else list(runs)
  console = Console(highlight=False, soft_wrap=True)
  seeds = sorted({run.seed for run in runs})
  console.print(f'{study.name}: {study.title} ({study.paper})')
  if study.recipe == 'finetune':
    models = (settings.checkpoint, settings.dense_checkpoint)
    begins = f'from {" and ".join(filter(None, models))}'
  else:
    begins = f'where no flag says otherwise, {SCALES[settings.scale].text}'
  console.print(f'scale {settings.scale}: {begins}\n')
  rows = []
  for run in runs:
    if run.seed != seeds[0]:
      continue
    flops, others = run_flops(run.config), [*run.arms][1:]
    rows.append(
      [
        run.name,
        f'{steps_to_train(run.config):,}',
        f'{sum(run.config.data.lengths.values()) * run.config.batch_size:,}',
        f'{flops / 1e15:.4g}',
        duration(flops / rate.flops),
      ]
    )
    rows += [[f'  and scored as {name}', '', '', '', ''] for name in others]
  tables.print_table(
    console,
    f'each with {_counted(len(seeds), "seed")}: {", ".join(map(str, seeds))}',
    ('arm', 'steps', 'tokens a step', 'PFLOP a run', 'time'),
    rows,
  )
  total = sum(run_flops(run.config) for run in todo)
  done = len(runs) - len(todo)
  console.print(
    _counted(len(todo), 'run')
    + (f' ({done} more {"is" if done == 1 else "are"} done)' if done else '')
    + f', {total / 1e15:.4g} PFLOP of the model: '
    f'{duration(total / rate.flops)} at {rate.text} '
    f'({rate.flops / 1e12:.3g} TFLOP/s), compiling and scoring not counted'
  )
