"""Experts choose tokens: a scenario, the oracle, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracle as oracle

from st_moe.config import RouterConfig
from st_moe.routing import route

CONFIG = RouterConfig(kind='expert_choice')


@functools.partial(jax.jit, static_argnames='capacity')
def run(logits, mask, capacity):
  return route(logits, mask, CONFIG, capacity=capacity, train=True, rng=None)


def test_each_expert_takes_its_likeliest_tokens_the_likeliest_first():
  """Expert 0 wants tokens 2, 0, 1 in this order, expert 1 tokens 2, 3, 0; each
  takes two. Token 2 is taken twice, so that its weights are halved."""
  probs = np.asarray(
    [(0.3, 0.2), (0.2, 0.1), (0.4, 0.4), (0.1, 0.3)], np.float32
  )
  routing, stats = run(jnp.log(probs)[None], None, 2)
  expected = np.zeros((1, 4, 2, 2))
  expected[0, 2, 0, 0], expected[0, 0, 0, 1] = 0.4 / 2, 0.3
  expected[0, 2, 1, 0], expected[0, 3, 1, 1] = 0.4 / 2, 0.3
  np.testing.assert_allclose(routing.combine_weights(), expected, atol=1e-6)
  np.testing.assert_array_equal(routing.dispatch_mask(), expected > 0)
  np.testing.assert_allclose(stats.fraction_dropped, 1 / 4)
  np.testing.assert_allclose(stats.expert_load, [1 / 2, 1 / 2])
  np.testing.assert_allclose(stats.expert_kept, [1, 1])
  np.testing.assert_allclose(stats.mean_gate, [1 / 4, 1 / 4], atol=1e-6)
  np.testing.assert_allclose(stats.second_choice_loss, 0)


def test_padding_is_never_taken_even_where_slots_stay_empty():
  logits = jnp.zeros((2, 4, 3)).at[:, 0].set(9.0)
  mask = jnp.asarray([[False, True, True, False], [False] * 4])
  routing, stats = run(logits, mask, 3)
  np.testing.assert_array_equal(
    routing.kept.any(axis=-1), [[False, True, True, False], [False] * 4]
  )
  np.testing.assert_allclose(stats.expert_kept, [2 / 6, 2 / 6, 2 / 6])


@pytest.mark.parametrize('capacity', [1, 5, 12])
def test_equals_the_oracle(capacity):
  rng = np.random.default_rng(0)
  for scale in (1.0, 30.0):
    for share in (0.0, 0.4, 1.0):
      logits = (scale * rng.normal(size=(3, 12, 4))).astype(np.float32)
      mask = rng.uniform(size=(3, 12)) >= share
      routing, stats = run(logits, mask, capacity)
      expected = oracle.expert_choice(logits, mask, capacity=capacity)
      np.testing.assert_allclose(routing.combine_weights(), expected, atol=1e-6)
      np.testing.assert_allclose(
        stats.balance_loss, oracle.expert_choice_loss(logits, mask), rtol=1e-5
      )
      np.testing.assert_allclose(
        stats.z_loss, oracle.z_loss(logits, mask), rtol=1e-5
      )


def test_equal_tokens_are_taken_in_order_of_position():
  routing, stats = run(jnp.zeros((1, 5, 2)), None, 3)
  np.testing.assert_array_equal(
    routing.slot, [[[0, 0], [1, 1], [2, 2], [3, 3], [3, 3]]]
  )
  np.testing.assert_allclose(stats.balance_loss, 1.0, rtol=1e-6)
