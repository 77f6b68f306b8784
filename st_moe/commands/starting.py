"""What every command does first: its configuration, the job, the log."""

import argparse
import glob
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from st_moe import processes
from st_moe.bindings import Binding, Resolver, flatten
from st_moe.config import RunConfig
from st_moe.errors import UserError
from st_moe.gin_files import read_bindings
from st_moe.plan.devices import NO_TPU


def configure(
  args: argparse.Namespace,
  files: Sequence[str],
  flags: Sequence[Binding] = (),
  *,
  needs_model: bool = False,
  allow_missing: bool = False,
) -> RunConfig:
  """Builds the configuration of a command; later errors are located by it."""
  bindings = read_bindings(files, [*args.gin_bindings, *flags], args.seed)
  args.resolver = Resolver(bindings, allow_missing=allow_missing)
  if needs_model and not args.resolver.binds('ModelConfig'):
    raise UserError(
      'no model is configured; add --gin_file=gin_configs/models/NAME.gin '
      'before the run file; see `st_moe config list`'
    )
  return args.resolver.run_config()


def program() -> list[str]:
  """Returns what the user typed before the command, to be typed again."""
  typed = Path(sys.argv[0])
  if typed.parts[-2:] == ('st_moe', '__main__.py'):
    return [sys.executable, '-m', 'st_moe']
  return [sys.argv[0]] if typed.name == 'st_moe' else ['st_moe']


def resume_command(args: argparse.Namespace) -> str:
  """Returns what to type to go on with a run: its config.gin has the rest."""
  flags = [f'--module={module}' for module in args.module]
  given = _connection(args).given()
  if given:  # every process its own number
    given['--process_id'] = 'I'
  flags += [f'{flag}={value}' for flag, value in given.items()]
  return shlex.join(
    [*program(), args.command, f'--workdir={args.workdir}', *flags]
  )


def _connection(args: argparse.Namespace) -> processes.Connection:
  return processes.Connection(
    distributed=args.distributed,
    coordinator_address=args.coordinator_address,
    num_processes=args.num_processes,
    process_id=args.process_id,
    timeout=args.connect_timeout,
  )


def connect(args: argparse.Namespace, *, stop_signals: bool) -> None:
  """Joins the job; before anything that may fail in one process alone."""
  if not args.debug:
    _silence_libraries()
  processes.connect(_connection(args), stop_signals=stop_signals)


def check_same(args: argparse.Namespace, config: RunConfig) -> None:
  """Refuses to go on when the processes of a job were started otherwise."""
  flags = (
    *('module', 'allow_config_change', 'step', 'num_processes'),
    *('batch_size', 'temperature', 'top_k', 'top_p', 'num_beams'),
    *('length_penalty', 'early_stopping'),
  )
  processes.check_same(
    processes.software(), 'install the same packages for every process'
  )
  processes.check_same(
    {'the command': args.command}
    | flatten(config)
    | {f'--{flag}': getattr(args, flag, None) for flag in flags},
    'start every process with the same flags',
  )


def prepare(args: argparse.Namespace, *, say_on: str = 'stdout') -> None:
  """Sets the log up and imports the user's modules.

  Args:
    args: of the command.
    say_on: 'stderr' where standard output is for the result alone.
  """
  _prepare_log(args.debug, getattr(sys, say_on))
  for module in args.module:
    from st_moe.data.pipeline import import_tasks

    import_tasks(module)


def _prepare_log(debug: bool, stream: TextIO) -> None:
  """Shows our own log lines, and of the libraries' only errors.

  What goes on is printed on `stream`, warnings on standard error.
  """
  progress = logging.StreamHandler(stream)
  progress.addFilter(lambda record: record.levelno < logging.WARNING)
  warnings = logging.StreamHandler(sys.stderr)
  warnings.setLevel(logging.WARNING)
  warnings.setFormatter(logging.Formatter(f'{processes.prefix()}%(message)s'))
  logging.basicConfig(
    format='%(message)s',
    level=logging.WARNING,
    handlers=[progress, warnings],
  )
  logging.getLogger('st_moe').setLevel(logging.INFO)
  if debug:
    return
  _silence_libraries()
  import absl.logging

  absl.logging.set_verbosity(absl.logging.ERROR)


def _silence_libraries() -> None:
  variables = {'TF_CPP_MIN_LOG_LEVEL': '3'}
  if not any(glob.glob(path) for path in ('/dev/accel*', '/dev/vfio/*')):
    variables |= NO_TPU
  for name, value in variables.items():
    os.environ.setdefault(name, value)
