"""What the files of a work directory say of a run."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from st_moe.best import ANSWERS_FOLDER
from st_moe.metrics import read_metrics
from st_moe.workdir import read_json


@dataclasses.dataclass(frozen=True)
class Run:
  """What the files of a work directory say.

  Attributes:
    rows: one dict per step, from metrics.jsonl.
    info: run.json, or empty.
    summary: summary.json, or empty.
    answers_folder: of the best step's answers to tasks; may not be there.
  """

  rows: list[dict[str, Any]]
  info: dict[str, Any]
  summary: dict[str, Any]
  answers_folder: Path = Path(ANSWERS_FOLDER)

  def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of a scalar; NaN where it was not finite."""
    pairs = [(row['step'], row[name]) for row in self.rows if name in row]
    values = [math.nan if value is None else value for _, value in pairs]
    return np.array([step for step, _ in pairs]), np.array(values, float)

  def last(self, name: str) -> float | None:
    """Returns the last finite value of a scalar, that of the summary first."""
    if name in self.summary:
      return self.summary[name]
    values = self.column(name)[1]
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None

  def layers(self) -> list[str]:
    """Returns 'encoder/3' and so on for every sparse layer, encoder first."""
    found = set()
    for row in self.rows:
      for name in row:
        parts = name.split('/')
        if name.startswith('router/') and len(parts) == 4:
          found.add((parts[1] != 'encoder', parts[1], int(parts[2])))
    return [f'{stack}/{layer}' for _, stack, layer in sorted(found)]

  def load(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps [times] and relative load [times, experts] of a layer.

    The load is the share of an expert as a multiple of an even share.
    """
    name = f'router/{layer}/expert_load'
    steps, loads = [], []
    for row in self.rows:
      if name in row:
        steps.append(row['step'])
        loads.append([math.nan if x is None else x for x in row[name]])
    loads = np.array(loads, float)
    return np.array(steps), loads * loads.shape[-1]

  @property
  def development(self) -> dict[str, Any] | None:
    """Scores of the best step on tasks with answers, None without."""
    return self.summary.get('development')

  @property
  def best_step(self) -> int | None:
    """The best step, if a score says which that is."""
    return self.summary.get('best', {}).get('step')


def read_run(workdir: Path) -> Run:
  """Reads the files of a run.

  Raises:
    UserError: when `workdir` holds no metrics, or a file that is not JSON.
  """
  return Run(
    rows=read_metrics(workdir),
    info=_read_if_there(workdir / 'run.json'),
    summary=_read_if_there(workdir / 'summary.json'),
    answers_folder=workdir / ANSWERS_FOLDER,
  )


def _read_if_there(path: Path) -> dict[str, Any]:
  return read_json(path) if path.is_file() else {}
