"""Router losses and router health, alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracle as oracle

from st_moe.config import RouterConfig
from st_moe.routing import route, router_losses

FORMS = ('first_choice', 'switch', 'all_choices')


def stats_of(logits, mask=None, capacity=4, **changes):
  config = RouterConfig(train_choice_policy='all', **changes)
  return jax.jit(
    lambda logits, mask: route(
      logits, mask, config, capacity=capacity, train=True, rng=None
    )[1]
  )(logits, mask)


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 8, 5)).astype(np.float32)
  mask = rng.uniform(size=(3, 8)) > 0.4
  return logits, mask


@pytest.mark.parametrize('form', FORMS)
def test_balance_loss_equals_the_oracle(form, case):
  logits, mask = case
  stats = stats_of(logits, mask, balance_loss=form)
  expected = oracle.balance_loss(logits, mask, form=form, num_choices=2)
  np.testing.assert_allclose(stats.balance_loss, expected, rtol=1e-5)
  np.testing.assert_allclose(
    stats.second_choice_loss,
    oracle.second_choice_loss(logits, mask),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    stats.z_loss, oracle.z_loss(logits, mask), rtol=1e-5
  )


@pytest.mark.parametrize(
  ('form', 'value'), [('first_choice', 1), ('switch', 1), ('all_choices', 2)]
)
def test_balance_loss_of_balanced_routing(form, value):
  """Two of four experts for each token, in turn: 1, or K for 'all_choices'."""
  probs = np.full((4, 4), 0.1, np.float32)
  for s in range(4):
    probs[s, s], probs[s, (s + 1) % 4] = 0.5, 0.3
  loss = stats_of(jnp.log(probs)[None], balance_loss=form).balance_loss
  np.testing.assert_allclose(loss, value, rtol=1e-6)


def test_balance_loss_of_collapsed_routing_is_the_number_of_experts():
  logits = jnp.zeros((2, 8, 4)).at[..., 2].set(50.0)
  np.testing.assert_allclose(stats_of(logits).balance_loss, 4.0, rtol=1e-6)


@pytest.mark.parametrize('form', FORMS)
def test_losses_do_not_depend_on_capacity(form, case):
  logits, mask = case
  tight, loose = (
    stats_of(logits, mask, capacity, balance_loss=form) for capacity in (1, 8)
  )
  assert tight.fraction_dropped > loose.fraction_dropped
  for name in ('balance_loss', 'second_choice_loss', 'z_loss', 'expert_load'):
    np.testing.assert_array_equal(getattr(tight, name), getattr(loose, name))


@pytest.mark.parametrize('form', FORMS)
def test_unmasked_padding_counts_as_real_in_every_loss(form, case):
  logits, mask = case
  routed = stats_of(logits, mask, balance_loss=form, mask_padding=False)
  everything = stats_of(logits, balance_loss=form)
  for name in ('balance_loss', 'second_choice_loss', 'z_loss'):
    np.testing.assert_array_equal(
      getattr(routed, name), getattr(everything, name)
    )
  np.testing.assert_allclose(routed.num_tokens, mask.sum())


@pytest.mark.parametrize('form', ['first_choice', 'all_choices'])
def test_logits_of_padding_change_nothing(form, case):
  logits, mask = case
  other = np.where(mask[..., None], logits, -logits)
  before = stats_of(logits, mask, balance_loss=form)
  after = stats_of(other, mask, balance_loss=form)
  for name in ('balance_loss', 'z_loss', 'entropy', 'max_logit', 'mean_gate'):
    np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_gradient_flows_through_probabilities_only(case):
  """d loss / d P = E f: the shares of choices are constants."""
  logits, mask = case
  probs = jax.nn.softmax(logits)
  index = jnp.argmax(probs, axis=-1)[..., None]
  gradient = jax.grad(
    lambda p: router_losses.balance_loss('first_choice', p, index, mask)
  )(probs)
  groups, tokens, num_experts = logits.shape
  shares = jax.nn.one_hot(index[..., 0], num_experts) * mask[..., None]
  shares = shares.mean(axis=1, keepdims=True)  # [G, 1, E]
  expected = num_experts * shares * mask[..., None] / (groups * tokens)
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_z_loss_is_a_mean_over_the_batch_not_over_groups():
  """One real token in the first group, three in the second."""
  logits = jnp.zeros((2, 3, 4)).at[0].add(1.0)
  mask = jnp.asarray([[True, False, False], [True, True, True]])
  ln = np.log(4)
  expected = ((ln + 1) ** 2 + 3 * ln**2) / 4
  np.testing.assert_allclose(stats_of(logits, mask).z_loss, expected, rtol=1e-6)


def test_health_of_uniform_routing():
  stats = stats_of(jnp.zeros((2, 6, 4)))
  np.testing.assert_allclose(stats.entropy, np.log(4), rtol=1e-6)
  np.testing.assert_allclose(stats.mean_gate, [0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(stats.expert_load, [0.5, 0.5, 0, 0])
  np.testing.assert_allclose(stats.expert_kept, [1, 1, 0, 0])
  np.testing.assert_allclose(stats.fraction_dropped, 1 / 3, rtol=1e-6)


def test_health_without_real_tokens_is_finite():
  stats = stats_of(jnp.ones((1, 4, 3)), jnp.zeros((1, 4), bool))
  for leaf in jax.tree.leaves(stats):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
