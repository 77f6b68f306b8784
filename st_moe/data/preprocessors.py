"""T5's pretraining objectives as seqio preprocessors: tokens to examples.

ST-MoE pretrains with T5's span corruption (section 2.2 of the paper; Raffel
et al. 2020, section 3.1.4): 15 % of the tokens, in spans of 3 on average,
give way to sentinels. The prefix language model is Raffel et al.'s, section
3.2.3.

Every step draws the seeds that t5 0.9.4 draws, in its order, so that a task
built from these steps gives t5's very stream for the same seed and documents.
Tokens are int32; the input of an objective is the feature 'targets', one
tokenized document an example.
"""

from collections.abc import Callable, Mapping, Sequence

import seqio
import tensorflow as tf

from st_moe.data.span_corruption import span_corruption_lengths

# A longer document gives one random piece of this many tokens per epoch.
CHUNK_TOKENS = 65536
MERGED_DOCUMENTS = 128  # documents joined before they are cut into windows
_SEEDS_PER_EXAMPLE = 6  # t5 splits an example's seed into so many


def span_corruption(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  output_features: Mapping[str, seqio.Feature],
  *,
  noise_density: float,
  mean_noise_span_length: float,
) -> tf.data.Dataset:
  """Replaces random spans by sentinels: T5's and the paper's objective.

  Args:
    dataset: examples with int32 'targets' [tokens of one document].
    sequence_length: 'inputs' sets the window.
    output_features: 'targets' holds the vocabulary.
    noise_density: share of the tokens that are noise.
    mean_noise_span_length: tokens per noise span on average.

  Returns:
    Examples with 'inputs' and 'targets', neither with an end of sequence.
  """
  vocabulary = output_features['targets'].vocabulary
  lengths = span_corruption_lengths(
    sequence_length['inputs'], noise_density, mean_noise_span_length
  )

  def corrupt(tokens: tf.Tensor, seeds: tf.Tensor) -> dict[str, tf.Tensor]:
    mask = random_spans_mask(
      tf.size(tokens), noise_density, mean_noise_span_length, seeds[:2]
    )
    return {
      'inputs': spans_to_sentinels(tokens, mask, vocabulary.vocab_size),
      'targets': spans_to_sentinels(tokens, ~mask, vocabulary.vocab_size),
    }

  dataset = random_chunk(dataset)
  dataset = merge_documents(dataset)
  dataset = split_into_windows(dataset, lengths.window)
  return _corrupt_each(dataset, corrupt)


def prefix_lm(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
) -> tf.data.Dataset:
  """Cuts each window of a document at a random place: inputs, then targets.

  t5's `prefix_lm`: windows of one document, never merged, so that short
  documents leave padding; packing fills it. Both parts have a token or more
  (a window of a single token is all targets).
  """

  def cut(tokens: tf.Tensor, seeds: tf.Tensor) -> dict[str, tf.Tensor]:
    longest = tf.size(tokens) - 1
    prefix = tf.random.stateless_uniform(
      [],
      minval=tf.minimum(longest, 1),
      maxval=longest + 1,
      dtype=tf.int32,
      seed=seeds[0],
    )
    return {'inputs': tokens[:prefix], 'targets': tokens[prefix:]}

  dataset = random_chunk(dataset)
  # One less: the end of sequence.
  dataset = split_into_windows(dataset, sequence_length['inputs'] - 1)
  return _corrupt_each(dataset, cut)


