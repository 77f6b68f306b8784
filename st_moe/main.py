"""The command line: `st_moe COMMAND`, and how errors end.

Progress goes to standard output, warnings and errors to standard error.

Exit status: 0 done; 2 the user's input is wrong; 3 the run stopped itself;
130 interrupted; anything else is our bug.
"""

import argparse
import glob
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from st_moe import arguments, gin_files, processes
from st_moe.bindings import Binding, Resolver, flatten, operative_config
from st_moe.config import DataConfig, RunConfig
from st_moe.errors import RunStopped, UserError, did_you_mean
from st_moe.gin_files import load_config, parse_flag, read_bindings
from st_moe.plan.devices import NO_TPU
from st_moe.workdir import CONFIG_FILE, MODEL_FILE, check_path

log = logging.getLogger('st_moe.main')  # __name__ may be __main__


# Commands


def _configure(
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


def _program() -> list[str]:
  """Returns what the user typed before the command, to be typed again."""
  program = Path(sys.argv[0])
  if program.parts[-2:] == ('st_moe', '__main__.py'):
    return [sys.executable, '-m', 'st_moe']
  return [sys.argv[0]] if program.name == 'st_moe' else ['st_moe']


def _resume_command(args: argparse.Namespace) -> str:
  """Returns what to type to go on with a run: its config.gin has the rest."""
  flags = [f'--module={module}' for module in args.module]
  given = _connection(args).given()
  if given:  # every process its own number
    given['--process_id'] = 'I'
  flags += [f'{flag}={value}' for flag, value in given.items()]
  return shlex.join(
    [*_program(), args.command, f'--workdir={args.workdir}', *flags]
  )


def _connection(args: argparse.Namespace) -> processes.Connection:
  return processes.Connection(
    distributed=args.distributed,
    coordinator_address=args.coordinator_address,
    num_processes=args.num_processes,
    process_id=args.process_id,
    timeout=args.connect_timeout,
  )


def _connect(args: argparse.Namespace, *, stop_signals: bool) -> None:
  """Joins the job; before anything that may fail in one process alone."""
  if not args.debug:
    _silence_libraries()
  processes.connect(_connection(args), stop_signals=stop_signals)


def _check_same(args: argparse.Namespace, config: RunConfig) -> None:
  """Refuses to go on when the processes of a job were started otherwise."""
  flags = ('module', 'allow_config_change', 'step', 'num_processes')
  processes.check_same(
    processes.software(), 'install the same packages for every process'
  )
  processes.check_same(
    {'the command': args.command}
    | flatten(config)
    | {f'--{flag}': getattr(args, flag, None) for flag in flags},
    'start every process with the same flags',
  )


def _pretrain(args: argparse.Namespace) -> None:
  _connect(args, stop_signals=True)
  workdir = Path(args.workdir)
  resumed = workdir / CONFIG_FILE
  if not args.gin_file and resumed.is_file():
    args.gin_file = [str(resumed)]
  if not args.gin_file:
    raise UserError(
      'pretrain needs --gin_file=FILE, for example '
      '--gin_file=gin_configs/runs/quickstart.gin; see `st_moe config list`'
    )
  _train(args, _configure(args, args.gin_file, needs_model=True))


def _finetune(args: argparse.Namespace) -> None:
  _connect(args, stop_signals=True)
  resumed = Path(args.workdir) / CONFIG_FILE
  if args.checkpoint is None and resumed.is_file():
    files = args.gin_file or [str(resumed)]
    _train(args, _configure(args, files, needs_model=True))
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
  given = _bindings_of_model(Path(args.checkpoint))
  for name in args.gin_file:
    given += gin_files.read_file(gin_files.find(name))
  weights = Binding(
    'RunConfig.initial_checkpoint', args.checkpoint, '--checkpoint'
  )
  flags = [*given, *args.gin_bindings, weights]
  bindings = read_bindings([], flags, args.seed)
  args.resolver = Resolver(bindings)
  _train(args, args.resolver.run_config())


def _gin_file(path: Path) -> Path | None:
  """Returns the gin file of a model directory or of a run, if it is one."""
  names = (path / MODEL_FILE, path / CONFIG_FILE)
  return next((name for name in names if name.is_file()), None)


def _bindings_of_model(path: Path) -> list[Binding]:
  """Returns what the gin file beside given weights binds of the model."""
  found = _gin_file(path.parent if path.name == 'checkpoints' else path)
  if found is None:
    raise UserError(
      f'--checkpoint={path} holds no model: it has no {MODEL_FILE} and no '
      f'{CONFIG_FILE}; give the work directory of a run, or a model that '
      '`st_moe convert` made'
    )
  config = load_config([str(found)])
  sections = [
    'ModelConfig',
    *(['RouterConfig'] * (config.model.num_experts > 0)),
  ]
  return [
    Binding(name, value, str(found))
    for name, value in flatten(config).items()
    if name.rpartition('.')[0].rpartition('/')[2] in sections
    or name == 'DataConfig.extra_ids'  # a part of the vocabulary
  ]


def _train(args: argparse.Namespace, config: RunConfig) -> None:
  workdir = Path(args.workdir)
  check_path(workdir)
  _prepare(args)
  _check_same(args, config)
  log.info('loading JAX')
  from st_moe import train

  train.pretrain(
    config,
    workdir,
    operative_config=operative_config(config),
    command=[*_program(), *args.argv],
    resume_command=_resume_command(args),
    allow_config_change=args.allow_config_change,
  )


def _evaluate(args: argparse.Namespace) -> None:
  _connect(args, stop_signals=False)
  workdir = Path(args.workdir)
  found = _gin_file(workdir)
  if found is None:
    raise UserError(
      f'{workdir} holds no run: it has no config.gin; give the --workdir of '
      '`st_moe pretrain`, or a model that `st_moe convert` made'
    )
  config = _configure(args, [str(found), *args.gin_file])
  if not args.resolver.binds('DataConfig'):
    raise UserError(
      f'{workdir} is a model without a run and has no held-out text of its '
      'own; add --gin_file=gin_configs/runs/evaluate.gin --gin.TASK=text '
      '--gin.FILES=FILE'
    )
  _prepare(args)
  _check_same(args, config)
  log.info('loading JAX')
  from st_moe import evaluate

  evaluate.evaluate(config, workdir, step=args.step)


def _bench(args: argparse.Namespace) -> None:
  if args.kind == 'step' and not args.gin_file:
    raise UserError(
      'bench step needs --gin_file=FILE, for example '
      '--gin_file=gin_configs/runs/quickstart.gin; see `st_moe config list`'
    )
  config = _configure(args, args.gin_file)
  _prepare(args)
  from st_moe.bench import commands

  commands.run(args, config)


def _plan(args: argparse.Namespace) -> None:
  # Shapes need no vocabulary, nor anything else that says where text is.
  config = _configure(args, args.gin_file, needs_model=True, allow_missing=True)
  _prepare(args)
  from st_moe.plan import commands

  commands.run(args, config)


def _convert(args: argparse.Namespace) -> None:
  config = None
  if args.kind not in arguments.CHANGE_A_MODEL:
    config = _configure(args, args.gin_file, allow_missing=True)
  _prepare(args)
  from st_moe.convert import commands

  commands.run(args, config)


def _data_config(args: argparse.Namespace) -> DataConfig:
  """Returns what to read: text files named on the command line, or gin's."""
  flags = []
  if args.files:
    flags.append(Binding('DataConfig.task', 'text', 'FILE'))
    flags.append(Binding('DataConfig.files', tuple(args.files), 'FILE'))
  if getattr(args, 'vocabulary', None) is not None:
    flags.append(
      Binding('DataConfig.vocabulary', args.vocabulary, '--vocabulary')
    )
  config = _configure(args, args.gin_file, flags).data
  _prepare(args)
  return config


def _vocab(args: argparse.Namespace) -> None:
  config = _data_config(args)
  size = config.auto_vocabulary_size if args.size is None else args.size
  from st_moe.data.commands import vocab_command

  vocab_command(config, Path(args.output), size)


def _cache(args: argparse.Namespace) -> None:
  config = _data_config(args)
  from st_moe.data.commands import cache_command

  shards = {} if args.num_shards is None else {'num_shards': args.num_shards}
  cache_command(config, Path(args.output), shard=args.shard, **shards)


def _config_list() -> None:
  """Prints the package's gin files, each with its first comment line."""
  names = gin_files.names()
  width = max(map(len, names))
  for group in ('runs', 'models', 'ablations'):
    for name in names:
      if name.startswith(f'gin_configs/{group}/'):
        path = gin_files.GIN_ROOT.parent / name
        first = path.read_text(encoding='utf-8').splitlines()[0]
        print(f'{name:{width}}  {first.lstrip("# ")}')


def _config_diff(args: argparse.Namespace) -> None:
  """Prints the fields in which two configurations differ."""
  first, second = args.files
  above = [first] if gin_files.is_ablation(second) else []
  old, new = (
    flatten(load_config([*args.gin_file, *names], args.gin_bindings, args.seed))
    for names in ([first], [*above, second])
  )
  changed = [name for name, value in old.items() if value != new[name]]
  for name in changed:
    print(f'{name}: {old[name]!r} -> {new[name]!r}')
  if not changed:
    print('no difference')


def _config(args: argparse.Namespace) -> None:
  actions = ('list', 'show', 'diff')
  if args.action is None:
    raise UserError(
      f'config needs an action ({", ".join(actions)}); see '
      '`st_moe config --help`'
    )
  if args.action not in actions:
    raise UserError(
      f'config has no action {args.action} (only {", ".join(actions)})'
      f'{did_you_mean(args.action, actions)}'
    )
  expected = {'list': args.files == [], 'diff': len(args.files) == 2}
  if not expected.get(args.action, True):
    wants = 'no files' if args.action == 'list' else 'two gin files'
    raise UserError(
      f'config {args.action} takes {wants}, got {len(args.files)}'
    )
  if args.action == 'list':
    _config_list()
  elif args.action == 'diff':
    _config_diff(args)
  else:
    files = args.gin_file + args.files
    bindings = read_bindings(files, args.gin_bindings, args.seed)
    resolver = Resolver(bindings, allow_missing=True)
    config = resolver.run_config()
    print(operative_config(config, resolver.missing), end='')


# Start and end


def _prepare(args: argparse.Namespace) -> None:
  """Sets the log up and imports the user's modules."""
  _prepare_log(args.debug)
  for module in args.module:
    from st_moe.data.pipeline import import_tasks

    import_tasks(module)


def _prepare_log(debug: bool) -> None:
  """Shows our own log lines, and of the libraries' only errors.

  What goes on is printed on standard output, among the steps of a run;
  warnings on standard error.
  """
  progress = logging.StreamHandler(sys.stdout)
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


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
  'pretrain': _pretrain,
  'finetune': _finetune,
  'evaluate': _evaluate,
  'config': _config,
  'vocab': _vocab,
  'cache': _cache,
  'bench': _bench,
  'plan': _plan,
  'convert': _convert,
}


