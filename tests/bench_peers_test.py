"""`st_moe bench peers`: other implementations, with and without torch."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_bench import LAYER, results, small_size

from st_moe.bench import peers
from st_moe.config import RouterConfig
from st_moe.main import main


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def without(monkeypatch, *packages):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *more: None if name in packages else find(name, *more),
  )


def test_without_peers_it_says_what_to_install(monkeypatch, capsys):
  without(monkeypatch, 'torch', 'st_moe_pytorch', 'transformers', 'flaxformer')
  assert main(['bench', 'peers', *LAYER]) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: no peer to compare with: st-moe-pytorch: ')
  assert (
    "not installed: torch, st_moe_pytorch; pip install -e '.[peers]' -c" in err
  )
  assert 'clone github.com/google/flaxformer' in err
  assert not Path('runs').exists()


# Answers like torch_peers.py, with the times it is told.
CHILD = """
import json, sys
settings = json.loads(sys.argv[1])
if settings['num_experts'] == 2:
  print(json.dumps({'error': 'ValueError: too few'}), flush=True)
  sys.exit()
print(json.dumps({'ready': {}}), flush=True)
for line in sys.stdin:
  request = json.loads(line)
  if settings['d_ff'] == 7:
    sys.exit(9)
  wall = {'forward': 10.0, 'forward+backward': 30.0}[request['mode']]
  print(json.dumps({'wall': wall, 'cpu': 2 * wall}), flush=True)
"""


@pytest.fixture
def fake_torch(monkeypatch):
  """A peer's process that needs no torch."""
  popen = subprocess.Popen

  def start(command, **more):
    if 'st_moe.bench.torch_peers' in command:
      command = [sys.executable, '-c', CHILD, command[-1]]
    return popen(command, **more)

  monkeypatch.setattr(peers.subprocess, 'Popen', start)
  fake = dataclasses.replace(peers.PEERS[0], packages=())
  monkeypatch.setattr(peers, 'PEERS', (fake, *peers.PEERS[2:]))


def test_a_peer_is_called_in_turns_with_ours(fake_torch, capsys):
  assert main(['bench', 'peers', *LAYER, '--output=out']) == 0
  printed = capsys.readouterr().out
  assert 'flaxformer masked: not installed' in printed
  found = results('out')
  assert Path('out/peers.png').stat().st_size > 5000
  for c, wall in zip(found['comparisons'], (10.0, 30.0), strict=True):
    peer, ours = c['layers']['st-moe-pytorch'], c['layers']['ours']
    assert peer['wall_s'] == [wall] * 2
    ratio = np.median([wall / s for s in ours['wall_s']])
    assert peer['over_ours']['median'] == pytest.approx(ratio)
    assert set(c['layers']) == {'ours', 'st-moe-pytorch', *peers.BARE.values()}


def test_a_peer_that_fails_is_left_out_with_its_reason(fake_torch, capsys):
  argv = ['bench', 'peers', *LAYER, '--experts=2', '--output=out']
  assert main(argv) == 0  # 4 experts work, 2 do not
  assert (
    'without st-moe-pytorch: ValueError: too few' in capsys.readouterr().out
  )
  compared = results('out')['comparisons']
  assert {c['size']['num_experts'] for c in compared} == {4}


def test_a_peer_that_dies_ends_with_one_line(fake_torch, capsys):
  assert main(['bench', 'peers', *LAYER, '--d_ff=7', '--output=out']) == 2
  err = capsys.readouterr().err
  assert 'the process of st-moe-pytorch ended with status 9' in err


@pytest.mark.parametrize(
  'changes, reason',
  [
    ({'router': RouterConfig(num_choices=1, group_size=32)}, 'no top-1'),
    ({'activations': ('relu',)}, 'GEGLU'),
    ({'dtype': 'bfloat16'}, 'bfloat16'),
  ],
)
def test_a_peer_without_such_a_layer_is_not_started(changes, reason):
  assert reason in peers.PEERS[0].why_not(small_size(**changes))
  assert peers.PEERS[0].why_not(small_size()) is None


