"""A token cache of a few documents, for tests."""

from pathlib import Path

import numpy as np

from st_moe.config import DataConfig
from st_moe.data.cache_writer import Text, write_cache
from st_moe.data.vocabularies import load_vocabulary

BYTES = load_vocabulary('byte', extra_ids=100)
SENTENCE = 'the river runs past an old mill and a boat waits for wind'
WORDS = SENTENCE.split()


def make_texts(count: int, seed: int) -> list[str]:
  rng = np.random.default_rng(seed)
  return [
    ' '.join(rng.choice(WORDS, size=rng.integers(1, 40))) for _ in range(count)
  ]


TEXTS = {'train': make_texts(60, 0), 'validation': make_texts(9, 1)}


def write_small_cache(
  folder: Path, *, num_shards=3, vocabulary=BYTES, texts=TEXTS
) -> None:
  text = Text(texts.__getitem__, {'sha256': 'x'}, vocabulary)
  manifest = write_cache(
    DataConfig(),
    folder,
    text,
    num_shards=num_shards,
    report=lambda line: None,
  )
  assert manifest is not None


def config_of(folder: Path, **changes) -> DataConfig:
  settings = {
    'task': 'cache',
    'cache_dir': str(folder),
    'inputs_length': 64,
    'targets_length': 14,
  }
  return DataConfig(**settings | changes)


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
  return [next(batches) for _ in range(count)]


def assert_equal(ours, expected) -> None:
  assert len(ours) == len(expected)
  for one, other in zip(ours, expected, strict=True):
    assert sorted(one) == sorted(other)
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)
