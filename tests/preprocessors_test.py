"""The objectives against t5 0.9.4's own numbers, and by hand."""

import functools
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
from golden_t5.stream import stream

from st_moe.data import preprocessors
from st_moe.data.span_corruption import span_corruption_lengths

T5 = Path(__file__).resolve().parent / 'golden_t5'
SPANS = {'noise_density': 0.15, 'mean_noise_span_length': 3.0}


def load(name):
  with np.load(T5 / f'{name}.npz') as file:
    return dict(file)


def reference_documents():
  return load('documents')['text'].tobytes().decode().split('\n')


def our_stream(objective, lengths, seed, shuffle):
  """The rows of one epoch over t5's documents, as generate.py makes them."""
  return stream(reference_documents(), objective, lengths, seed, shuffle)


class TestParityWithT5:
  def test_lengths_equal_t5_for_every_inputs_length(self):
    expected = load('lengths')
    found = [
      span_corruption_lengths(int(length), 0.15, 3.0)
      for length in expected['inputs']
    ]
    found = [(lengths.window, lengths.targets) for lengths in found]
    np.testing.assert_array_equal(found, expected['window_and_targets'])

  @pytest.mark.parametrize('length', [1, 2, 5, 20, 100, 568, 1138])
  def test_masks_equal_t5_for_the_same_seeds(self, length):
    found = [
      preprocessors.random_spans_mask(
        tf.constant(length),
        0.15,
        3.0,
        tf.constant([(s, s + 1), (s + 2, s + 3)]),
      )
      for s in range(10)
    ]
    np.testing.assert_array_equal(found, load('masks')[f'length_{length}'])

  # Seed 7's reference is shuffled, seed 0's is not. The documents hold an
  # empty one and one of 70,000 tokens, and fill two groups of 128.
  @pytest.mark.parametrize('seed', [0, 7])
  def test_span_corruption_stream_equals_t5_row_by_row(self, seed):
    objective = functools.partial(preprocessors.span_corruption, **SPANS)
    lengths = {'inputs': 128, 'targets': 29}
    found = our_stream(objective, lengths, seed, shuffle=seed == 7)
    for name, expected in load(f'span_corruption_seed{seed}').items():
      np.testing.assert_array_equal(found[name], expected, err_msg=name)

  @pytest.mark.parametrize('seed', [0, 7])
  def test_prefix_lm_stream_equals_t5_row_by_row(self, seed):
    lengths = {'inputs': 64, 'targets': 64}
    found = our_stream(
      preprocessors.prefix_lm, lengths, seed, shuffle=seed == 7
    )
    for name, expected in load(f'prefix_lm_seed{seed}').items():
      np.testing.assert_array_equal(found[name], expected, err_msg=name)


class TestSpans:
  def test_each_masked_run_becomes_the_next_sentinel_counting_down(self):
    tokens = tf.constant([11, 12, 13, 14, 15, 16, 17])
    mask = tf.constant([0, 1, 1, 0, 0, 1, 0]) > 0
    inputs = preprocessors.spans_to_sentinels(tokens, mask, 100)
    targets = preprocessors.spans_to_sentinels(tokens, ~mask, 100)
    np.testing.assert_array_equal(inputs, [11, 99, 14, 15, 98, 17])
    np.testing.assert_array_equal(targets, [99, 12, 13, 98, 16, 97])

  def test_a_mask_that_begins_with_noise_begins_with_a_sentinel(self):
    tokens = tf.constant([11, 12, 13])
    mask = tf.constant([True, False, False])
    found = preprocessors.spans_to_sentinels(tokens, mask, 100)
    np.testing.assert_array_equal(found, [99, 12, 13])

  def test_full_windows_fill_inputs_and_targets_to_the_last_token(self):
    rows = load('span_corruption_seed0')
    inputs = (rows['encoder_input_tokens'] > 0).sum(axis=1)
    targets = (rows['decoder_target_tokens'] > 0).sum(axis=1)
    # Only the last window of each merged group is shorter.
    assert np.sum(inputs < 128) == np.sum(targets < 29) == 2

  def test_inputs_and_targets_together_hold_the_window(self):
    rows = load('span_corruption_seed0')
    first_sentinel = 359 - 100

    def runs(row):
      """The tokens before the first sentinel, and after each one."""
      row = row[(row > 0) & (row != 1)]
      cuts = np.flatnonzero(row >= first_sentinel)
      return np.split(row, cuts)

    kept = runs(rows['encoder_input_tokens'][3])
    noise = runs(rows['decoder_target_tokens'][3])[1:]
    ids = list(kept[0])
    for after, hidden in zip(kept[1:], noise, strict=True):
      assert after[0] == hidden[0]  # the same sentinel
      ids += [*hidden[1:], *after[1:]]
    text = '\n'.join(reference_documents())
    decoded = bytes(np.array(ids, np.uint8) - 3).decode()
    assert len(ids) == 141  # the window of 128 inputs
    # Documents follow each other without a separator.
    assert decoded in text.replace('\n', '')


class TestShapes:
  def test_documents_are_merged_by_128_and_padding_vanishes(self):
    documents = [[i + 1] * (i % 3) for i in range(130)]
    dataset = tf.data.Dataset.from_generator(
      lambda: ({'targets': document} for document in documents),
      output_signature={'targets': tf.TensorSpec([None], tf.int32)},
    )
    groups = list(preprocessors.merge_documents(dataset).as_numpy_iterator())
    first, second = (group['targets'].tolist() for group in groups)
    assert first == sum(documents[:128], [])
    assert second == sum(documents[128:], [])

  def test_windows_are_whole_but_for_the_last(self):
    dataset = tf.data.Dataset.from_tensors({'targets': tf.range(1, 8)})
    with seqio.utils.map_seed_manager(0):
      windows = preprocessors.split_into_windows(dataset, 3)
    found = [w['targets'].tolist() for w in windows.as_numpy_iterator()]
    assert found == [[1, 2, 3], [4, 5, 6], [7]]

  def test_a_window_that_fits_exactly_leaves_no_empty_one(self):
    dataset = tf.data.Dataset.from_tensors({'targets': tf.range(1, 7)})
    with seqio.utils.map_seed_manager(0):
      windows = preprocessors.split_into_windows(dataset, 3)
    found = [w['targets'].tolist() for w in windows.as_numpy_iterator()]
    assert found == [[1, 2, 3], [4, 5, 6]]
