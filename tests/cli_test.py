"""The command line: what a user types, sees, and gets as exit status."""

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import st_moe
from st_moe import gin_files
from st_moe.bindings import operative_config
from st_moe.config import RunConfig
from st_moe.errors import RunStopped, UserError
from st_moe.gin_files import load_config
from st_moe.main import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def error(capsys):
  """Runs a command that must fail; returns its one line without 'error: '."""

  def run(*argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('error: ') and err.count('\n') == 1, err
    return err.removeprefix('error: ').removesuffix('\n')

  return run


@pytest.fixture
def trained(monkeypatch):
  """Replaces training; returns the calls, each as its arguments."""
  calls = []

  def pretrain(config, workdir, **more):
    calls.append({'config': config, 'workdir': workdir, **more})

  stub = types.SimpleNamespace(pretrain=pretrain)
  monkeypatch.setitem(sys.modules, 'st_moe.train', stub)
  monkeypatch.setattr(st_moe, 'train', stub, raising=False)
  return calls


def write(name: str, text: str) -> str:
  Path(name).write_text(text)
  return name


def load(text: str) -> RunConfig:
  return load_config([write('run.gin', text)])


# Starting


@pytest.mark.parametrize(
  'command', [[], ['pretrain'], ['bench'], ['bench', 'layer']]
)
def test_help_answers_in_under_a_second(command):
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  result = subprocess.run(
    [sys.executable, '-m', 'st_moe', *command, '--help'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert result.returncode == 0
  assert 'usage: st_moe' in result.stdout
  # Processor time: other work on the machine does not count.
  spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  assert spent < 1.0


def test_a_wrong_command_line_ends_a_process_with_2_and_one_line():
  result = subprocess.run(
    [sys.executable, '-m', 'st_moe', 'config', 'show', '--gin.STPES=60'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  assert result.stdout == ''
  assert result.stderr == 'error: --gin.STPES: nothing reads macro STPES\n'


def test_output_into_a_closed_pipe_is_no_error():
  result = subprocess.run(
    f'{sys.executable} -m st_moe config show | head -1',
    shell=True,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.stdout.startswith('# Every setting of a run')
  assert result.stderr == ''


@pytest.mark.parametrize(
  'argv', [['pretrain', '--workdir=w'], ['bench', 'layer']]
)
def test_what_computes_starts_again_with_the_heap_set_up_once(
  monkeypatch, argv
):
  from st_moe import main as module

  executed = []
  monkeypatch.setattr(sys, 'argv', ['st_moe', *argv])
  monkeypatch.setattr(sys, 'platform', 'linux')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.delenv('MALLOC_MMAP_THRESHOLD_', raising=False)
  monkeypatch.setenv('GLIBC_TUNABLES', 'mine')
  monkeypatch.setattr(os, 'execve', lambda *args: executed.append(args))
  monkeypatch.setattr(module, 'main', lambda: 0)
  with pytest.raises(SystemExit):
    module.run()
  ((program, arguments, environment),) = executed
  assert (program, arguments) == (sys.executable, sys.orig_argv)
  assert environment['MALLOC_MMAP_THRESHOLD_'] == str(4 << 30)
  assert environment['GLIBC_TUNABLES'] == 'mine'
  # The second time the variable is set, and the command runs.
  monkeypatch.setenv('MALLOC_MMAP_THRESHOLD_', '1')
  with pytest.raises(SystemExit):
    module.run()
  assert len(executed) == 1


def test_sigterm_before_the_first_step_ends_with_0(tmp_path):
  process = subprocess.Popen(
    [sys.executable, '-m', 'st_moe', 'pretrain', '--workdir=w']
    + ['--gin_file=runs/quickstart.gin'],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  first = process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  rest, errors = process.communicate()
  assert first == 'loading JAX\n'
  assert rest.startswith(
    'SIGTERM: nothing had to be saved; start it again with:\n'
  )
  assert rest.endswith('--workdir=w --gin_file=runs/quickstart.gin\n')
  assert (process.returncode, errors) == (0, '')


# Words on the command line


@pytest.mark.parametrize(
  'argv, message',
  [
    ([], 'no command (one of pretrain'),
    (['pretran'], 'unknown command pretran (one of '),
    (['pretran'], '; did you mean pretrain?'),
    (['fly'], '; see `st_moe --help`'),
    (['--seed', '1'], 'unknown command --seed (one of '),
    (['pretrain', '--gin_file=x'], 'required: --workdir'),
    (
      ['pretrain', '--workdir=w', '--wrkdir=w'],
      'pretrain has no argument --wrkdir; did you mean --workdir?',
    ),
    (['pretrain', '--workdir=w', '--seed=x'], "invalid int value: 'x'"),
    (['pretrain', '--workdir=w', '--gin.STEPS'], '--gin.STEPS needs a value'),
    (['pretrain', '--workdir=w'], 'pretrain needs --gin_file=FILE'),
    (
      ['pretrain', '--workdir=w', '--gin_file=runs/evaluate.gin'],
      'no model is configured; add --gin_file=gin_configs/models/NAME.gin',
    ),
    (['bench'], 'required: layer|step|generate|peers'),
    (['bench', 'lair'], "invalid choice: 'lair' (choose from"),
    (
      ['bench', 'layer', '--exprts=8'],
      'bench layer has no argument --exprts; did you mean --experts?',
    ),
    (['bench', 'step'], 'bench step needs --gin_file=FILE'),
    (['pretrain', '--steps=3'], '--steps; did you mean --gin.STEPS=3?'),
    (
      ['pretrain', '--d-model=64'],
      '--d-model; did you mean --gin.ModelConfig.d_model=64?',
    ),
    (['pretrain', '--workdr=w'], 'no argument --workdr; did you mean --work'),
    (['pretrain', '--workdir=w', 'x'], 'pretrain takes no argument x'),
    (
      ['pretrain', '--workdir=w', '--gin_file=st_moe_l.gin'],
      'did you mean gin_configs/models/st_moe_l.gin?',
    ),
    (['pretrain', '--workdir=w', '--gin_file=.'], '. is a folder; give a gin'),
    (['config'], 'config needs an action (list, show, diff); see `st_moe'),
    (['config', 'shwo'], 'config has no action shwo (only list, show, diff)'),
    (['config', 'diff', 'a.gin'], 'config diff takes two gin files, got 1'),
    (['config', 'list', 'a.gin'], 'config list takes no files, got 1'),
  ],
)
def test_a_wrong_word_names_itself_and_the_way_out(error, argv, message):
  assert message in error(*argv)


def test_debug_shows_the_traceback_and_the_same_line(capsys):
  assert main(['config', 'show', '--gin.STPES=1', '--debug']) == 2
  err = capsys.readouterr().err
  assert 'Traceback' in err
  assert err.endswith('error: --gin.STPES: nothing reads macro STPES\n')


@pytest.mark.parametrize(
  'raised, status, line',
  [
    (UserError('the file\n is gone'), 2, 'error: the file is gone\n'),
    (RunStopped('10 steps were not finite'), 3, 'stopped: 10 steps'),
    (KeyboardInterrupt(), 130, 'interrupted\n'),
  ],
)
def test_exit_statuses(monkeypatch, capsys, raised, status, line):
  def pretrain(*args, **kwargs):
    raise raised

  stub = types.SimpleNamespace(pretrain=pretrain)
  monkeypatch.setitem(sys.modules, 'st_moe.train', stub)
  monkeypatch.setattr(st_moe, 'train', stub, raising=False)
  argv = ['pretrain', '--gin_file=runs/quickstart.gin', '--workdir=w']
  assert main(argv) == status
  assert capsys.readouterr().err.startswith(line)


def test_a_missing_extra_is_named(monkeypatch, error):
  def pretrain(*args, **kwargs):
    raise ModuleNotFoundError(name='seqio')

  stub = types.SimpleNamespace(pretrain=pretrain)
  monkeypatch.setitem(sys.modules, 'st_moe.train', stub)
  monkeypatch.setattr(st_moe, 'train', stub, raising=False)
  message = error('pretrain', '--gin_file=runs/quickstart.gin', '--workdir=w')
  assert message.startswith(
    "seqio is not installed; pip install -e '.[data]' -c constraints.txt"
  )


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
  def pretrain(*args, **kwargs):
    raise ZeroDivisionError

  stub = types.SimpleNamespace(pretrain=pretrain)
  monkeypatch.setitem(sys.modules, 'st_moe.train', stub)
  monkeypatch.setattr(st_moe, 'train', stub, raising=False)
  with pytest.raises(ZeroDivisionError):
    main(['pretrain', '--gin_file=runs/quickstart.gin', '--workdir=w'])


def test_the_resume_command_can_be_typed(trained, monkeypatch):
  argv = ['pretrain', '--gin_file=runs/quickstart.gin', '--workdir=w']
  for program, typed in (
    ('/x/st_moe/__main__.py', [sys.executable, '-m', 'st_moe']),
    ('.venv/bin/st_moe', ['.venv/bin/st_moe']),
  ):
    monkeypatch.setattr(sys, 'argv', [program])
    assert main(argv) == 0
    assert trained[-1]['command'] == [*typed, *argv]
    resume = shlex.split(trained[-1]['resume_command'])
    assert resume == [*typed, 'pretrain', '--workdir=w']


# pretrain


def test_pretrain_hands_over_configuration_and_command(trained):
  argv = [
    'pretrain',
    '--gin_file=gin_configs/runs/quickstart.gin',
    '--gin.STEPS=60',
    '--workdir=runs/a',
    '--seed=7',
  ]
  assert main(argv) == 0
  (call,) = trained
  config = call.pop('config')
  assert (config.steps, config.seed, config.data.task) == (60, 7, 'docstrings')
  assert call == {
    'workdir': Path('runs/a'),
    'operative_config': operative_config(config),
    'command': ['st_moe', *argv],
    'resume_command': 'st_moe pretrain --workdir=runs/a',
    'allow_config_change': False,
  }


def test_an_error_after_the_configuration_says_where_it_was_set(
  monkeypatch, error
):
  def pretrain(config, *args, **kwargs):
    raise UserError(f'DataConfig.files: {config.data.files} does not exist')

  stub = types.SimpleNamespace(pretrain=pretrain)
  monkeypatch.setitem(sys.modules, 'st_moe.train', stub)
  monkeypatch.setattr(st_moe, 'train', stub, raising=False)
  argv = ['pretrain', '--gin_file=models/tiny.gin', '--gin_file=runs/small.gin']
  argv += ['--workdir=w']
  message = 'DataConfig.files: x does not exist'
  assert error(*argv, '--gin.FILES=x') == f'{message} (--gin.FILES)'
  assert re.fullmatch(
    r'DataConfig.files: \(\) does not exist '
    r'\(gin_configs/runs/small.gin:\d+, --gin.FILES=VALUE\)',
    error(*argv),
  )


def test_pretrain_goes_on_from_the_work_directory_alone(trained):
  config = load('ModelConfig.d_model = 64\nRunConfig.steps = 5')
  Path('w').mkdir()
  write('w/config.gin', operative_config(config))
  assert main(['pretrain', '--workdir=w']) == 0
  assert trained[0]['config'] == config


def test_a_config_beside_a_checkpoint_runs_nothing(error):
  Path('w').mkdir()
  write(
    'w/config.gin',
    'from __gin__ import dynamic_registration\nimport os\n'
    "os.system.command = 'touch broken_in'\nRunConfig.steps = @os.system()\n",
  )
  assert 'is refused' in error('pretrain', '--workdir=w')
  assert not Path('broken_in').exists()


# vocab and cache


@pytest.fixture
def prepared(monkeypatch):
  """Replaces what reads text; returns the calls."""
  calls = []
  stub = types.SimpleNamespace(
    vocab_command=lambda config, output, size: calls.append(
      (config, output, size)
    ),
    cache_command=lambda config, output, **more: calls.append(
      (config, output, more)
    ),
  )
  monkeypatch.setitem(sys.modules, 'st_moe.data.commands', stub)
  return calls


def test_vocab_reads_the_files_that_are_named(prepared):
  argv = ['vocab', 'a.txt', 'b.txt', '--size=800', '--output=my.model']
  assert main(argv) == 0
  ((config, output, size),) = prepared
  assert (config.task, config.files) == ('text', ('a.txt', 'b.txt'))
  assert (output, size) == (Path('my.model'), 800)


def test_vocab_takes_task_and_size_from_gin(prepared):
  argv = ['vocab', '--gin_file=runs/quickstart.gin', '--output=my.model']
  assert main(argv) == 0
  ((config, _, size),) = prepared
  assert (config.task, size) == ('docstrings', config.auto_vocabulary_size)


def test_cache_hands_over_its_flags(prepared):
  argv = ['cache', 'a.txt', '--output=c', '--vocabulary=byte']
  assert main(argv) == 0
  assert main([*argv, '--num_shards=4', '--shard=0/2']) == 0
  assert [(c.vocabulary, output, more) for c, output, more in prepared] == [
    ('byte', Path('c'), {'shard': None}),
    ('byte', Path('c'), {'shard': '0/2', 'num_shards': 4}),
  ]


def test_a_module_registers_tasks_before_the_data_is_opened(prepared, error):
  seqio = pytest.importorskip('seqio')
  write(
    'my_tasks.py',
    'import seqio\n'
    'features = {"targets": seqio.Feature(seqio.ByteVocabulary(100))}\n'
    'source = seqio.TextLineDataSource({"train": "a.txt"})\n'
    'seqio.TaskRegistry.add("mine", source=source, preprocessors=[], '
    'output_features=features)\n',
  )
  argv = ['cache', '--gin.DataConfig.task=mine', '--output=c']
  assert main([*argv, '--module=my_tasks']) == 0
  assert 'mine' in seqio.TaskRegistry.names()
  assert len(prepared) == 1
  missing = error(*argv, '--module=my_taks')
  assert missing.startswith('--module=my_taks: no such module in ')


# config


def test_config_list_names_every_file_with_its_line(capsys):
  assert main(['config', 'list']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(list(gin_files.GIN_ROOT.rglob('*.gin')))
  assert any(
    line.startswith('gin_configs/models/st_moe_l.gin ')
    and 'ST-MoE-L: 4.1 billion parameters' in line
    for line in lines
  )


def test_config_show_alone_gives_the_same_configuration(capsys):
  # Odd values of every kind survive being written and read.
  text = (
    "DataConfig.files = ('it\\'s\\n%a @b.txt', 'é')\n"
    'OptimizerConfig.epsilon1 = 1e-30\nMeshConfig.data = -1\n'
    'OptimizerConfig.max_grad_norm = None\n'
    "RouterConfig.preset = 't5x'\nModelConfig.sparse_placement = 2\n"
    "decoder/RouterConfig.word_embedding = 'add'\n"
    "ModelConfig.mlp_activations = ('relu',)\nRunConfig.tensorboard = False"
  )
  config = load(text)
  assert main(['config', 'show', 'run.gin']) == 0
  shown = capsys.readouterr().out
  assert load_config([write('shown.gin', shown)]) == config
  # Complete: no field is left to a default that may change.
  assert 'MeshConfig.model = 1' in shown
  assert 'encoder/RouterConfig.train_capacity_factor = 1.25' in shown


def test_config_show_marks_what_a_run_still_needs(capsys):
  assert main(['config', 'show', 'models/tiny.gin', 'runs/pretrain.gin']) == 0
  shown = capsys.readouterr().out
  assert (
    'DataConfig.vocabulary = %gin.REQUIRED  # --gin.VOCABULARY=VALUE\n' in shown
  )
  assert 'ModelConfig.d_model = 128\n' in shown


def test_config_diff_prints_what_differs(capsys):
  write('a.gin', 'RunConfig.steps = 1')
  write('b.gin', "RunConfig.steps = 2\nRouterConfig.preset = 't5x'")
  assert (
    main(['config', 'diff', 'a.gin', 'a.gin', '--gin.RunConfig.seed=3']) == 0
  )
  assert capsys.readouterr().out == 'no difference\n'
  argv = ['models/st_moe_l.gin', 'ablations/bias/multiplicative.gin']
  assert main(['config', 'diff', *argv]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines == [
    f"{stack}/RouterConfig.expert_bias: 'none' -> 'multiplicative'"
    for stack in ('encoder', 'decoder')
  ]
  assert main(['config', 'diff', 'a.gin', 'b.gin']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == 'RunConfig.steps: 1 -> 2'
  assert (
    "decoder/RouterConfig.gate_normalization: 'before_drop' -> 'none'" in lines
  )
  assert not any(line.startswith('ModelConfig') for line in lines)
