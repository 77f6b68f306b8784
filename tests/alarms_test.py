"""Live health of routers: alarms, and what is kept of a loss spike."""

import json
import logging
import math

import numpy as np
import pytest
from small_cache import write_small_cache
from small_job import SMALL_RUN
from tiny_model import tiny_config, zero_stats

from st_moe.alarms import Alarms
from st_moe.config import HealthConfig, RunConfig
from st_moe.errors import UserError
from st_moe.gin_files import load_config
from st_moe.main import main
from st_moe.metrics import read_metrics

EVEN = [[0.25] * 4] * 2
MODEL = tiny_config(num_encoder_layers=4, num_decoder_layers=4)  # layers 1, 3


def stats(load=EVEN, entropy=(1.3, 1.3), **fields):
  """Returns healthy statistics of two layers and four experts."""
  return zero_stats(
    expert_load=np.float32(load),
    entropy=np.float32(entropy),
    num_tokens=np.float32([64, 64]),
    **{name: np.float32(value) for name, value in fields.items()},
  )


def numpy_stats(**fields):
  import jax

  return jax.device_get(stats(**fields))


class Watch:
  """Feeds steps to Alarms and returns the lines of each."""

  def __init__(self, workdir, caplog, **config):
    settings = {'dead_expert_steps': 3, 'collapse_steps': 2} | config
    self.alarms = Alarms(HealthConfig(**settings), MODEL, workdir)
    self._caplog = caplog
    self.step = 0

  def add(self, loss=2.0, *, nonfinite=0, encoder=None, **fields):
    self._caplog.clear()
    self.step += 1
    scalars = {
      'loss': loss, 'gradient_norm': 1.0, 'nonfinite_steps': float(nonfinite),
    }  # fmt: skip
    router = {
      'encoder': numpy_stats() if encoder is None else encoder,
      'decoder': numpy_stats(**fields) if fields else None,
    }
    batch = {'tokens': np.full((2, 3), self.step, np.int32)}
    with self._caplog.at_level(logging.WARNING):
      self.alarms.add(self.step, scalars, router, batch)
    return [record.getMessage() for record in self._caplog.records]


@pytest.fixture
def watch(tmp_path, caplog):
  return lambda **config: Watch(tmp_path, caplog, **config)


# MARK: routers


def test_dead_experts_are_named_once_and_again_after_a_rest(watch):
  one = watch(collapse_steps=50)
  dead = {'load': [[0.25] * 4, [0.5, 0, 0.5, 0]]}
  assert [one.add(**dead) for _ in range(2)] == [[], []]
  assert one.add(**dead) == [
    'step 3: decoder layer 3: no token chose expert 1, 3 for 3 steps; if it '
    'does not come back, raise RouterConfig.balance_loss_weight'
  ]
  assert [one.add(**dead) for _ in range(5)] == [[]] * 5
  # A token or two now and then is no recovery.
  for _ in range(5):
    one.add(load=EVEN)
    assert [one.add(**dead) for _ in range(4)] == [[]] * 4
  for _ in range(100):
    one.add(load=EVEN)
  assert [len(one.add(**dead)) for _ in range(4)] == [0, 0, 1, 0]


def test_a_router_that_uses_few_experts_has_collapsed(watch):
  one = watch(dead_expert_steps=0)
  # Two choices a token use two experts at least; 2.2 are still a collapse.
  few = {'load': [[0.5, 0.5, 0, 0], [0.4, 0.4, 0.1, 0.1]]}
  assert one.add(**few) == []
  assert one.add(**few) == [
    'step 2: decoder layer 1: the router has collapsed: 2.0 of 4 experts are '
    'in use, for 2 steps; raise RouterConfig.balance_loss_weight or lower the '
    'learning rate'
  ]
  assert one.add(**few) == []


