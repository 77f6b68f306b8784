"""Studies: declarations, grids, their cost; every arm is a legal run."""

import io
import json
import re
import types

import pytest
from rich.console import Console

from st_moe import gin_files
from st_moe.bindings import operative_config
from st_moe.errors import UserError
from st_moe.gin_files import load_config, parse_flag
from st_moe.main import main
from st_moe.study import declaration, grid, progress
from st_moe.study.grid import SCALES, Settings, choose, make_grid

STUDIES = declaration.names()
# What the run files of large scales require.
FLAGS = (parse_flag('VOCABULARY=spiece.model'),)
TASK = (parse_flag('TASK=superglue'), parse_flag('TASK_DIR=files'))
TASKS = {'finetune_overfitting': TASK[1:]}  # whose arms name the task
HEAD = 'title = "T"\npaper = "P"\nmetric = "neg_log_perplexity"\n'


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> dict[str, str]:
  """What fine-tuning studies begin with: of ST-MoE-L and Dense-L at step 7."""
  found = {}
  for flag, model in (
    ('checkpoint', 'st_moe_l'),
    ('dense_checkpoint', 'dense_l'),
  ):
    path = tmp_path_factory.mktemp(model)
    config = load_config([f'models/{model}.gin'])
    (path / 'config.gin').write_text(operative_config(config))
    (path / 'checkpoints' / '7').mkdir(parents=True)
    found[flag] = str(path)
  return found


def grid_of(name, scale='tiny', seeds=(0,), flags=None, weights=None):
  study = declaration.find_study(name)
  if study.recipe == 'finetune':
    given = TASKS.get(name, TASK) + (flags or ())
    settings = Settings(scale, (), given, **weights)
  else:
    settings = Settings(scale, (), FLAGS if flags is None else flags)
  return make_grid(study, settings, seeds)


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('name', STUDIES)
def test_every_arm_is_a_legal_run_of_its_own(name, scale, weights):
  study = declaration.find_study(name)
  runs = grid_of(name, scale, weights=weights)
  arms = [arm for run in runs for arm in run.arms]
  assert sorted(arms) == sorted(arm.name for arm in study.arms_at(scale))
  assert study.reference in arms
  assert study.claims_at(scale)


@pytest.mark.parametrize('name', STUDIES)
def test_every_gin_file_of_a_study_is_one_of_its_arms(name):
  study = declaration.find_study(name)
  used = {file.resolve() for arm in study.arms for file in arm.files}
  assert set(study.folder.resolve().glob('*.gin')) <= used


@pytest.mark.parametrize('name', STUDIES)
def test_the_paper_s_numbers_agree_with_the_first_lines_of_the_arms(name):
  study = declaration.find_study(name)
  for arm in study.arms:
    if [file.stem for file in arm.files] != [arm.name]:
      continue  # made of several files
    comment = arm.files[0].read_text().splitlines()[0]
    printed = re.search(r': (-?\d\.\d{3})', comment)
    value = arm.paper.value
    if study.metric == 'neg_log_perplexity':
      assert (printed and float(printed[1])) == value, arm.name


@pytest.mark.parametrize('name', STUDIES)
def test_what_is_claimed_is_what_the_paper_s_numbers_say(name):
  from st_moe.study.summary import _paper_contrast

  study = declaration.find_study(name)
  for claim in study.claims:
    value = _paper_contrast(study, 'l', claim.contrast, claim.metric)
    if value is None:
      continue
    if claim.expects == 'within':
      assert abs(value) < claim.margin, claim.text
    else:
      assert value > -claim.margin, claim.text


def test_the_means_of_figure_6():
  """Over six cells of Table 20 each, and nine for the slots."""
  from st_moe.study.summary import _paper_contrast

  study = declaration.find_study('finetune_batch_lr')
  found = {
    claim.text: round(
      _paper_contrast(study, 'l', claim.contrast, claim.metric), 2
    )
    for claim in study.claims
  }
  assert found == {
    'Resetting the slots hurts the sparse model': 0.86,
    'Resetting the slots hurts the dense model': 0.48,
    'The sparse model prefers small batches': 0.33,
    'The dense model prefers large batches': 0.45,
    'The sparse model prefers high learning rates': 1.03,
    'The dense model prefers low learning rates': 0.75,
    'Sparse is better than dense': 0.98,
  }


