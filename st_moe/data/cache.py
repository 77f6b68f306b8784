"""Training and held-out batches from a token cache, without TensorFlow.

The tokens of a split are one stream, cut into windows of the length that the
objective needs; a document may begin and end inside a window, as in T5's
pipeline, which puts nothing between documents either. Each epoch visits all
windows in a new order. Row i of the endless sequence of rows is a pure
function of (cache, config, seed, i), and batch t holds rows t * batch_size
and on: the whole state is a row number, and any number of processes reads the
same global batches. Grain computes the order and prefetches.

Two departures from T5's streaming pipeline: a document of more than 65,536
tokens is used whole, not one random piece of it; and for 'prefix_lm' windows
also run over document boundaries, so that rows are full without packing.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from st_moe.config import DataConfig
from st_moe.data import cache_format, span_corruption
from st_moe.data.cache_format import Manifest
from st_moe.data.cache_windows import Windows
from st_moe.data.corpus import short_sentences
from st_moe.data.vocabularies import Vocabulary, load_vocabulary
from st_moe.errors import UserError

# Held-out batches do not depend on the run's seed: runs are comparable.
_EVAL_SEED = 0
# More threads only fight for the interpreter lock: rows are short numpy calls.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
# Held-out records to look through for sentences to show.
_SENTENCE_RECORDS = 1000
_SHUFFLE_ROUNDS = 4  # as Grain's own shuffle
_ENDLESS_ROWS = 2**62

Row = dict[str, np.ndarray]  # model features by name


class _Rows:
  """The endless sequence of rows; row i depends on (seed, i) alone."""

  def __init__(
    self,
    windows: Windows,
    make_row: Callable[[np.ndarray, np.random.Generator], Row],
    *,
    seed: int,
    shuffle: bool,
  ):
    self._windows = windows
    self._make_row = make_row
    self._seed = seed
    self._shuffle = shuffle

  def __getitem__(self, index: int) -> Row:
    epoch, place = divmod(index, len(self._windows))
    if self._shuffle:
      # A permutation computed at one point, whatever the number of windows.
      place = grain.experimental.index_shuffle(
        place,
        max_index=len(self._windows) - 1,
        seed=_epoch_seed(self._seed, epoch),
        rounds=_SHUFFLE_ROUNDS,
      )
    generator = np.random.Generator(np.random.Philox(key=[self._seed, index]))
    return self._make_row(self._windows[place], generator)


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed: int, epoch: int) -> int:
  return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class _GlobalBatches:
  """One process's rows of every global batch: a source for Grain.

  Global batch t holds rows first_row + [t * batch_size, (t + 1) * batch_size),
  and each process a consecutive part of it. From `num_rows` on, rows are zero.
  """

  rows: _Rows
  num_rows: int
  batch_size: int
  process_index: int
  process_count: int
  first_row: int = 0

  def __post_init__(self):
    if self.batch_size % self.process_count:
      raise UserError(
        f'batch_size {self.batch_size} is not divisible by the '
        f'{self.process_count} processes'
      )

  def __len__(self) -> int:
    return -(-(self.num_rows - self.first_row) // self.batch_size)

  def __getitem__(self, step: int) -> Row:
    count = self.batch_size // self.process_count
    first = self.first_row + step * self.batch_size
    first += self.process_index * count
    last = min(first + count, self.num_rows)
    rows = [self.rows[index] for index in range(first, last)]
    if len(rows) < count:
      empty = {name: np.zeros_like(x) for name, x in self.rows[0].items()}
      rows += [empty] * (count - len(rows))
    # [rows of this process, length]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class CacheBatches:
  """Endless training batches; the state is the number of the next row.

  It fits any number of processes, and any batch size.
  """

  def __init__(self, batches: _GlobalBatches):
    self._batches = batches
    self._start_at(batches.first_row)

  def _start_at(self, row: int) -> None:
    self._next_row = row
    source = dataclasses.replace(self._batches, first_row=row)
    batches = grain.MapDataset.source(source).to_iter_dataset(_READ_OPTIONS)
    self._iterator = iter(batches)

  def __iter__(self) -> 'CacheBatches':
    return self

  def __next__(self) -> Row:
    batch = next(self._iterator)
    self._next_row += self._batches.batch_size
    return batch

  def get_state(self) -> bytes:
    return json.dumps({'next_row': self._next_row}).encode()

  def set_state(self, state: bytes) -> None:
    """Goes on behind the last batch handed out when `state` was taken.

    Raises:
      UserError: the state of another kind of input.
    """
    try:
      row = json.loads(state)['next_row']
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        'the data position in the checkpoint was not written by a run from a '
        'cache; continue with the DataConfig.task it was trained with'
      ) from error
    self._start_at(row)


class CacheData:
  """What `open_cache` returns: a vocabulary, batches and texts.

  Attributes:
    vocabulary: of the cache, with the configured number of extra ids.
    fingerprint: plain values that name the data, for run.json.
  """

  def __init__(
    self,
    config: DataConfig,
    folder: Path,
    manifest: Manifest,
    vocabulary: Vocabulary,
    seed: int,
  ):
    self.vocabulary = vocabulary
    self.fingerprint = _fingerprint(manifest, vocabulary)
    self._config = config
    self._seed = seed
    open_split = functools.partial(
      Windows, folder, manifest, size=_window_size(config)
    )
    self._train = open_split(config.train_split)
    self._eval = open_split(config.eval_split)

  def train_batches(
    self, batch_size: int, *, process_index: int = 0, process_count: int = 1
  ) -> CacheBatches:
    """Returns this process's rows of the endless sequence of batches."""
    rows = _Rows(
      self._train,
      self._make_row,
      seed=self._seed,
      shuffle=self._config.shuffle,
    )
    return CacheBatches(
      _GlobalBatches(
        rows, _ENDLESS_ROWS, batch_size, process_index, process_count
      )
    )

  def eval_batches(
    self,
    batch_size: int,
    num_batches: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[Row]:
    """Yields the same held-out batches on every call.

    At most `num_batches`, fewer when the split ends; rows that fill up the
    last batch are all zero, their weights too.
    """
    rows = _Rows(self._eval, self._make_row, seed=_EVAL_SEED, shuffle=True)
    source = _GlobalBatches(
      rows, len(self._eval), batch_size, process_index, process_count
    )
    for step in range(min(num_batches, len(source))):
      yield source[step]

  def eval_texts(self, count: int) -> list[str]:
    """Returns short sentences from held-out documents, at most `count`."""
    records = itertools.islice(self._eval.records(), _SENTENCE_RECORDS)
    texts = (self.vocabulary.decode(tokens) for tokens in records)
    return short_sentences(texts, count)

  def _make_row(
    self, tokens: np.ndarray, generator: np.random.Generator
  ) -> Row:
    config = self._config
    if config.objective == 'prefix_lm':
      example = span_corruption.prefix_lm(tokens, generator)
    else:
      example = span_corruption.span_corruption(
        tokens,
        generator,
        vocab_size=self.vocabulary.vocab_size,
        noise_density=config.noise_density,
        mean_noise_span_length=config.mean_noise_span_length,
      )
    return span_corruption.model_features(
      example,
      inputs_length=config.inputs_length,
      targets_length=config.targets_length,
      eos_id=self.vocabulary.eos_id,
    )


def open_cache(config: DataConfig, *, seed: int) -> CacheData:
  """Opens the cache in `config.cache_dir` for training and evaluation.

  The vocabulary is the cache's own. `config.vocabulary` may name it too, or
  be 'auto'. The extra ids and all lengths are the configuration's.

  Args:
    config: objective, lengths, folder.
    seed: of the order and of the corruption; below 2**32.

  Raises:
    UserError: no cache, an unfinished or damaged one, another vocabulary, or
      lengths and options that do not go with a cache.
  """
  if config.cache_dir is None:
    raise UserError(
      "task 'cache' needs --gin.DataConfig.cache_dir=DIR, a folder made by "
      '`st_moe cache`'
    )
  folder = Path(config.cache_dir).expanduser()
  manifest = cache_format.read_manifest(folder)
  vocabulary = _open_vocabulary(config, folder, manifest)
  _check_options(config)
  return CacheData(config, folder, manifest, vocabulary, seed)


def _open_vocabulary(
  config: DataConfig, folder: Path, manifest: Manifest
) -> Vocabulary:
  spec = manifest.vocabulary
  if spec != 'byte':
    spec = str(folder / spec)
  vocabulary = load_vocabulary(spec, config.extra_ids)
  if vocabulary.model_sha256 != manifest.model_sha256:
    raise UserError(
      f'{spec} is not the vocabulary that tokenized the cache {folder}; put '
      'the original file back, or make the cache again'
    )
  if config.vocabulary != 'auto':
    wanted = load_vocabulary(config.vocabulary, config.extra_ids)
    if wanted.model_sha256 != manifest.model_sha256:
      raise UserError(
        f'cache {folder} was tokenized with another vocabulary than '
        f"{config.vocabulary}; set DataConfig.vocabulary = 'auto' to use the "
        "cache's own, or make the cache again"
      )
  return vocabulary


def _check_options(config: DataConfig) -> None:
  if config.objective == 'none':
    raise UserError(
      "a cache holds plain text; DataConfig.objective = 'none' does not go "
      "with it, use 'span_corruption' or 'prefix_lm'"
    )
  if config.seqio_cache_dirs:
    raise UserError(
      "task 'cache' reads DataConfig.cache_dir; seqio_cache_dirs is for tasks "
      'registered with seqio: leave it out, or name such a task'
    )
  if config.pack:
    raise UserError(
      'rows from a cache are full already; set DataConfig.pack = False'
    )
  span_corruption.check_lengths(
    config.objective,
    inputs_length=config.inputs_length,
    targets_length=config.targets_length,
    noise_density=config.noise_density,
    mean_noise_span_length=config.mean_noise_span_length,
    extra_ids=config.extra_ids,
  )


def _window_size(config: DataConfig) -> int:
  """Returns how many raw tokens make one row."""
  if config.objective == 'prefix_lm':
    return config.inputs_length - 1  # the end of sequence takes one
  return span_corruption.span_corruption_lengths(
    config.inputs_length, config.noise_density, config.mean_noise_span_length
  ).window


def _fingerprint(manifest: Manifest, vocabulary: Vocabulary) -> dict[str, Any]:
  digest = hashlib.sha256()
  for split in sorted(manifest.splits):
    for shard in manifest.splits[split]:
      digest.update(f'{shard.name} {shard.sha256}\n'.encode())
  fingerprint: dict[str, Any] = {
    'cache': digest.hexdigest(),
    'vocabulary': vocabulary.fingerprint,
  }
  for split, shards in manifest.splits.items():
    fingerprint[f'{split}_documents'] = sum(s.documents for s in shards)
    fingerprint[f'{split}_tokens'] = sum(s.tokens for s in shards)
  return fingerprint