def test_certain_routers_and_large_logits(watch):
  one = watch()
  assert one.add(entropy=(1.3, 0.02)) == []
  assert one.add(entropy=(1.3, 0.02)) == [
    'step 2: decoder layer 3: the entropy of the router has collapsed: 0.0200 '
    'nats, for 2 steps (even: 1.39); raise RouterConfig.z_loss_weight'
  ]
  # Also logits far below zero, of which only the log sum tells.
  (line,) = one.add(z_loss=(200.0**2, 0.0), max_logit=(-150.0, 127.0))
  assert line.startswith(
    'step 3: decoder layer 1: router logits reach 200, beyond '
    'HealthConfig.max_logit 128'
  )
  (line,) = one.add(max_logit=(1.0, math.inf))
  assert 'decoder layer 3: router logits reach inf' in line


def test_alarms_can_be_turned_off(watch):
  one = watch(
    dead_expert_steps=0, min_experts_used=0.0, min_entropy=0.0, max_logit=0.0,
    spike_deviations=0.0,
  )  # fmt: skip
  bad = {'load': [[1, 0, 0, 0]] * 2, 'entropy': (0, 0), 'max_logit': (1e9, 1e9)}
  assert [one.add(loss, **bad) for loss in [2.0] * 200 + [1e9]] == [[]] * 201


def test_padding_alone_is_no_dead_expert(watch):
  one = watch()
  nothing = {'load': np.zeros((2, 4)), 'entropy': (0, 0)}
  empty = numpy_stats(**nothing).replace(num_tokens=np.zeros(2, np.float32))
  assert [one.add(encoder=empty) for _ in range(9)] == [[]] * 9


def test_a_restored_watch_says_what_an_unbroken_one_says(watch):
  dead = {'load': [[0.3, 0.4, 0.3, 0]] * 2}
  unbroken, broken = watch(), watch()
  for step in range(70):
    loss = 2.0 + 0.01 * (step % 3)
    assert unbroken.add(loss, **dead) == broken.add(loss, **dead)
    resumed = watch()
    resumed.alarms.restore(json.loads(json.dumps(broken.alarms.state())))
    resumed.step, broken = broken.step, resumed
  assert [len(w.add(9.0, **dead)) for w in (unbroken, broken)] == [1, 1]


def test_an_older_checkpoint_has_no_state(watch):
  one = watch()
  before = one.alarms.state()
  one.alarms.restore(None)
  assert one.alarms.state() == before


# MARK: spikes


def falling(steps):
  """Returns losses of an ordinary beginning: a fall, and noise."""
  rng = np.random.default_rng(0)
  return 3 + 5 * np.exp(-np.arange(steps) / 50) + rng.normal(0, 0.2, steps)


def test_a_spike_is_recorded_with_what_led_to_it(watch, tmp_path):
  one = watch(history_steps=4, spike_window=64)
  for loss in falling(300):
    assert one.add(float(loss), load=EVEN) == []
  before = falling(300)[-64:]
  distance = (9.0 - before.mean()) / before.std()
  path = tmp_path / 'alarms' / 'step_301.json'
  assert one.add(9.0, load=EVEN) == [
    f'step 301: loss 9.0000 is {distance:.1f} standard deviations above the '
    f'mean {before.mean():.4f} of the last 64 steps; router statistics and '
    f'tokens of 4 steps: {path}'
  ]
  assert one.add(99.0, load=EVEN) == []  # of the same event
  found = json.loads(path.read_text())
  assert [row['step'] for row in found['steps']] == [298, 299, 300, 301]
  assert found['steps'][-1]['loss'] == 9.0
  assert found['steps'][-1]['router/decoder/3/max_load'] == 1.0
  with np.load(path.with_suffix('.npz')) as arrays:
    np.testing.assert_array_equal(
      arrays['batch/tokens'][:, 0, 0], [298, 299, 300, 301]
    )
    assert arrays['batch/tokens'].shape == (4, 2, 3)
    assert arrays['router/encoder/expert_load'].shape == (4, 2, 4)
    assert arrays['router/decoder/mean_gate'].shape == (4, 2, 2)


def test_losses_that_hardly_move_and_beginnings_have_no_spikes(watch):
  one = watch(spike_window=64)
  for loss in [2.0] * 20 + [50.0]:  # too few to compare with
    assert one.add(loss) == []
  two = watch(spike_window=64)
  for loss in [0.001] * 64 + [0.13]:  # 0.14 nats are seven times the floor
    assert two.add(loss) == []
  assert len(two.add(0.25)) == 1


