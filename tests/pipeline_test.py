"""Streams: shapes, order, shards, saved positions, held-out batches, errors."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf

from st_moe.config import DataConfig
from st_moe.data.c4_json import JsonDocuments
from st_moe.data.iterators import StreamingBatches
from st_moe.data.pipeline import open_data
from st_moe.data.readers import JsonSource, RandomAccessSource
from st_moe.errors import UserError

CONFIG = DataConfig(
  task='text',
  vocabulary='byte',
  inputs_length=64,
  targets_length=20,
  holdout_every=10,
)
ROWS = 8
PACKED = {'objective': 'prefix_lm', 'targets_length': 63, 'pack': True}


def documents(name, count):
  return [f'<{name}{i}> a boat with number {i} came by.' for i in range(count)]


def write_json(path, texts):
  lines = '\n'.join(json.dumps({'text': text}) for text in texts)
  path.write_bytes(gzip.compress(lines.encode()))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A text file of 100 documents, and three JSON shards of 40, 41 and 42."""
  folder = tmp_path_factory.mktemp('corpus')
  (folder / 'corpus.txt').write_text('\n'.join(documents('t', 100)))
  for shard in range(3):
    path = folder / f'c4-train.{shard}.json.gz'
    write_json(path, documents(f's{shard}-', 40 + shard))
  return folder


def open_(folder, seed=0, **changes):
  json_task = changes.get('task') == 'c4_json'
  files = str(folder / ('c4-train*' if json_task else 'corpus.txt'))
  config = dataclasses.replace(CONFIG, **({'files': files} | changes))
  return open_data(config, seed=seed, cache_root=None)


@pytest.fixture(scope='module')
def data(folder):
  return open_(folder)


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_same(found, expected):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def digest(batches):
  content = hashlib.sha256()
  for batch in batches:
    for name in sorted(batch):
      content.update(batch[name].tobytes())
  return content.hexdigest()


def names_in(texts):
  return set(re.findall(r'<([a-z0-9-]+)>', ' '.join(texts)))


