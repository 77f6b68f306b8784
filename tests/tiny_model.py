"""A tiny encoder-decoder and a batch for it, shared by the model's tests."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from st_moe import losses, partitioning, train_state, transformer
from st_moe.config import MeshConfig, ModelConfig, RouterConfig, RunConfig
from st_moe.optimizer import make_optimizer
from st_moe.train_step import init_key

# Every sequence is a group of its own, nothing is random.
ROUTER = RouterConfig(
  group_size=None, min_expert_capacity=1, train_choice_policy='threshold'
)
# Experts have room for every token, in evaluation too.
ROOMY = dataclasses.replace(
  ROUTER, train_capacity_factor=4.0, eval_capacity_factor=4.0
)


def tiny_config(router: RouterConfig = ROUTER, **overrides) -> ModelConfig:
  settings = {
    'vocab_size': 48,
    'd_model': 16,
    'd_ff': 32,
    'd_kv': 8,
    'num_heads': 2,
    'num_encoder_layers': 2,
    'num_decoder_layers': 2,
    'num_experts': 4,
    'sparse_every': 2,
    'encoder_router': router,
    'decoder_router': router,
  }
  return ModelConfig(**(settings | overrides))


def shift_right(targets: np.ndarray) -> np.ndarray:
  return np.pad(targets, ((0, 0), (1, 0)))[:, :-1]


def make_batch(inputs: np.ndarray, targets: np.ndarray) -> dict:
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': shift_right(targets),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets > 0).astype(np.float32),
  }


def random_tokens(
  rng: np.random.Generator, lengths: list[int], size: int
) -> np.ndarray:
  """Returns random ids [len(lengths), size], padded after each length."""
  tokens = rng.integers(1, 48, (len(lengths), size)).astype(np.int32)
  return tokens * (np.arange(size) < np.array(lengths)[:, None])


def tiny_batch(rows: int = 8, seed: int = 0) -> dict:
  """Returns sequences of unequal lengths: up to 10 inputs and 6 targets."""
  rng = np.random.default_rng(seed)
  return make_batch(
    random_tokens(rng, [10 - i % 5 for i in range(rows)], 10),
    random_tokens(rng, [6 - i % 3 for i in range(rows)], 6),
  )


@functools.cache
def abstract_boxes(config: ModelConfig):
  """Returns the parameters' shapes, boxed with their axis names."""
  model, inputs = transformer.EncoderDecoder(config), model_inputs(tiny_batch())
  return jax.eval_shape(
    lambda key: model.init(key, **inputs, train=False)['params'],
    jax.random.key(0),
  )


def model_inputs(batch: dict) -> dict:
  return {k: v for k, v in batch.items() if k in transformer.MODEL_INPUTS}


def init_params(config: ModelConfig, seed: int = 0):
  """Draws parameters with numpy: compiling an initializer takes seconds.

  The deviations are those of the model's own initializers. Queries above all:
  drawn sqrt(d_kv) too large, they sharpen the softmax, and the last bit of
  a parameter then moves gradients by 0.75 of `assert_trees_close`'s bar.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    *_, layer, name = [entry.key for entry in path]
    if name == 'scale':
      return jnp.ones(leaf.shape)
    variance = 1.0  # the embedding's
    if name == 'kernel':
      variance /= leaf.shape[-2]  # fan in
    if layer == 'query':
      variance /= config.d_kv
    if name == 'rel_embedding':
      variance /= sum(leaf.shape) / 2  # fan average
    return jnp.array(rng.normal(0, variance**0.5, leaf.shape), jnp.float32)

  shapes = partitioning.unbox(abstract_boxes(config))
  return jax.tree.map_with_path(draw, shapes)


def place(
  params, config: ModelConfig, mesh: jax.sharding.Mesh, mesh_config: MeshConfig
):
  """Puts a model's parameters where the mesh wants them."""
  axes = partitioning.logical_axes(abstract_boxes(config))
  return jax.device_put(
    params, partitioning.tree_shardings(params, axes, mesh, mesh_config)
  )


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that has begun: its mesh and optimizer, and its state on it."""

  mesh: jax.sharding.Mesh
  abstract: train_state.AbstractState
  shardings: Any
  optimizer: Any
  state: train_state.TrainState


def start(config: RunConfig, model=None) -> Run:
  """Begins a run as `train.start` does, on as many devices as it names."""
  model = model or transformer.EncoderDecoder(config.model)
  size = math.prod((config.mesh.data, config.mesh.expert, config.mesh.model))
  devices = jax.devices()[:size] if size > 0 else None
  mesh = partitioning.make_mesh(config.mesh, devices)
  abstract = train_state.abstract_state(config, model)
  shardings = train_state.state_shardings(abstract, mesh, config.mesh)
  optimizer = make_optimizer(config.optimizer, abstract.axes, config.steps)
  state = train_state.create_state(
    config, model, optimizer, init_key(config.seed), shardings
  )
  return Run(mesh, abstract, shardings, optimizer, state)


@functools.partial(jax.jit, static_argnames=('config', 'train'))
def apply(config, params, batch, train=False, rngs=None):
  return transformer.apply_model(config, params, batch, train=train, rngs=rngs)


@functools.partial(jax.jit, static_argnames='config')
def loss_and_gradients(config, params, batch, rngs=None):
  """Returns ((loss, metrics), gradients) of a training step."""

  def loss(params):
    output = transformer.apply_model(
      config, params, batch, train=True, rngs=rngs
    )
    weights = batch['decoder_loss_weights']
    totals = losses.single_batch_totals(output, weights)
    result = losses.objective(
      output, batch['decoder_target_tokens'], weights, config, totals
    )
    return result.loss, result.metrics

  return jax.value_and_grad(loss, has_aux=True)(params)


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
  """Compares trees leaf by leaf and names the leaf that differs.

  The bar is float32's, and it has room: one-ulp noise on the parameters of
  `init_params` moves no entry of a gradient by more than a sixth of it.
  """
  flat_actual, tree = jax.tree.flatten_with_path(actual)
  flat_expected, expected_tree = jax.tree.flatten_with_path(expected)
  assert tree == expected_tree
  for (path, a), (_, b) in zip(flat_actual, flat_expected, strict=True):
    np.testing.assert_allclose(
      np.asarray(a, np.float32),
      np.asarray(b, np.float32),
      rtol=rtol,
      atol=atol,
      err_msg=jax.tree_util.keystr(path),
    )


def paths(tree) -> set[str]:
  """Returns the leaves' paths, joined by '/'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree.leaves_with_path(tree)
  }


def zero_stats(**fields):
  """Returns RouterStats of two layers and four experts, zero but `fields`."""
  from st_moe.routing import RouterStats

  shapes = {'expert_load': (2, 4), 'expert_kept': (2, 4), 'mean_gate': (2, 2)}
  zeros = {
    field.name: jnp.zeros(shapes.get(field.name, (2,)))
    for field in dataclasses.fields(RouterStats)
    if field.name != 'decisions'
  }
  return RouterStats(**(zeros | {k: jnp.array(v) for k, v in fields.items()}))