# What is not in the core installation, and the extra of setup.py that has it.
_EXTRAS = {
  'seqio': 'data',
  'tensorflow': 'data',
  'tensorflow_datasets': 'data',
  'tensorflow_text': 'data',
}


def _print_error(error: UserError) -> int:
  """Prints the one line of an error, on every process of a job."""
  text = processes.end_together(error)
  print(f'error: {" ".join(text.split())}', file=sys.stderr)
  return 2


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  args = None
  try:
    args = arguments.parse(argv)
    args.argv, args.resolver = argv, None
    args.gin_bindings = [parse_flag(text) for text in args.gin_bindings]
    _COMMANDS[args.command](args)
    sys.stdout.flush()
    return 0
  except UserError as e:
    if '--debug' in argv:
      traceback.print_exc()
    agreed = isinstance(e, processes.AgreedError)
    if args is not None and args.resolver is not None and not agreed:
      e = args.resolver.located(e)
    return _print_error(e)
  except ModuleNotFoundError as e:
    if e.name not in _EXTRAS:
      raise
    return _print_error(
      UserError(
        f'{e.name} is not installed; pip install '
        f"'st_moe[{_EXTRAS[e.name]}]', or train from a cache made elsewhere"
      )
    )
  except RunStopped as e:
    print(f'stopped: {e}', file=sys.stderr)
    return 3
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    processes.abandon()
    return 130
  except BrokenPipeError:  # `st_moe config show ... | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    processes.abandon()
    return 0


