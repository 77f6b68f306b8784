"""`st_moe convert from-t5x`: a T5X checkpoint as a model directory of ours.

The form of the checkpoint (minimal T5X, scalable T5X, flaxformer; scanned or
written out, with or without experts) is found in its names, the sizes in its
shapes (t5x_names.py). What they do not say comes from a preset
(t5x_presets.py) or from gin files, which must not contradict them.

Nothing of T5X runs here, so there are no logits of T5X to compare with. The
fixed batch goes through the files that were written, and through the same
tensors read anew from T5X's files into the other form of the stacks (written
out where the written model is scanned), so that what was stacked, split, merged
or cast is proved to be where it belongs.
"""

import argparse
import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from st_moe import partitioning, processes, stacking
from st_moe.checkpoint import restore_params
from st_moe.config import MeshConfig, ModelConfig, RunConfig
from st_moe.convert import fixed_batch, t5x_names, t5x_presets
from st_moe.convert.mapping import Coverage, Leaf, check
from st_moe.convert.t5x_files import T5xCheckpoint
from st_moe.convert.writing import (
  abstract_params,
  load_params,
  mesh_config,
  next_step,
  parameter_shapes,
  write_model,
)
from st_moe.errors import UserError
from st_moe.model_directory import RECORD_FILE, check_output
from st_moe.transformer import apply_model
from st_moe.workdir import read_json, write_json

log = logging.getLogger(__name__)

# Why values of a checkpoint are passed over, by where they are.
_REASONS = {
  'state': 'state of the optimizer',
  'target': 'notes on the format',
}
_OTHER_REASON = 'no parameters'


@dataclasses.dataclass(frozen=True)
class Conversion:
  """A checkpoint, and the model that is made of it.

  Attributes:
    source: the checkpoint.
    where: its layers are.
    config: of the model.
    table: what makes each parameter.
    coverage: what became of the tensors.
  """

  source: T5xCheckpoint
  where: t5x_names.Layout
  config: ModelConfig
  table: list[Leaf]
  coverage: Coverage


def run(args: argparse.Namespace, config: RunConfig) -> None:
  """Converts a checkpoint; prints each phase, and what was proved.

  Args:
    args: `source`, `output`, `step`, `preset`, `vocabulary`, `no_check`.
    config: of the gin files and flags: a model where they bind ModelConfig,
      a mesh where they bind MeshConfig.

  Raises:
    UserError: for a checkpoint that is damaged or of another architecture,
      and for an output that is there already; nothing is written.
  """
  output = Path(args.output)
  check_output(output)
  vocabulary = None if args.vocabulary is None else Path(args.vocabulary)
  if vocabulary is not None and not vocabulary.is_file():
    raise UserError(f'--vocabulary={vocabulary} is no file')
  given = config.model if args.resolver.binds('ModelConfig') else None
  if given is not None and args.preset is not None:
    raise UserError(
      f'--preset={args.preset} and gin files both describe the model; leave '
      'one of them out'
    )
  log.info('reading the names and shapes of %s', args.source)
  made = plan(args.source, args.step, preset=args.preset, given=given)
  _print_plan(made, args.preset)
  given_mesh = mesh_config(args, config)
  mesh_settings = given_mesh or MeshConfig()
  devices = None if given_mesh else jax.local_devices()[:1]
  mesh = partitioning.make_mesh(mesh_settings, devices)
  log.info('writing %s', output)
  record = {
    'kind': 'from-t5x',
    'source': made.source.where,
    'step': made.source.step,
    'preset': args.preset,
    'tensors_used': made.coverage.used,
    'values_passed_over': made.source.other,
    'parameters_filled': made.coverage.filled,
  }
  write_model(
    output,
    made.config,
    made.source,
    made.table,
    record=record,
    comment=f'Made by st_moe convert from-t5x of {made.source.where}',
    vocabulary=vocabulary,
    step=made.source.step,
    abstract_params=abstract_params(made.config, mesh, mesh_settings)
    if given_mesh
    else None,
  )
  if not args.no_check:
    log.info('running the fixed batch through both')
    difference = batch_difference(made, output, mesh, mesh_settings)
    if processes.is_leader():
      record = read_json(output / RECORD_FILE)
      record['largest_difference'] = difference
      write_json(output / RECORD_FILE, record)
    print(
      'fixed batch: the written model and the tensors of T5X '
      f'({_form(not made.config.scan_layers)}) differ by at most '
      f'{difference:.3g} in a logit'
    )
  if processes.is_leader():
    print(
      f'wrote {output}: model.gin, model.json, checkpoints/{made.source.step}'
      + ('' if vocabulary is None else ', vocabulary.model')
    )
    print(next_step(output))


