"""How tokens travel to experts and back: the backends, proven equal.

`dispatch` fills the experts' buffers, `combine` sums what experts return, each
with one of two backends over the same `Routing`:

  einsum: products with one-hot tensors [G, S, E, C] (GShard; Mesh TensorFlow,
    moe.py:487-565). The readable reference. Costs 2 S / (3 F) of the FLOPs of
    GEGLU experts, so it suits small groups and matrix units.
  gather: rows are copied by index. Two integer tables per group, one for each
    direction, make both operations and all their gradients gathers of rows;
    nothing is scattered but one table of integers.

Both keep the group axis, and no index crosses a group, so that on a mesh
tokens move only in the all-to-all that moe.py asks for.

Letters: G groups, S tokens per group, E experts, C capacity, K choices,
D d_model, F d_ff.
"""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from st_moe.routing import Routing

BackendName = Literal['einsum', 'gather']

# On TPU einsum is chosen while it costs less than about 10% of the experts:
# 2 S / (3 F) < 0.1.
EINSUM_GROUP_PER_D_FF = 0.15


@dataclasses.dataclass(frozen=True)
class Backend:
  """A backend and, for the run log, why it was chosen."""

  name: BackendName
  reason: str


def choose_backend(
  requested: Literal['auto', 'einsum', 'gather'],
  *,
  platform: str,
  group_tokens: int,
  d_ff: int,
) -> Backend:
  """Returns the backend to use.

  Args:
    requested: `ModelConfig.dispatch`.
    platform: 'cpu', 'gpu' or 'tpu'.
    group_tokens: S.
    d_ff: F, of one expert.
  """
  if requested != 'auto':
    return Backend(requested, 'as configured')
  if platform != 'tpu':
    return Backend('gather', f'row gathers are the fastest form on {platform}')
  limit = EINSUM_GROUP_PER_D_FF * d_ff
  sizes = f'{group_tokens} tokens per group, limit {limit:g} = 0.15 d_ff'
  if group_tokens <= limit:
    return Backend('einsum', f'small groups on tpu ({sizes})')
  return Backend('gather', f'large groups on tpu ({sizes})')


def dispatch(x: jax.Array, routing: Routing, backend: BackendName) -> jax.Array:
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
  buffers = _dispatch_rows(x, _index_tables(routing))  # [G, E * C, D]
  return jnp.moveaxis(
    buffers.reshape(
      x.shape[0], routing.num_experts, routing.capacity, x.shape[-1]
    ),
    1,
    0,
  )


def combine(y: jax.Array, routing: Routing, backend: BackendName) -> jax.Array:
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
  return _combine_rows(buffers, routing.gate, _index_tables(routing))


@flax.struct.dataclass
class IndexTables:
  """Both directions between assignments and slots, within each group.

  Attributes:
    slot: int32 [G, S, K], e * C + c of each assignment; E * C if dropped.
    assignment: int32 [G, E * C], s * K + k of each slot; S * K if empty.
  """

  slot: jax.Array
  assignment: jax.Array

  def token(self) -> jax.Array:
    """Returns the token of each slot, int32 [G, E * C]; S if empty."""
    return self.assignment // self.slot.shape[-1]


def _index_tables(routing: Routing) -> IndexTables:
  num_slots = routing.num_experts * routing.capacity
  slot = routing.expert_index * routing.capacity + routing.slot
  slot = jnp.where(routing.kept, slot, num_slots)  # [G, S, K]

  def invert(slot):  # [S, K] -> [E * C]
    empty = jnp.full((num_slots,), slot.size, jnp.int32)
    # Dropped assignments point beyond the table and are not written.
    return empty.at[slot.ravel()].set(
      jnp.arange(slot.size, dtype=jnp.int32), mode='drop'
    )

  return IndexTables(slot=slot, assignment=jax.vmap(invert)(slot))


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
  """Returns rows [G, N, ...] at index [G, ...]; zeros where index is N."""
  return jax.vmap(lambda r, i: r.at[i].get(mode='fill', fill_value=0))(
    rows, index
  )


@jax.custom_vjp
def _dispatch_rows(x: jax.Array, tables: IndexTables) -> jax.Array:
  """x [G, S, D] -> buffers [G, E * C, D]."""
  return _take(x, tables.token())


def _dispatch_rows_forward(x, tables):
  return _dispatch_rows(x, tables), tables


def _dispatch_rows_backward(tables, d_buffers):
  rows = _take(d_buffers, tables.slot)  # [G, S, K, D]
  d_x = jnp.sum(rows.astype(jnp.float32), axis=2)
  return d_x.astype(d_buffers.dtype), None


_dispatch_rows.defvjp(_dispatch_rows_forward, _dispatch_rows_backward)


@jax.custom_vjp
def _combine_rows(
  buffers: jax.Array, gate: jax.Array, tables: IndexTables
) -> jax.Array:
  """buffers [G, E * C, D], gate [G, S, K] -> [G, S, D]."""
  rows = _take(buffers, tables.slot).astype(jnp.float32)  # [G, S, K, D]
  return jnp.sum(gate[..., None] * rows, axis=2).astype(buffers.dtype)


def _combine_rows_forward(buffers, gate, tables):
  return _combine_rows(buffers, gate, tables), (buffers, gate, tables)


def _combine_rows_backward(residuals, d_y):
  buffers, gate, tables = residuals
  flat_gate = gate.reshape(gate.shape[0], -1)  # [G, S * K]
  slot_gate = _take(flat_gate, tables.assignment)  # [G, E * C]
  slot_d_y = _take(d_y, tables.token()).astype(jnp.float32)
  d_buffers = (slot_gate[..., None] * slot_d_y).astype(buffers.dtype)
  rows = _take(buffers, tables.slot).astype(jnp.float32)  # [G, S, K, D]
  d_gate = jnp.sum(rows * d_y[:, :, None].astype(jnp.float32), axis=-1)
  return d_buffers, d_gate, None


_combine_rows.defvjp(_combine_rows_forward, _combine_rows_backward)
