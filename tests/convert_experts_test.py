"""Experts copied, left out and merged: every array, and what is kept."""

import dataclasses
import json

import numpy as np
import pytest
from made_models import read_item, write_run
from tiny_model import tiny_config

from st_moe.config import RouterConfig
from st_moe.gin_files import load_config
from st_moe.main import main

ROUTER = RouterConfig(
  gate_normalization='after_drop',
  eval_choice_policy='all',
  extra_ffn='none',
  group_size=64,
)
SPARSE = tiny_config(ROUTER, vocab_size=384)
TOP_1 = dataclasses.replace(ROUTER, num_choices=1)
LAYERS = ('encoder/layers_1', 'decoder/layers_1')
KERNELS = ('wi_0', 'wi_1', 'wo')


@pytest.fixture(scope='module')
def sparse(tmp_path_factory):
  path = tmp_path_factory.mktemp('sparse') / 'run'
  write_run(path, SPARSE)
  loads = {
    'router/encoder/1/expert_load': [0.1, 0.5, 0.1, 0.3],
    'router/decoder/1/expert_load': [0.25, 0.25, 0.4, 0.1],
  }
  rows = [{'step': 5} | dict.fromkeys(loads, [0.25] * 4), {'step': 6} | loads]
  (path / 'metrics.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in rows)
  )
  return path


@pytest.fixture
def convert(sparse, tmp_path):
  """Converts a run; returns the model directory."""

  def run(*flags, source=sparse):
    output = tmp_path / 'out'
    assert main(['convert', 'experts', str(source), str(output), *flags]) == 0
    return output

  return run


