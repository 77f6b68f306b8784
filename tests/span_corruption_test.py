"""Span corruption and prefix-LM in numpy: T5's lengths and distribution."""

import collections
import itertools
from pathlib import Path

import numpy as np
import pytest

from st_moe.data import span_corruption
from st_moe.data.span_corruption import (
  MIN_SENTENCE_TOKENS,
  Example,
  SpanLengths,
  check_lengths,
  corrupt_sentence,
  model_features,
  noise_mask,
  prefix_lm,
  span_corruption_lengths,
  spans_to_sentinels,
)
from st_moe.errors import UserError

GOLDEN = Path(__file__).resolve().parent / 'golden_t5'  # made with t5 0.9.4
VOCAB_SIZE = 32100
SETTINGS = {
  'vocab_size': VOCAB_SIZE,
  'noise_density': 0.15,
  'mean_noise_span_length': 3.0,
}


def generator(seed: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(key=seed))


def run_lengths(mask: np.ndarray) -> list[int]:
  return [len(list(run)) for _, run in itertools.groupby(mask.tolist())]


def filled_in(example: Example) -> list[int]:
  """Puts the targets' spans in the places of the inputs' sentinels."""
  spans = collections.defaultdict(list)
  sentinel = None
  for token in example.targets.tolist():
    if token >= VOCAB_SIZE - 100:
      sentinel = token
    else:
      spans[sentinel].append(token)
  text = []
  for token in example.inputs.tolist():
    text += spans[token] if token >= VOCAB_SIZE - 100 else [token]
  return text


# --- lengths


def test_lengths_are_the_papers():
  assert span_corruption_lengths(512, 0.15, 3.0) == SpanLengths(568, 28, 114)


def test_lengths_equal_t5s():
  golden = np.load(GOLDEN / 'lengths.npz')
  for inputs, expected in zip(
    golden['inputs'], golden['window_and_targets'], strict=True
  ):
    lengths = span_corruption_lengths(int(inputs), 0.15, 3.0)
    assert [lengths.window, lengths.targets] == expected.tolist(), inputs


@pytest.mark.parametrize('inputs_length', [64, 114, 512, 1024])
def test_a_full_window_leaves_no_padding(inputs_length):
  lengths = span_corruption_lengths(inputs_length, 0.15, 3.0)
  example = span_corruption.span_corruption(
    np.arange(3, 3 + lengths.window), generator(0), **SETTINGS
  )
  assert len(example.inputs) + 1 == inputs_length
  assert len(example.targets) + 1 == lengths.targets


# --- masks


def test_masks_have_t5s_numbers_of_tokens_and_spans():
  golden = np.load(GOLDEN / 'masks.npz')
  for masks in golden.values():
    length = masks.shape[1]
    ours = [noise_mask(length, 0.15, 3.0, generator(i)) for i in range(10)]
    for mask, t5 in zip(ours, masks, strict=True):
      assert mask.shape == t5.shape
      assert mask.sum() == t5.sum()
      assert len(run_lengths(mask)) == len(run_lengths(t5))


def test_all_masks_are_equally_likely():
  # 10 tokens, density 0.4, spans of 2: 4 noise tokens in 2 spans, so
  # C(3, 1) ways to cut the noise times C(5, 1) to cut the rest.
  draws = 6000
  source = generator(1)
  counts = collections.Counter(
    tuple(noise_mask(10, 0.4, 2.0, source).tolist()) for _ in range(draws)
  )
  assert len(counts) == 15
  for mask, count in counts.items():
    runs = run_lengths(np.array(mask))
    assert len(runs) == 4 and runs[0] + runs[2] == 6
    assert not mask[0] and mask[-1]
    mean, deviation = draws / 15, (draws / 15 * 14 / 15) ** 0.5
    assert abs(count - mean) < 4.5 * deviation


@pytest.mark.parametrize('length', range(1, 40))
def test_short_windows_corrupt_and_fill_in_again(length):
  tokens = np.arange(3, 3 + length)
  example = span_corruption.span_corruption(
    tokens, generator(length), **SETTINGS
  )
  assert filled_in(example) == tokens.tolist()


def test_sentinels_count_down_through_inputs_and_targets():
  tokens = np.array([10, 11, 12, 13, 14, 15, 16], np.int32)
  mask = np.array([False, True, True, False, False, True, True])
  inputs = spans_to_sentinels(tokens, mask, 100)
  targets = spans_to_sentinels(tokens, ~mask, 100)
  np.testing.assert_array_equal(inputs, [10, 99, 13, 14, 98])
  np.testing.assert_array_equal(targets, [99, 11, 12, 98, 15, 16])
  assert inputs.dtype == targets.dtype == np.int32


def test_the_generator_is_all_that_is_random():
  tokens = np.arange(3, 571)
  make = span_corruption.span_corruption
  one = make(tokens, generator(5), **SETTINGS)
  again = make(tokens, generator(5), **SETTINGS)
  other = make(tokens, generator(6), **SETTINGS)
  np.testing.assert_array_equal(one.inputs, again.inputs)
  np.testing.assert_array_equal(one.targets, again.targets)
  assert not np.array_equal(one.inputs, other.inputs)


# --- prefix-LM


def test_every_prefix_is_equally_likely():
  tokens = np.arange(10, 15)
  source = generator(2)
  counts = collections.Counter()
  for _ in range(4000):
    example = prefix_lm(tokens, source)
    text = [*example.inputs.tolist(), *example.targets.tolist()]
    assert text == tokens.tolist()
    counts[len(example.inputs)] += 1
  assert sorted(counts) == [1, 2, 3, 4]
  assert all(abs(count - 1000) < 4.5 * 750**0.5 for count in counts.values())


