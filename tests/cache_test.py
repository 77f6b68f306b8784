"""Batches from a token cache: order, resume, processes, what may be wrong."""

import collections
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_cache import (
  BYTES,
  TEXTS,
  assert_equal,
  config_of,
  take,
  write_small_cache,
)

from st_moe.data import cache_format
from st_moe.data.cache import open_cache
from st_moe.data.cache_windows import Windows
from st_moe.data.vocabularies import load_vocabulary, train_vocabulary
from st_moe.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('cache') / 'cache'
  write_small_cache(path)
  return path


def together(parts) -> list[dict[str, np.ndarray]]:
  """Joins the batches of all processes to global batches."""
  return [
    {name: np.concatenate([part[name] for part in step]) for name in step[0]}
    for step in zip(*parts, strict=True)
  ]


def windows_of(batches, vocabulary=BYTES) -> list[tuple[int, ...]]:
  """Returns the text under each row: the spans put back in their places."""
  found = []
  for batch in batches:
    for inputs, targets in zip(
      batch['encoder_input_tokens'],
      batch['decoder_target_tokens'],
      strict=True,
    ):
      spans, sentinel = collections.defaultdict(list), None
      for token in targets[targets > 1].tolist():
        if vocabulary.is_sentinel(token):
          sentinel = token
        else:
          spans[sentinel].append(token)
      window = []
      for token in inputs[inputs > 1].tolist():
        is_sentinel = vocabulary.is_sentinel(token)
        window += spans[token] if is_sentinel else [token]
      found.append(tuple(window))
  return found


def expected_windows(split: str, size: int) -> list[tuple[int, ...]]:
  stream = [token for text in TEXTS[split] for token in BYTES.encode(text)]
  return [
    tuple(stream[start : start + size]) for start in range(0, len(stream), size)
  ]


# --- windows


@pytest.mark.parametrize('num_shards', [1, 3, 60])
@pytest.mark.parametrize('size', [1, 7, 70, 5000, 10**6])
def test_windows_cut_the_stream_of_all_documents(tmp_path, num_shards, size):
  write_small_cache(tmp_path / 'cache', num_shards=num_shards)
  manifest = cache_format.read_manifest(tmp_path / 'cache')
  windows = Windows(tmp_path / 'cache', manifest, 'train', size)
  expected = expected_windows('train', size)
  assert len(windows) == len(expected)
  for index in {0, 1, len(expected) // 2, len(expected) - 1} & set(
    range(len(expected))
  ):
    assert tuple(windows[index].tolist()) == expected[index]
    assert windows[index].dtype == np.int32


def test_empty_documents_and_shards_do_no_harm(tmp_path):
  texts = TEXTS | {'train': ['', '', 'ab', '', 'cde', '']}
  write_small_cache(tmp_path / 'cache', num_shards=6, texts=texts)
  manifest = cache_format.read_manifest(tmp_path / 'cache')
  windows = Windows(tmp_path / 'cache', manifest, 'train', 3)
  found = [BYTES.decode(windows[i]) for i in range(len(windows))]
  assert found == ['abc', 'de']


# --- training batches


def test_each_epoch_visits_every_window_once_in_its_own_order(folder):
  batches = open_cache(config_of(folder), seed=0).train_batches(1)
  expected = expected_windows('train', 70)
  first = windows_of(take(batches, len(expected)))
  second = windows_of(take(batches, len(expected)))
  assert sorted(first) == sorted(second) == sorted(expected)
  assert first != second and first != expected


def test_each_epoch_masks_other_tokens(folder):
  config = config_of(folder, shuffle=False)
  batches = open_cache(config, seed=0).train_batches(1)
  epoch = len(expected_windows('train', 70))
  first, second = take(batches, epoch), take(batches, epoch)
  assert windows_of(first) == windows_of(second)
  same = [
    np.array_equal(one['encoder_input_tokens'], two['encoder_input_tokens'])
    for one, two in zip(first, second, strict=True)
  ]
  assert sum(same) < epoch / 4


def test_without_shuffling_windows_come_in_order(folder):
  config = config_of(folder, shuffle=False)
  batches = open_cache(config, seed=0).train_batches(4)
  expected = expected_windows('train', 70)
  assert windows_of(take(batches, 3)) == expected[:12]


def test_a_text_shorter_than_a_row_repeats_itself(tmp_path):
  texts = {'train': ['ab'], 'validation': ['c']}
  write_small_cache(tmp_path / 'cache', texts=texts)
  data = open_cache(config_of(tmp_path / 'cache'), seed=0)
  windows = windows_of([next(data.train_batches(3))])
  assert windows == [tuple(BYTES.encode('ab'))] * 3
  (batch,) = data.eval_batches(2, 10)
  assert batch['decoder_loss_weights'].sum(axis=1).tolist() == [
    2,
    0,
  ]  # T5 masks nothing


