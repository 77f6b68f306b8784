"""The training step: gradients of the whole batch, one update, health.

The step that `st_moe pretrain` runs and that `st_moe plan` compiles.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from st_moe import losses, partitioning
from st_moe.config import RunConfig
from st_moe.optimizer import learning_rate_schedule, make_optimizer
from st_moe.train_state import (
  AbstractState,
  TrainState,
  abstract_state,
  create_state,
  state_shardings,
)
from st_moe.trainable import merge, select, trainable_mask
from st_moe.transformer import EncoderDecoder, apply_model

# Streams folded into the seed, so that initialization and the steps (dropout,
# routing) draw independent numbers.
_INIT_STREAM, _STEP_STREAM = 0, 1


def init_key(seed: int) -> jax.Array:
  """Returns the key from which a run's parameters are drawn."""
  return jax.random.fold_in(jax.random.key(seed), _INIT_STREAM)


def run_key(seed: int) -> np.ndarray:
  """Returns the data of a run's key, which its steps are given.

  Not a constant of the compiled step, which so is the same for every seed.
  """
  return np.asarray(jax.random.key_data(jax.random.key(seed)))


def step_key(run_key: jax.Array, step: jax.Array) -> jax.Array:
  """Returns the key of one step's dropout and routing."""
  key = jax.random.wrap_key_data(run_key)
  return jax.random.fold_in(jax.random.fold_in(key, _STEP_STREAM), step)


def batch_totals(
  batch: dict[str, jax.Array], microbatches: int
) -> losses.BatchTotals:
  """Returns the denominators of the whole batch, before it is split."""

  def count(tokens: jax.Array) -> jax.Array:
    return jnp.sum(tokens > 0).astype(jnp.float32)

  return losses.BatchTotals(
    target_weight=jnp.sum(batch['decoder_loss_weights'].astype(jnp.float32)),
    encoder_tokens=count(batch['encoder_input_tokens']),
    decoder_tokens=count(batch['decoder_target_tokens']),
    microbatches=microbatches,
  )


def loss_and_gradients(
  config: RunConfig,
  params: Any,
  batch: dict[str, jax.Array],
  rng: jax.Array,
  mask: Any = None,
) -> tuple[Any, dict[str, Any]]:
  """Returns gradients and metrics of the whole batch.

  With `microbatches` > 1 the batch goes through in parts, and the sum over the
  parts is the loss and the gradient of the whole batch: every mean is taken
  with the whole batch's denominator.

  Args:
    config: the run.
    params: parameters.
    batch: seqio features [batch, length].
    rng: key for dropout and routing of this step.
    mask: from `trainable_mask`: what is differentiated; None: everything.

  Returns:
    Gradients (float32, like params, None where frozen) and a dict of metrics:
    'loss' and its terms as scalars, and 'router' with one RouterStats per
    stack.
  """
  totals = batch_totals(batch, config.microbatches)
  trained = select(params, mask)

  def objective(trained, part, index):
    key = jax.random.fold_in(rng, index)
    rngs = {
      'dropout': jax.random.fold_in(key, 0),
      'router': jax.random.fold_in(key, 1),
    }
    output = apply_model(
      config.model,
      merge(trained, params, mask),
      part,
      train=True,
      rngs=rngs,
    )
    result = losses.objective(
      output,
      part['decoder_target_tokens'],
      part['decoder_loss_weights'],
      config.model,
      totals,
    )
    router = {'encoder': output.encoder, 'decoder': output.decoder}
    return result.loss, (result.metrics, router)

  grad_fn = jax.grad(objective, has_aux=True)
  if config.microbatches == 1:
    gradients, (terms, router) = grad_fn(trained, batch, 0)
    return gradients, {**terms, 'router': router}

  parts = {
    key: partitioning.split_microbatches(value, config.microbatches)
    for key, value in batch.items()
  }

  def add(total, xs):
    index, part = xs
    gradients, (terms, router) = grad_fn(trained, part, index)
    total = jax.tree.map(jnp.add, total, (gradients, terms))
    return total, router

  shapes = jax.eval_shape(
    lambda p: grad_fn(trained, p, 0), jax.tree.map(lambda x: x[0], parts)
  )
  zeros = jax.tree.map(jnp.zeros_like, trained)
  zero_terms = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1][0])
  (gradients, terms), router = jax.lax.scan(
    add,
    (zeros, zero_terms),
    (jnp.arange(config.microbatches), parts),
  )
  return gradients, {**terms, 'router': losses.mean_over_microbatches(router)}


