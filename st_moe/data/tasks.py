"""Pretraining tasks: where the documents come from, and their seqio task.

The built-in tasks are 'docstrings' (the offline corpus), 'text' and 'c4_json'
(local files), 'c4' and 'mc4.LANGUAGE' (tfds): T5's pipeline
(c4_v220_span_corruption), which is documents, tokens, an objective of
preprocessors.py, end of sequence. Tasks with answers (downstream/) make their
own inputs and targets. Any task or mixture that is registered with seqio goes
by its own name.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from st_moe.config import DataConfig
from st_moe.data import preprocessors, sources
from st_moe.data.c4_json import JsonDocuments
from st_moe.data.corpus import docstring_documents
from st_moe.data.downstream import catalog
from st_moe.data.downstream.example import Example
from st_moe.data.downstream.sentinels import sentinel_ids
from st_moe.data.pieces import Pieces
from st_moe.data.prepared import tfds_version
from st_moe.data.readers import (
  ExampleSource,
  JsonSource,
  RandomAccessSource,
)
from st_moe.data.vocabularies import Vocabulary
from st_moe.errors import UserError

# More text than this takes a while to check: say so.
_ANNOUNCED_BYTES = 1 << 30

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of one built-in task, before tokenization.

  Attributes:
    source: the same documents for seqio, as examples with a 'text'. Its
      splits are the configuration's `train_split` and `eval_split`.
    documents: gives the texts of a split, each time the same in one order; of
      a task with answers its inputs.
    fingerprint: plain values that name the content.
    errors: what went wrong while tf.data was reading; TensorFlow itself
      reports only that something did.
    examples: gives those of a split of a task with answers, which may have
      but one of the two in a mixture; None: plain text.
  """

  source: seqio.DataSource
  documents: Callable[[str], Iterable[str]]
  fingerprint: dict[str, Any]
  errors: list[UserError] = dataclasses.field(default_factory=list)
  examples: Callable[[str], list[Example]] | None = None


def registered(name: str) -> seqio.Task | seqio.Mixture | None:
  """Returns what is registered with seqio under a name, if anything."""
  for registry in (seqio.MixtureRegistry, seqio.TaskRegistry):
    if name in registry.names():
      return registry.get(name)
  return None


def check_name(name: str) -> None:
  """Refuses a task that does not exist, or exists twice.

  Raises:
    UserError: with the nearest name.
  """
  built_in = sources.is_built_in(name) or catalog.is_answer_task(name)
  if built_in and registered(name) is not None:
    raise UserError(
      f'task {name!r} is built in and registered with seqio: register yours '
      'under another name'
    )
  if not built_in and registered(name) is None:
    own = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    raise sources.unknown_task(name, [*catalog.names(), *own])


def open_corpus(
  name: str, config: DataConfig, cache_root: Path | None
) -> Corpus:
  """Finds and checks the documents of a built-in task.

  Args:
    name: of the task; a part of `config.task` where that is a mixture.
    config: files, splits, what is held out.
    cache_root: where the docstring corpus is kept.

  Raises:
    UserError: missing, empty or broken data; settings that do not go together.
  """
  sources.check_splits(config)
  if catalog.is_answer_task(name):
    return _answers(name, config)
  if name == 'docstrings':
    return _docstrings(config, cache_root)
  if name == 'text':
    return _text(config)
  if name == 'c4_json':
    return _c4_json(config)
  if name.startswith(sources.MC4_PREFIX):
    language = name.removeprefix(sources.MC4_PREFIX)
    splits = {
      config.train_split: language,
      config.eval_split: f'{language}-validation',
    }
    return _tfds(name, 'c4/multilingual', splits, config)
  splits = {split: split for split in (config.train_split, config.eval_split)}
  return _tfds(name, 'c4/en', splits, config)


def make_task(
  name: str, corpus: Corpus, config: DataConfig, vocabulary: Vocabulary
) -> seqio.Task:
  """Builds the seqio task of a corpus: T5's steps, in T5's places.

  Args:
    name: of the task.
    corpus: gives the documents.
    config: the objective, already checked.
    vocabulary: of inputs and targets.
  """
  tokenize = functools.partial(
    seqio.preprocessors.tokenize, copy_pretokenized=False
  )
  # The place of the cache decides the seeds of what follows.
  steps = [tokenize, seqio.CacheDatasetPlaceholder()]
  if corpus.examples is None:
    as_targets = functools.partial(
      seqio.preprocessors.rekey, key_map={'targets': 'text'}
    )
    steps = [as_targets, *steps, _objective(config)]
  elif ids := sentinel_ids(config, vocabulary):
    steps.append(
      functools.partial(preprocessors.insert_sentinels, sentinels=ids)
    )
  feature = seqio.Feature(vocabulary.as_seqio(), add_eos=True)
  return seqio.Task(
    name.replace('-', '_'),  # mc4.bg-Latn is no name for seqio
    source=corpus.source,
    preprocessors=[*steps, seqio.preprocessors.append_eos_after_trim],
    output_features={'inputs': feature, 'targets': feature},
  )


def _objective(config: DataConfig) -> Callable[..., tf.data.Dataset]:
  if config.objective != 'span_corruption':
    return preprocessors.prefix_lm
  return functools.partial(
    preprocessors.span_corruption,
    noise_density=config.noise_density,
    mean_noise_span_length=config.mean_noise_span_length,
  )


