"""The door of `st_moe convert`."""

import argparse
import importlib
import os

import jax

from st_moe import processes
from st_moe.config import RunConfig


def run(args: argparse.Namespace, config: RunConfig | None) -> None:
  """Runs one kind of conversion: `run` of the module of its name.

  Args:
    args: the command line.
    config: of the gin files and flags, if any; None for the kinds that read
      these on top of the source's configuration.

  Raises:
    UserError: when the source or the output is not what it must be.
  """
  if not _needs_devices(args) and 'JAX_PLATFORMS' not in os.environ:
    jax.config.update('jax_platforms', 'cpu')
  module = importlib.import_module(
    f'st_moe.convert.{args.kind.replace("-", "_")}'
  )
  module.run(args, config)


def _needs_devices(args: argparse.Namespace) -> bool:
  """Whether arrays go onto a mesh.

  Else the host does all: the library of an accelerator alone is 0.1 GB, and
  another program may be using the device.
  """
  given = getattr(args, 'mesh', None) is not None
  bound = args.resolver is not None and args.resolver.binds('MeshConfig')
  return given or bound or processes.joined()
