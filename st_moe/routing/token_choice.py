"""Tokens choose experts: top-n routing for n = 1, 2, ... (appendices D, G).

Follows Mesh TensorFlow's top_n (moe.py:1710-1929), of which top_2, switch
(without jitter) and switch_max are special cases for 0/1 padding masks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from st_moe import partitioning
from st_moe.config import ChoicePolicy, RouterConfig
from st_moe.errors import UserError
from st_moe.routing.types import Routing

EPSILON = 1e-9  # of the gates' denominator (Mesh TensorFlow moe.py)


@dataclasses.dataclass(frozen=True)
class Choices:
  """What tokens want, before capacity.

  Attributes:
    expert_index: int32 [G, S, K].
    gate: float32 [G, S, K]; 0 for masked tokens.
    wanted: bool [G, S, K], choices that the policy keeps.
    priority: float32 [G, S], probability of the first choice.
  """

  expert_index: jax.Array
  gate: jax.Array
  wanted: jax.Array
  priority: jax.Array


def choose(
  probs: jax.Array,
  mask: jax.Array,
  config: RouterConfig,
  *,
  train: bool,
  rng: jax.Array | None,
) -> Choices:
  """Picks each token's K experts and applies the policy for choices 2..K.

  Args:
    probs: [G, S, E], softmax over experts.
    mask: bool [G, S], tokens that are routed.
    config: the router's settings.
    train: which policy and threshold.
    rng: key of the 'random' policy.

  Raises:
    UserError: for more choices than experts, or 'random' without a key.
  """
  num_choices, num_experts = config.num_choices, probs.shape[-1]
  if num_choices > num_experts:
    raise UserError(
      f'RouterConfig.num_choices {num_choices} exceeds num_experts '
      f'{num_experts}; choose at most as many experts as there are'
    )
  expert_index, gate = _top(probs, num_choices)
  priority = gate[..., 0]
  gate = jnp.where(mask[..., None], gate, 0.0)
  if config.gate_normalization == 'before_drop' and num_choices > 1:
    gate /= gate.sum(axis=-1, keepdims=True) + EPSILON
  if train:
    policy, threshold = (
      config.train_choice_policy,
      config.train_choice_threshold,
    )
  else:
    policy, threshold = config.eval_choice_policy, config.eval_choice_threshold
  others = apply_policy(policy, gate[..., 1:], threshold, rng)
  wanted = jnp.concatenate([jnp.ones_like(mask)[..., None], others], axis=-1)
  return Choices(
    expert_index=expert_index,
    gate=gate,
    wanted=wanted & mask[..., None],
    priority=priority,
  )


def _top(probs: jax.Array, num_choices: int) -> tuple[jax.Array, jax.Array]:
  """Returns the likeliest experts and their probabilities, each [G, S, K].

  One argmax per choice, as in Mesh TensorFlow: the first of equals wins, and
  where only zeros are left the first expert is chosen again, with weight 0.
  """
  indices, gates, rest = [], [], probs
  for _ in range(num_choices):
    index = jnp.argmax(rest, axis=-1).astype(jnp.int32)  # [G, S]
    chosen = jax.nn.one_hot(index, probs.shape[-1])
    indices.append(index)
    gates.append(jnp.sum(rest * chosen, axis=-1))
    rest = rest * (1.0 - chosen)
  return jnp.stack(indices, axis=-1), jnp.stack(gates, axis=-1)


def apply_policy(
  policy: ChoicePolicy, gate: jax.Array, threshold: float, rng: jax.Array | None
) -> jax.Array:
  """Returns which of choices 2..K are kept, bool like `gate` (appendix G).

  'random' keeps one with probability min(1, gate / threshold), by a draw of
  its own for each choice.

  Args:
    policy: 'all', 'none', 'threshold' or 'random'.
    gate: [G, S, K - 1], as normalised before drops.
    threshold: of the gate.
    rng: key for 'random'.

  Raises:
    UserError: for 'random' without a key.
  """
  if policy == 'all' or not gate.shape[-1]:
    return jnp.ones_like(gate, dtype=bool)
  if policy == 'none':
    return jnp.zeros_like(gate, dtype=bool)
  if policy == 'threshold':
    return gate > threshold
  if rng is None:
    raise UserError(
      "RouterConfig: choice policy 'random' needs a 'router' random key; give "
      "one, or set eval_choice_policy to 'threshold'"
    )
  draw = partitioning.uniform(rng, gate.shape, ('group', None, None))
  return draw < gate / threshold


def place(
  choices: Choices, config: RouterConfig, capacity: int, num_experts: int
) -> Routing:
  """Gives choices their slots; those beyond capacity are dropped.

  All first choices come before any second one, and so on. Within a rank
  tokens come by position, or by `priority` (batch-prioritised routing: the
  probability of the first choice orders every rank). A choice of weight zero
  holds its slot but does not travel, as in Mesh TensorFlow.

  Args:
    choices: from `choose`.
    config: the router's settings.
    capacity: C.
    num_experts: E.
  """
  expert_index, wanted = choices.expert_index, choices.wanted
  if config.priority == 'probability':
    key = jax.lax.stop_gradient(-choices.priority)
    order = jnp.argsort(key, axis=1, stable=True)  # [G, S]
    position = _positions(
      _permute(expert_index, order), _permute(wanted, order), num_experts
    )
    position = _permute(position, jnp.argsort(order, axis=1))
  else:
    position = _positions(expert_index, wanted, num_experts)
  kept = wanted & (position < capacity) & (choices.gate > 0)
  gate = jnp.where(kept, choices.gate, 0.0)
  if config.gate_normalization == 'after_drop':
    total = gate.sum(axis=-1, keepdims=True)
    gate /= jnp.where(total > 0, total, 1.0)
  return Routing(
    expert_index=expert_index,
    slot=jnp.where(kept, position, capacity),
    gate=gate,
    kept=kept,
    num_experts=num_experts,
    capacity=capacity,
  )


def _positions(
  expert_index: jax.Array, wanted: jax.Array, num_experts: int
) -> jax.Array:
  """Returns how many earlier wanted choices go to the same expert [G, S, K]."""
  groups, tokens, num_choices = expert_index.shape
  chosen = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.int32)
  chosen *= wanted[..., None]
  # Choice-major: first choices of all tokens, then second choices.
  chosen = chosen.swapaxes(1, 2).reshape(groups, -1, num_experts)
  before = jnp.cumsum(chosen, axis=1) - chosen  # [G, K * S, E]
  position = jnp.sum(before * chosen, axis=-1)
  return position.reshape(groups, num_choices, tokens).swapaxes(1, 2)


def _permute(x: jax.Array, order: jax.Array) -> jax.Array:
  """Returns `x` [G, S, K] with its tokens in `order` [G, S]."""
  return jnp.take_along_axis(x, order[..., None], axis=1)
