"""What `st_moe cache` reads: a task's text, divided by files where it can be.

C4's json shards, and text whose held-out files are given, are divided by
files: a process reads those of its own shards and needs no TensorFlow. The
rest is divided by documents. tfds gives any run of its documents from the
files that hold it; text that holds out every n-th line is indexed whole first,
since a line's number decides; fewer json files than shards are read from the
beginning by each process.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

from st_moe.config import DataConfig
from st_moe.data import sources
from st_moe.data.c4_json import JsonDocuments
from st_moe.data.cache_format import TRAIN
from st_moe.data.cache_writer import DEFAULT_SHARDS, Plan, Text
from st_moe.data.pieces import Files, Pieces
from st_moe.data.pipeline import open_stream
from st_moe.data.sources import SUFFIXES, TextDocuments, TextFiles
from st_moe.data.vocabularies import Vocabulary, load_vocabulary


@dataclasses.dataclass(frozen=True)
class Division:
  """How a text is divided into shards.

  Attributes:
    num_shards: of the training split.
    files: what is divided; None: documents are.
  """

  num_shards: int
  files: TextFiles | None


def divide(
  config: DataConfig, num_shards: int | None, plan: Plan | None
) -> Division:
  """Decides, the same for every process that writes a part of one cache.

  Args:
    config: names the text.
    num_shards: as asked for; None: as planned, otherwise 16, or one for each
      file where there are fewer.
    plan: of a cache that was begun, which stays divided as it was.

  Raises:
    UserError: missing files.
  """
  files = _divisible_files(config)
  if plan is not None:
    by_files = files is not None and plan.unit == 'files'
    count = num_shards or plan.shards[TRAIN]
    return Division(count, files if by_files else None)
  if num_shards is None:
    num_shards = min(
      DEFAULT_SHARDS, len(files.train) if files else DEFAULT_SHARDS
    )
  if files is not None and len(files.train) < num_shards:
    files = None
  return Division(num_shards, files)


def _divisible_files(config: DataConfig) -> TextFiles | None:
  """Returns the files whose documents do not depend on other files."""
  if config.task not in SUFFIXES:
    return None
  files = sources.text_files(config.task, config)
  alone = config.task == 'c4_json' or bool(files.held_out)
  return files if alone and len(files.train) > 1 else None


def open_text(
  config: DataConfig, division: Division, cache_root: Path | None
) -> Text:
  """Opens the text of a task for a cache.

  Args:
    config: names text and vocabulary.
    division: from `divide`.
    cache_root: as for `open_data`.

  Raises:
    UserError: as `open_data`; also a mixture, or a task registered with seqio.
  """
  files = division.files
  if files is None:
    data = open_stream(config, seed=0, cache_root=cache_root)
    fingerprint = data.fingerprint['text']
    if isinstance(data.documents(TRAIN), Pieces):
      # Of tfds; a cache that was begun in another order is not gone on with.
      fingerprint = fingerprint | {'order': 'file after file'}
    return Text(data.documents, fingerprint, data.vocabulary)
  sources.check_splits(config)
  fingerprint = files.fingerprint(unread=True)
  if config.task == 'text':
    fingerprint['document'] = config.document
  return Text(
    functools.partial(_pieces, config, files),
    {config.task: fingerprint},
    _open_vocabulary(config, cache_root),
  )


def _open_vocabulary(config: DataConfig, cache_root: Path | None) -> Vocabulary:
  if config.vocabulary != 'auto':
    return load_vocabulary(config.vocabulary, config.extra_ids)
  # Trained on all the text.
  return open_stream(config, seed=0, cache_root=cache_root).vocabulary


def _pieces(config: DataConfig, files: TextFiles, split: str) -> Files:
  """Returns the files of 'train' or 'validation'."""
  held_out = split != TRAIN
  own = files.held_out if held_out and files.held_out else files.train
  if config.task == 'c4_json':
    every = None if files.held_out else config.holdout_every
    documents = JsonDocuments(own, config.max_line_bytes, every)
    part = documents.part(held_out and every is not None)
    return Files(own, part.shard)

  def texts(number: int) -> Iterator[str]:
    path = own[number]
    yield from TextDocuments(
      [path], config.document, config.max_line_bytes, may_be_empty=True
    )

  return Files(own, texts)