def test_rows_have_the_configured_lengths_and_no_padding(folder):
  batch = next(open_cache(config_of(folder), seed=0).train_batches(4))
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
    'encoder_input_tokens': ((4, 64), np.int32),
    'decoder_input_tokens': ((4, 14), np.int32),
    'decoder_target_tokens': ((4, 14), np.int32),
    'decoder_loss_weights': ((4, 14), np.int32),
  }
  assert (batch['encoder_input_tokens'] > 0).all()
  assert (batch['encoder_input_tokens'][:, -1] == 1).all()
  assert (batch['decoder_loss_weights'] == 1).all()


def test_the_seed_decides_order_and_masks(folder):
  def first(seed):
    return take(open_cache(config_of(folder), seed=seed).train_batches(8), 3)

  assert_equal(first(3), first(3))
  assert windows_of(first(3)) != windows_of(first(4))


def test_the_layout_of_the_shards_does_not_matter(folder, tmp_path):
  write_small_cache(tmp_path / 'cache', num_shards=1)
  one, three = (
    take(open_cache(config_of(path), seed=0).train_batches(8), 20)
    for path in (tmp_path / 'cache', folder)
  )
  assert_equal(one, three)


def test_prefix_lm_splits_windows_in_two(folder):
  config = config_of(folder, objective='prefix_lm', targets_length=64)
  batches = open_cache(config, seed=0).train_batches(1)
  expected = expected_windows('train', 63)
  found = []
  for batch in take(batches, len(expected)):
    inputs, targets = (
      batch[name][0]
      for name in ('encoder_input_tokens', 'decoder_target_tokens')
    )
    assert (inputs == 1).sum() == (targets == 1).sum() == 1
    found.append((*inputs[inputs > 1].tolist(), *targets[targets > 1].tolist()))
  assert sorted(found) == sorted(expected)


# --- processes and resuming


@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_together_read_the_global_batches(folder, process_count):
  data = open_cache(config_of(folder), seed=0)
  expected = take(data.train_batches(8), 15)
  parts = [
    take(
      data.train_batches(8, process_index=index, process_count=process_count),
      15,
    )
    for index in range(process_count)
  ]
  assert parts[0][0]['encoder_input_tokens'].shape[0] == 8 // process_count
  assert_equal(together(parts), expected)


def test_resumes_exactly_behind_the_last_batch_handed_out(folder):
  data = open_cache(config_of(folder), seed=0)
  batches = data.train_batches(8)
  states, expected = [], []
  for _ in range(12):
    states.append(batches.get_state())
    expected.append(next(batches))
  fresh = open_cache(config_of(folder), seed=0).train_batches(8)
  for step in (5, 0, 11):
    fresh.set_state(states[step])
    assert fresh.get_state() == states[step]
    assert_equal([next(fresh)], [expected[step]])
  assert all(len(state) < 100 for state in states)


def test_resumes_on_another_number_of_processes(folder):
  data = open_cache(config_of(folder), seed=0)
  expected = take(data.train_batches(8), 9)
  saved = data.train_batches(8, process_index=1, process_count=2)
  take(saved, 4)
  parts = []
  for index in range(4):
    part = data.train_batches(8, process_index=index, process_count=4)
    part.set_state(saved.get_state())
    parts.append(take(part, 5))
  assert_equal(together(parts), expected[4:])


def test_resumes_with_another_batch_size(folder):
  data = open_cache(config_of(folder), seed=0)
  rows = together([take(data.train_batches(1), 24)] * 1)
  saved = data.train_batches(6)
  take(saved, 2)
  resumed = data.train_batches(4)
  resumed.set_state(saved.get_state())
  found = np.concatenate(
    [batch['encoder_input_tokens'] for batch in take(resumed, 3)]
  )
  expected = np.concatenate([row['encoder_input_tokens'] for row in rows[12:]])
  np.testing.assert_array_equal(found, expected)


def test_states_of_other_inputs_are_refused(folder):
  batches = open_cache(config_of(folder), seed=0).train_batches(8)
  for state in (b'', b'PK\x03\x04', b'{}', b'[]'):
    with pytest.raises(UserError, match='not written by a run from a cache'):
      batches.set_state(state)


def test_batches_that_processes_cannot_share_are_refused(folder):
  data = open_cache(config_of(folder), seed=0)
  with pytest.raises(UserError, match='batch_size 6 .* the 4 processes'):
    data.train_batches(6, process_count=4)


