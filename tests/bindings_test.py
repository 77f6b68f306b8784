"""gin files and flags become a RunConfig, or one line that says why not."""

from pathlib import Path

import pytest

from st_moe import gin_files
from st_moe.config import ROUTER_PRESETS, RunConfig
from st_moe.errors import UserError
from st_moe.gin_files import load_config, parse_flag


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
  Path(name).write_text(text)
  return name


def load(text: str = '', *flags: str) -> RunConfig:
  write('run.gin', text)
  return load_config(['run.gin'], [parse_flag(flag) for flag in flags])


def error_of(text: str, *flags: str) -> str:
  with pytest.raises(UserError) as caught:
    load(text, *flags)
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_later_files_and_flags_win():
  write('b.gin', 'RunConfig.steps = 2')
  write('a.gin', 'RunConfig.steps = 1\nRunConfig.batch_size = 8')
  assert load_config(['a.gin', 'b.gin']).steps == 2
  assert load_config(['b.gin', 'a.gin']).steps == 1
  flags = [parse_flag('RunConfig.steps=3'), parse_flag('RunConfig.steps=4')]
  assert load_config(['a.gin', 'b.gin'], flags).steps == 4
  assert load_config(['a.gin'], [], seed=9).seed == 9


def test_macros_pass_values_on():
  config = load(
    'N = 30\nTWICE = %N\nRunConfig.steps = %TWICE\n'
    "DataConfig.files = ('a.txt', %FILE)\nFILE = 'b.txt'"
  )
  assert config.steps == 30
  assert config.data.files == ('a.txt', 'b.txt')
  assert load('N = 30\nRunConfig.steps = %N', 'N=60').steps == 60


def test_a_block_binds_many_fields():
  config = load('OptimizerConfig:\n  learning_rate = 3\n  beta1 = 0.9\n')
  assert (config.optimizer.learning_rate, config.optimizer.beta1) == (3, 0.9)


@pytest.mark.parametrize(
  'text, value',
  [
    ('docstrings', 'docstrings'),
    ("'docstrings'", 'docstrings'),
    ('/data/c4 train.*.json.gz', '/data/c4 train.*.json.gz'),
    ('c4/en:3.0.1', 'c4/en:3.0.1'),
    ('1/2', '1/2'),
    ('', ''),
    ('a=b', 'a=b'),
    ('60', 60),
    ('-1', -1),
    ('1e-3', 1e-3),
    ('500_000', 500_000),
    ('None', None),
    ('True', True),
    ("('a', 'b')", ('a', 'b')),
    ("['a']", ['a']),
  ],
)
def test_a_flag_is_a_gin_value_or_else_a_string(text, value):
  binding = parse_flag(f'NAME={text}')
  assert binding.value == value
  assert type(binding.value) is type(value)
  assert binding.where == '--gin.NAME'


def test_router_bindings_reach_both_stacks_unless_scoped():
  model = load(
    'RouterConfig.num_choices = 3\n'
    'encoder/RouterConfig.num_choices = 1\n'
    'decoder/RouterConfig.group_size = 456'
  ).model
  routers = (model.encoder_router, model.decoder_router)
  assert [r.num_choices for r in routers] == [1, 3]
  assert [r.group_size for r in routers] == [2048, 456]


def test_a_preset_is_the_base_of_the_other_bindings():
  model = load(
    "RouterConfig.jitter = 0.05\nRouterConfig.preset = 't5x'\n"
    "decoder/RouterConfig.preset = 'hf_switch'"
  ).model
  t5x, hf = ROUTER_PRESETS['t5x'], ROUTER_PRESETS['hf_switch']
  assert model.encoder_router.jitter == model.decoder_router.jitter == 0.05
  assert model.encoder_router.loss_reduction == t5x.loss_reduction == 'mean'
  assert model.decoder_router.fixed_capacity == hf.fixed_capacity


def test_a_later_scoped_binding_overrides_an_unscoped_one():
  model = load(
    'RouterConfig.group_size = 64\nencoder/RouterConfig.group_size = 8\n'
    'decoder/RouterConfig.group_size = 4'
  ).model
  assert model.encoder_router.group_size == 8
  assert model.decoder_router.group_size == 4


