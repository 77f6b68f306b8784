"""`st_moe pretrain` and `st_moe finetune`."""

import argparse
import logging
from pathlib import Path

from st_moe import gin_files
from st_moe.bindings import Binding, Resolver, operative_config
from st_moe.commands import starting
from st_moe.config import RunConfig
from st_moe.errors import UserError
from st_moe.gin_files import read_bindings
from st_moe.model_gin import model_bindings
from st_moe.workdir import CONFIG_FILE, check_path

log = logging.getLogger(__name__)


def pretrain(args: argparse.Namespace) -> None:
  """Trains from fresh weights, or goes on with a run."""
  starting.connect(args, stop_signals=True)
  workdir = Path(args.workdir)
  resumed = workdir / CONFIG_FILE
  if not args.gin_file and resumed.is_file():
    args.gin_file = [str(resumed)]
  if not args.gin_file:
    raise UserError(
      'pretrain needs --gin_file=FILE, for example '
      '--gin_file=gin_configs/runs/quickstart.gin; see `st_moe config list`'
    )
  _train(args, starting.configure(args, args.gin_file, needs_model=True))


def finetune(args: argparse.Namespace) -> None:
  """Trains on from the weights of a checkpoint, whose model it is."""
  starting.connect(args, stop_signals=True)
  resumed = Path(args.workdir) / CONFIG_FILE
  if args.checkpoint is None and resumed.is_file():
    files = args.gin_file or [str(resumed)]
    _train(args, starting.configure(args, files, needs_model=True))
    return
  if args.checkpoint is None:
    raise UserError(
      'finetune needs --checkpoint=DIR: a run, or a model that `st_moe '
      'convert` made'
    )
  if not args.gin_file:
    raise UserError(
      'finetune needs --gin_file=FILE, for example '
      '--gin_file=gin_configs/runs/finetune_sparse.gin; see `st_moe config '
      'list`'
    )
  given = model_bindings(Path(args.checkpoint))
  for name in args.gin_file:
    given += gin_files.read_file(gin_files.find(name))
  weights = Binding(
    'RunConfig.initial_checkpoint', args.checkpoint, '--checkpoint'
  )
  flags = [*given, *args.gin_bindings, weights]
  bindings = read_bindings([], flags, args.seed)
  args.resolver = Resolver(bindings)
  _train(args, args.resolver.run_config())


def _train(args: argparse.Namespace, config: RunConfig) -> None:
  workdir = Path(args.workdir)
  check_path(workdir)
  starting.prepare(args)
  starting.check_same(args, config)
  log.info('loading JAX')
  from st_moe import train

  train.pretrain(
    config,
    workdir,
    operative_config=operative_config(config),
    command=[*starting.program(), *args.argv],
    resume_command=starting.resume_command(args),
    allow_config_change=args.allow_config_change,
  )
