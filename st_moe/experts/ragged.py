"""The dropless backend: rows sorted by expert, every kept choice computed.

No capacity: a group gives an expert as many rows as choose it, so a token's
output depends on no other token. Rows are sorted by expert (a stable sort of
integers), multiplied by `grouped_matmul`, and summed back by index.

On a mesh each device takes the tokens of its row of the 'expert' axis (an
all-gather), computes the choices of the experts it holds, and the sums travel
back (a reduce-scatter). With MeshConfig.expert = 1 tokens do not move at all.
Buffers have room for the worst case, every choice of those tokens.

Letters: G groups, S tokens per group, E experts, K choices, D d_model, F d_ff.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from st_moe import partitioning
from st_moe.experts.grouped_matmul import form_for, grouped_matmul
from st_moe.experts.index_tables import (
  IndexTables,
  combine_rows,
  dispatch_rows,
  index_tables,
  take,
)
from st_moe.routing import Routing

_TOKENS = ('group', None, None)
WI_AXES = ('expert', 'expert_embed', 'mlp')
WO_AXES = ('expert', 'mlp', 'expert_embed')
BIAS_AXES = ('expert', 'mlp')


@flax.struct.dataclass
class ExpertWeights:
  """Weights of the experts, in the dtype of their arithmetic.

  Attributes:
    wi: one [E, D, F] for each activation.
    wo: [E, F, D].
    bias: [E, F], or None.
  """

  wi: tuple[jax.Array, ...]
  wo: jax.Array
  bias: jax.Array | None

  def axes(self) -> 'ExpertWeights':
    """Returns the logical axes of each weight."""
    return ExpertWeights(
      wi=(WI_AXES,) * len(self.wi),
      wo=WO_AXES,
      bias=None if self.bias is None else BIAS_AXES,
    )


def process_ragged(
  x: jax.Array,
  routing: Routing,
  weights: ExpertWeights,
  hidden_units: Callable[..., jax.Array],
  draw: jax.Array | None = None,
) -> jax.Array:
  """Sends tokens to their experts and back, without a capacity.

  Args:
    x: [G, S, D].
    routing: which choices are kept, with which gates; slots are not read.
    weights: of the experts.
    hidden_units: from products with `wi`, bias and draw, each [rows, F] or
      None, to hidden units [rows, F].
    draw: [G, S, K, F], noise for the hidden units of each choice; None: none.

  Returns:
    [G, S, D] in x's dtype; zeros for tokens with no expert.
  """
  arguments = (
    x,
    routing.expert_index,
    routing.kept,
    routing.gate,
    weights,
    draw,
  )
  axes = (
    ('group', None, 'embed'),
    *(_TOKENS,) * 3,
    weights.axes(),
    None if draw is None else ('group', None, None, 'mlp'),
  )

  def on_device(x, expert_index, kept, gate, weights, draw):
    gathered = [
      partitioning.gather_expert_axis(part)
      for part in (x, expert_index, kept, gate)
    ]
    noise = None if draw is None else partitioning.gather_expert_axis(draw)
    y = _process_rows(*gathered, weights, hidden_units, noise)
    y = partitioning.sum_over_model_axis(y)
    return partitioning.scatter_expert_axis(y).astype(x.dtype)

  return partitioning.on_each_device(
    on_device, arguments, axes, ('group', None, 'embed')
  )


def _process_rows(
  x: jax.Array,
  expert_index: jax.Array,
  kept: jax.Array,
  gate: jax.Array,
  weights: ExpertWeights,
  hidden_units: Callable[..., jax.Array],
  draw: jax.Array | None,
) -> jax.Array:
  """Returns this device's part of the sums, float32 [G, S, D]."""
  groups, tokens, d_model = x.shape
  choices = expert_index.shape[-1]
  num_experts = len(weights.wo)
  expert = expert_index - partitioning.first_expert(num_experts)
  kept &= (expert >= 0) & (expert < num_experts)
  # One group of all tokens: nothing here is bound to routing groups.
  expert = jnp.where(kept, expert, num_experts).reshape(1, -1, choices)
  gate = jnp.where(kept, gate, 0.0).reshape(1, -1, choices)
  tables, sizes = _sort_by_expert(expert, num_experts)
  rows = dispatch_rows(x.reshape(1, -1, d_model), tables)[0]  # [N, D]
  form = form_for(partitioning.platform())

  def product(x, kernel):
    return grouped_matmul(x, kernel, sizes, form)

  bias, noise = weights.bias, None
  if bias is not None:
    of_row = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), 'right')
    bias = bias.at[of_row].get(mode='fill', fill_value=0)
  if draw is not None:
    noise = take(draw.reshape(1, -1, draw.shape[-1]), tables.assignment)[0]
  hidden = hidden_units([product(rows, wi) for wi in weights.wi], bias, noise)
  y = product(hidden, weights.wo)[None]
  return combine_rows(y, gate, tables).astype(jnp.float32).reshape(x.shape)


def _sort_by_expert(
  expert: jax.Array, num_experts: int
) -> tuple[IndexTables, jax.Array]:
  """Returns the row of each choice, and how many rows each expert has.

  Args:
    expert: int32 [1, S, K]; E where the choice is not computed here.
    num_experts: E.
  """
  order = jnp.argsort(expert.ravel(), stable=True)
  row = (
    jnp.zeros_like(order)
    .at[order]
    .set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
  )
  row = jnp.where(expert == num_experts, expert.size, row.reshape(expert.shape))
  ends = jnp.searchsorted(
    expert.ravel()[order], jnp.arange(num_experts), side='right'
  )
  sizes = jnp.diff(ends, prepend=0).astype(jnp.int32)
  return index_tables(row.astype(jnp.int32), expert.size), sizes
