"""Checkpoints: exact, atomic, verified, on any mesh; bad disks, bad bytes."""

import json
import logging
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import optimizer, partitioning
from st_moe.checkpoint import Checkpointer, restore_params
from st_moe.config import MeshConfig, OptimizerConfig
from st_moe.errors import UserError
from st_moe.integrity import Damaged, verify, write_manifest
from st_moe.train_state import TrainState

# After a failed save TensorStore's callbacks find the event loop closed, at
# some later time; harmless.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)

ROOT = Path(__file__).resolve().parent.parent

SHAPES = {
  'encoder': {
    'mlp': {'kernel': (16, 32)},
    'moe': {'wi': (4, 16, 32)},
    'norm': {'scale': (16,)},
  }
}
AXES = {
  'encoder': {
    'mlp': {'kernel': ('embed', 'mlp')},
    'moe': {'wi': ('expert', 'expert_embed', 'mlp')},
    'norm': {'scale': ('embed',)},
  }
}
ONE_AXIS = MeshConfig(data=8)
THREE_AXES = MeshConfig(data=2, expert=2, model=2, fsdp_dense=True)


def make_state(step, mesh_config=ONE_AXIS, seed=0, name='adafactor'):
  """Returns a random state, placed on a mesh."""
  rng = np.random.default_rng([seed, step])
  params = jax.tree.map(
    lambda shape: np.float32(rng.standard_normal(shape)),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  config = OptimizerConfig(name=name, min_dim_size_to_factor=8)
  opt_state = optimizer.make_optimizer(config, AXES, 10).init(params)
  opt_axes = optimizer.opt_state_axes(opt_state, params, AXES)
  opt_state = jax.tree.map(
    lambda x: np.asarray(rng.uniform(1, 9, x.shape), x.dtype), opt_state
  )
  state = TrainState(
    np.int32(step), params, opt_state, np.int32(1), np.int32(2)
  )
  axes = TrainState((), AXES, opt_axes, (), ())
  mesh = partitioning.make_mesh(mesh_config)
  shardings = partitioning.tree_shardings(state, axes, mesh, mesh_config)
  return jax.device_put(state, shardings)


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.fixture
def checkpointer(tmp_path):
  saver = Checkpointer(tmp_path / 'checkpoints', keep_last=2, keep_best=1)
  yield saver
  saver.close()


def save_all(saver, steps, losses=None):
  for step in steps:
    loss = (losses or {}).get(step)
    saver.save(
      step,
      make_state(step),
      data_state=b'row %d' % step,
      metadata={'note': step},
      scores=None if loss is None else {'eval/loss': loss, 'eval/x': 1.0},
    )
  saver.wait()


def kept(tmp_path):
  return sorted(
    path.name
    for path in (tmp_path / 'checkpoints').iterdir()
    if path.name != 'metadata'
  )


def largest_file(directory):
  files = [path for path in directory.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)


@pytest.mark.parametrize('name', ['adafactor', 'adamw'])
def test_everything_comes_back_as_it_was(checkpointer, name):
  state = make_state(3, name=name)
  assert checkpointer.latest_step() is None
  metadata = {'rows': [{'loss': 0.1, 'bad': float('nan')}]}
  checkpointer.save(3, state, b'\x00\xffdata', metadata)
  assert checkpointer.wait() == 3
  restored = checkpointer.restore(None, abstract(state))
  assert_same(restored.state, state)
  assert restored.step == 3
  assert restored.data_state == b'\x00\xffdata'
  assert restored.data_processes == 1
  assert str(restored.metadata) == str(metadata)


def test_a_new_process_sees_what_an_old_one_saved(checkpointer, tmp_path):
  save_all(checkpointer, [1, 2])
  again = Checkpointer(tmp_path / 'checkpoints', keep_last=2, keep_best=1)
  assert again.latest_step() == 2
  restored = again.restore(1, abstract(make_state(0)))
  assert_same(restored.state, make_state(1))
  assert restored.metadata == {'note': 1}
  again.close()


@pytest.mark.parametrize('axis_types', ['auto', 'explicit'])
def test_another_mesh_gives_equal_arrays_in_its_own_places(
  checkpointer, axis_types
):
  save_all(checkpointer, [1])
  config = MeshConfig(
    data=2, expert=2, model=2, fsdp_dense=True, axis_types=axis_types
  )
  wanted = abstract(make_state(0, config))
  restored = checkpointer.restore(1, wanted).state
  assert_same(restored, make_state(1))
  for leaf, want in zip(
    jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True
  ):
    assert leaf.sharding == want.sharding
  # And back again.
  checkpointer.save(2, restored, b'', {})
  back = checkpointer.restore(2, abstract(make_state(0))).state
  assert_same(back, make_state(1))


def test_the_saved_state_may_be_donated_at_once(checkpointer):
  add_one = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  state = make_state(1)
  wanted, shapes = jax.tree.map(np.array, state), abstract(state)
  checkpointer.save(1, state, b'', {})
  for _ in range(3):
    state = add_one(state)
  assert_same(checkpointer.restore(1, shapes).state, wanted)


# MARK: which are kept


def test_the_last_two_and_the_lowest_loss_are_kept(checkpointer, tmp_path):
  save_all(checkpointer, [1, 2, 3, 4, 5], {1: 3.0, 2: 1.0, 4: 2.0})
  assert kept(tmp_path) == ['2', '4', '5']


def test_the_best_is_still_known_after_a_restart(checkpointer, tmp_path):
  save_all(checkpointer, [1, 2], {1: 1.0, 2: 2.0})
  checkpointer.close()
  again = Checkpointer(tmp_path / 'checkpoints', keep_last=2, keep_best=1)
  save_all(again, [3, 4, 5], {3: 1.5, 4: float('nan')})
  again.close()
  assert kept(tmp_path) == ['1', '4', '5']


def test_without_evaluations_only_the_last_are_kept(checkpointer, tmp_path):
  save_all(checkpointer, [1, 2, 3, 4])
  assert kept(tmp_path) == ['3', '4']


def test_saving_a_step_twice_is_an_error_and_not_a_lost_save(checkpointer):
  save_all(checkpointer, [2])
  for step in (1, 2):
    with pytest.raises(RuntimeError, match=f'step {step} was not saved'):
      checkpointer.save(step, make_state(step), b'', {})


# MARK: damage


def test_a_flipped_bit_is_found_named_and_passed_over(
  checkpointer, tmp_path, caplog
):
  save_all(checkpointer, [1, 2])
  victim = largest_file(tmp_path / 'checkpoints' / '2' / 'params')
  flip_a_bit(victim)
  with caplog.at_level(logging.WARNING):
    restored = checkpointer.restore(None, abstract(make_state(0)))
  assert restored.step == 1
  assert restored.data_state == b'row 1'
  assert_same(restored.state, make_state(1))
  lines = [record.getMessage() for record in caplog.records]
  assert str(victim) in lines[0]
  assert all('\n' not in line for line in lines)
  # The damaged one is set aside: its step can be saved again.
  assert kept(tmp_path) == ['1', '2.damaged']
  save_all(checkpointer, [2])
  assert checkpointer.restore(None, abstract(make_state(0))).step == 2


@pytest.mark.parametrize('item', ['params', 'opt_state', 'data', 'metadata'])
def test_every_item_is_guarded(checkpointer, tmp_path, item):
  save_all(checkpointer, [1, 2])
  flip_a_bit(largest_file(tmp_path / 'checkpoints' / '2' / item))
  assert checkpointer.restore(2, abstract(make_state(0))).step == 1


@pytest.mark.parametrize('lost', ['an array', 'the manifest'])
def test_lost_files_are_named_and_passed_over(
  checkpointer, tmp_path, caplog, lost
):
  save_all(checkpointer, [1, 2])
  step = tmp_path / 'checkpoints' / '2'
  victim = step / 'integrity.json'
  if lost == 'an array':
    victim = largest_file(step / 'params')
  victim.unlink()
  assert checkpointer.restore(None, abstract(make_state(0))).step == 1
  assert f'{victim} is missing' in caplog.text


def test_an_unreadable_checkpoint_is_passed_over(checkpointer, tmp_path):
  save_all(checkpointer, [1, 2])
  step = tmp_path / 'checkpoints' / '2'
  for path in (step / 'params').rglob('*'):
    if path.is_file() and path.name != '_METADATA':
      path.write_bytes(b'')
  write_manifest(step)  # as if it had been written so
  assert checkpointer.restore(None, abstract(make_state(0))).step == 1


@pytest.mark.parametrize('content', ['', '{"eval/lo', '{"eval/lo3s": 1.0}'])
def test_damaged_metrics_stop_neither_starting_nor_saving(
  checkpointer, tmp_path, content
):
  save_all(checkpointer, [1, 2], {1: 1.0, 2: 2.0})
  path = tmp_path / 'checkpoints' / '2' / 'metrics' / 'metrics'
  path.write_text(content)
  again = Checkpointer(tmp_path / 'checkpoints', keep_last=2, keep_best=1)
  save_all(again, [3, 4], {3: 3.0})
  assert again.restore(None, abstract(make_state(0))).step == 4
  again.close()
  assert {'1', '3', '4'} <= set(kept(tmp_path))


def test_when_none_is_whole_the_error_names_all_and_moves_nothing(
  checkpointer, tmp_path
):
  save_all(checkpointer, [1, 2])
  for step in ('1', '2'):
    flip_a_bit(largest_file(tmp_path / 'checkpoints' / step / 'params'))
  with pytest.raises(UserError, match=r'/2/params/.*/1/params/') as error:
    checkpointer.restore(None, abstract(make_state(0)))
  assert '\n' not in str(error.value)
  assert kept(tmp_path) == ['1', '2']


def test_the_manifest_covers_every_file_of_a_fresh_checkpoint(
  checkpointer, tmp_path
):
  save_all(checkpointer, [1])
  directory = tmp_path / 'checkpoints' / '1'
  verify(directory)
  hashes = json.loads((directory / 'integrity.json').read_text())
  files = {
    str(path.relative_to(directory))
    for path in directory.rglob('*')
    if path.is_file()
  }
  assert files - hashes.keys() == {
    'integrity.json',
    '_CHECKPOINT_METADATA',
    'commit_success.txt',
  }
  (directory / 'integrity.json').write_text('{')
  with pytest.raises(Damaged, match=r'integrity\.json'):
    verify(directory)


# MARK: what does not fit


def test_another_architecture_gets_a_short_difference(checkpointer):
  save_all(checkpointer, [1])
  wanted = abstract(make_state(0))
  encoder = wanted.params['encoder']
  encoder['mlp']['kernel'] = jax.ShapeDtypeStruct((16, 48), jnp.float32)
  encoder['norm']['scale'] = jax.ShapeDtypeStruct((16,), jnp.bfloat16)
  encoder['extra_mlp'] = {'kernel': encoder['mlp']['kernel']}
  del encoder['moe']
  with pytest.raises(UserError) as error:
    checkpointer.restore(None, wanted)
  message = str(error.value)
  assert 'missing: params/encoder/extra_mlp/kernel' in message
  assert 'surplus: params/encoder/moe/wi' in message
  assert (
    'params/encoder/mlp/kernel is float32[16, 32] but must be float32[16, 48]'
    in message
  )
  assert (
    'params/encoder/norm/scale is float32[16] but must be bfloat16[16]'
    in message
  )
  assert '\n' not in message


def test_another_optimizer_is_named_and_long_lists_are_cut(checkpointer):
  save_all(checkpointer, [1])
  with pytest.raises(UserError, match=r'missing: opt_state/.* and \d+ more'):
    checkpointer.restore(None, abstract(make_state(0, name='adamw')))


def test_a_step_that_is_not_there_lists_those_that_are(checkpointer):
  save_all(checkpointer, [1, 2])
  with pytest.raises(UserError, match=r'step 7 .*has steps \[1, 2\]'):
    checkpointer.restore(7, abstract(make_state(0)))


# MARK: parameters alone


def test_parameters_alone_from_a_work_directory(checkpointer, tmp_path):
  save_all(checkpointer, [1, 2])
  wanted = abstract(make_state(0, THREE_AXES)).params
  first = restore_params(tmp_path, 1, wanted)
  assert_same(first.params, make_state(1).params)
  newest = restore_params(tmp_path / 'checkpoints', None, wanted)
  assert newest.step == 2
  assert_same(newest.params, make_state(2).params)


def test_parameters_alone_fall_back_without_touching_the_disk(
  checkpointer, tmp_path
):
  save_all(checkpointer, [1, 2])
  flip_a_bit(largest_file(tmp_path / 'checkpoints' / '2' / 'params'))
  wanted = abstract(make_state(0)).params
  restored = restore_params(tmp_path, None, wanted)
  assert restored.step == 1
  assert_same(restored.params, make_state(1).params)
  assert kept(tmp_path) == ['1', '2']
  with pytest.raises(UserError, match='/2/params/'):
    restore_params(tmp_path, 2, wanted)


def test_parameters_from_an_empty_place_are_refused(tmp_path):
  with pytest.raises(UserError, match='there is no checkpoint in'):
    restore_params(tmp_path, None, {})


# MARK: failing disks


def test_a_save_that_fails_midway_is_one_warning_and_training_goes_on(
  checkpointer, tmp_path, caplog
):
  save_all(checkpointer, [1])
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # bytes per file
  try:
    with caplog.at_level(logging.WARNING, logger='st_moe'):
      checkpointer.save(2, make_state(2), b'', {})
      assert checkpointer.wait() == 1
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  (line,) = [r.getMessage() for r in caplog.records if 'st_moe' in r.name]
  assert 'step 2 could not be saved (File too large)' in line
  # The next saves work, the rest of the failed one is gone, and the
  # retention counts only what is there.
  save_all(checkpointer, [3])
  assert kept(tmp_path) == ['1', '3']
  assert checkpointer.restore(1, abstract(make_state(0))).step == 1
  save_all(checkpointer, [4])
  assert kept(tmp_path) == ['3', '4']


def test_a_full_disk_is_seen_before_writing(
  checkpointer, tmp_path, caplog, monkeypatch
):
  save_all(checkpointer, [1])
  usage = namedtuple('usage', 'total used free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(9, 8, 1000))
  checkpointer.save(2, make_state(2), b'', {})
  assert checkpointer.wait() == 1
  assert '0 MB free' in caplog.text
  assert kept(tmp_path) == ['1']


CHILD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from st_moe.checkpoint import Checkpointer
from st_moe.train_state import TrainState

def state(step):
  def full(*shape):
    return jnp.full(shape, step, jnp.float32)
  count = jnp.int32(step)
  return TrainState(
    count,
    {f'w{i}': full(256, 256) for i in range(4)},
    {f'm{i}': full(256, 256) for i in range(4)},
    count,
    count,
  )

checkpointer = Checkpointer(sys.argv[1], keep_last=2, keep_best=0)
step = checkpointer.latest_step() or 0
print('READY', flush=True)
while True:
  step += 1
  checkpointer.save(step, state(step), b'%d' % step, {'step': step})
  assert checkpointer.wait() == step
  print('DONE', step, flush=True)
"""


def test_kill_9_leaves_a_whole_checkpoint_no_older_than_the_last_saved(
  tmp_path,
):
  def like(*shape, dtype=np.float32):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  count = like(dtype=np.int32)
  shapes = TrainState(
    count,
    {f'w{i}': like(256, 256) for i in range(4)},
    {f'm{i}': like(256, 256) for i in range(4)},
    count,
    count,
  )
  delays = random.Random(0)
  acknowledged = 0
  for _ in range(3):
    child = subprocess.Popen(
      [sys.executable, '-c', CHILD, str(tmp_path / 'checkpoints')],
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    assert child.stdout.readline() == 'READY\n'
    time.sleep(delays.uniform(0.1, 1.0))
    child.send_signal(signal.SIGKILL)
    done = [line for line in child.communicate()[0].splitlines() if line]
    if done:
      acknowledged = int(done[-1].removeprefix('DONE '))
    if not acknowledged:
      continue
    reader = Checkpointer(tmp_path / 'checkpoints', keep_last=2, keep_best=0)
    restored = reader.restore(None, shapes)
    reader.close()
    assert restored.step >= acknowledged
    for leaf in jax.tree.leaves(restored.state):
      np.testing.assert_array_equal(leaf, restored.step)
    assert restored.data_state == b'%d' % restored.step
    assert restored.metadata == {'step': restored.step}
    assert not list(tmp_path.rglob('*.damaged'))
  assert acknowledged > 0
