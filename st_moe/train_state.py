"""The state of a training run: shapes first, then placement, then values.

`abstract_state` finds every shape without computing anything,
`state_shardings` gives every leaf (scalars too) a NamedSharding, and
`create_state` draws the values in one compiled function whose outputs are
born in place: nothing is ever whole on one device.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from st_moe import partitioning
from st_moe.config import MeshConfig, RunConfig
from st_moe.optimizer import make_optimizer, opt_state_axes
from st_moe.trainable import select, trainable_mask


@struct.dataclass
class TrainState:
  """All that a step changes. As trees of shapes, axes or shardings, too."""

  step: Any  # int32 [], steps done, skipped ones included
  params: Any
  opt_state: Any
  nonfinite_steps: Any  # int32 [], skipped in a row
  skipped_steps: Any  # int32 [], skipped in all


@dataclasses.dataclass(frozen=True)
class AbstractState:
  """A state without values.

  Attributes:
    shapes: a ShapeDtypeStruct for every leaf.
    logical_axes: a tuple of logical axis names for every leaf, () for scalars.
  """

  shapes: TrainState
  logical_axes: TrainState

  @property
  def axes(self) -> Any:
    """The logical axes of the parameters."""
    return self.logical_axes.params

  def with_shardings(self, shardings: TrainState) -> TrainState:
    """Returns the shapes with their placement, as restoring wants them."""
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      self.shapes,
      shardings,
    )


def _init_boxed(config: RunConfig, model: nn.Module, rng: jax.Array) -> Any:
  """Returns the model's parameters, boxed with their logical axes."""
  inputs = jnp.ones((1, config.data.inputs_length), jnp.int32)
  targets = jnp.ones((1, config.data.targets_length), jnp.int32)
  return model.init(rng, inputs, targets, targets, train=False)['params']


def _assemble(params: Any, opt_state: Any) -> TrainState:
  def zero():
    return jnp.zeros([], jnp.int32)

  return TrainState(zero(), params, opt_state, zero(), zero())


def abstract_state(config: RunConfig, model: nn.Module) -> AbstractState:
  """Returns shapes and logical axes of the state; computes nothing.

  Args:
    config: the run.
    model: called as `EncoderDecoder`.
  """
  boxed = jax.eval_shape(
    lambda rng: _init_boxed(config, model, rng), jax.random.key(0)
  )
  params = partitioning.unbox(boxed)
  axes = partitioning.logical_axes(boxed)
  optimizer = make_optimizer(config.optimizer, axes, config.steps)
  opt_state = jax.eval_shape(optimizer.init, params)
  mask = trainable_mask(axes, config.optimizer.trainable)
  return AbstractState(
    shapes=jax.eval_shape(_assemble, params, opt_state),
    logical_axes=TrainState(
      step=(),
      params=axes,
      opt_state=opt_state_axes(
        opt_state, select(params, mask), select(axes, mask)
      ),
      nonfinite_steps=(),
      skipped_steps=(),
    ),
  )


def state_shardings(
  abstract: AbstractState, mesh: Mesh, config: MeshConfig
) -> TrainState:
  """Returns a NamedSharding for every leaf of the state.

  Raises:
    UserError: when a dimension does not divide over its mesh axes.
  """
  return partitioning.tree_shardings(
    abstract.shapes, abstract.logical_axes, mesh, config
  )


def create_state(
  config: RunConfig,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  rng: jax.Array,
  shardings: TrainState,
) -> TrainState:
  """Draws a fresh state in place, by one compiled function.

  The values depend on `rng` alone, not on the mesh. To be called outside
  `use_mesh`: the one row of tokens that shapes the parameters is not split.

  Args:
    config: the run.
    model: called as `EncoderDecoder`.
    optimizer: from `make_optimizer`.
    rng: key of the parameters.
    shardings: from `state_shardings`.
  """

  def init(rng: jax.Array) -> TrainState:
    params = partitioning.unbox(_init_boxed(config, model, rng))
    return _assemble(params, optimizer.init(params))

  return jax.jit(init, out_shardings=shardings)(rng)


def trained_parameters(abstract: AbstractState, config: RunConfig) -> int:
  """Returns how many parameters the optimizer changes."""
  mask = trainable_mask(abstract.axes, config.optimizer.trainable)
  trained = select(abstract.shapes.params, mask)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))


def parameter_counts(abstract: AbstractState) -> dict[str, int]:
  """Returns the number of parameters: total, in experts, and the rest."""
  total = expert = 0
  leaves, tree = jax.tree.flatten(abstract.shapes.params)
  for leaf, names in zip(
    leaves, tree.flatten_up_to(abstract.axes), strict=True
  ):
    size = math.prod(leaf.shape)
    total += size
    expert += size if 'expert' in names else 0
  return {'total': total, 'expert': expert, 'dense': total - expert}
