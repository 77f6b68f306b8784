"""Greedy decoding, sampling, and the cache."""

import dataclasses
import functools

import beam_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
  ROOMY,
  apply,
  init_params,
  make_batch,
  random_tokens,
  tiny_config,
)

from st_moe import decoding, incremental
from st_moe.errors import UserError
from st_moe.stacking import stack_layers

DENSE = tiny_config(num_experts=0, relative_position_biases='per_layer')
# Routed by hidden state and word embedding, with sparse layers in both stacks.
SPARSE = tiny_config(
  dataclasses.replace(ROOMY, word_embedding='concat'), tie_embeddings=True
)

NEVER = 48  # no id of the vocabulary: sequences do not end


def example():
  rng = np.random.default_rng(0)
  inputs = random_tokens(rng, [9, 5, 7, 8], 9)
  targets = random_tokens(rng, [6, 4, 6, 2], 6)
  return inputs, targets


@functools.partial(jax.jit, static_argnames='config')
def teacher_forced(config, params, inputs, decoder_inputs, active):
  """Returns logits [batch, length, vocab], one decoding step at a time."""
  cache = incremental.init_cache(config, params, inputs, active.shape[1])

  def step(cache, xs):
    logits, cache = incremental.decode_step(config, params, cache, *xs)
    return cache, logits

  _, logits = jax.lax.scan(step, cache, (decoder_inputs.T, active.T))
  return jnp.moveaxis(logits, 0, 1)


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('config', [DENSE, SPARSE], ids=['dense', 'sparse'])
def test_steps_with_a_cache_equal_the_whole_pass(config, scan):
  params = init_params(config)
  inputs, targets = example()
  batch = make_batch(inputs, targets)
  real = targets > 0
  expected = apply(config, params, batch).logits
  if scan:
    params = stack_layers(params, config)
    config = dataclasses.replace(config, scan_layers=True)
  logits = teacher_forced(
    config, params, inputs, batch['decoder_input_tokens'], real
  )
  np.testing.assert_allclose(logits[real], expected[real], rtol=1e-5, atol=1e-5)


def test_greedy_takes_the_likeliest_token_at_every_step():
  """Checked against whole passes over what was generated so far."""
  params = init_params(SPARSE)
  inputs, _ = example()
  generated = decoding.generate(
    SPARSE, params, inputs, max_length=5, eos_id=NEVER
  )
  expected = np.zeros((4, 5), np.int32)
  for i in range(5):
    # A target at position i makes it real; its value is not read.
    probe = expected.copy()
    probe[:, i] = 1
    logits = apply(SPARSE, params, make_batch(inputs, probe)).logits
    expected[:, i] = np.argmax(logits[:, i, 1:], axis=-1) + 1
  np.testing.assert_array_equal(generated, expected)


def test_sequences_end_with_eos_and_padding():
  params = init_params(DENSE)
  inputs, _ = example()
  free = np.asarray(
    decoding.generate(DENSE, params, inputs, max_length=5, eos_id=NEVER)
  )
  eos = int(free[0, 1])
  ended = decoding.generate(DENSE, params, inputs, max_length=5, eos_id=eos)
  expected = free.copy()
  for row in expected:
    ends = np.flatnonzero(row == eos)
    if len(ends):
      row[ends[0] + 1 :] = 0
  np.testing.assert_array_equal(ended, expected)
  assert expected[0, 2:].tolist() == [0, 0, 0]


def test_decoding_stops_when_every_sequence_has_ended(monkeypatch):
  params = init_params(DENSE)
  inputs, _ = example()
  inputs = np.repeat(inputs[:1], 2, axis=0)
  first = int(decoding.generate(DENSE, params, inputs, max_length=1)[0, 0])
  steps = []

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return incremental.decode_step(*args)

  monkeypatch.setattr(decoding.sampling, 'decode_step', counted)
  outputs = decoding.generate(
    DENSE, params, inputs, max_length=40, eos_id=first
  )
  jax.effects_barrier()
  assert outputs.tolist() == [[first] + [0] * 39] * 2
  assert len(steps) == 1


def test_an_output_does_not_depend_on_its_neighbours():
  params = init_params(SPARSE)
  inputs, _ = example()
  together = decoding.generate(SPARSE, params, inputs, max_length=5)
  for row in range(4):
    alone = decoding.generate(
      SPARSE, params, inputs[row : row + 1], max_length=5
    )
    np.testing.assert_array_equal(alone[0], together[row])


LOGITS = jnp.log(jnp.array([[0.5, 0.2, 0.15, 0.1, 0.05]]))


def drawn(method, draws=2000):
  """Returns the frequencies of tokens drawn from LOGITS, padding left out."""
  keys = jax.random.split(jax.random.key(0), draws)
  logits = jnp.repeat(LOGITS, draws, axis=0)
  tokens = decoding.choose_tokens(logits, method, keys, 0)
  return np.bincount(tokens, minlength=5) / draws