def test_runs_that_carry_the_step_are_as_long_as_others(weights):
  runs = grid_of('finetune_batch_lr', weights=weights)
  steps = {run.config.initial_optimizer: run.config.steps for run in runs}
  assert steps == {'slots': 200, 'fresh': 200}
  flag = parse_flag('RunConfig.initial_optimizer=carried')
  carried = grid_of('finetune_capacity', flags=(flag,), weights=weights)
  assert {run.config.steps for run in carried} == {207}
  for run in runs + carried:
    assert grid.steps_to_train(run.config) == 200
  sparse = [run for run in runs if run.config.model.num_experts]
  assert len(sparse) == len(runs) / 2 == 18
  batches = {run.name.split('_')[2]: run.config.batch_size for run in runs}
  assert batches == {'1m': 256, '262k': 64, '65k': 16}
  large = grid_of('finetune_batch_lr', 'l', weights=weights)
  assert {run.config.batch_size for run in large} == {2048, 512, 128}
  assert {run.config.data.task_dir for run in runs} == {'files'}


def test_table_7(weights):
  from st_moe.study.summary import _paper_contrast

  study = declaration.find_study('finetune_sentinels')
  found = {
    claim.text: round(_paper_contrast(study, 'l', claim.contrast, 'score'), 2)
    for claim in study.claims
  }
  assert found == {
    'Sentinels change nothing for the sparse model': 0.0,
    'Sentinels change nothing for the dense model': 0.2,
    'Sparse is better than dense': 1.6,
  }
  runs = grid_of('finetune_sentinels', weights=weights)
  assert {
    run.name: (run.config.data.insert_sentinels, run.config.model.num_experts)
    for run in runs
  } == {
    'dense_plain': (0, 0), 'dense_sentinel': (1, 0),
    'sparse_plain': (0, 32), 'sparse_sentinel': (1, 32),
  }  # fmt: skip


def test_arms_of_a_model_that_is_not_given_are_left_out(weights, capsys):
  argv = ['study', 'finetune_overfitting', '--dry_run', '--gin.TASK_DIR=files']
  argv.append('--topology=v5p:4x4x4')  # where the files may be
  argv.append(f'--checkpoint={weights["checkpoint"]}')
  assert main(argv) == 0
  out = capsys.readouterr().out
  assert out.startswith(
    'without --dense_checkpoint there are no arms dense_cb, dense_record\n'
  )
  assert '\n6 runs, ' in out and f'from {weights["checkpoint"]}\n' in out


def test_arms_that_differ_in_evaluation_only_are_trained_once():
  runs = grid_of('cf_top_n')
  assert [list(run.arms) for run in runs[2:4]] == [
    ['top1_cf075_eval075', 'top1_cf075_eval200'],
    ['top2_cf075_eval075', 'top2_cf075_eval200'],
  ]
  assert len(runs) == 10
  first, second = runs[2].arms.values()
  routers = [config.model.encoder_router for config in (first, second)]
  assert [r.eval_capacity_factor for r in routers] == [0.75, 2.0]
  assert [r.train_capacity_factor for r in routers] == [0.75, 0.75]


def test_equal_flops_without_geglu():
  """Two kernels of d_ff x 1.5 for three of d_ff."""
  for scale in SCALES:
    configs = {
      run.name: run.config.model for run in grid_of('stability', scale)
    }
    assert 2 * configs['no_geglu'].d_ff == 3 * configs['baseline'].d_ff


def test_a_dense_model_three_times_as_large():
  from st_moe.bench.flops import step_flops

  for scale in ('tiny', 'small', 'l'):
    flops = {
      run.name: sum(step_flops(run.config, 1).values())
      for run in grid_of('cf_top_n', scale)
      if run.name.startswith('dense')
    }
    assert 2.5 < flops['dense_xl'] / flops['dense'] < 4.5, scale


def test_groups_are_of_sequences():
  for scale in SCALES:
    for run in grid_of('group_size', scale):
      config, four = run.config, run.name == 'four'
      rows = {'sequence': 1, 'four': 4, 'batch': config.batch_size}[run.name]
      for stack, length in config.data.lengths.items():
        router = getattr(config.model, f'{stack}_router')
        assert (router.group_size or length) == rows * length, (scale, four)