# What flaxformer's layer is given and gives, in as few lines as do it.
FLAXFORMER = {
  'components/dense.py': """
from aqt.jax_legacy.jax import flax_layers, quant_config
from aqt.jax_legacy.jax import quantization as aqt
import dataclasses
HINT = aqt.QuantOps.WeightParams
@dataclasses.dataclass(frozen=True)
class MlpBlock:
  use_bias: bool
  intermediate_dim: int
  activations: tuple
  intermediate_dropout_rate: float
  final_dropout_rate: float
  dtype: object
""",
  'architectures/moe/routing.py': """
import dataclasses
@dataclasses.dataclass(frozen=True)
class RouterWeights:
  use_bias: bool
  dtype: object
@dataclasses.dataclass(frozen=True)
class TokensChooseMaskedRouter:
  router_weights: RouterWeights
  jitter_noise: float
  dtype: object
  ignore_padding_tokens: bool
  num_selected_experts: int
  batch_prioritized_routing: bool
class TokensChooseScatterRouter(TokensChooseMaskedRouter):
  pass
""",
  'architectures/moe/moe_layers.py': """
import flax.linen as nn
import jax.numpy as jnp
class MoeLayer(nn.Module):
  num_experts: int
  max_group_size: int
  train_capacity_factor: float
  eval_capacity_factor: float
  expert: object
  router: object
  num_expert_partitions: int
  num_model_partitions: int
  min_expert_capacity: int
  dropout_rate: float
  dtype: object
  strict_group_size: bool
  @nn.compact
  def __call__(self, x):
    assert x.shape[0] % self.num_experts == 0
    y = nn.Dense(x.shape[-1])(x)
    for name in ('auxiliary_loss', 'router_z_loss'):
      self.sow('intermediates', name, jnp.mean(y).reshape(1, 1))
    return y
""",
}


def test_flaxformer_runs_in_this_process_without_aqt(monkeypatch, capsys):
  for name, text in FLAXFORMER.items():
    path = Path('flaxformer', name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  monkeypatch.syspath_prepend('.')
  without(monkeypatch, 'torch')
  kept = dict(sys.modules)
  try:
    argv = ['bench', 'peers', *LAYER, '--experts=2', '--output=out']
    assert main(argv) == 0  # 2 groups of 32: for 2 experts, not for 4
  finally:
    for name in set(sys.modules) - set(kept):
      if name.split('.')[0] in ('aqt', 'flaxformer'):
        del sys.modules[name]
  reason = 'without flaxformer masked: it needs a multiple of 4 groups, not 2'
  assert reason in capsys.readouterr().out
  for comparison in results('out')['comparisons']:
    assert comparison['size']['num_experts'] == 2
    assert list(comparison['layers']) == [
      'bare matmuls, XLA',
      'flaxformer masked',
      'flaxformer scatter',
      'ours',
    ]


def test_torch_peers_have_our_widths():
  pytest.importorskip('torch', reason='needs the extra peers')
  for name in ('st_moe_pytorch', 'transformers'):
    pytest.importorskip(name, reason='needs the extra peers')
  for name, choices, activations in (
    ('st-moe-pytorch', 2, ('gelu', 'linear')),
    ('hf-switch', 1, ('relu',)),
    (peers.BARE['torch'], 2, ('gelu', 'linear')),
    (peers.BARE['torch'], 1, ('relu',)),
  ):
    router = RouterConfig(num_choices=choices, group_size=32)
    size = small_size(router=router, activations=activations)
    process, greeting = peers.start_child(name, size, seed=0)
    assert 'ready' in greeting
    form = peers.ChildForm(name, 'forward+backward', process)
    assert form.measure().wall > 0
    process.stdin.close()
    assert process.wait() == 0
