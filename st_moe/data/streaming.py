"""Batches straight from text: a seqio task or mixture, iterated in numpy.

The order is a function of the seed alone. A training position is TensorFlow's
checkpoint of the iterator: it goes on with exactly the next batch, and is
bound to the number of processes, because each process reads its own shard of
the documents. Held-out rows are made by every process and divided after.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from st_moe.config import DataConfig
from st_moe.data.corpus import short_sentences
from st_moe.data.downstream import sentinels
from st_moe.data.downstream.catalog import is_answer_task
from st_moe.data.downstream.example import Example
from st_moe.data.files import default_cache_root
from st_moe.data.iterators import (
  Batch,
  StreamingBatches,
  local_rows,
  next_batch,
)
from st_moe.data.mixtures import Part, make_mixture, parse
from st_moe.data.seqio_caches import open_seqio_caches
from st_moe.data.sources import SUFFIXES
from st_moe.data.span_corruption import check_lengths
from st_moe.data.tasks import Corpus, make_task, open_corpus, registered
from st_moe.data.vocabularies import (
  Vocabulary,
  load_vocabulary,
  train_vocabulary,
)
from st_moe.errors import UserError

log = logging.getLogger(__name__)

# Held-out batches do not depend on the run's seed: runs are comparable.
_EVAL_SEED = 0
_PREFETCHED_BATCHES = 2
# Held-out documents to look through for sentences to show.
_SENTENCE_DOCUMENTS = 1000
# Training examples of a task whose lengths are counted at most.
_LOOKED_AT = 30_000
# What the stream is a function of, besides seed and text.
_LIBRARIES = ('numpy', 'seqio', 'sentencepiece', 'tensorflow')


def open_stream(
  config: DataConfig, *, seed: int, cache_root: Path | None
) -> 'StreamingData':
  """Opens a task or mixture; see `pipeline.open_data`."""
  parts = parse(config)
  _check_objective(config, parts)
  corpora = {
    part.name: open_corpus(part.name, config, cache_root)
    for part in parts
    if registered(part.name) is None
  }
  vocabulary = _open_vocabulary(config, parts, corpora, cache_root)
  providers = [
    make_task(part.name, corpora[part.name], config, vocabulary)
    if part.name in corpora
    else registered(part.name)
    for part in parts
  ]
  for name, corpus in corpora.items():
    trained = config.train_split in corpus.source.splits
    if corpus.examples is not None and trained:
      _tell_cuts(name, corpus.examples(config.train_split), config, vocabulary)
  provider = make_mixture(config.task, parts, providers)
  cached = {}
  if config.seqio_cache_dirs:
    cached = open_seqio_caches(config, provider)
  for split in (config.train_split, config.eval_split):
    if not cached and split not in provider.splits:
      raise UserError(
        f'task {config.task!r} has no split {split!r} (it has '
        f'{", ".join(provider.splits)}); set DataConfig.train_split and '
        'eval_split'
      )
  data = StreamingData(config, parts, provider, vocabulary, corpora, seed)
  if cached:
    data.fingerprint['seqio_caches'] = cached
  return data


def _tell_cuts(
  name: str,
  examples: Sequence[Example],
  config: DataConfig,
  vocabulary: Vocabulary,
) -> None:
  """Logs how many training examples are longer than a row.

  Of very many examples every k-th is looked at, and the line says so.
  """
  step = -(-len(examples) // _LOOKED_AT)
  among = '' if step == 1 else f', one in {step} looked at,'
  examples = examples[::step]
  for feature, limit in (
    ('inputs', config.inputs_length),
    ('targets', config.targets_length),
  ):
    texts = {getattr(example, feature) for example in examples}
    ids = zip(texts, vocabulary.encode_batch(list(texts)), strict=True)
    most = limit - 1 - config.insert_sentinels  # and the end
    long = {text for text, tokens in ids if len(tokens) > most}
    count = sum(getattr(example, feature) in long for example in examples)
    if count:
      log.warning(
        '%s: %s of %s %s to train on%s have more than the %d tokens of '
        'DataConfig.%s_length, and are cut',
        name,
        f'{count:,}',
        f'{len(examples):,}',
        feature,
        among,
        limit,
        feature,
      )


def _check_objective(config: DataConfig, parts: Sequence[Part]) -> None:
  """Refuses an objective that the task cannot have, and short lengths."""
  with_answers = [is_answer_task(part.name) for part in parts]
  sentinels.check(config, answers=any(with_answers))
  for part in parts:
    own = registered(part.name) is not None
    if not own and config.seqio_cache_dirs:
      raise UserError(
        'DataConfig.seqio_cache_dirs is for tasks registered with seqio; '
        f'{part.name!r} is built in: leave it out, or use `st_moe cache`'
      )
    if own and len(parts) == 1 and config.objective != 'none':
      raise UserError(
        f'task {part.name!r} is registered with seqio and makes its own '
        "features; set DataConfig.objective = 'none'"
      )
    if is_answer_task(part.name):
      continue
    if not own and config.objective == 'none':
      raise UserError(
        f"DataConfig.objective = 'none' is for tasks registered with seqio; "
        f"{part.name!r} is plain text, use 'span_corruption' or 'prefix_lm'"
      )
  if all(with_answers):
    return
  check_lengths(
    config.objective,
    inputs_length=config.inputs_length,
    targets_length=config.targets_length,
    noise_density=config.noise_density,
    mean_noise_span_length=config.mean_noise_span_length,
    extra_ids=config.extra_ids,
  )


def _open_vocabulary(
  config: DataConfig,
  parts: Sequence[Part],
  corpora: dict[str, Corpus],
  cache_root: Path | None,
) -> Vocabulary:
  """Loads the vocabulary; takes a registered task's own; trains 'auto'."""
  for part in parts:
    if part.name not in corpora:
      return vocabulary_of(registered(part.name), config)
  if config.vocabulary != 'auto':
    return load_vocabulary(config.vocabulary, config.extra_ids)
  key = json.dumps(
    {
      'text': {name: corpus.fingerprint for name, corpus in corpora.items()},
      'split': config.train_split,
      'size': config.auto_vocabulary_size,
      'sentencepiece': importlib.metadata.version('sentencepiece'),
    },
    sort_keys=True,
  )
  root = default_cache_root() if cache_root is None else Path(cache_root)
  name = hashlib.sha256(key.encode()).hexdigest()[:32]
  path = root / 'vocabularies' / f'{name}.model'
  if not path.is_file():
    texts = [
      corpus.documents(config.train_split)
      for corpus in corpora.values()
      if config.train_split in corpus.source.splits
    ]
    train_vocabulary(
      texts[0] if len(texts) == 1 else _in_turn(map(_spread, texts)),
      config.auto_vocabulary_size,
      path,
    )
  return load_vocabulary(str(path), config.extra_ids)


