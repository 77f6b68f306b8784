"""Auxiliary losses of a router, raw: no weight is applied here.

Load balancing (appendix A, equations 7-9) in the forms that released code
uses, the second-choice loss of appendix J, and the router z-loss (equation 5).
All use the choices before policy and capacity; gradients flow through the
probabilities only. Means over a group divide by S, padding included, as Mesh
TensorFlow does, so padding lowers a balance loss.
"""

from typing import Literal

import jax
import jax.numpy as jnp


def balance_loss(
  form: Literal['first_choice', 'switch', 'all_choices'],
  probs: jax.Array,
  expert_index: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  """Returns the mean over groups of E * sum_e f_e P_e.

  'first_choice': f and P over first choices of unmasked tokens (Mesh
  TensorFlow top_2 and top_n, moe.py:1557, 1806). 'switch': f and P over every
  token, the product scaled by the unmasked share of the group; a quirk of the
  released Switch code (moe.py:1357). 'all_choices': a token counts once for
  each of its experts, so uniform routing gives K (flaxformer).

  Args:
    form: see above.
    probs: [G, S, E].
    expert_index: int32 [G, S, K].
    mask: bool [G, S], tokens that are routed.
  """
  num_experts = probs.shape[-1]
  weight = mask.astype(jnp.float32)  # [G, S]
  if form == 'all_choices':
    counted = jax.nn.one_hot(expert_index, num_experts).max(axis=2)
  else:
    counted = jax.nn.one_hot(expert_index[..., 0], num_experts)  # [G, S, E]
  scale = jnp.float32(1.0)
  if form == 'switch':
    scale = weight.mean(axis=1, keepdims=True)  # [G, 1]
  else:
    counted = counted * weight[..., None]
    probs = probs * weight[..., None]
  density, proxy = counted.mean(axis=1), probs.mean(axis=1)  # [G, E]
  return jnp.mean(scale * density * proxy) * num_experts**2


def second_choice_loss(
  probs: jax.Array, expert_index: jax.Array, mask: jax.Array
) -> jax.Array:
  """Returns the balance loss of second choices, before Mesh's factor 0.5.

  P is the router's distribution without the first choice, renormalised. As in
  Mesh TensorFlow's top_2 (moe.py:1563), masked tokens keep their whole
  distribution in P. Its top_n reads third choices instead, a defect that is
  not followed.

  Args:
    probs: [G, S, E].
    expert_index: int32 [G, S, K], K >= 2.
    mask: bool [G, S].
  """
  num_experts = probs.shape[-1]
  weight = mask.astype(jnp.float32)[..., None]
  first = jax.nn.one_hot(expert_index[..., 0], num_experts) * weight
  second = jax.nn.one_hot(expert_index[..., 1], num_experts) * weight
  rest = probs * (1.0 - first)
  rest /= rest.sum(axis=-1, keepdims=True) + 1e-9
  return jnp.mean(rest.mean(axis=1) * second.mean(axis=1)) * num_experts**2


def token_balance_loss(probs: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the balance loss of expert choice (moe.py:1172).

  Experts are balanced by construction; this one spreads their choices over
  the tokens: (mean over experts of p)^2, times the unmasked tokens of the
  group, averaged and times S. 1 when all tokens are equally wanted.

  Args:
    probs: [G, S, E], each expert's distribution over the tokens of a group.
    mask: bool [G, S].
  """
  weight = mask.astype(jnp.float32)
  wanted = probs.mean(axis=-1) * weight  # [G, S]
  real = weight.sum(axis=1, keepdims=True)  # [G, 1]
  return jnp.mean(wanted**2 * real) * probs.shape[1]


def z_loss(logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the mean of logsumexp(logits)^2 over unmasked tokens (equation 5).

  Over the whole batch, not per group (moe.py:1956); 0 without tokens.

  Args:
    logits: float32 [G, S, E].
    mask: bool [G, S].
  """
  weight = mask.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  return jnp.sum(log_z**2 * weight) / jnp.maximum(weight.sum(), 1.0)
