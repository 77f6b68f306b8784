"""The door of `st_moe bench`: layer, step, generate or peers."""

import argparse

from st_moe.bench import generate, layer, peers, step
from st_moe.config import RunConfig

_KINDS = {
  'layer': layer.run,
  'step': step.run,
  'generate': generate.run,
  'peers': peers.run,
}


def run(args: argparse.Namespace, config: RunConfig) -> None:
  """Runs the benchmark `args.kind`.

  Args:
    args: of the command line.
    config: from gin.

  Raises:
    UserError: for what cannot be measured.
    RunStopped: when what would be measured is wrong.
  """
  _KINDS[args.kind](args, config)