def plan(
  path: str,
  step: int | None = None,
  *,
  preset: str | None = None,
  given: ModelConfig | None = None,
) -> Conversion:
  """Finds what model a checkpoint holds, and proves its table; writes nothing.

  Args:
    path: of the checkpoint, or of the folder that holds several.
    step: which of several; None for the newest.
    preset: a name of `t5x_presets.PRESETS`, for what tensors do not say.
    given: the whole model, of gin files.

  Raises:
    UserError: see `run`.
  """
  source = T5xCheckpoint(path, step)
  where = t5x_names.layout(source)
  found = t5x_names.found_config(source, where)
  sparse = {
    stack: t5x_names.sparse_indices(source, layers)
    for stack, layers in where.stacks.items()
  }
  if given is None:
    config = _from_preset(source, where, found, sparse, preset)
  else:
    _check_given(given, found, sparse, source, where)
    config = given
  table = t5x_names.leaves(source, where, config)
  coverage = check(table, parameter_shapes(config), source, lambda name: None)
  return Conversion(source, where, config, table, coverage)


def _from_preset(
  source: T5xCheckpoint,
  where: t5x_names.Layout,
  found: dict[str, Any],
  sparse: dict[str, tuple[int, ...]],
  name: str | None,
) -> ModelConfig:
  """Returns a model of what was found and of a preset."""
  extra = {
    stack: t5x_names.has_extra_ffn(source, layers)
    for stack, layers in where.stacks.items()
  }
  gated = t5x_names.gated(source, where)
  preset = t5x_presets.choose(
    name,
    experts=found['num_experts'] > 0,
    gated=any(gated.values()),
    extra_ffn=any(extra.values()),
    where=source.where,
  )
  activations = {
    True: ('gelu', 'linear'),
    False: ('relu',),
  }
  routers = {}
  for stack in stacking.STACKS:
    router = getattr(preset, stack)
    if router is not None:
      kind = 'after' if extra[stack] else 'none'
      routers[f'{stack}_router'] = dataclasses.replace(router, extra_ffn=kind)
  mlp = gated.get('FFN', gated.get('expert', False))
  expert = gated.get('expert', mlp)
  depths = {stack: len(layers) for stack, layers in where.stacks.items()}
  return ModelConfig(
    **found,
    **routers,
    **t5x_names.placement(depths, sparse),
    mlp_activations=activations[mlp],
    expert_activations=None if expert == mlp else activations[expert],
    scan_layers=where.scanned,
  )