class TestTraining:
  def test_batches_have_seqio_s_features(self, data):
    batch = next(data.train_batches(ROWS))
    assert {name: array.shape for name, array in batch.items()} == {
      'encoder_input_tokens': (ROWS, 64),
      'decoder_input_tokens': (ROWS, 20),
      'decoder_target_tokens': (ROWS, 20),
      'decoder_loss_weights': (ROWS, 20),
    }
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    targets = batch['decoder_target_tokens']
    np.testing.assert_array_equal(
      batch['decoder_input_tokens'][:, 1:], targets[:, :-1]
    )
    np.testing.assert_array_equal(batch['decoder_loss_weights'], targets > 0)

  def test_packed_batches_have_segments_and_positions(self, folder):
    batch = next(open_(folder, **PACKED).train_batches(ROWS))
    names = ['encoder_input_tokens', 'encoder_segment_ids', 'encoder_positions']
    names += [name.replace('encoder', 'decoder') for name in names]
    names += ['decoder_target_tokens', 'decoder_loss_weights']
    assert sorted(batch) == sorted(names)
    assert batch['encoder_segment_ids'].max() > 1

  def test_a_corpus_of_one_document_gives_batches(self, tmp_path):
    """Far fewer than the 128 that are merged and the 1000 that are shuffled."""
    (tmp_path / 'corpus.txt').write_text(documents('t', 1)[0])
    (tmp_path / 'eval.txt').write_text('held out words here')
    data = open_(tmp_path, eval_files=str(tmp_path / 'eval.txt'))
    first, second = take(data.train_batches(32), 2)
    assert (first['encoder_input_tokens'][:, 0] > 0).all()
    assert digest([first]) != digest([second])

  @pytest.mark.parametrize('task', ['text', 'c4_json'])
  def test_held_out_documents_are_never_trained_on(self, folder, task):
    data = open_(folder, task=task)
    train, held_out = (
      names_in(data.documents(split)) for split in ('train', 'validation')
    )
    assert len(train) > 80
    assert len(held_out) > 9
    assert not train & held_out
    seen = set()
    for batch in take(data.train_batches(64), 5):
      for part in ('encoder_input_tokens', 'decoder_target_tokens'):
        seen |= names_in(data.vocabulary.decode(row) for row in batch[part])
    assert len(seen & train) > 60  # those that no mask cuts
    assert not seen & held_out

  def test_processes_read_different_documents(self, data):
    rows = [
      next(data.train_batches(ROWS, process_index=i, process_count=2))
      for i in range(2)
    ]
    assert rows[0]['encoder_input_tokens'].shape == (ROWS // 2, 64)
    assert digest(rows[:1]) != digest(rows[1:])

  def test_a_batch_that_cannot_be_divided_is_refused(self, data):
    with pytest.raises(UserError, match='batch_size 9 .* the 2 processes'):
      data.train_batches(9, process_count=2)


def test_another_process_reads_the_same_stream_without_noise(folder, data):
  """And a cache is looked for without loading TensorFlow."""
  program = f"""
import dataclasses, sys
sys.path[:0] = {sys.path!r}
from st_moe.config import DataConfig
from st_moe.data.pipeline import open_data
from st_moe.errors import UserError
try:
  open_data(DataConfig(task='cache'), seed=0, cache_root=None)
except UserError as error:
  assert 'cache_dir' in str(error), error
loaded = {{'tensorflow', 'seqio'}} & set(sys.modules)
assert not loaded, loaded
config = DataConfig(
  task='text', files={str(folder / 'corpus.txt')!r}, vocabulary='byte',
  inputs_length=64, targets_length=20, holdout_every=10)
print('about to load', file=sys.stderr, flush=True)
data = open_data(config, seed=0, cache_root=None)
print('loaded', file=sys.stderr, flush=True)
from tests.pipeline_test import digest, take
print(digest(take(data.train_batches({ROWS}), 10)))
"""
  run = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr
  assert run.stderr.startswith('about to load\nloaded\n')
  assert run.stdout.strip() == digest(take(data.train_batches(ROWS), 10))
  other = open_(folder, seed=1).train_batches(ROWS)
  assert run.stdout.strip() != digest(take(other, 10))


class TestSources:
  """The documents before tokenization."""

  def read(self, source, count=None, **options):
    dataset = source.get_dataset('train', **options)
    dataset = dataset.take(-1 if count is None else count)
    return [x['text'].decode() for x in dataset.as_numpy_iterator()]

  def test_each_epoch_is_a_whole_new_order_from_the_seed(self):
    texts = documents('d', 40)
    source = RandomAccessSource({'train': texts}, [])
    found = self.read(source, 120, shuffle=True, seed=5)
    epochs = [found[:40], found[40:80], found[80:]]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, texts]}) == 4
    assert self.read(source, 120, shuffle=True, seed=5) == found
    assert self.read(source, 40, shuffle=True, seed=6) != epochs[0]
    assert self.read(source, shuffle=False) == texts

  def test_one_document_is_every_epoch(self):
    source = RandomAccessSource({'train': ['only']}, [])
    assert self.read(source, 3, shuffle=True, seed=0) == ['only'] * 3

  @pytest.mark.parametrize('shuffle', [True, False])
  def test_shards_of_documents_divide_each_epoch(self, shuffle):
    texts = documents('d', 42)
    source = RandomAccessSource({'train': texts}, [])
    shards = [
      self.read(
        source, 14, shuffle=shuffle, seed=1, shard_info=seqio.ShardInfo(i, 3)
      )
      for i in range(3)
    ]
    assert sorted(sum(shards, [])) == sorted(texts)

  def test_shards_of_files_divide_each_epoch(self, folder):
    files = sorted(folder.glob('c4-train*'))
    part = JsonDocuments(files, 10**6).part(held_out=False)
    source = JsonSource({'train': part}, [])
    assert len(source.list_shards('train')) == 3
    options = {'shuffle': True, 'seed': 1}
    shards = [
      self.read(source, shard_info=seqio.ShardInfo(i, 2), **options)
      for i in range(2)
    ]
    assert all(shards)
    assert sorted(sum(shards, [])) == sorted(part)
    assert sorted(self.read(source, **options)) == sorted(part)


