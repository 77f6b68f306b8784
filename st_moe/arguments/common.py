"""What commands share: their parser, and the flags of all or several."""

import argparse
from typing import Any

from st_moe.errors import UserError, did_you_mean

# Of --mesh.
_AXES = ('slice', 'data', 'expert', 'model')


class Parser(argparse.ArgumentParser):
  """An ArgumentParser whose errors are ours: one line, exit status 2."""

  def error(self, message: str):
    raise UserError(f'{message}; see `{self.prog} --help`')


def add_command(
  subparsers: Any,
  name: str,
  text: str,
  example: str,
) -> Parser:
  """Adds a command with the flags that all commands share."""
  command = subparsers.add_parser(
    name,
    help=text,
    description=f'{text[0].upper()}{text[1:]}.',
    epilog=f'Example: st_moe {name} {example}',
    allow_abbrev=False,
  )
  command.set_defaults(command=name)
  add = command.add_argument
  add(
    '--gin_file',
    action='append',
    default=[],
    metavar='FILE',
    help='gin file; may be repeated, later files win',
  )
  add(
    '--gin_bindings',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help='set a macro or a field; usually written --gin.NAME=VALUE, as in '
    '--gin.STEPS=60 --gin.ModelConfig.d_model=128; strings need no quotes',
  )
  add(
    '--module',
    action='append',
    default=[],
    metavar='NAME',
    help='Python module to import first: it registers your seqio tasks',
  )
  add('--seed', type=int, help='wins over RunConfig.seed and SEED')
  add('--debug', action='store_true', help='show tracebacks and library logs')
  return command


def add_connection(command: Parser) -> None:
  """Adds the flags with which several processes make one run."""
  add = command.add_argument
  add(
    '--distributed',
    choices=('auto', 'on', 'off'),
    default='auto',
    help='one of several processes; auto (the default): if SLURM, Open MPI, a '
    'TPU pod or JAX_COORDINATOR_ADDRESS says so, or a flag below is given',
  )
  add(
    '--coordinator_address',
    metavar='HOST:PORT',
    help='of process 0, which opens that port (default: as the cluster says; '
    'the two below too)',
  )
  add('--num_processes', type=int, metavar='N', help='in the whole run')
  add('--process_id', type=int, metavar='I', help='of this one, from 0')
  add(
    '--connect_timeout',
    type=int,
    default=300,
    metavar='SECONDS',
    help='to wait until all processes are there (300)',
  )


def add_step(command: Parser) -> None:
  """Adds the flag that says which checkpoint of a run is meant."""
  command.add_argument(
    '--step',
    type=_step,
    metavar='N',
    help="of the checkpoint, or 'best': the run's best by "
    'RunConfig.best_metric (default: the newest)',
  )


def _step(text: str) -> Any:
  if text == 'best':
    return text
  if not text.isdigit():
    raise argparse.ArgumentTypeError(
      f"{text!r} is neither a number of steps nor 'best'"
    )
  return int(text)


def parse_mesh(text: str) -> dict[str, int]:
  """Reads 'data=8,expert=64'.

  Raises:
    UserError: for what is not AXIS=SIZE with a mesh axis.
  """
  sizes: dict[str, int] = {}
  for word in text.split(','):
    axis, _, size = word.partition('=')
    if axis not in _AXES or not size.lstrip('-').isdigit():
      raise UserError(
        f'--mesh={text}: {word!r} is not AXIS=SIZE, axes are '
        f'{", ".join(_AXES)}{did_you_mean(axis, _AXES)}'
      )
    sizes[axis] = int(size)
  return sizes
