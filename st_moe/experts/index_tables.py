"""Rows copied by index: dispatch, combine, and their gradients as gathers.

Two integer tables per group, one for each direction between assignments (a
token and one of its choices) and slots (rows at the experts), make both moves
and all their gradients gathers of rows; nothing is scattered but one table of
integers. Indices never cross a group.

Letters: G groups, S tokens per group, K choices, N slots of a group, D d_model.
"""

import flax.struct
import jax
import jax.numpy as jnp

MAX_UNROLLED_CHOICES = 8


@flax.struct.dataclass
class IndexTables:
  """Both directions between assignments and slots, within each group.

  Attributes:
    slot: int32 [G, S, K], the slot of each assignment; N if dropped.
    assignment: int32 [G, N], s * K + k of each slot; S * K if empty.
  """

  slot: jax.Array
  assignment: jax.Array

  def token(self) -> jax.Array:
    """Returns the token of each slot, int32 [G, N]; S if empty."""
    return self.assignment // self.slot.shape[-1]


def index_tables(slot: jax.Array, num_slots: int) -> IndexTables:
  """Inverts `slot`, int32 [G, S, K]; num_slots N where dropped."""

  def invert(slot):  # [S, K] -> [N]
    empty = jnp.full((num_slots,), slot.size, jnp.int32)
    # Dropped assignments point beyond the table and are not written.
    return empty.at[slot.ravel()].set(
      jnp.arange(slot.size, dtype=jnp.int32), mode='drop'
    )

  return IndexTables(slot=slot, assignment=jax.vmap(invert)(slot))


def take(rows: jax.Array, index: jax.Array) -> jax.Array:
  """Returns rows [G, N, ...] at index [G, ...]; zeros where index is N."""
  return jax.vmap(lambda r, i: r.at[i].get(mode='fill', fill_value=0))(
    rows, index
  )


def _sum_choices(
  rows: jax.Array, slot: jax.Array, gate: jax.Array | None
) -> jax.Array:
  """Returns sums over choices of (weighted) rows [G, N, D], float32 [G, S, D].

  Choice by choice, so that the compiler fuses gathers into the sum; together
  where there are many (experts that choose tokens have K = E).
  """
  if slot.shape[-1] > MAX_UNROLLED_CHOICES:
    taken = take(rows, slot).astype(jnp.float32)  # [G, S, K, D]
    return jnp.sum(taken if gate is None else gate[..., None] * taken, axis=2)
  total = jnp.zeros((), jnp.float32)
  for k in range(slot.shape[-1]):
    taken = take(rows, slot[..., k]).astype(jnp.float32)  # [G, S, D]
    total += taken if gate is None else gate[..., k, None] * taken
  return total


@jax.custom_vjp
def dispatch_rows(x: jax.Array, tables: IndexTables) -> jax.Array:
  """Copies tokens x [G, S, D] to their slots [G, N, D]; zeros where empty."""
  return take(x, tables.token())


def _dispatch_rows_forward(x, tables):
  return dispatch_rows(x, tables), tables


def _dispatch_rows_backward(tables, d_rows):
  return _sum_choices(d_rows, tables.slot, None).astype(d_rows.dtype), None


dispatch_rows.defvjp(_dispatch_rows_forward, _dispatch_rows_backward)


@jax.custom_vjp
def combine_rows(
  rows: jax.Array, gate: jax.Array, tables: IndexTables
) -> jax.Array:
  """Sums each token's slots, weighted by its gates, in float32.

  Args:
    rows: [G, N, D]; empty slots are not read.
    gate: float32 [G, S, K].
    tables: of the same routing.

  Returns:
    [G, S, D] in the dtype of `rows`.
  """
  return _sum_choices(rows, tables.slot, gate).astype(rows.dtype)


def _combine_rows_forward(rows, gate, tables):
  return combine_rows(rows, gate, tables), (rows, gate, tables)


def _combine_rows_backward(residuals, d_y):
  rows, gate, tables = residuals
  flat_gate = gate.reshape(gate.shape[0], -1)  # [G, S * K]
  slot_gate = take(flat_gate, tables.assignment)  # [G, N]
  slot_d_y = take(d_y, tables.token()).astype(jnp.float32)
  d_rows = (slot_gate[..., None] * slot_d_y).astype(rows.dtype)
  # At the slots, where both factors are at hand; then only numbers travel.
  d_slot_gate = jnp.sum(rows.astype(jnp.float32) * slot_d_y, axis=-1)
  return d_rows, take(d_slot_gate, tables.slot), None


combine_rows.defvjp(_combine_rows_forward, _combine_rows_backward)
