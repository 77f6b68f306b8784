"""The words with which layers say where data moves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from st_moe.partitioning.mesh import (
  COMPUTE_RULES,
  batch_shards,
  check_divisible,
  current,
  gradient_rules,
  is_explicit,
  spec,
)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
  """Places `x` by its logical axes; here the data moves.

  Raises:
    UserError: when a dimension does not divide over its mesh axes.
  """
  return place(x, names, COMPUTE_RULES)


def place(
  x: jax.Array, names: Sequence[str | None], rules: dict[str, Any]
) -> jax.Array:
  mesh = current()
  if mesh is None:
    return x
  check_divisible(x.shape, names, rules, mesh)
  if is_explicit(mesh):
    return jax.sharding.reshard(x, spec(names, rules))
  return jax.lax.with_sharding_constraint(x, spec(names, rules))


def einsum(
  equation: str,
  *operands: jax.Array,
  out: Sequence[str | None] | None = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """`jnp.einsum` whose result is placed by logical axes `out`.

  Needed wherever a contracted axis is sharded: the partial sums are added
  across devices into that placement.
  """
  mesh = current()
  if mesh is not None and out is not None and is_explicit(mesh):
    return jnp.einsum(
      equation,
      *operands,
      preferred_element_type=preferred_element_type,
      out_sharding=spec(out),
    )
  y = jnp.einsum(
    equation, *operands, preferred_element_type=preferred_element_type
  )
  return y if out is None else shard(y, *out)


def reshape(
  x: jax.Array, shape: Sequence[int], names: Sequence[str | None]
) -> jax.Array:
  """Row-major reshape whose result is placed by logical axes `names`."""
  mesh = current()
  if mesh is not None and is_explicit(mesh):
    check_divisible(shape, names, mesh=mesh)
    return jax.lax.reshape(x, tuple(shape), out_sharding=spec(names))
  return shard(x.reshape(tuple(shape)), *names)


def project(
  x: jax.Array,
  kernel: jax.Array,
  names: tuple[str, str],
  *,
  transpose: bool = False,
  preferred_element_type: Any = None,
) -> jax.Array:
  """Multiplies every position by a matrix; partial sums are added up.

  Batch and length go as one axis of rows: with two, XLA:CPU transposes a whole
  operand for the kernel's gradient.

  Args:
    x: [batch, length, I].
    kernel: [I, O]; [O, I] if transposed.
    names: logical axes of I and O.
    transpose: whether the kernel is.
    preferred_element_type: of the result; None: x's.

  Returns:
    [batch, length, O].
  """
  batch, length, inputs = x.shape
  rows = reshape(x, (batch * length, inputs), ('batch', names[0]))
  y = einsum(
    'ni,oi->no' if transpose else 'ni,io->no',
    rows,
    kernel,
    out=('batch', names[1]),
    preferred_element_type=preferred_element_type,
  )
  shape = (batch, length, y.shape[-1])
  return reshape(y, shape, ('batch', 'length', names[1]))


def multiply_experts(
  x: jax.Array,
  kernel: jax.Array,
  axes: tuple[str, str, str],
  *,
  out: Sequence[str | None] | None = None,
) -> jax.Array:
  """Multiplies the rows of each expert by its matrix.

  Args:
    x: [E, N, I], rows by ('expert', 'expert_group', .).
    kernel: [E, I, O].
    axes: logical axes of the kernel.
    out: of the result, where partial sums have to be added up.

  Returns:
    [E, N, O].
  """
  mesh = current()
  in_parts = gradient_rules.get()['expert_embed'] is not None
  if mesh is None or is_explicit(mesh) or not in_parts:
    return einsum('eni,eio->eno', x, kernel, out=out)
  return _multiply_experts(x, kernel, axes, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _multiply_experts(x, kernel, axes, out):
  """The same, where kernels are stored in parts over 'data' (and 'slice').

  The kernel's gradient is added up by hand: of few rows, as a decoder's are,
  XLA's partitioner has every device add up and hold all of it.
  """
  return einsum('eni,eio->eno', x, kernel, out=out)


def _multiply_experts_forward(x, kernel, axes, out):
  return _multiply_experts(x, kernel, axes, out), (x, kernel)


def _multiply_experts_backward(axes, out, saved, g):
  x, kernel = saved
  expert, inputs, outputs = axes
  rows = (expert, 'expert_group')
  rules = gradient_rules.get()
  gradient = jax.shard_map(
    functools.partial(
      _scatter_kernel_gradient,
      axes=axes,
      across='slice' in rules['expert_embed'],
    ),
    in_specs=(spec((*rows, inputs)), spec((*rows, outputs))),
    out_specs=spec(axes, rules),
    check_vma=False,
  )(shard(x, *rows, inputs), shard(g, *rows, outputs))
  return einsum('eno,eio->eni', g, kernel, out=(*rows, inputs)), gradient


def _scatter_kernel_gradient(
  x: jax.Array, g: jax.Array, *, axes: tuple[str, str, str], across: bool
) -> jax.Array:
  """Returns this device's part of a kernel's gradient.

  Added up within a slice first, then between slices.

  Args:
    x: [E, N, I], the rows of this device.
    g: [E, N, O], gradients of their products.
    axes: of the kernel, of which 'expert_embed' lies in parts on 'data'.
    across: whether each of them lies in parts on 'slice'.
  """
  cut_inputs = axes[1] == 'expert_embed'
  width = (x if cut_inputs else g).shape[2] // jax.lax.axis_size('data')

  def share(part: jax.Array) -> jax.Array:
    def cut(rows):
      return jax.lax.dynamic_slice_in_dim(rows, part * width, width, axis=2)

    return jnp.einsum(
      'eni,eno->eio',
      cut(x) if cut_inputs else x,
      g if cut_inputs else cut(g),
      preferred_element_type=jnp.float32,
    )

  total = _add_up_on_ring(share, 'data', x.dtype)
  slices = jax.lax.axis_size('slice')
  if not across:
    return total if slices == 1 else jax.lax.psum(total, 'slice')
  axis = 1 if cut_inputs else 2
  size = total.shape[axis] // slices

  def share_of_slice(part: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(total, part * size, size, axis)

  return _add_up_on_ring(share_of_slice, 'slice', x.dtype)


def _add_up_on_ring(
  share: Callable[[jax.Array], jax.Array], mesh_axis: str, dtype: Any
) -> jax.Array:
  """Returns this device's part of a sum over the devices of an axis.

  A part goes once round them, and each adds its share, which it computes when
  the part arrives: nobody ever holds a whole sum. (XLA for TPU turns
  `psum_scatter` into an all-reduce where the devices of an axis are not
  numbered one after another.)

  Args:
    share: makes this device's share of a part, given its number.
    mesh_axis: the ring; there are as many parts.
    dtype: in which parts are sent.
  """
  count = jax.lax.axis_size(mesh_axis)
  here = jax.lax.axis_index(mesh_axis)

  def pass_on(step: int, total: jax.Array) -> jax.Array:
    total = jax.lax.ppermute(
      total, mesh_axis, [(i, (i + 1) % count) for i in range(count)]
    )
    mine = share((here + count - 1 - step) % count)
    return (total.astype(jnp.float32) + mine).astype(dtype)

  total = share((here + count - 1) % count).astype(dtype)
  return jax.lax.fori_loop(1, count, pass_on, total)


_multiply_experts.defvjp(_multiply_experts_forward, _multiply_experts_backward)


def uniform(
  key: jax.Array,
  shape: Sequence[int],
  names: Sequence[str | None],
  low: float = 0.0,
  high: float = 1.0,
) -> jax.Array:
  """Uniform float32 draws in [low, high), placed by logical axes `names`.

  Each device draws its own part; the numbers do not depend on the mesh.
  """
  mesh = current()
  if mesh is not None and is_explicit(mesh):
    check_divisible(shape, names, mesh=mesh)
    return jax.random.uniform(
      key, shape, minval=low, maxval=high, out_sharding=spec(names)
    )
  return shard(jax.random.uniform(key, shape, minval=low, maxval=high), *names)


def take_rows(
  table: jax.Array, ids: jax.Array, names: Sequence[str | None]
) -> jax.Array:
  """Returns `table[ids]` placed by logical axes `names`.

  The rows of the table may be sharded (a vocabulary): each device looks up its
  own, and the results are added up.
  """
  mesh = current()
  if mesh is not None and is_explicit(mesh):
    check_divisible((*ids.shape, *table.shape[1:]), names, mesh=mesh)
    return table.at[ids].get(out_sharding=spec(names))
  return shard(table[ids], *names)


def on_each_device(
  function: Callable[..., Any],
  arguments: Sequence[Any],
  axes: Sequence[Any],
  out: Any,
) -> Any:
  """Calls `function` on each device's own parts, for moves by hand.

  Inside, nothing moves but what the functions below move.

  Args:
    function: from the parts of `arguments` to a part of the result, an array
      or a tree of arrays.
    arguments: arrays, trees of arrays, or None.
    axes: like `arguments`, with logical axis names for each array.
    out: logical axes of the result, or a tree of them.

  Raises:
    UserError: when a dimension does not divide over its mesh axes.
  """

  def is_names(axes: Any) -> bool:
    return isinstance(axes, tuple) and all(
      name is None or isinstance(name, str) for name in axes
    )

  if current() is None:
    return function(*arguments)
  axes = tuple(axes)
  placed = jax.tree.map(
    lambda names, x: shard(x, *names), axes, tuple(arguments), is_leaf=is_names
  )
  specs, out_specs = (
    jax.tree.map(spec, names, is_leaf=is_names) for names in (axes, out)
  )
  return jax.shard_map(
    function, in_specs=specs, out_specs=out_specs, check_vma=False
  )(*placed)


def first_expert(experts_here: int) -> jax.Array | int:
  """Returns the first of this device's experts, in `on_each_device`."""
  if current() is None:
    return 0
  return jax.lax.axis_index('expert') * experts_here