# Without padding, which is never chosen, the probabilities are
# 0, 0.4, 0.3, 0.2, 0.1. Frequencies have a standard deviation below 0.011.
@pytest.mark.parametrize(
  'method, expected',
  [
    (decoding.GREEDY, [0, 1, 0, 0, 0]),
    (decoding.Sampling(), [0, 0.4, 0.3, 0.2, 0.1]),
    (decoding.Sampling(top_k=2), [0, 4 / 7, 3 / 7, 0, 0]),
    (decoding.Sampling(top_k=1), [0, 1, 0, 0, 0]),
    # The third token takes the sum over 0.75.
    (decoding.Sampling(top_p=0.75), [0, 4 / 9, 3 / 9, 2 / 9, 0]),
    (decoding.Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
    (decoding.Sampling(top_p=1.0), [0, 0.4, 0.3, 0.2, 0.1]),
    # Halving the temperature squares probabilities: 16 : 9 : 4 : 1.
    (decoding.Sampling(temperature=0.5), [0, 16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    (
      decoding.Sampling(temperature=0.5, top_k=3, top_p=0.8),
      [0, 16 / 25, 9 / 25, 0, 0],
    ),
  ],
)
def test_tokens_are_drawn_from_the_kept_distribution(method, expected):
  frequencies = drawn(method)
  np.testing.assert_allclose(frequencies, expected, atol=0.05)
  assert ((frequencies > 0) == (np.array(expected) > 0)).all()


def test_sampling_repeats_with_its_key_and_differs_with_another():
  params = init_params(DENSE)
  inputs, _ = example()
  first, again, other = (
    decoding.generate(
      DENSE,
      params,
      inputs,
      max_length=6,
      method=decoding.Sampling(),
      rng=jax.random.key(seed),
    )
    for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'temperature': -1.0}, 'temperature must be >= 0, got -1.0'),
    ({'temperature': float('nan')}, 'temperature must be >= 0, got nan'),
    ({'top_k': 0}, 'top_k must be >= 1, got 0'),
    ({'top_p': 1.5}, r'top_p must be in \(0, 1\], got 1.5'),
  ],
)
def test_impossible_sampling_is_refused(settings, message):
  with pytest.raises(UserError, match=message):
    decoding.Sampling(**settings)


def test_sampling_without_a_key_is_refused():
  with pytest.raises(UserError, match='needs a random key'):
    decoding.generate(
      DENSE, None, None, max_length=2, method=decoding.Sampling()
    )


def test_top_k_beyond_the_vocabulary_is_refused():
  with pytest.raises(UserError, match='top_k 99 exceeds .*vocab_size 48'):
    decoding.generate(
      DENSE,
      None,
      None,
      max_length=2,
      method=decoding.Sampling(top_k=99),
      rng=jax.random.key(0),
    )


@functools.cache
def next_log_probs_of(config, row):
  """Returns, for `beam_reference`, what the whole model says of a prefix."""
  params = init_params(config)
  inputs = example()[0][row : row + 1]

  @functools.cache
  def after(tokens):
    # A target at the next position makes it real; its value is not read.
    probe = np.zeros((1, 6), np.int32)
    probe[0, : len(tokens) + 1] = [*tokens, 1]
    logits = apply(config, params, make_batch(inputs, probe)).logits
    logits = np.asarray(logits[0, len(tokens)], np.float64)
    return (logits - np.log(np.exp(logits).sum())).tolist()

  return lambda tokens: after(tuple(tokens))


@pytest.mark.parametrize(
  'num_beams, length_penalty, early_stopping',
  [(3, 1.0, False), (3, 0.0, True), (3, 2.0, 'never'), (3, -1.0, False)],
)
def test_beams_are_those_of_a_plain_search(
  num_beams, length_penalty, early_stopping
):
  """Eight frequent tokens take turns as the end, so that outputs end early."""
  method = decoding.BeamSearch(num_beams, length_penalty, early_stopping)
  params, inputs = init_params(SPARSE), example()[0]
  greedy = decoding.generate(SPARSE, params, inputs, max_length=6, eos_id=NEVER)
  eos = int(greedy[0, 2])
  outputs = decoding.generate(
    SPARSE, params, inputs, max_length=6, eos_id=eos, method=method
  )
  for row in range(4):
    expected = beam_reference.beam_search(
      next_log_probs_of(SPARSE, row),
      num_beams=num_beams,
      length_penalty=length_penalty,
      early_stopping=early_stopping,
      max_length=6,
      eos_id=eos,
    )
    assert [token for token in outputs[row].tolist() if token] == expected
