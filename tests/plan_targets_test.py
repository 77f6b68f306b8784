"""What targets of `st_moe plan` are called, and the devices they have."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from st_moe.errors import UserError
from st_moe.plan import devices
from st_moe.plan.targets import CHIPS, parse_target

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
  ('text', 'name', 'count', 'topology', 'hosts'),
  [
    ('v5p:8x8x8', 'v5p:8x8x8', 512, '8x8x8', 128),
    # Cloud's names count TensorCores on v4, v5p and tpu7x, chips elsewhere.
    ('v5p-1024', 'v5p:8x8x8', 512, '8x8x8', 128),
    ('v5p-8', 'v5p:2x2x1', 4, '2x2x1', 1),
    ('v5p-1536', 'v5p:8x8x12', 768, '8x8x12', 192),
    ('v5p-12288', 'v5p:16x16x24', 6144, '16x16x24', 1536),
    ('v4-32', 'v4:2x2x4', 16, '2x2x4', 4),
    ('v4-128', 'v4:4x4x4', 64, '4x4x4', 16),
    ('v4-384', 'v4:4x4x12', 192, '4x4x12', 48),
    ('v5litepod-256', 'v5e:16x16', 256, '16x16', 64),
    ('v5e-8', 'v5e:2x4', 8, '2x4', 2),
    ('v5litepod-1', 'v5e:1x1', 1, '1x1', 1),
    (' V6E-128 ', 'v6e:8x16', 128, '8x16', 32),
    # A chip of TPU7x is two devices.
    ('tpu7x-128', 'tpu7x:4x4x4', 128, '4x4x4', 16),
    ('ironwood:4x4x8', 'tpu7x:4x4x8', 256, '4x4x8', 32),
    ('h100x16', 'h100x16', 16, '2x1x8', 2),
    ('h200:8', 'h200x8', 8, '1x1x8', 1),
    ('a100-80x64', 'a100-80x64', 64, '8x1x8', 8),
    ('a100-40:4', 'a100-40x4', 4, '1x1x4', 1),
    ('cpu:8', 'cpu:8', 8, '8', 1),
  ],
)
def test_names(text, name, count, topology, hosts):
  target = parse_target(text)
  assert (target.name, target.devices) == (name, count)
  assert target.topology == topology
  assert (target.slices, target.hosts) == (1, hosts)


def test_slices_multiply():
  target = parse_target('v5litepod-256', slices=4)
  assert (target.name, target.devices) == ('v5e:16x16', 1024)
  assert (target.slices, target.hosts) == (4, 256)


NAMES = (
  'v4, v5e, v5p, v6e, tpu7x, a100-40, a100-80, h100, h200, b200, cpu, '
  'v5litepod, v5lite, trillium, ironwood, v7x'
)
SAY = (
  f'say v5p:8x8x8, v5p-1024, v5litepod-256, h100x16 or cpu:8; known are {NAMES}'
)
SMALL_3D = '2x2x1, 2x2x2, 2x2x4, 2x4x4'
CUBES = 'or AxBxC in multiples of 4 with A <= B <= C'


@pytest.mark.parametrize(
  ('text', 'error'),
  [
    ('', f"'' is no target; {SAY}"),
    ('v5q:8x8x8', f"'v5q:8x8x8' is no target; did you mean v5p?; {SAY}"),
    (
      'a100x8',
      f"'a100x8' is no target; did you mean a100-40 or a100-80?; {SAY}",
    ),
    ('h100', f"'h100' is no target, its size is missing or misspelt; {SAY}"),
    (
      'v5p:3x5x7',
      f"'v5p:3x5x7' is no slice of v5p: shapes are {SMALL_3D}, {CUBES}, up to "
      '8960 chips; near: v5p:4x4x4 or v5p:4x4x8',
    ),
    (
      'v4:16x8x8',
      f"'v4:16x8x8' is no slice of v4: shapes are {SMALL_3D}, {CUBES}, up to "
      '4096 chips; near: v4:8x8x16',
    ),
    (
      'v4:16x16x24',
      f"'v4:16x16x24' is no slice of v4: shapes are {SMALL_3D}, {CUBES}, up to "
      '4096 chips; near: v4:16x16x16',
    ),
    (
      'v5e:3x3',
      "'v5e:3x3' is no slice of v5e: shapes are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, "
      '8x16, 16x16, up to 256 chips; near: v5e:2x4 or v5e:4x4',
    ),
    (
      'v5p-1025',
      "'v5p-1025' is no size of v5p: names end in the number of TensorCores, "
      'two per chip; near: v5p-1024',
    ),
    (
      'v5litepod-512',
      "'v5litepod-512' is no size of v5e: names end in the number of chips; "
      'near: v5litepod-256',
    ),
    (
      'v5p-4x4x4',
      "'v5p-4x4x4': say v5p:2x4x4 for a shape, or v5p-N for a number of "
      'TensorCores, two per chip',
    ),
    (
      'h100x12',
      "'h100x12': a node has 8 GPUs, so more of them come in multiples of 8; "
      'near: h100x8 or h100x16',
    ),
    ('h100-16', "'h100-16': how many devices of h100? Say, for 16, h100x16"),
    ('cpu:0', "'cpu:0': how many devices of cpu? Say, for 16, cpu:16"),
  ],
)
def test_what_does_not_exist_is_refused(text, error):
  with pytest.raises(UserError) as caught:
    parse_target(text)
  assert str(caught.value) == error


def test_slices_are_of_tpus_and_positive():
  with pytest.raises(UserError, match='^only TPUs come in slices; .* h100x16'):
    parse_target('h100x8', slices=2)
  with pytest.raises(UserError, match='must be positive; got 0$'):
    parse_target('v5e:4x4', slices=0)


def test_every_accelerator_has_its_numbers():
  for chip in CHIPS.values():
    numbers = (
      chip.peak,
      chip.hbm_bytes,
      chip.hbm_rate,
      chip.interconnect_rate,
      chip.network_rate,
    )
    missing = [i for i, number in enumerate(numbers) if number is None]
    expected = {'cpu': [0, 1, 2, 3, 4], 'v4': [4]}  # v4's is not published
    assert missing == expected.get(chip.name, []), chip.name


@pytest.fixture
def environment(monkeypatch):
  """A fresh os.environ, put back afterwards."""
  fresh = {'PATH': os.environ['PATH']}
  monkeypatch.setattr(os, 'environ', fresh)
  return fresh


def test_a_compiler_that_is_missing_is_named(monkeypatch, environment):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError) as caught:
    devices.prepare_environment(parse_target('v5e:4x4'))
  assert str(caught.value) == (
    'libtpu is not installed, which compiles for v5e:4x4; pip install '
    "-e '.[tpu]' -c constraints.txt (no TPU device is needed), or pass "
    '--no_compile for what shapes alone can say'
  )
  with pytest.raises(UserError, match=r"CUDA plugin.*'.\[cuda\]'"):
    devices.prepare_environment(parse_target('h100x8'))
  assert 'JAX_PLATFORMS' not in environment


def test_what_the_user_set_stays(monkeypatch, environment):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
  environment |= {'JAX_PLATFORMS': 'tpu', 'XLA_FLAGS': '--mine=1'}
  devices.prepare_environment(parse_target('h100x8'))
  assert environment['JAX_PLATFORMS'] == 'tpu'
  assert environment['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] == '1'
  assert environment['XLA_FLAGS'] == (
    '--mine=1 --xla_gpu_autotune_level=0 --xla_gpu_shard_autotuning=false'
    ' --xla_gpu_enable_triton_gemm=false'
  )


def test_a_compiler_that_refuses_is_one_line(monkeypatch):
  from jax.experimental import topologies

  def refuse(**kwargs):
    raise RuntimeError('ABORTED: the lockfile\nis in use')

  monkeypatch.setattr(topologies, 'get_topology_desc', refuse)
  with pytest.raises(UserError) as caught:
    devices.describe_devices(parse_target('v5e:4x4'))
  assert str(caught.value).startswith(
    'the compiler for v5e:4x4 refused: ABORTED: the lockfile is in use; put '
    'that right, or '
  )


def test_cpu_devices_are_those_of_the_process():
  assert len(devices.describe_devices(parse_target('cpu:6'))) == 6
  with pytest.raises(UserError, match='has 8 CPU .*JAX_NUM_CPU_DEVICES=32'):
    devices.describe_devices(parse_target('cpu:32'))


DESCRIBE = """
from st_moe.plan import devices, targets
import sys
assert 'jax' not in sys.modules
for text, slices in {targets}:
  target = targets.parse_target(text, slices)
  devices.prepare_environment(target)
  found = devices.describe_devices(target)
  assert target.chip.kind in found[0].device_kind, found[0].device_kind
  print(
    target.name, len(found), 1 + max(d.process_index for d in found),
    *sorted({{getattr(d, 'slice_index', 0) or 0 for d in found}}),
  )
