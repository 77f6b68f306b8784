"""`st_moe convert from-hf`: a model of transformers as one of ours."""

import argparse
import collections
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from st_moe import model_directory, partitioning, processes
from st_moe.bindings import Resolver
from st_moe.checkpoint import ArrayReader, restore_params
from st_moe.config import MeshConfig, ModelConfig, RunConfig
from st_moe.convert import fixed_batch, hf_config, hf_names, hf_reference
from st_moe.convert.mapping import Coverage, Leaf, check
from st_moe.convert.overrides import overridden
from st_moe.convert.safetensors_files import TensorFiles
from st_moe.convert.writing import (
  abstract_params,
  load_params,
  mesh_config,
  next_step,
  parameter_shapes,
  write_model,
)
from st_moe.data.vocabularies import load_vocabulary
from st_moe.errors import UserError
from st_moe.workdir import VOCABULARY_FILE, read_json, write_json

log = logging.getLogger(__name__)

THEIR_VOCABULARY = 'spiece.model'
_FEW_SLOTS = 4  # capacity of the second comparison of a Switch Transformer
_SHOWN = 3  # names of tensors, in an error


@dataclasses.dataclass(frozen=True)
class Conversion:
  """A model of transformers, understood and not yet read.

  Attributes:
    described: its config.json.
    source: its tensors.
    model: what it is here, computed as the user says.
    leaves: of every parameter.
    coverage: what becomes of each tensor.
  """

  described: hf_config.HfConfig
  source: TensorFiles
  model: ModelConfig
  leaves: list[Leaf]
  coverage: Coverage


def understand(folder: Path, resolver: Resolver | None = None) -> Conversion:
  """Reads configuration and headers; proves that the tensors are the model's.

  Args:
    folder: as `save_pretrained` makes it.
    resolver: of settings of the user's; None: there are none.

  Raises:
    UserError: when they are not, or we cannot hold the model.
  """
  if not folder.is_dir():
    raise UserError(
      f'{folder} is no directory; fetch a model first: hf download '
      'google/flan-t5-small --local-dir flan-t5-small'
    )
  described = hf_config.read_config(folder)
  source = TensorFiles(folder)
  copies = _embedding_copies(source)
  tied = _is_tied(described, source, copies)
  model = hf_config.model_config(described, tied=tied)
  if resolver is not None:
    model = overridden(model, resolver, described.where)
  leaves = hf_names.make_leaves(model)

  def ignored(name: str) -> str | None:
    return copies.get(name) or hf_names.why_unused(name)

  coverage = check(leaves, parameter_shapes(model), source, ignored)
  used = (source.tensors[v.name] for leaf in leaves for v in leaf.views.flat)
  stored = {(tensor.file, tensor.stored_as) for tensor in used}  # once each
  passed_over = {
    name: reason
    for name, reason in coverage.ignored.items()
    if (source.tensors[name].file, source.tensors[name].stored_as)
    not in stored  # else it is the one stored, under another name
  }
  coverage = dataclasses.replace(
    coverage, used=len(stored), ignored=passed_over
  )
  return Conversion(described, source, model, leaves, coverage)


def load(
  folder: Path, mesh: jax.sharding.Mesh, config: MeshConfig
) -> tuple[ModelConfig, Any]:
  """Returns a model of transformers and its parameters, born on a mesh.

  Each device's part is read from the files and goes to that device alone.

  Args:
    folder: as `save_pretrained` makes it.
    mesh: the devices.
    config: of the mesh.

  Raises:
    UserError: as `understand`; when a dimension does not divide over the mesh.
  """
  conversion = understand(folder)
  wanted = abstract_params(conversion.model, mesh, config)
  params = load_params(conversion.source, conversion.leaves, wanted)
  return conversion.model, params