class TestPosition:
  @pytest.mark.parametrize(
    'changes', [{}, {'task': 'c4_json'}, PACKED], ids=['text', 'json', 'packed']
  )
  def test_every_batch_after_a_restore_is_the_one_that_came(
    self, folder, changes
  ):
    """Over several epochs: 90 documents are about 30 rows (packed: 60)."""
    data = open_(folder, **changes)
    batches = data.train_batches(ROWS)
    expected, states = [], {}
    for step in range(40):
      if step in (7, 19):
        states[step] = batches.get_state()
      expected.append(next(batches))
    resumed = open_(folder, **changes).train_batches(ROWS)
    for step in (19, 7):
      resumed.set_state(states[step])
      assert_same(take(resumed, 40 - step), expected[step:])
    assert len(states[19]) < 500_000

  def counting(self, rows=ROWS, **processes):
    """Batches of plain numbers."""
    about = {'batch_size': rows, 'process_index': 0, 'process_count': 1}
    return StreamingBatches(
      lambda: tf.data.Dataset.range(100).map(lambda i: {'number': i}),
      about | processes,
      lambda: None,
    )

  def test_a_position_is_behind_the_last_batch_handed_out(self):
    batches = self.counting()
    take(batches, 3)
    state = batches.get_state()
    other = self.counting()
    other.set_state(state)
    assert [int(b['number']) for b in take(other, 2)] == [3, 4]

  @pytest.mark.parametrize(
    ('processes', 'message'),
    [
      ({'process_count': 2}, 'saved with 1 processes, this run has 2.*cache'),
      ({'process_index': 1}, 'saved with 0 as process number'),
      ({'rows': 16}, 'saved with 8 rows a batch, this run has 16'),
    ],
  )
  def test_other_processes_or_batches_are_refused(self, processes, message):
    state = self.counting().get_state()
    with pytest.raises(UserError, match=message):
      self.counting(**processes).set_state(state)

  @pytest.mark.parametrize('state', [b'', b'{"next_batch": 3}'])
  def test_the_position_of_another_input_is_refused(self, state):
    with pytest.raises(
      UserError, match='was not written by a run that streams'
    ):
      self.counting().set_state(state)

  def test_the_position_of_another_pipeline_is_refused(self, data):
    state = data.train_batches(ROWS).get_state()
    with pytest.raises(UserError, match='does not fit this text and these'):
      self.counting().set_state(state)

  def test_an_end_of_the_training_text_is_an_error(self):
    with pytest.raises(UserError, match='the training text gives no example'):
      take(self.counting(), 101)


