"""The decisions of every router on some text, from the real forward pass."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from st_moe import partitioning
from st_moe.config import ModelConfig
from st_moe.errors import UserError
from st_moe.stacking import STACKS, sparse_layers
from st_moe.transformer import apply_model


@dataclasses.dataclass(frozen=True)
class StackRecord:
  """What the routers of a stack did with the tokens of a text.

  Letters: M sparse layers, N rows, L length, K choices.

  Attributes:
    layers: index of every sparse layer in its stack.
    tokens: int32 [N, L], what stands at each position: in the decoder its
      input, the target one position before, and padding (0) at the beginning.
    targets: int32 [N, L], what a decoder predicts there; None in the encoder.
    real: bool [N, L], positions that are no padding.
    expert: int16 [M, N, L, K], each token's experts, the likeliest first.
    gate: float32 [M, N, L, K], the weights of its choices, before drops.
    wanted: bool [M, N, L, K], choices that the policy keeps, of real tokens.
    kept: bool [M, N, L, K], those of them that had a slot.
  """

  layers: tuple[int, ...]
  tokens: np.ndarray
  targets: np.ndarray | None
  real: np.ndarray
  expert: np.ndarray
  gate: np.ndarray
  wanted: np.ndarray
  kept: np.ndarray


def with_capacity(config: ModelConfig, capacity: str) -> ModelConfig:
  """Returns the model with another capacity in evaluation.

  Choices 2..K follow the policy of evaluation whatever the capacity, since
  that of training draws lots.

  Args:
    config: of the model.
    capacity: 'eval', as it is evaluated; 'train', with the training capacity
      factor; 'none', nothing is dropped.

  Raises:
    UserError: for 'none' where experts choose.
  """
  if capacity == 'eval':
    return config
  routers = {}
  for stack in STACKS:
    router = getattr(config, f'{stack}_router')
    if capacity == 'none' and router.kind == 'expert_choice':
      raise UserError(
        f'--capacity=none: experts of the {stack} choose their tokens and '
        'always have a capacity; leave the flag out'
      )
    changes: dict[str, Any] = {'eval_dropless': capacity == 'none'}
    if capacity == 'train':
      changes['eval_capacity_factor'] = router.train_capacity_factor
    routers[f'{stack}_router'] = dataclasses.replace(router, **changes)
  return dataclasses.replace(config, **routers)


def _decide(
  config: ModelConfig, params: Any, batch: dict[str, jax.Array]
) -> dict[str, Any]:
  """Returns tokens and decisions of a batch, by stack and name.

  'filled' says which rows hold anything: in both stacks the same.
  """
  output = apply_model(config, params, batch, train=False, record=True)
  filled = (batch['encoder_input_tokens'] > 0).any(axis=1)
  filled |= (batch['decoder_target_tokens'] > 0).any(axis=1)
  result: dict[str, Any] = {'filled': filled}
  for stack in STACKS:
    stats = getattr(output, stack)
    if stats is None:
      continue
    tokens = {'tokens': batch[f'{stack}_input_tokens']}
    if stack == 'decoder':
      tokens['targets'] = batch['decoder_target_tokens']
    decisions = {
      field.name: getattr(stats.decisions, field.name)
      for field in dataclasses.fields(stats.decisions)
    }
    decisions['expert'] = decisions['expert'].astype(np.int16)
    result[stack] = tokens | decisions
  return result


def record(
  config: ModelConfig,
  params: Any,
  batches: Iterable[dict[str, np.ndarray]],
  mesh: Mesh,
  progress: Callable[[int], None],
) -> dict[str, StackRecord]:
  """Runs batches through a model; all processes get all decisions.

  Args:
    config: of the model.
    params: its parameters, on the mesh.
    batches: model features, of this process's part of the rows.
    mesh: the device mesh.
    progress: told how many batches are done.

  Returns:
    A record for each stack with sparse layers.

  Raises:
    UserError: when there are none.
  """
  stacks = [stack for stack in STACKS if sparse_layers(config, stack)]
  if not stacks:
    raise UserError(
      'this model is dense: it has no experts to trace (ModelConfig.'
      'num_experts 0, or no sparse layer)'
    )
  parts: list[dict[str, Any]] = []
  with partitioning.use_mesh(mesh):
    decide = jax.jit(
      functools.partial(_decide, config),
      out_shardings=partitioning.replicated(mesh),
    )
    for number, batch in enumerate(batches):
      batch = partitioning.shard_batch(batch, mesh)
      parts.append(jax.device_get(decide(params, batch)))
      progress(number + 1)
  rows = np.concatenate([part['filled'] for part in parts])
  return {
    stack: _join(config, stack, [part[stack] for part in parts], rows)
    for stack in stacks
  }


def _join(
  config: ModelConfig,
  stack: str,
  parts: list[dict[str, np.ndarray]],
  rows: np.ndarray,
) -> StackRecord:
  """Puts the `rows` of batches together: those that hold anything."""

  def joined(name: str, axis: int) -> np.ndarray:
    return np.concatenate([part[name] for part in parts], axis=axis)

  tokens = joined('tokens', 0)[rows]
  targets = joined('targets', 0)[rows] if stack == 'decoder' else None
  real = (tokens if targets is None else targets) > 0
  decisions = {
    name: joined(name, 1)[:, rows]
    for name in ('expert', 'gate', 'wanted', 'kept')
  }
  for name in ('wanted', 'kept'):
    decisions[name] = decisions[name] & real[None, ..., None]
  return StackRecord(
    layers=sparse_layers(config, stack),
    tokens=tokens,
    targets=targets,
    real=real,
    **decisions,
  )