def test_steps_that_are_not_finite_are_recorded_once_in_a_row(watch, tmp_path):
  one = watch(history_steps=3)
  one.add()
  (line,) = one.add(math.nan, nonfinite=1)
  assert line.startswith(
    'step 2: loss nan or gradient norm 1 is not finite; router statistics and '
    'tokens of 2 steps: '
  )
  assert one.add(math.nan, nonfinite=2) == []
  found = json.loads((tmp_path / 'alarms' / 'step_2.json').read_text())
  assert [row['loss'] for row in found['steps']] == [2.0, None]


def test_what_a_run_before_has_recorded_stays(watch, tmp_path):
  one, again = watch(), watch()
  one.add(math.nan, nonfinite=1)
  path = tmp_path / 'alarms' / 'step_1.json'
  kept = path.read_bytes()
  (line,) = again.add(math.inf, nonfinite=1)
  assert line.endswith(f'recorded before: {path}')
  assert path.read_bytes() == kept


def test_records_do_not_fill_the_disk(watch, tmp_path):
  one = watch(history_steps=1)
  lines = [one.add(math.nan, nonfinite=1)[0] for _ in range(22)]
  assert len(list((tmp_path / 'alarms').glob('*.json'))) == 20
  assert lines[-1].endswith('has 20 records: no more are written')


def test_a_disk_that_cannot_be_written_stops_nothing(watch, tmp_path):
  (tmp_path / 'alarms').write_text('a file where the folder should be')
  (line,) = watch().add(math.nan, nonfinite=1)
  assert 'cannot be written' in line


def test_thresholds_are_settings(tmp_path):
  path = tmp_path / 'a.gin'
  path.write_text('HealthConfig.max_logit = 50\n')
  assert load_config([str(path)]).health == HealthConfig(max_logit=50.0)
  assert RunConfig().health.dead_expert_steps == 100
  with pytest.raises(UserError, match='min_entropy must be in'):
    HealthConfig(min_entropy=2.0)
  with pytest.raises(UserError, match='spike_window 1 must be >= 2'):
    HealthConfig(spike_window=1)


# MARK: real runs


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'cache'
  write_small_cache(path)
  return path


# No balance loss, one choice, and a rate far too high.
COLLAPSE = (
  '--gin.RouterConfig.balance_loss_weight=0.0',
  '--gin.RouterConfig.z_loss_weight=0.0',
  '--gin.RouterConfig.num_choices=1',
  '--gin.HealthConfig.dead_expert_steps=10',
  '--gin.HealthConfig.collapse_steps=5',
  '--gin.LEARNING_RATE=1.0',
  '--gin.STEPS=60',
  '--gin.RunConfig.eval_every=60',
  '--gin.RunConfig.checkpoint_every=60',
)


def pretrain(cache, workdir, *more):
  data = f'--gin.DataConfig.cache_dir={cache}'
  return ['pretrain', *SMALL_RUN, data, f'--workdir={workdir}', *more]


def test_a_router_that_collapses_in_training_is_found(cache, tmp_path, caplog):
  flags = (*COLLAPSE, '--gin.ModelConfig.scan_layers=True')
  assert main(pretrain(cache, tmp_path / 'run', *flags)) == 0
  lines = [
    record.getMessage()
    for record in caplog.records
    if record.levelno == logging.WARNING
  ]
  dead = [line for line in lines if 'no token chose expert' in line]
  collapsed = [line for line in lines if 'the router has collapsed' in line]
  assert dead and collapsed
  # Each is said once, and is what the metrics show.
  assert len(lines) == len(set(line.partition(': ')[2] for line in lines))
  rows = {row['step']: row for row in read_metrics(tmp_path / 'run')}
  for line in dead:
    words = line.replace(':', '').replace(',', '').split()
    step, stack, layer = int(words[1]), words[2], words[4]
    expert = int(line.partition('chose expert ')[2].split()[0].rstrip(','))
    loads = [
      rows[at][f'router/{stack}/{layer}/expert_load'][expert]
      for at in range(step - 9, step + 1)
    ]
    assert loads == [0.0] * 10
