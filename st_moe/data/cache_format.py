"""What a token cache looks like on disk, and reading its manifest.

A cache is a folder with, for each shard of each split,

  train-00000-of-00016.array_record  records of tokens, little-endian uint16
                                     (uint32 above 65,536 ids), one document
                                     each or a piece of a long one, in order
  train-00000-of-00016.offsets.npy   int64 [records + 1], tokens of the shard
                                     before each record
  train-00000-of-00016.json          its counts and hashes; written last, it
                                     marks the shard as finished

and `plan.json` (what is being written), `vocabulary.model` (unless the
vocabulary is 'byte') and, when every shard is there, `manifest.json`. No ids
of sentinels and no lengths of features enter the tokens: one cache serves
every objective, `inputs_length` and number of extra ids.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from st_moe.errors import UserError

FORMAT = 'st_moe token cache'
VERSION = 1
PLAN_FILE = 'plan.json'
MANIFEST_FILE = 'manifest.json'
VOCABULARY_FILE = 'vocabulary.model'
TRAIN, VALIDATION = 'train', 'validation'


@dataclasses.dataclass(frozen=True)
class Shard:
  """One finished shard.

  Attributes:
    name: file name without suffix.
    documents: texts in it, empty ones too.
    records: ArrayRecord records.
    tokens: token ids in all records.
    bytes: size of the ArrayRecord file.
    sha256: of the ArrayRecord file.
    offsets_sha256: of the offsets file.
  """

  name: str
  documents: int
  records: int
  tokens: int
  bytes: int
  sha256: str
  offsets_sha256: str

  def data_path(self, folder: Path) -> Path:
    return folder / f'{self.name}.array_record'

  def offsets_path(self, folder: Path) -> Path:
    return folder / f'{self.name}.offsets.npy'

  def record_path(self, folder: Path) -> Path:
    return folder / f'{self.name}.json'


@dataclasses.dataclass(frozen=True)
class Manifest:
  """A finished cache.

  Attributes:
    vocabulary: 'byte' or the name of the model's file in the folder.
    model_sha256: `Vocabulary.model_sha256` of the tokenizer.
    token_bytes: bytes per token in the records, 2 or 4.
    config: the DataConfig that made it, as plain values.
    splits: the shards of 'train' and of 'validation', in order.
  """

  vocabulary: str
  model_sha256: str
  token_bytes: int
  config: dict[str, Any]
  splits: dict[str, tuple[Shard, ...]]

  def to_json(self) -> str:
    fields = dataclasses.asdict(self)
    counts = {
      split: {
        name: sum(getattr(shard, name) for shard in shards)
        for name in ('documents', 'records', 'tokens')
      }
      for split, shards in self.splits.items()
    }
    content = {'format': FORMAT, 'version': VERSION, 'totals': counts}
    return json.dumps(content | fields, indent=1)


def token_dtype(token_bytes: int) -> np.dtype:
  """Returns the type of a token in a record."""
  return np.dtype({2: '<u2', 4: '<u4'}[token_bytes])


def shard_name(split: str, index: int, count: int) -> str:
  return f'{split}-{index:05d}-of-{count:05d}'


def read_shard(folder: Path, name: str) -> Shard | None:
  """Returns a finished shard; None where unfinished or its files changed."""
  try:
    shard = Shard(**json.loads((folder / f'{name}.json').read_bytes()))
    if shard.data_path(folder).stat().st_size != shard.bytes:
      return None
    return shard if shard.offsets_path(folder).is_file() else None
  except (OSError, ValueError, TypeError):
    return None


def read_manifest(folder: Path) -> Manifest:
  """Reads the manifest of a finished cache.

  Raises:
    UserError: no cache there, one not finished, damaged, or of another format
      version.
  """
  path = folder / MANIFEST_FILE
  if not folder.is_dir():
    raise UserError(
      f'cache {folder} does not exist; make it with `st_moe cache`'
    )
  if not path.is_file():
    if (folder / PLAN_FILE).is_file():
      raise UserError(
        f'cache {folder} is not finished; run the same `st_moe cache` command '
        'again, it goes on where it stopped'
      )
    raise UserError(
      f'{folder} is not a cache: it has no {MANIFEST_FILE}; make one with '
      '`st_moe cache`'
    )
  try:
    content = json.loads(path.read_bytes())
    form, version = content.pop('format'), content.pop('version')
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise _damaged(path) from error
  if form != FORMAT:
    raise _damaged(path)
  if version != VERSION:
    raise UserError(
      f'{path} has format version {version}, this st_moe reads {VERSION}; '
      'make the cache again in a new folder with `st_moe cache`'
    )
  try:
    content.pop('totals')
    content['splits'] = {
      split: tuple(Shard(**shard) for shard in shards)
      for split, shards in content['splits'].items()
    }
    return Manifest(**content)
  except (KeyError, TypeError, AttributeError) as error:
    raise _damaged(path) from error


def _damaged(path: Path) -> UserError:
  return UserError(
    f'{path} is damaged; run the same `st_moe cache` command again, it writes '
    'the manifest anew from the finished shards'
  )
