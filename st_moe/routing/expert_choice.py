"""Experts choose tokens: Mesh TensorFlow moe.py:1172-1300.

Each expert takes the C tokens of the group that it wants most. A token may get
no expert or all. Earlier tokens learn from later ones, so encoders only.
"""

import dataclasses

import jax
import jax.numpy as jnp

from st_moe.routing.types import Routing


@dataclasses.dataclass(frozen=True)
class ExpertChoices:
  """What experts take.

  Attributes:
    probs: float32 [G, S, E], each expert's distribution over the tokens.
    taken: bool [G, S, E].
    routing: with K = E, choice k of every token being expert k.
  """

  probs: jax.Array
  taken: jax.Array
  routing: Routing


def choose(logits: jax.Array, mask: jax.Array, capacity: int) -> ExpertChoices:
  """Lets each expert take its C likeliest tokens, the likeliest in slot 0.

  A gate is the probability over the number of experts that took the token.
  Padding is never taken, even if a group holds nothing else (there the
  released code fills the slots with padding).

  Args:
    logits: float32 [G, S, E].
    mask: bool [G, S], tokens that may be taken.
    capacity: C.
  """
  num_experts = logits.shape[-1]
  real = mask[..., None]
  probs = jax.nn.softmax(jnp.where(real, logits, -1e9), axis=1)
  key = jax.lax.stop_gradient(jnp.where(real, -probs, 1.0))
  order = jnp.argsort(key, axis=1, stable=True)
  rank = jnp.argsort(order, axis=1)  # [G, S, E]
  taken = real & (rank < capacity)
  takers = jnp.sum(taken, axis=-1, keepdims=True)  # [G, S, 1]
  gate = jnp.where(taken, probs / jnp.maximum(takers, 1), 0.0)
  kept = gate > 0
  index = jnp.broadcast_to(jnp.arange(num_experts), logits.shape)
  routing = Routing(
    expert_index=index.astype(jnp.int32),
    slot=jnp.where(kept, rank, capacity).astype(jnp.int32),
    gate=gate,
    kept=kept,
    num_experts=num_experts,
    capacity=capacity,
  )
  return ExpertChoices(probs=probs, taken=taken, routing=routing)