@pytest.fixture
def error(sparse, tmp_path, capsys):
  """Converts what cannot be; returns the one line; nothing is written."""

  def run(*flags, source=sparse):
    output = tmp_path / 'out'
    capsys.readouterr()
    assert main(['convert', 'experts', str(source), str(output), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1
    assert not output.exists()
    return err

  return run


def assert_experts(output, old, members):
  """Compares all arrays with means of the old experts of each layer."""
  new = read_item(output)
  assert new.keys() == old.keys()
  for name, value in old.items():
    layer = name[: len(LAYERS[0])]
    if layer in LAYERS and '/moe/router/' in name:
      value = np.stack([value.T[m].mean(0) for m in members[layer]], axis=1)
    elif layer in LAYERS and '/moe/' in name:
      value = np.stack([value[m].mean(0) for m in members[layer]])
    np.testing.assert_allclose(new[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  'spec, members, said',
  [
    ('0,2,3', [[0], [2], [3]], 'may change: experts are left out'),
    ('0+1,2+3', [[0, 1], [2, 3]], 'may change: experts are merged'),
    ('3,1,2,0', [[3], [1], [2], [0]], 'the function is kept wherever'),
    (
      '0,0,1,1,2,2,3,3',
      [[0], [0], [1], [1], [2], [2], [3], [3]],
      'may change: copies take the places of other choices (num_choices = 4',
    ),
  ],
)
def test_every_array(convert, sparse, capsys, spec, members, said):
  output = convert(f'--experts={spec}', '--no_check')
  assert said in capsys.readouterr().out
  assert_experts(output, read_item(sparse), dict.fromkeys(LAYERS, members))
  config = load_config([str(output / 'model.gin')]).model
  assert config == dataclasses.replace(SPARSE, num_experts=len(members))


def test_a_list_for_each_layer(convert, sparse, tmp_path):
  specs = tmp_path / 'experts.json'
  specs.write_text('{"encoder/1": "0,1+2", "decoder/1": "3,0"}')
  output = convert(f'--experts={specs}', '--no_check')
  members = {LAYERS[0]: [[0], [1, 2]], LAYERS[1]: [[3], [0]]}
  assert_experts(output, read_item(sparse), members)


def test_the_busiest_are_kept_and_weigh_more(convert, sparse, capsys, tmp_path):
  output = convert('--num_experts=2', '--by=load', '--no_check')
  out = capsys.readouterr().out
  # Means of both lines: 0.175 0.375 0.175 0.275, and 0.25 0.25 0.325 0.175.
  assert 'encoder/1: 4 experts -> 2: 1,3' in out
  assert 'decoder/1: 4 experts -> 2: 0,2' in out
  old = read_item(sparse)
  members = {LAYERS[0]: [[1], [3]], LAYERS[1]: [[0], [2]]}
  assert_experts(output, old, members)
  output.rename(tmp_path / 'kept')
  merged = read_item(convert('--experts=0+1,2+3', '--by=load', '--no_check'))
  name = 'encoder/layers_1/moe/expert/wo/kernel'
  kernels = old[name].astype(np.float64)
  np.testing.assert_allclose(
    merged[name][0], (0.175 * kernels[0] + 0.375 * kernels[1]) / 0.55, rtol=1e-5
  )


@pytest.mark.parametrize(
  'router, flags',
  [
    (TOP_1, ()),
    (ROUTER, ('--gin.RouterConfig.num_choices=4',)),
    (
      dataclasses.replace(ROUTER, gate_normalization='none'),
      ('--gin.RouterConfig.num_choices=4',),
    ),
  ],
)
def test_copies_that_keep_the_function(
  convert, tmp_path, capsys, router, flags
):
  model = tiny_config(router, vocab_size=384)
  write_run(tmp_path / 'run', dataclasses.replace(model, scan_layers=True))
  output = convert('--num_experts=8', *flags, source=tmp_path / 'run')
  assert 'the function is kept wherever' in capsys.readouterr().out
  seen = json.loads((output / 'model.json').read_text())['fixed_batch']
  assert seen['largest_logit_difference'] < 1e-4


def test_copies_that_change_the_function_differ(convert, capsys):
  output = convert('--num_experts=8')
  assert 'the function may change: copies take' in capsys.readouterr().out
  seen = json.loads((output / 'model.json').read_text())['fixed_batch']
  assert seen['largest_logit_difference'] > 1e-3


def test_noise_moves_second_copies_alone(convert, sparse):
  output = convert('--experts=0,1,2,3,0,0', '--noise=0.01', '--no_check')
  old, new = read_item(sparse), read_item(output)
  for layer in LAYERS:
    for kernel in KERNELS:
      name = f'{layer}/moe/expert/{kernel}/kernel'
      np.testing.assert_array_equal(new[name][:4], old[name])
      rms = np.sqrt(np.mean(old[name][0] ** 2))
      for i in (4, 5):
        off = np.sqrt(np.mean((new[name][i] - old[name][0]) ** 2))
        assert off / rms == pytest.approx(0.01, rel=0.15)
    router = f'{layer}/moe/router/kernel'
    np.testing.assert_array_equal(new[router][:, :4], old[router])
    assert np.all(new[router][:, 4] != old[router][:, 0])


def test_errors_one_line_each_and_nothing_written(error, tmp_path):
  assert 'give --experts=SPEC or --num_experts=N' in error()
  assert "--experts: '0;1' is no list of experts; write" in error(
    '--experts=0;1'
  )
  assert 'there is no expert 4; the source has 4, 0 to 3' in error(
    '--experts=0,4'
  )
  assert '1+1 names an expert twice' in error('--experts=0,1+1')
  assert '--num_experts=6 is no multiple of the 4 experts' in error(
    '--num_experts=6'
  )
  assert '--num_experts=2 of 4: which? add --by=load' in error(
    '--num_experts=2'
  )
  assert 'num_choices 2 exceeds num_experts 1' in error('--experts=0')
  assert 'num_experts 6 is not the 3 experts' in error(
    '--experts=0,1,2', '--gin.ModelConfig.num_experts=6'
  )
  assert "RouterConfig.extra_ffn is 'none' in the source and 'after'" in error(
    '--experts=0,1,2', '--gin.RouterConfig.extra_ffn=after'
  )
  assert 'ModelConfig.d_ff is 32 in the source and 64' in error(
    '--experts=0,1,2', '--gin.ModelConfig.d_ff=64'
  )


@pytest.mark.parametrize(
  'text, said',
  [
    ('{', 'cannot be read as JSON'),
    ('["0"]', 'must be an object of lists by layer'),
    ('{"encoder/0": "0"}', 'encoder/0 is no sparse layer of the source'),
    ('{"encoder/1": "0,1"}', 'says nothing of decoder/1'),
    (
      '{"encoder/1": "0,1", "decoder/1": "0,1,2"}',
      'layers would have different numbers of experts',
    ),
  ],
)
def test_files_of_lists_that_are_wrong(error, tmp_path, text, said):
  (tmp_path / 'experts.json').write_text(text)
  assert said in error(f'--experts={tmp_path}/experts.json')


def test_a_dense_source_and_a_run_without_loads(error, sparse, tmp_path):
  write_run(tmp_path / 'dense', tiny_config(num_experts=0, vocab_size=384))
  assert 'is dense; `st_moe convert upcycle` makes experts' in error(
    '--experts=0,1', source=tmp_path / 'dense'
  )
  write_run(tmp_path / 'sparse', SPARSE)
  metrics = tmp_path / 'sparse' / 'metrics.jsonl'
  busiest = ('--num_experts=2', '--by=load')
  assert 'metrics.jsonl does not exist' in error(
    *busiest, source=tmp_path / 'sparse'
  )
  metrics.write_text('{"step": 1, "loss": 2.0}\n')
  assert 'has no router/encoder/1/expert_load of 4 experts' in error(
    *busiest, source=tmp_path / 'sparse'
  )
