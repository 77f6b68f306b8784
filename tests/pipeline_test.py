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

from st_moe.config import DataConfig
from st_moe.data.c4_json import JsonDocuments
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


def documents(name, count):
  return [
    f'<{name}{i}> once upon a time there was number {i}.' for i in range(count)
  ]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A text file of 400 documents, and two JSON shards of 100 each."""
  folder = tmp_path_factory.mktemp('corpus')
  (folder / 'corpus.txt').write_text('\n'.join(documents('t', 400)))
  for shard in range(2):
    texts = documents(f's{shard}-', 100)
    lines = '\n'.join(json.dumps({'text': text}) for text in texts)
    (folder / f'c4-train.{shard}.json.gz').write_bytes(
      gzip.compress(lines.encode())
    )
  return folder


KINDS = {
  'text': {},
  'c4_json': {'task': 'c4_json'},
  'packed prefix_lm': {
    'objective': 'prefix_lm',
    'targets_length': 63,
    'pack': True,
  },
  'in order': {'shuffle': False},
}


def config_of(folder, **changes):
  json_task = changes.get('task') == 'c4_json'
  files = str(folder / ('c4-train*' if json_task else 'corpus.txt'))
  return dataclasses.replace(CONFIG, **({'files': files} | changes))


def open_(folder, seed=0, **changes):
  return open_data(config_of(folder, **changes), seed=seed, cache_root=None)


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


def ids_in(texts):
  return set(re.findall(r'<([a-z0-9-]+)>', ' '.join(texts)))


class TestTraining:
  def test_batches_have_seqio_s_features(self, folder):
    batch = next(open_(folder).train_batches(ROWS))
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
    batch = next(open_(folder, **KINDS['packed prefix_lm']).train_batches(ROWS))
    assert set(batch) == {
      'encoder_input_tokens',
      'encoder_segment_ids',
      'encoder_positions',
      'decoder_input_tokens',
      'decoder_target_tokens',
      'decoder_loss_weights',
      'decoder_segment_ids',
      'decoder_positions',
    }
    assert batch['encoder_segment_ids'].max() > 1

  def test_the_order_is_a_function_of_the_seed_alone(self, folder):
    """The same in another process, another with another seed."""
    here = digest(take(open_(folder, seed=3).train_batches(ROWS), 20))
    other = digest(take(open_(folder, seed=4).train_batches(ROWS), 20))
    assert here != other
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.pipeline_test import digest, open_, take
print(digest(take(open_(Path({str(folder)!r}), seed=3).train_batches(8), 20)))
"""
    there = subprocess.run(
      [sys.executable, '-c', program],
      capture_output=True,
      text=True,
      check=True,
    )
    assert there.stdout.strip() == here

  @pytest.mark.parametrize('count', [1, 2, 3])
  def test_a_corpus_of_a_few_documents_gives_batches(self, tmp_path, count):
    """Far fewer than the 128 that are merged and the 1000 that are shuffled."""
    (tmp_path / 'train.txt').write_text('\n'.join(documents('t', count)))
    (tmp_path / 'eval.txt').write_text('held out words here')
    data = open_(
      tmp_path,
      files=str(tmp_path / 'train.txt'),
      eval_files=str(tmp_path / 'eval.txt'),
    )
    first, second = take(data.train_batches(32), 2)
    assert (first['encoder_input_tokens'][:, 0] > 0).all()
    assert digest([first]) != digest([second])

  def test_held_out_documents_are_never_trained_on(self, folder):
    for kind in ('text', 'c4_json'):
      data = open_(folder, **KINDS[kind])
      train, held_out = (
        ids_in(data.documents(split)) for split in ('train', 'validation')
      )
      assert not train & held_out
      seen = set()
      for batch in take(data.train_batches(64), 12):
        for part in ('encoder_input_tokens', 'decoder_target_tokens'):
          seen |= ids_in(data.vocabulary.decode(row) for row in batch[part])
      assert len(seen & train) > 100
      assert not seen & held_out

  def test_a_batch_that_cannot_be_divided_is_refused(self, folder):
    with pytest.raises(UserError, match='batch_size 9 .* the 2 processes'):
      open_(folder).train_batches(9, process_count=2)


