"""What a router decides, and what it says about itself.

`Routing` is the one form that every way of routing returns and every dispatch
backend reads. `RouterStats` holds the losses and the health of one sparse layer
(appendix A, equation 5, and the metrics that Mesh TensorFlow logs), and, where
they are asked for, its `Decisions`, token by token.

Letters: G groups, S tokens per group, E experts, C capacity, K choices.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Routing:
  """Which experts each token goes to, in which slot, with which weight.

  When experts choose tokens the form is the same, with K = E.

  Attributes:
    expert_index: int32 [G, S, K], the expert of each choice.
    slot: int32 [G, S, K], its place in that expert's buffer; `capacity` where
      not kept.
    gate: float32 [G, S, K], weight of the expert's output; 0 where not kept.
    kept: bool [G, S, K], whether the token travels to that expert.
    num_experts: E.
    capacity: C, slots per expert and group.
  """

  expert_index: jax.Array
  slot: jax.Array
  gate: jax.Array
  kept: jax.Array
  num_experts: int = flax.struct.field(pytree_node=False)
  capacity: int = flax.struct.field(pytree_node=False)

  def combine_weights(self) -> jax.Array:
    """Returns the weight of every slot for every token, float32 [G, S, E, C].

    Large (G x S x E x C): for the einsum backend and for reading.
    """
    expert = jax.nn.one_hot(self.expert_index, self.num_experts)
    slot = jax.nn.one_hot(self.slot, self.capacity)  # zeros where not kept
    weighted = self.gate[..., None] * expert  # [G, S, K, E]
    return jnp.sum(weighted[..., :, None] * slot[..., None, :], axis=2)

  def dispatch_mask(self) -> jax.Array:
    """Returns which slot each token is sent to, bool [G, S, E, C]."""
    expert = jax.nn.one_hot(self.expert_index, self.num_experts, dtype=bool)
    slot = jax.nn.one_hot(self.slot, self.capacity, dtype=bool)
    return jnp.any(expert[..., :, None] & slot[..., None, :], axis=2)


@flax.struct.dataclass
class Decisions:
  """What one router decided for every token, for looking at.

  Where experts choose, K = E and a token's experts are in the order of their
  gates, those that did not take it last.

  Attributes:
    expert: int32 [G, S, K], each token's experts, the likeliest first; with
      [batch, length] for [G, S] once the layer hands them on.
    gate: float32 like `expert`, weight of each choice before drops.
    wanted: bool like `expert`, choices that the policy keeps, before capacity;
      padding's too, where it is routed.
    kept: bool like `expert`, those that had a slot.
  """

  expert: jax.Array
  gate: jax.Array
  wanted: jax.Array
  kept: jax.Array


@flax.struct.dataclass
class RouterStats:
  """Losses (raw, without their weights) and health of one sparse layer.

  All float32. Real tokens are those that are not padding, whether or not
  padding is routed.

  Attributes:
    balance_loss: [], load-balancing loss; 1 at uniform routing ('all_choices':
      K; expert choice: 1).
    second_choice_loss: [], the same over second choices (appendix J); 0 where
      there are none.
    z_loss: [], equation 5.
    expert_load: [E], share of all assignments that each expert would get
      without capacity; sums to 1.
    expert_kept: [E], used slots over all slots.
    entropy: [], mean entropy of the router's distribution over experts, nats.
    fraction_dropped: [], share of real tokens that reach no expert.
    mean_gate: [K], mean gate of each choice, before drops.
    max_logit: [], largest router logit of a real token.
    num_tokens: [], real tokens.
    decisions: token by token, where they were asked for; no statistic.
  """

  balance_loss: jax.Array
  second_choice_loss: jax.Array
  z_loss: jax.Array
  expert_load: jax.Array
  expert_kept: jax.Array
  entropy: jax.Array
  fraction_dropped: jax.Array
  mean_gate: jax.Array
  max_logit: jax.Array
  num_tokens: jax.Array
  decisions: Decisions | None = None
