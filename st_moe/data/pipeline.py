"""The one door to the data: `open_data` gives batches as numpy arrays.

Two roads behind it: seqio over raw text (streaming.py, needs TensorFlow), and
a tokenized cache read by Grain (cache.py, does not). Neither knows of JAX.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from st_moe.config import DataConfig
from st_moe.data import sources
from st_moe.data.downstream import catalog, sentinels
from st_moe.data.tensorflow_loading import load_tensorflow
from st_moe.data.vocabularies import Vocabulary, load_vocabulary
from st_moe.errors import UserError

if TYPE_CHECKING:
  from st_moe.data.streaming import StreamingData

# seqio's names: encoder_input_tokens [rows, inputs_length];
# decoder_input_tokens, decoder_target_tokens, decoder_loss_weights
# [rows, targets_length]; packed rows also have *_segment_ids, *_positions.
Batch = dict[str, np.ndarray]


class Batches(Protocol):
  """Endless training batches whose position can be saved."""

  def __iter__(self) -> 'Batches': ...

  def __next__(self) -> Batch: ...

  def get_state(self) -> bytes:
    """Returns the position behind the last batch handed out."""
    ...

  def set_state(self, state: bytes) -> None:
    """Goes on from a position: the next batch is the one that came then.

    Raises:
      UserError: the position does not fit this data or these processes.
    """
    ...


class Data(Protocol):
  """An opened corpus.

  Attributes:
    vocabulary: of inputs and targets.
    fingerprint: plain values that name the data, for run.json.
  """

  vocabulary: Vocabulary
  fingerprint: dict[str, Any]

  def train_batches(
    self, batch_size: int, *, process_index: int = 0, process_count: int = 1
  ) -> Batches:
    """Returns the batches of one process.

    Args:
      batch_size: rows of a batch over all processes.
      process_index: which rows: every process gets batch_size /
        process_count others.
      process_count: how many processes there are.
    """
    ...

  def eval_batches(
    self,
    batch_size: int,
    num_batches: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[Batch]:
    """Yields the same held-out batches, masks included, on every call.

    At most `num_batches`; the last is filled up with rows of zeros, whose
    weights are zero too. The rows of all processes together do not depend on
    their number.
    """
    ...

  def eval_texts(self, count: int) -> list[str]:
    """Returns short sentences from held-out documents, at most `count`."""
    ...


def open_data(
  config: DataConfig, *, seed: int, cache_root: Path | None
) -> Data:
  """Opens what `config.task` names and checks it before anything is trained.

  Args:
    config: what to read and how.
    seed: of the order of training and of what is masked.
    cache_root: folder for what can be made again (docstring corpus, trained
      vocabulary); None: $XDG_CACHE_HOME/st_moe.

  Raises:
    UserError: unknown task; missing, empty or broken files; lengths, rates or
      vocabularies that do not go together.
  """
  if config.task == 'cache':
    sentinels.check(config, answers=False)
    from st_moe.data.cache import open_cache

    return open_cache(config, seed=seed)
  return open_stream(config, seed=seed, cache_root=cache_root)


def open_stream(
  config: DataConfig, *, seed: int, cache_root: Path | None
) -> 'StreamingData':
  """Opens a task over text; as `open_data`, and gives the raw documents."""
  check_paths(config)
  load_tensorflow()
  from st_moe.data import streaming

  return streaming.open_stream(config, seed=seed, cache_root=cache_root)


def import_tasks(module: str) -> None:
  """Imports a user's module, which registers tasks and mixtures with seqio.

  Args:
    module: dotted name, found in the current directory or as Python finds it.

  Raises:
    UserError: there is no such module.
  """
  load_tensorflow()
  if '' not in sys.path and os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name not in (module, module.partition('.')[0]):
      raise UserError(f'--module={module} needs {error.name}') from error
    raise UserError(
      f'--module={module}: no such module in {os.getcwd()} or on PYTHONPATH'
    ) from None


def check_names(task: str) -> None:
  """Refuses names that nothing has; loads no TensorFlow.

  Args:
    task: as in `DataConfig.task`: names, with or without rates.

  Raises:
    UserError: with the nearest name; also for a broken rate.
  """
  if task == 'cache':  # stands alone
    return
  for name, _ in catalog.split_rates(task):
    if sources.is_built_in(name) or catalog.is_answer_task(name):
      continue
    if 'seqio' in sys.modules:
      from st_moe.data import tasks

      tasks.check_name(name)
    else:  # nothing can be registered with what is not even loaded
      raise sources.unknown_task(name, catalog.names())


def check_paths(config: DataConfig) -> None:
  """Finds wrong names and missing files before TensorFlow is loaded."""
  check_names(config.task)
  for name in catalog.split_names(config.task):
    if catalog.is_answer_task(name):
      for task in catalog.members(name):
        for split in catalog.splits(task, config):
          catalog.load_examples(task, split, config)
      continue
    if name in sources.SUFFIXES:
      sources.text_files(name, config)
  if config.vocabulary != 'auto':
    load_vocabulary(config.vocabulary, config.extra_ids)