class TestSources:
  """The documents before tokenization."""

  def read(self, source, **options):
    dataset = source.get_dataset('train', **options)
    return [x['text'].decode() for x in dataset.as_numpy_iterator()]

  def test_each_epoch_is_a_whole_new_order_from_the_seed(self):
    texts = documents('d', 40)
    source = RandomAccessSource({'train': texts}, [])
    dataset = source.get_dataset('train', shuffle=True, seed=5).repeat(3)
    found = [x['text'].decode() for x in dataset.as_numpy_iterator()]
    epochs = [found[:40], found[40:80], found[80:]]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, texts]}) == 4
    assert self.read(source, shuffle=True, seed=5) == epochs[0]
    assert self.read(source, shuffle=True, seed=6) != epochs[0]
    assert self.read(source, shuffle=False) == texts

  @pytest.mark.parametrize('count', [2, 3])
  def test_shards_divide_the_documents(self, folder, count):
    texts = documents('d', 40)
    files = sorted(folder.glob('c4-train*'))
    part = JsonDocuments(files, 10**6).part(held_out=False)
    for source, whole in (
      (RandomAccessSource({'train': texts}, []), texts),
      (JsonSource({'train': part}, []), list(part)),
    ):
      if len(source.list_shards('train')) < count and isinstance(
        source, JsonSource
      ):
        continue  # seqio then divides the documents itself
      shards = [
        self.read(
          source, shuffle=True, seed=1, shard_info=seqio.ShardInfo(i, count)
        )
        for i in range(count)
      ]
      assert sorted(sum(shards, [])) == sorted(whole)

  def test_more_processes_than_documents_are_refused(self):
    source = RandomAccessSource({'train': ['a', 'b']}, [])
    with pytest.raises(UserError, match='2 documents cannot be shared by 3'):
      self.read(source, shard_info=seqio.ShardInfo(0, 3))

  def test_processes_see_different_rows(self, folder):
    data = open_(folder)
    rows = [
      next(data.train_batches(ROWS, process_index=i, process_count=2))
      for i in range(2)
    ]
    assert rows[0]['encoder_input_tokens'].shape == (ROWS // 2, 64)
    assert digest(rows[:1]) != digest(rows[1:])


class TestPosition:
  @pytest.mark.parametrize('kind', KINDS)
  def test_the_next_batch_after_a_restore_is_the_one_that_came(
    self, folder, kind
  ):
    data = open_(folder, **KINDS[kind])
    batches = data.train_batches(ROWS)
    # An epoch is about 130 rows: the second position lies in a later one.
    before = [batches.get_state(), take(batches, 3)]
    early = [batches.get_state(), take(batches, 40)]
    late = [batches.get_state(), take(batches, 3)]
    resumed = open_(folder, **KINDS[kind]).train_batches(ROWS)
    for state, expected in (late, before, early):
      resumed.set_state(state)
      assert_same(take(resumed, len(expected)), expected)

  def test_a_position_is_small(self, folder):
    batches = open_(folder).train_batches(ROWS)
    next(batches)
    assert len(batches.get_state()) < 1_000_000

  def test_another_number_of_processes_is_refused(self, folder):
    data = open_(folder)
    state = data.train_batches(ROWS, process_count=2).get_state()
    with pytest.raises(UserError, match='2 processes, this run has 1.*cache'):
      data.train_batches(ROWS).set_state(state)
    other = data.train_batches(ROWS, process_index=1, process_count=2)
    with pytest.raises(UserError, match='saved with 0 as process number'):
      other.set_state(state)

  def test_another_batch_size_is_refused(self, folder):
    data = open_(folder)
    state = data.train_batches(ROWS).get_state()
    with pytest.raises(UserError, match='saved with 8 rows a batch.* has 16'):
      data.train_batches(16).set_state(state)

  @pytest.mark.parametrize('state', [b'', b'{"next_batch": 3}'])
  def test_the_position_of_another_input_is_refused(self, folder, state):
    with pytest.raises(
      UserError, match='was not written by a run that streams'
    ):
      open_(folder).train_batches(ROWS).set_state(state)

  def test_the_position_of_another_pipeline_is_refused(self, folder):
    state = open_(folder).train_batches(ROWS).get_state()
    packed = open_(folder, **KINDS['packed prefix_lm']).train_batches(ROWS)
    with pytest.raises(UserError, match='does not fit this text and these'):
      packed.set_state(state)


class TestEvaluation:
  @pytest.mark.parametrize('kind', ['text', 'c4_json', 'packed prefix_lm'])
  def test_the_same_batches_come_every_time_whatever_the_seed(
    self, folder, kind
  ):
    data = open_(folder, **KINDS[kind])
    expected = list(data.eval_batches(4, 3))
    assert len(expected) == 3
    assert_same(list(data.eval_batches(4, 3)), expected)
    other = open_(folder, seed=9, **KINDS[kind])
    next(other.train_batches(4))
    assert_same(list(other.eval_batches(4, 3)), expected)

  def test_the_last_batch_is_filled_up_with_rows_of_weight_zero(self, folder):
    data = open_(folder)
    batches = list(data.eval_batches(7, 1000))
    rows = np.concatenate([b['decoder_loss_weights'] for b in batches])
    assert all(b['encoder_input_tokens'].shape == (7, 64) for b in batches)
    real = rows.any(axis=1)
    count = real.sum()
    assert 0 < (7 - count % 7) == np.sum(~real[-7:])
    assert real[:count].all()
    for array in batches[-1].values():
      assert not array[~real[-7:]].any()

  def test_all_held_out_text_is_there(self, folder):
    data = open_(folder)
    text = ''
    for batch in data.eval_batches(8, 1000):
      for name in ('encoder_input_tokens', 'decoder_target_tokens'):
        text += ' '.join(data.vocabulary.decode(row) for row in batch[name])
    expected = ids_in(data.documents('validation'))
    # A name that a mask cuts in two cannot be found.
    assert len(ids_in([text]) & expected) > len(expected) / 2
    assert ids_in([text]) <= expected

  @pytest.mark.parametrize('count', [2, 4])
  def test_the_rows_do_not_depend_on_the_number_of_processes(
    self, folder, count
  ):
    data = open_(folder)
    expected = list(data.eval_batches(8, 1000))
    parts = [
      list(data.eval_batches(8, 1000, process_index=i, process_count=count))
      for i in range(count)
    ]
    together = [
      {name: np.concatenate([p[name] for p in row]) for name in row[0]}
      for row in zip(*parts, strict=True)
    ]
    assert_same(together, expected)

  def test_sentences_are_of_held_out_documents_and_the_same_each_time(
    self, folder
  ):
    folder = folder / 'prose'
    folder.mkdir(exist_ok=True)
    lines = [
      f'Here begins {name} with all of its many plain and simple words. Yes.'
      for name in ('one', 'two', 'three', 'four', 'five', 'six')
    ]
    (folder / 'corpus.txt').write_text('\n'.join(lines))
    data = open_(folder, holdout_every=3)
    found = data.eval_texts(5)
    assert sorted(found) == [
      f'Here begins {name} with all of its many plain and simple words.'
      for name in ('six', 'three')
    ]
    assert open_(folder, seed=1, holdout_every=3).eval_texts(5) == found
    assert data.eval_texts(1) == found[:1]


class TestErrors:
  def test_a_broken_record_met_while_streaming_is_one_clear_line(
    self, tmp_path
  ):
    texts = documents('t', 300)
    lines = [json.dumps({'text': text}) for text in texts]
    lines[200] = '{"text": "cut'
    path = tmp_path / 'c4-train.json.gz'
    path.write_bytes(gzip.compress('\n'.join(lines).encode()))
    data = open_(tmp_path, task='c4_json')
    with pytest.raises(UserError, match='c4-train.json.gz:201: broken JSON'):
      take(data.train_batches(ROWS), 1000)
    with pytest.raises(UserError, match='c4-train.json.gz:201: broken JSON'):
      list(data.eval_batches(ROWS, 1000))

  def test_a_shard_that_was_cut_is_an_error_and_no_short_epoch(self, tmp_path):
    lines = [json.dumps({'text': t}) for t in documents('t', 3000)]
    path = tmp_path / 'c4-train.json.gz'
    path.write_bytes(gzip.compress('\n'.join(lines).encode())[:-500])
    data = open_(tmp_path, task='c4_json')
    with pytest.raises(UserError, match='c4-train.json.gz: broken gzip file'):
      take(data.train_batches(64), 1000)

  def test_a_file_that_vanishes_is_one_clear_line(self, tmp_path):
    path = tmp_path / 'corpus.txt'
    path.write_text('\n'.join(documents('t', 400)))
    data = open_(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match='corpus.txt cannot be read: No such'):
      next(data.train_batches(ROWS))

  def test_a_cache_is_opened_without_tensorflow_and_text_without_noise(
    self, folder
  ):
    program = f"""
import dataclasses, sys
sys.path[:0] = {sys.path!r}
from st_moe.config import DataConfig
from st_moe.data.pipeline import open_data
from st_moe.errors import UserError
try:
  open_data(DataConfig(task='cache'), seed=0, cache_root=None)
except UserError as error:
  print(error)
loaded = {{'tensorflow', 'seqio', 'jax'}} & set(sys.modules)
assert not loaded, loaded
print('not text yet', file=sys.stderr)
config = DataConfig(task='text', files={str(folder / 'corpus.txt')!r},
                    vocabulary='byte')
open_data(config, seed=0, cache_root=None)
"""
    run = subprocess.run(
      [sys.executable, '-c', program],
      capture_output=True,
      text=True,
      check=True,
    )
    assert 'cache_dir' in run.stdout
    assert run.stderr == 'not text yet\n'


class TestFingerprint:
  def test_it_is_json_and_names_text_vocabulary_and_libraries(self, folder):
    found = open_(folder).fingerprint
    assert found == json.loads(json.dumps(found))
    assert found['task'] == 'text'
    assert found['text']['text']['documents'] == {
      'train': 360,
      'validation': 40,
    }
    assert set(found['versions']) == {
      'numpy',
      'seqio',
      'sentencepiece',
      'tensorflow',
    }
    assert len(found['vocabulary']) == 64

  def test_it_does_not_depend_on_the_seed_and_does_on_the_text(
    self, folder, tmp_path
  ):
    text = (folder / 'corpus.txt').read_text()
    (tmp_path / 'corpus.txt').write_text(text)
    here, there = open_(folder).fingerprint, open_(tmp_path, 5).fingerprint
    assert here == there
    (tmp_path / 'corpus.txt').write_text(text.replace('upon', 'Upon', 1))
    assert open_(tmp_path).fingerprint != here


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
  for inputs, targets in zip(
    batch['encoder_input_tokens'], batch['decoder_target_tokens'], strict=True
  ):
    kept = re.split(r'<extra_id_\d+>', data.vocabulary.decode(inputs))
    noise = re.split(r'<extra_id_\d+>', data.vocabulary.decode(targets))
    assert len(kept) - 1 == len(noise) - 1 == 28
    assert noise[0] == ''
    # Sentinel k of the inputs stands for what follows it in the targets.
    pieces = [kept[0]]
    for hidden, after in zip(noise[1:], kept[1:], strict=True):
      pieces += [hidden, after]
    text = ''.join(''.join(pieces).split())
    # Windows run over the ends of documents, which stand elsewhere.
    found = sum(text[i : i + 40] in corpus for i in range(0, len(text), 40))
    assert found >= 0.6 * len(text) / 40
