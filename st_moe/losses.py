"""The objective: cross entropy, z-losses and router losses, with weights.

ST-MoE equation 6: L_tot = L_CE + c_B * L_B + c_z * L_z, where L_B (appendix A)
and L_z (equation 5) are added up over the sparse layers. Beside it stand T5's
z-loss on the output softmax and footnote 4's z-loss on attention logits.

Every mean is taken with a denominator of the whole batch (`BatchTotals`), so
that the objectives of the microbatches of a batch add up to the objective of
the batch, and so do their gradients.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from st_moe.config import ModelConfig
from st_moe.routing import RouterStats


@flax.struct.dataclass
class ModelOutput:
  """What a forward pass hands to the objective.

  Attributes:
    logits: float32 [batch, target length, vocab].
    encoder: RouterStats of the encoder, each field with a leading axis of
      sparse layers in depth order; None without sparse layers.
    decoder: as `encoder`, of the decoder.
    attention_z_loss: [] mean of logsumexp(attention logits)^2 over real query
      positions, heads and attention layers; 0 when its weight is 0.
    encoder_tokens: [] real encoder tokens.
    decoder_tokens: [] real decoder tokens.
  """

  logits: jax.Array
  encoder: RouterStats | None
  decoder: RouterStats | None
  attention_z_loss: jax.Array
  encoder_tokens: jax.Array
  decoder_tokens: jax.Array


@flax.struct.dataclass
class CrossEntropy:
  """Sums over target positions, float32 scalars.

  Attributes:
    loss: weighted sum of -log softmax(logits)[target], in nats.
    z_loss: weighted sum of logsumexp(logits)^2.
    weight: sum of the weights.
    correct: weighted count of targets with the highest logit.
  """

  loss: jax.Array
  z_loss: jax.Array
  weight: jax.Array
  correct: jax.Array


@flax.struct.dataclass
class BatchTotals:
  """Denominators of the whole batch, counted before it is split.

  Attributes:
    target_weight: [] sum of the loss weights.
    encoder_tokens: [] real encoder tokens.
    decoder_tokens: [] real decoder tokens.
    microbatches: in how many equal parts the batch is processed.
  """

  target_weight: jax.Array
  encoder_tokens: jax.Array
  decoder_tokens: jax.Array
  microbatches: int = flax.struct.field(pytree_node=False, default=1)


@flax.struct.dataclass
class Objective:
  """A (micro)batch's part of the objective.

  Attributes:
    loss: [] what is differentiated.
    metrics: float32 scalars that add up over the microbatches of a batch: the
      weighted terms of the loss, 'accuracy', 'target_weight' and 'tokens'.
  """

  loss: jax.Array
  metrics: dict[str, jax.Array]


@jax.custom_vjp
def _token_losses(
  logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns -log softmax(logits)[target] and logsumexp, [batch, length] each.

  Its backward pass makes probabilities from the logits once more, where
  differentiating logsumexp would keep a second float32 array of their size; the
  gradient can take the place of the logits.

  Args:
    logits: float32 [batch, length, vocab].
    targets: int [batch, length].
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # A comparison, not a gather: the vocabulary axis may be sharded.
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  return log_z - target_logits, log_z


def _token_losses_forward(logits, targets):
  losses, log_z = _token_losses(logits, targets)
  return (losses, log_z), (logits, targets, log_z)


def _token_losses_backward(residuals, gradients):
  logits, targets, log_z = residuals
  d_loss, d_log_z = gradients
  probs = jnp.exp(logits - log_z[..., None])
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  d_logits = (d_loss + d_log_z)[..., None] * probs
  return d_logits - jnp.where(is_target, d_loss[..., None], 0.0), None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def log_likelihoods(
  logits: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
  """Returns the log-likelihood of each sequence in nats, float32 [batch].

  Args:
    logits: [batch, length, vocab]; the vocabulary may be sharded.
    targets: int [batch, length].
    weights: [batch, length], 0 at padding.
  """
  token_losses, _ = _token_losses(logits.astype(jnp.float32), targets)
  return -jnp.sum(token_losses * weights, axis=-1)


def cross_entropy(
  logits: jax.Array, targets: jax.Array, weights: jax.Array
) -> CrossEntropy:
  """Returns weighted sums over all positions.

  Args:
    logits: [batch, length, vocab]; the vocabulary may be sharded.
    targets: int [batch, length].
    weights: [batch, length], 0 at padding.
  """
  logits = logits.astype(jnp.float32)  # it goes into an exponential
  weights = weights.astype(jnp.float32)
  token_losses, log_z = _token_losses(logits, targets)
  correct = jnp.argmax(logits, axis=-1) == targets
  return CrossEntropy(
    loss=jnp.sum(weights * token_losses),
    z_loss=jnp.sum(weights * jnp.square(log_z)),
    weight=jnp.sum(weights),
    correct=jnp.sum(weights * correct),
  )


def single_batch_totals(output: ModelOutput, weights: jax.Array) -> BatchTotals:
  """Returns the totals of a batch that is processed in one part."""
  return BatchTotals(
    target_weight=jnp.sum(weights.astype(jnp.float32)),
    encoder_tokens=output.encoder_tokens,
    decoder_tokens=output.decoder_tokens,
    microbatches=1,
  )


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
  """Returns the weight of a part's mean in the mean over the whole."""
  return part / jnp.maximum(whole, 1.0)


