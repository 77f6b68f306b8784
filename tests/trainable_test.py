"""Subsets of parameters: which are trained, and that the rest stays."""

import dataclasses

import jax
import numpy as np
import pytest
from made_models import read_item, write_run
from tiny_model import (
  abstract_boxes,
  assert_trees_close,
  init_params,
  tiny_batch,
  tiny_config,
)

from st_moe import initialize, partitioning, trees
from st_moe.config import (
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  RunConfig,
)
from st_moe.errors import UserError
from st_moe.train_step import step_program
from st_moe.trainable import merge, select, trainable_mask

MODEL = tiny_config(num_encoder_layers=2, num_decoder_layers=1, sparse_every=2)
AXES = partitioning.logical_axes(abstract_boxes(MODEL))


def chosen(trainable, axes=AXES):
  mask = trees.by_name(trainable_mask(axes, trainable))
  return [name for name, is_trained in mask.items() if is_trained]


ATTENTION = ['key', 'out', 'query', 'value']
MOE = [
  'encoder/layers_1/moe/expert/wi_0/kernel',
  'encoder/layers_1/moe/expert/wi_1/kernel',
  'encoder/layers_1/moe/expert/wo/kernel',
  'encoder/layers_1/moe/router/kernel',
]


def test_the_subsets_of_figure_5():
  everything = list(trees.by_name(trainable_mask(AXES, 'all')))
  assert chosen('all') == everything
  assert chosen('moe') == MOE
  assert chosen('non_moe') == [n for n in everything if n not in MOE]
  assert chosen('ffn') == [
    f'{layer}/{name}/kernel'
    for layer in (
      'decoder/layers_0/mlp',
      'encoder/layers_0/mlp',
      'encoder/layers_1/extra_mlp',
    )
    for name in ('wi_0', 'wi_1', 'wo')
  ]
  assert chosen('attention') == [
    *(
      f'decoder/layers_0/{layer}/{name}/kernel'
      for layer in ('encoder_decoder_attention', 'self_attention')
      for name in ATTENTION
    ),
    'decoder/relpos_bias/rel_embedding',
    *(
      f'encoder/layers_{i}/attention/{name}/kernel'
      for i in (0, 1)
      for name in ATTENTION
    ),
    'encoder/relpos_bias/rel_embedding',
  ]


def test_names_choose_too():
  assert chosen(('router', '^token_embedder/')) == [
    'encoder/layers_1/moe/router/kernel',
    'token_embedder/embedding',
  ]
  assert chosen(('moe', 'decoder_norm')) == [
    'decoder/decoder_norm/scale',
    *MOE,
  ]


def test_scanned_layers_have_the_same_subsets():
  scanned = tiny_config(scan_layers=True)
  axes = partitioning.logical_axes(abstract_boxes(scanned))
  assert chosen('moe', axes) == [
    f'{stack}/superblocks/layer_1/moe/{name}/kernel'
    for stack in ('decoder', 'encoder')
    for name in ('expert/wi_0', 'expert/wi_1', 'expert/wo', 'router')
  ]


@pytest.mark.parametrize(
  ('trainable', 'message'),
  [
    ('atention', "'atention' matches no parameter; did you mean attention?"),
    (('ffn', 'layers_9'), "'layers_9' matches no parameter"),
    ('(', "'(' is no regular expression"),
    ((), 'OptimizerConfig.trainable names no parameter'),
  ],
)
def test_patterns_that_choose_nothing_are_refused(trainable, message):
  with pytest.raises(UserError) as error:
    trainable_mask(AXES, trainable)
  assert message in str(error.value)


def test_a_dense_model_has_no_moe_subset():
  dense = tiny_config(num_experts=0)
  axes = partitioning.logical_axes(abstract_boxes(dense))
  with pytest.raises(UserError, match="'moe' has no parameter in this model"):
    trainable_mask(axes, 'moe')


def test_what_was_selected_is_merged_back():
  params = {'a': 1, 'b': {'c': 2, 'd': 3}}
  mask = {'a': False, 'b': {'c': True, 'd': False}}
  trained = select(params, mask)
  assert trained == {'a': None, 'b': {'c': 2, 'd': None}}
  assert merge({'a': None, 'b': {'c': 7, 'd': None}}, params, mask) == {
    'a': 1,
    'b': {'c': 7, 'd': 3},
  }