"""


def described(targets):
  """Runs in a fresh process, which must say nothing else."""
  drop = ('XLA_FLAGS', 'TF_CPP_MIN_LOG_LEVEL', 'JAX_PLATFORMS')
  result = subprocess.run(
    [sys.executable, '-c', DESCRIBE.format(targets=targets)],
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k not in drop},
    capture_output=True,
    text=True,
  )
  assert (result.returncode, result.stderr) == (0, '')
  return result.stdout.splitlines()


def test_cpu_devices_of_a_fresh_process():
  assert described([('cpu:5', 1)]) == ['cpu:5 5 1 0']


def test_devices_of_every_tpu():
  pytest.importorskip('libtpu')
  assert described(
    [
      ('v4-8', 1),
      ('v5e:1x1', 1),
      ('v5litepod-16', 2),
      ('v5p-128', 1),
      ('v6e-8', 1),
      ('tpu7x-8', 1),
    ]
  ) == [
    'v4:2x2x1 4 1 0',
    'v5e:1x1 1 1 0',
    'v5e:4x4 32 8 0 1',
    'v5p:4x4x4 64 16 0',
    'v6e:2x4 8 2 0',
    'tpu7x:2x2x1 8 1 0',
  ]


def test_gpus_of_every_kind():
  pytest.importorskip('jax_plugins.xla_cuda13')
  assert described(
    [
      ('a100-40x4', 1),
      ('a100-80x16', 1),
      ('h100x16', 1),
      ('h200x8', 1),
      ('b200x8', 1),
    ]
  ) == [
    'a100-40x4 4 1 0',
    'a100-80x16 16 2 0',
    'h100x16 16 2 0',
    'h200x8 8 1 0',
    'b200x8 8 1 0',
  ]
