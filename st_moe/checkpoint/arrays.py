"""Checkpoints one array at a time, for models larger than memory.

`ArrayReader` reads single arrays of a checkpoint of ours; `ArrayWriter` makes
a checkpoint array by array and shows it whole or not at all. Neither knows
what the arrays mean.
"""

import ctypes
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
from jax.experimental import multihost_utils

from st_moe import trees
from st_moe.best import Step
from st_moe.checkpoint.reading import (
  describe,
  find_steps,
  first_good,
  one_line,
  silence_orbax,
)
from st_moe.errors import UserError
from st_moe.integrity import write_manifest

# What Orbax calls the one tree of a partial save.
_SAVED_TREE = 'state'
# An array is written in chunks of this size: what compresses them then needs
# memory for a few chunks, not for a second array.
_CHUNK_BYTES = 16 << 20
# Small arrays are written together: each save takes a tenth of a second.
_TOGETHER_BYTES = 32 << 20


class ArrayReader:
  """The arrays of one item of a checkpoint, each read when it is wanted.

  Attributes:
    where: the directory of the step, for messages.
    step: of the checkpoint.
    tensors: the description (shape, dtype) of each array, by name.
  """

  def __init__(self, path: Path, step: Step, item: str = 'params'):
    """Opens a checkpoint; verifies its files.

    Args:
      path: directory of checkpoints, or the work directory that holds it.
      step: which, or 'best'; None for the newest that is whole.
      item: 'params' or 'opt_state'.

    Raises:
      UserError: when there is none, or none is whole.
    """
    silence_orbax()
    directory, steps = find_steps(path, step)

    self.step, self.tensors = first_good(
      directory, steps, lambda path: describe(path, item)
    )
    self.where = str(directory / str(self.step))
    self._item = item
    self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    self._last: tuple[str, np.ndarray] | None = None

  def read(
    self, name: str, index: tuple[slice, ...] | None = None
  ) -> np.ndarray:
    """Returns an array, or the part of it that `index` says.

    The array read last is kept, so that its parts are read once.
    """
    if self._last is None or self._last[0] != name:
      self._last = None  # two arrays at a time would be too many
      if math.prod(self.tensors[name].shape) * 4 > _TOGETHER_BYTES:
        _return_memory()
      found = self._reader.restore(
        Path(self.where) / self._item,
        args=ocp.args.PyTreeRestore(
          item=trees.nested({name: 0}),
          restore_args=trees.nested(
            {name: ocp.RestoreArgs(restore_type=np.ndarray)}
          ),
          partial_restore=True,
        ),
      )
      self._last = name, trees.by_name(found)[name]
    return self._last[1] if index is None else self._last[1][index]


class ArrayWriter:
  """Writes a checkpoint array by array; nothing shows until `commit`."""

  def __init__(self, directory: Path, step: int):
    """Prepares to write `directory/step`.

    Args:
      directory: of checkpoints; created when absent.
      step: of the checkpoint.
    """
    silence_orbax()
    self._final = Path(directory).absolute() / str(step)
    self._temporary = self._final.with_name(f'{step}.writing')
    self._items: set[str] = set()
    self._waiting: dict[str, dict[str, Any]] = {}
    self._waiting_bytes = 0
    if jax.process_index() == 0:
      shutil.rmtree(self._temporary, ignore_errors=True)
      self._temporary.mkdir(parents=True)
    _meet('an array writer is ready')

  def add(self, item: str, name: str, value: np.ndarray | jax.Array) -> None:
    """Takes one array of an item ('params', 'opt_state', 'counters').

    It is written now or together with the next ones; it must not change.

    Raises:
      UserError: when one cannot be written (a full disk).
    """
    if isinstance(value, np.generic):  # which Orbax does not take
      value = np.asarray(value)
    if self._waiting_bytes + value.nbytes > _TOGETHER_BYTES:
      self._write_waiting()
    self._waiting.setdefault(item, {})[name] = value
    self._waiting_bytes += value.nbytes
    if self._waiting_bytes > _TOGETHER_BYTES:
      self._write_waiting()

  def _write_waiting(self) -> None:
    """Writes what was added since the last time."""
    try:
      for item, arrays in self._waiting.items():
        self._items.add(item)
        with self._options():
          ocp_v1.partial.save(
            self._temporary / f'{item}.parts', trees.nested(arrays)
          )
    except Exception as e:  # Orbax and TensorStore raise many types.
      self.abandon()
      raise UserError(
        f'{self._final} cannot be written ({one_line(e)}); make room, or '
        'choose another place'
      ) from e
    self._waiting, self._waiting_bytes = {}, 0
    _return_memory()

  def _options(self) -> ocp_v1.Context:
    """Returns how arrays are written: in chunks, from where they are."""
    options = ocp_v1.Context()
    options.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    options.memory.deepcopy_host_arrays = False  # `save` waits for the disk
    return options

  def commit(self, metadata: dict[str, Any]) -> None:
    """Shows the checkpoint under its name.

    Args:
      metadata: ready for JSON.
    """
    self._write_waiting()
    for item in sorted(self._items):
      parts = self._temporary / f'{item}.parts'
      ocp_v1.partial.finalize(parts)
      if jax.process_index() == 0:
        os.replace(parts / _SAVED_TREE, self._temporary / item)
        shutil.rmtree(parts)
    _meet('arrays are written')
    if jax.process_index() == 0:
      place = self._temporary / 'metadata'
      place.mkdir()
      (place / 'metadata').write_text(json.dumps(metadata))
      write_manifest(self._temporary)
      os.replace(self._temporary, self._final)
    _meet('a checkpoint is whole')

  def abandon(self) -> None:
    """Removes what was written."""
    if jax.process_index() == 0:
      shutil.rmtree(self._temporary, ignore_errors=True)


def _return_memory() -> None:
  """Gives freed memory back to the kernel, where the C library is glibc.

  Of the second, compressed array that a save makes glibc keeps most.
  """
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim is not None:
    trim(0)


def _meet(where: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(where)
