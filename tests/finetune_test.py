"""`st_moe finetune`: the model comes from the checkpoint, its bits stay."""

import json
import re

import numpy as np
import pytest
from made_models import write_run
from tiny_model import tiny_config

from st_moe import trainer
from st_moe.checkpoint import ArrayReader, find_steps
from st_moe.gin_files import load_config
from st_moe.main import main

SPARSE = tiny_config(vocab_size=384)
FLAGS = [
  '--gin_file=runs/finetune_sparse.gin', '--gin.TASK=text',
  '--gin.BATCH_SIZE=8', '--gin.EVAL_EVERY=2',
  '--gin.RunConfig.eval_batches=1', '--gin.RunConfig.unigram_batches=1',
  '--gin.RunConfig.tensorboard=False', '--gin.DataConfig.inputs_length=64',
  '--gin.DataConfig.targets_length=32',
]  # fmt: skip


@pytest.fixture
def text(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text(
    ''.join(f'the cat {i} sat on the mat {i * i}\n' for i in range(400))
  )
  return f'--gin.FILES={path}'


def test_a_model_is_tuned_and_goes_on(tmp_path, text, caplog):
  weights, run = tmp_path / 'weights', tmp_path / 'run'
  before = write_run(weights, SPARSE)
  argv = ['finetune', f'--workdir={run}']
  flags = [*FLAGS, text, '--gin.TRAINABLE=non_moe', '--gin.STEPS=2']
  assert main([*argv, f'--checkpoint={weights}', *flags]) == 0

  config = load_config([str(run / 'config.gin')])
  assert config.model.d_model == SPARSE.d_model
  assert config.model.num_experts == SPARSE.num_experts
  assert config.model.dropout_rate == 0.1
  assert config.model.encoder_router.expert_dropout_rate == 0.4
  assert 'is not set as that of' not in caplog.text
  record = json.loads((run / 'run.json').read_text())
  assert record['initial_weights']['step'] == 7

  _, steps = find_steps(run, None)
  assert steps == [2]
  stored = ArrayReader(run, 2)
  after = {name: stored.read(name) for name in before}
  moved = {n for n in before if not np.array_equal(after[n], before[n])}
  assert moved
  assert not any('/moe/' in name for name in moved)
  assert {n for n in before if '/moe/' in n}

  # Without --checkpoint the run in its directory goes on.
  caplog.clear()
  longer = ['--gin.RunConfig.steps=4', '--allow_config_change']
  assert main([*argv, *longer]) == 0
  assert 'resumed at step 2' in caplog.text
  assert json.loads((run / 'summary.json').read_text())['step'] == 4


CB_ROWS = [
  {'premise': f'It is {i}.', 'hypothesis': f'{i}', 'label': label, 'idx': i}
  for i, label in enumerate(
    ['entailment', 'contradiction', 'neutral', 'entailment', 'entailment'] * 2
  )
]


@pytest.fixture
def cb(tmp_path):
  """Returns the flags of a fine-tune on a small CB, with its weights."""
  for name, rows in (('train', CB_ROWS), ('val', CB_ROWS[:5])):
    path = tmp_path / 'superglue' / 'CB' / f'{name}.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  write_run(tmp_path / 'weights', SPARSE)
  return [
    f'--checkpoint={tmp_path}/weights', f'--workdir={tmp_path}/run', *FLAGS,
    '--gin.TASK=superglue.cb', f'--gin.TASK_DIR={tmp_path}/superglue',
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--gin.ModelConfig.d_model=24', 'does not fit this configuration'),
    ('--gin.TRAINABLE=router_', "'router_' matches no parameter"),
  ],
)
def test_weights_are_checked_before_data_is_read(
  flag, message, tmp_path, cb, capsys
):
  flags = [flag, f'--gin.TASK_DIR={tmp_path}/not_there']
  assert main(['finetune', *cb, *flags]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_tasks_are_scored_while_a_model_is_tuned(tmp_path, cb, capsys):
  run = tmp_path / 'run'
  flags = ['--gin.STEPS=4', '--gin.DataConfig.targets_length=16']
  assert main(['finetune', *cb, *flags]) == 0
  out = capsys.readouterr().out
  # Of 5 examples 3 are entailments.
  line = r'  superglue.cb:  accuracy [\d.]+ \(constant 60.00\)  f1 [\d.]+ \('
  assert re.search('step 2/4' + line, out)
  assert re.search('step 4/4' + line, out)
  assert 'unigram' not in out
  heading = re.search('^development scores at .*$', out, re.MULTILINE)[0]
  assert heading.endswith('answer, 0 to 100:') and len(heading) < 80

  logged = [
    json.loads(row)
    for row in (run / 'metrics.jsonl').read_text().splitlines()
    if 'eval/score' in row
  ]
  assert [row['step'] for row in logged] == [2, 4]
  best = json.loads((run / 'best.json').read_text())
  assert best['metric'] == 'eval/score'
  assert best['value'] == max(row['eval/score'] for row in logged)
  summary = json.loads((run / 'summary.json').read_text())
  assert summary['best'] == best
  task = summary['development']['tasks']['superglue.cb']
  assert summary['development']['step'] == best['step']
  assert task['metrics'] == {
    metric: logged[best['step'] // 2 - 1][f'eval/superglue.cb/{metric}']
    for metric in ('accuracy', 'f1')
  }
  assert task['majority']['metrics']['accuracy'] == 60.0
  answers = (run / 'best_answers' / 'superglue.cb.jsonl').read_text()
  assert len(answers.splitlines()) == 5
  assert 'Development scores' in (run / 'report' / 'index.html').read_text()
  assert f'st_moe evaluate --checkpoint={run} --step=best\n' in out

  # Those are the scores of the checkpoint.
  assert main(['evaluate', f'--checkpoint={run}', '--step=best']) == 0
  # Its tasks are where it found them, whatever else is said of them.
  again = ['--gin.TASK=superglue.cb', '--gin.METHOD=rank', '--step=best']
  assert main(['evaluate', f'--checkpoint={run}', *again]) == 0
  scored = json.loads((run / 'evaluations.jsonl').read_text().splitlines()[0])
  assert scored['step'] == best['step']
  assert scored['tasks']['superglue.cb']['metrics'] == task['metrics']


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    (
      'EvaluationConfig.tasks=superglue.cd',
      'error: EvaluationConfig.tasks: there is no task with answers '
      "'superglue.cd'; did you mean superglue.cb?",
    ),
    ('RunConfig.best_metric=eval/los', 'did you mean eval/loss?'),
  ],
)
def test_wrong_names_are_found_before_data_is_read(
  tmp_path, monkeypatch, flag, message, capsys
):
  monkeypatch.setattr(trainer, 'open_data', None)
  argv = ['--gin_file=runs/quickstart.gin', f'--workdir={tmp_path / "run"}']
  assert main(['pretrain', *argv, f'--gin.{flag}']) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('metric', 'message'),
  [
    (
      'eval/superglue.cb/f2',
      "RunConfig.best_metric 'eval/superglue.cb/f2' is no score of this run; "
      'did you mean eval/superglue.cb/f1?; it has eval/loss, ',
    ),
    ('eval/superglue.rte/score', 'did you mean eval/superglue.cb/score?'),
  ],
)
def test_a_best_metric_must_be_a_score_of_the_run(
  tmp_path, cb, metric, message, capsys
):
  assert main(['finetune', *cb, f'--gin.RunConfig.best_metric={metric}']) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert message in error
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([], 'finetune needs --checkpoint=DIR'),
    (['--checkpoint=none'], '--checkpoint=none holds no model'),
  ],
)
def test_weights_must_be_there(tmp_path, argv, message, capsys):
  run = tmp_path / 'run'
  assert main(['finetune', f'--workdir={run}', *FLAGS, *argv]) == 2
  assert capsys.readouterr().err.startswith(f'error: {message}')
  assert not run.exists()


