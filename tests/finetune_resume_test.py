"""Fine-tunes with tasks in processes of their own: stopped, killed, over."""

import json
import signal

import numpy as np
import pytest
from made_models import read_item, write_run
from small_job import Job
from tiny_model import tiny_config

from st_moe.checkpoint import find_steps

LABELS = ['entailment', 'contradiction', 'neutral', 'entailment', 'entailment']
STEPS = 60


@pytest.fixture(scope='module')
def flags(tmp_path_factory):
  """Returns the flags of a fine-tune on a small CB, with slots to go on."""
  folder = tmp_path_factory.mktemp('cb')
  rows = [
    {'premise': f'It is {i}.', 'hypothesis': f'{i}', 'label': label, 'idx': i}
    for i, label in enumerate(LABELS * 4)
  ]
  for name, some in (('train', rows), ('val', rows[:5])):
    path = folder / 'CB' / f'{name}.jsonl'
    path.parent.mkdir(exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in some))
  model = tiny_config(
    vocab_size=384, num_encoder_layers=1, num_decoder_layers=1, sparse_every=1
  )
  write_run(folder / 'weights', model, with_optimizer=True)
  return [
    f'--checkpoint={folder / "weights"}', '--gin_file=runs/finetune_sparse.gin',
    '--gin.TASK=superglue.cb', f'--gin.TASK_DIR={folder}',
    '--gin.OPTIMIZER=slots', f'--gin.STEPS={STEPS}', '--gin.BATCH_SIZE=8',
    '--gin.EVAL_EVERY=20', '--gin.RunConfig.checkpoint_every=7',
    '--gin.RunConfig.log_every=3', '--gin.RunConfig.eval_batches=1',
    '--gin.RunConfig.unigram_batches=1', '--gin.RunConfig.tensorboard=False',
    '--gin.DataConfig.inputs_length=64', '--gin.DataConfig.targets_length=16',
  ]  # fmt: skip


def finetune(workdir, *flags, processes=1):
  command = ['finetune', f'--workdir={workdir}', *flags]
  return Job(command, processes=processes, devices=1)


@pytest.fixture(scope='module')
def whole(flags, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  finetune(workdir, *flags).succeed()
  return workdir


def lines(workdir):
  """Returns the lines of metrics.jsonl that do not hold times."""
  path = workdir / 'metrics.jsonl'
  rows = path.read_text().splitlines() if path.exists() else []
  return [row for row in rows if '"tokens_per_second"' not in row]


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_fine_tune_reaches_the_same_bits(
  whole, flags, tmp_path, number
):
  run = tmp_path / 'run'
  job = finetune(run, *flags)
  job.wait_until(lambda: any('eval/score' in line for line in lines(run)))
  job.send(number, 0)
  (ended,) = job.end()
  assert ended.status == (0 if number == signal.SIGTERM else -signal.SIGKILL)
  assert find_steps(run, None)[1][-1] < STEPS
  assert not (run / 'summary.json').exists()
  (ended,) = finetune(run).succeed()  # the directory says what it is
  assert 'resumed at step ' in ended.out
  assert lines(run) == lines(whole)
  for item in ('params', 'opt_state'):
    ours, theirs = read_item(run, item), read_item(whole, item)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      np.testing.assert_array_equal(ours[name], value, err_msg=name)
  for name in ('best.json', 'best_answers/superglue.cb.jsonl'):
    assert (run / name).read_text() == (whole / name).read_text()


@pytest.mark.slow
def test_two_processes_stop_early_together(flags, tmp_path):
  run = tmp_path / 'run'
  ended = finetune(
    run,
    *flags,
    '--gin.EVAL_EVERY=5',
    '--gin.LEARNING_RATE=1e-30',  # no score changes
    '--gin.RunConfig.early_stopping=2',
    '--gin.RunConfig.early_stopping_from=20',
    processes=2,
  ).succeed()
  # Evaluations at steps 20 and 25 count.
  assert 'stopped early, at step 25: eval/score has not been' in ended[0].out
  assert ended[1].out == ''
  assert find_steps(run, None)[1][-1] == 25
  summary = json.loads((run / 'summary.json').read_text())
  assert summary['step'] == 25 and summary['best']['step'] == 5
