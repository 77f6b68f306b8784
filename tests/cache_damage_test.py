"""A token cache that is not there, not finished, damaged or does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_cache import (
  TEXTS,
  assert_equal,
  config_of,
  take,
  write_small_cache,
)

from st_moe.config import DataConfig
from st_moe.data.cache import open_cache
from st_moe.data.vocabularies import load_vocabulary, train_vocabulary
from st_moe.errors import UserError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('cache') / 'cache'
  write_small_cache(path)
  return path


@pytest.fixture
def damaged(folder, tmp_path):
  """A copy of the cache to break."""
  return shutil.copytree(folder, tmp_path / 'cache')


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('model') / 'small.model'
  train_vocabulary(TEXTS['train'], 35, path)
  return path


def refused(config: DataConfig, rows: int = 0) -> str:
  """Opens the cache, reads batches, and returns the message."""
  with pytest.raises(UserError) as error:
    data = open_cache(config, seed=0)
    batches = data.train_batches(8)
    for _ in range(rows // 8):
      next(batches)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_a_cache_must_be_named(folder):
  assert 'needs --gin.DataConfig.cache_dir=DIR' in refused(
    DataConfig(task='cache')
  )
  message = refused(config_of(folder / 'none'))
  assert 'none does not exist; make it with `st_moe cache`' in message


def test_any_folder_is_no_cache(tmp_path):
  assert 'is not a cache' in refused(config_of(tmp_path))


def test_an_unfinished_cache_says_how_to_go_on(damaged):
  (damaged / 'manifest.json').unlink()
  message = refused(config_of(damaged))
  assert 'is not finished; run the same `st_moe cache`' in message


@pytest.mark.parametrize('keep', [0, 1, 200, -30])
def test_a_truncated_manifest_is_named(damaged, keep):
  path = damaged / 'manifest.json'
  path.write_bytes(path.read_bytes()[:keep])
  assert f'{path} is damaged' in refused(config_of(damaged))


@pytest.mark.parametrize(
  'content', ['[]', '{"format": "other", "version": 1}', '{"version": 1}']
)
def test_another_manifest_is_named(damaged, content):
  path = damaged / 'manifest.json'
  path.write_text(content)
  assert f'{path} is damaged' in refused(config_of(damaged))


def test_another_format_version_is_named(damaged):
  path = damaged / 'manifest.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'version': 7}))
  message = refused(config_of(damaged))
  assert 'format version 7, this st_moe reads 1' in message


def test_a_missing_shard_is_named(damaged):
  path = damaged / 'train-00001-of-00003.array_record'
  path.unlink()
  message = refused(config_of(damaged))
  assert f'{path} is missing; delete it and run' in message


def test_a_truncated_shard_is_named(damaged):
  path = damaged / 'train-00001-of-00003.array_record'
  content = path.read_bytes()
  path.write_bytes(content[:-100])
  message = refused(config_of(damaged))
  assert f'{path} has {len(content) - 100} bytes instead of' in message


def test_a_shard_with_changed_bytes_is_named_when_it_is_read(damaged):
  path = damaged / 'train-00001-of-00003.array_record'
  content = bytearray(path.read_bytes())
  written = len(bytes(content).rstrip(b'\0'))
  for position in range(0, written, 50):
    content[position] ^= 0x55
  path.write_bytes(content)
  message = refused(config_of(damaged), rows=200)
  assert f'{path} is damaged' in message


def test_one_changed_byte_never_changes_a_batch(damaged):
  path = damaged / 'train-00001-of-00003.array_record'
  config = config_of(damaged)
  expected = take(open_cache(config, seed=0).train_batches(40), 2)
  content = path.read_bytes()
  written = np.flatnonzero(np.frombuffer(content, np.uint8))  # not padding
  noticed = 0
  for position in written[7 :: len(written) // 12]:
    changed = bytearray(content)
    changed[position] ^= 1
    path.write_bytes(changed)
    try:
      found = take(open_cache(config, seed=0).train_batches(40), 2)
    except UserError as error:
      assert f'{path} is damaged' in str(error)
      noticed += 1
    else:  # a byte that nobody needs
      assert_equal(found, expected)
  assert noticed >= 3


@pytest.mark.parametrize('content', [None, b'', b'text', b'\x93NUMPY\x01\0'])
def test_a_broken_offsets_file_is_named(damaged, content):
  path = damaged / 'train-00000-of-00003.offsets.npy'
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  assert f'{path} is missing or damaged' in refused(config_of(damaged))


def test_offsets_of_another_shard_are_noticed(damaged):
  path = damaged / 'train-00000-of-00003.offsets.npy'
  np.save(path, np.load(path)[:-1])
  assert f'{path} does not agree' in refused(config_of(damaged))


def test_changed_offsets_are_noticed(damaged):
  path = damaged / 'train-00000-of-00003.offsets.npy'
  offsets = np.load(path)
  offsets[5] += 3
  np.save(path, offsets)
  assert 'does not agree' in refused(config_of(damaged), rows=200)


def test_another_vocabulary_is_refused(folder, model):
  message = refused(config_of(folder, vocabulary=str(model)))
  assert f'with another vocabulary than {model}' in message


def test_an_exchanged_vocabulary_file_is_noticed(tmp_path, model):
  write_small_cache(
    tmp_path / 'cache', vocabulary=load_vocabulary(str(model), 100)
  )
  path = tmp_path / 'cache' / 'vocabulary.model'
  path.unlink()
  assert f'{path} does not exist' in refused(config_of(tmp_path / 'cache'))
  train_vocabulary(TEXTS['train'], 30, path)
  message = refused(config_of(tmp_path / 'cache'))
  assert f'{path} is not the vocabulary that tokenized' in message


def test_splits_lengths_and_options_are_checked(folder):
  for changes, message in (
    ({'train_split': 'test'}, 'splits train, validation, not test'),
    ({'targets_length': 13}, 'targets_length 13 is too short'),
    ({'extra_ids': 2}, 'extra_ids gives 2 sentinels'),
    ({'objective': 'none'}, "objective = 'none' does not go"),
    ({'pack': True}, 'set DataConfig.pack = False'),
  ):
    assert message in refused(config_of(folder, **changes))
