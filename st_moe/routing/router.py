"""From router logits to a `Routing` and its `RouterStats`.

Pure functions; the router's kernel, its inputs and its jitter are in moe.py.
"""

import jax
import jax.numpy as jnp

from st_moe.config import RouterConfig
from st_moe.routing import expert_choice, router_losses, token_choice
from st_moe.routing.types import Decisions, RouterStats, Routing


def route(
  logits: jax.Array,
  mask: jax.Array | None,
  config: RouterConfig,
  *,
  capacity: int,
  train: bool,
  rng: jax.Array | None,
  record: bool = False,
) -> tuple[Routing, RouterStats]:
  """Routes every group of tokens.

  Args:
    logits: float32 [G, S, E].
    mask: bool [G, S], real tokens; None: all are real. With
      `config.mask_padding` only real tokens are routed and enter the losses.
    config: the router's settings.
    capacity: C, slots per expert and group.
    train: training or evaluation settings.
    rng: key of the 'random' policy; not needed by the others.
    record: whether the stats hold the decisions.

  Raises:
    UserError: for more choices than experts, or 'random' without a key.
  """
  logits = logits.astype(jnp.float32)
  real = jnp.ones_like(logits[..., 0], dtype=bool) if mask is None else mask
  routed = real if config.mask_padding else jnp.ones_like(real)
  probs = jax.nn.softmax(logits, axis=-1)
  second = jnp.float32(0.0)
  if config.kind == 'expert_choice':
    taken = expert_choice.choose(logits, routed, capacity)
    routing, wanted, gate = taken.routing, taken.taken, taken.probs
    balance = router_losses.token_balance_loss(taken.probs, routed)
  else:
    choices = token_choice.choose(probs, routed, config, train=train, rng=rng)
    wanted, gate = choices.wanted, choices.gate
    routing = token_choice.place(choices, config, capacity, probs.shape[-1])
    index = choices.expert_index
    balance = router_losses.balance_loss(
      config.balance_loss, probs, index, routed
    )
    if config.num_choices > 1:
      second = router_losses.second_choice_loss(probs, index, routed)
  health = _health(logits, routing, wanted, gate, real)
  stats = RouterStats(
    balance_loss=balance,
    second_choice_loss=second,
    z_loss=router_losses.z_loss(logits, routed),
    decisions=_decisions(config, routing, wanted, gate) if record else None,
    **health,
  )
  return routing, stats


def _decisions(
  config: RouterConfig, routing: Routing, wanted: jax.Array, gate: jax.Array
) -> Decisions:
  """Returns what was decided, each token's likeliest expert first.

  Args:
    config: says who chose.
    routing: after capacity.
    wanted: bool [G, S, K], assignments before capacity.
    gate: float32 [G, S, K], before drops.
  """
  fields = {
    'expert': routing.expert_index,
    'gate': gate,
    'wanted': wanted,
    'kept': routing.kept,
  }
  if config.kind == 'expert_choice':
    order = jnp.argsort(jnp.where(wanted, -gate, 1.0), axis=-1, stable=True)
    fields = {
      name: jnp.take_along_axis(x, order, axis=-1) for name, x in fields.items()
    }
  return Decisions(**fields)


def _health(
  logits: jax.Array,
  routing: Routing,
  wanted: jax.Array,
  gate: jax.Array,
  real: jax.Array,
) -> dict[str, jax.Array]:
  """Returns the fields of RouterStats that are no losses (moe.py:1642-1690).

  Args:
    logits: float32 [G, S, E].
    routing: after capacity.
    wanted: bool [G, S, K], assignments before capacity.
    gate: float32 [G, S, K], before drops.
    real: bool [G, S].
  """
  weight = real.astype(jnp.float32)
  num_tokens = weight.sum()
  at_least_one = jnp.maximum(num_tokens, 1.0)
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)  # [G, S]
  chosen = jax.nn.one_hot(routing.expert_index, routing.num_experts)
  assigned = (wanted & real[..., None]).astype(jnp.float32)
  load = jnp.sum(chosen * assigned[..., None], axis=(0, 1, 2))  # [E]
  used = jnp.sum(chosen * routing.kept[..., None], axis=(0, 1, 2))  # [E]
  dropped = real & ~routing.kept.any(axis=-1)
  largest = jnp.max(jnp.where(real[..., None], logits, -jnp.inf))
  return {
    'expert_load': load / jnp.maximum(load.sum(), 1.0),
    'expert_kept': used / (logits.shape[0] * routing.capacity),
    'entropy': jnp.sum(entropy * weight) / at_least_one,
    'fraction_dropped': dropped.sum() / at_least_one,
    'mean_gate': jnp.sum(gate * weight[..., None], axis=(0, 1)) / at_least_one,
    'max_logit': jnp.where(num_tokens > 0, largest, 0.0),
    'num_tokens': num_tokens,
  }