def run(args: argparse.Namespace, config: RunConfig) -> None:
  """Converts `args.source` to the model directory `args.output`.

  Raises:
    UserError: when the source is not what it must be, or the output exists:
      nothing is written then; when transformers computes something else: the
      output is left to be looked at.
  """
  folder, output = Path(args.source), Path(args.output)
  model_directory.check_output(output)
  mesh_settings, mesh = mesh_config(args, config), None
  if mesh_settings is not None:
    mesh = partitioning.make_mesh(mesh_settings)
  log.info('reading %s', folder)
  conversion = understand(folder, args.resolver)
  abstract = None
  if mesh is not None:
    abstract = abstract_params(conversion.model, mesh, mesh_settings)
    log.info('onto the mesh %s', partitioning.describe(mesh.shape))
  vocabulary = folder / THEIR_VOCABULARY
  if vocabulary.is_file():
    _check_vocabulary(vocabulary, conversion.model)
  log.info('%s', conversion.coverage.describe())
  model_type = conversion.described.model_type
  write_model(
    output,
    conversion.model,
    conversion.source,
    conversion.leaves,
    record=_record(conversion, folder),
    comment=f'{model_type} of transformers: {folder.name}',
    vocabulary=vocabulary if vocabulary.is_file() else None,
    abstract_params=abstract,
  )
  log.info('wrote %s: %s', output, _size(conversion))
  if not vocabulary.is_file():
    log.warning(
      '%s has no %s, so %s has no vocabulary: put that file of the same '
      'model into it as %s, or give it to every command with '
      '--gin.DataConfig.vocabulary=FILE',
      folder, THEIR_VOCABULARY, output, VOCABULARY_FILE,
    )  # fmt: skip
  if not args.no_check:
    found = _check_batch(conversion, folder, output, mesh, abstract)
    if processes.is_leader():
      path = output / model_directory.RECORD_FILE
      write_json(path, read_json(path) | {'fixed_batch': found})
    if any(
      isinstance(x, dict) and not x.get('agrees', True) for x in found.values()
    ):
      raise UserError(
        f'{output} was written, and does not compute what transformers does; '
        'do not use it before you know why'
      )
  log.info('%s', next_step(output))


def _check_vocabulary(path: Path, model: ModelConfig) -> None:
  """Refuses a vocabulary that is none, or cannot be the model's."""
  try:
    pieces = load_vocabulary(str(path), 0).vocab_size
  except UserError as e:
    why = str(e).partition(';')[0]
    raise UserError(f'{why}; fetch it again, or remove it') from e
  if pieces > model.vocab_size:
    raise UserError(
      f'{path} has {pieces:,} pieces, and the model {model.vocab_size:,} '
      'embeddings; it is not of this model: fetch the right one, or remove it'
    )


# What the output is


def _embedding_copies(source: TensorFiles) -> dict[str, str]:
  """Returns why each further copy of the embedding is passed over.

  Raises:
    UserError: for a copy that is none.
  """
  copies = [name for name in hf_names.COPIES if name in source.tensors]
  if hf_names.SHARED not in source.tensors and copies:
    source.name_also(hf_names.SHARED, copies[0])
  if hf_names.SHARED not in source.tensors:
    raise UserError(
      f'{source.where} lacks {hf_names.SHARED}: its tensors have other names '
      f'({", ".join(sorted(source.tensors)[:_SHOWN])}, ...) than those of a '
      'whole model of transformers'
    )
  for name in copies:
    if not _equal(source, name, hf_names.SHARED):
      raise UserError(
        f'{name} of {source.where} differs from {hf_names.SHARED}; one '
        'embedding serves both stacks here'
      )
  return dict.fromkeys(copies, f'equal to {hf_names.SHARED}')


def _is_tied(
  described: hf_config.HfConfig, source: TensorFiles, copies: dict[str, str]
) -> bool:
  """Returns whether the output is the scaled embedding, by the tensors.

  An lm_head that equals the embedding joins `copies` where it is not needed.

  Raises:
    UserError: when configuration and tensors contradict each other.
  """
  has_head = hf_names.LM_HEAD in source.tensors
  same = has_head and _equal(source, hf_names.LM_HEAD, hf_names.SHARED)
  scales = described.scales_outputs
  if scales is None:
    if not has_head or same:
      raise UserError(
        f'{described.where}: an mt5 without an {hf_names.LM_HEAD} of its own: '
        'transformers 4 scales its outputs and 5 does not; say which it was '
        'trained with: "transformers_version": "4" or "5"'
      )
    return False
  if scales:
    if has_head and not same:
      raise UserError(
        f'{described.where} says that the output is the embedding, but '
        f'{hf_names.LM_HEAD} differs from {hf_names.SHARED}; set '
        '"tie_word_embeddings": false there, if it was trained so (T5 v1.1, '
        'FLAN-T5)'
      )
    if has_head:
      copies[hf_names.LM_HEAD] = f'equal to {hf_names.SHARED}'
    return True
  if not has_head:
    apart = described['tie_word_embeddings'] is False
    if apart and 'scale_decoder_outputs' not in described.given:
      raise UserError(
        f'{source.where} lacks {hf_names.LM_HEAD}, and {described.where} says '
        'that the output is not the embedding; fetch the checkpoint again, or '
        'correct tie_word_embeddings'
      )
    log.info('no lm_head: the output is the embedding, unscaled; it is copied')
    source.name_also(hf_names.LM_HEAD, hf_names.SHARED)
  return False


