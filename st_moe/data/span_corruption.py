"""Span corruption and prefix language modelling in numpy (T5, section 3.1.4).

The arithmetic of T5's `random_spans_noise_mask` and
`noise_span_to_unique_sentinel`, so lengths and distribution are T5's; the
random numbers come from a numpy generator, so the stream is our own. The
paper pre-trains with 512 inputs and 114 targets (ST-MoE, section 4.2).

Every function is a pure function of its tokens and its generator's state.
"""

import dataclasses
import functools

import numpy as np

from st_moe.errors import UserError

# Masked sentences that a run shows at its end: at most this many spans, each
# of at most so many tokens, in sentences of at least so many tokens.
_SENTENCE_SPANS = 3
_SENTENCE_SPAN_LENGTH = 3
MIN_SENTENCE_TOKENS = 6


@dataclasses.dataclass(frozen=True)
class Example:
  """Token ids of one example, without end of sequence and padding.

  Attributes:
    inputs: int32 [inputs].
    targets: int32 [targets].
  """

  inputs: np.ndarray
  targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class SpanLengths:
  """What span corruption needs to fill its inputs without padding.

  Attributes:
    window: raw tokens per example.
    spans: noise spans, and so sentinels, of a full window.
    targets: tokens of its targets, the end of sequence included.
  """

  window: int
  spans: int
  targets: int


def span_corruption_lengths(
  inputs_length: int, density: float, mean_span_length: float
) -> SpanLengths:
  """Finds the longest window whose corrupted inputs fit in `inputs_length`.

  T5's `random_spans_helper`: kept tokens, one sentinel a span and the end of
  sequence make the inputs; noise tokens, as many sentinels and the end of
  sequence make the targets. 512 inputs give 568 raw tokens and 114 targets.

  Raises:
    UserError: the inputs are so short that not one whole span fits.
  """

  def count(window: int) -> tuple[int, int]:
    noise = round(window * density)
    return noise, round(noise / mean_span_length)

  def inputs(window: int) -> int:
    noise, spans = count(window)
    return window - noise + spans + 1

  window = inputs_length - 1
  while inputs(window + 1) <= inputs_length:
    window += 1
  noise, spans = count(window)
  if not spans:
    raise UserError(
      f'inputs_length {inputs_length} has no room for a noise span of '
      f'{mean_span_length:g} tokens at noise_density {density:g}: make '
      'inputs_length longer'
    )
  targets = noise + spans + 1
  if density == 0.5 and targets > inputs(window):
    window, targets = window - 1, targets - 1
  return SpanLengths(window, spans, targets)


def check_lengths(
  objective: str,
  *,
  inputs_length: int,
  targets_length: int,
  noise_density: float,
  mean_noise_span_length: float,
  extra_ids: int,
) -> None:
  """Refuses lengths that would cut examples, and too few sentinels.

  Raises:
    UserError: with the number that is needed and the one that was given.
  """
  if objective == 'prefix_lm' and targets_length < inputs_length - 1:
    raise UserError(
      f'targets_length {targets_length} is too short for prefix_lm with '
      f'inputs_length {inputs_length}: it needs at least {inputs_length - 1}'
    )
  if objective != 'span_corruption':
    return
  lengths = span_corruption_lengths(
    inputs_length, noise_density, mean_noise_span_length
  )
  # At a few lengths (316: 72 targets, not 70) float32 rounds to one token or
  # span more than `span_corruption_lengths`; T5 then cuts the targets.
  full = _span_counts(lengths.window, noise_density, mean_noise_span_length)
  targets = max(lengths.targets, full.noise + full.spans + 1)
  if targets_length < targets:
    raise UserError(
      f'targets_length {targets_length} is too short for span corruption '
      f'with inputs_length {inputs_length}: it needs at least {targets}'
    )
  if extra_ids < full.spans:
    raise UserError(
      f'inputs_length {inputs_length} has {full.spans} noise spans but '
      f'extra_ids gives {extra_ids} sentinels: raise extra_ids to at least '
      f'{full.spans}, or mean_noise_span_length'
    )
  # Every length, because the last window of a text may have any.
  for length in range(1, lengths.window + 1):
    counts = _span_counts(length, noise_density, mean_noise_span_length)
    if counts.spans > min(counts.noise, counts.clean):
      raise UserError(
        f'noise_density {noise_density:g} with mean_noise_span_length '
        f'{mean_noise_span_length:g} asks for {counts.spans} spans among '
        f'{counts.noise} noise and {counts.clean} other tokens: lower '
        'noise_density, or raise mean_noise_span_length'
      )


@dataclasses.dataclass(frozen=True)
class _SpanCounts:
  noise: int
  clean: int
  spans: int


@functools.lru_cache
def _span_counts(
  length: int, noise_density: float, mean_noise_span_length: float
) -> _SpanCounts:
  """Returns T5's counts: float32 arithmetic, halves rounded to even."""
  length = max(length, 2)
  noise = int(np.round(np.float32(length) * np.float32(noise_density)))
  noise = min(max(noise, 1), length - 1)
  spans = int(np.round(np.float32(noise) / np.float32(mean_noise_span_length)))
  return _SpanCounts(noise, length - noise, max(spans, 1))


def _segments(
  items: int, count: int, generator: np.random.Generator
) -> np.ndarray:
  """Returns `count` random positive integers that sum to `items`."""
  cuts = generator.choice(items - 1, count - 1, replace=False, shuffle=False)
  bounds = np.concatenate([[0], np.sort(cuts) + 1, [items]])
  return np.diff(bounds)


