"""Writes a token cache: documents to tokenized, randomly accessible shards.

A shard holds a run of consecutive pieces of the text, documents or files
(pieces.py), so any shard can be written alone. Runs, and not every n-th file:
so the tokens come in the order of the text, and the cache holds the same
stream however many shards there are. Writing goes on where it stopped, a
finished shard is never written again, and several processes or machines may
share the shards of one folder (`part`); whoever finishes last writes the
manifest. The same text, settings and versions give the same bytes, written by
one process or by many.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from st_moe.config import DataConfig, to_dict
from st_moe.data import cache_format
from st_moe.data.cache_format import Manifest, Shard
from st_moe.data.files import file_sha256, replacing, write_atomically
from st_moe.data.pieces import Pieces, Unit, pieces_of
from st_moe.data.vocabularies import Vocabulary, load_vocabulary
from st_moe.errors import UserError

DEFAULT_SHARDS = 16
# A longer document becomes several records: a window of a few hundred tokens
# must not cost the reading of megabytes.
RECORD_TOKENS = 16384
# Text tokenized at a time, spread over the cores.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 10_000_000
# With the text's fingerprint, what decides which document is in which split.
_TEXT_FIELDS = ('task', 'holdout_every', 'train_split', 'eval_split')
# What is in a folder before its plan is: what becomes the plan, the vocabulary.
_BEGINNING = re.compile(
  r'\.({plan}|{vocabulary})\.[0-9a-f]+\.tmp|{vocabulary}'.format(
    plan=re.escape(cache_format.PLAN_FILE),
    vocabulary=re.escape(cache_format.VOCABULARY_FILE),
  )
)


@dataclasses.dataclass(frozen=True)
class Part:
  """The shards that this process writes: those with number % count == index.

  A held-out shard goes to the part of the training shard of its number: where
  held-out documents come from the training files, these are the same files.
  """

  index: int = 0
  count: int = 1

  @classmethod
  def parse(cls, text: str) -> 'Part':
    """Reads 'i/n', i from 0.

    Raises:
      UserError: not of that form, or i not below n.
    """
    try:
      index, count = map(int, text.split('/'))
    except ValueError:
      index, count = 0, 0
    if not 0 <= index < count:
      raise UserError(
        f"--shard={text} is not 'i/n' with 0 <= i < n, for example 0/4"
      )
    return cls(index, count)


@dataclasses.dataclass(frozen=True)
class Text:
  """What is to be cached.

  Attributes:
    documents: gives the documents of 'train' or 'validation', each time the
      same in one order; a sequence and pieces are read only where needed.
    fingerprint: plain values that name the content.
    vocabulary: tokenizes them.
  """

  documents: Callable[[str], Pieces | Iterable[str]]
  fingerprint: dict[str, Any]
  vocabulary: Vocabulary


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the folder is going to hold; fixed by the first process.

  Attributes:
    text: what decides which documents there are, and in which split.
    vocabulary: 'byte' or the name of the model's file in the folder.
    model_sha256: `Vocabulary.model_sha256` of the tokenizer.
    shards: of each split.
    documents: of each split; empty where files are divided.
    files: of each split; empty where documents are divided.
  """

  text: dict[str, Any]
  vocabulary: str
  model_sha256: str
  shards: dict[str, int]
  documents: dict[str, int] = dataclasses.field(default_factory=dict)
  files: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def unit(self) -> Unit:
    return 'files' if self.files else 'documents'

  def run(self, split: str, index: int) -> range:
    """Returns the pieces of a shard, by number."""
    total, count = getattr(self, self.unit)[split], self.shards[split]
    return range(total * index // count, total * (index + 1) // count)


def write_cache(
  config: DataConfig,
  output: Path,
  text: Text,
  *,
  num_shards: int = DEFAULT_SHARDS,
  part: Part | None = None,
  report: Callable[[str], None] = print,
) -> Manifest | None:
  """Writes the shards that are missing, and the manifest when all are there.

  Args:
    config: what the text comes from; kept in the manifest.
    output: the cache's folder.
    text: documents and their vocabulary.
    num_shards: shards of the training split; fewer when there are fewer
      documents. The held-out split is one shard, or as many where files are
      divided. Readers keep every shard open, at four threads each: prefer few
      large ones.
    part: which shards to write; None: all.
    report: takes one line for each finished shard.

  Returns:
    The manifest, or None while other parts have shards to write.

  Raises:
    UserError: a split without documents, more parts than shards, or a folder
      that holds another text, vocabulary or number of shards.
  """
  output, part = Path(output), part or Part()
  _check_shards(num_shards, part)
  plan = _plan(config, output, text, num_shards)
  # Without sentinels: `<extra_id_0>` in a document is text like any other.
  vocabulary = load_vocabulary(text.vocabulary.spec, extra_ids=0)
  complete = True
  for split, count in plan.shards.items():
    missing = [
      index
      for index in range(part.index, count, part.count)
      if not _is_intact(output, cache_format.shard_name(split, index, count))
    ]
    if missing:
      complete = False
      pieces = pieces_of(text.documents(split))
      _write_shards(output, split, missing, plan, pieces, vocabulary, report)
  if complete:
    whose = 'this part is ' if part.count > 1 else ''
    report(f'{output}: {whose}already complete, nothing to write')
  return _write_manifest(config, output, plan, vocabulary)


def _check_shards(num_shards: int, part: Part) -> None:
  if num_shards < 1:
    raise UserError(f'num_shards must be >= 1, got {num_shards}')
  if part.count > num_shards:
    raise UserError(
      f'--shard={part.index}/{part.count}: {part.count} processes cannot share '
      f'{num_shards} shards; give all of them --num_shards={part.count} or more'
    )


def check_folder(output: Path) -> None:
  """Refuses a file, and a folder that holds other things than a cache.

  Raises:
    UserError: saying which.
  """
  if output.exists() and not output.is_dir():
    raise UserError(f'{output} is a file; choose a folder for the cache')
  # The names first: another process may be beginning this very cache, and
  # writes the plan before any shard.
  names = [path.name for path in output.iterdir()] if output.is_dir() else []
  is_cache = (output / cache_format.PLAN_FILE).is_file()
  if not is_cache and any(not _BEGINNING.fullmatch(name) for name in names):
    raise UserError(
      f'{output} is not empty and holds no cache; choose another folder'
    )


def read_plan(output: Path) -> Plan | None:
  """Reads what a folder is going to hold; None where nothing is planned.

  Raises:
    UserError: the plan is damaged.
  """
  path = Path(output) / cache_format.PLAN_FILE
  if not path.is_file():
    return None
  try:
    return Plan(**json.loads(path.read_bytes()))
  except (ValueError, TypeError) as error:
    raise UserError(
      f'{path} is damaged; delete the folder {output} and make the cache again'
    ) from error


def _plan(
  config: DataConfig, output: Path, text: Text, num_shards: int
) -> Plan:
  """Reads the folder's plan, or counts the pieces and makes one."""
  settings = {name: getattr(config, name) for name in _TEXT_FIELDS}
  identity = settings | {'content': text.fingerprint}
  identity = json.loads(json.dumps(identity))  # as the plan will read it
  if (plan := read_plan(output)) is not None:
    _check_plan(plan, output, identity, text.vocabulary, num_shards)
    return plan
  check_folder(output)
  pieces = {
    split: pieces_of(text.documents(split))
    for split in (cache_format.TRAIN, cache_format.VALIDATION)
  }
  counts = {split: len(parts) for split, parts in pieces.items()}
  for split, count in counts.items():
    if not count:
      raise UserError(f'task {config.task!r} has no {split} documents')
  unit = pieces[cache_format.TRAIN].unit
  held_out = num_shards if unit == 'files' else 1
  plan = Plan(
    text=identity,
    vocabulary=_store_vocabulary(output, text.vocabulary),
    model_sha256=text.vocabulary.model_sha256,
    shards={
      cache_format.TRAIN: min(num_shards, counts[cache_format.TRAIN]),
      cache_format.VALIDATION: min(held_out, counts[cache_format.VALIDATION]),
    },
    **{unit: counts},
  )
  if (other := read_plan(output)) is not None:  # begun while we counted
    _check_plan(other, output, identity, text.vocabulary, num_shards)
  path = output / cache_format.PLAN_FILE
  content = json.dumps(dataclasses.asdict(plan), indent=1)
  write_atomically(path, content.encode())
  return plan


def _check_plan(
  plan: Plan,
  output: Path,
  identity: dict[str, Any],
  vocabulary: Vocabulary,
  num_shards: int,
) -> None:
  """Refuses to mix two texts, vocabularies or numbers of shards."""
  train = cache_format.TRAIN
  now = identity | {
    'vocabulary': vocabulary.model_sha256,
    'num_shards': min(num_shards, getattr(plan, plan.unit)[train]),
  }
  then = plan.text | {
    'vocabulary': plan.model_sha256,
    'num_shards': plan.shards[train],
  }
  for name, value in now.items():
    if then.get(name) != value:
      raise UserError(
        f'{output} holds a cache with {name} {then.get(name)}, this one would '
        f'have {value}; choose another folder, or delete that one'
      )


def _store_vocabulary(output: Path, vocabulary: Vocabulary) -> str:
  """Copies the model into the folder; returns its name there, or 'byte'.

  Raises:
    UserError: another vocabulary is there.
  """
  if vocabulary.spec == 'byte':
    return 'byte'
  path = output / cache_format.VOCABULARY_FILE
  content = Path(vocabulary.spec).read_bytes()
  if path.is_file() and path.read_bytes() != content:
    raise UserError(
      f'{path} is not the vocabulary {vocabulary.spec}; choose another folder'
    )
  write_atomically(path, content)
  return path.name


def _is_intact(output: Path, name: str) -> bool:
  """Whether a shard is finished and its files are what was written."""
  shard = cache_format.read_shard(output, name)
  return (
    shard is not None
    and file_sha256(shard.data_path(output)) == shard.sha256
    and file_sha256(shard.offsets_path(output)) == shard.offsets_sha256
  )


def _write_shards(
  output: Path,
  split: str,
  missing: list[int],
  plan: Plan,
  pieces: Pieces,
  vocabulary: Vocabulary,
  report: Callable[[str], None],
) -> None:
  """Writes some shards of a split, in order."""
  for index in missing:
    run = plan.run(split, index)
    name = cache_format.shard_name(split, index, plan.shards[split])
    texts = pieces.read(run.start, run.stop)
    shard = _write_shard(output, name, texts, vocabulary)
    if plan.unit == 'documents':
      total = plan.documents[split]
      more = run.stop == total and not pieces.end_at(total)
      if shard.documents != len(run) or more:
        shard.record_path(output).unlink()
        raise UserError(
          f'the {split} text changed while {output} was written: its plan '
          f'counts {total} documents; delete the folder and make it again'
        )
    report(f'{name}: {shard.documents} documents, {shard.tokens} tokens')


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
  """Yields documents in batches of bounded number and size."""
  batch: list[str] = []
  characters = 0
  for text in texts:
    batch.append(text)
    characters += len(text)
    if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch


def _write_shard(
  output: Path, name: str, texts: Iterator[str], vocabulary: Vocabulary
) -> Shard:
  dtype = cache_format.token_dtype(_token_bytes(vocabulary))
  documents, offsets = 0, [0]
  with contextlib.ExitStack() as stack:
    data = stack.enter_context(replacing(output / f'{name}.array_record'))
    index = stack.enter_context(replacing(output / f'{name}.offsets.npy'))
    # One record per chunk: a random read decompresses one record.
    writer = ArrayRecordWriter(str(data), 'group_size:1')
    for batch in _batches(texts):
      documents += len(batch)
      for ids in vocabulary.encode_batch(batch):
        tokens = np.asarray(ids, dtype)
        for start in range(0, len(tokens), RECORD_TOKENS):
          record = tokens[start : start + RECORD_TOKENS]
          writer.write(record.tobytes())
          offsets.append(offsets[-1] + len(record))
    writer.close()
    with index.open('wb') as file:
      np.save(file, np.asarray(offsets, np.int64))
    shard = Shard(
      name=name,
      documents=documents,
      records=len(offsets) - 1,
      tokens=offsets[-1],
      bytes=data.stat().st_size,
      sha256=file_sha256(data),
      offsets_sha256=file_sha256(index),
    )
  content = json.dumps(dataclasses.asdict(shard))
  write_atomically(shard.record_path(output), content.encode())
  return shard


def _token_bytes(vocabulary: Vocabulary) -> int:
  return 2 if vocabulary.vocab_size <= 2**16 else 4


def _write_manifest(
  config: DataConfig, output: Path, plan: Plan, vocabulary: Vocabulary
) -> Manifest | None:
  """Writes the manifest if every shard of the plan is finished.

  Several processes may do so at once: each writes the same bytes.

  Raises:
    UserError: a split without documents, or another plan in the folder: two
      processes began at the same moment with different settings.
  """
  if read_plan(output) != plan:
    raise UserError(
      f'{output} was begun by another process with other settings; delete it, '
      'and give all processes the same'
    )
  splits: dict[str, tuple[Shard, ...]] = {}
  for split, count in plan.shards.items():
    names = [cache_format.shard_name(split, i, count) for i in range(count)]
    shards = [cache_format.read_shard(output, name) for name in names]
    if None in shards:
      return None
    if not sum(shard.documents for shard in shards):
      raise UserError(f'task {config.task!r} has no {split} documents')
    splits[split] = tuple(shards)
  manifest = Manifest(
    vocabulary=plan.vocabulary,
    model_sha256=plan.model_sha256,
    token_bytes=_token_bytes(vocabulary),
    config=json.loads(json.dumps(to_dict(config))),  # as it is read back
    splits=splits,
  )
  path = output / cache_format.MANIFEST_FILE
  write_atomically(path, manifest.to_json().encode())
  # Of killed processes; before, they might have been another's at work.
  for kind in ('array_record', 'offsets.npy'):
    for leftover in output.glob(f'.*.{kind}.*.tmp'):
      leftover.unlink(missing_ok=True)
  return manifest
