"""Commands on a model: `evaluate`, `predict`, `trace`, `bench` and so on."""

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from st_moe import arguments, processes
from st_moe.bindings import Binding
from st_moe.commands import starting
from st_moe.config import RunConfig
from st_moe.errors import UserError
from st_moe.gin_files import load_config, parse_flag
from st_moe.model_gin import gin_file_of, no_model
from st_moe.workdir import check_parents

log = logging.getLogger(__name__)

_EVALUATE_FILE = 'gin_configs/runs/evaluate.gin'


def _directory(name: str) -> Path:
  """Returns the directory of a run or a model, named by its checkpoints too."""
  path = Path(name)
  return path.parent if path.name == 'checkpoints' else path


def _of_a_model(
  args: argparse.Namespace,
  path: Path,
  flags: Sequence[Binding] = (),
  *,
  of_text: bool = False,
) -> RunConfig:
  """Returns the configuration of a run or a model, and of later files.

  Args:
    args: of the command line.
    path: of the run or the model.
    flags: bindings of the command's own.
    of_text: the command reads text; TASK and the other macros of
      runs/evaluate.gin may name it without that file.
  """
  found = gin_file_of(path)
  if found is None:
    raise no_model(path)
  files = [str(found), *args.gin_file]
  named = any(one.name == 'TASK' for one in args.gin_bindings)
  if of_text and named and not args.gin_file:
    files.append(_EVALUATE_FILE)
    flags = [*_own_task_dir(args, found), *flags]
  return starting.configure(args, files, flags)


def _own_task_dir(args: argparse.Namespace, found: Path) -> list[Binding]:
  """Returns where a run's own tasks are, unless the user says where they are.

  Without it the macros of runs/evaluate.gin would bind no folder.
  """
  from st_moe.data.downstream import catalog

  given = {binding.name: binding.value for binding in args.gin_bindings}
  if 'TASK_DIR' in given or 'DataConfig.task_dir' in given:
    return []
  folder = load_config([str(found)]).data.task_dir
  names = catalog.split_names(str(given['TASK']))
  if folder is None or not all(map(catalog.is_answer_task, names)):
    return []
  return [Binding('TASK_DIR', folder, str(found))]


def evaluate(args: argparse.Namespace) -> None:
  """Losses of a checkpoint on held-out text, or its answers to tasks."""
  starting.connect(args, stop_signals=False)
  workdir = _directory(args.workdir)
  config = _of_a_model(args, workdir, _test_split(args), of_text=True)
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


def predict(args: argparse.Namespace) -> None:
  """Answers lines of text."""
  starting.connect(args, stop_signals=False)
  _check_decoding(args)
  if processes.is_leader():
    _check_files(args)
  checkpoint = _directory(args.checkpoint)
  flags = []
  if args.max_new_tokens is not None:
    flags.append(
      Binding(
        'DataConfig.targets_length', args.max_new_tokens, '--max_new_tokens'
      )
    )
  config = _of_a_model(args, checkpoint, flags)
  starting.prepare(args, say_on='stderr')
  starting.check_same(args, config)
  log.info('loading JAX')
  from st_moe import decoding, predict

  temperature = args.temperature
  if temperature is None:  # top_k and top_p say that tokens are drawn
    draws = args.top_k is not None or args.top_p is not None
    temperature = 1.0 if draws else 0.0
  predict.predict(
    config,
    checkpoint,
    predict.Texts(
      args.prompt,
      None if args.input is None else Path(args.input),
      None if args.output is None else Path(args.output),
    ),
    step=args.step,
    batch_size=args.batch_size,
    num_beams=args.num_beams,
    length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
    early_stopping={'true': True, 'never': 'never'}.get(
      args.early_stopping, False
    ),
    sampling=decoding.Sampling(temperature, args.top_k, args.top_p),
  )


def _check_files(args: argparse.Namespace) -> None:
  """Refuses files that cannot be read or written."""
  if args.prompt is not None and args.input is not None:
    raise UserError('--prompt and --input both give text; choose one of them')
  if args.input is not None and not Path(args.input).is_file():
    known = 'is a folder' if Path(args.input).is_dir() else 'does not exist'
    raise UserError(f'--input={args.input} {known}; give a file of lines')
  if args.output is None:
    return
  output = Path(args.output)
  if args.input and output.exists() and output.samefile(args.input):
    raise UserError(
      f'--output={args.output} is the --input, which it would replace; give '
      'another file'
    )
  if Path(args.output).is_dir():
    raise UserError(f'--output={args.output} is a folder; name a file')
  check_parents(Path(args.output), f'--output={args.output}')


def _check_decoding(args: argparse.Namespace) -> None:
  """Refuses flags that do not go together, or have no sense."""
  for name in ('batch_size', 'num_beams', 'max_new_tokens', 'top_k'):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise UserError(f'--{name} must be at least 1, got {value}')
  if args.temperature is not None and not 0 <= args.temperature < math.inf:
    raise UserError(
      f'--temperature must be 0 (greedy) or more, got {args.temperature}'
    )
  if args.top_p is not None and not 0 < args.top_p <= 1:
    raise UserError(f'--top_p must be in (0, 1], got {args.top_p}')
  drawing = [
    f'--{name}={value}'
    for name in ('temperature', 'top_k', 'top_p')
    if (value := getattr(args, name))
  ]
  if drawing and args.num_beams > 1:
    raise UserError(
      f'{drawing[0]} draws tokens, --num_beams={args.num_beams} searches for '
      'the likeliest text; leave out one of them'
    )
  if drawing and args.temperature == 0:
    raise UserError(
      f'--temperature=0 takes the likeliest token, {drawing[0]} draws one; '
      'leave out one of them'
    )
  if args.length_penalty is not None and args.num_beams == 1:
    raise UserError(
      f'--length_penalty={args.length_penalty} compares the texts of several '
      'beams; add --num_beams=N'
    )
  if args.early_stopping is not None and args.num_beams == 1:
    raise UserError(
      f'--early_stopping={args.early_stopping} says when a search with several '
      'beams ends; add --num_beams=N'
    )


def trace(args: argparse.Namespace) -> None:
  """Which tokens go to which expert."""
  starting.connect(args, stop_signals=False)
  checkpoint = _directory(args.checkpoint)
  config = _of_a_model(args, checkpoint, of_text=True)
  if not args.resolver.binds('DataConfig') and args.input is None:
    raise UserError(
      f'{checkpoint} is a model without a run and has no held-out text of its '
      'own; add --input=FILE, or --gin.TASK=text --gin.FILES=FILE'
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


def _together(texts: Sequence[str]) -> list[Binding]:
  """Reads the settings of one `--compare`."""
  settings = [parse_flag(text, '--compare ') for text in texts]
  names = [setting.name for setting in settings]
  for name in names:
    if names.count(name) > 1:
      raise UserError(
        f'--compare {" ".join(texts)} gives {name} twice; for two steps write '
        '--compare twice'
      )
  return settings


def bench(args: argparse.Namespace) -> None:
  """Measures a layer, a step, generation or peers."""
  if args.kind in ('step', 'generate') and not args.gin_file:
    raise UserError(
      f'bench {args.kind} needs --gin_file=FILE, for example '
      '--gin_file=gin_configs/runs/quickstart.gin; see `st_moe config list`'
    )
  if args.kind == 'step':
    args.compared = {
      ' '.join(texts): starting.configure(args, args.gin_file, _together(texts))
      for texts in args.compare
    }
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
