"""Parameters of another model made into ours: on disk, or onto a mesh."""

import argparse
import dataclasses
import functools
import logging
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.progress import track

from st_moe import processes, trees
from st_moe.arguments import parse_mesh
from st_moe.config import MeshConfig, ModelConfig, RunConfig
from st_moe.convert.mapping import Leaf, Source, read_leaf
from st_moe.model_directory import MODEL_FILE, ModelWriter, find_model
from st_moe.preflight import check_model_divides
from st_moe.train_state import abstract_state, state_shardings
from st_moe.transformer import EncoderDecoder

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=4)
def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter of a model, by name."""
  run, model = RunConfig(model=config), EncoderDecoder(config)
  shapes = abstract_state(run, model).shapes
  return {
    name: tuple(leaf.shape)
    for name, leaf in trees.by_name(shapes.params).items()
  }


def abstract_params(
  config: ModelConfig, mesh: Mesh, mesh_config: MeshConfig
) -> Any:
  """Returns the parameters' shapes with their placement on a mesh.

  Raises:
    UserError: when the model cannot be divided so.
  """
  check_model_divides(config, mesh)
  abstract = abstract_state(RunConfig(model=config), EncoderDecoder(config))
  shardings = state_shardings(abstract, mesh, mesh_config)
  return abstract.with_shardings(shardings).params


def mesh_config(
  args: argparse.Namespace, config: RunConfig
) -> MeshConfig | None:
  """Returns the mesh that the user gave, with --mesh or gin, if any."""
  if args.mesh is None and not args.resolver.binds('MeshConfig'):
    return None
  sizes = {} if args.mesh is None else parse_mesh(args.mesh)
  return dataclasses.replace(config.mesh, **sizes)


def place_leaf(
  source: Source, leaf: Leaf, sharding: jax.sharding.Sharding
) -> jax.Array:
  """Returns a parameter on its devices; each reads only its own part."""
  return jax.make_array_from_callback(
    leaf.shape, sharding, lambda index: read_leaf(source, leaf, index)
  )


def load_params(
  source: Source, leaves: Sequence[Leaf], abstract_params: Any
) -> Any:
  """Returns the parameters, straight onto their devices.

  Args:
    source: of the tensors.
    leaves: of every parameter, as `mapping.check` approved them.
    abstract_params: tree of ShapeDtypeStructs with shardings.
  """
  shapes = trees.by_name(abstract_params)
  values = {
    leaf.name: place_leaf(source, leaf, shapes[leaf.name].sharding)
    for leaf in leaves
  }
  return trees.like(abstract_params, values)


def progress(leaves: Sequence[Leaf], title: str) -> Iterable[Leaf]:
  """Returns the leaves, with a bar where a person watches one process."""
  if not (processes.is_leader() and sys.stdout.isatty()):
    return leaves  # rich would end a hidden bar with an empty line
  return track(leaves, title, transient=True)


def write_model(
  output: Path,
  config: ModelConfig,
  source: Source,
  leaves: Sequence[Leaf],
  *,
  record: dict[str, Any],
  comment: str,
  vocabulary: Path | None = None,
  step: int = 0,
  abstract_params: Any = None,
) -> None:
  """Writes a model directory, one parameter at a time.

  Args:
    output: of the model directory; must not hold anything.
    config: of the model.
    source: of the tensors.
    leaves: of every parameter, as `mapping.check` approved them.
    record: of model.json.
    comment: first line of the gin file.
    vocabulary: a SentencePiece model to copy.
    step: how long the model was trained.
    abstract_params: with shardings, where each device of a mesh is to read
      and write its part; None: one process on one device.

  Raises:
    UserError: when `output` cannot be written; nothing is left.
  """
  shapes = trees.by_name(abstract_params) if abstract_params else {}
  with ModelWriter(output, step) as writer:
    for leaf in progress(leaves, 'converting'):
      if shapes:
        value = place_leaf(source, leaf, shapes[leaf.name].sharding)
      else:
        value = read_leaf(source, leaf)
      writer.add('params', leaf.name, value)
    writer.commit(config, record=record, vocabulary=vocabulary, comment=comment)


def next_step(output: Path, *flags: str) -> str:
  """Returns the command that trains a written model further, in two lines.

  A model whose vocabulary is not known is given one: 'auto' would be refused.

  Args:
    output: the model directory.
    flags: what to add.
  """
  known = find_model(output).vocabulary_spec() is not None
  words = [
    'st_moe', 'pretrain', f'--gin_file={output / MODEL_FILE}',
    '--gin_file=gin_configs/runs/small.gin',
    f'--gin.INITIAL_CHECKPOINT={output}',
    *([] if known else ['--gin.VOCABULARY=VOCABULARY']),
    '--gin.FILES=TEXT', '--workdir=DIR', *flags,
  ]  # fmt: skip
  which = '' if known else ' (VOCABULARY: the file that it was trained with)'
  return f'train it further{which}:\n  {shlex.join(words)}'
