"""Results on disk: one file for each arm and seed, written whole or not at all.

`DIR/results/ARM/seed_N.json` has all that a report needs, so that results of
several machines are merged by copying files into one folder. `DIR/study.json`
says what they are results of.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from st_moe.errors import UserError
from st_moe.workdir import differences, read_json, write_json

STUDY_FILE = 'study.json'
_RESULTS = 'results'

# A run is unstable when its training cross entropy has risen by more than this
# many nats above its lowest, and has stayed there for this share of its steps
# (of log lines, which are means over intervals); or when a step was not finite.
RISE = 0.5
STAYS = 0.05
CRITERION = (
  'A run is unstable if the loss or the gradients of a step are not finite, or '
  f'if the training cross entropy stays more than {RISE} nats above the lowest '
  f'it had reached for {STAYS:.0%} of the steps or more (means over log '
  'intervals). Quality is that of the stable runs.'
)


@dataclasses.dataclass(frozen=True)
class Result:
  """What one run says of one arm.

  Attributes:
    arm: of the study.
    seed: of the run.
    configuration: from `grid.fingerprint`.
    data: hash of what was read; equal hashes, equal text.
    stable: see CRITERION.
    reason: why it is not.
    step: the last one.
    values: scores and statistics at the end; empty when the run stopped.
    history: {'step', 'cross_entropy', 'router_z_loss'}: lists, by log line.
    made_by: device and versions.
  """

  arm: str
  seed: int
  configuration: str
  data: str
  stable: bool
  reason: str
  step: int
  values: dict[str, float]
  history: dict[str, list[float | None]]
  made_by: dict[str, str]


def instability(
  steps: Sequence[int],
  losses: Sequence[float | None],
  skipped: int,
  total_steps: int,
) -> str:
  """Returns why a run is unstable by CRITERION; '' when it is stable.

  Args:
    steps: of the log lines.
    losses: training cross entropy of each interval, nats; None: not finite.
    skipped: steps that were not finite.
    total_steps: of the run.
  """
  if skipped:
    return (
      f'{skipped} {"step was" if skipped == 1 else "steps were"} not finite'
    )
  best, best_step, high_since = math.inf, 0, None
  for before, step, loss in zip([0, *steps], steps, losses, strict=False):
    if loss is None:
      return f'the loss was not finite at step {step}'
    if loss < best:
      best, best_step = loss, step
    if loss <= best + RISE:
      high_since = None
      continue
    high_since = before if high_since is None else high_since
    if step - high_since >= STAYS * total_steps:
      return (
        f'cross entropy above {best:.2f} + {RISE} nats (of step {best_step}) '
        f'from step {high_since} to {step}'
      )
  return ''


def mean_over_layers(row: dict[str, Any], field: str) -> float | None:
  """Returns a router's statistic over all sparse layers of a log line."""
  values = [
    value
    for name, value in row.items()
    if name.startswith('router/')
    and name.endswith(f'/{field}')
    and name.count('/') == 3
  ]
  if not values or any(value is None for value in values):
    return None
  return float(np.mean(values))


def result_file(directory: Path, arm: str, seed: int) -> Path:
  return directory / _RESULTS / arm / f'seed_{seed}.json'


def write_result(directory: Path, result: Result) -> None:
  path = result_file(directory, result.arm, result.seed)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, dataclasses.asdict(result))


def read_results(directory: Path) -> list[Result]:
  """Returns every result of a folder, in order of arms and seeds.

  Raises:
    UserError: a file that is none.
  """
  found = []
  for path in (directory / _RESULTS).glob('*/seed_*.json'):
    content = read_json(path)
    try:
      found.append(Result(**content))
    except TypeError as e:
      raise UserError(f'{path} is no result of `st_moe study`: {e}') from e
  return sorted(found, key=lambda result: (result.arm, result.seed))


def open_directory(directory: Path, record: dict[str, Any]) -> None:
  """Makes the folder of a study, or goes on in it.

  Args:
    directory: holds a study of the same settings, or nothing, or is not there.
    record: what the study is, for study.json.

  Raises:
    UserError: for a folder of something else, with what differs.
  """
  path = directory / STUDY_FILE
  if path.is_file():
    new = json.loads(json.dumps(record))
    old = read_json(path)
    if differences(old, new):
      raise UserError(
        f'{directory} holds {_what_it_holds(old, new)}; use another --workdir'
      )
    return
  if directory.exists() and (
    not directory.is_dir() or any(directory.iterdir())
  ):
    raise UserError(
      f'--workdir={directory} is not empty and holds no study; choose another'
    )
  try:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
  except OSError as e:
    raise UserError(
      f'--workdir={directory} cannot be written ({e.strerror}); choose another'
    ) from e


def discard_directory(directory: Path) -> None:
  """Removes what a study left that ended before a step of any run."""
  began = (directory / 'runs').glob('*/seed_*/metrics.jsonl')
  if any(began) or (directory / _RESULTS).is_dir():
    return
  (directory / STUDY_FILE).unlink(missing_ok=True)
  for name in ('runs', 'compiled'):
    shutil.rmtree(directory / name, ignore_errors=True)
  if not any(directory.iterdir()):
    directory.rmdir()


def _what_it_holds(old: dict[str, Any], new: dict[str, Any]) -> str:
  """Returns what a folder's study is and this one is not, in words."""
  if old.get('command') != new['command']:
    return f'the study of another command, `{old.get("command")}`'
  arms = old.get('arms', {}), new['arms']
  changed = [
    name
    for name in sorted(set(arms[0]) | set(arms[1]))
    if arms[0].get(name) != arms[1].get(name)
  ]
  return (
    'a study whose settings were others, in its gin files or by default '
    f'(arms {", ".join(changed)})'
  )


def read_record(directory: Path) -> dict[str, Any]:
  """Returns study.json.

  Raises:
    UserError: the folder holds no study.
  """
  path = directory / STUDY_FILE
  if not path.is_file():
    raise UserError(
      f'{directory} holds no study: it has no {STUDY_FILE}; give the --workdir '
      'of `st_moe study NAME`'
    )
  return read_json(path)
