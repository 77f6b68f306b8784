"""Configuration dataclasses: types, ranges and combinations."""

import dataclasses
import json

import pytest

from st_moe.config import (
  ROUTER_PRESETS,
  DataConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RouterConfig,
  RunConfig,
  to_dict,
)
from st_moe.errors import UserError, did_you_mean


def error_of(cls, **fields) -> str:
  with pytest.raises(UserError) as caught:
    cls(**fields)
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize(
  'cls, fields, message',
  [
    (
      ModelConfig,
      {'d_model': 'many'},
      "ModelConfig.d_model must be int, got 'many'",
    ),
    (ModelConfig, {'d_model': True}, 'ModelConfig.d_model must be int'),
    (ModelConfig, {'d_model': 1.5}, 'ModelConfig.d_model must be int, got 1.5'),
    (ModelConfig, {'d_model': None}, 'must be int, got None'),
    (ModelConfig, {'scan_layers': 1}, 'scan_layers must be True or False'),
    (
      RunConfig,
      {'tensorboard': 'true'},
      "must be True or False, got 'true'",
    ),
    (
      ModelConfig,
      {'remat_policy': 'ful'},
      "must be one of 'none', 'dots_saveable', 'full', got 'ful'; "
      "did you mean 'full'?",
    ),
    (
      ModelConfig,
      {'mlp_activations': ('gelu', 'tanh')},
      'ModelConfig.mlp_activations must be a tuple of one of',
    ),
    (
      OptimizerConfig,
      {'learning_rate': float('nan')},
      'OptimizerConfig.learning_rate must be a finite number, got nan',
    ),
    (
      OptimizerConfig,
      {'max_grad_norm': 'x'},
      "must be a finite number or None, got 'x'",
    ),
    (RunConfig, {'model': 'tiny'}, 'RunConfig.model must be ModelConfig'),
  ],
)
def test_a_wrong_type_names_field_type_and_value(cls, fields, message):
  assert message in error_of(cls, **fields)


@pytest.mark.parametrize(
  'cls, fields, message',
  [
    (ModelConfig, {'d_ff': 0}, 'ModelConfig.d_ff must be > 0, got 0'),
    (ModelConfig, {'dropout_rate': 1.0}, 'must be in [0, 1), got 1.0'),
    (ModelConfig, {'num_experts': -1}, 'must be >= 0, got -1'),
    (RouterConfig, {'group_size': 0}, 'RouterConfig.group_size must be > 0'),
    (RouterConfig, {'jitter': -0.1}, 'RouterConfig.jitter must be in [0, 1)'),
    (RunConfig, {'steps': 0}, 'RunConfig.steps must be > 0, got 0'),
    (DataConfig, {'noise_density': 1.0}, 'noise_density must be in (0, 1)'),
    (DataConfig, {'holdout_every': 1}, 'holdout_every must be >= 2, got 1'),
    (MeshConfig, {'data': -1, 'model': -1}, 'at most one of them -1'),
    (MeshConfig, {'expert': 0}, 'axes must be positive'),
  ],
)
def test_a_value_out_of_range_is_refused_with_the_range(cls, fields, message):
  assert message in error_of(cls, **fields)


