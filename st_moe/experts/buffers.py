"""Buffers of a fixed capacity: two ways to fill and to empty them.

  einsum: products with one-hot tensors [G, S, E, C] (GShard; Mesh TensorFlow,
    moe.py:487-565). The readable reference. Costs 2 S / (3 F) of the FLOPs of
    GEGLU experts, so it suits small groups and matrix units.
  gather: rows are copied by index (index_tables.py).

Both keep the group axis, and no index crosses a group, so that on a mesh
tokens move only in the all-to-all that moe.py asks for.

Letters: G groups, S tokens per group, E experts, C capacity, K choices,
D d_model.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from st_moe.experts.index_tables import (
  IndexTables,
  combine_rows,
  dispatch_rows,
  index_tables,
)
from st_moe.routing import Routing

BufferBackend = Literal['einsum', 'gather']


def dispatch(
  x: jax.Array, routing: Routing, backend: BufferBackend
) -> jax.Array:
  """Copies each token into its slots; empty slots are zero.

  Args:
    x: [G, S, D].
    routing: where tokens go.
    backend: 'einsum' or 'gather'.

  Returns:
    [E, G, C, D], groups placed as in `x`.
  """
  if backend == 'einsum':
    mask = routing.dispatch_mask().astype(x.dtype)
    return jnp.einsum('gsd,gsec->egcd', x, mask)
  buffers = dispatch_rows(x, _slot_tables(routing))  # [G, E * C, D]
  shape = (x.shape[0], routing.num_experts, routing.capacity, x.shape[-1])
  return jnp.moveaxis(buffers.reshape(shape), 1, 0)


def combine(
  y: jax.Array, routing: Routing, backend: BufferBackend
) -> jax.Array:
  """Sums, for each token, its slots weighted by its gates.

  Sums are in float32; einsum rounds the gates to y's dtype first, as the
  released code does.

  Args:
    y: [E, G, C, D], what experts made of the buffers; groups placed as tokens.
    routing: the one given to `dispatch`.
    backend: 'einsum' or 'gather'.

  Returns:
    [G, S, D] in y's dtype; zeros for tokens with no expert.
  """
  if backend == 'einsum':
    weights = routing.combine_weights().astype(y.dtype)
    z = jnp.einsum(
      'egcd,gsec->gsd', y, weights, preferred_element_type=jnp.float32
    )
    return z.astype(y.dtype)
  buffers = jnp.moveaxis(y, 0, 1)  # [G, E, C, D]
  buffers = buffers.reshape(buffers.shape[0], -1, buffers.shape[-1])
  return combine_rows(buffers, routing.gate, _slot_tables(routing))


def _slot_tables(routing: Routing) -> IndexTables:
  """Returns the tables of slots e * C + c."""
  num_slots = routing.num_experts * routing.capacity
  slot = routing.expert_index * routing.capacity + routing.slot
  return index_tables(jnp.where(routing.kept, slot, num_slots), num_slots)