def test_shards_are_a_partition_and_arms_a_choice():
  runs = grid_of('cf_top_n', seeds=range(3))
  assert len(runs) == 30 and [run.seed for run in runs[9:11]] == [0, 1]
  parts = [choose(runs, [], f'{i}/4') for i in range(4)]
  assert sorted(map(len, parts)) == [7, 7, 8, 8]
  assert sorted(id(run) for part in parts for run in part) == sorted(
    map(id, runs)
  )
  chosen = choose(runs, ['top2_cf125_eval200', 'dense'], None)
  assert [(run.name, run.seed) for run in chosen] == [
    (name, seed)
    for seed in range(3)
    for name in ('dense', 'top2_cf125_eval125')
  ]


@pytest.mark.parametrize(
  ('arms', 'shard', 'expected'),
  [
    (['dens'], None, r'--arm=dens is none of .*; did you mean dense\?'),
    ([], '4/4', '--shard=4/4 is not .* 0 <= i < n'),
    ([], 'one', "--shard=one is not 'i/n'"),
  ],
)
def test_a_wrong_choice_is_refused(arms, shard, expected):
  with pytest.raises(UserError, match=expected):
    choose(grid_of('bias'), arms, shard)


def test_files_on_the_command_line_are_the_text():
  flags = (parse_flag('FILES=my.txt'),)
  (run, *_) = grid_of('bias', flags=flags)
  assert (run.config.data.task, run.config.data.files) == ('text', 'my.txt')
  (run, *_) = grid_of('bias', flags=())
  assert run.config.data.task == 'docstrings'


def test_a_flag_that_makes_arms_equal_is_refused():
  flags = (parse_flag('RouterConfig.dtype=float32'),)
  with pytest.raises(UserError, match='float32 and bfloat16 are the same'):
    grid_of('router_precision', flags=flags)


def test_the_list_names_every_study_and_its_table(capsys):
  assert main(['study', 'list']) == 0
  *lines, note = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == STUDIES
  assert note.startswith('Those named finetune_* begin with a model')
  assert any(
    line.startswith('cf_top_n ') and 'Table 8' in line for line in lines
  )


def test_dry_run_prints_the_grid_and_its_cost(capsys, monkeypatch):
  from st_moe.study import costs

  monkeypatch.chdir(gin_files.GIN_ROOT.parent)
  argv = ['study', 'cf_top_n', '--scale=l', '--dry_run', '--seeds=2']
  assert main([*argv, '--topology=v5p:4x4x4', '--gin.VOCABULARY=a.model']) == 0
  out = capsys.readouterr().out
  runs = grid_of('cf_top_n', 'l', (0, 1))
  total = sum(costs.run_flops(run.config) for run in runs)
  assert '\n20 runs, ' in out and f'{total / 1e15:.4g} PFLOP' in out
  assert 'the peak rate of v5p:4x4x4 (29.4 TFLOP/s)' not in out
  assert '(2.94e+04 TFLOP/s)' in out
  rows = [line.split() for line in out.splitlines()]
  assert ['top2_cf125_eval125', '100,000', '1,282,048'] in [r[:3] for r in rows]
  assert ['and', 'scored', 'as', 'top2_cf125_eval200'] in rows


@pytest.mark.parametrize(
  ('argv', 'expected'),
  [
    (['cf_topn'], 'no study cf_topn; did you mean cf_top_n?'),
    (['stabilty'], 'no study stabilty; did you mean stability?'),
    (['bias', '--gin.TASK=superglue.cbb', '--dry_run'], 'unknown task'),
    (['z_loss'], 'no study z_loss; did you mean z_loss_sweep?'),
    (['bias'], 'study needs --workdir=DIR, or --dry_run'),
    (
      ['finetune_subsets', '--dry_run'],
      'finetune_subsets is a study of fine-tu',
    ),
    (['bias', '--checkpoint=x'], 'bias is a study of pretraining: it takes'),
    (['bias', '--scale=tiney'], '--scale=tiney is none of'),
    (['bias', '--seeds=0', '--dry_run'], '--seeds must be at least 1'),
    (['bias', 'runs'], 'study bias takes no runs; give --workdir=DIR'),
    (['report'], 'study report needs the DIR'),
    (['report', '/nowhere'], '/nowhere holds no study'),
  ],
)
def test_wrong_words_end_with_one_line(argv, expected, capsys):
  assert main(['study', *argv]) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'error: {expected}') and error.count('\n') == 1


