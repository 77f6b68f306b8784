"""An interrupted run ends where an unbroken one ends, bit for bit."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_model import tiny_config

from st_moe import evaluate, train
from st_moe import trainer as trainer_module
from st_moe.best import find_best
from st_moe.checkpoint import find_steps
from st_moe.config import (
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  RouterConfig,
  RunConfig,
)
from st_moe.errors import RunStopped
from st_moe.main import main
from st_moe.workdir import WorkDirectory

CONFIG = RunConfig(
  model=tiny_config(
    RouterConfig(group_size=64),  # second choices are drawn at random
    vocab_size=384,
    sparse_every=1,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.1,
  ),
  optimizer=OptimizerConfig(schedule='constant', learning_rate=0.01),
  mesh=MeshConfig(data=2, expert=2, model=2),
  batch_size=8,
  steps=12,
  log_every=4,
  eval_every=6,
  eval_batches=2,
  checkpoint_every=5,
  unigram_batches=2,
  num_samples=0,
)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  path = tmp_path_factory.mktemp('corpus') / 'text.txt'
  rng = random.Random(0)
  words = ['the', 'router', 'sends', 'each', 'token', 'to', 'experts']
  path.write_text(
    ''.join(' '.join(rng.choices(words, k=40)) + '\n' for _ in range(300))
  )
  return path


def config_for(corpus, **changes):
  data = DataConfig(
    task='text',
    files=str(corpus),
    vocabulary='byte',
    inputs_length=32,
    targets_length=16,
    holdout_every=10,
  )
  return dataclasses.replace(CONFIG, data=data, **changes)


def pretrain(config, workdir):
  train.pretrain(
    config,
    workdir,
    operative_config='',
    command=['st_moe', 'pretrain'],
    resume_command='st_moe pretrain --workdir=w',
  )


def final_parameters(workdir):
  """Returns the last step and its arrays, read by orbax alone."""
  steps = [p for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()]
  last = max(steps, key=lambda path: int(path.name))
  with ocp.StandardCheckpointer() as reader:
    return int(last.name), reader.restore(last.absolute() / 'params')


def lines_in(workdir):
  """Returns how many lines metrics.jsonl has by now."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def loss_lines(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [line for line in lines if '"loss"' in line or '"eval/loss"' in line]


def assert_same_run(a, b):
  step_a, params_a = final_parameters(a)
  step_b, params_b = final_parameters(b)
  assert step_a == step_b
  jax.tree.map(np.testing.assert_array_equal, params_a, params_b)
  assert loss_lines(a) == loss_lines(b)


def test_sigterm_saves_and_the_rest_of_the_run_is_bitwise_the_same(
  corpus, tmp_path, monkeypatch, capsys
):
  config = config_for(corpus)
  begun = []  # the trainer and its first state
  run_steps = train.run_steps

  def watched(trainer):
    begun.append((trainer, trainer.state))
    return run_steps(trainer)

  monkeypatch.setattr(train, 'run_steps', watched)
  pretrain(config, tmp_path / 'whole')
  monkeypatch.undo()
  ((trainer, first),) = begun
  # Compiled once for all steps; the old state's memory went to the new one.
  assert trainer.train_step.__self__.jitted._cache_size() == 1
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
  steps = [json.loads(line)['step'] for line in loss_lines(tmp_path / 'whole')]
  assert steps == [4, 6, 8, 12, 12]

  shard_batch = train.partitioning.shard_batch
  calls = iter(range(1, 1000))

  def stop_at_seven(batch, mesh):
    if 'text_weights' not in batch and next(calls) == 7:
      os.kill(os.getpid(), signal.SIGTERM)
    return shard_batch(batch, mesh)

  monkeypatch.setattr(train.partitioning, 'shard_batch', stop_at_seven)
  pretrain(config, tmp_path / 'broken')
  out = capsys.readouterr().out
  assert 'SIGTERM: saved step 7; resume with:\n  st_moe pretrain -' in out
  assert not (tmp_path / 'broken' / 'summary.json').exists()
  monkeypatch.undo()
  pretrain(config, tmp_path / 'broken')
  assert_same_run(tmp_path / 'whole', tmp_path / 'broken')
  summary = json.loads((tmp_path / 'broken' / 'summary.json').read_text())
  assert summary['step'] == 12
  assert {
    'eval/neg_log_perplexity',
    'eval/unigram_neg_log_perplexity',
    'tokens_per_second',
  } <= set(summary)
  # Starting a finished run again changes nothing, and opens no data.
  monkeypatch.setattr(trainer_module, 'open_data', None)
  capsys.readouterr()
  pretrain(config, tmp_path / 'broken')
  assert 'this run finished at step 12' in capsys.readouterr().out
  assert_same_run(tmp_path / 'whole', tmp_path / 'broken')


def test_the_run_stops_itself_when_steps_stay_non_finite(
  corpus, tmp_path, caplog
):
  config = config_for(
    corpus,
    optimizer=OptimizerConfig(schedule='constant', learning_rate=1e30),
    max_nonfinite_steps=3,
  )
  with pytest.raises(RunStopped, match='3 steps in a row up to step'):
    pretrain(config, tmp_path)
  assert 'step skipped, state unchanged (1 in a row' in caplog.text


