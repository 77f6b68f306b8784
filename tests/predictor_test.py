"""Predictions: every input once, in order, alone or among others."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_model import (
  ROUTER,
  apply,
  init_params,
  make_batch,
  place,
  tiny_config,
)

from st_moe import decoding, partitioning, predictor
from st_moe.config import MeshConfig
from st_moe.errors import UserError

# One slot for each expert in evaluation: what drops, drops here.
TIGHT = dataclasses.replace(ROUTER, eval_capacity_factor=0.1)
CONFIG = tiny_config(TIGHT)
DROPLESS = tiny_config(dataclasses.replace(TIGHT, eval_dropless=True))
EOS = 1


@functools.cache
def params():
  return init_params(CONFIG)


def inputs(lengths=(3, 20, 16, 17, 9, 5, 11)):
  rng = np.random.default_rng(0)
  return [rng.integers(2, 48, length).tolist() for length in lengths]


@functools.cache
def make(batch_size=2, mesh_config=None, eos_id=EOS, **settings):
  mesh_config = mesh_config or MeshConfig(data=1, expert=1, model=1)
  size = mesh_config.data * mesh_config.expert * mesh_config.model
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:size])
  return predictor.Predictor(
    CONFIG,
    place(params(), CONFIG, mesh, mesh_config),
    mesh,
    eos_id=eos_id,
    targets_length=6,
    batch_size=batch_size,
    inputs_length=20,
    **settings,
  )


def common_token():
  """Returns an end-of-sequence that some outputs reach, and not all at once."""
  outputs = make(eos_id=48).generate(inputs())
  return outputs[0][2]


def test_lengths_double_up_to_the_longest():
  def padded(longest):
    return {predictor.padded_length(n, longest) for n in range(1, 65)}

  assert padded(None) == {16, 32, 64}
  assert padded(50) == {16, 32, 50}
  assert padded(5) == {5}
  assert predictor.padded_length(16) == 16
  assert predictor.padded_length(17) == 32


def test_outputs_are_those_of_each_input_alone_in_order():
  eos = common_token()
  expected = []
  for row in inputs():
    length = next(size for size in (16, 20) if len(row) <= size)
    padded = np.pad(np.array([row], np.int32), ((0, 0), (0, length - len(row))))
    ids = decoding.generate(CONFIG, params(), padded, max_length=6, eos_id=eos)
    ids = [token for token in ids[0].tolist() if token]
    expected.append(ids[: ids.index(eos)] if eos in ids else ids)
  assert make(eos_id=eos).generate(inputs()) == expected
  assert len({len(row) for row in expected}) > 1  # some end early


@pytest.mark.parametrize('batch_size', [1, 3])
def test_outputs_do_not_depend_on_the_batch_size(batch_size):
  few, many = make(2), make(batch_size)
  pairs = list(zip(inputs(), inputs((1, 5, 2, 3, 4, 1, 2)), strict=True))
  assert many.generate(inputs()) == few.generate(inputs())
  np.testing.assert_allclose(
    many.log_likelihoods(pairs), few.log_likelihoods(pairs), rtol=1e-5
  )


def test_likelihoods_are_those_of_the_model_without_drops():
  pairs = list(zip(inputs(), inputs((1, 5, 0, 3, 4, 1, 2)), strict=True))
  targets = [[*target, EOS] for _, target in pairs]
  batch = make_batch(
    *(
      np.array([[*row, *[0] * (20 - len(row))] for row in rows], np.int32)
      for rows in (inputs(), targets)
    )
  )

  def expected(config):
    logits = np.asarray(apply(config, params(), batch).logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [
      sum(log_probs[row, place, token] for place, token in enumerate(target))
      for row, target in enumerate(targets)
    ]

  found = make(3).log_likelihoods(pairs)
  assert found.dtype == np.float32 and found.shape == (7,)
  np.testing.assert_allclose(found, expected(DROPLESS), rtol=1e-5, atol=1e-5)
  assert not np.allclose(expected(CONFIG), expected(DROPLESS), rtol=1e-2)


@pytest.mark.parametrize('axis_types', ['auto', 'explicit'])
def test_a_mesh_gives_the_same(axis_types):
  config = MeshConfig(data=2, expert=2, model=2, axis_types=axis_types)
  meshed, alone = make(2, config), make(2)
  assert meshed.batch_size == 4  # rounded up to the shards of the batch
  pairs = list(zip(inputs(), inputs((1, 5, 2, 3, 4, 1, 2)), strict=True))
  assert meshed.generate(inputs()) == alone.generate(inputs())
  np.testing.assert_allclose(
    meshed.log_likelihoods(pairs), alone.log_likelihoods(pairs), rtol=1e-5
  )


def test_each_length_is_compiled_once_whatever_the_parameters(monkeypatch):
  traced = []

  def counted(config, params, tokens, **settings):
    traced.append(tokens.shape)
    return decoding.generate(config, params, tokens, **settings)

  monkeypatch.setattr(predictor, 'generate', counted)
  several = make.__wrapped__(2)
  first = several.generate(inputs())
  assert several.generate(inputs()) == first
  others = jax.tree.map(lambda leaf: leaf[..., ::-1], several.params)
  assert several.generate(inputs(), params=others) != first
  several.params = others
  assert several.generate(inputs()) != first
  assert traced == [(2, 16), (2, 20)]


def test_rows_of_padding_do_not_keep_decoding_going():
  one = inputs((9,))[0]
  first = make(eos_id=48).generate([one])[0][0]
  rows = np.zeros((3, 9), np.int32)
  rows[0] = one
  steps = []

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return decoding_step(*args)

  decoding_step = decoding.sampling.decode_step
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decoding.sampling, 'decode_step', counted)
    outputs = decoding.generate(
      CONFIG, params(), rows, max_length=31, eos_id=first
    )
  jax.effects_barrier()
  assert outputs.tolist() == [[first] + [0] * 30, [0] * 31, [0] * 31]
  assert len(steps) == 1


def test_beams_are_those_of_the_inputs_alone():
  beams = make(2, num_beams=3, length_penalty=0.5)
  rows = inputs((9, 16, 11))
  padded = np.array([[*row, *[0] * (16 - len(row))] for row in rows], np.int32)
  expected = decoding.generate(
    CONFIG,
    params(),
    padded,
    max_length=6,
    eos_id=EOS,
    method=decoding.BeamSearch(3, 0.5),
  )
  found = beams.generate(rows)
  assert found == [predictor._until(row, EOS) for row in expected.tolist()]
  assert found != make(2).generate(rows)


def test_a_search_ends_as_it_is_told():
  eos = 20  # which some beams reach early
  outputs = {}
  for stop in (False, True, 'never'):
    beams = make(3, eos_id=eos, num_beams=2, early_stopping=stop)
    padded = [[*row, *[0] * (32 - len(row))] for row in inputs()]
    expected = decoding.generate(
      CONFIG,
      params(),
      np.array(padded, np.int32),
      max_length=6,
      eos_id=eos,
      method=decoding.BeamSearch(2, 1.0, stop),
    )
    outputs[stop] = beams.generate(inputs())
    assert outputs[stop] == [
      predictor._until(row, eos) for row in expected.tolist()
    ]
  assert outputs[True] != outputs[False]
  default = make(3, eos_id=eos, num_beams=2)
  assert default.generate(inputs()) == outputs[False]  # transformers' default


def test_draws_depend_on_the_number_of_their_input_and_on_the_seed():
  rows = inputs((3, 16, 9, 5, 11))
  one, other = (
    make(2, sampling=decoding.Sampling(), seed=seed) for seed in (1, 2)
  )
  outputs = one.generate(rows)
  assert one.generate(rows[3:], first=3) == outputs[3:]
  same = one.generate([rows[0]] * 4)
  assert same[0] == outputs[0]
  assert len(set(map(tuple, same))) == 4
  assert other.generate(rows) != outputs


def test_beams_that_draw_are_refused():
  with pytest.raises(UserError, match='temperature 0.5 draws .* choose one'):
    make(num_beams=2, sampling=decoding.Sampling(0.5))


def test_an_empty_text_is_answered():
  outputs = make(eos_id=48).generate([inputs()[0], [EOS]])
  expected = decoding.generate(
    CONFIG, params(), np.array([[EOS]], np.int32), max_length=6, eos_id=48
  )
  assert outputs[1] == expected[0].tolist()


def test_progress_counts_examples():
  heard = []
  make(2).generate(inputs(), progress=lambda *done: heard.append(done))
  assert heard == [(2, 7), (4, 7), (5, 7), (7, 7)]


def test_nothing_in_nothing_out():
  assert make().generate([]) == []
  assert make().log_likelihoods([]).shape == (0,)


@pytest.mark.parametrize(
  'pairs, message',
  [
    ([([2], [2]), ([], [2])], 'input 1 has no token'),
    ([([2] * 21, [2])], 'input 0 has 21 tokens, .*; it may have 20'),
    ([([2], [2] * 6)], 'target 0 has 7 tokens, .*; it may have 6'),
    ([([2, 0, 3], [2])], 'input 0 has padding'),
  ],
)
def test_what_does_not_fit_is_refused(pairs, message):
  with pytest.raises(UserError, match=message):
    make().log_likelihoods(pairs)


def test_sizes_below_one_are_refused():
  with pytest.raises(UserError, match='batch_size must be at least 1, got 0'):
    make(0)
