"""st_moe plan: what it counts, what it warns of, what it says and writes."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest

from st_moe import partitioning
from st_moe.bench.flops import step_flops
from st_moe.config import MeshConfig
from st_moe.gin_files import load_config, parse_flag
from st_moe.main import main
from st_moe.plan import costs, lint, planning
from st_moe.plan.collectives import Collective, Traffic
from st_moe.plan.search import POLICIES, search
from st_moe.plan.targets import parse_target
from st_moe.train_state import parameter_counts
from st_moe.train_step import step_program

FILES = ('gin_configs/models/tiny.gin', 'gin_configs/runs/pretrain.gin')
SMALL = (
  'VOCABULARY=byte',
  'BATCH_SIZE=16',
  'RouterConfig.group_size=64',
  'DataConfig.inputs_length=64',
  'DataConfig.targets_length=32',
)


def configure(*flags):
  return load_config(FILES, [parse_flag(flag) for flag in (*SMALL, *flags)])


def traced(config):
  mesh = partitioning.make_mesh(config.mesh)
  return mesh, step_program(config, mesh)


def plan_of(config, compiles=False):
  return planning.make_plan(config, parse_target('cpu:8'), compiles=compiles)


def rules(config, available=None):
  mesh, program = traced(config)
  flops = costs.traced_flops(program.traced)
  shards = partitioning.batch_shards(mesh)
  found = lint.lint_shapes(
    config,
    program,
    shards,
    flops,
    costs.uncounted_parts(program.traced),
    mesh=mesh.shape,
    available=available,
    tiled=True,
  )
  return {finding.rule: finding.text for finding in found}


# What a step costs


@pytest.mark.parametrize('scan', [False, True])
def test_products_of_the_program_are_those_of_the_model(scan):
  """Nothing is computed twice, and capacity 1 x K leaves no empty slots."""
  config = configure(
    f'ModelConfig.scan_layers={scan}',
    "ModelConfig.dispatch='gather'",
    'RouterConfig.train_capacity_factor=1.0',
  )
  _, program = traced(config)
  found = costs.traced_flops(program.traced)
  expected = step_flops(config, 8)
  assert found['experts'] == expected['experts']
  assert found['dense FFN'] == expected['dense FFN']
  assert found['softmax, loss'] == expected['softmax']
  assert found['routing'] == expected['routing']
  # Beside the model's products: those of position biases with one-hot vectors.
  assert expected['attention'] < found['attention']
  assert found['attention'] < 1.05 * expected['attention']


def test_rematerialization_is_counted():
  kept, again = (
    costs.traced_flops(
      traced(configure(f"ModelConfig.remat_policy='{policy}'"))[1].traced
    )
    for policy in ('none', 'full')
  )
  # Forward, forward again without the last product, and twice forward.
  assert again['dense FFN'] == pytest.approx(kept['dense FFN'] * (11 / 9))


def test_loops_whose_trips_are_not_known_count_as_the_model_does():
  plan = plan_of(configure("ModelConfig.dispatch='ragged'"))
  assert plan.program_flops['experts'] == plan.model_flops['experts'] > 0
  (found,) = [each for each in plan.findings if each.rule == 'FLOPs']
  assert found.text.startswith('experts: how often loops run depends on')
  counted = plan_of(configure("ModelConfig.dispatch='gather'"))
  assert 'FLOPs' not in {each.rule for each in counted.findings}


def test_a_token_uses_its_choice_of_the_experts():
  config = configure()
  _, program = traced(config)
  counts = parameter_counts(program.shapes)
  found = costs.parameters(config, program.shapes)
  share = config.model.encoder_router.num_choices / config.model.num_experts
  assert found['total'] == counts['total']
  assert found['active_per_token'] == round(
    counts['dense'] + share * counts['expert']
  )


def test_state_is_counted_as_it_lies_on_a_device():
  config = configure('MeshConfig.expert=4', 'MeshConfig.fsdp_experts=True')
  _, program = traced(config)
  found = costs.state_bytes(program)
  counts = parameter_counts(program.shapes)
  assert found['dense weights'] == 4 * counts['dense']
  assert found['expert weights'] == 4 * counts['expert'] // 8
  placed = program.initial_state()
  one = jax.devices()[0]
  expected = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves((placed.params, placed.opt_state))
    for shard in leaf.addressable_shards
    if shard.device == one
  )
  assert sum(found.values()) == expected


# What it warns of


def test_a_good_configuration_gives_no_finding():
  config = configure(
    "ModelConfig.dispatch='gather'", 'RouterConfig.train_capacity_factor=1.0'
  )
  assert rules(config) == {}


def test_groups_that_are_not_as_configured():
  text = rules(configure('encoder/RouterConfig.group_size=512'))['groups']
  assert text.startswith('encoder: groups have 128 tokens, not the group_size')


def test_capacity_that_is_rounded_up():
  found = rules(configure('RouterConfig.train_capacity_factor=0.1'))
  assert 'slots per expert are rounded to' in found['capacity']


def test_dispatch_that_costs_much():
  config = configure(
    "ModelConfig.dispatch='einsum'",
    'RouterConfig.group_size=512',
    'MeshConfig.expert=2',
    'MeshConfig.model=4',
    'ModelConfig.d_ff=64',
  )
  assert 'of the FLOPs' in rules(config)['dispatch']


def test_layers_without_a_pattern():
  config = configure(
    'ModelConfig.scan_layers=True',
    'ModelConfig.num_encoder_layers=3',
    'ModelConfig.num_decoder_layers=4',
    'ModelConfig.sparse_every=2',
  )
  assert rules(config)['unbalanced layers'].startswith('encoder: 1 sparse')


def test_weights_cut_below_the_tile():
  config = configure(
    'MeshConfig.fsdp_dense=True',
    "MeshConfig.fsdp_dense_axes=('data', 'expert')",
    'ModelConfig.d_model=512',
  )
  assert '512 are cut into parts of 64' in rules(config)['tiles']


def test_experts_that_are_gathered():
  """One matrix of wi_0, wi_1 and wo has d_model x d_ff = 64 x 512 values."""
  flags = (
    'MeshConfig.fsdp_experts=True',
    'ModelConfig.num_experts=8',
    'ModelConfig.d_model=64',
    'ModelConfig.d_ff=512',
  )
  experts = 8 * 3 * 64 * 512 * 4
  found = rules(configure('MeshConfig.expert=2', *flags), available=2**21)
  assert found['experts'].startswith(
    'every device gathers 4 experts of a layer'
  )
  assert 'with --mesh=data=-1,expert=8 it is' in found['experts']
  # Half of them are 10% of this, and more is there.
  for mesh, available, warns in (
    ('MeshConfig.expert=2', 5 * experts - 1, True),
    ('MeshConfig.expert=2', 5 * experts, False),
    ('MeshConfig.expert=8', 2**21, False),
    ('MeshConfig.expert=2', None, False),
  ):
    found = rules(configure(mesh, *flags), available=available)
    assert ('experts' in found) == warns
  stored = configure(*flags, 'MeshConfig.fsdp_experts=False')
  assert 'experts' not in rules(stored, available=2**21)


FSDP = MeshConfig(fsdp_dense=True)


def traffic_texts(*collectives, mesh=FSDP):
  found = lint.lint_traffic(Traffic(collectives, 0), mesh)
  assert {each.rule for each in found} <= {'all-reduce'}
  return [each.text for each in found]


LARGE = Collective(
  'all-reduce', 2**28, 'f32[64,1024,1024]', 8, 8, ('data',), 'a/b/c/d', 6
)


def test_an_all_reduce_of_something_large():
  (text,) = traffic_texts(LARGE)
  assert '6 times a step (1.50 GiB, b/c/d)' in text
  harmless = [
    dataclasses.replace(LARGE, kind='all-gather'),
    dataclasses.replace(LARGE, shape='f32[64,1024] and 1023 more'),
    dataclasses.replace(LARGE, count=1, shape='f32[63,1024,1024]'),
    dataclasses.replace(LARGE, local_size=1),  # between slices
    dataclasses.replace(LARGE, axes=('model',)),  # sums of a layer's parts
  ]
  assert traffic_texts(*harmless) == []


@pytest.mark.parametrize(
  'mesh, remedy',
  [
    (MeshConfig(), 'MeshConfig.fsdp_dense = True scatters gradients'),
    (
      dataclasses.replace(FSDP, fsdp_dense_axes=('data', 'expert')),
      'FSDP over one axis scatters it: leave MeshConfig.fsdp_dense_axes at '
      'None',
    ),
    (FSDP, 'a larger MeshConfig.model cuts it'),
    (
      dataclasses.replace(FSDP, fsdp_dense_axes=('data',)),
      'a larger MeshConfig.model cuts it',
    ),
  ],
)
def test_what_helps_against_it_is_not_there_yet(mesh, remedy):
  (text,) = traffic_texts(LARGE, mesh=mesh)
  assert text.endswith(f'; {remedy}')


def test_many_all_reduces_are_few_lines():
  many = [
    dataclasses.replace(LARGE, shape=f'f32[{n},1024,1024]', bytes=n * 2**22)
    for n in range(8, 16)
  ]
  again = dataclasses.replace(many[-1], op_name='e/f')
  texts = traffic_texts(*many, again)
  assert [text.split()[0] for text in texts] == [
    'f32[15,1024,1024]',
    'f32[14,1024,1024]',
    'f32[13,1024,1024]',
    '5',
  ]
  assert '12 times a step (0.70 GiB, b/c/d)' in texts[0]
  assert texts[-1] == (
    '5 more shapes are added up on every device, 1.17 GiB; --json names all'
  )


def test_a_gradient_that_is_whole_once_a_step():
  kernel = 'f32[5120,32128]'  # of the logits
  once = Collective(
    'all-reduce', 657981440, kernel, 64, 64, ('expert',), 'decoder/_logits/dot'
  )
  assert traffic_texts(once) == [
    'f32[5120,32128] is added up on every device, once a step (0.61 GiB, '
    'decoder/_logits/dot), and is whole there for a moment; a larger '
    'MeshConfig.model cuts it'
  ]


# Whether it fits


@pytest.mark.parametrize(
  'message, expected',
  [
    ('RESOURCE_EXHAUSTED: ... Used 27.30G of 15.75G hbm.', 27.30 * 2**30),
    (
      'RESOURCE_EXHAUSTED: total memory required for HLO temporaries (512.0M) '
      'exceeds available HBM (1.0M)',
      2**29,
    ),
    ('INTERNAL: something else', None),
  ],
)
def test_what_the_compiler_needs_is_read_from_its_error(message, expected):
  found = planning._needed(message)
  assert found == (None if expected is None else int(expected))


def test_the_longest_time_bounds_the_step():
  chip = parse_target('v5e:2x4').chip
  plan = dataclasses.replace(
    plan_of(configure()),
    target=dataclasses.replace(parse_target('cpu:8'), chip=chip),
    model_flops={'experts': 0.75 * 8 * chip.peak},
    program_flops={'experts': 1.0 * 8 * chip.peak},
    links={'interconnect': 0.5, 'network': None},
  )
  assert plan.times == {
    'arithmetic': 1.0,
    'links within a slice or node': 0.5,
  }
  assert (plan.bound, plan.utilization) == (1.0, 0.75)
  slow = dataclasses.replace(plan, links={'interconnect': 0.5, 'network': 1.5})
  assert (slow.bound, slow.utilization, slow.model_share) == (1.5, 0.5, 0.75)


def test_the_search_tries_policies_and_then_meshes(monkeypatch):
  seen = []

  def make_plan(config, target, *, compiles):
    plan = plan_of(config)
    needs = 2**40 if config.model.remat_policy == 'none' else None
    return dataclasses.replace(plan, needs=needs)

  monkeypatch.setattr('st_moe.plan.search.make_plan', make_plan)
  plans = search(configure(), parse_target('cpu:8'), 5, seen.append)
  assert [p.config.model.remat_policy for p in seen[:3]] == list(POLICIES)
  assert [
    (p.mesh['expert'], p.config.model.remat_policy) for p in seen[3:]
  ] == [(8, 'dots_saveable'), (4, 'dots_saveable')]
  assert plans[-1].config.model.remat_policy == 'none'  # does not fit: last


def test_stand_ins_choose_as_the_target_would():
  config = dataclasses.replace(
    configure('RouterConfig.group_size=16'), mesh=MeshConfig(expert=8)
  )
  on_tpu = planning._as_on(parse_target('v5e:2x4', slices=2), config)
  assert on_tpu.model.dispatch == 'einsum'  # small groups
  assert on_tpu.mesh.slice == 2
  assert planning._as_on(parse_target('h100x8'), config).model.dispatch == (
    'gather'
  )


# The command


def st_moe(*argv):
  """Runs `st_moe plan` in a process of its own, as users do."""
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in ('JAX_PLATFORMS', 'XLA_FLAGS', 'JAX_NUM_CPU_DEVICES')
  }
  command = [sys.executable, '-m', 'st_moe', 'plan']
  command += [f'--gin_file={name}' for name in FILES]
  command += [f'--gin.{flag}' for flag in SMALL[1:]]
  return subprocess.run(
    [*command, *argv],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def test_the_table_and_the_json_of_a_mesh_of_8(tmp_path):
  path = tmp_path / 'plan.json'
  result = st_moe(
    '--topology=cpu:8', '--mesh=data=2,expert=4', f'--json={path}'
  )
  assert result.returncode == 0, result.stderr
  assert result.stderr == ''
  found = json.loads(path.read_text())
  assert found['mesh'] == {'slice': 1, 'data': 2, 'expert': 4, 'model': 1}
  _, program = traced(configure('MeshConfig.data=2', 'MeshConfig.expert=4'))
  counts = parameter_counts(program.shapes)
  assert found['parameters']['total'] == counts['total']
  assert found['program_flops'] == costs.traced_flops(program.traced)
  assert found['collectives']['counts_by_kind']['all-to-all'] >= 8
  assert found['bytes_per_device']['peak'] > sum(
    found['bytes_per_device']['state'].values()
  )
  assert found['fits'] is None
  assert f'{counts["total"]:,} in all' in result.stdout
  assert 'mesh: data 2 x expert 4 x model 1' in result.stdout


def test_without_compiling_a_pod_takes_seconds(tmp_path):
  path = tmp_path / 'plan.json'
  result = st_moe(
    '--topology=v5e:4x4', '--slices=2', '--no_compile', f'--json={path}',
    '--gin.BATCH_SIZE=64',
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  found = json.loads(path.read_text())
  assert found['mesh'] == {'slice': 2, 'data': 16, 'expert': 1, 'model': 1}
  assert found['collectives'] is None
  assert 'only compiling tells' in result.stdout


@pytest.fixture
def error(capsys, monkeypatch):
  # A plan sets what JAX reads when it loads; other tests start processes.
  monkeypatch.setattr(os, 'environ', os.environ.copy())

  def run(*argv):
    assert main(['plan', f'--gin_file={FILES[0]}', *argv]) == 2
    out, err = capsys.readouterr()
    assert err.count('\n') == 1, err
    return err

  return run


def test_bad_input_is_one_line(error, tmp_path):
  assert 'did you mean v5p' in error('--topology=v5q:4x4x4')
  assert "'exper=4'" in error('--topology=cpu:8', '--mesh=exper=4')
  assert '--search compiles' in error(
    '--topology=cpu:8', '--search=2', '--no_compile'
  )
  assert 'no such folder' in error(
    '--topology=cpu:8', f'--json={tmp_path}/none/plan.json'
  )
  assert 'is a folder' in error('--topology=cpu:8', f'--json={tmp_path}')
  assert 'data 3 x expert 1 x model 1 do not multiply to' in error(
    '--topology=cpu:8', '--mesh=data=3', '--no_compile'
  )
  assert main(['plan', '--topology=cpu:8']) == 2


@pytest.mark.skipif(
  'not __import__("importlib.util").util.find_spec("libtpu")',
  reason='needs libtpu, the extra tpu',
)
def test_a_step_that_does_not_fit_says_what_it_needs():
  """Sixty-four rows of 8192 tokens keep more than 15.75 GiB of one chip."""
  result = st_moe(
    '--topology=v5e:1x1',
    '--gin.BATCH_SIZE=64',
    '--gin.DataConfig.inputs_length=8192',
    '--gin.RouterConfig.group_size=8192',
  )
  assert result.returncode == 2
  assert result.stderr.count('\n') == 1, result.stderr
  assert 'does not fit v5e:1x1 (1 devices): a device needs' in result.stderr
  assert "remat_policy='full'" in result.stdout