def noise_mask(
  length: int,
  noise_density: float,
  mean_noise_span_length: float,
  generator: np.random.Generator,
) -> np.ndarray:
  """Returns a bool mask [length] of random spans of noise.

  All masks with T5's counts are equally likely. For two tokens or more, the
  first is never noise and the last always is.
  """
  counts = _span_counts(length, noise_density, mean_noise_span_length)
  noise = _segments(counts.noise, counts.spans, generator)
  clean = _segments(counts.clean, counts.spans, generator)
  runs = np.stack([clean, noise], axis=1).reshape(-1)  # clean run first
  is_noise = np.tile([False, True], counts.spans)
  return np.repeat(is_noise, runs)[:length]


def spans_to_sentinels(
  tokens: np.ndarray, mask: np.ndarray, vocab_size: int
) -> np.ndarray:
  """Replaces each run of masked tokens by one sentinel, counted downwards.

  The k-th run (from 0) becomes `vocab_size - 1 - k`, `<extra_id_k>`.
  """
  follows = np.zeros_like(mask)
  follows[1:] = mask[:-1]
  first = mask & ~follows
  sentinels = vocab_size - np.cumsum(first, dtype=np.int32)
  return np.where(first, sentinels, tokens)[~(mask & follows)]


def _split_at_mask(
  tokens: np.ndarray, mask: np.ndarray, vocab_size: int
) -> Example:
  tokens = np.asarray(tokens, np.int32)
  return Example(
    inputs=spans_to_sentinels(tokens, mask, vocab_size),
    targets=spans_to_sentinels(tokens, ~mask, vocab_size),
  )


def span_corruption(
  tokens: np.ndarray,
  generator: np.random.Generator,
  *,
  vocab_size: int,
  noise_density: float,
  mean_noise_span_length: float,
) -> Example:
  """Masks random spans: inputs hold the rest, targets what was taken.

  Args:
    tokens: int [window], without end of sequence.
    generator: source of the mask; nothing else is random.
    vocab_size: with the extra ids, not the model's padded size.
    noise_density: share of tokens to mask.
    mean_noise_span_length: tokens per masked span, on average.
  """
  mask = noise_mask(
    len(tokens), noise_density, mean_noise_span_length, generator
  )
  return _split_at_mask(tokens, mask, vocab_size)


def prefix_lm(tokens: np.ndarray, generator: np.random.Generator) -> Example:
  """Splits a window at a random place into inputs and targets.

  T5's `random_prefix_noise_mask`: the prefix has 1 to window - 1 tokens, all
  equally likely. A window of one token is all targets.
  """
  tokens = np.asarray(tokens, np.int32)
  prefix = int(generator.integers(min(1, len(tokens) - 1), len(tokens)))
  return Example(inputs=tokens[:prefix], targets=tokens[prefix:])


def corrupt_sentence(
  tokens: np.ndarray, generator: np.random.Generator, *, vocab_size: int
) -> Example:
  """Masks one to three short spans of a sentence, never its two ends.

  Args:
    tokens: int [sentence], at least `MIN_SENTENCE_TOKENS`.
    generator: source of the spans.
    vocab_size: with the extra ids.

  Raises:
    ValueError: the sentence is too short.
  """
  if len(tokens) < MIN_SENTENCE_TOKENS:
    raise ValueError(
      f'a sentence of {len(tokens)} tokens is too short to mask; '
      f'{MIN_SENTENCE_TOKENS} are needed'
    )
  most = min(_SENTENCE_SPANS, len(tokens) // MIN_SENTENCE_TOKENS)
  spans = int(generator.integers(1, most + 1))
  noise = generator.integers(1, _SENTENCE_SPAN_LENGTH + 1, size=spans)
  clean = _segments(len(tokens) - int(noise.sum()), spans + 1, generator)
  runs = np.zeros(2 * spans + 1, np.int64)
  runs[0::2], runs[1::2] = clean, noise
  mask = np.repeat(np.arange(2 * spans + 1) % 2 == 1, runs)
  return _split_at_mask(tokens, mask, vocab_size)


def model_features(
  example: Example, *, inputs_length: int, targets_length: int, eos_id: int
) -> dict[str, np.ndarray]:
  """Returns one row of model features, named and shaped as seqio's converter.

  Appends the end of sequence, pads with 0, shifts the targets right for the
  decoder. Weights are 1 on targets and their end of sequence, 0 on padding.

  Returns:
    encoder_input_tokens int32 [inputs_length]; decoder_target_tokens,
    decoder_input_tokens, decoder_loss_weights int32 [targets_length].
  """
  targets = _pad_with_eos(example.targets, targets_length, eos_id)
  decoder_inputs = np.zeros_like(targets)
  decoder_inputs[1:] = targets[:-1]
  return {
    'encoder_input_tokens': _pad_with_eos(
      example.inputs, inputs_length, eos_id
    ),
    'decoder_target_tokens': targets,
    'decoder_input_tokens': decoder_inputs,
    'decoder_loss_weights': (targets > 0).astype(np.int32),
  }


def _pad_with_eos(tokens: np.ndarray, length: int, eos_id: int) -> np.ndarray:
  row = np.zeros(length, np.int32)
  row[: len(tokens)] = tokens
  row[len(tokens)] = eos_id
  return row
