"""The work directory of a run: who owns it, what it was started with.

It holds `config.gin` (re-running with it alone gives the same run), `run.json`
(versions, git state, mesh, parameter counts, seed, command, data), the
vocabulary, the checkpoints, the metrics and the report. A directory belongs to
one configuration and, while a process writes to it, to that process.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from st_moe import processes
from st_moe.config import DataConfig, RunConfig, to_dict
from st_moe.errors import UserError

CONFIG_FILE = 'config.gin'
MODEL_FILE = 'model.gin'  # of a model directory, which is no work directory
RUN_FILE = 'run.json'
VOCABULARY_FILE = 'vocabulary.model'

_RECORDED_PACKAGES = (
  'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'gin-config',
  'libtpu', 'jax-cuda13-plugin', 'seqio', 'tensorflow', 'tensorflow-text',
  'sentencepiece', 'grain',
)  # fmt: skip

# Until a new file shows on a network file system or a mounted bucket.
_SHOWN_WITHIN_SECONDS = 10

# What a run that was killed early may leave before its run.json.
_BEFORE_RECORD = ('.lock', 'checkpoints', CONFIG_FILE, VOCABULARY_FILE)

# Settings that every parameter tree depends on, as paths in run.json.
_SHAPES = tuple(
  f'model.{name}'
  for name in (
    'vocab_size', 'd_model', 'd_ff', 'd_kv', 'num_heads', 'num_experts',
    'num_encoder_layers', 'num_decoder_layers',
  )
)  # fmt: skip


def write_json(path: Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the whole new one."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n')
  os.replace(temporary, path)


def read_json(path: Path) -> Any:
  """Reads JSON.

  Raises:
    UserError: when the file is not JSON.
  """
  try:
    return json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise UserError(
      f'{path} is not valid JSON ({e}); bring back a copy of it'
    ) from e


def differences(old: Any, new: Any, prefix: str = '') -> list[str]:
  """Returns 'path: old -> new' for every leaf in which two trees differ."""
  if isinstance(old, dict) and isinstance(new, dict):
    rows = []
    for key in sorted(set(old) | set(new)):
      name = f'{prefix}.{key}' if prefix else str(key)
      rows += differences(old.get(key), new.get(key), name)
    return rows
  return [] if old == new else [f'{prefix}: {old!r} -> {new!r}']


def _is_shape(difference: str) -> bool:
  """Whether no checkpoint of the one configuration fits the other."""
  return difference.partition(':')[0] in _SHAPES


def versions() -> dict[str, str]:
  """Returns the versions of Python and of the packages a run depends on."""
  found = {'python': platform.python_version()}
  for name in _RECORDED_PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def git_state() -> dict[str, Any] | None:
  """Returns commit and cleanliness of the source tree; None outside git."""

  def git(*args: str) -> str:
    return subprocess.run(
      ('git', *args),
      cwd=Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  try:
    return {
      'commit': git('rev-parse', 'HEAD'),
      'clean': not git('status', '--porcelain'),
    }
  except (OSError, subprocess.CalledProcessError):
    return None


def with_own_vocabulary(config: DataConfig, path: Path) -> DataConfig:
  """Replaces the vocabulary 'auto' by the one that a run at `path` has kept."""
  kept = path / VOCABULARY_FILE
  if config.vocabulary != 'auto' or not kept.exists():
    return config
  return dataclasses.replace(config, vocabulary=str(kept))


@dataclasses.dataclass
class WorkDirectory:
  """An opened, locked work directory.

  Of several processes one has the lock; in the others what checks or writes
  does nothing.
  """

  path: Path
  _lock: Any  # None in a process that only reads
  _is_new: bool = False

  @property
  def checkpoints(self) -> Path:
    return self.path / 'checkpoints'

  def data_config(self, config: DataConfig) -> DataConfig:
    """Returns what to read; a vocabulary trained before is used again."""
    return with_own_vocabulary(config, self.path)

  def keep_vocabulary(self, spec: str) -> None:
    """Keeps a copy of a SentencePiece model, so that the run has all it needs.

    Args:
      spec: path of the model, or 'byte'.
    """
    kept = self.path / VOCABULARY_FILE
    if self._lock is not None and spec != 'byte' and not kept.exists():
      with _writing(kept):
        temporary = kept.with_name(kept.name + '.tmp')
        temporary.write_bytes(Path(spec).read_bytes())
        os.replace(temporary, kept)

  @property
  def run_file(self) -> Path:
    return self.path / RUN_FILE

  @property
  def summary_file(self) -> Path:
    return self.path / 'summary.json'

  def finished(
    self, steps: int, patience: int | None = None, patience_from: int = 0
  ) -> dict[str, Any] | None:
    """Returns the summary of a run that has ended, or None.

    In all processes what the one with the lock finds.

    Args:
      steps: after which it ends.
      patience: RunConfig.early_stopping; a run that has stopped early with
        another one goes on.
      patience_from: RunConfig.early_stopping_from; one that has stopped before
        goes on.
    """
    return processes.from_leader(self._summary(steps, patience, patience_from))

  def _summary(
    self, steps: int, patience: int | None, patience_from: int
  ) -> dict[str, Any] | None:
    if self._lock is None:
      return None
    if not (self.run_file.exists() and self.summary_file.exists()):
      return None
    summary = read_json(self.summary_file)
    done = summary.get('step')
    early = summary.get('stopped_early', {}).get('early_stopping')
    ended = done == steps or (
      early is not None and early == patience and done >= patience_from
    )
    saved = self.checkpoints / str(done)
    return summary if ended and saved.exists() else None

  def close(self) -> None:
    """Frees the directory; one that was made and never used is removed."""
    if self._lock is None:
      return
    if self._is_new and not self.run_file.exists():
      (self.path / '.lock').unlink(missing_ok=True)
      with contextlib.suppress(OSError):  # something is in it after all
        self.path.rmdir()
    self._lock.close()

  def check_configuration(self, config: RunConfig, *, allow: bool) -> None:
    """Refuses a directory that was started with another configuration.

    Raises:
      UserError: naming the settings that differ.
    """
    if self._lock is None or not self.run_file.exists():
      return
    old = read_json(self.run_file).get('config')
    new = json.loads(json.dumps(to_dict(config)))
    changed = differences(old, new)
    # What the checkpoint's shapes depend on comes first.
    changed.sort(key=lambda row: not _is_shape(row))
    if changed and (not allow or _is_shape(changed[0])):
      way_out = 'use another --workdir'
      if not _is_shape(changed[0]):
        way_out += ', or --allow_config_change to go on with the new one'
      raise UserError(
        f'{self.path} holds a run of a different configuration '
        f'({"; ".join(changed[:5])}{"; ..." if len(changed) > 5 else ""}); '
        f'{way_out}'
      )

  def check_data(self, fingerprint: dict[str, Any], *, allow: bool) -> None:
    """Refuses data other than what the run began with.

    A different vocabulary never fits the checkpoint's embedding.

    Raises:
      UserError: naming what differs.
    """
    if self._lock is None or not self.run_file.exists():
      return
    old = read_json(self.run_file).get('data', {})
    new = json.loads(json.dumps(fingerprint))
    if old.get('vocabulary') != new.get('vocabulary'):
      raise UserError(
        f'the vocabulary does not fit the checkpoints in {self.path}: they '
        f'were trained with {_short(old.get("vocabulary"))}, this run has '
        f'{_short(new.get("vocabulary"))}; give the original vocabulary or '
        'use another --workdir'
      )
    changed = differences(old, new)
    if changed and not allow:
      raise UserError(
        f'the data changed since the run in {self.path} began '
        f'({_short("; ".join(changed), 300)}); use another --workdir, or '
        '--allow_config_change to go on with the new data'
      )

  def record(
    self,
    config: RunConfig,
    *,
    operative_config: str,
    command: list[str],
    details: dict[str, Any],
  ) -> None:
    """Writes config.gin and run.json; a restart is added to `restarts`."""
    if self._lock is None:
      return
    restarts, begun = [], {}
    if self.run_file.exists():
      previous = read_json(self.run_file)
      begun = {k: previous[k] for k in ('initial_weights',) if k in previous}
      restarts = previous.get('restarts', []) + [
        {key: previous.get(key) for key in ('command', 'versions', 'git')}
      ]
    content = {
      'config': to_dict(config),
      'command': command,
      'versions': versions(),
      'git': git_state(),
      'seed': config.seed,
      'restarts': restarts,
      **begun,
      **details,
    }
    with _writing(self.path):
      (self.path / CONFIG_FILE).write_text(operative_config)
      write_json(self.run_file, content)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
  """Makes a full disk the user's error."""
  try:
    yield
  except OSError as e:
    raise UserError(
      f'{path} cannot be written ({e.strerror}); make room, or use another '
      '--workdir'
    ) from e