def vocabulary_of(
  provider: seqio.Task | seqio.Mixture, config: DataConfig
) -> Vocabulary:
  """Returns a registered task's vocabulary as ours."""
  own = provider.output_features['targets'].vocabulary
  if isinstance(own, seqio.ByteVocabulary):
    spec = 'byte'
  elif isinstance(own, seqio.SentencePieceVocabulary):
    spec = own.sentencepiece_model_file
  else:
    raise UserError(
      f'task {provider.name!r} has a {type(own).__name__}; only '
      'SentencePieceVocabulary and ByteVocabulary are understood'
    )
  vocabulary = load_vocabulary(spec, own.extra_ids)
  if config.vocabulary != 'auto':
    wanted = load_vocabulary(config.vocabulary, config.extra_ids)
    if wanted.fingerprint != vocabulary.fingerprint:
      raise UserError(
        f'task {provider.name!r} is tokenized with {spec} and '
        f'{own.extra_ids} extra ids, not with {config.vocabulary} and '
        f"{config.extra_ids}; set DataConfig.vocabulary = 'auto' to use it"
      )
  return vocabulary


def _spread(documents: Iterable[str]) -> Iterator[str]:
  """Yields documents from everywhere: in a fixed random order, if known."""
  if not isinstance(documents, Sequence):
    yield from documents
    return
  for i in np.random.default_rng(0).permutation(len(documents)):
    yield documents[int(i)]


def _in_turn(streams: Iterable[Iterator[str]]) -> Iterator[str]:
  """Yields one text of each stream in turn, until all have ended."""
  for texts in itertools.zip_longest(*streams):
    yield from (text for text in texts if text is not None)


