"""A model without a run: parameters, the gin file of the model, its vocabulary.

`st_moe convert` makes such directories: `model.gin`, `vocabulary.model` where
there was one, `model.json` (where it comes from and what was checked) and
`checkpoints/`, in the format of a run's. They appear whole or not at all.
`find_model` finds the model of such a directory, or of a run.
"""

import dataclasses
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from st_moe import processes
from st_moe.bindings import model_config_text
from st_moe.checkpoint import ArrayWriter
from st_moe.config import ModelConfig, RunConfig
from st_moe.errors import UserError
from st_moe.gin_files import load_config
from st_moe.workdir import (
  CONFIG_FILE,
  MODEL_FILE,
  RUN_FILE,
  VOCABULARY_FILE,
  check_parents,
  read_json,
  versions,
  write_json,
)

RECORD_FILE = 'model.json'


@dataclasses.dataclass(frozen=True)
class FoundModel:
  """A model on disk: a model directory, a run, or bare checkpoints.

  Attributes:
    path: that holds its files.
    gin_file: of the model or of the whole run; None beside bare checkpoints.
    record: model.json or run.json; {} without.
  """

  path: Path
  gin_file: Path | None
  record: dict[str, Any]

  def run_config(self) -> RunConfig | None:
    """Returns the configuration, all but the model at its defaults where
    there was no run; None when it is not known."""
    return None if self.gin_file is None else load_config([str(self.gin_file)])

  def model_config(self) -> ModelConfig | None:
    """Returns the model's configuration, or None when it is not known."""
    config = self.run_config()
    return None if config is None else config.model

  @property
  def vocabulary(self) -> Path | None:
    """The model's SentencePiece model, if it is there."""
    kept = self.path / VOCABULARY_FILE
    return kept if kept.exists() else None

  def vocabulary_spec(self) -> str | None:
    """Returns DataConfig.vocabulary for this model, or None."""
    if self.vocabulary is not None:
      return str(self.vocabulary)
    settings = [
      self.record,
      self.record.get('config', {}).get('data', {}),
      self.record.get('initial_weights', {}),
    ]
    is_byte = any(part.get('vocabulary') == 'byte' for part in settings)
    return 'byte' if is_byte else None

  @property
  def vocabulary_hash(self) -> str | None:
    """The fingerprint of the vocabulary it was trained with, if known."""
    return self.record.get('data', {}).get('vocabulary')


def find_model(path: Path) -> FoundModel:
  """Finds the files of a model; reads no array.

  Args:
    path: of a model directory, a work directory, or the checkpoints in one.

  Raises:
    UserError: when its record is not JSON.
  """
  path = Path(path)
  if path.name == 'checkpoints' and path.is_dir():
    path = path.parent
  for gin_name, record_name in (
    (MODEL_FILE, RECORD_FILE),
    (CONFIG_FILE, RUN_FILE),
  ):
    gin_file, record = path / gin_name, path / record_name
    if gin_file.is_file():
      return FoundModel(
        path, gin_file, read_json(record) if record.is_file() else {}
      )
  return FoundModel(path, None, {})


def check_output(path: Path) -> None:
  """Refuses a place where a model directory cannot be made; touches nothing.

  Raises:
    UserError: when there is something already, or nothing can be made there.
  """
  if path.is_dir() and not any(path.iterdir()):
    return
  if path.exists():
    raise UserError(f'{path} exists already; remove it, or name another output')
  check_parents(path, str(path))


class ModelWriter:
  """Makes a model directory; a context that leaves nothing after an error.

  Of several processes the first writes all files but the arrays.
  """

  def __init__(self, path: Path, step: int = 0):
    """Prepares a directory beside `path`.

    Args:
      path: of the model directory; must not hold anything.
      step: of its checkpoint: how long the model was trained.

    Raises:
      UserError: when `path` holds something, or cannot be written.
    """
    check_output(path)
    self._path = path.absolute()
    self._temporary = self._path.with_name(f'.{self._path.name}.writing')
    try:
      if processes.is_leader():
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
    except OSError as e:
      raise UserError(f'{path} cannot be written ({e.strerror})') from e
    self._arrays = ArrayWriter(self._temporary / 'checkpoints', step)

  def __enter__(self) -> 'ModelWriter':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if processes.is_leader():
      shutil.rmtree(self._temporary, ignore_errors=True)

  def add(self, item: str, name: str, value: Any) -> None:
    """Writes one array of 'params', 'opt_state' or 'counters'."""
    self._arrays.add(item, name, value)

  def commit(
    self,
    config: ModelConfig,
    *,
    record: dict[str, Any],
    vocabulary: Path | None,
    comment: str,
  ) -> None:
    """Writes the other files and shows the directory under its name.

    Args:
      config: of the model.
      record: of model.json: where the model comes from, what was checked.
      vocabulary: a SentencePiece model to copy.
      comment: first line of the gin file.
    """
    self._arrays.commit({})
    if not processes.is_leader():
      return
    (self._temporary / MODEL_FILE).write_text(
      f'# {comment}\n\n{model_config_text(config)}'
    )
    if vocabulary is not None:
      shutil.copyfile(vocabulary, self._temporary / VOCABULARY_FILE)
    write_json(self._temporary / RECORD_FILE, record | {'versions': versions()})
    if self._path.is_dir():
      self._path.rmdir()  # empty, as was checked
    os.replace(self._temporary, self._path)
