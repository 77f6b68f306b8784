"""What the files of a work directory say of a run."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from st_moe.best import ANSWERS_FOLDER
from st_moe.data.vocabularies import Vocabulary, load_vocabulary
from st_moe.metrics import read_metrics
from st_moe.workdir import VOCABULARY_FILE, read_json


@dataclasses.dataclass(frozen=True)
class Run:
  """What the files of a work directory say.

  Attributes:
    rows: one dict per step, from metrics.jsonl.
    info: run.json, or empty.
    summary: summary.json, or empty.
    answers_folder: of the best step's answers to tasks; may not be there.
    vocabulary_file: of the run; may not be there.
  """

  rows: list[dict[str, Any]]
  info: dict[str, Any]
  summary: dict[str, Any]
  answers_folder: Path = Path(ANSWERS_FOLDER)
  vocabulary_file: Path = Path(VOCABULARY_FILE)

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

  def seen_of(self, text: str) -> tuple[int, int] | None:
    """Returns how many of an input's tokens the model saw, and of how many.

    The end of the sequence and inserted sentinels are not counted; None where
    the vocabulary or the length is not known.
    """
    data = self.info.get('config', {}).get('data', {})
    if self._vocabulary is None or 'inputs_length' not in data:
      return None
    tokens = len(self._vocabulary.encode(text))
    room = data['inputs_length'] - 1 - data.get('insert_sentinels', 0)
    return min(tokens, room), tokens

  @functools.cached_property
  def _vocabulary(self) -> Vocabulary | None:
    data = self.info.get('config', {}).get('data', {})
    extra_ids = data.get('extra_ids', 0)
    if self.vocabulary_file.is_file():
      return load_vocabulary(str(self.vocabulary_file), extra_ids)
    if data.get('vocabulary') == 'byte':
      return load_vocabulary('byte', extra_ids)
    return None


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
    vocabulary_file=workdir / VOCABULARY_FILE,
  )


def _read_if_there(path: Path) -> dict[str, Any]:
  return read_json(path) if path.is_file() else {}