# The run that the steps below are of.
CONFIG = RunConfig(
  model=tiny_config(),
  optimizer=OptimizerConfig(
    schedule='constant', learning_rate=0.1, min_dim_size_to_factor=8
  ),
  data=DataConfig(vocabulary='byte', inputs_length=10, targets_length=6),
  batch_size=8,
  microbatches=2,
)


def training(trainable, mesh_config=None, **model):
  optimizer = dataclasses.replace(CONFIG.optimizer, trainable=trainable)
  return dataclasses.replace(
    CONFIG,
    optimizer=optimizer,
    model=dataclasses.replace(CONFIG.model, **model),
    mesh=mesh_config or MeshConfig(data=1),
  )


def train(config, seeds=(0, 1)):
  """Returns the parameters before, and the state after a step per seed."""
  devices = None if config.mesh.data != 1 else jax.devices()[:1]
  mesh = partitioning.make_mesh(config.mesh, devices)
  program = step_program(config, mesh)
  # Copies: the step takes over the memory of its state.
  before = jax.tree.map(np.array, init_params(config.model))
  state = program.initial_state()
  state = state.replace(params=jax.device_put(before, program.shardings.params))
  with partitioning.use_mesh(mesh, config.mesh):
    for seed in seeds:
      batch = partitioning.shard_batch(tiny_batch(seed=seed), mesh)
      state, result = program.step(state, batch)
      assert np.isfinite(result['loss'])
  return trees.by_name(before), state


@pytest.mark.parametrize('scan', [False, True])
def test_frozen_parameters_stay_and_have_no_slots(scan):
  config = training('moe', scan_layers=scan)
  before, state = train(config)
  after = trees.by_name(state.params)
  moved = [n for n in after if not np.array_equal(after[n], before[n])]
  axes = partitioning.logical_axes(abstract_boxes(config.model))
  assert moved == chosen('moe', axes)
  slots = [n for n in trees.by_name(state.opt_state) if '/slots/' in n]
  assert slots
  assert all('/moe/' in name for name in slots)


def test_the_first_step_of_a_subset_is_that_of_all():
  # Adafactor looks at one parameter at a time.
  everything, subset = (
    trees.by_name(train(training(trainable), seeds=[0])[1].params)
    for trainable in ('all', 'ffn')
  )
  names = chosen('ffn', partitioning.logical_axes(abstract_boxes(CONFIG.model)))
  for name in names:
    np.testing.assert_allclose(
      subset[name], everything[name], rtol=1e-5, atol=1e-6, err_msg=name
    )


def test_any_mesh_trains_the_same_subset():
  mesh = MeshConfig(data=2, expert=2, model=2, fsdp_dense=True)
  _, one = train(training('non_moe'))
  _, eight = train(training('non_moe', mesh))
  assert_trees_close(eight.params, one.params)


def begin(path, stored, trainable):
  """Stores a run that trained `stored`; begins another with its slots."""
  before = training(stored)
  write_run(path, before.model, before.optimizer, with_optimizer=True)
  config = dataclasses.replace(
    training(trainable), initial_checkpoint=str(path), steps=20,
    initial_optimizer='carried',
  )  # fmt: skip
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  program = step_program(config, mesh)
  source = initialize.find_source(config)
  return initialize.initial_state(config, program, source, mesh).state


@pytest.mark.parametrize('stored', ['all', 'ffn'])
def test_slots_of_the_trained_parameters_are_carried(tmp_path, stored):
  state = begin(tmp_path, stored, 'ffn')
  expected = {
    name: value
    for name, value in read_item(tmp_path, 'opt_state').items()
    if '/slots/' not in name or '/mlp/' in name or '/extra_mlp/' in name
  }
  actual = trees.by_name(state.opt_state)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)


def test_slots_that_are_not_there_are_refused(tmp_path):
  with pytest.raises(UserError, match="other form than this run's; missing"):
    begin(tmp_path, 'ffn', 'moe')
