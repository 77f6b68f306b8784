"""Commands on a model: `evaluate`, `trace`, `bench`, `plan` and `convert`."""

import argparse
import logging
from pathlib import Path

from st_moe import arguments
from st_moe.commands import starting
from st_moe.config import RunConfig
from st_moe.errors import UserError

log = logging.getLogger(__name__)


def evaluate(args: argparse.Namespace) -> None:
  """Losses of a checkpoint on held-out text."""
  starting.connect(args, stop_signals=False)
  workdir = Path(args.workdir)
  config = _of_a_model(args, workdir, 'the --workdir')
  if not args.resolver.binds('DataConfig'):
    raise UserError(
      f'{workdir} is a model without a run and has no held-out text of its '
      'own; add --gin_file=gin_configs/runs/evaluate.gin --gin.TASK=text '
      '--gin.FILES=FILE'
    )
  starting.prepare(args)
  starting.check_same(args, config)
  log.info('loading JAX')
  from st_moe import evaluate

  evaluate.evaluate(config, workdir, step=args.step)


def _of_a_model(args: argparse.Namespace, path: Path, flag: str) -> RunConfig:
  """Returns the configuration of a run or a model, later files on top."""
  found = starting.gin_file_of(path)
  if found is None:
    raise UserError(
      f'{path} holds no run: it has no config.gin; give {flag} of '
      '`st_moe pretrain`, or a model that `st_moe convert` made'
    )
  return starting.configure(args, [str(found), *args.gin_file])


def trace(args: argparse.Namespace) -> None:
  """Which tokens go to which expert."""
  starting.connect(args, stop_signals=False)
  checkpoint = Path(args.checkpoint)
  config = _of_a_model(args, checkpoint, 'as --checkpoint the --workdir')
  if not args.resolver.binds('DataConfig') and args.input is None:
    raise UserError(
      f'{checkpoint} is a model without a run and has no held-out text of its '
      'own; add --input=FILE, or --gin_file=gin_configs/runs/evaluate.gin '
      '--gin.TASK=text --gin.FILES=FILE'
    )
  starting.prepare(args)
  starting.check_same(args, config)
  log.info('loading JAX')
  from st_moe.trace import tracing

  request = tracing.Request(
    checkpoint=checkpoint,
    step=args.step,
    input=None if args.input is None else Path(args.input),
    output=Path(args.output or checkpoint / 'trace'),
    batches=config.eval_batches if args.batches is None else args.batches,
    rows=args.rows,
    capacity=args.capacity,
  )
  tracing.check(request)
  tracing.trace(config, request)


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
