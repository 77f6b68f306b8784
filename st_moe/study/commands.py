"""The door of `st_moe study`: list, report, and running one; loads JAX late."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from st_moe import tables
from st_moe.data import pipeline
from st_moe.errors import UserError
from st_moe.study import declaration
from st_moe.study.declaration import Study
from st_moe.study.grid import (
  Run,
  Settings,
  choose,
  configure,
  find_scale,
  fingerprint,
  left_to_do,
  make_grid,
)


def list_studies() -> None:
  """Prints the name of every study and what it stands for."""
  rows = []
  for name in declaration.names():
    study = declaration.find_study(name)
    rows.append([name, study.paper, str(len(study.arms)), study.title])
  width = max(len(row[0]) for row in rows)
  places = max(len(row[1]) for row in rows)
  for name, paper, arms, title in rows:
    print(f'{name:{width}}  {paper:{places}}  {arms:>2} arms  {title}')
  print(
    'Those named finetune_* begin with a model: --checkpoint=DIR, and '
    '--gin.TASK=... --gin.TASK_DIR=... say on what it is fine-tuned'
  )


def _shortened(verdict: str) -> str:
  """Returns a verdict without its reason, which the report has."""
  text, _, why = verdict.partition(' (')
  return 'not run yet' if why.startswith('not run yet') else text


def report(directory: Path) -> None:
  """Writes the report of a folder, and prints its verdicts."""
  from st_moe.study.report import claims_table, write_report

  page, summary = write_report(directory)
  header, *rows = claims_table(summary)
  if rows:
    tables.print_table(
      Console(highlight=False, soft_wrap=True),
      f'{summary["title"]}, scale {summary["scale"]}',
      [header[0], *header[2:]],
      [[row[0], *row[2:-1], _shortened(row[-1])] for row in rows],
    )
  for text in summary['warnings']:
    print(f'warning: {text}')
  print(f'report: {page}', flush=True)


def command_text(study: Study, args: argparse.Namespace) -> str:
  """Returns the command that makes the study, without seeds, shards, places."""
  name = study.name if study.name in declaration.names() else study.folder
  words = ['st_moe', 'study', str(name), f'--scale={args.scale}']
  words += [f'--module={module}' for module in args.module]
  for flag in ('checkpoint', 'dense_checkpoint'):
    if (path := getattr(args, flag)) is not None:
      words.append(f'--{flag}={path}')
  words += [f'--gin_file={file}' for file in args.gin_file]
  words += [f'{flag.where}={flag.value}' for flag in args.gin_bindings]
  return shlex.join(words)


def record_of(
  study: Study, settings: Settings, args: argparse.Namespace
) -> dict[str, Any]:
  """Returns study.json: what the results of a folder are results of."""
  known = study.name in declaration.names()
  return {
    'study': study.name if known else str(study.folder.resolve()),
    'scale': settings.scale,
    'command': command_text(study, args),
    'arms': {
      arm.name: fingerprint(configure(study, arm, settings, 0))
      for arm in study.arms_at(settings.scale)
    },
  }


def _with_given_models(study: Study, settings: Settings) -> Study:
  """Leaves out the arms of a model that is not given; says so."""
  given = settings.checkpoint, settings.dense_checkpoint
  if study.recipe == 'pretrain':
    if any(given):
      raise UserError(
        f'{study.name} is a study of pretraining: it takes no checkpoint'
      )
    return study
  if not any(given):
    raise UserError(
      f'{study.name} is a study of fine-tuning: give --checkpoint=DIR, a run '
      'or a model that `st_moe convert` made'
    )
  kept = [arm.name for arm in study.arms if given[arm.dense]]
  if left := [arm.name for arm in study.arms if not given[arm.dense]]:
    flag = 'checkpoint' if given[1] else 'dense_checkpoint'
    print(f'without --{flag} there are no arms {", ".join(left)}')
  return study.with_arms(kept)


def _without_illegal(
  study: Study, settings: Settings, chosen: Sequence[str]
) -> Study:
  """Leaves out arms that nobody asked for and that flags make impossible.

  Or equal to another, and so no arm.
  """
  kept, seen = set(chosen), []
  arms = study.arms_at(settings.scale)
  for arm in sorted(arms, key=lambda arm: arm.name not in chosen):
    try:
      config = configure(study, arm, settings, 0)
    except UserError:
      continue
    if config not in seen:
      kept.add(arm.name)
      seen.append(config)
  return study.with_arms([arm.name for arm in arms if arm.name in kept])


def _grid(args: argparse.Namespace) -> tuple[Study, Settings, list[Run]]:
  study = declaration.find_study(args.name)
  find_scale(args.scale)
  if args.seeds < 1:
    raise UserError(f'--seeds must be at least 1, got {args.seeds}')
  if args.seed is not None:
    raise UserError('study has seeds 0 to N - 1: give --seeds=N, not --seed')
  settings = Settings(
    args.scale,
    tuple(args.gin_file),
    tuple(args.gin_bindings),
    args.checkpoint,
    args.dense_checkpoint,
  )
  study = _with_given_models(study, settings)
  if args.arm:
    study = _without_illegal(study, settings, args.arm)
  runs = make_grid(study, settings, range(args.seeds))
  return study, settings, choose(runs, args.arm, args.shard)


def _check_data(runs: Sequence[Run]) -> None:
  """Refuses data that is not there, without TensorFlow and JAX."""
  for config in dict.fromkeys(run.config.data for run in runs):
    pipeline.check_paths(config)


def run(args: argparse.Namespace, resume_command: str) -> None:
  """Runs or describes a study.

  Args:
    args: of the command line.
    resume_command: what to type to go on.

  Raises:
    UserError: before anything is compiled or written.
  """
  from st_moe.study import results

  study, settings, runs = _grid(args)
  directory = Path(args.workdir) if args.workdir is not None else None
  record = record_of(study, settings, args)
  if args.dry_run:
    if args.topology is None:  # else the data may be where those devices are
      _check_data(runs)
    from st_moe.study.costs import print_grid

    print_grid(study, settings, runs, directory, args.topology)
    return
  if directory is None:
    raise UserError('study needs --workdir=DIR, or --dry_run')
  _check_data(left_to_do(directory, runs))
  is_new = not (directory / results.STUDY_FILE).is_file()
  results.open_directory(directory, record)
  print('loading JAX', flush=True)
  from st_moe.study import running

  try:
    stopped = running.run_grid(
      directory,
      runs,
      metrics=study.metrics(),
      command=args.argv,
    )
  except UserError:  # of what only the start of a run finds
    if is_new:
      results.discard_directory(directory)
    raise
  if stopped:
    print(f'{stopped}: saved; go on with:\n  {resume_command}', flush=True)
    return
  report(directory)