def _equal(source: TensorFiles, name: str, other: str) -> bool:
  """Whether two tensors hold the same numbers; reads some rows at a time."""
  first, second = source.tensors[name], source.tensors[other]
  if first.shape != second.shape:
    return False
  rows = max(1, (8 << 20) // (first.nbytes // first.shape[0]))
  for start in range(0, first.shape[0], rows):
    index = (slice(start, start + rows), slice(None))
    if not np.array_equal(source.read(name, index), source.read(other, index)):
      return False
  return True


# What is said


def _size(conversion: Conversion) -> str:
  return f'{_num_bytes(conversion) // 4:,} parameters in float32'


def _num_bytes(conversion: Conversion) -> int:
  return 4 * sum(math.prod(leaf.shape) for leaf in conversion.leaves)


def _record(conversion: Conversion, folder: Path) -> dict[str, Any]:
  """Returns model.json: where the model is from, and in which dtypes it was."""
  dtypes = {n: t.dtype.name for n, t in conversion.source.tensors.items()}
  sizes: collections.Counter = collections.Counter()
  for name, tensor in conversion.source.tensors.items():
    sizes[dtypes[name]] += tensor.nbytes
  main = sizes.most_common(1)[0][0]
  return {
    'kind': 'from-hf',
    'source': str(folder.absolute()),
    'model_type': conversion.described.model_type,
    'dtype': main,
    'other_dtypes': {n: d for n, d in sorted(dtypes.items()) if d != main},
    'coverage': dataclasses.asdict(conversion.coverage),
  }


# The fixed batch


def _check_batch(
  conversion: Conversion,
  folder: Path,
  output: Path,
  mesh: jax.sharding.Mesh | None,
  abstract: Any,
) -> dict[str, Any]:
  """Runs the fixed batch here and, where it can, in transformers.

  Returns:
    What model.json is to say of it.
  """
  model = conversion.model
  batch = fixed_batch.make_batch(model.vocab_size, fixed_batch.rows_for(mesh))
  capacities = [None, _FEW_SLOTS] if model.num_experts else [None]
  absent = hf_reference.why_absent(_num_bytes(conversion))
  log.info(
    'running one fixed batch of %d rows through %s%s',
    len(batch['encoder_input_tokens']),
    output,
    ', and through transformers, which holds the whole model in memory'
    if absent is None
    else '',
  )
  found: dict[str, Any] = {} if absent is None else {'reference': absent}
  for capacity in capacities:
    config = fixed_batch.with_capacity(model, capacity)
    ours = _our_outputs(config, output, mesh, abstract, batch)
    if not (np.isfinite(ours.logits).all() and np.isfinite(ours.encoded).all()):
      raise UserError(
        f'{output} gives logits that are not finite; remove it: the tensors of '
        f'{folder} are damaged'
      )
    name = 'no capacity' if capacity is None else f'capacity {capacity}'
    if absent is None:
      found[name] = _say_difference(
        folder, batch, ours,
        name if capacity is None else f'{name} for this check',
        capacity or fixed_batch.INPUTS, bool(model.num_experts),
      )  # fmt: skip
    else:
      found[name] = {'largest_logit': float(np.abs(ours.logits).max())}
  if absent is not None:
    log.info(
      'outputs are finite; no reference at hand to compare with (%s)', absent
    )
  return found


def _our_outputs(
  config: ModelConfig,
  output: Path,
  mesh: jax.sharding.Mesh | None,
  abstract: Any,
  batch: dict[str, np.ndarray],
) -> fixed_batch.Outputs:
  """Runs the written checkpoint."""
  if mesh is None and not config.scan_layers:
    arrays = ArrayReader(output, None)
    return fixed_batch.run_by_layers(config, arrays.tensors, arrays.read, batch)
  if mesh is None:
    mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_params(config, mesh, MeshConfig())
  params = restore_params(output, None, abstract).params
  with partitioning.use_mesh(mesh):
    placed = partitioning.shard_batch(batch, mesh)
    return fixed_batch.run_whole(config, params, placed)


def _say_difference(
  folder: Path,
  batch: dict[str, np.ndarray],
  ours: fixed_batch.Outputs,
  name: str,
  capacity: int,
  sparse: bool,
) -> dict[str, Any]:
  """Runs transformers, prints the difference and returns it."""
  theirs = hf_reference.run_in_child(
    folder, batch, capacity if sparse else None
  )
  if isinstance(theirs, str):
    log.warning('transformers could not run %s (%s)', folder, theirs)
    return {'reference': theirs}
  difference = fixed_batch.compare(batch, ours, fixed_batch.Outputs(**theirs))
  log.info(
    'largest difference to transformers%s: encoder output %.2g (of %.3g), '
    'logits %.2g (of %.3g)',
    f', {name}' if sparse else '', difference.encoded,
    difference.largest_encoded, difference.logits, difference.largest_logit,
  )  # fmt: skip
  if not difference.small():
    log.warning('that is more than rounding')
  return dataclasses.asdict(difference) | {'agrees': difference.small()}
