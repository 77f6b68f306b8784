"""`st_moe bench`: what it measures is what it says, and it says so or stops."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_bench import LAYER, STEP, results, small_size

from st_moe import experts
from st_moe.bench import forms, shares, timing
from st_moe.bench.flops import step_flops
from st_moe.bench.peaks import peak_flops
from st_moe.config import (
  DataConfig,
  ModelConfig,
  RouterConfig,
  RunConfig,
)
from st_moe.main import main

ROOT = Path(__file__).resolve().parent.parent

CAPACITY_BACKENDS = [b for b in forms.BACKENDS if b not in forms.DROPLESS]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


# Rounds and ratios


class FakeForm:
  """A form that writes down when it is called, and takes given times."""

  def __init__(self, name, calls, walls=None):
    self.name, self.calls = name, calls
    self.walls = iter(walls or [1.0] * 100)

  def measure(self):
    self.calls.append(self.name)
    return timing.Sample(next(self.walls), 0.5)


def test_every_form_runs_once_per_round_and_the_order_moves_on():
  calls = []
  forms = [FakeForm(name, calls) for name in 'abc']
  samples = timing.run_rounds(forms, 3)
  assert ''.join(calls) == 'abc' + 'abc' + 'bca' + 'cab'  # the first: warm-up
  assert {name: len(found) for name, found in samples.items()} == {
    'a': 3,
    'b': 3,
    'c': 3,
  }


def test_ratios_are_taken_within_a_round():
  """The machine is slow in round 2: seconds double, the ratio does not."""
  calls = []
  fast = FakeForm('fast', calls, [9, 1, 2, 1, 1])
  slow = FakeForm('slow', calls, [9, 3, 6, 3, 30])
  samples = timing.run_rounds([fast, slow], 4)
  spread = timing.ratio(samples['slow'], samples['fast'])
  assert (spread.low, spread.median) == (3.0, 3.0)
  assert spread.high == pytest.approx(9.75)  # one round was disturbed
  assert timing.ratio(samples['slow'], samples['fast'], 'cpu').median == 1.0


@pytest.mark.parametrize(
  'other, before, warns',
  [(0.1, 9.0, False), (0.6, 0.0, True), (None, 0.4, False), (None, 3.0, True)],
)
def test_a_busy_machine_is_told(other, before, warns):
  """What others used while we measured counts, where it is known."""
  load = {
    'cores': 2,
    'load_before': before,
    'load_after': 2.0,
    'other_cores': other,
  }
  assert (timing.load_warning(load) is not None) == warns


# bench layer


def test_bench_layer_writes_what_it_prints(capsys):
  argv = ['bench', 'layer', *LAYER, '--group_size=16', '--output=out']
  assert main(argv) == 0
  printed = capsys.readouterr().out
  found = results('out')
  assert Path('out/layer.png').stat().st_size > 5000
  assert found['command'] == argv
  assert found['machine']['versions']['jax'] == jax.__version__
  assert {'load_before', 'load_after', 'cores'} <= set(found['load'])
  measured = found['measurements']
  assert [(m['size']['group_size'], m['mode']) for m in measured] == [
    (group, mode) for group in (32, 16) for mode in forms.MODES
  ]
  for m in measured:
    assert set(forms.BACKENDS) | {forms.DENSE, forms.BATCHED} <= set(m['forms'])
    for name, form in m['forms'].items():
      assert len(form['wall_s']) == 2 and min(form['wall_s']) > 0
      assert name in printed
    assert m['forms'][forms.BATCHED]['over_batched_floor']['median'] == 1.0
    # 64 tokens x 1.25 = 80 slots, 20 for each of 4 experts.
    assert m['slots'] == m['rows'][forms.BATCHED] == 80
    assert 0 < m['rows'][forms.DENSE] <= 80


def test_floors_cost_the_flops_of_the_layers_products():
  """4 experts x 20 rows; 3 products of 2 x 16 x 32 each; backward twice."""
  size = small_size()
  products = 80 * 3 * 2 * 16 * 32
  layer = forms.LayerForms(size, seed=0)
  for mode, expected in zip(forms.MODES, (products, 3 * products), strict=True):
    assert size.matmul_flops(80, mode) == expected
    for floor in (layer.dense_floor('d', 80), layer.batched_floor('b', 20)):
      flops = timing.CompiledForm(floor[mode]).flops
      assert expected <= flops < 1.2 * expected


def test_nothing_timed_is_zero_or_unused():
  """Every input moves the output, every gradient is there."""
  layer = forms.LayerForms(small_size(), seed=0)
  for program in (
    layer.moe(CAPACITY_BACKENDS[0])['forward+backward'],
    layer.batched_floor('b', 20)['forward+backward'],
    layer.dense_floor('d', 80)['forward+backward'],
  ):
    output = jax.jit(program.function)(*program.arguments)
    assert np.isfinite(float(output['loss'])) and float(output['loss']) != 0
    for gradient in jax.tree.leaves(output['gradient']):
      assert np.mean(np.asarray(gradient) != 0) > 0.5


def test_the_dense_floor_has_the_rows_that_reach_an_expert():
  """With 2 x 64 choices and 80 slots the router fills most of them."""
  size = small_size()
  backend = CAPACITY_BACKENDS[0]
  program = forms.LayerForms(size, seed=0).moe(backend)['forward']
  output = jax.jit(program.function)(*program.arguments)
  rows = forms.active_rows(size, backend, output)
  kept = np.asarray(output['stats'].expert_kept) * 20
  assert rows == round(kept.sum()) and 60 < rows <= 80


def test_a_roomy_layer_drops_nothing_and_has_as_many_slots():
  size = forms.roomy(small_size())
  assert (size.tokens, size.capacity, size.slots) == (20, 20, 80)
  program = forms.LayerForms(size, seed=0).moe(CAPACITY_BACKENDS[0])['forward']
  stats = jax.jit(program.function)(*program.arguments)['stats']
  assert float(stats.fraction_dropped) == 0.0


def spoil(monkeypatch, change):
  """Makes 'gather' return `change(y)` instead of y."""
  combine = experts.combine

  def spoilt(y, routing, backend):
    z = combine(y, routing, backend)
    return change(z) if backend == 'gather' else z

  monkeypatch.setattr(experts, 'combine', spoilt)


@pytest.mark.parametrize(
  'change, message',
  [
    (
      lambda y: 1.01 * y,
      'forward of the backends gather and einsum differs: y',
    ),
    (
      # The right value with a gradient that is off by one percent.
      lambda y: 1.01 * y - 0.01 * jax.lax.stop_gradient(y),
      'forward+backward of the backends gather and einsum differs: gradient/',
    ),
    (lambda y: y.at[0, 3].set(0.0), 'differs: y'),  # one token is lost
    (lambda y: y * jnp.nan, 'differs: y by nan'),
  ],
)
def test_backends_that_differ_are_not_timed(
  monkeypatch, capsys, change, message
):
  spoil(monkeypatch, change)
  argv = ['bench', 'layer', *LAYER, '--backends=einsum,gather', '--output=o']
  assert main(argv) == 3
  err = capsys.readouterr().err
  assert err.startswith('stopped: ') and message in err
  assert 'nothing was timed' in err
  assert not Path('o/results.json').exists()


def test_gin_gives_what_flags_do_not(capsys):
  argv = ['bench', 'layer', '--gin_file=models/tiny.gin', '--tokens=8']
  argv += ['--rounds=1', '--backends=gather', '--gin.ModelConfig.d_ff=32']
  assert main([*argv, '--n=1', '--activation=relu', '--output=o']) == 0
  size = results('o')['measurements'][0]['size']
  assert (size['num_experts'], size['d_model'], size['d_ff']) == (8, 128, 32)
  assert (size['group_size'], size['activations']) == (8, ['relu'])
  assert size['router']['num_choices'] == 1


@pytest.mark.parametrize(
  'argv, message',
  [
    (['layer', '--backends=gathr'], "no backend 'gathr' (only einsum, gather"),
    (['layer', '--backends=gathr'], '; did you mean gather?'),
    (['layer', '--tokens=100', '--group_size=64'], '100 tokens are not divis'),
    (['layer', '--experts=2', '--n=3'], 'top-3 needs at least 3 experts'),
    (['layer', '--rounds=0'], '--rounds must be positive, got 0'),
    (['layer', '--d_model=-4'], '--d_model must be positive, got -4'),
    (['layer', '--experts=8,0'], 'argument --experts: invalid list of posit'),
    (['layer', '--capacity_factor=0'], 'train_capacity_factor'),
    (['layer', '--output=file'], '--output file cannot be made a folder'),
    (['step', '--output=x'], 'bench step needs --gin_file=FILE'),
    (['step', '--gin_file=runs/quickstart.gin', '--rounds=0'], 'positive'),
    (
      ['step', '--gin_file=runs/quickstart.gin', '--gin.BATCH_SIZE=3'],
      'batch_size 3 is not divisible by 8 data shards',
    ),
    (
      ['step', *STEP, '--compare=BATCH_SIZE=16', '--compare=BATCH_SIZE=9'],
      '--compare BATCH_SIZE=9: RunConfig.batch_size 9 is not divisible by 8 ',
    ),
    (
      ['step', *STEP, '--compare', 'MeshConfig.expert=3'],
      '--compare MeshConfig.expert=3: MeshConfig: data -1 x expert 3',
    ),
    (
      ['step', *STEP, '--compare', 'BATCH_SIZE=16', 'BATCH_SIZE=24'],
      'gives BATCH_SIZE twice; for two steps write --compare twice',
    ),
    (
      ['step', *STEP, '--compare', '--gin.BATCH_SIZE=16'],
      '--compare takes names without --gin.: --compare BATCH_SIZE=16',
    ),
    (
      ['step', *STEP, '--compare', 'ModelConfig.scan_layer=True'],
      '--compare ModelConfig.scan_layer: ModelConfig has no field',
    ),
    (['step', *STEP, '--compare=BATCH_SIZE'], '--compare BATCH_SIZE needs a '),
    (
      ['step', *STEP, '--compare', 'BATCH_SIZE=8'],
      '--compare BATCH_SIZE=8: that is the step as given',
    ),
  ],
)
def test_wrong_input_ends_with_one_line(capsys, argv, message):
  Path('file').write_text('')
  assert main(['bench', *argv]) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1
  assert message in err


# bench step


def test_bench_step_accounts_for_the_step(capsys):
  """On eight devices; the trace names operations of every part."""
  assert main(['bench', 'step', *STEP, '--output=out']) == 0
  printed = capsys.readouterr().out
  found = results('out')
  assert Path('out/step.png').stat().st_size > 5000
  assert found['mesh'] == {'slice': 1, 'data': 8, 'expert': 1, 'model': 1}
  assert found['tokens'] == 8 * (16 + 8)
  speed = found['tokens_per_second']['median']
  median = np.median([found['tokens'] / s for s in found['step']['wall_s']])
  assert speed == pytest.approx(median)
  assert found['mfu'] is None and 'no peak is known for cpu' in printed
  assert tuple(found['shares']) == tuple(sorted(shares.PARTS))
  assert sum(found['shares'].values()) == pytest.approx(1.0)
  assert found['shares']['other'] < 0.5
  for part in ('routing', 'experts', 'attention', 'optimizer', 'softmax, loss'):
    assert found['shares'][part] > 0, part
    assert part in printed


def test_steps_with_other_settings_take_turns_with_the_one_given(capsys):
  other = ['ModelConfig.remat_policy=full', 'ModelConfig.dispatch=einsum']
  argv = ['bench', 'step', *STEP, '--output=out', '--compare', *other]
  assert main([*argv, '--compare', 'BATCH_SIZE=16']) == 0
  found = results('out')
  printed = capsys.readouterr().out
  assert 'medians of 2 rounds [quartiles]' in printed
  assert 'time of a token / as given' in printed
  assert 'do nothing' not in printed
  first, second = (
    found['compared'].pop(name) for name in (' '.join(other), 'BATCH_SIZE=16')
  )
  assert not found['compared']
  # The same weights and batches, computed in another way; twice as many rows.
  assert first['loss'] == pytest.approx(found['loss'], rel=1e-5)
  assert first['parameters'] == found['parameters']
  assert (first['tokens'], second['tokens']) == (8 * 24, 16 * 24)
  times = zip(second['step']['wall_s'], found['step']['wall_s'], strict=True)
  ratios = [b / second['tokens'] / (a / found['tokens']) for b, a in times]
  median = second['token_time_over_given']['median']
  assert median == pytest.approx(np.median(ratios))


def test_settings_that_do_nothing_are_said_to(capsys):
  argv = ['bench', 'step', *STEP, '--output=out']
  assert main([*argv, '--compare', 'ModelConfig.scan_unroll=2']) == 0
  printed = capsys.readouterr().out
  assert 'the same program as that of the step as given' in printed
  assert 'time / as given' in printed


def test_steps_that_are_not_finite_are_not_reported(capsys):
  argv = ['bench', 'step', *STEP, '--gin.LEARNING_RATE=1e38', '--output=out']
  assert main(argv) == 3
  assert 'steps were not finite' in capsys.readouterr().err
  assert not Path('out/results.json').exists()


@pytest.mark.parametrize(
  'scope, part',
  [
    ('jit(train_step)/optimizer/mul', 'optimizer'),
    ('jit(train_step)/jit(_where)/select_n', 'optimizer'),
    (
      'jit(train_step)/transpose(jvp(EncoderDecoder))/encoder/layers_1/'
      'layers_1._moe/moe/route/router/gsd,de->gse/dot_general',
      'routing',
    ),
    (
      'jit(train_step)/jvp(EncoderDecoder)/decoder/superblocks/while/body/'
      'layer_1/layer_1._moe/moe/moe._through_experts/experts/expert/mul',
      'experts',
    ),
    (
      'jit(train_step)/jvp(EncoderDecoder)/encoder/layers_1/layers_1._moe/moe/'
      'moe._through_experts/dispatch/gather',
      'dispatch, combine',
    ),
    (
      'jit(train_step)/jvp(EncoderDecoder)/encoder/layers_1/layers_1._moe/'
      'layers_1._pre_norm/pre_mlp_layer_norm/mul',
      'norms, residuals',
    ),
    (
      'jit(train_step)/jvp(EncoderDecoder)/decoder/layers_0/'
      'layers_0._cross_attention/encoder_decoder_attention/bqhk,bshk->bhqs',
      'attention',
    ),
    (
      'jit(train_step)/jvp(EncoderDecoder)/encoder/layers_0/layers_0._mlp/mlp/'
      'bld,df->blf/dot_general',
      'dense FFN',
    ),
    ('jit(train_step)/jvp(EncoderDecoder)/decoder/decoder._logits/x', None),
    ('jit(train_step)/transpose(jvp())/add_any', 'softmax, loss'),
    ('jit(train_step)/jvp(EncoderDecoder)/gather', 'embedding'),
    ('', 'other'),
    ('reduce_sum', 'other'),
  ],
)
def test_scopes_belong_to_parts(scope, part):
  assert shares.part_of(scope) == (part or 'softmax, loss')


def test_loops_are_not_counted_beside_what_they_hold():
  program = """
  %fusion.1 = f32[2]{0} fusion(%a), metadata={op_name="jit(f)/optimizer/mul"}
  %while.2 = (s32[], f32[2]{0}) while(%t), body=%b, metadata={op_name="x"}
  ROOT %copy.3 = f32[2]{0:T(128)} copy(%fusion.1)
