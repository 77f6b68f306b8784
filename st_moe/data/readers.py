"""seqio data sources over local documents, and over examples of tasks.

Documents are read in Python, inside `tf.numpy_function`, from functions of
their arguments alone: so TensorFlow may save and restore the iterators, and
their state is a few numbers instead of buffers of text.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from st_moe.data.c4_json import JsonChunks, JsonPart
from st_moe.data.downstream.example import Example
from st_moe.errors import UserError

_DOCUMENTS_AT_ONCE = 16  # fetched by one call from TensorFlow into Python
# Shards read in turn, and documents from each at a turn: seqio's own numbers.
_CYCLE_LENGTH = 16
_BLOCK_LENGTH = 16


def _read_texts(
  read: Callable[..., Sequence[str]],
  arguments: Sequence[tf.Tensor],
  errors: list[UserError],
) -> tf.Tensor:
  """Calls `read` with numpy arguments inside tf.data: string [texts].

  A UserError goes into `errors`, whence the batches raise it again.
  """

  def call(*values: np.ndarray) -> np.ndarray:
    try:
      texts = [text.encode() for text in read(*values)]
    except UserError as error:
      errors.append(error)
      raise
    return np.array(texts, dtype=object)

  texts = tf.numpy_function(call, arguments, tf.string, stateful=False)
  texts.set_shape([None])
  return texts


class NumberedSource(seqio.DataSource, abc.ABC):
  """What is known by number: a perfect shuffle, another in each epoch.

  A shuffled dataset never ends: it holds one epoch after the other.
  """

  def __init__(self, items: Mapping[str, Sequence[Any]]):
    """Builds it from the items of each split."""
    super().__init__(splits=items)
    self._items = items

  @abc.abstractmethod
  def _fetch(
    self, numbers: tf.data.Dataset, items: Sequence[Any]
  ) -> tf.data.Dataset:
    """Returns the features of the items with these numbers, in their order."""

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    return [split]

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: Any,
  ) -> tf.data.Dataset:
    """Returns one epoch in order, or all epochs shuffled."""
    items = self._items[split]
    count = len(items)
    numbers = tf.data.Dataset.range(count)
    if shuffle:
      numbers = _endless(count, seed)
    if shard_info:
      numbers = numbers.shard(shard_info.num_shards, shard_info.index)
    return self._fetch(numbers, items)


class RandomAccessSource(NumberedSource):
  """Documents that are fetched from disk: examples with a 'text'."""

  def __init__(
    self, documents: Mapping[str, Sequence[str]], errors: list[UserError]
  ):
    """Builds it from the documents of each split."""
    super().__init__(documents)
    self._errors = errors

  def _fetch(
    self, numbers: tf.data.Dataset, items: Sequence[str]
  ) -> tf.data.Dataset:
    def read(chosen: np.ndarray) -> list[str]:
      return [items[int(number)] for number in chosen]

    texts = numbers.batch(_DOCUMENTS_AT_ONCE).map(
      lambda chosen: _read_texts(read, [chosen], self._errors),
      num_parallel_calls=tf.data.AUTOTUNE,
    )
    return texts.unbatch().map(lambda text: {'text': text})


class ExampleSource(NumberedSource):
  """Examples of a task with answers, in memory: 'inputs' and 'targets'."""

  def _fetch(
    self, numbers: tf.data.Dataset, items: Sequence[Example]
  ) -> tf.data.Dataset:
    columns = {
      'inputs': tf.constant([example.inputs for example in items]),
      'targets': tf.constant([example.targets for example in items]),
    }
    return numbers.map(
      lambda number: {
        name: tf.gather(texts, number) for name, texts in columns.items()
      }
    )


def _endless(count: int, seed: int | None) -> tf.data.Dataset:
  """Returns the numbers below `count` in random order, epoch after epoch.

  Each order is computed number by number from the seed and the epoch, so the
  state of an iterator is one number however many documents there are.
  (`shuffle` keeps all of them in its state; `random` with
  `rerandomize_each_iteration` goes on with other epochs when restored.)
  """
  if seed is None:
    seed = int(np.random.default_rng().integers(1 << 62))

  def number(i: tf.Tensor) -> tf.Tensor:
    key = tf.stack([tf.cast(seed, tf.int64), i // count])
    return tf.random.experimental.index_shuffle(i % count, key, count - 1)

  return tf.data.Dataset.counter().map(number)


class JsonSource(seqio.DataSource):
  """C4 JSON shards, sixteen at a time, as seqio reads any files."""

  def __init__(self, parts: Mapping[str, JsonPart], errors: list[UserError]):
    """Builds it from the part of the shards that each split is."""
    super().__init__(splits=parts)
    self._parts = parts
    self._errors = errors

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> Sequence[str]:
    return [str(path) for path in self._parts[split].files]

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: Any,
  ) -> tf.data.Dataset:
    """Returns one epoch; `shuffle` is of the shards."""
    part = self._parts[split]
    chunks = JsonChunks(part)
    shards = tf.data.Dataset.range(len(part.files))
    if shard_info:
      shards = shards.shard(shard_info.num_shards, shard_info.index)
    if shuffle:
      shards = shards.shuffle(len(part.files), seed=seed)

    def read(shard: np.ndarray, chunk: np.ndarray) -> list[str]:
      return chunks.read(int(shard), int(chunk))

    def documents(shard: tf.Tensor) -> tf.data.Dataset:
      texts = tf.data.Dataset.counter().map(
        lambda chunk: _read_texts(read, [shard, chunk], self._errors)
      )
      return texts.take_while(lambda chunk: tf.size(chunk) > 0).unbatch()

    texts = shards.interleave(
      documents,
      cycle_length=_CYCLE_LENGTH,
      block_length=_BLOCK_LENGTH,
      num_parallel_calls=tf.data.AUTOTUNE,
    )
    return texts.map(lambda text: {'text': text})