def _short(value: Any, limit: int = 120) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= limit else text[: limit - 3] + '...'


def check_parents(path: Path, name: str) -> None:
  """Refuses a place below which nothing can be made; touches nothing.

  Args:
    path: of an output; folders above it that are missing will be made.
    name: of the output, for messages.

  Raises:
    UserError: when what is there above it is a file, or may not be changed.
  """
  above = next(p for p in path.absolute().parents if p.exists())
  if not above.is_dir():
    raise UserError(f'{name}: {above} is a file; choose another place')
  if not os.access(above, os.W_OK):
    raise UserError(f'{name}: {above} may not be changed; choose another place')


def check_path(path: Path) -> None:
  """Refuses what can be no work directory; touches nothing.

  Raises:
    UserError: for a file, and for a folder that holds other things than a run.
  """
  if path.exists() and not path.is_dir():
    raise UserError(f'--workdir={path} is a file; give a directory')
  if not path.is_dir() or (path / RUN_FILE).exists():
    return
  others = sorted(
    child.name
    for child in path.iterdir()
    if child.name not in _BEFORE_RECORD and child.suffix != '.tmp'
  )
  if others:
    raise UserError(
      f'--workdir={path} is not empty and holds no run (it has '
      f'{", ".join(others[:3])}{", ..." if others[3:] else ""}); choose '
      'another directory'
    )