def test_an_arm_that_nobody_asked_for_may_be_impossible(capsys):
  argv = ['study', 'cf_top_n', '--gin.ModelConfig.num_experts=2', '--dry_run']
  argv.append('--topology=v5p:4x4x4')
  assert main(argv) == 2
  assert 'num_choices 3 exceeds num_experts 2' in capsys.readouterr().err
  assert main([*argv, '--arm=top1_cf125_eval125', '--seeds=1']) == 0
  assert '\n1 run, ' in capsys.readouterr().out
  assert main([*argv, '--arm=top1_cf125']) == 2
  assert '--arm=top1_cf125 is none of dense, ' in capsys.readouterr().err


def test_a_pipe_is_told_each_minute_how_far_a_run_is(monkeypatch):
  now, out = [0.0], io.StringIO()
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  (run, *_) = grid_of('bias', flags=())
  state = types.SimpleNamespace(step=0)
  console = Console(file=out, width=80)
  with (
    progress.GridProgress(1, [300], console) as bars,
    bars.run(run, state) as shown,
  ):
    for step, seconds in ((10, 59), (20, 60), (30, 119), (40, 121)):
      now[0] = seconds
      shown.update(step, {'loss': 5.0})
  told = [line for line in out.getvalue().splitlines() if 'step' in line]
  assert told == [
    '  step 20 of 300  loss 5.0000',
    '  step 40 of 300  loss 5.0000',
  ]


def test_data_that_is_not_there_leaves_no_folder(tmp_path, capsys):
  argv = ['study', 'bias', '--gin.TASK=text', '--gin.FILES=/nowhere.txt']
  for more in (['--dry_run'], [f'--workdir={tmp_path}/bias']):
    assert main([*argv, *more]) == 2
    error = capsys.readouterr().err
    assert '/nowhere.txt does not exist' in error and error.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
  (tmp_path / 'thesis.txt').write_text('precious')
  argv = ['study', 'bias', f'--workdir={tmp_path}']
  assert main(argv) == 2
  assert 'is not empty and holds no study' in capsys.readouterr().err
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'study.json').write_text(json.dumps({'study': 'bpr'}))
  assert main(['study', 'bias', f'--workdir={other}']) == 2
  assert 'holds the study of another command' in capsys.readouterr().err
  record = {'command': 'st_moe study bias --scale=tiny', 'arms': {'dense': '0'}}
  (other / 'study.json').write_text(json.dumps(record))
  assert main(['study', 'bias', f'--workdir={other}']) == 2
  error = capsys.readouterr().err
  assert (
    'holds a study whose settings were others, in its gin files or by default '
    '(arms additive, dense, multiplicative, none); use another' in error
  )


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('title = ', 'study.toml cannot be read'),
    (HEAD, 'the study has no reference'),
    (f'{HEAD}reference = "a"\narms = [{{nam = "a"}}]', 'an arm has no name'),
    (f'{HEAD}reference = "a"\narms = [{{name = "a"}}]', 'there is no .*a.gin'),
    (
      f'{HEAD}reference = "c"\narms = [{{name = "b"}}]',
      "reference 'c' is none of b",
    ),
    (
      f'{HEAD}reference = "b"\narms = [{{name = "b"}}]\n[[claims]]\n'
      'text = "x"\ncontrast = {b = 1}\nexpects = "above"\nmargin = 1',
      'a margin belongs to',
    ),
    (
      f'{HEAD}reference = "b"\narms = [{{name = "b"}}]\n[[claims]]\n'
      'text = "x"\ncontrast = {d = 1}\nexpects = "above"',
      "arm 'd' is none of b",
    ),
  ],
)
def test_a_declaration_that_is_wrong_says_where(tmp_path, text, expected):
  (tmp_path / 'study.toml').write_text(text)
  (tmp_path / 'b.gin').write_text('RouterConfig.jitter = 0.1\n')
  with pytest.raises(UserError, match=expected):
    declaration.find_study(str(tmp_path))


def test_fingerprints_differ_between_arms_and_not_between_seeds():
  runs = grid_of('bias', seeds=(0, 1))
  names = {run.name: set() for run in runs}
  for run in runs:
    names[run.name].add(grid.fingerprint(run.config))
  assert [len(found) for found in names.values()] == [1] * 4
  assert len(set.union(*names.values())) == 4
