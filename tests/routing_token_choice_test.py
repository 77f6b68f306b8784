"""Tokens choose experts: scenarios, the oracle, and the random policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracle as oracle

from st_moe.config import RouterConfig
from st_moe.errors import UserError
from st_moe.routing import route

KEEP_ALL = RouterConfig(train_choice_policy='all', eval_choice_policy='all')


@functools.partial(jax.jit, static_argnames=('config', 'capacity', 'train'))
def run(logits, mask, config, capacity, train=True, rng=None):
  return route(logits, mask, config, capacity=capacity, train=train, rng=rng)


def replace(config=KEEP_ALL, **changes):
  return dataclasses.replace(config, **changes)


def logits_of(*probs):
  """One group of tokens with the given probabilities, [1, S, E]."""
  return jnp.log(jnp.asarray([probs], jnp.float32))


# Three tokens want expert 0 most, one expert 1; the last is padding.
CROWDED = logits_of(
  (0.6, 0.3, 0.1),
  (0.6, 0.3, 0.1),
  (0.6, 0.1, 0.3),
  (0.1, 0.6, 0.3),
  (0.6, 0.3, 0.1),
)
REAL = jnp.asarray([[True, True, True, True, False]])


def test_first_choices_fill_the_slots_before_any_second_choice():
  """Expert 0 has room for two of three; expert 1 for its one first choice and
  one of two second choices; the dropped third token keeps its second choice
  with the weight it had before the drop."""
  routing, stats = run(CROWDED, REAL, KEEP_ALL, 2)
  a, b = 2 / 3, 1 / 3
  expected = np.zeros((1, 5, 3, 2))
  expected[0, 0] = [(a, 0), (0, b), (0, 0)]
  expected[0, 1] = [(0, a), (0, 0), (0, 0)]
  expected[0, 2] = [(0, 0), (0, 0), (b, 0)]
  expected[0, 3] = [(0, 0), (a, 0), (0, b)]
  np.testing.assert_allclose(routing.combine_weights(), expected, atol=1e-6)
  np.testing.assert_array_equal(routing.dispatch_mask(), expected > 0)
  np.testing.assert_array_equal(
    routing.slot, [[[0, 1], [1, 2], [2, 0], [0, 1], [2, 2]]]
  )
  np.testing.assert_array_equal(
    routing.kept, [[[1, 1], [1, 0], [0, 1], [1, 1], [0, 0]]]
  )
  np.testing.assert_allclose(stats.expert_load, [3 / 8, 3 / 8, 2 / 8])
  np.testing.assert_allclose(stats.expert_kept, [1, 1, 1])
  np.testing.assert_allclose(stats.mean_gate, [a, b], atol=1e-6)
  np.testing.assert_allclose(stats.fraction_dropped, 0)
  np.testing.assert_allclose(stats.num_tokens, 4)
  np.testing.assert_allclose(stats.max_logit, np.log(0.6), atol=1e-6)


def test_one_choice_keeps_its_raw_probability():
  routing, stats = run(CROWDED, REAL, replace(num_choices=1), 2)
  expected = np.zeros((1, 5, 3, 2))
  expected[0, 0, 0, 0] = expected[0, 1, 0, 1] = expected[0, 3, 1, 0] = 0.6
  np.testing.assert_allclose(routing.combine_weights(), expected, atol=1e-6)
  np.testing.assert_allclose(stats.fraction_dropped, 1 / 4)
  np.testing.assert_allclose(stats.expert_load, [3 / 4, 1 / 4, 0])
  np.testing.assert_allclose(stats.expert_kept, [1, 1 / 2, 0])


def test_gates_renormalised_after_drops_sum_to_one_for_every_kept_token():
  config = replace(gate_normalization='after_drop')
  routing, stats = run(CROWDED, REAL, config, 2)
  a, b = 2 / 3, 1 / 3
  np.testing.assert_allclose(
    routing.gate, [[[a, b], [1, 0], [0, 1], [a, b], [0, 0]]], atol=1e-6
  )
  np.testing.assert_allclose(stats.mean_gate, [0.6, 0.3], atol=1e-6)


def test_gates_without_normalisation_are_probabilities():
  routing, _ = run(CROWDED, REAL, replace(gate_normalization='none'), 2)
  np.testing.assert_allclose(
    routing.gate,
    [[[0.6, 0.3], [0.6, 0], [0, 0.3], [0.6, 0.3], [0, 0]]],
    atol=1e-6,
  )


def test_padding_takes_slots_only_when_it_is_routed():
  config = replace(num_choices=1)
  padded_first = jnp.asarray([[False, True, True, True, True]])
  masked, _ = run(CROWDED, padded_first, config, 2)
  routed, stats = run(
    CROWDED, padded_first, replace(config, mask_padding=False), 2
  )
  np.testing.assert_array_equal(
    masked.kept[0, :, 0], [False, True, True, True, False]
  )
  np.testing.assert_array_equal(
    routed.kept[0, :, 0], [True, True, False, True, False]
  )
  np.testing.assert_allclose(stats.num_tokens, 4)  # health is of real tokens
  np.testing.assert_allclose(stats.fraction_dropped, 2 / 4)


def test_batch_priority_keeps_the_likeliest_tokens_and_never_padding():
  """Four tokens and a padding want expert 0, which has two slots: the two
  surest get them, the surest first."""
  logits = logits_of(
    (0.6, 0.4), (0.9, 0.1), (0.7, 0.3), (0.8, 0.2), (0.99, 0.01)
  )
  config = replace(num_choices=1, priority='probability')
  routing, _ = run(logits, REAL, config, 2)
  expected = np.zeros((1, 5, 2, 2))
  expected[0, 1, 0, 0], expected[0, 3, 0, 1] = 0.9, 0.8
  np.testing.assert_allclose(routing.combine_weights(), expected, atol=1e-6)


def test_batch_priority_orders_second_choices_by_the_first_probability():
  """All second choices want expert 2. The token with the highest *first*
  probability gets its one slot, though its own second gate is the lowest."""
  logits = logits_of((0.5, 0.1, 0.4), (0.05, 0.7, 0.25), (0.45, 0.2, 0.35))
  config = replace(priority='probability', gate_normalization='none')
  routing, _ = run(logits, None, config, 1)
  np.testing.assert_allclose(
    routing.gate, [[[0.5, 0], [0.7, 0.25], [0, 0]]], atol=1e-6
  )


def test_equal_tokens_are_served_in_order_of_position():
  logits = jnp.zeros((1, 6, 2))
  for priority in ('position', 'probability'):
    config = replace(num_choices=1, priority=priority)
    routing, _ = run(logits, None, config, 4)
    np.testing.assert_array_equal(routing.expert_index, np.zeros((1, 6, 1)))
    np.testing.assert_array_equal(routing.slot[0, :, 0], [0, 1, 2, 3, 4, 4])


@pytest.mark.parametrize(
  ('policy', 'kept'),
  [
    ('all', [True, True, True]),
    ('none', [False, False, False]),
    ('threshold', [True, False, False]),  # strictly above
  ],
)
@pytest.mark.parametrize('train', [True, False])
def test_policies_for_second_choices(policy, kept, train):
  """Normalised second gates 0.3, 0.25 and 0.1 against a threshold of 0.25."""
  logits = logits_of((0.7, 0.3), (0.75, 0.25), (0.9, 0.1))
  mode, other = ('train', 'eval') if train else ('eval', 'train')
  config = replace(
    **{
      f'{mode}_choice_policy': policy,
      f'{mode}_choice_threshold': 0.25,
      f'{other}_choice_policy': 'all',
    }
  )
  routing, stats = run(logits, None, config, 3, train=train)
  np.testing.assert_array_equal(routing.kept[0, :, 0], [True, True, True])
  np.testing.assert_array_equal(routing.kept[0, :, 1], kept)
  np.testing.assert_allclose(stats.mean_gate[1], (0.3 + 0.25 + 0.1) / 3)


def test_random_policy_keeps_each_choice_with_its_own_probability():
  """Gates 0.5, 0.15 and 0.02 in every token, threshold 0.2: third choices are
  kept with probability 0.75, fourth ones with 0.1, by independent draws."""
  tokens = 20000
  probs = jnp.asarray([0.5, 0.33, 0.15, 0.02])
  logits = jnp.broadcast_to(jnp.log(probs), (1, tokens, 4))
  config = RouterConfig(num_choices=4)  # the paper's: random, 0.2
  routing, _ = run(logits, None, config, tokens, rng=jax.random.key(0))
  kept = np.asarray(routing.kept[0])
  assert kept[:, :2].all()
  deviation = np.sqrt(0.25 / tokens)
  np.testing.assert_allclose(
    kept[:, 2:].mean(axis=0), [0.75, 0.1], atol=4 * deviation
  )
  both = (kept[:, 2] & kept[:, 3]).mean()
  np.testing.assert_allclose(both, 0.075, atol=4 * deviation)
  again, _ = run(logits, None, config, tokens, rng=jax.random.key(0))
  other, _ = run(logits, None, config, tokens, rng=jax.random.key(1))
  np.testing.assert_array_equal(again.kept, routing.kept)
  assert (np.asarray(other.kept) != kept).any()


def test_random_policy_without_a_key_is_an_error():
  logits = jnp.zeros((1, 4, 4))
  with pytest.raises(UserError, match="'random' needs a 'router' random key"):
    run(logits, None, RouterConfig(), 4)
  config = RouterConfig(eval_choice_policy='random')
  with pytest.raises(UserError, match="'random' needs a 'router' random key"):
    run(logits, None, config, 4, train=False)


def test_no_key_is_needed_at_evaluation_nor_for_one_choice():
  logits = jnp.zeros((1, 4, 4))
  run(logits, None, RouterConfig(), 4, train=False)
  run(logits, None, RouterConfig(num_choices=1), 4)


def test_more_choices_than_experts_is_an_error():
  with pytest.raises(UserError, match='num_choices 3 exceeds num_experts 2'):
    run(jnp.zeros((1, 4, 2)), None, replace(num_choices=3), 4)


INPUTS = {
  'random': lambda rng: rng.normal(size=(3, 12, 4)),
  # Probabilities 1, 1/2, 1/3, 1/4 or exactly 0.
  'sharp': lambda rng: 200.0 * np.round(rng.normal(size=(3, 12, 4))),
  'ties': lambda rng: np.round(rng.normal(size=(3, 12, 4))),
  'all to one expert': lambda rng: (
    rng.normal(size=(3, 12, 4)) + np.asarray([0.0, 0.0, 9.0, 0.0])
  ),
}
MASKS = {
  'no padding': lambda rng: np.ones((3, 12), bool),
  'some padding': lambda rng: rng.uniform(size=(3, 12)) > 0.4,
  'a group of padding': lambda rng: np.arange(3)[:, None] > np.zeros(12),
  'all padding': lambda rng: np.zeros((3, 12), bool),
}


@pytest.mark.parametrize(
  ('capacity', 'settings'),
  [
    (3, {'num_choices': 1}),
    (1, {'num_choices': 2}),
    (5, {'num_choices': 2, 'policy': 'threshold', 'threshold': 0.3}),
    (3, {'num_choices': 2, 'normalization': 'after_drop'}),
    (3, {'num_choices': 3, 'normalization': 'none', 'policy': 'none'}),
    (12, {'num_choices': 4}),
    (3, {'num_choices': 1, 'priority': 'probability'}),
    (4, {'num_choices': 2, 'priority': 'probability'}),
  ],
  ids=str,
)
def test_equals_the_oracle(capacity, settings):
  renamed = {
    'normalization': 'gate_normalization',
    'policy': 'train_choice_policy',
    'threshold': 'train_choice_threshold',
  }
  config = replace(**{renamed.get(k, k): v for k, v in settings.items()})
  rng = np.random.default_rng(0)
  for inputs, make_logits in INPUTS.items():
    for padding, make_mask in MASKS.items():
      logits = make_logits(rng).astype(np.float32)
      mask = make_mask(rng)
      routing, stats = run(logits, mask, config, capacity)
      expected = oracle.token_choice(
        logits, mask, capacity=capacity, **settings
      )
      np.testing.assert_allclose(
        routing.combine_weights(),
        expected,
        atol=1e-6,
        err_msg=f'{inputs}, {padding}',
      )
      # A choice of weight zero holds a slot but does not travel.
      np.testing.assert_array_equal(routing.dispatch_mask(), expected > 0)
      dropped = mask & (expected.sum(axis=(2, 3)) == 0)
      np.testing.assert_allclose(
        stats.fraction_dropped, dropped.sum() / max(mask.sum(), 1), atol=1e-6
      )
      assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))


def test_one_token_alone():
  logits = jnp.asarray([[[0.0, 1.0, -1.0]]])
  routing, _ = run(logits, None, KEEP_ALL, 1)
  expected = oracle.token_choice(
    np.asarray(logits), np.ones((1, 1), bool), num_choices=2, capacity=1
  )
  np.testing.assert_allclose(routing.combine_weights(), expected, atol=1e-6)


@pytest.mark.parametrize('priority', ['position', 'probability'])
def test_groups_do_not_see_each_other(priority):
  logits = jax.random.normal(jax.random.key(0), (2, 16, 4))
  config = replace(priority=priority)
  before, _ = run(logits, None, config, 2)
  after, _ = run(logits.at[1].multiply(-3.0), None, config, 2)
  np.testing.assert_array_equal(
    before.combine_weights()[0], after.combine_weights()[0]
  )


def test_later_tokens_do_not_change_earlier_ones():
  """What lets a causal decoder use this router (appendix D)."""
  logits = jax.random.normal(jax.random.key(0), (1, 16, 4))
  changed = logits.at[:, 10:].multiply(-3.0)
  config = replace(num_choices=1)
  before, _ = run(logits, None, config, 3)
  after, _ = run(changed, None, config, 3)
  np.testing.assert_array_equal(
    before.combine_weights()[:, :10], after.combine_weights()[:, :10]
  )
