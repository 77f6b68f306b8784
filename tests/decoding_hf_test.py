"""Generation equal to that of transformers: golden_hf/make_generation.py."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from st_moe import decoding, partitioning
from st_moe.config import MeshConfig
from st_moe.convert import from_hf

GOLDEN = Path(__file__).parent / 'golden_hf'
SETTINGS = json.loads((GOLDEN / 'generation.json').read_text())
ONE_DEVICE = MeshConfig(data=1, expert=1, model=1)


@functools.cache
def model(name):
  mesh = partitioning.make_mesh(ONE_DEVICE, jax.devices()[:1])
  return from_hf.load(GOLDEN / name, mesh, ONE_DEVICE)


@functools.cache
def golden(name):
  return dict(np.load(GOLDEN / f'{name}.npz'))


# Other lengths and penalties are the same program; another end is not.
SLOW = ('beam_early', 'beam_never')
SEARCHES = [
  pytest.param(
    name,
    search,
    marks=pytest.mark.slow if name != 't5_v1_1' and search in SLOW else (),
  )
  for name in SETTINGS['eos']
  for search in ('greedy', *SETTINGS['searches'])
]


@pytest.mark.parametrize('name, search', SEARCHES)
def test_fifty_outputs_are_those_of_transformers(name, search):
  found = golden(f'generated_{name}')
  method = decoding.GREEDY
  if search != 'greedy':
    method = decoding.BeamSearch(
      SETTINGS['beams'], *SETTINGS['searches'][search]
    )
  outputs = decoding.generate(
    *model(name),
    found['prompts'].astype(np.int32),
    max_length=found[search].shape[1],
    eos_id=SETTINGS['eos'][name],
    method=method,
  )
  assert outputs.shape == (50, 12)
  np.testing.assert_array_equal(outputs, found[search])


@pytest.mark.parametrize('name', SETTINGS['eos'])
def test_the_golden_outputs_tell_the_searches_apart(name):
  """A search with another penalty, or none, does not pass for the right one."""
  found = golden(f'generated_{name}')
  lengths = np.count_nonzero(found['beam_1.0'], axis=1)
  assert len(set(lengths.tolist())) >= 5
  names = ['greedy', 'beam_0.6', 'beam_1.0', 'beam_2.0']
  names += ['beam_early'] if name == 't5_v1_1' else []
  for i, one in enumerate(names):
    for other in names[:i]:
      assert (found[one] != found[other]).any(axis=1).sum() >= 1, (one, other)


@pytest.mark.parametrize('name', SETTINGS['filters'])
def test_what_is_drawn_from_is_the_distribution_of_transformers(name):
  found = golden('sampling_filters')
  method = decoding.Sampling(*SETTINGS['filters'][name])
  logits = decoding.sampling_logits(found['logits'], method)
  probs = np.asarray(jax.nn.softmax(logits, axis=-1))
  np.testing.assert_array_equal(probs > 0, found[name] > 0)
  np.testing.assert_allclose(probs, found[name], rtol=1e-5)
