"""Checkpoints: saved behind training's back, verified, never half there.

A checkpoint is a directory `<step>` with separate items: `params`,
`opt_state` and `counters` (arrays under plain names), `data` (where each
process stands in its data), `metadata` (JSON) and, after an evaluation,
`metrics`. Orbax writes it under a temporary name and renames it when it is
whole, so a killed run leaves old checkpoints as they were. Orbax does not
notice flipped bits: a manifest of hashes (integrity.py) is written before the
renaming and checked before anything is restored.
"""

from st_moe.checkpoint.arrays import ArrayReader, ArrayWriter
from st_moe.checkpoint.checkpointer import Checkpointer
from st_moe.checkpoint.reading import (
  Restored,
  RestoredItems,
  RestoredParams,
  check_newest,
  find_steps,
  restore_items,
  restore_params,
  steps_in,
)

__all__ = [
  'ArrayReader',
  'ArrayWriter',
  'Checkpointer',
  'Restored',
  'RestoredItems',
  'RestoredParams',
  'check_newest',
  'find_steps',
  'restore_items',
  'restore_params',
  'steps_in',
]
