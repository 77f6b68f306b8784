"""Dense models made sparse: every array, the function kept, every error."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from made_models import DENSE, opt_state, read_item, write_run
from tiny_model import apply, init_params, tiny_batch

from st_moe import losses, trees
from st_moe.config import OptimizerConfig, RouterConfig
from st_moe.gin_files import load_config
from st_moe.main import main
from st_moe.stacking import unstack_layers

SMALL_FACTORS = OptimizerConfig(min_dim_size_to_factor=8)
FOUR = ('--gin.ModelConfig.num_experts=4', '--no_check')


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
  path = tmp_path_factory.mktemp('dense') / 'run'
  path.mkdir()
  write_run(path, optimizer=SMALL_FACTORS, with_optimizer=True)
  return path


@pytest.fixture
def upcycle(dense, tmp_path):
  """Upcycles a run; returns the model directory."""

  def run(*flags, source=dense):
    output = tmp_path / 'out'
    assert main(['convert', 'upcycle', str(source), str(output), *flags]) == 0
    return output

  return run


@pytest.fixture
def error(dense, tmp_path, capsys):
  """Upcycles what cannot be; returns the one line; nothing is written."""

  def run(*flags, source=dense, output=None):
    output = output or tmp_path / 'out'
    before = output.exists()
    capsys.readouterr()
    assert main(['convert', 'upcycle', str(source), str(output), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1
    assert output.exists() == before
    return err

  return run


def test_every_array_of_an_upcycled_model(upcycle, dense):
  old = read_item(dense)
  output = upcycle(
    *FOUR,
    '--gin.encoder/RouterConfig.extra_ffn=after',
    '--gin.decoder/RouterConfig.expert_bias=multiplicative',
    '--gin.ModelConfig.decoder_sparse_placement=sd',
  )
  new = read_item(output)
  expected = {
    name: value
    for name, value in old.items()
    if not name.startswith(('encoder/layers_1/mlp/', 'decoder/layers_0/mlp/'))
  }
  for layer in ('encoder/layers_1', 'decoder/layers_0'):
    for kernel in ('wi_0', 'wi_1', 'wo'):
      one = old[f'{layer}/mlp/{kernel}/kernel']
      expected[f'{layer}/moe/expert/{kernel}/kernel'] = np.stack([one] * 4)
    router = new.pop(f'{layer}/moe/router/kernel')
    assert router.shape == (16, 4)
    # 64 draws of deviation 0.02: the standard error is 9% of it.
    assert 0.014 < router.std() < 0.026 and abs(router.mean()) < 0.01
  expected['decoder/layers_0/moe/expert/bias'] = np.ones((4, 32), np.float32)
  extra = 'encoder/layers_1/extra_mlp'
  expected[f'{extra}/wo/kernel'] = np.zeros((32, 16), np.float32)
  expected['encoder/layers_1/pre_extra_mlp_layer_norm/scale'] = np.ones(
    16, np.float32
  )
  for kernel in ('wi_0', 'wi_1'):
    drawn = new.pop(f'{extra}/{kernel}/kernel')
    assert drawn.shape == (16, 32)
    # 512 draws with variance 1 / 16, cut at two deviations (0.88).
    assert drawn.std() == pytest.approx(0.88 / 4, rel=0.15)
  assert new.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(new[name], value, err_msg=name)
  assert load_config([str(output / 'model.gin')]).model.num_experts == 4


def test_routers_are_set_as_the_dense_run_says(upcycle, tmp_path):
  """All but gates and extra FFN, by which the function is kept."""
  routers = {
    f'{stack}_router': RouterConfig(
      group_size=size, gate_normalization='none', extra_ffn='after'
    )
    for stack, size in (('encoder', 64), ('decoder', 32))
  }
  write_run(tmp_path / 'dense', dataclasses.replace(DENSE, **routers))
  output = upcycle(*FOUR, source=tmp_path / 'dense')
  made = load_config([str(output / 'model.gin')]).model
  for stack, router in routers.items():
    assert getattr(made, stack) == dataclasses.replace(
      router, gate_normalization='after_drop', extra_ffn='none'
    )


def test_scanned_and_written_out_models_become_the_same(upcycle, tmp_path):
  write_run(tmp_path / 'scanned', dataclasses.replace(DENSE, scan_layers=True))
  flags = (*FOUR, '--noise=0.1', '--seed=3')
  output = upcycle(*flags, source=tmp_path / 'scanned')
  config = load_config([str(output / 'model.gin')]).model
  assert config.scan_layers
  scanned = unstack_layers(trees.nested(read_item(output)), config)
  output.rename(tmp_path / 'kept')
  again = upcycle(
    *flags,
    '--gin.ModelConfig.scan_layers=False',
    source=tmp_path / 'scanned',
  )
  jax.tree.map(
    np.testing.assert_array_equal, scanned, trees.nested(read_item(again))
  )
  experts = scanned['encoder']['layers_1']['moe']['expert']['wo']['kernel']
  old = read_item(tmp_path / 'scanned')
  dense = old['encoder/superblocks/layer_0/mlp/wo/kernel'][1]
  rms = np.sqrt(np.mean(dense**2))
  off = np.sqrt(np.mean((experts - dense) ** 2, axis=(1, 2))) / rms
  np.testing.assert_allclose(off, 0.1, rtol=0.15)  # of 512 draws each


@pytest.mark.parametrize(
  'choices, scan, extra',
  [
    (1, False, 'after'),
    (1, True, 'none'),
    (2, False, 'none'),
    (2, True, 'after'),
  ],
)
def test_the_loss_at_step_0_is_the_dense_models(
  upcycle, dense, choices, scan, extra
):
  output = upcycle(
    *FOUR,
    f'--gin.RouterConfig.num_choices={choices}',
    f'--gin.ModelConfig.scan_layers={scan}',
    f'--gin.RouterConfig.extra_ffn={extra}',
    '--gin.RouterConfig.eval_dropless=True',
  )
  batch = tiny_batch()

  def loss(config, params):
    logits = apply(config, params, batch).logits
    total = losses.cross_entropy(
      logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
    )
    return float(total.loss / total.weight)

  config = load_config([str(output / 'model.gin')]).model
  sparse = loss(config, trees.nested(read_item(output)))
  assert sparse == pytest.approx(loss(DENSE, init_params(DENSE)), abs=1e-4)


def test_the_fixed_batch_and_what_is_printed(upcycle, capsys):
  output = upcycle('--gin.ModelConfig.num_experts=4')
  out = capsys.readouterr().out
  assert 'encoder: layers [1] of' in out
  assert 'the dense function is kept wherever a token is not dropped' in out
  assert '52 tensors used, 0 passed over, 54 parameters filled' in out
  assert 'written, step 7, optimizer fresh; train it further' in out
  record = json.loads((output / 'model.json').read_text())
  seen = record['fixed_batch']
  assert seen['loss'] == pytest.approx(seen['source_loss'], abs=1e-4)
  assert 0 < seen['largest_logit_difference'] < 1e-4
  assert (record['kind'], record['source_step']) == ('upcycle', 7)


@pytest.mark.parametrize(
  'flag, reason',
  [
    ('--noise=0.1', '--noise=0.1 moves the copies'),
    (
      '--gin.RouterConfig.gate_normalization=none',
      "gates do not add up to 1 (gate_normalization = 'none')",
    ),
    (
      '--gin.encoder/RouterConfig.kind=expert_choice',
      'encoder: experts that choose take a token several times or never',
    ),
  ],
)
def test_what_does_not_keep_the_function_is_named(
  upcycle, capsys, flag, reason
):
  output = upcycle('--gin.ModelConfig.num_experts=4', flag)
  assert reason in capsys.readouterr().out
  seen = json.loads((output / 'model.json').read_text())['fixed_batch']
  assert seen['largest_logit_difference'] > 1e-2


# MARK: the optimizer's state


@pytest.mark.parametrize('apart', [False, True])
@pytest.mark.parametrize('experts', [4, 24])
def test_carried_slots_of_adafactor(upcycle, dense, apart, experts):
  old = read_item(dense, 'opt_state')
  output = upcycle(
    f'--gin.ModelConfig.num_experts={experts}',
    f'--gin.OptimizerConfig.experts_as_batch_axis={apart}',
    '--optimizer=carried',
    '--no_check',
  )
  new = read_item(output, 'opt_state')
  expected = {k: v for k, v in old.items() if '/layers_1/mlp/' not in k}
  for stack in ('encoder', 'decoder'):
    before, after = (
      f'1/slots/{stack}/layers_1/{part}' for part in ('mlp', 'moe/expert')
    )
    router = f'1/slots/{stack}/layers_1/moe/router/kernel'
    if experts == 4:  # below the least size to factor
      expected[f'{router}/full'] = np.zeros((16, 4))
    else:  # [16, 24]: the largest is the second
      expected[f'{router}/row'] = np.zeros(16)
      expected[f'{router}/column'] = np.zeros(24)
    for kernel in ('wi_0', 'wi_1', 'wo'):
      row, column = (
        old[f'{before}/{kernel}/kernel/{kind}'] for kind in ('row', 'column')
      )
      # wi [16, 32], wo [32, 16]: the row has 16 numbers, the column 32.
      assert (row.shape, column.shape) == ((16,), (32,))
      if apart or experts == 4:
        row, column = (np.stack([x] * experts) for x in (row, column))
      else:  # of [24, 16, 32] the largest are 32 and 24 experts
        squares = np.outer(row, column) / row.mean()
        row = np.stack([squares.mean(axis=1)] * experts)
        column = squares if kernel != 'wo' else squares.T
      expected[f'{after}/{kernel}/kernel/row'] = row
      expected[f'{after}/{kernel}/kernel/column'] = column
  assert new.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(new[name], value, rtol=1e-6, err_msg=name)
    assert new[name].shape == value.shape
  assert new['1/count'].dtype == np.int32 and new['1/count'] == 7


def test_carried_moments_of_adamw_and_a_scanned_model(upcycle, tmp_path):
  optimizer = OptimizerConfig(name='adamw')
  write_run(tmp_path / 'run', optimizer=optimizer, with_optimizer=True)
  output = upcycle(
    *FOUR,
    '--optimizer=carried',
    '--gin.ModelConfig.scan_layers=True',
    source=tmp_path / 'run',
  )
  old = read_item(tmp_path / 'run', 'opt_state')
  new = read_item(output, 'opt_state')
  config = load_config([str(output / 'model.gin')]).model
  wanted = trees.by_name(opt_state(config, optimizer))
  assert {k: v.shape for k, v in new.items()} == {
    k: v.shape for k, v in wanted.items()
  }
  for moment in ('mu', 'nu'):
    layer = f'1/0/{moment}/decoder/superblocks/layer_1'
    before = f'1/0/{moment}/decoder/layers_1'
    np.testing.assert_array_equal(
      new[f'{layer}/moe/expert/wo/kernel'],
      np.stack([old[f'{before}/mlp/wo/kernel']] * 4)[None],
    )
    np.testing.assert_array_equal(
      new[f'{layer}/self_attention/query/kernel'],
      old[f'{before}/self_attention/query/kernel'][None],
    )
    assert not new[f'{layer}/moe/router/kernel'].any()


# MARK: errors


def test_errors_one_line_each_and_nothing_written(error, tmp_path):
  assert 'the target is dense; add --gin.ModelConfig.num_experts=8' in error()
  assert 'ModelConfig.expert_d_ff 64 differs from the 32 of the dense' in error(
    *FOUR, '--gin.ModelConfig.expert_d_ff=64'
  )
  assert 'ModelConfig.d_model is 16 in the source and 24 in what' in error(
    *FOUR, '--gin.ModelConfig.d_model=24'
  )
  assert 'holds no model' in error(source=tmp_path / 'nowhere')
  assert 'there is no checkpoint of step 3' in error(*FOUR, '--step=3')
  assert '--noise=-1.0 must be >= 0' in error(*FOUR, '--noise=-1')
  (tmp_path / 'there').mkdir()
  (tmp_path / 'there' / 'file').touch()
  assert 'exists already; remove it' in error(output=tmp_path / 'there')
  below = tmp_path / 'there' / 'file' / 'below'
  assert 'is a file; choose another place' in error(output=below)
  assert 'nothing reads macro NOTHING' in error(*FOUR, '--gin.NOTHING=1')


def test_a_sparse_source_is_refused(upcycle, error, tmp_path):
  output = upcycle(*FOUR).rename(tmp_path / 'sparse')
  assert 'is sparse already, with 4 experts; `st_moe convert experts`' in error(
    *FOUR, source=output
  )
  # What was converted has no optimizer to carry, nor has a dense copy of it.
  (output / 'model.gin').unlink()
  assert 'holds no model' in error(*FOUR, source=output)


def test_an_optimizer_that_is_not_there_or_another(error, tmp_path):
  write_run(tmp_path / 'bare')
  carried = (*FOUR, '--optimizer=carried')
  assert 'holds no state of an optimizer; convert with --optimizer=' in error(
    *carried, source=tmp_path / 'bare'
  )
  assert 'the optimizer of the target has 1/' in error(
    *carried, '--gin.OptimizerConfig.name=adamw'
  )


def test_a_checkpoint_that_is_not_of_its_configuration(error, tmp_path):
  write_run(tmp_path / 'run')
  gin = tmp_path / 'run' / 'config.gin'
  gin.write_text(gin.read_text().replace('d_ff = 32', 'd_ff = 40'))
  line = error(*FOUR, source=tmp_path / 'run')
  assert 'does not fit' in line and 'float32[16, 32] but must be' in line
