"""Runs that start from given weights: what is carried, and what is refused."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from made_models import byte_data, read_item, write_run
from tiny_model import tiny_config

from st_moe import initialize, partitioning, train, trees
from st_moe.bindings import operative_config
from st_moe.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig
from st_moe.data.vocabularies import load_vocabulary
from st_moe.errors import UserError
from st_moe.main import main
from st_moe.model_directory import find_model
from st_moe.optimizer import learning_rate_schedule
from st_moe.stacking import stack_layers, unstack_layers
from st_moe.train_step import step_program

MODEL = tiny_config(vocab_size=384)
OPTIMIZER = OptimizerConfig(
  schedule='constant', learning_rate=0.01, min_dim_size_to_factor=8
)
MESH = MeshConfig(data=2, expert=2, model=2)


def run_config(path, **changes):
  config = RunConfig(
    model=MODEL,
    optimizer=OPTIMIZER,
    data=DataConfig(vocabulary='byte', inputs_length=12, targets_length=8),
    mesh=MESH,
    batch_size=8,
    steps=20,
    initial_checkpoint=str(path),
  )
  return dataclasses.replace(config, **changes)


def begin(config):
  mesh = partitioning.make_mesh(config.mesh)
  source = initialize.find_source(config)
  program = step_program(config, mesh)
  return initialize.initial_state(config, program, source, mesh)


@pytest.mark.parametrize('scanned', [False, True])
def test_state_is_carried_whole_and_restacked(tmp_path, scanned, caplog):
  caplog.set_level('INFO', 'st_moe')
  stored = dataclasses.replace(MODEL, scan_layers=scanned)
  params = write_run(tmp_path, stored, OPTIMIZER, with_optimizer=True)
  model = dataclasses.replace(MODEL, scan_layers=not scanned)
  begun = begin(run_config(tmp_path, model=model, initial_optimizer='carried'))
  assert 'step 7, layers restacked; optimizer carried' in caplog.text
  restack = unstack_layers if scanned else stack_layers

  def named(tree):
    return {k: np.asarray(v) for k, v in trees.by_name(tree).items()}

  def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(actual[name], value, err_msg=name)

  expected = named(restack(trees.nested(params), MODEL))
  assert_same(named(begun.state.params), expected)
  old = trees.nested(read_item(tmp_path, 'opt_state'))
  old['1']['slots'] = restack(old['1']['slots'], MODEL)
  assert_same(named(begun.state.opt_state), named(old))
  assert int(begun.state.step) == 7
  assert begun.record['step'] == 7
  assert begun.record['optimizer'] == 'carried'
  assert len(begun.record['manifest_sha256']) == 64
  kernel = begun.state.params['token_embedder']['embedding']
  assert kernel.sharding.mesh.shape['model'] == 2


def test_a_fresh_optimizer_begins_at_step_0(tmp_path):
  params = write_run(tmp_path, MODEL, OPTIMIZER, with_optimizer=True)
  state = begin(run_config(tmp_path / 'checkpoints', initial_step=7)).state
  for name, value in trees.by_name(state.params).items():
    np.testing.assert_array_equal(value, params[name])
  assert int(state.step) == 0
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize('name', ['adafactor', 'adamw'])
def test_slots_go_on_in_a_run_and_a_schedule_that_begin(tmp_path, name):
  optimizer = OptimizerConfig(
    name=name, schedule='linear', learning_rate=0.1, warmup_steps=10,
    min_dim_size_to_factor=8,
  )  # fmt: skip
  write_run(tmp_path, MODEL, optimizer, with_optimizer=True)
  config = run_config(tmp_path, optimizer=optimizer, mesh=MeshConfig())
  tokens = np.arange(8 * 12, dtype=np.int32).reshape(8, 12) % 200 + 3
  batch = {
    'encoder_input_tokens': tokens,
    'decoder_input_tokens': tokens[:, :8],
    'decoder_target_tokens': tokens[:, :8],
    'decoder_loss_weights': np.ones((8, 8), np.int32),
  }
  stored = trees.by_name(read_item(tmp_path, 'opt_state'))
  moved = {}
  for choice in ('slots', 'carried'):
    config = dataclasses.replace(config, initial_optimizer=choice)
    begun = begin(config)
    before = jax.tree.map(np.asarray, begun.state.params)
    assert int(begun.state.step) == (0 if choice == 'slots' else 7)
    for leaf, value in trees.by_name(begun.state.opt_state).items():
      own = leaf.endswith('2/count')  # of AdamW's schedule
      begins = own and choice == 'slots'
      np.testing.assert_array_equal(value, 0 if begins else stored[leaf], leaf)
    mesh = partitioning.make_mesh(config.mesh)
    program = step_program(config, mesh)
    with partitioning.use_mesh(mesh, config.mesh):
      after, result = program.step(
        begun.state, partitioning.shard_batch(batch, mesh)
      )
    moved[choice] = not jax.tree.all(
      jax.tree.map(np.array_equal, before, after.params)
    )
    rate = 0.0 if choice == 'slots' else 0.07
    np.testing.assert_allclose(result['learning_rate'], rate, rtol=1e-6)
    counts = {
      leaf: int(value)
      for leaf, value in trees.by_name(after.opt_state).items()
      if leaf.endswith('count')
    }
    assert counts.pop('1/count' if name == 'adafactor' else '1/0/count') == 8
    assert set(counts.values()) <= {1 if choice == 'slots' else 8}
  # The first rate of a warm-up is 0, that of its seventh step is not.
  assert moved == {'slots': False, 'carried': True}


def test_what_does_not_fit_is_refused(tmp_path):
  write_run(tmp_path / 'bare', MODEL, OPTIMIZER)
  carried = {'initial_optimizer': 'carried'}
  with pytest.raises(UserError, match='holds no state of an optimizer; set'):
    begin(run_config(tmp_path / 'bare', **carried))
  with pytest.raises(UserError, match='holds no state of an optimizer; set'):
    begin(run_config(tmp_path / 'bare', initial_optimizer='slots'))
  with pytest.raises(UserError, match='steps 7 is reached: the weights of'):
    begin(run_config(tmp_path / 'bare', steps=7, **carried))
  with pytest.raises(UserError, match=r'initial_checkpoint: there is no ch'):
    begin(run_config(tmp_path / 'nowhere'))
  with pytest.raises(UserError, match='there is no checkpoint of step 8'):
    begin(run_config(tmp_path / 'bare', initial_step=8))
  wide = dataclasses.replace(MODEL, d_ff=64)
  with pytest.raises(UserError, match=r'32\] but must be float32\[.*64'):
    begin(run_config(tmp_path / 'bare', model=wide))
  write_run(
    tmp_path / 'adam', MODEL, OptimizerConfig(name='adamw'), with_optimizer=True
  )
  with pytest.raises(UserError, match='of another form than this run'):
    begin(run_config(tmp_path / 'adam', **carried))
  with pytest.raises(UserError, match='need initial_checkpoint'):
    RunConfig(initial_optimizer='carried')


def test_other_settings_are_told(tmp_path, caplog):
  write_run(tmp_path, MODEL, OPTIMIZER)
  begin(
    run_config(
      tmp_path, model=dataclasses.replace(MODEL, layer_norm_epsilon=1e-3)
    )
  )
  assert 'model.layer_norm_epsilon: 1e-06 -> 0.001' in caplog.text


def test_the_vocabulary_of_the_weights(tmp_path):
  write_run(tmp_path / 'run', MODEL)
  source = find_model(tmp_path / 'run' / 'checkpoints')
  auto = DataConfig(vocabulary='auto')
  assert initialize.with_vocabulary(auto, source).vocabulary == 'byte'
  byte = load_vocabulary('byte', 100).fingerprint
  initialize.check_vocabulary(byte, auto, source)
  with pytest.raises(UserError, match='is not the one that the model in'):
    initialize.check_vocabulary('another', auto, source)
  (tmp_path / 'run' / 'vocabulary.model').touch()
  kept = initialize.with_vocabulary(auto, source).vocabulary
  assert kept == str(tmp_path / 'run' / 'vocabulary.model')
  given = initialize.with_own_vocabulary(DataConfig(vocabulary='byte'), source)
  assert given.vocabulary == kept  # what the run was given, and has a copy of
  other = DataConfig(vocabulary='other.model')
  assert initialize.with_own_vocabulary(other, source) == other
  (tmp_path / 'bare').mkdir()
  with pytest.raises(UserError, match='has no vocabulary, and DataConfig'):
    initialize.with_vocabulary(auto, find_model(tmp_path / 'bare'))


def test_a_schedule_goes_on_where_another_run_stopped():
  rsqrt = OptimizerConfig(warmup_steps=10)
  later = dataclasses.replace(rsqrt, schedule_offset=90)
  rate = learning_rate_schedule(later, 100)
  assert float(rate(10)) == pytest.approx(0.1)  # 1 / sqrt(100)
  linear = OptimizerConfig(
    schedule='linear', learning_rate=1.0, warmup_steps=0, schedule_offset=50
  )
  rates = [float(learning_rate_schedule(linear, 50)(s)) for s in (0, 25, 50)]
  np.testing.assert_allclose(rates, [0.5, 0.25, 0.0], atol=1e-7)


# MARK: a real run


def pretrain(config, workdir):
  train.pretrain(
    config,
    workdir,
    operative_config=operative_config(config),
    command=['st_moe', 'pretrain'],
    resume_command='st_moe pretrain --workdir=w',
  )


@pytest.fixture(scope='module')
def upcycled(tmp_path_factory):
  """Trains a dense model on text, makes it sparse, and trains that on."""
  folder = tmp_path_factory.mktemp('upcycled')
  rng = random.Random(0)
  words = ['the', 'router', 'sends', 'each', 'token', 'to', 'experts']
  text = ''.join(' '.join(rng.choices(words, k=40)) + '\n' for _ in range(300))
  (folder / 'text.txt').write_text(text)
  config = byte_data(
    RunConfig(
      model=dataclasses.replace(MODEL, num_experts=0),
      optimizer=OptimizerConfig(schedule='constant', learning_rate=0.02),
      mesh=MESH,
      steps=20,
      batch_size=8,
      eval_every=20,
      eval_batches=2,
      checkpoint_every=10,
      unigram_batches=1,
      num_samples=0,
      keep_last=9,
      tensorboard=False,
    ),
    task='text',
    files=str(folder / 'text.txt'),
    inputs_length=32,
    targets_length=16,
    holdout_every=10,
  )
  pretrain(config, folder / 'dense')
  assert main([
    'convert', 'upcycle', str(folder / 'dense'), str(folder / 'sparse'),
    '--gin.ModelConfig.num_experts=4', '--gin.RouterConfig.group_size=64',
    '--gin.RouterConfig.eval_dropless=True', '--optimizer=carried',
  ]) == 0  # fmt: skip
  sparse = dataclasses.replace(
    config,
    model=find_model(folder / 'sparse').model_config(),
    data=dataclasses.replace(config.data, vocabulary='auto'),
    steps=60,
    eval_every=10,
    initial_checkpoint=str(folder / 'sparse'),
    initial_optimizer='carried',
  )
  pretrain(sparse, folder / 'run')
  return folder, sparse


def scores(workdir):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {
    line['step']: line['eval/loss'] for line in lines if 'eval/loss' in line
  }


def test_an_upcycled_model_begins_there_and_trains_on(upcycled):
  folder, _ = upcycled
  dense, run = scores(folder / 'dense'), scores(folder / 'run')
  assert list(run) == [30, 40, 50, 60]
  seen = json.loads((folder / 'sparse' / 'model.json').read_text())
  batch = seen['fixed_batch']
  assert batch['loss'] == pytest.approx(batch['source_loss'], abs=1e-4)
  assert run[60] < dense[20] - 0.1
  record = json.loads((folder / 'run' / 'run.json').read_text())
  assert record['initial_weights']['path'] == str(
    folder / 'sparse' / 'checkpoints' / '20'
  )


def test_such_a_run_resumes_bit_for_bit_without_its_source(upcycled, tmp_path):
  folder, config = upcycled
  shutil.copytree(folder / 'run', tmp_path / 'run')
  for step in (50, 60):
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(step))
  (tmp_path / 'run' / 'summary.json').unlink()
  (folder / 'sparse').rename(folder / 'moved')
  pretrain(config, tmp_path / 'run')
  (folder / 'moved').rename(folder / 'sparse')
  for item in ('params', 'opt_state'):
    old, new = (read_item(p / 'run', item) for p in (folder, tmp_path))
    assert old.keys() == new.keys()
    for name, value in old.items():
      np.testing.assert_array_equal(new[name], value, err_msg=name)
  assert scores(folder / 'run') == scores(tmp_path / 'run')
  record = json.loads((tmp_path / 'run' / 'run.json').read_text())
  assert record['initial_weights']['step'] == 20


def test_a_model_directory_is_evaluated(upcycled, tmp_path, capsys):
  folder, _ = upcycled
  workdir = f'--workdir={folder / "sparse"}'
  assert main(['evaluate', workdir]) == 2
  assert 'is a model without a run and has no held-out text of its' in (
    capsys.readouterr().err
  )
  mesh = ('data=2', 'expert=2', 'model=2')
  flags = [
    workdir,
    '--gin_file=runs/evaluate.gin',
    '--gin.TASK=text',
    f'--gin.FILES={folder / "text.txt"}',
    '--gin.BATCH_SIZE=8',
    '--gin.EVAL_BATCHES=2',
    '--gin.DataConfig.inputs_length=32',
    '--gin.DataConfig.targets_length=16',
    *(f'--gin.MeshConfig.{axis}' for axis in mesh),
  ]
  assert main(['evaluate', *flags]) == 0
  record = json.loads((folder / 'sparse' / 'evaluations.jsonl').read_text())
  assert record['step'] == 20
  # Text that the dense model was trained on scores as held-out text of it.
  dense = scores(folder / 'dense')[20]
  assert record['eval/loss'] == pytest.approx(dense, abs=0.2)


def test_a_run_from_the_command_line_in_a_process_of_its_own(
  upcycled, tmp_path
):
  folder, _ = upcycled
  command = [
    sys.executable, '-m', 'st_moe', 'pretrain',
    f'--gin_file={folder / "sparse" / "model.gin"}',
    '--gin_file=runs/small.gin',
    f'--gin.INITIAL_CHECKPOINT={folder / "nothing"}',
    f'--gin.FILES={folder / "text.txt"}',
    f'--workdir={tmp_path / "run"}',
  ]  # fmt: skip
  root = Path(__file__).resolve().parent.parent
  done = subprocess.run(
    command,
    cwd=root,
    env=os.environ | {'PYTHONPATH': str(root)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: RunConfig.initial_checkpoint: there is')
  assert done.stderr.count('\n') == 1
  assert not (tmp_path / 'run').exists()