@pytest.mark.parametrize(
  'cls, fields, message',
  [
    (
      RunConfig,
      {'batch_size': 10, 'microbatches': 3},
      'batch_size 10 is not divisible by microbatches 3',
    ),
    (
      RouterConfig,
      {'capacity_formula': 'fixed'},
      "fixed_capacity is given if and only if capacity_formula = 'fixed'",
    ),
    (
      RouterConfig,
      {'num_choices': 1, 'second_choice_loss_weight': 0.5},
      'second_choice_loss_weight needs num_choices >= 2',
    ),
    (
      RouterConfig,
      {'train_choice_threshold': 0.0},
      "train_choice_policy 'random' needs train_choice_threshold > 0",
    ),
    (
      ModelConfig,
      {'num_experts': 1},
      'encoder/RouterConfig.num_choices 2 exceeds num_experts 1',
    ),
    (
      ModelConfig,
      {'mlp_activations': ('gelu', 'linear', 'linear')},
      'one activation, or two for a gated FFN',
    ),
    (
      ModelConfig,
      {'sparse_placement': 4},
      'sparse_placement 4 is no index below sparse_every 4',
    ),
    (
      ModelConfig,
      {'sparse_placement': 'dddx'},
      "a pattern of 'd' (dense) and 's' (sparse); got 'dddx'",
    ),
    (
      ModelConfig,
      {'sparse_placement': 'dds'},
      "sparse_placement 'dds' of 3 layers does not divide a stack of 8",
    ),
    (
      ModelConfig,
      {'num_encoder_layers': 2, 'num_decoder_layers': 3},
      'num_experts is 32, but no FFN is sparse',
    ),
    (
      MeshConfig,
      {'fsdp_slices': True},
      'stores experts in parts between slices too; set fsdp_experts = True',
    ),
    (
      ModelConfig,
      {'relative_attention_num_buckets': 3},
      'relative_attention_num_buckets must be at least 4, got 3',
    ),
    (
      ModelConfig,
      {'relative_attention_max_distance': 16},
      'must exceed half of relative_attention_num_buckets 32',
    ),
    (
      OptimizerConfig,
      {'schedule': 'cosine', 'warmup_steps': 100, 'decay_steps': 100},
      'decay_steps 100 must exceed warmup_steps 100',
    ),
  ],
)
def test_values_that_cannot_go_together_are_refused(cls, fields, message):
  assert message in error_of(cls, **fields)


@pytest.mark.parametrize(
  'router',
  [RouterConfig(kind='expert_choice'), RouterConfig(priority='probability')],
)
def test_a_causal_decoder_refuses_routers_that_look_ahead(router):
  ModelConfig(encoder_router=router)
  message = error_of(ModelConfig, decoder_router=router)
  assert 'later tokens' in message
  # Without experts nothing is routed, and nothing is refused.
  ModelConfig(num_experts=0, decoder_router=router)


def test_lists_and_whole_numbers_take_the_field_s_own_type():
  model = ModelConfig(mlp_activations=['relu'], init_scale=1)
  assert model.mlp_activations == ('relu',)
  assert isinstance(model.init_scale, float)
  assert isinstance(OptimizerConfig(max_grad_norm=1).max_grad_norm, float)
  assert hash(model) == hash(ModelConfig(mlp_activations=('relu',)))


def test_a_dense_model_needs_no_sparse_layer():
  ModelConfig(num_experts=0, num_encoder_layers=1, num_decoder_layers=1)


def test_presets_differ_where_the_implementations_do():
  paper, t5x, hf = (
    ROUTER_PRESETS[name] for name in ('paper', 't5x', 'hf_switch')
  )
  # The paper: section 4 and appendices A and G.
  assert (paper.num_choices, paper.train_capacity_factor) == (2, 1.25)
  assert (paper.balance_loss_weight, paper.z_loss_weight) == (0.01, 0.001)
  assert paper.capacity_formula == 'tokens'  # no factor K
  assert (paper.gate_normalization, t5x.gate_normalization) == (
    'before_drop',
    'none',
  )
  assert (paper.train_choice_policy, t5x.train_choice_policy) == (
    'random',
    'all',
  )
  assert (paper.loss_reduction, t5x.loss_reduction) == ('sum', 'mean')
  assert (hf.num_choices, hf.fixed_capacity, hf.group_size) == (1, 64, None)


def test_the_default_evaluation_is_deterministic():
  assert RouterConfig().eval_choice_policy != 'random'


def test_to_dict_is_json_and_holds_every_field():
  config = RunConfig()
  written = json.loads(json.dumps(to_dict(config)))
  assert written['model']['encoder_router']['num_choices'] == 2
  assert set(written) == {f.name for f in dataclasses.fields(config)}


def test_did_you_mean_suggests_the_nearest_whatever_its_capitals():
  known = ['STEPS', 'BATCH_SIZE', 'SEED']
  assert did_you_mean('steps', known) == '; did you mean STEPS?'
  assert did_you_mean('BATCHSIZE', known) == '; did you mean BATCH_SIZE?'
  assert did_you_mean('zebra', known) == ''
