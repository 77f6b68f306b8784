"""Adafactor as the paper's code computes it, AdamW, and schedules.

ST-MoE trains with Adafactor at its default settings and a learning rate of
1/sqrt(max(step, 10000)) (section 6). What follows is Mesh TensorFlow's
optimizer (mesh_tensorflow/optimize.py, 0.1.21), which differs from
`optax.adafactor` in three ways: the decay is 1 - (t + 1)^-0.8 with t from 0,
the update is clipped before it is scaled, and the RMS of an update or a
parameter is a matter of layers: a scanned stack of layers is as many
parameters, never one. Clipping is of updates, not of gradients (Table 4).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from st_moe.config import OptimizerConfig
from st_moe.trainable import select, trainable_mask

ADAMW_BETA1 = 0.9  # Loshchilov and Hutter, arXiv 1711.05101; beta1 = None


def learning_rate_schedule(
  config: OptimizerConfig, total_steps: int
) -> Callable[[jax.Array], jax.Array]:
  """Returns the learning rate (float32 []) as a function of the step, from 0.

  'rsqrt' is T5's: constant up to `warmup_steps`, then 1/sqrt(step) (Mesh
  TensorFlow learning_rate_schedules.py, truncated_rsqrt). 'linear' and
  'cosine' rise from 0 during `warmup_steps`, then fall to
  `end_learning_rate`. All see `schedule_offset` more steps.

  Raises:
    UserError: when the warm-up of 'linear' or 'cosine' does not end before
      the schedule does.
  """
  config.check_length(total_steps)
  schedule = _schedule(config, total_steps + config.schedule_offset)
  if not config.schedule_offset:
    return schedule
  return lambda step: schedule(step + config.schedule_offset)


def _schedule(
  config: OptimizerConfig, total_steps: int
) -> Callable[[jax.Array], jax.Array]:
  """Returns the schedule from its own step 0."""
  rate, warmup = config.learning_rate, config.warmup_steps
  if config.schedule == 'rsqrt':
    return lambda step: (
      rate / jnp.sqrt(jnp.maximum(jnp.float32(step), max(warmup, 1)))
    )
  if config.schedule == 'constant':
    return lambda step: jnp.float32(rate)
  last = total_steps if config.decay_steps is None else config.decay_steps
  if config.schedule == 'linear':
    decay = optax.linear_schedule(rate, config.end_learning_rate, last - warmup)
  else:
    decay = optax.cosine_decay_schedule(
      rate, last - warmup, alpha=config.end_learning_rate / rate
    )
  if not warmup:
    return decay
  return optax.join_schedules(
    [optax.linear_schedule(0.0, rate, warmup), decay], [warmup]
  )


@struct.dataclass
class Slots:
  """Adafactor's statistics of one parameter; those not in use are None.

  `row` and `column` are running means of squared gradients over the largest
  and the second-largest dimension, whose positions `factored_dims` holds; a
  parameter too small to factor has `full`, of its own shape.
  """

  row: Any = None
  column: Any = None
  full: Any = None
  momentum: Any = None
  factored_dims: tuple[int, int] | None = struct.field(
    pytree_node=False, default=None
  )


class AdafactorState(NamedTuple):
  count: jax.Array  # int32 [], updates so far
  slots: Any  # the tree of parameters, a Slots for each


def _own_dims(names: Sequence[str], config: OptimizerConfig) -> list[int]:
  """Returns the dimensions inside one parameter, leaving out batch axes."""
  batch = ('layers', 'expert') if config.experts_as_batch_axis else ('layers',)
  return [dim for dim, name in enumerate(names) if name not in batch]


def _factored_dims(
  shape: Sequence[int], names: Sequence[str], config: OptimizerConfig
) -> tuple[int, int] | None:
  """Returns the largest and second-largest dimension, or None if too small."""
  dims = sorted(_own_dims(names, config), key=lambda dim: -shape[dim])
  if not config.factored or len(dims) < 2:
    return None
  if shape[dims[1]] < config.min_dim_size_to_factor:
    return None
  return dims[0], dims[1]


def _init_slots(
  param: jax.Array, names: Sequence[str], config: OptimizerConfig
) -> Slots:
  def zeros(without: int | None = None) -> jax.Array:
    shape = [n for dim, n in enumerate(param.shape) if dim != without]
    return jnp.zeros(shape, jnp.float32)

  dims = _factored_dims(param.shape, names, config)
  return Slots(
    row=zeros(dims[0]) if dims else None,
    column=zeros(dims[1]) if dims else None,
    full=None if dims else zeros(),
    momentum=zeros() if config.beta1 else None,
    factored_dims=dims,
  )


def _normalize(
  grad: jax.Array, slots: Slots, decay: jax.Array, epsilon: float
) -> tuple[jax.Array, Slots]:
  """Returns the gradient over its running RMS, and the new statistics."""
  squared = jnp.square(grad) + epsilon
  if slots.factored_dims is None:
    full = decay * slots.full + (1 - decay) * squared
    return grad * jax.lax.rsqrt(full), slots.replace(full=full)
  largest, second = slots.factored_dims

  def track(old, dim):  # keeps `dim`, of size 1
    new = jnp.mean(squared, axis=dim, keepdims=True)
    return decay * jnp.expand_dims(old, dim) + (1 - decay) * new

  row, column = track(slots.row, largest), track(slots.column, second)
  mean = jnp.mean(row, axis=second, keepdims=True)
  x = grad * jax.lax.rsqrt(row / mean) * jax.lax.rsqrt(column)
  return x, slots.replace(
    row=jnp.squeeze(row, largest), column=jnp.squeeze(column, second)
  )


def _update_one(
  grad: jax.Array,
  slots: Slots,
  param: jax.Array,
  names: Sequence[str],
  decay: jax.Array,
  learning_rate: jax.Array,
  config: OptimizerConfig,
) -> tuple[jax.Array, Slots]:
  dims = tuple(_own_dims(names, config))

  def rms(x):  # one value for each layer (and expert)
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=dims, keepdims=True))

  x, slots = _normalize(grad, slots, decay, config.epsilon1)
  if config.clipping_threshold is not None:
    x = x / jnp.maximum(1.0, rms(x) / config.clipping_threshold)
  step = learning_rate * x
  if config.multiply_by_parameter_scale:
    step = step * jnp.maximum(rms(param), config.epsilon2)
  if config.beta1:
    step = config.beta1 * slots.momentum + (1 - config.beta1) * step
    slots = slots.replace(momentum=step)
  if config.weight_decay and _is_decayed(names):
    step = step + learning_rate * config.weight_decay * param
  return -step, slots


def adafactor(
  config: OptimizerConfig,
  axes: Any,
  learning_rate: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
  """Adafactor of Mesh TensorFlow (optimize.py, AdafactorOptimizer).

  With G a gradient, and means over the two largest dimensions of the
  parameter: R, C = running means of G^2 + epsilon1; X = G / sqrt(R / mean(R))
  / sqrt(C); X /= max(1, RMS(X) / clipping_threshold); the parameter loses
  learning_rate * max(RMS(parameter), epsilon2) * X.

  Axes named 'layers' are batch axes: every statistic and RMS is of one layer.
  Axes named 'expert' belong to the parameter (Mesh TensorFlow), or are batch
  axes too with `experts_as_batch_axis` (T5X, contrib/moe/adafactor_utils.py).
  Momentum averages the scaled steps, as there. Weight decay, which the
  original lacks, is AdamW's: learning_rate * weight_decay * parameter.

  Args:
    config: the settings.
    axes: tree of tuples of logical axis names, one per parameter.
    learning_rate: of the step, from 0.

  Returns:
    Its `update` may be given `step`, which the schedule sees in the place of
    the statistics' own count of updates: theirs says how old they are, and a
    run that goes on with another's begins its schedule anew.
  """

  def init(params):
    slots = jax.tree.map(
      lambda param, names: _init_slots(param, names, config), params, axes
    )
    return AdafactorState(jnp.zeros([], jnp.int32), slots)

  def update(grads, state, params=None, *, step=None, **_):
    if params is None:
      raise ValueError(optax.NO_PARAMS_MSG)
    age = jnp.float32(state.count + 1)
    decay = 1.0 - age**-config.decay_rate  # 0 at first: nothing to forget
    rate = learning_rate(state.count if step is None else step)
    leaves, tree = jax.tree.flatten(params)
    pairs = [
      _update_one(grad, slots, param, names, decay, rate, config)
      for grad, slots, param, names in zip(
        tree.flatten_up_to(grads),
        tree.flatten_up_to(state.slots),
        leaves,
        tree.flatten_up_to(axes),
        strict=True,
      )
    ]
    steps = tree.unflatten([step for step, _ in pairs])
    slots = tree.unflatten([slots for _, slots in pairs])
    return steps, AdafactorState(state.count + 1, slots)

  return optax.GradientTransformationExtraArgs(init, update)


def at_step_0(opt_state: Any) -> Any:
  """Returns an optimizer's state whose schedule has not begun.

  Statistics keep the count of updates that says how old they are. AdamW has a
  second count, for its schedule alone; Adafactor's sees the `step` of `update`.
  """

  def is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)

  def begin(node: Any) -> Any:
    if not is_schedule(node):
      return node
    return node._replace(count=jnp.zeros_like(node.count))

  return jax.tree.map(begin, opt_state, is_leaf=is_schedule)


def _is_decayed(names: Sequence[str]) -> bool:
  """Whether weight decay applies: to matrices, not to scales and biases."""
  return sum(name not in ('layers', 'expert') for name in names) >= 2


def make_optimizer(
  config: OptimizerConfig, axes: Any, total_steps: int
) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer, its schedule inside.

  Its `init` takes all parameters; the state is that of the trained ones.
  `update` takes gradients of these, and them, as `select` leaves them, and
  `step`, the updates of this run so far.

  Args:
    config: the settings.
    axes: tree of tuples of logical axis names, one per parameter.
    total_steps: of the run; 'linear' and 'cosine' end there.

  Raises:
    UserError: when the schedule cannot be made, or nothing is trained.
  """
  mask = trainable_mask(axes, config.trainable)
  inner = _make_optimizer(config, select(axes, mask), total_steps)
  return optax.GradientTransformationExtraArgs(
    lambda params: inner.init(select(params, mask)), inner.update
  )