class StreamingData:
  """What `open_stream` returns; see `pipeline.Data`."""

  def __init__(
    self,
    config: DataConfig,
    parts: Sequence[Part],
    provider: seqio.Task | seqio.Mixture,
    vocabulary: Vocabulary,
    corpora: dict[str, Corpus],
    seed: int,
  ):
    self.vocabulary = vocabulary
    self.fingerprint = {
      'task': config.task,
      'vocabulary': vocabulary.fingerprint,
      'text': {name: corpus.fingerprint for name, corpus in corpora.items()},
      'versions': {
        name: importlib.metadata.version(name) for name in _LIBRARIES
      },
    }
    self._config = config
    self._parts = parts
    self._provider = provider
    self._corpora = corpora
    self._seed = seed

  def train_batches(
    self, batch_size: int, *, process_index: int = 0, process_count: int = 1
  ) -> StreamingBatches:
    """Returns this process's batches, endlessly."""
    rows = local_rows(batch_size, process_count)
    reads = [part.name for part in self._parts if part.name in SUFFIXES]
    if reads and not self._config.files:
      raise UserError(
        f'DataConfig.files is empty: task {reads[0]!r} needs text to train on'
      )

    def build() -> tf.data.Dataset:
      # Anew for each iterator: tf.data counts epochs per dataset.
      dataset = self._dataset(
        dataset_split=self._config.train_split,
        shuffle=self._config.shuffle,
        seed=self._seed,
        num_epochs=None,
        shard_info=seqio.ShardInfo(process_index, process_count),
      )
      dataset = dataset.batch(rows, drop_remainder=True)
      return dataset.prefetch(_PREFETCHED_BATCHES)

    about = {
      'batch_size': batch_size,
      'process_index': process_index,
      'process_count': process_count,
    }
    if any(part.name not in self._corpora for part in self._parts):
      # A registered source may have no position to save: say so now.
      probe = StreamingBatches(build, about, self._first_error)
      next(probe)
      probe.get_state()
    return StreamingBatches(build, about, self._first_error)

  def eval_batches(
    self,
    batch_size: int,
    num_batches: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[Batch]:
    """Yields the same held-out batches on every call.

    Raises:
      UserError: there is not one held-out example.
    """
    rows = local_rows(batch_size, process_count)
    dataset = self._eval_dataset.batch(batch_size).take(num_batches)
    iterator = iter(dataset.prefetch(1))
    first = rows * process_index
    batch = next_batch(iterator, self._first_error)
    if batch is None:
      raise UserError(
        f'task {self._config.task!r} gives no held-out example in split '
        f'{self._config.eval_split!r}: nothing can be evaluated'
      )
    while batch is not None:
      missing = batch_size - len(next(iter(batch.values())))
      yield {
        name: np.pad(array, ((0, missing), (0, 0)))[first : first + rows]
        for name, array in batch.items()
      }
      batch = next_batch(iterator, self._first_error)

  def eval_texts(self, count: int) -> list[str]:
    """Returns short sentences from held-out documents, at most `count`."""
    texts = itertools.islice(
      _in_turn(
        _spread(corpus.documents(self._config.eval_split))
        for corpus in self._corpora.values()
        if corpus.examples is None
      ),
      _SENTENCE_DOCUMENTS,
    )
    return short_sentences(texts, count)

  def documents(self, split: str) -> Iterable[str]:
    """Returns the raw texts of 'train' or 'validation', for a cache.

    Each time the same, in the same order.

    Raises:
      UserError: the task is a mixture, or is registered with seqio.
    """
    if len(self._parts) > 1 or not self._corpora:
      raise UserError(
        f'task {self._config.task!r} cannot be cached: a cache holds the '
        'plain text of one built-in task'
      )
    config = self._config
    name = {'train': config.train_split, 'validation': config.eval_split}[split]
    (corpus,) = self._corpora.values()
    return corpus.documents(name)

  def _first_error(self) -> UserError | None:
    errors = (e for corpus in self._corpora.values() for e in corpus.errors)
    return next(errors, None)

  @functools.cached_property
  def _eval_dataset(self) -> tf.data.Dataset:
    """Rows of the held-out split, the same at every iteration."""
    return self._dataset(
      dataset_split=self._config.eval_split,
      shuffle=False,
      seed=_EVAL_SEED,
      num_epochs=1,
    )

  def _dataset(self, **options: Any) -> tf.data.Dataset:
    config = self._config
    dataset = seqio.get_dataset(
      mixture_or_task_name=self._provider,
      task_feature_lengths={
        'inputs': config.inputs_length,
        'targets': config.targets_length,
      },
      feature_converter=seqio.EncDecFeatureConverter(pack=config.pack),
      use_cached=bool(config.seqio_cache_dirs),
      verbose=False,
      **options,
    )
    settings = tf.data.Options()
    settings.deterministic = True
    return dataset.with_options(settings)
