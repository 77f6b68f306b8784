"""Commands on a model: `st_moe evaluate`, `bench`, `plan` and `convert`."""

import argparse
import logging
from pathlib import Path

from st_moe import arguments
from st_moe.bindings import Binding
from st_moe.commands import starting
from st_moe.errors import UserError

log = logging.getLogger(__name__)

_EVALUATE_FILE = 'gin_configs/runs/evaluate.gin'


def evaluate(args: argparse.Namespace) -> None:
  """Losses of a checkpoint on held-out text, or its answers to tasks."""
  starting.connect(args, stop_signals=False)
  workdir = Path(args.workdir)
  found = starting.gin_file_of(workdir)
  if found is None:
    raise UserError(
      f'{workdir} holds no run: it has no config.gin; give the --workdir of '
      '`st_moe pretrain`, or a model that `st_moe convert` made'
    )
  files = [str(found), *args.gin_file]
  if not args.gin_file and any(one.is_macro for one in args.gin_bindings):
    files.append(_EVALUATE_FILE)  # TASK and the others are its macros
  config = starting.configure(args, files, _test_split(args))
  if not args.resolver.binds('DataConfig'):
    raise UserError(
      f'{workdir} is a model without a run and has no held-out text of its '
      'own; add --gin.TASK=text --gin.FILES=FILE, or --gin.TASK=superglue '
      '--gin.TASK_DIR=DIR'
    )
  starting.prepare(args)
  starting.check_same(args, config)
  log.info('loading JAX')
  from st_moe import evaluate

  evaluate.evaluate(
    config,
    workdir,
    step=args.step,
    output=None if args.output is None else Path(args.output),
    submission=None if args.submission is None else Path(args.submission),
  )


def _test_split(args: argparse.Namespace) -> list[Binding]:
  """Answers to be submitted are to the test split, if no other is named."""
  split = 'EvaluationConfig.split'
  if args.submission is None:
    return []
  if any(one.name in ('SPLIT', split) for one in args.gin_bindings):
    return []
  return [Binding(split, 'test', '--submission')]


def bench(args: argparse.Namespace) -> None:
  """Measures a layer, a step or peers."""
  if args.kind == 'step' and not args.gin_file:
    raise UserError(
      'bench step needs --gin_file=FILE, for example '
      '--gin_file=gin_configs/runs/quickstart.gin; see `st_moe config list`'
    )
  config = starting.configure(args, args.gin_file)
  starting.prepare(args)
  from st_moe.bench import commands

  commands.run(args, config)


def plan(args: argparse.Namespace) -> None:
  """Says whether a run fits a machine, and what it costs."""
  # Shapes need no vocabulary, nor anything else that says where text is.
  config = starting.configure(
    args, args.gin_file, needs_model=True, allow_missing=True
  )
  starting.prepare(args)
  from st_moe.plan import commands

  commands.run(args, config)


def convert(args: argparse.Namespace) -> None:
  """Brings weights in or out, or changes a model."""
  config = None
  if args.kind not in arguments.CHANGE_A_MODEL:
    config = starting.configure(args, args.gin_file, allow_missing=True)
  starting.prepare(args)
  from st_moe.convert import commands

  commands.run(args, config)