def _make_optimizer(
  config: OptimizerConfig, axes: Any, total_steps: int
) -> optax.GradientTransformationExtraArgs:
  schedule = learning_rate_schedule(config, total_steps)
  clip = optax.identity()
  if config.max_grad_norm is not None:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
  if config.name == 'adafactor':
    return optax.chain(clip, adafactor(config, axes, schedule))
  decayed = jax.tree.map(
    _is_decayed, axes, is_leaf=lambda x: isinstance(x, tuple)
  )
  return optax.chain(
    clip,
    optax.adamw(
      schedule,
      b1=ADAMW_BETA1 if config.beta1 is None else config.beta1,
      b2=config.beta2,
      eps=config.epsilon,
      weight_decay=config.weight_decay,
      mask=decayed,
    ),
  )


def opt_state_axes(
  abstract_opt_state: Any, abstract_params: Any, axes: Any
) -> Any:
  """Returns the logical axis names of every leaf of an optimizer state.

  A statistic has the axes of its parameter, less the one it is a mean over;
  counters have ().

  Args:
    abstract_opt_state: from `jax.eval_shape(optimizer.init, params)`.
    abstract_params: the parameters it is the state of.
    axes: tree of tuples of logical axis names, one per parameter.
  """
  params_tree = jax.tree.structure(abstract_params)

  def mirrors_params(node):
    tree = jax.tree.structure(node, is_leaf=lambda x: isinstance(x, Slots))
    return tree == params_tree

  def of_leaf(slot, names):
    if not isinstance(slot, Slots):
      return names
    row, column = slot.factored_dims or (None, None)
    return slot.replace(
      row=None if row is None else names[:row] + names[row + 1 :],
      column=None if column is None else names[:column] + names[column + 1 :],
      full=None if slot.full is None else names,
      momentum=None if slot.momentum is None else names,
    )

  def of_node(node):
    if not mirrors_params(node):
      return ()
    return jax.tree.map(
      of_leaf, node, axes, is_leaf=lambda x: isinstance(x, Slots)
    )

  return jax.tree.map(of_node, abstract_opt_state, is_leaf=mirrors_params)