def make_train_step(
  config: RunConfig,
  optimizer: optax.GradientTransformationExtraArgs,
  schedule: Callable[[jax.Array], jax.Array],
  mask: Any = None,
) -> Callable[..., tuple[TrainState, Any]]:
  """Returns the training step `(state, batch, run_key) -> (state, metrics)`.

  A step whose loss or gradient norm is not finite leaves parameters and
  optimizer state as they were, and is counted. Parameters that `mask` (from
  `trainable_mask`; None: none) leaves out are handed on untouched.
  """

  def train_step(
    state: TrainState, batch: dict[str, jax.Array], run_key: jax.Array
  ):
    rng = step_key(run_key, state.step)
    gradients, result = loss_and_gradients(
      config, state.params, batch, rng, mask
    )
    trained = select(state.params, mask)
    with jax.named_scope('optimizer'):
      gradient_norm = optax.tree.norm(gradients)
      updates, opt_state = optimizer.update(
        gradients,
        state.opt_state,
        trained,
        step=state.step - state.skipped_steps,
      )
      params = optax.apply_updates(trained, updates)
    finite = jnp.isfinite(result['loss']) & jnp.isfinite(gradient_norm)

    def keep_finite(new, old):
      return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = 1 - finite.astype(jnp.int32)
    new_state = state.replace(
      step=state.step + 1,
      params=merge(keep_finite(params, trained), state.params, mask),
      opt_state=keep_finite(opt_state, state.opt_state),
      nonfinite_steps=(state.nonfinite_steps + 1) * skipped,
      skipped_steps=state.skipped_steps + skipped,
    )
    result |= {
      'gradient_norm': gradient_norm,
      'learning_rate': schedule(state.step),
      'nonfinite_steps': new_state.nonfinite_steps,
      'skipped_steps': new_state.skipped_steps,
    }
    return new_state, result

  return train_step


def abstract_batch(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
  """Returns the shapes of a training batch, as the data path makes it."""
  stacks = {
    'encoder': ('input_tokens',),
    'decoder': ('input_tokens', 'target_tokens', 'loss_weights'),
  }
  packed = ('segment_ids', 'positions') if config.data.pack else ()
  return {
    f'{stack}_{feature}': jax.ShapeDtypeStruct(
      (config.batch_size, config.data.lengths[stack]),
      np.int32,
      sharding=partitioning.batch_sharding(mesh),
    )
    for stack, features in stacks.items()
    for feature in features + packed
  }


@dataclasses.dataclass(frozen=True)
class StepProgram:
  """The step of a run on its mesh, traced, and the state it works on.

  Attributes:
    config: the run.
    shapes: of the state.
    jitted: `(state, batch, key) -> (state, metrics)`; takes over the state's
      memory.
    traced: the same on the shapes of a batch; nothing is compiled yet.
    key: of the run, from `run_key`.
    optimizer: of the run.
    shardings: of the state.
  """

  config: RunConfig
  shapes: AbstractState
  jitted: Callable[..., tuple[TrainState, Any]]
  traced: Any
  key: np.ndarray
  optimizer: optax.GradientTransformation
  shardings: TrainState

  @property
  def abstract(self) -> TrainState:
    """The state's shapes with their places on the mesh."""
    return self.shapes.with_shardings(self.shardings)

  def step(
    self, state: TrainState, batch: dict[str, jax.Array]
  ) -> tuple[TrainState, Any]:
    """Takes one step of the run."""
    return self.jitted(state, batch, self.key)

  def initial_state(self) -> TrainState:
    """Returns the state at step 0, drawn from the run's seed."""
    return create_state(
      self.config,
      EncoderDecoder(self.config.model),
      self.optimizer,
      init_key(self.config.seed),
      self.shardings,
    )


def step_program(config: RunConfig, mesh: Mesh) -> StepProgram:
  """Builds and traces the step that a run repeats; compiles nothing.

  Raises:
    UserError: when sizes do not divide over the mesh.
  """
  shapes = abstract_state(config, EncoderDecoder(config.model))
  shardings = state_shardings(shapes, mesh, config.mesh)
  optimizer = make_optimizer(config.optimizer, shapes.axes, config.steps)
  schedule = learning_rate_schedule(config.optimizer, config.steps)
  step = jax.jit(
    make_train_step(
      config,
      optimizer,
      schedule,
      trainable_mask(shapes.axes, config.optimizer.trainable),
    ),
    donate_argnums=0,
    # Every process reads all metrics.
    out_shardings=(shardings, partitioning.replicated(mesh)),
  )
  key = run_key(config.seed)
  with partitioning.use_mesh(mesh, config.mesh):
    traced = step.trace(
      shapes.with_shardings(shardings), abstract_batch(config, mesh), key
    )
  return StepProgram(
    config=config,
    shapes=shapes,
    jitted=step,
    traced=traced,
    key=key,
    optimizer=optimizer,
    shardings=shardings,
  )
