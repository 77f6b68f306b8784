"""Caches that seqio's own Beam job wrote (`seqio_cache_tasks`).

Such a cache is a folder of the task's name with, for each split,
`info.train.json`, `stats.train.json` and
`train.tfrecord-00000-of-00010`, ..., and an empty file COMPLETED. seqio reads
it in the place of the source; here it is found and checked, so that what is
wrong is said before anything is trained.
"""

import json
from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf

from st_moe.config import DataConfig
from st_moe.errors import UserError


def open_seqio_caches(
  config: DataConfig, provider: seqio.Task | seqio.Mixture
) -> dict[str, Any]:
  """Points seqio to `config.seqio_cache_dirs` and checks what is there.

  Args:
    config: folders and splits.
    provider: tasks that are registered with seqio.

  Returns:
    The counts that seqio keeps of each task and split, which name the content.

  Raises:
    UserError: a task that is not in the folders, or only in part, or that
      cannot be cached.
  """
  folders = config.seqio_cache_dirs
  folders = [folders] if isinstance(folders, str) else list(folders)
  seqio.add_global_cache_dirs(folders)
  splits = (config.train_split, config.eval_split)
  return {
    task.name: _check_task(task, folders, splits)
    for task in seqio.get_subtasks(provider)
  }


def _check_task(
  task: seqio.Task, folders: Sequence[str], splits: Sequence[str]
) -> dict[str, Any]:
  """Returns seqio's counts of each split."""
  if not task.supports_caching:
    raise _refused(
      f'task {task.name!r} has no seqio.CacheDatasetPlaceholder among its '
      'preprocessors, so seqio cannot cache it'
    )
  if task.cache_dir is None:
    raise _refused(
      f'no finished cache of task {task.name!r} in {", ".join(folders)} (a '
      f'folder {task.name} with a file COMPLETED); give the '
      '--output_cache_dir of `seqio_cache_tasks`'
    )
  return {split: _check_split(task.cache_dir, split) for split in splits}


def _check_split(folder: str, split: str) -> dict[str, Any]:
  stats = _read_json(seqio.get_cached_stats_path(folder, split))
  count = _read_json(seqio.get_cached_info_path(folder, split))['num_shards']
  prefix = seqio.get_cached_tfrecord_prefix(folder, split)
  files = tf.io.gfile.glob(f'{prefix}-*-of-{count:05d}')
  if len(files) != count:
    raise _refused(
      f'{prefix}-* are {len(files)} of {count} files; copy the rest, or run '
      '`seqio_cache_tasks` again'
    )
  return stats


def _read_json(path: str) -> dict[str, Any]:
  try:
    with tf.io.gfile.GFile(path) as file:
      return json.load(file)
  except (tf.errors.NotFoundError, ValueError) as error:
    raise _refused(
      f'{path} is missing or damaged; run `seqio_cache_tasks` again, or set '
      'DataConfig.train_split and eval_split to splits that are cached'
    ) from error


def _refused(what: str) -> UserError:
  return UserError(f'DataConfig.seqio_cache_dirs: {what}')
