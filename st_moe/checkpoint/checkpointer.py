"""Writing checkpoints behind training's back; keeping the last and the best."""

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from st_moe import trees
from st_moe.best import rank
from st_moe.checkpoint.reading import (
  ProcessBytesSave,
  Restored,
  everywhere,
  first_good,
  one_line,
  read_state,
  silence_orbax,
  state_items,
  steps_in,
)
from st_moe.errors import UserError
from st_moe.integrity import write_manifest
from st_moe.train_state import TrainState

log = logging.getLogger(__name__)


class Checkpointer:
  """Saves and restores the state of a run; the only writer of its directory.

  A failed save (a full disk) is one warning: training goes on, and older
  checkpoints are as they were.
  """

  def __init__(
    self,
    directory: Path,
    *,
    keep_last: int,
    keep_best: int = 0,
    metric: str = 'eval/loss',
  ):
    """Opens the directory; removes what an interrupted save left.

    Args:
      directory: of the checkpoints; created when absent.
      keep_last: how many of the newest to keep.
      keep_best: how many to keep beside them, the best by `metric`.
      metric: name of the score that decides; see best.py.
    """
    self._directory = Path(directory).absolute()
    self._keep_last = keep_last
    self._keep_best = keep_best
    self._metric = metric
    self._saving: int | None = None
    silence_orbax()
    self._drop_unreadable_metrics()
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    def value(scores):
      return rank(self._metric, scores, int(scores.get('step', 0)))

    keep = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(self._keep_last),
        checkpoint_managers.BestN(
          get_metric_fn=value,
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
    scores: dict[str, float] | None = None,
  ) -> None:
    """Copies the state off the devices and writes it in the background.

    Args:
      step: steps done; must be later than any saved.
      state: may be donated to the next step.
      data_state: where this process stands in its data.
      metadata: ready for JSON.
      scores: of an evaluation of this state, if there was one.

    Raises:
      RuntimeError: when there is a checkpoint of this step or a later one.
    """
    self.wait()
    if not self._has_room(step, state):
      return
    finite = {k: v for k, v in (scores or {}).items() if math.isfinite(v)}
    self._saving = step
    try:
      accepted = self._manager.save(
        step,
        args=ocp.args.Composite(
          **{
            item: ocp.args.StandardSave(trees.nested(trees.by_name(tree)))
            for item, tree in state_items(state).items()
          },
          data=ProcessBytesSave(data_state),
          metadata=ocp.args.JsonSave(metadata),
        ),
        # The step breaks ties.
        metrics=finite | {'step': step} if finite else None,
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
    if everywhere(needed <= free):
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
      one_line(error),
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
    good, restored = first_good(
      self._directory, steps, lambda path: read_state(path, abstract)
    )
    self._set_aside(steps[steps.index(good) + 1 :])
    self._manager.reload()
    return restored

  def _drop_unreadable_metrics(self) -> None:
    """Sets aside checkpoints whose metrics would stop Orbax from starting."""
    damaged = []
    for step in steps_in(self._directory):
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