"""
  assert shares.operation_parts(program) == {
    'fusion.1': 'optimizer',
    'copy.3': 'other',
  }


def test_model_flops_by_hand():
  """Two blocks in each stack, the second sparse, everything small."""
  router = RouterConfig(group_size=None, min_expert_capacity=1)
  model = ModelConfig(
    vocab_size=100, d_model=8, d_ff=16, d_kv=4, num_heads=2,
    num_encoder_layers=2, num_decoder_layers=2, num_experts=4, sparse_every=2,
    encoder_router=router, decoder_router=router,
  )  # fmt: skip
  data = DataConfig(inputs_length=16, targets_length=8)
  config = RunConfig(model=model, data=data, batch_size=4)
  flops = step_flops(config, shards=1)
  # Forward, each layer: 4 kernels of 8 x 8, then logits and sums over 8.
  encoder = 64 * 4 * 2 * 64 + 4 * 2 * 2 * 16 * 16 * 8
  decoder = 32 * 4 * 2 * 64 + 4 * 2 * 2 * 8 * 8 * 8
  # Queries and outputs of 32 tokens, keys and values of 64.
  cross = (32 * 2 + 64 * 2) * 2 * 64 + 4 * 2 * 2 * 8 * 16 * 8
  assert flops['attention'] == 3 * 2 * (encoder + decoder + cross)
  # Both blocks of both stacks have an ordinary FFN: 3 kernels of 8 x 16.
  assert flops['dense FFN'] == 3 * 2 * (64 + 32) * 3 * 2 * 128
  # 16 x 1.25 / 4 = 5 slots for each sequence and expert; 8 x 1.25 / 4 = 2.
  assert flops['experts'] == 3 * (4 * 4 * 5 + 4 * 4 * 2) * 3 * 2 * 128
  assert flops['routing'] == 3 * (64 + 32) * 2 * 8 * 4
  assert flops['softmax'] == 3 * 32 * 2 * 8 * 100


def test_remat_and_microbatches_do_not_change_model_flops():
  router = RouterConfig(group_size=None)  # a sequence: no part cuts a group
  model = ModelConfig(encoder_router=router, decoder_router=router)
  config = RunConfig(model=model, batch_size=8)
  other = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, remat_policy='full'),
    microbatches=2,
  )
  assert step_flops(config, 1) == step_flops(other, 1)


@pytest.mark.parametrize(
  'kind, peak',
  [
    ('TPU v4', 275e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5p', 459e12),
    ('TPU v5', 459e12),
    ('TPU v6 lite', 918e12),
    ('TPU7x', 1153.5e12),
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('NVIDIA H100 80GB HBM3', 989.5e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H200', 989.5e12),
    ('NVIDIA B200', 2250e12),
    ('cpu', None),
  ],
)
def test_peaks(kind, peak):
  assert peak_flops(kind) == peak


# As a user types it


def test_the_command_line_needs_no_tensorflow():
  """Both kinds in one fresh process, whose output is no terminal."""
  code = f"""
import sys
from st_moe.main import main
layer = ['bench', 'layer', *{LAYER}, '--backends=gather', '--output=l']
assert main(layer) == 0
assert main(['bench', 'step', *{STEP}, '--output=s']) == 0
assert not {{'tensorflow', 'seqio', 'torch'}} & set(sys.modules)
"""
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  result = subprocess.run(
    [sys.executable, '-c', code], env=env, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  assert 'Traceback' not in result.stderr
  assert Path('l/layer.png').is_file() and Path('s/step.png').is_file()