def gather_expert_axis(x: jax.Array) -> jax.Array:
  """Joins the parts [groups, ...] of a row of the 'expert' axis."""
  if _expert_devices() == 1:
    return x
  return jax.lax.all_gather(x, 'expert', axis=0, tiled=True)


def scatter_expert_axis(x: jax.Array) -> jax.Array:
  """Adds up a row of the 'expert' axis; undoes `gather_expert_axis`."""
  if _expert_devices() == 1:
    return x
  return jax.lax.psum_scatter(x, 'expert', scatter_dimension=0, tiled=True)


def sum_over_model_axis(x: jax.Array) -> jax.Array:
  """Adds up partial products over the 'model' axis, in `on_each_device`."""
  mesh = current()
  if mesh is None or mesh.shape['model'] == 1:
    return x
  return jax.lax.psum(x, 'model')


def _expert_devices() -> int:
  mesh = current()
  return 1 if mesh is None else mesh.shape['expert']


def split_microbatches(x: jax.Array, parts: int) -> jax.Array:
  """Cuts [batch, ...] into [parts, batch / parts, ...] without moving rows.

  Every device cuts its own rows, in order, so that a microbatch holds whole
  routing groups whenever the whole batch does.
  """
  shards = batch_shards()
  rest = x.shape[1:]
  free = (None,) * len(rest)
  rows = x.shape[0] // (shards * parts)
  x = reshape(x, (shards, parts, rows, *rest), ('batch', None, None, *free))
  x = jnp.moveaxis(x, 1, 0)  # [parts, shards, rows, ...]
  return reshape(x, (parts, shards * rows, *rest), (None, 'batch', *free))