class TestEvaluation:
  @pytest.mark.parametrize('task', ['text', 'c4_json'])
  def test_the_same_batches_come_every_time_whatever_the_seed(
    self, folder, task
  ):
    data = open_(folder, task=task)
    expected = list(data.eval_batches(4, 2))
    assert len(expected) == 2
    assert_same(list(data.eval_batches(4, 2)), expected)
    other = open_(folder, seed=9, task=task)
    assert_same(list(other.eval_batches(4, 2)), expected)

  def test_the_last_batch_is_filled_up_with_rows_of_weight_zero(self, data):
    characters = sum(map(len, data.documents('validation')))
    rows = -(-characters // 70)  # windows of 64 inputs
    batches = list(data.eval_batches(rows - 2, 1000))
    assert len(batches) == 2
    real = [b['decoder_loss_weights'].any(axis=1).tolist() for b in batches]
    assert real == [[True] * (rows - 2), [True] * 2 + [False] * (rows - 4)]
    for array in batches[1].values():
      assert array.shape[0] == rows - 2
      assert not array[2:].any()

  def test_all_held_out_text_is_there_and_no_other(self, data):
    text = ''
    for batch in data.eval_batches(8, 1000):
      for name in ('encoder_input_tokens', 'decoder_target_tokens'):
        text += ' '.join(data.vocabulary.decode(row) for row in batch[name])
    expected = names_in(data.documents('validation'))
    assert expected == {f't{i}' for i in range(9, 100, 10)}
    assert names_in([text]) <= expected
    # A name that a mask cuts in two cannot be found.
    assert len(names_in([text])) >= 5

  def test_the_rows_do_not_depend_on_the_number_of_processes(self, data):
    expected = list(data.eval_batches(4, 1000))
    parts = [
      list(data.eval_batches(4, 1000, process_index=i, process_count=4))
      for i in range(4)
    ]
    together = [
      {name: np.concatenate([p[name] for p in row]) for name in row[0]}
      for row in zip(*parts, strict=True)
    ]
    assert_same(together, expected)

  def test_sentences_are_of_held_out_documents_and_the_same_each_time(
    self, tmp_path
  ):
    lines = [
      f'Here begins {name} with all of its many plain and simple words. Yes.'
      for name in ('one', 'two', 'three', 'four', 'five', 'six')
    ]
    (tmp_path / 'corpus.txt').write_text('\n'.join(lines))
    data = open_(tmp_path, holdout_every=3)
    found = data.eval_texts(5)
    assert sorted(found) == [
      f'Here begins {name} with all of its many plain and simple words.'
      for name in ('six', 'three')
    ]
    assert open_(tmp_path, seed=1, holdout_every=3).eval_texts(5) == found
    assert data.eval_texts(1) == found[:1]


class TestErrors:
  def test_a_broken_record_met_while_streaming_is_one_clear_line(
    self, tmp_path
  ):
    path = tmp_path / 'c4-train.json.gz'
    write_json(path, documents('t', 200))
    content = gzip.decompress(path.read_bytes()) + b'\n{"text": "cut'
    path.write_bytes(gzip.compress(content))
    data = open_(tmp_path, task='c4_json')
    with pytest.raises(UserError, match='c4-train.json.gz:201: broken JSON'):
      take(data.train_batches(ROWS), 1000)
    with pytest.raises(UserError, match='c4-train.json.gz:201: broken JSON'):
      list(data.eval_batches(ROWS, 1000))

  def test_a_file_that_vanishes_is_one_clear_line(self, tmp_path):
    path = tmp_path / 'corpus.txt'
    path.write_text('\n'.join(documents('t', 50)))
    data = open_(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match='corpus.txt cannot be read: No such'):
      next(data.train_batches(ROWS))


class TestFingerprint:
  def test_it_is_json_and_names_text_vocabulary_and_libraries(self, data):
    found = data.fingerprint
    assert found == json.loads(json.dumps(found))
    assert found['task'] == 'text'
    counts = {'train': 90, 'validation': 10}
    assert found['text']['text']['documents'] == counts
    libraries = {'numpy', 'seqio', 'sentencepiece', 'tensorflow'}
    assert set(found['versions']) == libraries
    assert len(found['vocabulary']) == 64

  def test_it_does_not_depend_on_the_seed_and_does_on_the_text(
    self, folder, data, tmp_path
  ):
    text = (folder / 'corpus.txt').read_text()
    (tmp_path / 'corpus.txt').write_text(text)
    assert open_(tmp_path, seed=5).fingerprint == data.fingerprint
    (tmp_path / 'corpus.txt').write_text(text.replace('boat', 'Boat', 1))
    assert open_(tmp_path).fingerprint != data.fingerprint


def test_real_books_decode_to_their_own_words(shared_data):
  """T5's vocabulary and lengths; inputs and targets fit together."""
  books = shared_data / 'pretrain/books'
  data = open_data(
    DataConfig(
      task='text',
      files=str(books / 'validation.txt'),
      vocabulary=str(shared_data / 'vocab/t5_cc_all_32000_spiece.model'),
    ),
    seed=0,
    cache_root=None,
  )
  batch = next(data.train_batches(16))
  corpus = ''.join((books / 'validation.txt').read_text().split())
  full = 0
  for inputs, targets in zip(
    batch['encoder_input_tokens'], batch['decoder_target_tokens'], strict=True
  ):
    kept = re.split(r'<extra_id_\d+>', data.vocabulary.decode(inputs))
    noise = re.split(r'<extra_id_\d+>', data.vocabulary.decode(targets))
    assert noise[0] == ''
    full += len(kept) == 28 + 1
    # Sentinel k of the inputs stands for what follows it in the targets.
    pieces = [kept[0]]
    for hidden, after in zip(noise[1:], kept[1:], strict=True):
      pieces += [hidden, after]
    text = ''.join(''.join(pieces).split())
    # Windows run over the ends of documents, which stand elsewhere.
    found = sum(text[i : i + 40] in corpus for i in range(0, len(text), 40))
    assert found >= 0.6 * len(text) / 40
  assert full >= 14  # the last window of 128 documents is shorter
