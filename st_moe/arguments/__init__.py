"""The words of the command line: commands and their flags.

Flags are spelt as absl spells them: `--gin_file=`, `--gin.NAME=VALUE`,
`--workdir=`. Nothing heavy is imported, so that `--help` answers at once.
"""

import argparse
import itertools
import re

from st_moe import __version__, bindings
from st_moe.arguments.common import Parser, parse_mesh
from st_moe.arguments.converting import CHANGE_A_MODEL, add_convert
from st_moe.arguments.measuring import add_bench, add_plan
from st_moe.arguments.running import (
  add_cache,
  add_config,
  add_evaluate,
  add_finetune,
  add_predict,
  add_pretrain,
  add_trace,
  add_vocab,
)
from st_moe.arguments.studying import add_study
from st_moe.errors import UserError, did_you_mean

__all__ = ['CHANGE_A_MODEL', 'MACROS', 'parse', 'parse_mesh']


# What the run files in gin_configs/ let one set by a short name.
MACROS = (
  'TASK', 'FILES', 'VOCABULARY', 'STEPS', 'BATCH_SIZE', 'LEARNING_RATE',
  'INITIAL_CHECKPOINT',
)  # fmt: skip


def _make_parser() -> tuple[Parser, dict[str, Parser]]:
  """Returns the parser of the program and those of its commands, by words."""
  parser = Parser(
    prog='st_moe',
    description='ST-MoE: sparse T5-style encoder-decoders in JAX.',
    epilog='Exit status: 0 done; 2 the input is wrong; 3 the run stopped '
    'itself. `st_moe COMMAND --help` says more.',
    allow_abbrev=False,
  )
  parser.add_argument('--version', action='version', version=__version__)
  subparsers = parser.add_subparsers(metavar='COMMAND')
  commands = {
    'pretrain': add_pretrain(subparsers),
    'finetune': add_finetune(subparsers),
    'evaluate': add_evaluate(subparsers),
    'predict': add_predict(subparsers),
    'trace': add_trace(subparsers),
    'config': add_config(subparsers),
    'vocab': add_vocab(subparsers),
    'cache': add_cache(subparsers),
    'plan': add_plan(subparsers),
    'study': add_study(subparsers),
    **add_bench(subparsers),
    **add_convert(subparsers),
  }
  return parser, commands


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses a command line; `command` is the command's name.

  Raises:
    UserError: for an unknown word, with the nearest known one.
  """
  parser, commands = _make_parser()
  known = [words for words in commands if ' ' not in words]
  if not argv:
    raise UserError(
      f'no command (one of {", ".join(known)}); see `st_moe --help`'
    )
  if argv[0] not in (*known, '-h', '--help', '--version'):
    raise UserError(
      f'unknown command {argv[0]} (one of {", ".join(known)})'
      f'{did_you_mean(argv[0], known) or "; see `st_moe --help`"}'
    )
  words = ' '.join(argv[:2])  # 'bench layer'
  name = words if words in commands else argv[0]
  if name in commands:
    _check_flags(name, argv[1:], commands[name])
  # argparse has no flags with free names: --gin.X=Y joins --gin_bindings.
  fixed = [re.sub(r'^--gin\.', '--gin_bindings=', arg) for arg in argv]
  args, unknown = parser.parse_known_args(fixed)
  if unknown:
    raise UserError(
      f'{name} takes no argument {unknown[0]}; see `st_moe {name} --help`'
    )
  return args


def _check_flags(name: str, argv: list[str], command: Parser) -> None:
  """Refuses unknown flags, before argparse complains of missing ones."""
  flags = re.findall(r'--\w+', command.format_help())
  for arg, after in itertools.pairwise([*argv, '']):
    flag, equals, value = arg.partition('=')
    if arg == '--compare' and after.startswith('--gin.'):
      bare = after.removeprefix('--gin.')
      raise UserError(f'{arg} takes names without --gin.: {arg} {bare}')
    if flag.startswith('--gin.') and not equals:
      raise UserError(f'{arg} needs a value: {arg}=VALUE')
    if not flag.startswith('--') or flag == '--' or flag.startswith('--gin.'):
      continue
    if flag not in flags:
      near = _setting(flag, value) or did_you_mean(flag, flags)
      if (singular := flag.removesuffix('s')) in flags:  # --steps=best
        near = f'; did you mean {singular}?'
      raise UserError(
        f'{name} has no argument {flag}'
        + (near or f'; see `st_moe {name} --help`')
      )


def _setting(flag: str, value: str) -> str:
  """Returns '; did you mean --gin.STEPS=3?' for `--steps=3`."""
  word = flag.removeprefix('--').replace('-', '_')
  known = [name for name in MACROS if name == word.upper()]
  known += bindings.owners(word.lower())
  return f'; did you mean --gin.{known[0]}={value or "VALUE"}?' if known else ''