def attention_queries(
  config: ModelConfig, encoder_tokens: jax.Array, decoder_tokens: jax.Array
) -> jax.Array:
  """Counts real queries over attention layers; decoder blocks have two."""
  return (
    config.num_encoder_layers * encoder_tokens
    + 2 * config.num_decoder_layers * decoder_tokens
  )


def router_losses(
  output: ModelOutput, config: ModelConfig, totals: BatchTotals | None = None
) -> dict[str, jax.Array]:
  """Returns the weighted auxiliary losses of a (micro)batch.

  Router losses are summed over the sparse layers of both stacks (Mesh
  TensorFlow, the paper) or averaged over them (T5X), as each router's
  `loss_reduction` says. Balance losses are means over groups, of which each
  microbatch has the same number; z-losses are means over tokens.

  Args:
    output: of the model.
    config: gives the weights.
    totals: of the whole batch; None when `output` is the whole batch.

  Returns:
    'balance_loss', 'second_choice_loss', 'z_loss' (router) and
    'attention_z_loss'.
  """
  zero = jnp.zeros((), jnp.float32)
  losses = {'balance_loss': zero, 'second_choice_loss': zero, 'z_loss': zero}
  stacks = (
    (output.encoder, config.encoder_router, 'encoder_tokens'),
    (output.decoder, config.decoder_router, 'decoder_tokens'),
  )
  sparse_layers = sum(
    stats.z_loss.shape[0] for stats, _, _ in stacks if stats is not None
  )
  microbatches = 1 if totals is None else totals.microbatches
  for stats, router, tokens in stacks:
    if stats is None:
      continue
    scale = 1.0 if router.loss_reduction == 'sum' else 1.0 / sparse_layers
    # Without a padding mask every token counts: parts are equal.
    token_share = 1.0 / microbatches
    if totals is not None and router.mask_padding:
      token_share = _share(stats.num_tokens, getattr(totals, tokens))
    losses['balance_loss'] += (
      router.balance_loss_weight
      * (scale / microbatches)
      * jnp.sum(stats.balance_loss)
    )
    losses['second_choice_loss'] += (
      router.second_choice_loss_weight
      * (scale / microbatches)
      * jnp.sum(stats.second_choice_loss)
    )
    losses['z_loss'] += (
      router.z_loss_weight * scale * jnp.sum(token_share * stats.z_loss)
    )
  attention_share = 1.0
  if totals is not None:
    attention_share = _share(
      attention_queries(config, output.encoder_tokens, output.decoder_tokens),
      attention_queries(config, totals.encoder_tokens, totals.decoder_tokens),
    )
  losses['attention_z_loss'] = (
    config.attention_z_loss_weight * attention_share * output.attention_z_loss
  )
  return losses


def objective(
  output: ModelOutput,
  targets: jax.Array,
  weights: jax.Array,
  config: ModelConfig,
  totals: BatchTotals,
) -> Objective:
  """Returns a (micro)batch's part of the objective of the whole batch.

  Args:
    output: of the model on this part.
    targets: int [batch, length] of this part.
    weights: [batch, length] of this part.
    config: gives weights and `loss_normalization`.
    totals: of the whole batch.
  """
  sums = cross_entropy(output.logits, targets, weights)
  if config.loss_normalization == 'real_tokens':
    normalizer = jnp.maximum(totals.target_weight, 1.0)
  else:
    normalizer = float(targets.size * totals.microbatches)
  losses = router_losses(output, config, totals)
  terms = {
    'cross_entropy': sums.loss / normalizer,
    'output_z_loss': config.output_z_loss_weight * sums.z_loss / normalizer,
    'balance_loss': losses['balance_loss'],
    'second_choice_loss': losses['second_choice_loss'],
    'router_z_loss': losses['z_loss'],
    'attention_z_loss': losses['attention_z_loss'],
  }
  loss = sum(terms.values())
  metrics = {
    'loss': loss,
    **terms,
    'accuracy': _share(sums.correct, totals.target_weight),
    'target_weight': sums.weight,
    'tokens': output.encoder_tokens + output.decoder_tokens,
  }
  return Objective(loss=loss, metrics=metrics)


def _mean_stats(stats: RouterStats) -> RouterStats:
  """Reduces the leading microbatch axis of one stack's router statistics."""
  tokens = stats.num_tokens  # [microbatches, layers]
  share = tokens / jnp.maximum(jnp.sum(tokens, axis=0), 1.0)

  def over_tokens(x: jax.Array) -> jax.Array:
    weight = share.reshape(share.shape + (1,) * (x.ndim - share.ndim))
    return jnp.sum(weight * x, axis=0)

  return RouterStats(
    balance_loss=jnp.mean(stats.balance_loss, axis=0),
    second_choice_loss=jnp.mean(stats.second_choice_loss, axis=0),
    z_loss=over_tokens(stats.z_loss),
    expert_load=over_tokens(stats.expert_load),
    expert_kept=jnp.mean(stats.expert_kept, axis=0),
    entropy=over_tokens(stats.entropy),
    fraction_dropped=over_tokens(stats.fraction_dropped),
    mean_gate=over_tokens(stats.mean_gate),
    max_logit=jnp.max(stats.max_logit, axis=0),
    num_tokens=jnp.sum(tokens, axis=0),
  )


def mean_over_microbatches(router: Any) -> Any:
  """Reduces the leading microbatch axis of every RouterStats in a tree.

  Means over tokens are weighted by real tokens, means over groups are plain,
  `max_logit` is the largest and `num_tokens` the sum.
  """
  return jax.tree.map(
    _mean_stats, router, is_leaf=lambda x: isinstance(x, RouterStats)
  )