def _check_given(
  given: ModelConfig,
  found: dict[str, Any],
  sparse: dict[str, tuple[int, ...]],
  source: T5xCheckpoint,
  where: t5x_names.Layout,
) -> None:
  """Refuses gin files that contradict the checkpoint."""
  said = {name: getattr(given, name) for name in found}
  said['expert_d_ff'] = given.expert_d_ff or given.d_ff
  found = found | {'expert_d_ff': found['expert_d_ff'] or found['d_ff']}
  if not given.num_experts:
    said['expert_d_ff'] = found['expert_d_ff']
  for stack, layers in where.stacks.items():
    name = f'the sparse layers of the {stack}'
    said[name] = list(stacking.sparse_layers(given, stack))
    found[name] = list(sparse[stack])
    if sparse[stack]:
      name = f'{stack}/RouterConfig.extra_ffn'
      said[name] = getattr(given, f'{stack}_router').extra_ffn != 'none'
      found[name] = t5x_names.has_extra_ffn(source, layers)
  gated = t5x_names.gated(source, where)
  for kind, value in (
    ('FFN', given.mlp_activations),
    ('expert', given.expert_activations or given.mlp_activations),
  ):
    if kind in gated:
      name = f'whether {kind}s are gated'
      said[name], found[name] = len(value) == 2, gated[kind]
  for name, value in found.items():
    if said[name] != value:
      field = name if ' ' in name or '/' in name else f'ModelConfig.{name}'
      raise UserError(
        f'the gin files say {field} {said[name]}, the tensors of '
        f'{source.where} {value}; correct the gin files, or leave them out'
      )


def _print_plan(made: Conversion, preset: str | None) -> None:
  """Prints what was found."""
  if not processes.is_leader():
    return
  config, source = made.config, made.source
  print(
    f'step {source.step}, {_form(made.where.scanned)}: '
    f'{config.num_encoder_layers} + {config.num_decoder_layers} layers, '
    f'd_model {config.d_model}, {config.num_heads} heads of {config.d_kv}, '
    f'd_ff {config.d_ff} ({", ".join(config.mlp_activations)}), '
    f'vocabulary {config.vocab_size}, '
    f'{"tied" if config.tie_embeddings else "untied"} embeddings, position '
    f'biases {config.relative_position_biases}'
  )
  for stack in stacking.STACKS if config.num_experts else ():
    router = getattr(config, f'{stack}_router')
    print(
      f'{stack}: {config.num_experts} experts in layers '
      f'{list(stacking.sparse_layers(config, stack))}, {router.kind}, '
      f'{router.num_choices} choice(s), gates normalised: '
      f'{router.gate_normalization}, groups of {router.group_size}, extra FFN: '
      f'{router.extra_ffn} ({preset or "gin files"})'
    )
  passed = ', '.join(
    f'{count} of {kind}: {_REASONS.get(kind, _OTHER_REASON)}'
    for kind, count in sorted(source.other.items())
  )
  print(
    f'coverage: {made.coverage.used} tensors used, '
    f'{sum(source.other.values())} values passed over'
    + (f' ({passed})' if passed else '')
    + f', {made.coverage.filled} parameters filled'
  )


def _form(scanned: bool) -> str:
  return 'scanned' if scanned else 'written out'


@functools.partial(jax.jit, static_argnames='config')
def _apply(config: ModelConfig, params: Any, batch: Any) -> jax.Array:
  return apply_model(config, params, batch, train=False).logits


def batch_difference(
  made: Conversion,
  output: Path,
  mesh: jax.sharding.Mesh,
  mesh_settings: MeshConfig,
) -> float:
  """Returns the largest difference of a logit between two ways to a model.

  One model at a time is in memory.

  Args:
    made: the conversion.
    output: the model directory that was written.
    mesh: to compute on.
    mesh_settings: of the mesh.
  """
  config = dataclasses.replace(made.config, activation_dtype='float32')
  other = dataclasses.replace(config, scan_layers=not config.scan_layers)
  table = t5x_names.leaves(made.source, made.where, other)
  places = [
    abstract_params(form, mesh, mesh_settings) for form in (config, other)
  ]
  with partitioning.use_mesh(mesh):
    batch = fixed_batch.make_batch(
      config.vocab_size, fixed_batch.rows_for(mesh)
    )
    placed = partitioning.shard_batch(batch, mesh)
    written = restore_params(output / 'checkpoints', None, places[0]).params
    logits = processes.to_host(_apply(config, written, placed))
    del written
    again = load_params(made.source, table, places[1])
    expected = processes.to_host(_apply(other, again, placed))
  real = batch['decoder_target_tokens'] > 0
  return float(np.abs(logits - expected)[real].max())