def test_a_single_token_is_all_targets():
  example = prefix_lm(np.array([7]), generator(0))
  assert example.inputs.tolist() == []
  assert example.targets.tolist() == [7]


# --- masked sentences


@pytest.mark.parametrize('length', range(MIN_SENTENCE_TOKENS, 40))
def test_sentences_lose_one_to_three_short_spans(length):
  tokens = np.arange(3, 3 + length)
  for seed in range(20):
    example = corrupt_sentence(tokens, generator(seed), vocab_size=VOCAB_SIZE)
    assert filled_in(example) == tokens.tolist()
    spans = int((example.inputs >= VOCAB_SIZE - 100).sum())
    assert 1 <= spans <= 3
    assert 1 <= length - (len(example.inputs) - spans) <= 3 * spans
    assert example.inputs[0] == tokens[0]
    assert example.inputs[-1] == tokens[-1]


def test_all_numbers_of_spans_occur():
  tokens = np.arange(3, 33)
  spans = {
    int(
      (
        corrupt_sentence(tokens, generator(i), vocab_size=VOCAB_SIZE).inputs
        >= VOCAB_SIZE - 100
      ).sum()
    )
    for i in range(30)
  }
  assert spans == {1, 2, 3}


def test_too_short_sentences_are_refused():
  with pytest.raises(ValueError, match='5 tokens is too short'):
    corrupt_sentence(np.arange(5), generator(0), vocab_size=VOCAB_SIZE)


# --- model features


def test_model_features_are_padded_shifted_and_weighted():
  example = Example(
    inputs=np.array([10, 99], np.int32), targets=np.array([99, 11, 12])
  )
  row = model_features(example, inputs_length=5, targets_length=6, eos_id=1)
  assert {name: array.tolist() for name, array in row.items()} == {
    'encoder_input_tokens': [10, 99, 1, 0, 0],
    'decoder_target_tokens': [99, 11, 12, 1, 0, 0],
    'decoder_input_tokens': [0, 99, 11, 12, 1, 0],
    'decoder_loss_weights': [1, 1, 1, 1, 0, 0],
  }
  assert all(array.dtype == np.int32 for array in row.values())


def test_model_features_equal_seqios_converter():
  seqio = pytest.importorskip('seqio')
  import tensorflow as tf

  example = Example(np.array([10, 99, 12]), np.array([99, 11, 98]))
  dataset = tf.data.Dataset.from_tensors(
    {
      'inputs': np.array([*example.inputs, 1], np.int32),
      'targets': np.array([*example.targets, 1], np.int32),
    }
  )
  converter = seqio.EncDecFeatureConverter(pack=False)
  (theirs,) = converter(
    dataset, {'inputs': 7, 'targets': 6}
  ).as_numpy_iterator()
  ours = model_features(example, inputs_length=7, targets_length=6, eos_id=1)
  assert sorted(ours) == sorted(theirs)
  for name, array in ours.items():
    np.testing.assert_array_equal(array, theirs[name], err_msg=name)


# --- settings that cannot work


def check(**changes):
  settings = {
    'objective': 'span_corruption',
    'inputs_length': 512,
    'targets_length': 114,
    'noise_density': 0.15,
    'mean_noise_span_length': 3.0,
    'extra_ids': 100,
  } | changes
  check_lengths(settings.pop('objective'), **settings)


def test_the_papers_lengths_pass():
  check()
  check(objective='prefix_lm', targets_length=511)
  check(objective='none', targets_length=1)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'targets_length': 113}, 'targets_length 113 .* at least 114'),
    ({'extra_ids': 27}, '28 noise spans but extra_ids gives 27 sentinels'),
    ({'inputs_length': 8}, 'inputs_length 8 has no room for a noise span'),
    (
      {'noise_density': 0.9, 'targets_length': 5000, 'extra_ids': 5000},
      r'spans among \d+ noise and \d+ other tokens',
    ),
    (
      {'mean_noise_span_length': 0.5, 'targets_length': 600},
      'extra_ids gives 100',
    ),
    # T5 would cut two of the 72 targets: float32 rounds 52.5 up.
    (
      {'inputs_length': 316, 'targets_length': 70},
      'targets_length 70 .* at least 72',
    ),
    (
      {'objective': 'prefix_lm', 'targets_length': 114},
      'targets_length 114 is too short .* at least 511',
    ),
  ],
)
def test_settings_that_would_cut_examples_are_refused(changes, message):
  with pytest.raises(UserError, match=message) as error:
    check(**changes)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('inputs_length', [64, 316, 512, 1324])
def test_rows_fit_for_every_window_up_to_the_full_one(inputs_length):
  lengths = span_corruption_lengths(inputs_length, 0.15, 3.0)
  targets_length = lengths.targets + 2
  check(inputs_length=inputs_length, targets_length=targets_length)
  tokens = np.arange(3, 3 + lengths.window)
  for size in {1, 2, 3, 5, *range(7, lengths.window, 31), lengths.window}:
    example = span_corruption.span_corruption(
      tokens[:size], generator(size), **SETTINGS
    )
    row = model_features(
      example,
      inputs_length=inputs_length,
      targets_length=targets_length,
      eos_id=1,
    )
    assert (row['encoder_input_tokens'] == 1).sum() == 1
    assert (row['decoder_target_tokens'] == 1).sum() == 1
