"""The programs of `bench layer`: our layer with each backend, and two floors.

The layer is moe.py's, whole: router, its losses and health, dispatch, experts,
combine. The floors do the part that cannot be avoided:

  dense floor: one FFN over as many rows as tokens reach experts, with one set
    of weights. What a dense model of the same FLOPs pays.
  batched floor: the experts' matrix products on ready buffers [E, G C, D],
    nothing routed. The same weights and the FLOPs of the layer's buffers:
    what is beyond it is ours to answer for.

A dropless backend processes other rows than one with a capacity, so it has
floors of its own, with its rows shared evenly among the experts, and is
compared with the others where nothing is dropped.

Forward returns all outputs. Forward+backward is the value and the gradient,
with respect to the input and all parameters, of sum(y * w) + router losses,
where w is random, so that no product is known before it is computed. All
inputs are random numbers, and everything computed is returned.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from st_moe import partitioning
from st_moe.bench.sizes import LayerSize
from st_moe.bench.timing import Program
from st_moe.errors import RunStopped, UserError, did_you_mean
from st_moe.experts import BackendName
from st_moe.layers import ACTIVATIONS
from st_moe.moe import MoeLayer
from st_moe.trees import by_name

MODES = ('forward', 'forward+backward')
BACKENDS: tuple[str, ...] = get_args(BackendName)
# Those without a capacity: they compute every choice that the policy keeps.
DROPLESS = frozenset({'ragged'})
DENSE, BATCHED = 'dense floor', 'batched floor'

# Largest distance of two backends, relative to the norm of what is compared.
# float32 products on accelerators may round their inputs (TF32, bfloat16).
_TOLERANCE = {
  ('cpu', 'float32'): 1e-4,
  ('other', 'float32'): 1e-2,
  ('cpu', 'bfloat16'): 3e-2,
  ('other', 'bfloat16'): 3e-2,
}

# params, x, key of the router -> 'y', 'losses' of the router, weighted, and
# its 'stats'.
Layer = Callable[[Any, jax.Array, jax.Array], dict[str, Any]]


def check_backends(
  names: Sequence[str] | None, sizes: Sequence[LayerSize]
) -> tuple[str, ...]:
  """Returns the backends to time: those named, or all that fit.

  Args:
    names: None: all.
    sizes: of the layers.

  Raises:
    UserError: for an unknown name, or one that does not fit.
  """
  choosing = any(size.router.kind == 'expert_choice' for size in sizes)
  for name in names or ():
    if name not in BACKENDS:
      raise UserError(
        f'no backend {name!r} (only {", ".join(BACKENDS)})'
        f'{did_you_mean(name, BACKENDS)}'
      )
    if choosing and name in DROPLESS:
      raise UserError(
        f'backend {name!r} drops nothing, and experts that choose take as many '
        "tokens as they have slots; RouterConfig.kind must be 'token_choice'"
      )
  if names:
    return tuple(dict.fromkeys(names))
  return tuple(b for b in BACKENDS if not (choosing and b in DROPLESS))


def moe_layer(size: LayerSize, backend: str) -> MoeLayer:
  """Returns our layer of a size."""
  return MoeLayer(
    num_experts=size.num_experts,
    d_ff=size.d_ff,
    activations=size.activations,
    router=size.router,
    dispatch=backend,
    init_scale=size.init_scale,
    dtype=jnp.dtype(size.dtype),
  )


def _apply(size: LayerSize, backend: str) -> Layer:
  router = size.router

  def layer(params, x, key):
    y, stats = moe_layer(size, backend).apply(
      {'params': params}, x, None, train=True, rngs={'router': key}
    )
    losses = (
      router.balance_loss_weight * stats.balance_loss
      + router.second_choice_loss_weight * stats.second_choice_loss
      + router.z_loss_weight * stats.z_loss
    )
    return {'y': y, 'losses': losses, 'stats': stats}

  return layer


def _ffn(size: LayerSize, equations: tuple[str, str]) -> Layer:
  """Returns an FFN without routing, with 'wi_0', ..., 'wo' as parameters."""
  up, down = equations

  def layer(params, x, key):
    del key
    dtype = jnp.dtype(size.dtype)
    weights = {name: w.astype(dtype) for name, w in params.items()}
    hidden = functools.reduce(
      operator.mul,
      (
        ACTIVATIONS[activation](jnp.einsum(up, x, weights[f'wi_{i}']))
        for i, activation in enumerate(size.activations)
      ),
    )
    y = jnp.einsum(down, hidden, weights['wo'])
    return {'y': y, 'losses': jnp.float32(0), 'stats': ()}

  return layer


def programs(
  name: str,
  layer: Layer,
  params: Any,
  x: jax.Array,
  weights: jax.Array,
  key: jax.Array,
) -> dict[str, Program]:
  """Returns the program of each mode.

  Args:
    name: of the form.
    layer: what is timed.
    params: its parameters.
    x: its input.
    weights: of the outputs in the sum that is differentiated; float32, like
      the output.
    key: of the router.
  """

  def backward(params, x, weights, key):
    def objective(params, x):
      output = layer(params, x, key)
      y = output['y'].astype(jnp.float32)
      return jnp.sum(y * weights) + output['losses'], output['stats']

    grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (loss, stats), (d_params, d_x) = grad(params, x)
    gradient = {'params': d_params, 'x': d_x}
    return {'loss': loss, 'stats': stats, 'gradient': gradient}

  return {
    'forward': Program(name, layer, (params, x, key)),
    'forward+backward': Program(name, backward, (params, x, weights, key)),
  }


class LayerForms:
  """The programs of one size, over the same random numbers.

  Attributes:
    size: of the layer.
    params: of the layer, float32.
    x: its input [G, S, D].
    weights: of its output in the sum that is differentiated.
    key: of the router.
  """

  def __init__(self, size: LayerSize, seed: int):
    """Draws the layer's parameters and inputs.

    Args:
      size: of the layer.
      seed: of all random numbers.
    """
    self.size = size
    self._rng = np.random.default_rng(seed)
    self.key = jax.random.key(seed)
    shape = (size.groups, size.group_size, size.d_model)
    self.x = self._normal(shape, size.dtype)
    self.weights = self._normal(shape, 'float32')
    boxed = jax.eval_shape(
      lambda key: moe_layer(size, BACKENDS[0]).init(
        {'params': key, 'router': key}, self.x, None, train=True
      )['params'],
      self.key,
    )
    # Variance 1 / fan-in: unlike init_scale 0.1, hidden units of size 1.
    self.params = jax.tree.map(self._kernel, partitioning.unbox(boxed))

  def _normal(self, shape: Sequence[int], dtype: str) -> jax.Array:
    draws = self._rng.standard_normal(shape, np.float32)
    return jnp.asarray(draws, jnp.dtype(dtype))

  def _kernel(self, leaf: Any) -> jax.Array:
    fan_in = leaf.shape[-2]
    return self._normal(leaf.shape, 'float32') * fan_in**-0.5

  def moe(self, backend: str) -> dict[str, Program]:
    """Returns the whole layer with a backend, by mode."""
    return programs(
      backend,
      _apply(self.size, backend),
      self.params,
      self.x,
      self.weights,
      self.key,
    )

  def batched_floor(self, name: str, rows: int) -> dict[str, Program]:
    """Returns the experts on ready buffers [E, rows, D], by mode."""
    experts = (self.size.num_experts,)
    return self._floor(name, ('end,edf->enf', 'enf,efd->end'), experts, rows)

  def dense_floor(self, name: str, rows: int) -> dict[str, Program]:
    """Returns one FFN over `rows` rows [rows, D], by mode."""
    return self._floor(name, ('nd,df->nf', 'nf,fd->nd'), (), rows)

  def _floor(
    self,
    name: str,
    equations: tuple[str, str],
    experts: tuple[int, ...],
    rows: int,
  ) -> dict[str, Program]:
    size = self.size
    kernels = len(size.activations)
    shapes = {f'wi_{i}': (size.d_model, size.d_ff) for i in range(kernels)}
    shapes['wo'] = (size.d_ff, size.d_model)
    params = {
      kernel: self._normal((*experts, *shape), 'float32') * shape[0] ** -0.5
      for kernel, shape in shapes.items()
    }
    x_shape = (*experts, rows, size.d_model)
    return programs(
      name,
      _ffn(size, equations),
      params,
      self._normal(x_shape, size.dtype),
      self._normal(x_shape, 'float32'),
      self.key,
    )


def active_rows(size: LayerSize, backend: str, output: Any) -> int:
  """Returns how many rows tokens took at experts.

  Args:
    size: of the layer.
    backend: that made the output.
    output: of a forward pass.
  """
  # A group without a capacity has room for itself at every expert.
  capacity = size.group_size if backend in DROPLESS else size.capacity
  kept = np.asarray(output['stats'].expert_kept, np.float64)  # [E], a share
  return round(float(kept.sum()) * size.groups * capacity)


def roomy(size: LayerSize) -> LayerSize:
  """Returns a layer of as many slots that drops nothing: of fewer tokens."""
  tokens = size.slots // size.num_experts
  router = dataclasses.replace(
    size.router,
    capacity_formula='fixed',
    fixed_capacity=tokens,
    group_size=tokens,
  )
  return dataclasses.replace(
    size, tokens=tokens, group_size=tokens, router=router
  )


def check_agreement(
  mode: str, size: LayerSize, outputs: dict[str, Any]
) -> float:
  """Compares what the backends returned, array by array.

  Args:
    mode: for the message.
    size: of the layer.
    outputs: by backend; the first is what the others are compared with.

  Returns:
    The largest distance, relative to the norm of an array.

  Raises:
    RunStopped: when two differ by more than rounding: there is nothing to be
      timed then.
  """
  platform = 'cpu' if jax.default_backend() == 'cpu' else 'other'
  tolerance = _TOLERANCE[platform, size.dtype]
  (first, expected), *others = outputs.items()
  largest = 0.0
  for backend, output in others:
    for name, distance in _distances(output, expected).items():
      largest = max(largest, distance)
      if not distance <= tolerance:
        raise RunStopped(
          f'{mode} of the backends {backend} and {first} differs: {name} by '
          f'{distance:.2g} of its norm (tolerance {tolerance:g}); nothing was '
          f'timed ({size})'
        )
  return largest


def _distances(output: Any, expected: Any) -> dict[str, float]:
  distances = {}
  expected = by_name(expected)
  for name, value in by_name(output).items():
    a = np.asarray(value, np.float64)
    b = np.asarray(expected[name], np.float64)
    scale = max(float(np.linalg.norm(b)), 1e-12)
    distances[name] = float(np.linalg.norm(a - b)) / scale
  return distances