@pytest.mark.parametrize(
  'text, message',
  [
    (
      '\nModelConfig.d_modle = 8',
      'run.gin:2: ModelConfig has no field d_modle; did you mean d_model?',
    ),
    (
      'ModelConfg.d_model = 8',
      'run.gin:1: unknown class ModelConfg in ModelConfg.d_model; '
      'did you mean ModelConfig?',
    ),
    (
      'ModelConfig.learning_rate = 8',
      'run.gin:1: ModelConfig has no field learning_rate; '
      'did you mean OptimizerConfig.learning_rate?',
    ),
    (
      'RunConfig.model = 8',
      'run.gin:1: RunConfig has no field model; bind the fields of ModelConfig',
    ),
    (
      'encoder/ModelConfig.d_model = 8',
      'run.gin:1: encoder/ModelConfig.d_model has no meaning; only '
      'encoder/RouterConfig and decoder/RouterConfig are scoped',
    ),
    (
      'encodr/RouterConfig.jitter = 0.1',
      'run.gin:1: encodr/RouterConfig.jitter has no meaning',
    ),
    (
      'STEPS = 3\nRunConfig.steps = %STEP',
      'run.gin:2: macro %STEP is not defined; did you mean STEPS?',
    ),
    (
      'STEPS = 3\nSTEP = 4\nRunConfig.steps = %STEPS',
      'run.gin:2: nothing reads macro STEP; did you mean STEPS?',
    ),
    (
      'steps = 3',
      'run.gin:1: nothing reads macro steps; did you mean RunConfig.steps?',
    ),
    ('A = %B\nB = %A\nRunConfig.steps = %A', 'is defined by itself'),
    (
      "ModelConfig.d_ff = 4\nModelConfig.d_model = 'many'",
      "ModelConfig.d_model must be int, got 'many' (run.gin:2)",
    ),
    (
      "STEPS = 'many'\n\nRunConfig.steps = %STEPS",
      "RunConfig.steps must be int, got 'many' (run.gin:1)",
    ),
    (
      'RunConfig.batch_size = 10\nRunConfig.microbatches = 3',
      'RunConfig: batch_size 10 is not divisible by microbatches 3 '
      '(run.gin:1, run.gin:2)',
    ),
    ("MeshConfig.data = {'a': 1}", "must be int, got {'a': 1} (run.gin:1)"),
    (
      "RouterConfig.preset = 'hf_swich'",
      'run.gin:1: RouterConfig.preset must be one of paper, t5x, hf_switch, '
      "got 'hf_swich'; did you mean hf_switch?",
    ),
    ('RouterConfig.preset = 3', 'must be one of paper, t5x, hf_switch, got 3'),
    (
      'encoder/RouterConfig.jitter = 0.1\ndecoder/RouterConfig.jitter = 0.2\n'
      'RouterConfig.jitter = 0.3',
      'run.gin:3: RouterConfig.jitter has no effect, since '
      'encoder/RouterConfig.jitter (run.gin:1) and '
      'decoder/RouterConfig.jitter (run.gin:2) are bound; bind those',
    ),
    (
      'STEPS = %gin.REQUIRED\nRunConfig.steps = %STEPS',
      'run.gin:1: STEPS is required; give --gin.STEPS=VALUE',
    ),
    (
      'RunConfig.steps = %gin.REQUIRED',
      'RunConfig.steps is required; give --gin.RunConfig.steps=VALUE',
    ),
  ],
)
def test_a_wrong_name_or_value_says_what_where_and_what_to_do(text, message):
  assert message in error_of(text)


def jitters(text: str, *flags: str) -> tuple[float, float]:
  model = load(text, *flags).model
  return model.encoder_router.jitter, model.decoder_router.jitter


def test_a_flag_for_both_routers_wins_over_files_that_bind_each():
  text = """
encoder/RouterConfig.jitter = 0.1
decoder/RouterConfig.jitter = 0.2
RouterConfig.z_loss_weight = 0.5
"""
  assert jitters(text) == (0.1, 0.2)
  assert jitters(text, 'RouterConfig.jitter=0.3') == (0.3, 0.3)
  # A scope wins where both are flags.
  one = 'encoder/RouterConfig.jitter=0.4'
  assert jitters(text, one, 'RouterConfig.jitter=0.3') == (0.4, 0.3)
  assert jitters(text, 'RouterConfig.jitter=0.3', one) == (0.4, 0.3)