def open_workdir(path: Path) -> WorkDirectory:
  """Creates and locks a work directory; of several processes the first does.

  The lock is the kernel's: it is free again when its process ends, however
  that ends.

  Raises:
    UserError: when the path is no directory, cannot be written, holds other
      things than a run, or another process works in it; when a process does
      not see the directory that process 0 has made.
  """
  if not processes.is_leader():
    _check_shared(path)
    return WorkDirectory(path, None)
  is_new = not path.exists()
  check_path(path)
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / '.lock').open('a+')
  except OSError as e:
    raise UserError(
      f'--workdir={path} cannot be written ({e.strerror}); choose another'
    ) from e
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    lock.seek(0)
    owner = lock.read().strip() or 'another process'
    lock.close()
    raise UserError(
      f'--workdir={path} is in use by {owner}; wait for it, stop it, or use '
      'another directory'
    ) from None
  lock.truncate(0)
  lock.write(f'process {os.getpid()} on {socket.gethostname()}')
  lock.flush()
  directory = WorkDirectory(path, lock, is_new)
  try:
    if processes.joined():
      _show_to_all(path)
  except BaseException:
    directory.close()
    raise
  return directory


def _show_to_all(path: Path) -> None:
  """Makes a file for the other processes to see, which have none of its name.

  Not the lock: what mounts know of files that were there before may be old.
  """
  name = f'.seen_by_all.{os.getpid()}.{time.time_ns()}.tmp'
  (path / name).touch()
  try:
    processes.from_leader(name)
    processes.exchange(None)
  finally:
    (path / name).unlink()


def _check_shared(path: Path) -> None:
  """Refuses a directory that is not the one of process 0."""
  name = processes.from_leader(None)
  end = time.monotonic() + _SHOWN_WITHIN_SECONDS
  while not (path / name).exists():
    if time.monotonic() > end:
      raise UserError(
        f'--workdir={path} is another directory here than for process 0; all '
        'processes need the same one, on a file system that they share'
      )
    time.sleep(0.1)
  processes.exchange(None)
