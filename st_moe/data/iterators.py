"""tf.data iterators as numpy batches whose position is a few bytes or MB."""

import io
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from st_moe.errors import UserError

Batch = dict[str, np.ndarray]

_CHECKPOINT = 'position'  # prefix of TensorFlow's files inside the state
_ABOUT = 'about.json'
# What TensorFlow wraps around a message.
_NODE = re.compile(r'\{\{.*?\}\}|\[Op:.*', re.DOTALL)


def local_rows(batch_size: int, process_count: int) -> int:
  """Returns the rows of one process.

  Raises:
    UserError: the batch cannot be divided.
  """
  if batch_size % process_count:
    raise UserError(
      f'batch_size {batch_size} is not divisible by the {process_count} '
      'processes'
    )
  return batch_size // process_count


def next_batch(
  iterator: Iterator, find_error: Callable[[], UserError | None]
) -> Batch | None:
  """Returns the next batch in numpy, None at the end.

  Args:
    iterator: of a tf.data dataset of batches.
    find_error: gives the error that our own readers raised inside tf.data.

  Raises:
    UserError: broken data, in one line instead of TensorFlow's.
  """
  try:
    batch = next(iterator, None)
  except tf.errors.OpError as error:
    if (found := find_error()) is not None:
      raise found from None
    if isinstance(
      error,
      (
        tf.errors.DataLossError,
        tf.errors.NotFoundError,
        tf.errors.PermissionDeniedError,
      ),
    ):
      message = ' '.join(_NODE.sub('', error.message).split())
      raise UserError(f'the data cannot be read: {message}') from error
    raise
  if batch is None:
    return None
  return {name: tensor.numpy() for name, tensor in batch.items()}


class StreamingBatches:
  """Endless batches of one process; see `pipeline.Batches`."""

  def __init__(
    self,
    build: Callable[[], tf.data.Dataset],
    about: dict[str, int],
    find_error: Callable[[], UserError | None],
  ):
    """Starts at the beginning.

    Args:
      build: makes the dataset of batches; called once for each iterator.
      about: what a position depends on: batch size and processes.
      find_error: as for `next_batch`.
    """
    self._build = build
    self._about = about | {'tensorflow': tf.__version__}
    self._find_error = find_error
    self._iterator = iter(build())

  def __iter__(self) -> 'StreamingBatches':
    return self

  def __next__(self) -> Batch:
    batch = next_batch(self._iterator, self._find_error)
    if batch is None:
      raise UserError(
        'the training text gives no example: its documents are empty, or '
        'fewer than the processes that share them; give more text'
      )
    return batch

  def get_state(self) -> bytes:
    """Returns a zip of TensorFlow's checkpoint of the iterator.

    Raises:
      UserError: the task reads through Python that TensorFlow cannot restore.
    """
    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
      prefix = f'{folder}/{_CHECKPOINT}'
      try:
        tf.train.Checkpoint(iterator=self._iterator).write(prefix)
      except tf.errors.FailedPreconditionError as error:
        raise UserError(
          'the position in this task cannot be saved, for it reads through '
          'Python: build its source without from_generator, and call '
          'tf.numpy_function with stateful=False'
        ) from error
      with zipfile.ZipFile(
        content, 'w', zipfile.ZIP_DEFLATED, compresslevel=1
      ) as archive:
        archive.writestr(_ABOUT, json.dumps(self._about))
        for path in sorted(Path(folder).iterdir()):
          archive.write(path, path.name)
    return content.getvalue()

  def set_state(self, state: bytes) -> None:
    """Goes on behind the last batch handed out when `state` was taken.

    Raises:
      UserError: taken by other processes or another batch size, or by another
        kind of input.
    """
    with tempfile.TemporaryDirectory() as folder:
      try:
        with zipfile.ZipFile(io.BytesIO(state)) as archive:
          about = json.loads(archive.read(_ABOUT))
          archive.extractall(folder)
      except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(
          'the data position in the checkpoint was not written by a run that '
          'streams text; continue with the DataConfig.task it was trained with'
        ) from error
      self._check(about)
      iterator = iter(self._build())
      try:
        tf.train.Checkpoint(iterator=iterator).read(
          f'{folder}/{_CHECKPOINT}'
        ).assert_consumed()
      except (tf.errors.OpError, AssertionError) as error:
        raise UserError(
          'the data position in the checkpoint does not fit this text and '
          f'these settings (saved with tensorflow {about["tensorflow"]}, here '
          f'is {tf.__version__}); continue with those it was trained with'
        ) from error
    self._iterator = iterator

  def _check(self, about: dict[str, int]) -> None:
    for name, words in (
      ('process_count', 'processes'),
      ('process_index', 'as process number'),
      ('batch_size', 'rows a batch'),
    ):
      if about[name] != self._about[name]:
        raise UserError(
          f'the data position was saved with {about[name]} {words}, this run '
          f'has {self._about[name]}: a position in streamed text is bound to '
          'them; start again with the same, or train from a cache (`st_moe '
          'cache`), which any number of processes can resume'
        )
