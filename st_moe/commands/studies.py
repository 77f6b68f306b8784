"""`st_moe study NAME`, `study list` and `study report DIR`."""

import argparse
import shlex
from pathlib import Path

from st_moe.commands import starting
from st_moe.errors import UserError


def study(args: argparse.Namespace) -> None:
  """Runs a study, lists all, or reports what is there."""
  from st_moe.study import commands

  if args.name == 'list':
    commands.list_studies()
    return
  if args.name == 'report':
    if args.directory is None:
      raise UserError(
        'study report needs the DIR that was the --workdir of a study'
      )
    commands.report(Path(args.directory))
    return
  if args.directory is not None:
    raise UserError(
      f'study {args.name} takes no {args.directory}; give --workdir=DIR'
    )
  starting.prepare(args)
  commands.run(args, shlex.join([*starting.program(), *args.argv]))
