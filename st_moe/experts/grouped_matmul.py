"""Products of rows sorted by expert: no padding to a capacity, nothing dropped.

`grouped_matmul` multiplies each expert's rows by that expert's matrix, with a
gradient for rows and weights. XLA's own `ragged_dot` multiplies every row by
every expert on CPU and GPU, and its weight gradient does so on TPU too, so the
FLOPs of the compiled program would grow with the number of experts. Here:

  blocks (CPU, GPU): a loop over the experts that have rows; inside, a loop
    over whole blocks of BLOCK_ROWS rows and the rest in pieces of PIECE_ROWS.
    A piece may reach into the next expert's rows: what it writes there is
    overwritten, since experts come in order, and what it reads there is masked
    in the weight gradient. FLOPs exceed the ideal by less than PIECE_ROWS rows
    per expert.
  megablox (TPU): the Pallas kernels that come with JAX.

Letters: N rows, E experts, I inputs, O outputs of a row.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Form = Literal['blocks', 'megablox']

# Of a CPU's matrix product: blocks long enough to pay for reading a matrix;
# pieces short, since each expert's last one is padded.
BLOCK_ROWS = 128
PIECE_ROWS = 8
# Rows, inputs and outputs of a megablox tile, at most.
TILE = (512, 1024, 1024)


def form_for(platform: str) -> Form:
  """Returns how products are computed on 'cpu', 'gpu' or 'tpu'."""
  return 'megablox' if platform == 'tpu' else 'blocks'


def count_blocks(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns how many whole blocks and pieces cover `rows` rows, like `rows`."""
  blocks = rows // BLOCK_ROWS
  return blocks, -(-(rows - blocks * BLOCK_ROWS) // PIECE_ROWS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
  x: jax.Array, kernel: jax.Array, sizes: jax.Array, form: Form
) -> jax.Array:
  """Multiplies each row by the matrix of its expert.

  Args:
    x: [N, I], rows sorted by expert; those beyond the sum of `sizes` belong to
      none.
    kernel: [E, I, O].
    sizes: int32 [E], rows of each expert.
    form: see `form_for`.

  Returns:
    [N, O] in x's dtype; rows of no expert are unspecified.
  """
  return _product(x, kernel, sizes, form, transpose=False)


def _forward(x, kernel, sizes, form):
  y = _product(x, kernel, sizes, form, transpose=False)
  return y, (x, kernel, sizes)


def _backward(form, residuals, d_y):
  x, kernel, sizes = residuals
  d_x = _product(d_y, kernel, sizes, form, transpose=True)
  d_kernel = _weight_gradient(x, d_y, sizes, form)
  return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _product(
  x: jax.Array, kernel: jax.Array, sizes: jax.Array, form: Form, transpose: bool
) -> jax.Array:
  """Returns rows times matrices, or times their transposes."""
  if form == 'megablox':
    return _megablox_product(x, kernel, sizes, transpose)
  num_rows, padded = x.shape[0], _pad_rows(x, BLOCK_ROWS)
  contract = (((1,), (1 if transpose else 0,)), ((), ()))

  def one_expert(expert, first, rows, y):
    matrix = lax.dynamic_index_in_dim(kernel, expert, keepdims=False)

    def part(length, start, y):
      piece = lax.dynamic_slice_in_dim(padded, start, length)
      product = lax.dot_general(piece, matrix, contract)
      return lax.dynamic_update_slice_in_dim(y, product, start, axis=0)

    blocks, pieces = count_blocks(rows)
    y = lax.fori_loop(
      0, blocks, lambda i, y: part(BLOCK_ROWS, first + i * BLOCK_ROWS, y), y
    )
    first += blocks * BLOCK_ROWS
    return lax.fori_loop(
      0, pieces, lambda i, y: part(PIECE_ROWS, first + i * PIECE_ROWS, y), y
    )

  outputs = kernel.shape[1 if transpose else 2]
  zeros = jnp.zeros((num_rows + BLOCK_ROWS, outputs), x.dtype)
  return _over_used_experts(one_expert, sizes, zeros)[:num_rows]


def _weight_gradient(
  x: jax.Array, d_y: jax.Array, sizes: jax.Array, form: Form
) -> jax.Array:
  """Returns x^T d_y of each expert's rows, [E, I, O]; zeros without rows."""
  if form == 'megablox':
    return _megablox_weight_gradient(x, d_y, sizes)
  inputs, outputs = x.shape[1], d_y.shape[1]
  x, d_y = _pad_rows(x, BLOCK_ROWS), _pad_rows(d_y, BLOCK_ROWS)

  def one_expert(expert, first, rows, d_kernel):
    end = first + rows

    def part(length, start):
      own = (start + jnp.arange(length) < end)[:, None]
      return lax.dot_general(
        jnp.where(own, lax.dynamic_slice_in_dim(x, start, length), 0),
        lax.dynamic_slice_in_dim(d_y, start, length),
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
      )

    # All pieces in one product: its length is one of a few.
    blocks, pieces = count_blocks(rows)
    rest = first + blocks * BLOCK_ROWS
    lengths = range(PIECE_ROWS, BLOCK_ROWS + 1, PIECE_ROWS)
    total = lax.switch(
      pieces,
      [lambda: jnp.zeros((inputs, outputs), jnp.float32)]
      + [functools.partial(part, length, rest) for length in lengths],
    )
    total = lax.fori_loop(
      0,
      blocks,
      lambda i, total: total + part(BLOCK_ROWS, first + i * BLOCK_ROWS),
      total,
    )
    return lax.dynamic_update_index_in_dim(
      d_kernel, total.astype(d_kernel.dtype), expert, axis=0
    )

  zeros = jnp.zeros((len(sizes), inputs, outputs), x.dtype)
  return _over_used_experts(one_expert, sizes, zeros)


def _over_used_experts(
  one_expert: Callable[..., jax.Array], sizes: jax.Array, start: jax.Array
) -> jax.Array:
  """Folds `one_expert(expert, first row, rows, total)` over those with rows."""
  first = jnp.cumsum(sizes) - sizes
  order = jnp.argsort(sizes == 0, stable=True)  # those with rows, in order

  def body(i, total):
    expert = order[i]
    return one_expert(expert, first[expert], sizes[expert], total)

  return lax.fori_loop(0, jnp.sum(sizes > 0), body, start)


def _pad_rows(x: jax.Array, rows: int) -> jax.Array:
  return jnp.pad(x, ((0, rows), (0, 0)))


def _megablox_tile(rows: int, inputs: int, outputs: int) -> tuple[int, ...]:
  sizes = (-(-rows // 128) * 128, inputs, outputs)
  return tuple(min(a, b) for a, b in zip(TILE, sizes, strict=True))


def _megablox_product(x, kernel, sizes, transpose):
  # Imported here: only TPU hosts need Pallas.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  num_rows, inputs = x.shape
  tile = _megablox_tile(num_rows, inputs, kernel.shape[1 if transpose else 2])
  x = _pad_rows(x, -num_rows % tile[0])
  y = gmm(x, kernel, sizes, x.dtype, tile, transpose_rhs=transpose)
  return y[:num_rows]


def _megablox_weight_gradient(x, d_y, sizes):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  tile = _megablox_tile(x.shape[0], x.shape[1], d_y.shape[1])
  padding = -x.shape[0] % tile[0]
  x, d_y = _pad_rows(x, padding), _pad_rows(d_y, padding)
  return tgmm(x.swapaxes(0, 1), d_y, sizes, x.dtype, tile)
