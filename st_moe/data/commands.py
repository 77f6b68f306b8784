"""Behind `st_moe vocab` and `st_moe cache`: they prepare text, once.

Both read any pretraining task: a cache of files by files (cache_text.py), the
rest through seqio's sources (TensorFlow).
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from st_moe.config import DataConfig
from st_moe.data import cache_writer
from st_moe.data.cache_text import divide, open_text
from st_moe.data.cache_writer import Part, write_cache
from st_moe.data.pipeline import open_stream
from st_moe.data.vocabularies import (
  Vocabulary,
  load_vocabulary,
  train_vocabulary,
)
from st_moe.errors import UserError

# Held-out text on which a new vocabulary is measured.
_MEASURED_CHARACTERS = 1_000_000


def vocab_command(
  config: DataConfig,
  output: Path,
  size: int,
  *,
  cache_root: Path | None = None,
  report: Callable[[str], None] = print,
) -> None:
  """Trains a SentencePiece model on a task's training text.

  Args:
    config: names the text; its own vocabulary does not matter.
    output: path of the new model.
    size: number of pieces, without the extra ids.
    cache_root: as for `open_data`.
    report: takes the lines to show.

  Raises:
    UserError: the path is taken, the text is empty or too small.
  """
  output = Path(output).expanduser()
  if output.exists():
    raise UserError(
      f'{output} exists and is not overwritten; choose another path, or '
      'delete it'
    )
  folder = next(p for p in output.absolute().parents if p.exists())
  if not folder.is_dir() or not os.access(folder, os.W_OK):
    raise UserError(
      f'{output} cannot be written: {folder} is no folder that you may write '
      'to; choose another path'
    )
  if size < 1:
    raise UserError(f'the size of a vocabulary must be > 0, got {size}')
  _refuse_cache(config)
  # A vocabulary is needed to open the text; bytes need no training.
  config = dataclasses.replace(config, vocabulary='byte')
  data = open_stream(config, seed=0, cache_root=cache_root)
  with _writing(output):
    train_vocabulary(data.documents('train'), size, output)
  vocabulary = load_vocabulary(str(output), extra_ids=0)
  quality = measure(vocabulary, data.documents('validation'))
  report(
    f'{output}: {vocabulary.vocab_size} pieces; on held-out text '
    f'{quality.characters_per_token:.2f} characters per token, '
    f'{quality.unknown_rate:.4%} unknown'
  )


@dataclasses.dataclass(frozen=True)
class Quality:
  """How well a vocabulary fits a text.

  Attributes:
    characters_per_token: more is shorter sequences.
    unknown_rate: share of tokens that are unknown.
  """

  characters_per_token: float
  unknown_rate: float


def measure(vocabulary: Vocabulary, texts: Iterable[str]) -> Quality:
  """Tokenizes the first million characters of texts and counts."""
  characters = tokens = unknown = 0
  for text in texts:
    ids = vocabulary.encode(text)
    characters += len(text)
    tokens += len(ids)
    unknown += ids.count(vocabulary.unk_id)
    if characters >= _MEASURED_CHARACTERS:
      break
  tokens = max(tokens, 1)  # of an empty text
  return Quality(characters / tokens, unknown / tokens)


def cache_command(
  config: DataConfig,
  output: Path,
  *,
  num_shards: int | None = None,
  shard: str | None = None,
  cache_root: Path | None = None,
  report: Callable[[str], None] = print,
) -> None:
  """Tokenizes a task's documents into a cache, or what of it is missing.

  Args:
    config: names the text and the vocabulary.
    output: the cache's folder.
    num_shards: files of the training split; None: as `divide` decides.
    shard: 'i/n', to write every n-th file from the i-th (from 0); the other
      processes or machines write the others into the same folder.
    cache_root: as for `open_data`.
    report: takes the lines to show.

  Raises:
    UserError: see `write_cache`; also a mixture, a task registered with seqio,
      or a vocabulary that each of several processes would have to train.
  """
  part = Part() if shard is None else Part.parse(shard)
  _refuse_cache(config)
  output = Path(output).expanduser()
  cache_writer.check_folder(output)
  division = divide(config, num_shards, cache_writer.read_plan(output))
  if config.vocabulary == 'auto':
    if part.count > 1:
      raise UserError(
        f'--shard={shard} without a vocabulary: each process would read all '
        'the text to train one; make it once with `st_moe vocab` and give '
        '--vocabulary=FILE'
      )
    report(
      f'no vocabulary is given (--vocabulary): one of '
      f'{config.auto_vocabulary_size} pieces is trained on the text and kept '
      f'in {output}'
    )
  text = open_text(config, division, cache_root)
  with _writing(output):
    manifest = write_cache(
      config,
      output,
      text,
      num_shards=division.num_shards,
      part=part,
      report=report,
    )
  if manifest is None:
    report(f'{output}: shards of other parts are still missing')
    return
  tokens = sum(shard.tokens for shard in manifest.splits['train'])
  report(
    f'{output}: {tokens} training tokens; train from it with '
    f'--gin.TASK=cache --gin.DataConfig.cache_dir={output}'
  )


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
  """Turns a path that cannot be written, or a full disk, into a UserError."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'{output} cannot be written: {error.strerror or error}; choose another '
      'path, or make room'
    ) from error


def _refuse_cache(config: DataConfig) -> None:
  if config.task == 'cache':
    raise UserError(
      "task 'cache' is tokenized already; name the task of the text itself"
    )