def test_a_run_that_gets_no_better_stops_and_keeps_its_best(
  corpus, tmp_path, monkeypatch, capsys
):
  """Patience goes on where it was when the run was interrupted."""
  config = config_for(
    corpus, eval_every=2, early_stopping=2, keep_last=1, checkpoint_every=5,
    model=dataclasses.replace(CONFIG.model, num_experts=0),
    mesh=MeshConfig(data=8),
  )  # fmt: skip
  losses = {2: 3.0, 4: 2.0, 6: 2.0, 8: 2.5}  # of equals the first is best
  scored = evaluate.Evaluator.losses
  stop_at = [7]

  def scripted(evaluator, params):
    return scored(evaluator, params) | {'eval/loss': losses[step[0]]}

  step = [0]
  train_step = trainer_module.step_program

  def watched(*args):
    program = train_step(*args)

    def counted(state, batch, key):
      step[0] = int(state.step) + 1
      if step[0] in stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
      return program.jitted(state, batch, key)

    return dataclasses.replace(program, jitted=counted)

  monkeypatch.setattr(trainer_module, 'step_program', watched)
  monkeypatch.setattr(evaluate.Evaluator, 'losses', scripted)
  pretrain(config, tmp_path)
  assert 'SIGTERM: saved step 7' in capsys.readouterr().out
  best = {'metric': 'eval/loss', 'step': 4, 'value': 2.0}
  assert json.loads((tmp_path / 'best.json').read_text()) == best
  stop_at.clear()
  pretrain(config, tmp_path)
  out = capsys.readouterr().out
  why = 'eval/loss has not been better than 2.0000 at step 4 in 2 evaluations'
  assert f'stopped early, at step 8: {why}\n' in out
  assert f'evaluate --checkpoint={tmp_path} --step=best\n' in out
  assert json.loads((tmp_path / 'best.json').read_text()) == best
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['step'] == 8
  assert summary['best'] == best
  assert summary['stopped_early'] == {'early_stopping': 2, 'why': why}
  directory, steps = find_steps(tmp_path, None)
  assert steps == [4, 8]
  assert find_steps(tmp_path, 'best') == (directory, [4])
  # Without the file of the best the next best is found, and no other named.
  assert find_best(directory, [8]) == 8

  # It has ended; with another patience it would go on.
  pretrain(config, tmp_path)
  out = capsys.readouterr().out
  assert 'this run finished at step 8; to train on:' in out
  assert '--gin.RunConfig.early_stopping=None --allow_config_change' in out
  directory = WorkDirectory(tmp_path, True)
  assert directory.finished(12, patience=3) is None
  assert directory.finished(12, patience=2) == summary
  assert directory.finished(12, patience=2, patience_from=8) == summary
  assert directory.finished(12, patience=2, patience_from=9) is None


@pytest.mark.slow
def test_kill_9_at_random_moments_from_the_command_line(corpus, tmp_path):
  """Real processes, reading a cache: no TensorFlow, quick to start."""

  env = os.environ | {
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
    'PYTHONPATH': os.getcwd(),
    # The run that nobody kills compiles for all.
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'jax'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  settings = [
    '--gin_file=models/tiny.gin',
    '--gin_file=runs/pretrain.gin',
    '--gin.LEARNING_RATE=0.01',
    '--gin.STEPS=24',
    '--gin.BATCH_SIZE=4',
    '--gin.ModelConfig.d_model=32',
    '--gin.ModelConfig.num_encoder_layers=1',
    '--gin.ModelConfig.num_decoder_layers=1',
    '--gin.ModelConfig.sparse_every=1',
    '--gin.RunConfig.log_every=3',
    '--gin.RunConfig.eval_every=12',
    '--gin.RunConfig.eval_batches=1',
    '--gin.RunConfig.checkpoint_every=4',
    '--gin.RunConfig.num_samples=0',
    '--gin.DataConfig.vocabulary=byte',
    '--gin.DataConfig.inputs_length=32',
    '--gin.DataConfig.targets_length=16',
    '--gin.DataConfig.holdout_every=10',
  ]
  cache = tmp_path / 'cache'
  text = ['--gin.TASK=text', f'--gin.DataConfig.files={corpus}']
  assert main(['cache', *settings, *text, f'--output={cache}']) == 0
  settings += ['--gin.TASK=cache', f'--gin.DataConfig.cache_dir={cache}']

  def arguments(workdir):
    return ['pretrain', *settings, f'--workdir={workdir}']

  without_tensorflow = (
    'import sys\n'
    'from st_moe.main import main\n'
    'status = main(sys.argv[1:])\n'
    'assert not {"tensorflow", "seqio"} & set(sys.modules)\n'
    'sys.exit(status)\n'
  )
  whole = arguments(tmp_path / 'whole')
  subprocess.run(
    [sys.executable, '-c', without_tensorflow, *whole], check=True, env=env
  )
  broken = tmp_path / 'broken'
  command = [sys.executable, '-m', 'st_moe', *arguments(broken)]
  rng = random.Random(0)
  kills = 0
  while not (broken / 'summary.json').exists():
    written = lines_in(broken)
    child = subprocess.Popen(command, env=env)
    # The first three are killed some lines and moments after they began.
    enough = written + rng.randint(1, 4) if kills < 3 else 1000
    while child.poll() is None and lines_in(broken) < enough:
      time.sleep(0.01)
    if child.returncode is None and kills < 3:
      time.sleep(rng.uniform(0, 0.1))
      child.kill()
      kills += 1
      child.wait()
    else:
      assert child.wait() == 0
  assert kills
  assert_same_run(tmp_path / 'whole', tmp_path / 'broken')