# --- held-out batches


def test_held_out_batches_cover_the_split_and_end_in_empty_rows(folder):
  data = open_cache(config_of(folder), seed=0)
  expected = expected_windows('validation', 70)
  assert len(expected) % 4 == 3, 'the last batch shall be uneven'
  batches = list(data.eval_batches(4, 1000))
  assert len(batches) == len(expected) // 4 + 1
  last = batches[-1]
  assert all((array[3:] == 0).all() for array in last.values())
  assert (last['decoder_loss_weights'][:3].sum(axis=1) > 0).all()
  found = [window for window in windows_of(batches) if window]
  assert sorted(found) == sorted(expected)


def test_held_out_batches_are_the_same_for_every_call_and_seed(folder):
  data = open_cache(config_of(folder), seed=0)
  expected = list(data.eval_batches(4, 3))
  assert len(expected) == 3
  assert_equal(list(data.eval_batches(4, 3)), expected)
  other = open_cache(config_of(folder), seed=1)
  assert_equal(list(other.eval_batches(4, 3)), expected)


def test_processes_together_read_the_held_out_batches(folder):
  data = open_cache(config_of(folder), seed=0)
  parts = [
    list(data.eval_batches(4, 1000, process_index=i, process_count=4))
    for i in range(4)
  ]
  assert_equal(together(parts), list(data.eval_batches(4, 1000)))


def test_held_out_sentences_are_text(tmp_path):
  sentence = 'The miller waves his hat when the boat leaves.'
  texts = TEXTS | {'validation': [sentence, 'no sentence here']}
  write_small_cache(tmp_path / 'cache', texts=texts)
  data = open_cache(config_of(tmp_path / 'cache'), seed=0)
  assert data.eval_texts(5) == [sentence]


# --- vocabularies


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('model') / 'small.model'
  train_vocabulary(TEXTS['train'], 35, path)
  return path


def test_the_cache_brings_its_own_vocabulary(tmp_path, model):
  vocabulary = load_vocabulary(str(model), extra_ids=100)
  write_small_cache(tmp_path / 'cache', vocabulary=vocabulary)
  for spec in ('auto', str(model)):
    config = config_of(tmp_path / 'cache', vocabulary=spec)
    data = open_cache(config, seed=0)
    assert data.vocabulary.fingerprint == vocabulary.fingerprint
  stream = sum(map(vocabulary.encode, TEXTS['train']), [])
  config = dataclasses.replace(config, shuffle=False)
  windows = windows_of(
    [next(open_cache(config, seed=0).train_batches(2))], vocabulary
  )
  assert windows == [tuple(stream[:70]), tuple(stream[70:140])]


def test_other_numbers_of_sentinels_need_no_new_cache(folder):
  data = open_cache(config_of(folder, extra_ids=10), seed=0)
  assert data.vocabulary.vocab_size == 259 + 10
  batch = next(data.train_batches(2))
  assert (batch['decoder_target_tokens'][:, 0] == 268).all()


def test_fingerprint_is_plain_and_names_the_tokens(folder, tmp_path):
  fingerprint = open_cache(config_of(folder), seed=0).fingerprint
  assert json.loads(json.dumps(fingerprint)) == fingerprint
  assert fingerprint['train_documents'] == 60
  assert fingerprint['validation_tokens'] == sum(
    len(text) for text in TEXTS['validation']
  )
  other = {name: [*texts, 'more'] for name, texts in TEXTS.items()}
  write_small_cache(tmp_path / 'cache', texts=other)
  changed = open_cache(config_of(tmp_path / 'cache'), seed=0).fingerprint
  assert changed['cache'] != fingerprint['cache']


# --- without TensorFlow


def test_needs_no_tensorflow(folder):
  program = (
    'import sys\n'
    'from st_moe.config import DataConfig\n'
    'from st_moe.data.pipeline import open_data\n'
    f'config = DataConfig(task="cache", cache_dir={str(folder)!r})\n'
    'data = open_data(config, seed=0, cache_root=None)\n'
    'next(data.train_batches(2)); next(data.eval_batches(2, 1))\n'
    'data.eval_texts(2)\n'
    'heavy = ("tensorflow", "seqio", "tensorflow_datasets")\n'
    'print([name for name in heavy if name in sys.modules])\n'
  )
  output = subprocess.run(
    [sys.executable, '-c', program],
    check=True,
    capture_output=True,
    text=True,
    env={'PYTHONPATH': str(ROOT)},
  )
  assert output.stdout == '[]\n', output.stderr
