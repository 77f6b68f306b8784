"""Cross entropy, router losses, and the objective of a batch in parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import ROUTER, tiny_config, zero_stats

from st_moe import layers, losses


def make_output(logits=None, encoder=None, decoder=None, **fields):
  scalars = {'attention_z_loss': 0.0, 'encoder_tokens': 6.0}
  scalars |= {'decoder_tokens': 4.0} | fields
  return losses.ModelOutput(
    logits=jnp.zeros((1, 2, 4)) if logits is None else logits,
    encoder=encoder,
    decoder=decoder,
    **{name: jnp.float32(value) for name, value in scalars.items()},
  )


def test_cross_entropy_sums_over_weighted_positions():
  # Uniform over 4: ln 4 each. Second row: odds 3:1:1:1 for token 2.
  logits = jnp.log(jnp.array([[[1, 1, 1, 1], [1, 1, 3, 1], [9, 1, 1, 1]]]))
  targets = jnp.array([[3, 2, 0]])
  sums = losses.cross_entropy(logits, targets, jnp.array([[1.0, 2.0, 0.0]]))
  np.testing.assert_allclose(sums.loss, np.log(4) + 2 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(
    sums.z_loss, np.log(4) ** 2 + 2 * np.log(6) ** 2, rtol=1e-6
  )
  assert sums.weight == 3.0
  assert sums.correct == 2.0  # the first is uniform: argmax is token 0


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
  logits = jax.random.normal(jax.random.key(0), (2, 3, 50), jnp.bfloat16)
  targets = jnp.ones((2, 3), jnp.int32)
  weights = jnp.ones((2, 3), jnp.bfloat16)
  low = losses.cross_entropy(logits, targets, weights)
  high = losses.cross_entropy(logits.astype(jnp.float32), targets, weights)
  assert low.loss == high.loss
  assert low.loss.dtype == jnp.float32


def plain_cross_entropy(logits, targets, weights):
  """The same sums as autodiff sees them."""
  logits = logits.astype(jnp.float32)
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  log_z = jax.nn.logsumexp(logits, axis=-1)
  return jnp.sum(-weights * chosen), jnp.sum(weights * log_z**2)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('z_weight', [0.0, 0.5])
def test_cross_entropy_equals_the_plain_one_in_value_and_gradient(
  z_weight, dtype
):
  keys = jax.random.split(jax.random.key(0), 3)
  logits = (5 * jax.random.normal(keys[0], (3, 7, 513))).astype(dtype)
  logits = logits.at[0, 0, 3].set(300.0)  # a probability of 1
  targets = jax.random.randint(keys[1], (3, 7), 0, 513)
  targets = targets.at[0, 0].set(3)
  weights = jax.random.uniform(keys[2], (3, 7)).at[1, 2:].set(0.0)

  def ours(logits):
    sums = losses.cross_entropy(logits, targets, weights)
    return sums.loss + z_weight * sums.z_loss

  def plain(logits):
    loss, z_loss = plain_cross_entropy(logits, targets, weights)
    return loss + z_weight * z_loss

  (value, gradient), (expected, expected_gradient) = (
    jax.jit(jax.value_and_grad(function))(logits) for function in (ours, plain)
  )
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert gradient.dtype == dtype
  np.testing.assert_allclose(
    gradient.astype(jnp.float32),
    expected_gradient.astype(jnp.float32),
    rtol=1e-5 if dtype == jnp.float32 else 2**-7,
    atol=1e-6,
  )


def test_memory_holds_the_logits_and_their_gradient_and_no_more():
  batch, length, width, vocab = 4, 16, 32, 100_000
  targets = jnp.ones((batch, length), jnp.int32)

  def loss(x, kernel):
    logits = layers.untied_logits(x, kernel)
    sums = losses.cross_entropy(logits, targets, targets)
    return sums.loss + sums.z_loss, sums.correct

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  x, kernel = jnp.zeros((batch, length, width)), jnp.zeros((width, vocab))
  memory = gradient.lower(x, kernel).compile().memory_analysis()
  logits_bytes = 4 * batch * length * vocab
  assert memory.temp_size_in_bytes < 2.01 * logits_bytes


def test_integer_weights_are_accepted():
  logits = jnp.zeros((1, 2, 4))
  sums = losses.cross_entropy(
    logits, jnp.array([[1, 2]]), jnp.array([[1, 0]], jnp.int32)
  )
  np.testing.assert_allclose(sums.loss, np.log(4), rtol=1e-6)


STATS = {
  'balance_loss': [1.0, 2.0],
  'second_choice_loss': [3.0, 5.0],
  'z_loss': [10.0, 20.0],
}


def two_stacks(**router):
  router = dataclasses.replace(
    ROUTER,
    **{
      'balance_loss_weight': 0.1,
      'second_choice_loss_weight': 0.5,
      'z_loss_weight': 0.01,
    }
    | router,
  )
  config = tiny_config(router, attention_z_loss_weight=0.25)
  output = make_output(
    encoder=zero_stats(**STATS, num_tokens=[6.0, 6.0]),
    decoder=zero_stats(
      balance_loss=[4.0, 0.0], z_loss=[0.0, 2.0], num_tokens=[4.0, 4.0]
    ),
    attention_z_loss=8.0,
  )
  return output, config


@pytest.mark.parametrize('reduction, divisor', [('sum', 1), ('mean', 4)])
def test_router_losses_over_the_sparse_layers_of_both_stacks(
  reduction, divisor
):
  terms = losses.router_losses(*two_stacks(loss_reduction=reduction))
  expected = {
    'balance_loss': 0.1 * (1 + 2 + 4) / divisor,
    'second_choice_loss': 0.5 * (3 + 5) / divisor,
    'z_loss': 0.01 * (10 + 20 + 2) / divisor,
    'attention_z_loss': 0.25 * 8,
  }
  assert terms.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-6, err_msg=name)


def test_a_dense_model_has_no_router_losses():
  terms = losses.router_losses(make_output(), tiny_config(num_experts=0))
  assert {name: float(value) for name, value in terms.items()} == {
    'balance_loss': 0.0,
    'second_choice_loss': 0.0,
    'z_loss': 0.0,
    'attention_z_loss': 0.0,
  }


def objective(config, output, totals=None):
  targets = jnp.array([[1, 0]])
  weights = jnp.array([[1.0, 0.0]])
  totals = totals or losses.single_batch_totals(output, weights)
  return losses.objective(output, targets, weights, config, totals)


@pytest.mark.parametrize(
  'normalization, tokens', [('real_tokens', 1), ('all_tokens', 2)]
)
def test_loss_normalization(normalization, tokens):
  config = tiny_config(
    num_experts=0, output_z_loss_weight=0.5, loss_normalization=normalization
  )
  result = objective(config, make_output())
  np.testing.assert_allclose(
    result.metrics['cross_entropy'], np.log(4) / tokens, rtol=1e-6
  )
  np.testing.assert_allclose(
    result.metrics['output_z_loss'], 0.5 * np.log(4) ** 2 / tokens, rtol=1e-6
  )
  np.testing.assert_allclose(
    result.loss,
    (np.log(4) + 0.5 * np.log(4) ** 2) / tokens,
    rtol=1e-6,
  )


def test_the_loss_is_the_sum_of_its_terms():
  output, config = two_stacks()
  metrics = objective(config, output).metrics
  terms = [
    'cross_entropy',
    'output_z_loss',
    'balance_loss',
    'second_choice_loss',
    'router_z_loss',
    'attention_z_loss',
  ]
  assert all(metrics[name] > 0 for name in terms)
  np.testing.assert_allclose(
    metrics['loss'], sum(metrics[name] for name in terms), rtol=1e-6
  )
  assert metrics['tokens'] == 10.0
  assert metrics['target_weight'] == 1.0


def test_a_batch_without_real_tokens_has_a_finite_loss():
  config = tiny_config()
  output = make_output(
    encoder=zero_stats(),
    decoder=zero_stats(),
    encoder_tokens=0.0,
    decoder_tokens=0.0,
  )
  weights = jnp.zeros((1, 2))
  totals = losses.single_batch_totals(output, weights)
  result = losses.objective(
    output, jnp.zeros((1, 2), jnp.int32), weights, config, totals
  )
  assert result.loss == 0.0


@pytest.mark.parametrize('normalization', ['real_tokens', 'all_tokens'])
@pytest.mark.parametrize('mask_padding', [True, False])
def test_unequal_microbatches_add_up_to_the_whole_batch(
  normalization, mask_padding
):
  """Two parts with 6 + 2 encoder tokens and 3 + 1 decoder tokens."""
  router = dataclasses.replace(
    ROUTER, mask_padding=mask_padding, second_choice_loss_weight=0.5
  )
  config = tiny_config(
    router, attention_z_loss_weight=0.25, loss_normalization=normalization
  )
  rng = np.random.default_rng(0)
  logits = jnp.array(rng.normal(size=(2, 3, 8)), jnp.float32)
  targets = jnp.array([[1, 2, 3], [4, 0, 0]])
  weights = (targets > 0).astype(jnp.float32)
  encoder_tokens, decoder_tokens = np.array([6.0, 2.0]), np.array([3.0, 1.0])
  balance, z_loss = rng.uniform(size=(2, 2, 2))  # [parts, layers]
  attention = rng.uniform(size=2)

  # Both stacks have 2 layers; decoder blocks have 2 attention layers each.
  queries = 2 * encoder_tokens + 4 * decoder_tokens

  def stats(balance, z_loss, tokens):
    return zero_stats(
      balance_loss=balance,
      second_choice_loss=balance,
      z_loss=z_loss,
      num_tokens=[tokens, tokens],
    )

  def output(rows, balance, encoder_z, decoder_z, attention, enc, dec):
    return make_output(
      logits[rows],
      stats(balance, encoder_z, enc),
      stats(balance, decoder_z, dec),
      attention_z_loss=attention,
      encoder_tokens=enc,
      decoder_tokens=dec,
    )

  def mean(values, weights):
    return np.tensordot(weights / weights.sum(), values, axes=1)

  equal = np.ones(2)
  whole = output(
    slice(None),
    mean(balance, equal),
    mean(z_loss, encoder_tokens if mask_padding else equal),
    mean(z_loss, decoder_tokens if mask_padding else equal),
    mean(attention, queries),
    encoder_tokens.sum(),
    decoder_tokens.sum(),
  )
  totals = losses.single_batch_totals(whole, weights)
  expected = losses.objective(whole, targets, weights, config, totals)

  totals = totals.replace(microbatches=2)
  parts = [
    losses.objective(
      output(
        slice(i, i + 1),
        balance[i],
        z_loss[i],
        z_loss[i],
        attention[i],
        encoder_tokens[i],
        decoder_tokens[i],
      ),
      targets[i : i + 1],
      weights[i : i + 1],
      config,
      totals,
    )
    for i in range(2)
  ]
  np.testing.assert_allclose(
    parts[0].loss + parts[1].loss, expected.loss, rtol=1e-6
  )
  for name, value in expected.metrics.items():
    total = parts[0].metrics[name] + parts[1].metrics[name]
    np.testing.assert_allclose(total, value, rtol=1e-6, err_msg=name)


def test_router_health_over_microbatches():
  """One part has 3 real tokens in layer 0, the other 1; layer 1 has 2 + 2."""
  parts = [
    zero_stats(
      num_tokens=[3.0, 2.0],
      z_loss=[4.0, 4.0],
      balance_loss=[1.0, 1.0],
      max_logit=[5.0, 1.0],
      expert_load=[[1.0, 0, 0, 0], [0, 1.0, 0, 0]],
    ),
    zero_stats(
      num_tokens=[1.0, 2.0],
      z_loss=[8.0, 8.0],
      balance_loss=[3.0, 3.0],
      max_logit=[2.0, 7.0],
      expert_load=[[0, 0, 0, 1.0], [0, 1.0, 0, 0]],
    ),
  ]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
  mean = losses.mean_over_microbatches({'encoder': stacked, 'decoder': None})
  assert mean['decoder'] is None
  stats = mean['encoder']
  assert stats.num_tokens.tolist() == [4.0, 4.0]
  assert stats.z_loss.tolist() == [5.0, 6.0]
  assert stats.balance_loss.tolist() == [2.0, 2.0]
  assert stats.max_logit.tolist() == [5.0, 7.0]
  assert stats.expert_load.tolist() == [[0.75, 0, 0, 0.25], [0, 1.0, 0, 0]]