def _answers(name: str, config: DataConfig) -> Corpus:
  def examples(split: str) -> list[Example]:
    return catalog.load_examples(name, split, config)

  splits = catalog.splits(name, config)
  counts = {split: len(examples(split)) for split in splits}
  log.info(
    '%s: %s examples to train on, %s held out',
    name,
    *(f'{counts.get(s, 0):,}' for s in (config.train_split, config.eval_split)),
  )
  return Corpus(
    source=ExampleSource({split: examples(split) for split in splits}),
    documents=lambda split: [example.inputs for example in examples(split)],
    fingerprint={
      'sha256': {split: _sha256(examples(split)) for split in splits},
      'examples': counts,
    },
    examples=examples,
  )


def _sha256(examples: Iterable[Example]) -> str:
  """Names examples by what they are, wherever they were read."""
  digest = hashlib.sha256()
  for example in examples:
    digest.update(repr(example).encode(errors='replace'))
  return digest.hexdigest()


def _docstrings(config: DataConfig, cache_root: Path | None) -> Corpus:
  documents = docstring_documents(cache_root=cache_root)
  split = sources.hold_out(
    documents.texts, config.holdout_every, 'the docstring corpus'
  )
  fingerprint = {'sha256': documents.sha256, 'sources': documents.sources}
  return _random_access(split, config, fingerprint)


def _text(config: DataConfig) -> Corpus:
  def read(files):
    return sources.TextDocuments(files, config.document, config.max_line_bytes)

  files = sources.text_files('text', config)
  size = sum(path.stat().st_size for path in files.train)
  if size > _ANNOUNCED_BYTES:
    log.info('reading and checking %.1f GB of text', size / 1e9)
  if files.held_out:
    train = read(files.train) if files.train else ()
    split = sources.Split(train, read(files.held_out))
  else:
    what = f'{files.train[0]} and the rest' if files.train[1:] else ''
    split = sources.hold_out(
      read(files.train), config.holdout_every, what or str(files.train[0])
    )
  fingerprint = files.fingerprint() | {'document': config.document}
  return _random_access(split, config, fingerprint)


def _random_access(
  split: sources.Split, config: DataConfig, fingerprint: dict[str, Any]
) -> Corpus:
  documents = {
    config.train_split: split.train,
    config.eval_split: split.held_out,
  }
  counts = {name: len(texts) for name, texts in documents.items()}
  log.info(
    'text: %s documents to train on, %s held out',
    f'{len(split.train):,}',
    f'{len(split.held_out):,}',
  )
  errors: list[UserError] = []
  return Corpus(
    source=RandomAccessSource(documents, errors),
    documents=documents.__getitem__,
    fingerprint=fingerprint | {'documents': counts},
    errors=errors,
  )


def _c4_json(config: DataConfig) -> Corpus:
  files = sources.text_files('c4_json', config)
  every = None if files.held_out else config.holdout_every
  # Without training files nothing is trained on: `train_batches` refuses.
  train = JsonDocuments(
    files.train or files.held_out, config.max_line_bytes, every
  ).check()
  held_out = train
  if files.held_out:
    held_out = JsonDocuments(files.held_out, config.max_line_bytes).check()
  parts = {
    config.train_split: train.part(held_out=False),
    config.eval_split: held_out.part(held_out=every is not None),
  }
  for split, part in parts.items():
    if next(iter(part), None) is None:
      raise UserError(
        f'{files.train[0]}: no document is left for {split}; lower '
        f'DataConfig.holdout_every ({config.holdout_every}), or give eval_files'
      )
  errors: list[UserError] = []
  return Corpus(
    source=JsonSource(parts, errors),
    documents=parts.__getitem__,
    fingerprint=files.fingerprint(),
    errors=errors,
  )


class TfdsDocuments(Pieces):
  """The texts of a prepared tfds split, file after file, each by its number.

  Any range of them is read from its own files; where a range begins inside a
  file, the records before it are passed over.
  """

  unit = 'documents'

  def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
    """Takes a split, or a slice of one: 'train', 'train[:10%]'."""
    self._builder = builder
    infos = builder.info.splits
    (span,) = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    self._split = span.splitname
    self._first = span.from_ or 0
    self._length = infos[split].num_examples

  def __len__(self) -> int:
    return self._length

  def __iter__(self) -> Iterator[str]:
    return self.read(0, len(self))

  def read(self, start: int, stop: int) -> Iterator[str]:
    examples = self._builder.as_dataset(
      split=tfds.core.ReadInstruction(
        self._split,
        from_=self._first + start,
        to=self._first + stop,
        unit='abs',
      ),
      # One file at a time: in turns, an order would depend on the range.
      read_config=tfds.ReadConfig(
        interleave_cycle_length=1, try_autocache=False
      ),
      shuffle_files=False,
    )
    for example in examples.as_numpy_iterator():
      yield example['text'].decode()


def _tfds(
  name: str, dataset: str, splits: dict[str, str], config: DataConfig
) -> Corpus:
  version = tfds_version(name, dataset, config, sources.C4_JSON_INSTEAD)
  source = seqio.TfdsDataSource(
    tfds_name=f'{dataset}:{version}',
    tfds_data_dir=config.tfds_data_dir,
    splits=splits,
    read_only=True,
  )
  prepared = source.tfds_dataset.info.splits
  for split in splits.values():
    if split.split('[')[0] not in prepared:
      raise UserError(
        f'task {name!r}: {dataset}:{version} has no split {split!r} (it has '
        f'{", ".join(prepared)})'
      )

  counts = {
    split: prepared[tfds_split].num_examples
    for split, tfds_split in splits.items()
  }
  return Corpus(
    source=source,
    documents=lambda split: TfdsDocuments(
      source.tfds_dataset.builder, splits[split]
    ),
    fingerprint={
      'tfds': f'{dataset}:{version}',
      'library': tfds.__version__,  # decides the order of files
      'documents': counts,
    },
  )
