"""`st_moe convert to-hf`: a model of ours as safetensors and JSON.

Where transformers has a class for the model, as that class wants it. Else with
our own names, as docs/export.md describes.
"""

import argparse
import dataclasses
import functools
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from st_moe import model_directory, stacking
from st_moe.config import ModelConfig, to_dict
from st_moe.convert import hf_config, hf_export, hf_names
from st_moe.convert.mapping import Leaf, View, in_form, one, reversed_leaves
from st_moe.convert.own_models import OwnModel, open_model
from st_moe.convert.safetensors_files import (
  DTYPES,
  Entry,
  shards_of,
  write_shards,
)
from st_moe.convert.writing import parameter_shapes
from st_moe.errors import UserError
from st_moe.workdir import VOCABULARY_FILE, write_json

log = logging.getLogger(__name__)

# Of config.json of our own form; it rises when names or shapes change.
FORMAT = 'st_moe'
FORMAT_VERSION = 1

_UNITS = {'KB': 10**3, 'MB': 10**6, 'GB': 10**9}
_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}


def run(args: argparse.Namespace, config: Any) -> None:
  """Exports the model of `args.source` to the folder `args.output`.

  Raises:
    UserError: when there is no model, or the output exists.
  """
  del config  # the model's own is beside it
  source, output = Path(args.source), Path(args.output)
  model_directory.check_output(output)
  limit = parse_size(args.max_shard_size)
  log.info('reading %s', source)
  opened = open_model(source, args.step)
  reason = hf_export.why_not(opened.config.model)
  leaves = (
    hf_names.make_leaves(opened.config.model)
    if reason is None
    else own_leaves(opened.config.model)
  )
  shards = shards_of(_entries(opened, leaves, args.dtype), limit)
  temporary = output.absolute().with_name(f'.{output.name}.writing')
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    temporary.mkdir(parents=True)
    _write_rest(temporary, opened, reason, _main_dtype(opened, args.dtype))
    write_shards(temporary, shards)
    if output.is_dir():
      output.rmdir()  # empty, as was checked
    temporary.rename(output)
  except OSError as e:
    raise UserError(
      f'{output} cannot be written ({e.strerror}); make room, or name another '
      'output'
    ) from e
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  _say(output, opened, leaves, shards, reason)


def parse_size(text: str) -> int:
  """Returns the bytes of '500MB'.

  Raises:
    UserError: when it is no such size.
  """
  match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*([KMG]B)', text, re.IGNORECASE)
  if not match or not float(match[1]):
    raise UserError(
      f'--max_shard_size={text} is no size; write 500MB, 5GB or the like'
    )
  return int(float(match[1]) * _UNITS[match[2].upper()])


def own_leaves(config: ModelConfig) -> list[Leaf]:
  """Returns what every parameter is called in our own export.

  As in a written-out model, with '.' for '/'. Experts stay in one tensor; no
  tensor is transposed.
  """
  written_out = dataclasses.replace(config, scan_layers=False)
  leaves = [
    one(name, shape, View(name.replace('/', '.')))
    for name, shape in parameter_shapes(written_out).items()
  ]
  return in_form(leaves, config)


# Tensors


def _main_dtype(opened: OwnModel, asked: str | None) -> str:
  return asked or opened.found.record.get('dtype', 'float32')


def _entries(
  opened: OwnModel, leaves: list[Leaf], asked: str | None
) -> Iterator[Entry]:
  """Yields every tensor in the order of the parameters, not yet read."""
  main = _main_dtype(opened, asked)
  others = {} if asked else opened.found.record.get('other_dtypes', {})
  copies = ()
  if opened.config.model.num_experts and not opened.config.model.tie_embeddings:
    # transformers 5 ties the embeddings of an untied Switch Transformer's
    # stacks to nothing.
    copies = hf_names.COPIES
  for name, leaf, at, view in reversed_leaves(leaves):
    shape = leaf.part_shape
    for each in (name, *(copies if name == hf_names.SHARED else ())):
      yield Entry(
        name=each,
        shape=shape[::-1] if view.transpose else shape,
        dtype=_DTYPES[others.get(each, main)],
        make=functools.partial(_values, opened, leaf, at, view),
      )


def _values(
  opened: OwnModel, leaf: Leaf, at: tuple[int, ...], view: View
) -> np.ndarray:
  value = opened.reader.read(leaf.name)[at]
  return value.T if view.transpose else value


# The files beside them


def _write_rest(
  folder: Path, opened: OwnModel, reason: str | None, dtype: str
) -> None:
  """Writes configuration and vocabulary."""
  if reason is None:
    content = hf_export.config_json(
      opened.config.model, model_type=_model_type(opened), dtype=dtype
    )
    generation = {
      'decoder_start_token_id': 0,
      'eos_token_id': 1,
      'pad_token_id': 0,
    }
    write_json(folder / 'generation_config.json', generation)
  else:
    content = {
      'format': FORMAT,
      'format_version': FORMAT_VERSION,
      'dtype': dtype,
      'model': to_dict(opened.config.model),
      'sparse_layers': {
        stack: stacking.sparse_layers(opened.config.model, stack)
        for stack in stacking.STACKS
      },
    }
  write_json(folder / hf_config.CONFIG_FILE, content)
  if opened.found.vocabulary is not None:
    name = 'spiece.model' if reason is None else VOCABULARY_FILE
    shutil.copyfile(opened.found.vocabulary, folder / name)


def _model_type(opened: OwnModel) -> str:
  """Returns the family that transformers is to know the model by."""
  family = hf_export.model_type_of(opened.config.model)
  came_as = opened.found.record.get('model_type', '')
  return 'mt5' if (came_as, family) == ('mt5', 't5') else family


def _say(
  output: Path,
  opened: OwnModel,
  leaves: list[Leaf],
  shards: dict[str, list[Entry]],
  reason: str | None,
) -> None:
  """Prints what was written and how it is used."""
  entries = [entry for shard in shards.values() for entry in shard]
  log.info(
    '%d parameters used, %d tensors filled in %d file(s), %.1f MB',
    len(leaves), len(entries), len(shards),
    sum(entry.nbytes for entry in entries) / 1e6,
  )  # fmt: skip
  log.info('wrote %s of step %d', output, opened.reader.step)
  if reason is not None:
    log.info(
      'transformers has no class for this model (%s): the files have our own '
      'names and shapes, which docs/export.md describes',
      reason,
    )
    return
  name = hf_config.CLASSES[_model_type(opened)]
  log.info(
    "load it:\n  python -c \"import transformers as t; print(t.%s"
    ".from_pretrained('%s'))\"",
    name, output,
  )  # fmt: skip
