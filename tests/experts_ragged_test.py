"""The dropless backend: equal to gather with room for all, and independent."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
  ROUTER,
  apply,
  init_params,
  make_batch,
  random_tokens,
  tiny_config,
)

from st_moe import decoding, partitioning, preflight
from st_moe.config import MeshConfig, ModelConfig, RouterConfig, RunConfig
from st_moe.errors import UserError
from st_moe.experts.grouped_matmul import BLOCK_ROWS, PIECE_ROWS
from st_moe.moe import MoeLayer

BATCH, LENGTH, WIDTH, D_FF, NUM_EXPERTS = 4, 40, 16, 24, 4
# Capacity as large as a group: gather drops nothing either.
ROOMY = RouterConfig(
  group_size=40, train_choice_policy='all', train_capacity_factor=4.0
)
TIGHT = dataclasses.replace(
  ROUTER,
  train_capacity_factor=0.5,
  eval_capacity_factor=0.5,
  min_expert_capacity=1,
)


def make_layer(router, dispatch, **changes):
  settings = {'num_experts': NUM_EXPERTS, 'd_ff': D_FF} | changes
  activations = settings.pop('activations', ('gelu', 'linear'))
  return MoeLayer(
    **settings, activations=activations, router=router, dispatch=dispatch
  )


def inputs():
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
  mask = jax.random.uniform(keys[1], (BATCH, LENGTH)) > 0.3
  return x, mask


def init(layer):
  params = layer.init(jax.random.key(1), *inputs(), train=False)['params']
  return partitioning.unbox(params)


def value_and_gradients(layer, params, x, mask):
  def objective(params, x):
    y, stats = layer.apply(
      {'params': params},
      x,
      mask,
      train=True,
      rngs={'router': jax.random.key(2)},
    )
    weight = jnp.cos(jnp.arange(y.size).reshape(y.shape))
    loss = jnp.sum(weight * y) + stats.balance_loss + stats.z_loss
    return loss, (y, stats)

  step = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
  return jax.jit(step)(params, x)


def assert_equal_to_gather(router, params=None, padding='some', **settings):
  x, mask = inputs()
  mask &= padding == 'some'
  if params is None:
    params = init(make_layer(router, 'gather', **settings))
  gather, ragged = (
    value_and_gradients(
      make_layer(router, dispatch, **settings), params, x, mask
    )
    for dispatch in ('gather', 'ragged')
  )
  (_, (y, stats)), gradients = ragged
  (_, (expected, expected_stats)), expected_gradients = gather
  assert stats.fraction_dropped == expected_stats.fraction_dropped
  for a, b in zip(
    jax.tree.leaves((y, gradients)),
    jax.tree.leaves((expected, expected_gradients)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  return y


@pytest.mark.parametrize(
  'changes',
  [
    {'num_choices': 1},
    {'num_choices': 2, 'group_size': 20, 'expert_bias': 'additive'},
    {'num_choices': 2, 'mask_padding': False, 'priority': 'probability'},
    {
      'num_choices': 3,
      'train_choice_policy': 'threshold',
      'expert_bias': 'multiplicative',
    },
    {'num_choices': 3, 'train_choice_policy': 'random'},
    {'num_choices': 3, 'train_choice_policy': 'none'},
    {'num_choices': 4, 'gate_normalization': 'after_drop'},
  ],
  ids=str,
)
def test_ragged_equals_gather_with_room_for_all(changes):
  router = dataclasses.replace(ROOMY, **changes)
  params = init(make_layer(router, 'gather'))
  if 'bias' in params['expert']:
    bias = jax.random.normal(jax.random.key(5), (NUM_EXPERTS, D_FF))
    params['expert']['bias'] = bias
  assert_equal_to_gather(router, params)


def test_a_batch_of_padding_gives_zeros():
  assert not assert_equal_to_gather(ROOMY, padding='all').any()


def test_ungated_experts_and_many_experts_without_tokens():
  assert_equal_to_gather(ROOMY, activations=('relu',))
  router = dataclasses.replace(ROOMY, train_capacity_factor=200.0)
  assert_equal_to_gather(router, num_experts=200)


def test_all_tokens_to_one_expert_and_gates_that_are_zero():
  """One expert takes everything; the second choice underflows to weight 0."""
  params = init(make_layer(ROOMY, 'gather'))
  kernel = jnp.zeros((WIDTH, NUM_EXPERTS)).at[:, 2].set(1e3)
  params['router']['kernel'] = jnp.abs(kernel)
  x, mask = inputs()
  params_and_x = params, jnp.abs(x), mask
  (_, (y, stats)), gradients = value_and_gradients(
    make_layer(ROOMY, 'ragged'), *params_and_x
  )
  np.testing.assert_array_equal(stats.mean_gate[1], 0.0)
  (_, (expected, _)), expected_gradients = value_and_gradients(
    make_layer(ROOMY, 'gather'), *params_and_x
  )
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  for a, b in zip(
    jax.tree.leaves(gradients),
    jax.tree.leaves(expected_gradients),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  wi = np.asarray(gradients[0]['expert']['wi_0']['kernel'])
  assert wi[2].any() and not wi[[0, 1, 3]].any()


def test_nothing_is_dropped_at_any_capacity_factor():
  x, _ = inputs()
  tight = dataclasses.replace(ROOMY, train_capacity_factor=0.1)
  params = init(make_layer(tight, 'ragged'))
  dropping, dropless, roomy = (
    value_and_gradients(make_layer(router, dispatch), params, x, None)[0][1]
    for router, dispatch in (
      (tight, 'gather'),
      (tight, 'ragged'),
      (ROOMY, 'gather'),
    )
  )
  assert dropping[1].fraction_dropped > 0
  assert dropless[1].fraction_dropped == 0
  np.testing.assert_allclose(dropless[0], roomy[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('gradients', [False, True])
def test_compiled_flops_do_not_grow_with_the_experts(gradients):
  """`cost_analysis` counts a loop's body once: bodies do not know E.

  How often they run is `count_blocks`, tested in grouped_matmul_test.
  """
  d_ff = 1024

  def flops(num_experts):
    layer = make_layer(ROOMY, 'ragged', num_experts=num_experts, d_ff=d_ff)
    params = init(layer)

    def objective(params, x):
      return jnp.sum(layer.apply({'params': params}, x, None, train=True)[0])

    function = jax.grad(objective, (0, 1)) if gradients else objective
    compiled = jax.jit(function).lower(params, inputs()[0]).compile()
    return compiled.cost_analysis()['flops']

  few = flops(4)
  bodies = 3 * 2 * WIDTH * d_ff * (BLOCK_ROWS + PIECE_ROWS)
  assert few > (3 if gradients else 1) * bodies
  assert flops(32) <= 1.1 * few  # the rest is the router's own work


@functools.cache
def tight_model(**changes):
  return tiny_config(dataclasses.replace(TIGHT, **changes))


@pytest.mark.parametrize('dispatch', ['einsum', 'gather', 'auto', 'ragged'])
def test_dropless_evaluation_ignores_neighbours(dispatch):
  config = dataclasses.replace(
    tight_model(group_size=40, eval_dropless=True), dispatch=dispatch
  )
  rng = np.random.default_rng(0)
  tokens = random_tokens(rng, [10] * 8, 10), random_tokens(rng, [6] * 8, 6)
  others = random_tokens(rng, [10] * 8, 10), random_tokens(rng, [6] * 8, 6)
  params = init_params(config)

  def logits_of_one_row(config, neighbours):
    rows = (
      np.concatenate([other[:2], own[2:3], other[3:]])
      for own, other in zip(tokens, neighbours, strict=True)
    )
    return apply(config, params, make_batch(*rows)).logits[2]

  first = logits_of_one_row(config, tokens)
  np.testing.assert_allclose(
    logits_of_one_row(config, others), first, rtol=1e-5, atol=1e-5
  )
  if dispatch != 'ragged':  # by default evaluation has a capacity
    config = dataclasses.replace(tight_model(group_size=40), dispatch=dispatch)
    paper = logits_of_one_row(config, tokens)
    assert np.abs(logits_of_one_row(config, others) - paper).max() > 1e-2


def test_dropless_evaluation_equals_einsum_with_room_for_all():
  config = tight_model(eval_dropless=True)
  roomy = tiny_config(
    dataclasses.replace(TIGHT, eval_capacity_factor=4.0), dispatch='einsum'
  )
  rng = np.random.default_rng(1)
  batch = make_batch(
    random_tokens(rng, [10, 7, 3], 10), random_tokens(rng, [6, 5, 1], 6)
  )
  params = init_params(config)
  got, expected = apply(config, params, batch), apply(roomy, params, batch)
  assert got.encoder.fraction_dropped.sum() == 0
  np.testing.assert_allclose(got.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_decoding_ignores_neighbours_where_evaluation_would_drop():
  config = tight_model(group_size=40)
  params = init_params(config)
  tokens = random_tokens(np.random.default_rng(2), [10] * 8, 10)
  generate = functools.partial(
    decoding.generate, config, params, max_length=6, eos_id=48
  )
  together = generate(tokens)
  for row in (0, 5):
    alone = generate(tokens[row : row + 1])
    np.testing.assert_array_equal(alone[0], together[row])


def test_experts_that_choose_are_never_dropless():
  with pytest.raises(UserError, match='eval_dropless needs kind'):
    RouterConfig(kind='expert_choice', eval_dropless=True)
  with pytest.raises(UserError, match="dispatch = 'ragged' needs encoder/Rout"):
    ModelConfig(
      encoder_router=RouterConfig(kind='expert_choice'), dispatch='ragged'
    )


def test_the_run_log_says_what_was_chosen_and_why(caplog):
  mesh = partitioning.make_mesh(MeshConfig(data=4, expert=2))
  router = RouterConfig(eval_dropless=True)
  model = ModelConfig(encoder_router=router, num_experts=32)
  with caplog.at_level(logging.INFO):
    assert preflight.describe_dispatch(RunConfig(model=model), mesh) == 'gather'
  assert caplog.messages == [
    'dispatch: gather (row gathers are the fastest form on cpu)',
    # 128 rows of 512 and 114 tokens; groups of 2048 asked for, 8 shards.
    'routing in the encoder: 32 groups of 2048 tokens',
    'routing in the decoder: 8 groups of 1824 tokens',
    'dispatch of the encoder in evaluation: ragged (dropless evaluation, '
    'blocks products; 16 experts per device)',
  ]
