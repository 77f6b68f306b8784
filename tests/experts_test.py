"""Dispatch and combine: a scenario, and the two backends against each other."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import experts
from st_moe.config import RouterConfig
from st_moe.routing import Routing, route

BACKENDS = ('einsum', 'gather')
KEEP_ALL = RouterConfig(train_choice_policy='all')


def hand_made_routing(gate_dtype=jnp.float32):
  """Three tokens, two experts with two slots. Token 0 goes to both experts,
  token 1 is dropped, token 2 goes to expert 1; one slot stays empty."""
  return Routing(
    expert_index=jnp.asarray([[[0, 1], [0, 1], [1, 0]]]),
    slot=jnp.asarray([[[1, 0], [2, 2], [1, 2]]]),
    gate=jnp.asarray([[[0.75, 0.25], [0, 0], [0.5, 0]]], gate_dtype),
    kept=jnp.asarray([[[True, True], [False, False], [True, False]]]),
    num_experts=2,
    capacity=2,
  )


@pytest.mark.parametrize('backend', BACKENDS)
def test_tokens_arrive_in_their_slots(backend):
  x = jnp.asarray([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
  buffers = experts.dispatch(x, hand_made_routing(), backend)
  np.testing.assert_array_equal(
    buffers,
    [[[[0, 0], [1, 2]]], [[[1, 2], [5, 6]]]],  # [E, G, C, D]
  )


@pytest.mark.parametrize('backend', BACKENDS)
def test_outputs_come_back_weighted_by_gates(backend):
  y = jnp.asarray([[[[99.0, 99.0], [4.0, 8.0]]], [[[8.0, 0.0], [2.0, 6.0]]]])
  out = experts.combine(y, hand_made_routing(), backend)
  np.testing.assert_array_equal(out, [[[5, 6], [0, 0], [1, 3]]])


@pytest.mark.parametrize('backend', BACKENDS)
def test_sums_in_float32(backend):
  """256 + 1 + 1 + 1 + 1 in bfloat16 would stay 256."""
  ones = jnp.ones((1, 1, 5))
  routing = Routing(
    expert_index=jnp.arange(5, dtype=jnp.int32)[None, None],
    slot=jnp.zeros((1, 1, 5), jnp.int32),
    gate=ones,
    kept=ones > 0,
    num_experts=5,
    capacity=1,
  )
  y = jnp.asarray([256, 1, 1, 1, 1], jnp.bfloat16).reshape(5, 1, 1, 1)
  out = experts.combine(y, routing, backend)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out.astype(jnp.float32), [[[260]]])


def through_experts(x, kernel, logits, mask, config, capacity, backend):
  """A small layer: route, dispatch, one product per expert, combine."""
  routing, _ = route(
    logits, mask, config, capacity=capacity, train=True, rng=None
  )
  buffers = experts.dispatch(x, routing, backend)
  y = jnp.tanh(jnp.einsum('egcd,edf->egcf', buffers, kernel))
  return experts.combine(y, routing, backend)


@pytest.mark.parametrize(
  ('changes', 'capacity'),
  [
    ({'num_choices': 1}, 2),
    ({'num_choices': 2}, 1),
    ({'num_choices': 2, 'gate_normalization': 'after_drop'}, 4),
    ({'num_choices': 4}, 12),
    ({'num_choices': 3, 'priority': 'probability'}, 3),
    ({'kind': 'expert_choice'}, 5),
  ],
  ids=str,
)
@pytest.mark.parametrize('padding', ['some', 'all'])
def test_backends_agree_in_value_and_every_gradient(changes, capacity, padding):
  config = dataclasses.replace(KEEP_ALL, **changes)
  keys = jax.random.split(jax.random.key(0), 5)
  groups, tokens, num_experts, width = 3, 12, 4, 8
  x = jax.random.normal(keys[0], (groups, tokens, width))
  kernel = jax.random.normal(keys[1], (num_experts, width, width))
  logits = jax.random.normal(keys[2], (groups, tokens, num_experts))
  mask = jax.random.uniform(keys[3], (groups, tokens)) > 0.2
  mask &= padding == 'some'
  cotangent = jax.random.normal(keys[4], x.shape)

  def value_and_gradients(backend):
    def objective(x, kernel, logits):
      y = through_experts(x, kernel, logits, mask, config, capacity, backend)
      return jnp.sum(y * cotangent), y

    gradients, y = jax.jit(
      jax.grad(objective, argnums=(0, 1, 2), has_aux=True)
    )(x, kernel, logits)
    return y, *gradients

  for einsum, gather in zip(
    value_and_gradients('einsum'), value_and_gradients('gather'), strict=True
  ):
    assert (padding == 'all') == (np.abs(einsum).max() == 0)
    np.testing.assert_allclose(gather, einsum, rtol=1e-5, atol=1e-6)


def test_gather_scatters_no_rows_and_builds_no_one_hot_of_slots():
  groups, tokens, num_experts, width, capacity = 2, 24, 4, 8, 7
  x = jnp.ones((groups, tokens, width))
  kernel = jnp.ones((num_experts, width, width))
  logits = jnp.zeros((groups, tokens, num_experts))

  def objective(backend):
    return lambda *args: jnp.sum(
      through_experts(*args, None, KEEP_ALL, capacity, backend)
    )

  def scatters_and_one_hots(backend):
    gradient = jax.grad(objective(backend), argnums=(0, 1, 2))
    text = str(jax.make_jaxpr(gradient)(x, kernel, logits))
    one_hot = f'[{groups},{tokens},{num_experts},{capacity}]'
    return re.findall(r':f32\S* = scatter', text), one_hot in text

  assert scatters_and_one_hots('gather') == ([], False)
  assert scatters_and_one_hots('einsum') == ([], True)


def test_choice_of_backend_and_its_reason():
  def choose(requested, platform, group_tokens=2048, d_ff=2048):
    return experts.choose_backend(
      requested, platform=platform, group_tokens=group_tokens, d_ff=d_ff
    )

  assert choose('auto', 'cpu').name == choose('auto', 'gpu').name == 'gather'
  assert choose('auto', 'tpu').name == 'gather'
  small = choose('auto', 'tpu', group_tokens=256)
  assert small.name == 'einsum'
  assert '256 tokens per group' in small.reason
  assert choose('auto', 'tpu', group_tokens=3072, d_ff=20480).name == 'einsum'
  assert choose('auto', 'tpu', group_tokens=3073, d_ff=20480).name == 'gather'
  for name in BACKENDS:
    assert choose(name, 'tpu') == experts.Backend(name, 'as configured')