@pytest.mark.parametrize(
  'flag, message',
  [
    ('STPES=60', '--gin.STPES: nothing reads macro STPES; did you mean STEPS?'),
    ('steps=60', '--gin.steps: nothing reads macro steps; did you mean STEPS?'),
    ('STEPS=many', "must be int, got 'many' (--gin.STEPS)"),
    ('RunConfig.setps=60', 'RunConfig has no field setps; did you mean steps?'),
    ('RunConfig.tensorboard=true', "must be True or False, got 'true'"),
    ('RunConfig.steps=1e3', 'must be int, got 1000.0; write 1000'),
    ('TASK=@os.system', 'the reference @os.system is refused'),
    ('TASK=@os.system()', 'the reference @os.system is refused'),
    ('SEED=3', '--gin.SEED has no effect: what read %SEED is bound again'),
    ('RouterConfig.jitter=0.1', 'num_experts is 0, so nothing is routed'),
  ],
)
def test_a_wrong_flag_is_refused(flag, message):
  text = (
    "STEPS = 3\nTASK = 'text'\nRunConfig.steps = %STEPS\nSEED = 1\n"
    'DataConfig.task = %TASK\nRunConfig.seed = %SEED\nRunConfig.seed = 2\n'
    'ModelConfig.num_experts = 0'
  )
  assert message in error_of(text, flag)


# Files


@pytest.mark.parametrize(
  'text, message',
  [
    ('RunConfig.steps = ', 'run.gin:1: not gin'),
    ('\nRunConfig.steps 3', 'run.gin:2: not gin'),
    ('DataConfig.task = docstrings', 'strings in quotes'),
    ('DataConfig.files = (1,', 'not gin'),
    ("DataConfig.task = 'x\n", 'run.gin:1: not gin'),
    ('= 3', 'run.gin:1: not gin'),
    ('RunConfig:\n  steps = 3\n batch_size = 4', 'run.gin:3: not gin'),
    ('%', 'run.gin:1: not gin'),
    ('$ = 3', 'run.gin:1: not gin'),
    ('include 3', 'run.gin:1: not gin'),
    ("include 'models/tny.gin'", 'did you mean gin_configs/models/tiny.gin?'),
    ("include 'run.gin'", 'run.gin includes run.gin: a circle'),
    ("include 'nothing'", 'run.gin: no gin file nothing; see `st_moe config'),
  ],
)
def test_a_broken_file_says_where(text, message):
  assert message in error_of(text)


def test_a_missing_file_suggests_one_of_ours():
  with pytest.raises(UserError) as caught:
    load_config(['runs/quikstart.gin'])
  assert str(caught.value) == (
    'no gin file runs/quikstart.gin; did you mean '
    'gin_configs/runs/quickstart.gin?'
  )


def test_a_file_that_is_not_utf8_is_refused():
  Path('run.gin').write_bytes(b'# caf\xe9')
  with pytest.raises(UserError, match='cannot read run.gin'):
    load_config(['run.gin'])


@pytest.mark.parametrize(
  'text',
  [
    'import os',
    'import os.path as p',
    'from os import path',
    'from __gin__ import dynamic_registration',
    'RunConfig.steps = @os.system()',
    'RunConfig.steps = @open',
    "DataConfig.files = ('a', @os.system())",
    'STEPS = @os.system()\nRunConfig.steps = %STEPS',
    "DataConfig.task = {'a': @os.system()}",
  ],
)
def test_a_file_imports_and_calls_nothing(text):
  message = error_of(f'RunConfig.seed = 1\n{text}')
  assert message.startswith('run.gin:2: ')
  assert 'is refused' in message


def test_our_files_are_found_by_name_from_anywhere():
  by_path = load_config([str(gin_files.GIN_ROOT / 'models' / 'tiny.gin')])
  assert load_config(['gin_configs/models/tiny.gin']) == by_path
  assert load_config(['models/tiny.gin']) == by_path


def test_a_file_here_wins_but_never_inside_ours():
  (Path('models')).mkdir()
  write('models/tiny.gin', 'ModelConfig.d_model = 8')
  assert load_config(['models/tiny.gin']).model.d_model == 8
  assert load_config(['runs/quickstart.gin']).model.d_model > 8


def test_an_include_is_sought_beside_its_file_first():
  Path('there').mkdir()
  write('there/part.gin', 'RunConfig.steps = 2')
  write('part.gin', 'RunConfig.steps = 1')
  write('there/run.gin', "include 'part.gin'\ninclude 'models/tiny.gin'")
  config = load_config(['there/run.gin'])
  assert config.steps == 2
  assert config.model.num_experts == 8