# glibc returns every block above 32 MiB to the kernel and pays for fresh pages
# at the next step. Keeping them makes an MoE step on CPU about a fifth faster;
# huge pages a little more. glibc reads these when a process starts.
_HEAP = {
  'MALLOC_MMAP_THRESHOLD_': str(4 << 30),
  'MALLOC_TRIM_THRESHOLD_': str(16 << 30),
  'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
}

# A conversion handles arrays one at a time: each goes back to the kernel when
# it is done with, so that the largest is the measure of its memory.
_LEAN_HEAP = {'MALLOC_MMAP_THRESHOLD_': str(1 << 20), 'MALLOC_ARENA_MAX': '2'}


def _stop_at_once(number, frame) -> None:
  """On SIGTERM outside the training loop, where nothing is to be saved.

  The loop has its own handler. An exception would not do: it may be raised
  inside a library's callback, and is lost there.
  """
  print('SIGTERM: nothing had to be saved; go on with:')
  print(f'  {shlex.join([*_program(), *sys.argv[1:]])}', flush=True)
  os._exit(0)


def run() -> None:
  """The console script: sets the process up for computing, then `main`."""
  command, helps = sys.argv[1:2], '--help' in sys.argv
  if command in (['pretrain'], ['finetune']) and not helps:
    signal.signal(signal.SIGTERM, _stop_at_once)
  computes = command in (['pretrain'], ['finetune'], ['bench'])
  on_cpu = os.environ.get('JAX_PLATFORMS', 'cpu') == 'cpu'
  heap = _LEAN_HEAP if command == ['convert'] else {}
  heap = _HEAP if computes and on_cpu else heap
  if sys.platform == 'linux' and heap and not helps:
    unset = {k: v for k, v in heap.items() if k not in os.environ}
    if 'MALLOC_MMAP_THRESHOLD_' in unset:
      # The same process again: same id, same arguments.
      os.execve(sys.executable, sys.orig_argv, os.environ | unset)
  processes.run_and_leave(main)
