"""Checkpoints: saved behind training's back, verified, never half there.

A checkpoint is a directory `<step>` with separate items: `params`,
`opt_state` and `counters` (arrays under plain names), `data` (where each
process stands in its data), `metadata` (JSON) and, after an evaluation,
`metrics`. Orbax writes it under a temporary name and renames it when it is
whole, so a killed run leaves old checkpoints as they were. Orbax does not
notice flipped bits: a manifest of hashes (integrity.py) is written before the
renaming and checked before anything is restored.
"""

import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from st_moe import trees
from st_moe.errors import UserError
from st_moe.integrity import Damaged, verify, write_manifest
from st_moe.train_state import TrainState

log = logging.getLogger(__name__)

BEST_METRIC = 'eval/loss'  # the lowest is the best


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint held.

  Attributes:
    step: whose checkpoint it is; older than asked for if that was damaged.
    state: with the placement that was asked for.
    data_state: where this process stood in its data; that of process 0 if
      another number of processes saved.
    data_processes: how many processes saved.
    metadata: as given to `save`.
  """

  step: int
  state: TrainState
  data_state: bytes
  data_processes: int
  metadata: dict[str, Any]


class _ProcessBytesHandler(ocp.CheckpointHandler):
  """One file of bytes for each process, `<process>_of_<processes>`."""

  def save(self, directory, args: '_ProcessBytesSave') -> None:
    name = f'{jax.process_index()}_of_{jax.process_count()}'
    (directory / name).write_bytes(args.item)

  def restore(self, directory, args: '_ProcessBytesRestore | None' = None):
    files = {path.name: path for path in directory.glob('*_of_*')}
    processes = int(next(iter(files)).split('_of_')[1])
    index = jax.process_index() if processes == jax.process_count() else 0
    return files[f'{index}_of_{processes}'].read_bytes(), processes


@ocp.args.register_with_handler(_ProcessBytesHandler, for_save=True)
@dataclasses.dataclass
class _ProcessBytesSave(ocp.args.CheckpointArgs):
  item: bytes


@ocp.args.register_with_handler(_ProcessBytesHandler, for_restore=True)
@dataclasses.dataclass
class _ProcessBytesRestore(ocp.args.CheckpointArgs):
  pass


def _items(state: TrainState) -> dict[str, Any]:
  """Returns the state as the trees that are stored, one for each item."""
  counters = {
    'step': state.step,
    'nonfinite_steps': state.nonfinite_steps,
    'skipped_steps': state.skipped_steps,
  }
  return {
    'params': state.params,
    'opt_state': state.opt_state,
    'counters': counters,
  }


def _check_fits(directory: Path, wanted: dict[str, Any]) -> None:
  """Compares names, shapes and types with those stored; reads no array.

  Args:
    directory: of one step.
    wanted: for each item, a tree of arrays or ShapeDtypeStructs.

  Raises:
    UserError: naming what is missing, surplus or different.
    Damaged: when the description cannot be read.
  """
  stored = {}
  for item in wanted:
    with ocp.StandardCheckpointer() as reader:
      metadata = reader.metadata(directory / item).item_metadata
    if metadata is None:
      raise Damaged(f'{directory / item} has no description of its arrays')
    stored[item] = metadata.tree
  difference = trees.difference(stored, wanted)
  if difference:
    raise UserError(
      f'the checkpoint {directory} does not fit this configuration; '
      f'{difference}; use the configuration that it was trained with'
    )


# MARK: reading


def _steps(directory: Path) -> list[int]:
  """Returns the steps of whole checkpoints, in order."""
  if not directory.is_dir():
    return []
  return sorted(
    int(path.name) for path in directory.iterdir() if path.name.isdigit()
  )


def _everywhere(ok: bool) -> bool:
  """Whether every process says so."""
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def _attempt(
  directory: Path, action: Callable[[Path], Any]
) -> tuple[Any, str | None]:
  """Returns what `action(directory)` returned, or why it failed anywhere."""
  value = problem = None
  try:
    value = action(directory)
  except UserError:
    raise
  except Damaged as e:
    problem = str(e)
  except Exception as e:  # Orbax and TensorStore raise many types.
    problem = f'{directory} cannot be read: {_one_line(e)}'
  if not _everywhere(problem is None) and problem is None:
    problem = f'{directory} is damaged, another process says'
  return value, problem


def _first_good(
  directory: Path, steps: list[int], read: Callable[[Path], Any]
) -> tuple[int, Any]:
  """Returns the newest of `steps` that can be read, and what was read.

  Raises:
    UserError: when none can, or one does not fit the configuration.
  """
  problems = []
  for step in reversed(steps):
    value, problem = _attempt(directory / str(step), verify)
    if problem is None:
      value, problem = _attempt(directory / str(step), read)
    if problem is None:
      return step, value
    problems.append(problem)
    log.warning(
      'checkpoint %d is damaged (%s); trying the one before', step, problem
    )
  raise UserError(
    f'no checkpoint in {directory} can be restored: {"; ".join(problems)}; '
    'start in another work directory, or bring back a copy of the files'
  )


def _read_arrays(directory: Path, wanted: dict[str, Any]) -> dict[str, Any]:
  """Reads the items of one step as trees like `wanted`, placed as they say."""
  restore = {
    item: ocp.args.StandardRestore(trees.nested(trees.by_name(tree)))
    for item, tree in wanted.items()
  }
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    found = reader.restore(directory, args=ocp.args.Composite(**restore))
  return {
    item: trees.like(tree, trees.by_name(found[item]))
    for item, tree in wanted.items()
  }


def _read(directory: Path, abstract: TrainState) -> Restored:
  wanted = _items(abstract)
  _check_fits(directory, wanted)
  items = _read_arrays(directory, wanted)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    rest = reader.restore(
      directory,
      args=ocp.args.Composite(
        data=_ProcessBytesRestore(), metadata=ocp.args.JsonRestore()
      ),
    )
  data_state, data_processes = rest['data']
  return Restored(
    step=int(directory.name),
    state=TrainState(
      params=items['params'],
      opt_state=items['opt_state'],
      **items['counters'],
    ),
    data_state=data_state,
    data_processes=data_processes,
    metadata=rest['metadata'],
  )


def restore_params(path: Path, step: int | None, abstract_params: Any) -> Any:
  """Reads the parameters alone; changes nothing on disk.

  Args:
    path: directory of checkpoints, or the work directory that holds it.
    step: which; None for the newest that is whole.
    abstract_params: tree of ShapeDtypeStructs with shardings.

  Raises:
    UserError: when there is none, or it does not fit `abstract_params`.
  """
  _silence_orbax()
  path = Path(path).absolute()
  directory = path / 'checkpoints' if (path / 'checkpoints').is_dir() else path
  steps = _steps(directory)
  if not steps or (step is not None and step not in steps):
    wanted = 'checkpoint' if step is None else f'checkpoint of step {step}'
    raise UserError(
      f'there is no {wanted} in {directory}; it has steps {steps}'
    )

  def read(step_directory):
    wanted = {'params': abstract_params}
    _check_fits(step_directory, wanted)
    return _read_arrays(step_directory, wanted)['params']

  return _first_good(directory, steps if step is None else [step], read)[1]


# MARK: writing


class Checkpointer:
  """Saves and restores the state of a run; the only writer of its directory.

  A failed save (a full disk) is one warning: training goes on, and older
  checkpoints are as they were.
  """

  def __init__(self, directory: Path, *, keep_last: int, keep_best: int):
    """Opens the directory; removes what an interrupted save left.

    Args:
      directory: of the checkpoints; created when absent.
      keep_last: how many of the newest to keep.
      keep_best: how many of those with the lowest `BEST_METRIC` to keep.
    """
    self._directory = Path(directory).absolute()
    self._keep_last = keep_last
    self._keep_best = keep_best
    self._saving: int | None = None
    _silence_orbax()
    self._drop_unreadable_metrics()
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    def value(metrics):
      return metrics.get(BEST_METRIC, math.inf)

    keep = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(self._keep_last),
        # Keeps the last n of the sorted: reversed, the n lowest.
        checkpoint_managers.BestN(
          get_metric_fn=value,
          reverse=True,
          n=self._keep_best,
          keep_checkpoints_without_metrics=False,
        ),
      ]
    )
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        # Without a best_fn Orbax would not write the metrics.
        best_fn=value,
        best_mode='min',
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._before_commit
        ),
      ),
    )

  def _before_commit(self) -> None:
    """Called by Orbax on one process when every file is written.

    Orbax 0.12 renames the temporary directory after this, so the manifest is
    part of what is committed.
    """
    temporary = list(
      self._directory.glob(f'{self._saving}.orbax-checkpoint-tmp*')
    )
    write_manifest(
      temporary[0] if temporary else self._directory / str(self._saving)
    )

  def save(
    self,
    step: int,
    state: TrainState,
    data_state: bytes,
    metadata: dict[str, Any],
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Copies the state off the devices and writes it in the background.

    Args:
      step: steps done; must be later than any saved.
      state: may be donated to the next step.
      data_state: where this process stands in its data.
      metadata: ready for JSON.
      metrics: of an evaluation of this state, if there was one.

    Raises:
      RuntimeError: when there is a checkpoint of this step or a later one.
    """
    self.wait()
    if not self._has_room(step, state):
      return
    score = (metrics or {}).get(BEST_METRIC, math.nan)
    self._saving = step
    try:
      accepted = self._manager.save(
        step,
        args=ocp.args.Composite(
          **{
            item: ocp.args.StandardSave(trees.nested(trees.by_name(tree)))
            for item, tree in _items(state).items()
          },
          data=_ProcessBytesSave(data_state),
          metadata=ocp.args.JsonSave(metadata),
        ),
        metrics={BEST_METRIC: score} if math.isfinite(score) else None,
      )
    except Exception as e:  # Whatever it is, training must go on.
      self._give_up(e)
      return
    if not accepted:
      raise RuntimeError(
        f'step {step} was not saved: {self._directory} already has step '
        f'{self.latest_step()}'
      )

  def _has_room(self, step: int, state: TrainState) -> bool:
    """Whether the disk has room for the state, uncompressed; else warns."""
    free = shutil.disk_usage(self._directory).free
    needed = sum(
      shard.data.nbytes
      for leaf in jax.tree.leaves(state)
      for shard in leaf.addressable_shards
      if shard.replica_id == 0
    )
    if _everywhere(needed <= free):
      return True
    log.warning(
      'step %d is not saved: it needs %.0f MB in %s, which has %.0f MB free; '
      'training goes on, older checkpoints are intact',
      step,
      needed / 1e6,
      self._directory,
      free / 1e6,
    )
    return False

  def _give_up(self, error: Exception) -> None:
    """Reports a failed save and removes what it left."""
    log.warning(
      'step %s could not be saved (%s); training goes on, older checkpoints '
      'are intact, the next save is tried as usual',
      self._saving,
      _one_line(error),
    )
    self._saving = None
    self._manager = self._open()

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, saved or being saved."""
    return self._manager.latest_step()

  def wait(self) -> int | None:
    """Waits for the save under way; returns the newest step on disk."""
    try:
      self._manager.wait_until_finished()
    except Exception as e:  # Raised by the thread that was saving.
      self._give_up(e)
    return self.latest_step()

  def close(self) -> None:
    """Waits for the save under way and ends the threads."""
    self.wait()
    self._manager.close()

  def restore(self, step: int | None, abstract: TrainState) -> Restored:
    """Reads a checkpoint, or if it is damaged the newest whole one before.

    Damaged checkpoints that were passed over are kept as `<step>.damaged`.

    Args:
      step: which; None for the newest.
      abstract: ShapeDtypeStructs with shardings, of any mesh.

    Raises:
      UserError: when there is none, none is whole, or it does not fit
        `abstract`.
    """
    self.wait()
    steps = list(self._manager.all_steps())
    if not steps or (step is not None and step not in steps):
      raise UserError(
        f'there is no checkpoint of step {step} in {self._directory}; it has '
        f'steps {steps}'
      )
    steps = [s for s in steps if step is None or s <= step]
    good, restored = _first_good(
      self._directory, steps, lambda path: _read(path, abstract)
    )
    self._set_aside(steps[steps.index(good) + 1 :])
    self._manager.reload()
    return restored

  def _drop_unreadable_metrics(self) -> None:
    """Sets aside checkpoints whose metrics would stop Orbax from starting."""
    damaged = []
    for step in _steps(self._directory):
      path = self._directory / str(step) / 'metrics' / 'metrics'
      try:
        if path.exists():
          json.loads(path.read_text())
      except ValueError:
        damaged.append(step)
    self._set_aside(damaged)

  def _set_aside(self, steps: list[int]) -> None:
    """Renames damaged checkpoints, so that their steps can be saved again."""
    if jax.process_count() > 1:  # nobody reads them any more
      multihost_utils.sync_global_devices('damaged checkpoints found')
    for step in steps if jax.process_index() == 0 else []:
      name = new_name = f'{step}.damaged'
      copies = 1
      while (self._directory / new_name).exists():
        copies += 1
        new_name = f'{name}.{copies}'
      os.replace(self._directory / str(step), self._directory / new_name)
      log.warning('kept the damaged checkpoint %d as %s', step, new_name)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('damaged checkpoints set aside')


def _one_line(error: Exception) -> str:
  """Returns the sense of an error whose text may run over many lines."""
  text = str(error)
  for known in ('No space left on device', 'File too large'):
    if known in text:
      return known
  lines = text.splitlines() or [type(error).__name__]
  return lines[0][:200]


def _silence_orbax() -> None:
  """Drops Orbax's own log lines: its errors reach us as exceptions."""
  absl_logging.get_absl_logger().addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
  return f'{os.sep}orbax{os.sep}' not in record.pathname
