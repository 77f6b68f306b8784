"""Reading checkpoints: what is damaged is passed over, what misfits refused."""

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from st_moe import trees
from st_moe.best import Step, find_best
from st_moe.errors import UserError
from st_moe.integrity import Damaged, verify
from st_moe.train_state import TrainState

log = logging.getLogger(__name__)


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


@dataclasses.dataclass(frozen=True)
class RestoredParams:
  """Parameters alone.

  Attributes:
    step: whose checkpoint they are from.
    params: with the placement that was asked for.
  """

  step: int
  params: Any


@dataclasses.dataclass(frozen=True)
class RestoredItems:
  """Some items of a checkpoint.

  Attributes:
    step: whose checkpoint they are from.
    directory: of that step.
    items: the tree of each item, with the placement that was asked for.
  """

  step: int
  directory: Path
  items: dict[str, Any]


class _ProcessBytesHandler(ocp.CheckpointHandler):
  """One file of bytes for each process, `<process>_of_<processes>`."""

  def save(self, directory, args: 'ProcessBytesSave') -> None:
    name = f'{jax.process_index()}_of_{jax.process_count()}'
    (directory / name).write_bytes(args.item)

  def restore(self, directory, args: '_ProcessBytesRestore | None' = None):
    files = {path.name: path for path in directory.glob('*_of_*')}
    processes = int(next(iter(files)).split('_of_')[1])
    index = jax.process_index() if processes == jax.process_count() else 0
    return files[f'{index}_of_{processes}'].read_bytes(), processes


@ocp.args.register_with_handler(_ProcessBytesHandler, for_save=True)
@dataclasses.dataclass
class ProcessBytesSave(ocp.args.CheckpointArgs):
  item: bytes


@ocp.args.register_with_handler(_ProcessBytesHandler, for_restore=True)
@dataclasses.dataclass
class _ProcessBytesRestore(ocp.args.CheckpointArgs):
  pass


def state_items(state: TrainState) -> dict[str, Any]:
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
    stored[item] = trees.nested(describe(directory, item))
  difference = trees.difference(stored, wanted)
  if difference:
    raise UserError(
      f'the checkpoint {directory} does not fit this configuration; '
      f'{difference}; use the configuration that it was trained with'
    )


def steps_in(directory: Path) -> list[int]:
  """Returns the steps of whole checkpoints, in order."""
  if not directory.is_dir():
    return []
  return sorted(
    int(path.name) for path in directory.iterdir() if path.name.isdigit()
  )


def everywhere(ok: bool) -> bool:
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
    problem = f'{directory} cannot be read: {one_line(e)}'
  if not everywhere(problem is None) and problem is None:
    problem = f'{directory} is damaged, another process says'
  return value, problem


def first_good(
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
    if step != steps[0]:
      log.warning(
        'checkpoint %d is damaged (%s); trying the one before', step, problem
      )
  raise UserError(
    f'no checkpoint in {directory} can be restored: {"; ".join(problems)}; '
    'bring back a copy of the files, or start anew in another place'
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


def read_state(directory: Path, abstract: TrainState) -> Restored:
  wanted = state_items(abstract)
  _check_fits(directory, wanted)
  arrays = _read_arrays(directory, wanted)
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
      params=arrays['params'],
      opt_state=arrays['opt_state'],
      **arrays['counters'],
    ),
    data_state=data_state,
    data_processes=data_processes,
    metadata=rest['metadata'],
  )


def find_steps(path: Path, step: Step) -> tuple[Path, list[int]]:
  """Returns where checkpoints are, and which may be read; reads none.

  Args:
    path: directory of checkpoints, or the work directory that holds it.
    step: the one that is wanted, or 'best'; None: any.

  Raises:
    UserError: when there is none.
  """
  path = Path(path).absolute()
  directory = path / 'checkpoints' if (path / 'checkpoints').is_dir() else path
  steps = steps_in(directory)
  if step == 'best' and steps:
    return directory, [find_best(directory, steps)]
  if not steps or (step is not None and step not in steps):
    wanted = 'checkpoint' if step is None else f'checkpoint of step {step}'
    raise UserError(
      f'there is no {wanted} in {directory}; it has steps {steps}'
    )
  return directory, steps if step is None else [step]


def restore_params(
  path: Path, step: Step, abstract_params: Any
) -> RestoredParams:
  """Reads the parameters alone; changes nothing on disk.

  Args:
    path: directory of checkpoints, or the work directory that holds it.
    step: which, or 'best'; None for the newest that is whole.
    abstract_params: tree of ShapeDtypeStructs with shardings.

  Raises:
    UserError: when there is none, or it does not fit `abstract_params`.
  """
  restored = restore_items(path, step, lambda _: {'params': abstract_params})
  return RestoredParams(restored.step, restored.items['params'])


def restore_items(
  path: Path,
  step: Step,
  wanted: Callable[[dict[str, dict[str, Any]]], dict[str, Any]],
) -> RestoredItems:
  """Reads some items of a checkpoint; changes nothing on disk.

  Args:
    path: directory of checkpoints, or the work directory that holds it.
    step: which, or 'best'; None for the newest that is whole.
    wanted: given the description (shape, dtype) of each stored array, by item
      and name, returns for each item to read a tree of ShapeDtypeStructs with
      shardings.

  Raises:
    UserError: when there is none, or it does not fit what is wanted.
  """
  silence_orbax()
  directory, steps = find_steps(path, step)

  def read(step_directory: Path) -> dict[str, Any]:
    stored = {
      item: describe(step_directory, item) for item in ('params', 'opt_state')
    }
    trees_wanted = wanted(stored)
    _check_fits(step_directory, trees_wanted)
    return _read_arrays(step_directory, trees_wanted)

  good, items = first_good(directory, steps, read)
  return RestoredItems(good, directory / str(good), items)


def check_newest(
  path: Path,
  step: Step,
  wanted: Callable[[dict[str, Any]], Any],
) -> None:
  """Refuses a checkpoint of another model, as `restore_items` would.

  Reads no array. What is damaged is left to the reading.

  Args:
    path: directory of checkpoints, or the work directory that holds it.
    step: which, or 'best'; None for the newest.
    wanted: given the description of each stored parameter by name, returns a
      tree of ShapeDtypeStructs.

  Raises:
    UserError: when there is none, or it does not fit what is wanted.
  """
  silence_orbax()
  directory, steps = find_steps(path, step)

  def check(step_directory: Path) -> None:
    params = wanted(describe(step_directory, 'params'))
    _check_fits(step_directory, {'params': params})

  _attempt(directory / str(steps[-1]), check)


def describe(step_directory: Path, item: str) -> dict[str, Any]:
  """Returns the description of each array of an item by name, {} without it."""
  if not (step_directory / item).is_dir():
    return {}
  with ocp.StandardCheckpointer() as reader:
    metadata = reader.metadata(step_directory / item).item_metadata
  if metadata is None:
    raise Damaged(f'{step_directory / item} has no description of its arrays')
  return trees.by_name(metadata.tree)


def one_line(error: Exception) -> str:
  """Returns the sense of an error whose text may run over many lines."""
  text = str(error)
  for known in ('No space left on device', 'File too large'):
    if known in text:
      return known
  lines = text.splitlines() or [type(error).__name__]
  return lines[0][:200]


def silence_orbax() -> None:
  """Drops Orbax's own log lines: its errors reach us as exceptions."""
  absl_logging.get_absl_logger().addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
  return f'{os.sep}orbax{os.sep}' not in record.pathname
