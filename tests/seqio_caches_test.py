"""Caches of seqio's own job are read in the place of a task's source."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

seqio = pytest.importorskip('seqio')
import tensorflow as tf  # noqa: E402

from st_moe.config import DataConfig  # noqa: E402
from st_moe.data.cache import open_cache  # noqa: E402
from st_moe.data.pipeline import open_data  # noqa: E402
from st_moe.errors import UserError  # noqa: E402

TASK = 'sums_in_a_cache'
COUNT = 81


def no_source(split, shuffle_files, seed=None):
  raise AssertionError('the source was read')


def register(name: str, *placeholder) -> None:
  """Registers a task of sums whose source must not be read."""
  feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=100), add_eos=True)
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(no_source, ['train', 'validation']),
    preprocessors=[
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
      *placeholder,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature, 'targets': feature},
  )


@pytest.fixture
def task():
  register(TASK, seqio.CacheDatasetPlaceholder())
  yield TASK
  seqio.TaskRegistry.remove(TASK)


@pytest.fixture(autouse=True)
def no_other_folders():
  before = seqio.get_global_cache_dirs()
  seqio.set_global_cache_dirs([])
  yield
  seqio.set_global_cache_dirs(before)


def sums(count: int) -> list[tuple[str, str]]:
  return [(f'{i // 9} plus {i % 9}', str(i // 9 + i % 9)) for i in range(count)]


def write_cache(root: Path, task=TASK, num_shards=3) -> Path:
  """Writes what `seqio_cache_tasks` writes, without Beam."""
  vocabulary = seqio.ByteVocabulary(extra_ids=100)
  folder = root / task
  folder.mkdir(parents=True)
  for split, count in (('train', COUNT), ('validation', 2)):
    shards = num_shards if split == 'train' else 1
    rows = [
      {'inputs': vocabulary.encode(a), 'targets': vocabulary.encode(b)}
      for a, b in sums(count)
    ]
    prefix = seqio.get_cached_tfrecord_prefix(str(folder), split)
    for shard in range(shards):
      path = f'{prefix}-{shard:05d}-of-{shards:05d}'
      with tf.io.TFRecordWriter(path) as writer:
        for row in rows[shard::shards]:
          example = seqio.dict_to_tfexample(
            {name: np.array(ids, np.int32) for name, ids in row.items()}
          )
          writer.write(example.SerializeToString())
    feature = {'dtype': 'int32', 'shape': [None]}
    info = {
      'features': {'inputs': feature, 'targets': feature},
      'num_shards': shards,
      'seqio_version': seqio.__version__,
    }
    Path(seqio.get_cached_info_path(str(folder), split)).write_text(
      json.dumps(info)
    )
    Path(seqio.get_cached_stats_path(str(folder), split)).write_text(
      json.dumps({'examples': count})
    )
  (folder / 'COMPLETED').write_text('')
  return folder


def config(root, task=TASK, **settings) -> DataConfig:
  values = {
    'task': task,
    'objective': 'none',
    'seqio_cache_dirs': str(root),
    'inputs_length': 16,
    'targets_length': 4,
  }
  return DataConfig(**values | settings)


def open_task(root, task=TASK, **settings):
  return open_data(config(root, task, **settings), seed=0, cache_root=None)


def pairs(data, batch) -> list[tuple[str, str]]:
  decode = data.vocabulary.decode
  return [
    (decode(a), decode(b))
    for a, b in zip(
      batch['encoder_input_tokens'],
      batch['decoder_target_tokens'],
      strict=True,
    )
  ]


def test_the_cache_is_read_and_the_source_is_not(task, tmp_path):
  write_cache(tmp_path)
  data = open_task(tmp_path, shuffle=False)
  batch = next(data.train_batches(COUNT))
  assert sorted(pairs(data, batch)) == sorted(sums(COUNT))
  # The end of sequence comes after the cache's place in the pipeline.
  assert batch['decoder_target_tokens'][0].tolist()[1] == 1
  (held_out,) = data.eval_batches(4, 10)
  assert pairs(data, held_out)[:2] == sums(2)
  assert held_out['decoder_loss_weights'].sum(axis=1).tolist() == [2, 2, 0, 0]
  assert data.fingerprint['seqio_caches'] == {
    TASK: {'train': {'examples': COUNT}, 'validation': {'examples': 2}}
  }


def test_processes_share_the_files_and_positions_are_kept(task, tmp_path):
  write_cache(tmp_path, num_shards=2)
  data = open_task(tmp_path)
  seen = []
  for index in (0, 1):
    batches = data.train_batches(8, process_index=index, process_count=2)
    own = [next(batches) for _ in range(10)]  # one epoch of 40 or 41 rows
    seen.append({pair for batch in own for pair in pairs(data, batch)})
  assert not seen[0] & seen[1]
  batches = data.train_batches(8)
  next(batches)
  state = batches.get_state()
  expected = [next(batches) for _ in range(3)]
  again = data.train_batches(8)
  again.set_state(state)
  for batch in expected:
    np.testing.assert_array_equal(
      next(again)['encoder_input_tokens'], batch['encoder_input_tokens']
    )


def test_a_list_of_folders_is_searched(task, tmp_path):
  write_cache(tmp_path / 'b')
  folders = (str(tmp_path / 'a'), str(tmp_path / 'b'))
  data = open_task(tmp_path, seqio_cache_dirs=folders)
  assert len(next(data.train_batches(4))['encoder_input_tokens']) == 4


def refused(*arguments, **settings) -> str:
  with pytest.raises(UserError) as error:
    open_task(*arguments, **settings)
  message = str(error.value)
  assert message.startswith('DataConfig.seqio_cache_dirs')
  assert '\n' not in message
  return message


def test_a_folder_without_a_finished_cache_is_named(task, tmp_path):
  for folder in (tmp_path, tmp_path / 'absent'):
    message = refused(folder)
    assert f'no finished cache of task {TASK!r} in {folder} (a' in message
  write_cache(tmp_path)
  (tmp_path / TASK / 'COMPLETED').unlink()
  assert 'no finished cache' in refused(tmp_path)


@pytest.mark.parametrize('name', ['info.train.json', 'stats.validation.json'])
@pytest.mark.parametrize('damage', ['delete', 'change'])
def test_a_missing_or_broken_file_is_named(task, tmp_path, name, damage):
  path = write_cache(tmp_path) / name
  path.unlink() if damage == 'delete' else path.write_text('{')
  assert f'{path} is missing or damaged' in refused(tmp_path)


def test_a_split_that_was_not_cached_is_named(task, tmp_path):
  write_cache(tmp_path)
  message = refused(tmp_path, eval_split='test')
  assert f'{tmp_path}/{TASK}/stats.test.json is missing' in message


def test_a_part_that_was_not_copied_is_noticed(task, tmp_path):
  folder = write_cache(tmp_path)
  (folder / 'train.tfrecord-00001-of-00003').unlink()
  assert 'train.tfrecord-* are 2 of 3 files' in refused(tmp_path)


def test_tasks_that_seqio_cannot_cache_are_refused(tmp_path):
  register('not_cacheable')
  try:
    message = refused(tmp_path, 'not_cacheable')
    assert 'has no seqio.CacheDatasetPlaceholder' in message
  finally:
    seqio.TaskRegistry.remove('not_cacheable')


def test_built_in_tasks_have_a_cache_of_their_own(tmp_path):
  message = refused(tmp_path, 'docstrings', objective='span_corruption')
  assert "'docstrings' is built in: leave it out, or use `st_moe" in message
  with pytest.raises(UserError, match="task 'cache' reads"):
    from small_cache import config_of, write_small_cache

    write_small_cache(tmp_path / 'c')
    open_cache(config_of(tmp_path / 'c', seqio_cache_dirs='x'), seed=0)
