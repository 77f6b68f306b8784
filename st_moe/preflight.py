"""What a run is: checked and described before anything is compiled."""

import functools
import logging
import math
from typing import Any

import jax
from jax.sharding import Mesh

from st_moe import partitioning
from st_moe.config import ModelConfig, RunConfig
from st_moe.errors import UserError
from st_moe.experts import choose_backend
from st_moe.routing import num_groups
from st_moe.train_state import (
  AbstractState,
  parameter_counts,
  trained_parameters,
)

log = logging.getLogger(__name__)

# Embedding tables have a multiple of this many rows: the hardware's tile, and
# divisible by every usual model axis.
_ROWS = 128


def check_run(config: RunConfig, vocabulary_size: int, mesh: Mesh) -> None:
  """Refuses what cannot be divided or does not fit, before compiling.

  Raises:
    UserError: with both numbers.
  """
  model = config.model
  if vocabulary_size > model.vocab_size:
    rows = _ROWS * math.ceil(vocabulary_size / _ROWS)
    raise UserError(
      f'the vocabulary has {vocabulary_size} ids, sentinels included, but '
      f'ModelConfig.vocab_size is {model.vocab_size}; set '
      f'--gin.ModelConfig.vocab_size={rows}, or '
      f'make one of at most {model.vocab_size - config.data.extra_ids} pieces'
    )
  parts = partitioning.batch_shards(mesh) * config.microbatches
  if config.batch_size % parts:
    raise UserError(
      f'RunConfig.batch_size {config.batch_size} is not divisible by '
      f'{partitioning.batch_shards(mesh)} data shards x {config.microbatches} '
      f'microbatches = {parts}'
    )
  check_model_divides(model, mesh)


def check_model_divides(model: ModelConfig, mesh: Mesh) -> None:
  """Raises UserError if a model cannot be divided evenly over a mesh."""
  divisions = [
    ('num_heads', model.num_heads, 'model'),
    ('d_ff', model.d_ff, 'model'),
    ('vocab_size', model.vocab_size, 'model'),
  ]
  if model.num_experts:
    divisions.append(('num_experts', model.num_experts, 'expert'))
    divisions.append(('expert_d_ff', model.expert_d_ff or model.d_ff, 'model'))
  for name, size, axis in divisions:
    if size % mesh.shape[axis]:
      raise UserError(
        f'ModelConfig.{name} {size} is not divisible by MeshConfig.{axis} '
        f'{mesh.shape[axis]}'
      )


def describe_run(
  config: RunConfig, shapes: AbstractState, mesh: Mesh
) -> dict[str, Any]:
  """Logs and returns what a run is: its size, its mesh, what it chose."""
  device = mesh.devices.flat[0]
  counts = parameter_counts(shapes)
  description: dict[str, Any] = {
    'parameters': counts,
    'mesh': dict(mesh.shape),
    'device': device.device_kind,
    'processes': jax.process_count(),
  }
  log.info(
    'parameters: %s in all, %s in experts',
    f'{counts["total"]:,}',
    f'{counts["expert"]:,}',
  )
  if config.optimizer.trainable != 'all':
    description['trained_parameters'] = trained_parameters(shapes, config)
    log.info(
      'trained: %s of them (OptimizerConfig.trainable %r)',
      f'{description["trained_parameters"]:,}',
      config.optimizer.trainable,
    )
  job = ''
  if jax.process_count() > 1:
    job = f': {jax.process_count()} processes, {mesh.devices.size} devices'
  log.info(
    'mesh: %s on %s%s',
    partitioning.describe(mesh.shape),
    device.device_kind,
    job,
  )
  if config.model.num_experts:
    description['dispatch'] = describe_dispatch(config, mesh)
  if config.checkpoint_every > config.steps:
    log.info(
      'checkpoints: only one, at the end (RunConfig.checkpoint_every %d is '
      'more than the %d steps of this run)',
      config.checkpoint_every,
      config.steps,
    )
  return description


def describe_dispatch(config: RunConfig, mesh: Mesh) -> str:
  """Logs how tokens travel, and why; returns the backend's name."""
  model = config.model
  routers = {'encoder': model.encoder_router, 'decoder': model.decoder_router}
  choose = functools.partial(
    choose_backend,
    model.dispatch,
    platform=mesh.devices.flat[0].platform,
    group_tokens=model.encoder_router.group_size or config.data.inputs_length,
    d_ff=model.expert_d_ff or model.d_ff,
    experts_per_device=model.num_experts // mesh.shape['expert'],
  )
  backend = choose()
  log.info('dispatch: %s (%s)', backend.name, backend.reason)
  rows = config.batch_size // config.microbatches
  for stack, router in routers.items():
    length = config.data.lengths[stack]
    tokens, size = rows * length, router.group_size or length
    groups = num_groups(tokens, size, partitioning.batch_shards(mesh))
    log.info(
      'routing in the %s: %d group%s of %d tokens',
      stack, groups, 's' * (groups > 1), tokens // groups,
    )  # fmt: skip
  for stack, router in routers.items():
    if router.eval_dropless and backend.name != 'ragged':
      evaluation = choose(dropless=True)
      log.info(
        'dispatch of the %s in evaluation: %s (%s)',
        stack,
        evaluation.name,
        evaluation.reason,
      )
  return backend.name