def test_a_run_file_must_be_given(tmp_path, capsys):
  write_run(tmp_path / 'weights', SPARSE)
  run = tmp_path / 'run'
  argv = [f'--checkpoint={tmp_path / "weights"}', f'--workdir={run}']
  assert main(['finetune', *argv]) == 2
  assert 'finetune needs --gin_file=FILE' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--gin.TRAINABLE=atention', 'did you mean attention?'),
    (
      '--gin.ModelConfig.d_model=24',
      'out/kernel is float32[16, 16] but must be float32[16, 24]',
    ),
  ],
)
def test_what_does_not_fit_the_weights_is_refused(
  tmp_path, text, flag, message, capsys
):
  write_run(tmp_path / 'weights', SPARSE)
  argv = [f'--checkpoint={tmp_path / "weights"}', f'--workdir={tmp_path}/run']
  assert main(['finetune', *argv, *FLAGS, text, flag]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert message in error


def test_losses_capacity_and_dropout_are_flags(tmp_path, cb):
  stacks = ('encoder', 'decoder')
  fields = {
    'balance_loss_weight': 0.0,
    'z_loss_weight': 0.0,
    'train_capacity_factor': 0.25,
    'eval_capacity_factor': 3.0,
  }
  flags = [
    f'--gin.{stack}/RouterConfig.{field}={value}'
    for stack in stacks
    for field, value in fields.items()
  ]
  flags += ['--gin.DROPOUT=0.3', '--gin.EXPERT_DROPOUT=0.2', '--gin.STEPS=2']
  assert main(['finetune', *cb, *flags, '--gin.RunConfig.log_every=1']) == 0
  run = tmp_path / 'run'
  model = load_config([str(run / 'config.gin')]).model
  assert model.dropout_rate == 0.3
  for router in (model.encoder_router, model.decoder_router):
    assert {name: getattr(router, name) for name in fields} == fields
    assert router.expert_dropout_rate == 0.2
  first = json.loads((run / 'metrics.jsonl').read_text().splitlines()[0])
  assert (first['balance_loss'], first['router_z_loss']) == (0, 0)
  assert first['router/encoder/1/balance_loss'] > 0  # measured all the same
  # Without them what is left is the cross entropy, and the output's z-loss.
  left = first['cross_entropy'] + first['output_z_loss']
  assert first['loss'] == pytest.approx(left, rel=1e-6)
  assert first['router/fraction_dropped'] > 0.2