def random_chunk(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Drops empty documents and keeps a random piece of the longest ones.

  A document of more than 65,536 tokens gives one of its consecutive pieces of
  that length (the last is shorter), each with equal probability.
  """

  @seqio.map_over_dataset(num_seeds=1)
  def choose(example, seed):
    tokens = example['targets']
    pieces = -(-tf.size(tokens) // CHUNK_TOKENS)
    seeds = tf.random.experimental.stateless_split(seed, 2)
    start = CHUNK_TOKENS * tf.random.stateless_uniform(
      [], maxval=pieces, dtype=tf.int32, seed=seeds[1]
    )
    return {'targets': tokens[start : start + CHUNK_TOKENS]}

  return choose(dataset.filter(lambda example: tf.size(example['targets']) > 0))


def merge_documents(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Joins the tokens of 128 documents, nothing between them; drops padding."""

  def join(batch):
    tokens = tf.reshape(batch['targets'], [-1])
    return {'targets': tf.boolean_mask(tokens, tokens > 0)}

  batches = dataset.padded_batch(
    MERGED_DOCUMENTS, padded_shapes={'targets': [None]}
  )
  return batches.map(join, num_parallel_calls=tf.data.AUTOTUNE)


def split_into_windows(
  dataset: tf.data.Dataset, window: int
) -> tf.data.Dataset:
  """Cuts each example into windows of `window` tokens; the last is shorter."""

  @seqio.map_over_dataset(num_seeds=1)
  def split(example, seed):
    del seed  # t5 draws one here, so the next step's seeds are the same
    tokens = example['targets']
    rows = -(-tf.size(tokens) // window)
    padding = rows * window - tf.size(tokens)
    padded = tf.reshape(tf.pad(tokens, [[0, padding]]), [-1, window])
    lengths = tf.tensor_scatter_nd_sub(
      tf.fill([rows], window), [[rows - 1]], [padding]
    )
    # padded [rows, window], lengths [rows]
    return tf.data.Dataset.from_tensor_slices((padded, lengths))

  windows = split(dataset).flat_map(lambda rows: rows)
  return windows.map(
    lambda row, length: {'targets': row[:length]},
    num_parallel_calls=tf.data.AUTOTUNE,
  )


def _corrupt_each(
  dataset: tf.data.Dataset,
  corrupt: Callable[[tf.Tensor, tf.Tensor], dict[str, tf.Tensor]],
) -> tf.data.Dataset:
  """Maps `corrupt(tokens, seeds [6, 2])` over windows."""

  @seqio.map_over_dataset(num_seeds=1)
  def apply(example, seed):
    seeds = tf.random.experimental.stateless_split(seed, _SEEDS_PER_EXAMPLE)
    return corrupt(example['targets'], seeds)

  return apply(dataset)


def random_spans_mask(
  length: tf.Tensor,
  density: float,
  mean_span_length: float,
  seeds: tf.Tensor,
) -> tf.Tensor:
  """Draws which tokens are noise: spans of random lengths, kept text first.

  All masks with the right numbers of noise tokens and spans are equally
  likely. For two tokens or more the first is never noise, the last always is.

  Args:
    length: int32 [], tokens.
    density: share of noise tokens; rounded half to even in float32.
    mean_span_length: noise tokens per span.
    seeds: [2, 2], for the noise spans and for the text between them.

  Returns:
    bool [length].
  """
  wanted = length
  length = tf.maximum(length, 2)
  noise = _round(tf.cast(length, tf.float32) * density)
  noise = tf.clip_by_value(noise, 1, length - 1)
  spans = _round(tf.cast(noise, tf.float32) / mean_span_length)
  spans = tf.maximum(spans, 1)

  noise_lengths = _random_segments(noise, spans, seeds[0])
  kept_lengths = _random_segments(length - noise, spans, seeds[1])
  # [2 * spans]: kept, noise, kept, noise, ...
  lengths = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [-1])
  starts = tf.cumsum(lengths)[:-1]
  is_start = tf.math.unsorted_segment_sum(tf.ones_like(starts), starts, length)
  return (tf.cumsum(is_start) % 2 == 1)[:wanted]


def _round(value: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.round(value), tf.int32)


def _random_segments(
  items: tf.Tensor, segments: tf.Tensor, seed: tf.Tensor
) -> tf.Tensor:
  """Returns `segments` random positive int32 that sum to `items`."""
  begins = tf.cast(tf.range(items - 1) < segments - 1, tf.int32)
  begins = tf.pad(seqio.utils.stateless_shuffle(begins, seed), [[1, 0]])
  return tf.math.segment_sum(tf.ones_like(begins), tf.cumsum(begins))


def spans_to_sentinels(
  tokens: tf.Tensor, mask: tf.Tensor, vocab_size: int
) -> tf.Tensor:
  """Replaces each run of masked tokens by one sentinel.

  The first run becomes `vocab_size - 1`, the next `vocab_size - 2`, and so
  on. `vocab_size` counts the vocabulary's ids, not the rows of the model's
  embedding.
  """
  before = tf.pad(mask[:-1], [[1, 0]])
  begins = mask & ~before
  sentinels = vocab_size - tf.cumsum(tf.cast(begins, tokens.dtype))
  return tf.boolean_mask(tf.where(begins, sentinels, tokens), ~mask | begins)


def insert_sentinels(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  output_features: Mapping[str, seqio.Feature],
  *,
  sentinels: Sequence[int],
) -> tf.data.Dataset:
  """Puts sentinels behind inputs and before targets (paper, section 4.7).

  Args:
    dataset: examples with int32 'inputs' and 'targets', without an end of
      sequence.
    sequence_length: inputs are cut so that sentinels and the end fit.
    output_features: of the task; not looked at.
    sentinels: their ids.
  """
  del output_features
  ids = tf.constant(sentinels, tf.int32)
  most = max(sequence_length['inputs'] - 1 - len(sentinels), 0)

  def insert(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return example | {
      'inputs': tf.concat([example['inputs'][:most], ids], 0),
      'targets': tf.concat([ids, example['targets']], 0),
    }

  return dataset.map(insert, num_parallel_calls=tf.data.AUTOTUNE)
