"""config.json and ModelConfig: oddities of transformers, and refusals."""

import dataclasses
import json

import pytest

from st_moe.convert import from_hf, hf_config, hf_export
from st_moe.convert.safetensors_files import TensorFiles
from st_moe.errors import UserError
from st_moe.stacking import sparse_layers

SIZES = {
  'vocab_size': 40, 'd_model': 16, 'd_kv': 4, 'd_ff': 8, 'num_layers': 2,
  'num_heads': 2,
}  # fmt: skip


def read(folder, **content) -> hf_config.HfConfig:
  (folder / 'config.json').write_text(json.dumps(SIZES | content))
  return hf_config.read_config(folder)


# (depth, asked for): the indices that transformers 5.23 makes sparse.
PLACEMENTS = {
  (12, 6): (1, 3, 5, 7, 9, 11),
  (12, 3): (1, 5, 9),
  (12, 0): (1,),
  (12, 5): (1, 3, 5, 7, 9, 11),
  (5, 2): (1, 3),
  (4, 4): (0, 1, 2, 3),
  (1, 0): (0,),
  (2, 3): (),
}


@pytest.mark.parametrize('depth, number', PLACEMENTS)
def test_sparse_layers_are_where_transformers_has_them(depth, number):
  wanted = PLACEMENTS[depth, number]
  assert hf_config.their_sparse_layers(depth, number) == wanted


@pytest.mark.parametrize('encoder', [(12, 6), (12, 0), (5, 2), (4, 4)])
@pytest.mark.parametrize('decoder', [(12, 6), (12, 3), (4, 4), (1, 0)])
def test_a_switch_model_has_them_there_too_and_goes_back(
  encoder, decoder, tmp_path
):
  described = read(
    tmp_path,
    model_type='switch_transformers',
    num_layers=encoder[0],
    num_sparse_encoder_layers=encoder[1],
    num_decoder_layers=decoder[0],
    num_sparse_decoder_layers=decoder[1],
    expert_capacity=7,
  )
  model = hf_config.model_config(described, tied=True)
  assert sparse_layers(model, 'encoder') == PLACEMENTS[encoder]
  assert sparse_layers(model, 'decoder') == PLACEMENTS[decoder]
  assert model.decoder_router.fixed_capacity == 7
  assert hf_export.why_not(model) is None
  back = hf_export.config_json(
    model, model_type='switch_transformers', dtype='float32'
  )
  assert hf_config.model_config(read(tmp_path, **back), tied=True) == model


def test_a_step_that_is_named_wins_over_a_number_of_layers(tmp_path, caplog):
  content = {
    'model_type': 'switch_transformers',
    'num_layers': 4,
    'num_sparse_encoder_layers': 2,
    'num_sparse_decoder_layers': 2,
    'decoder_sparse_step': 2,
  }
  described = read(tmp_path, **content, encoder_sparse_step=2)
  assert hf_config.model_config(described, tied=True).num_encoder_layers == 4
  assert not caplog.text
  described = read(tmp_path, **content, encoder_sparse_step=3)
  model = hf_config.model_config(described, tied=True)
  assert sparse_layers(model, 'encoder') == (1,)
  assert sparse_layers(model, 'decoder') == (1, 3)
  assert (
    'encoder_sparse_step 3 and num_sparse_encoder_layers 2 contradict'
  ) in caplog.text


REFUSED = [
  (
    {'model_type': 'switch_transformers', 'router_jitter_noise': 'a'},
    "router_jitter_noise is 'a', which is no number",
  ),
  (
    {'model_type': 't5', 'dropout_rate': None},
    'dropout_rate is None, which is no number',
  ),
  ({'model_type': 'umt5'}, "model_type 'umt5' is not supported"),
  ({'model_type': 't5', 'feed_forward_proj': 'gelu'}, 'it is the exact one'),
  ({'model_type': 't5', 'pad_token_id': 1}, 'pad_token_id is 1, and 0'),
  ({'model_type': 't5', 'eos_token_id': 2}, 'eos_token_id is 2, and 1'),
  (
    {'model_type': 't5', 'decoder_start_token_id': 3},
    'decoder_start_token_id is 3, and 0',
  ),
  (
    {'model_type': 't5', 'architectures': ['T5EncoderModel']},
    'T5EncoderModel is no encoder-decoder with logits',
  ),
  (
    {'model_type': 'switch_transformers', 'router_bias': True},
    'routers have no bias here',
  ),
  (
    {'model_type': 'switch_transformers', 'expert_capacity': -3},
    'config.json: RouterConfig.fixed_capacity must be > 0, got -3',
  ),
  (
    {'model_type': 't5', 'quantization_config': {'bits': 8}},
    'quantization_config is set',
  ),
]


@pytest.mark.parametrize('content, message', REFUSED)
def test_what_we_cannot_hold_is_refused(content, message, tmp_path):
  with pytest.raises(UserError, match=message):
    hf_config.model_config(read(tmp_path, **content), tied=True)


def test_sizes_that_are_not_said_are_said_here(tmp_path, caplog):
  read(tmp_path, model_type='t5')
  assert not caplog.text
  sizes = {name: size for name, size in SIZES.items() if name != 'd_model'}
  path = tmp_path / 'config.json'
  path.write_text(json.dumps({'model_type': 't5'} | sizes))
  described = hf_config.read_config(tmp_path)
  assert hf_config.model_config(described, tied=True).d_model == 512
  assert 'lacks d_model (512): taken as transformers takes it' in caplog.text


def test_a_file_that_contradicts_itself_is_read_as_transformers_reads_it(
  tmp_path, caplog
):
  content = {'model_type': 't5', 'feed_forward_proj': 'gated-gelu'}
  agreed = read(tmp_path, **content, dense_act_fn='gelu_new', is_gated_act=True)
  model = hf_config.model_config(agreed, tied=False)
  assert model.mlp_activations == ('gelu', 'linear')
  assert not caplog.text
  disagreed = read(tmp_path, **content, dense_act_fn='relu')
  model = hf_config.model_config(disagreed, tied=False)
  assert model.mlp_activations == ('relu', 'linear')
  assert (
    "feed_forward_proj 'gated-gelu' and dense_act_fn 'relu' with is_gated_act "
    'True contradict each other'
  ) in caplog.text


def test_all_that_is_in_the_way_of_an_export_is_said(tmp_path):
  described = read(
    tmp_path,
    model_type='switch_transformers',
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
  )
  model = hf_config.model_config(described, tied=True)
  router = dataclasses.replace(model.encoder_router, group_size=64)
  apart = dataclasses.replace(model, encoder_router=router)
  assert hf_export.why_not(apart) == 'encoder/RouterConfig.group_size 64'
  router = dataclasses.replace(router, num_choices=2)
  alike = dataclasses.replace(
    model,
    encoder_router=router,
    decoder_router=router,
    mlp_activations=('gelu', 'linear'),
  )
  assert hf_export.why_not(alike) == (
    'gated experts; RouterConfig.num_choices 2; RouterConfig.group_size 64'
  )


def test_whether_the_output_is_scaled_follows_the_version(tmp_path):
  # As transformers 4 and 5 write T5 v1.1.
  assert not read(
    tmp_path, model_type='t5', tie_word_embeddings=False
  ).scales_outputs
  assert not read(
    tmp_path,
    model_type='t5',
    tie_word_embeddings=True,
    scale_decoder_outputs=False,
  ).scales_outputs
  assert read(tmp_path, model_type='t5').scales_outputs
  assert read(tmp_path, model_type='mt5').scales_outputs is None
  old, new = (
    read(tmp_path, model_type='mt5', transformers_version=version)
    for version in ('4.57.1', '5.23.0')
  )
  assert (old.scales_outputs, new.scales_outputs) == (True, False)


def test_only_a_pickle_says_how_to_make_safetensors(tmp_path):
  (tmp_path / 'pytorch_model.bin').touch()
  with pytest.raises(UserError, match='only a pickle; make one where torch'):
    TensorFiles(tmp_path)


def test_an_index_that_names_an_absent_file_is_refused(tmp_path):
  (tmp_path / 'model.safetensors.index.json').write_text(
    '{"weight_map": {"shared.weight": "model-1.safetensors"}}'
  )
  with pytest.raises(
    UserError, match='names model-1.safetensors, which is not'
  ):
    TensorFiles(tmp_path)


def test_a_name_on_the_hub_is_no_directory(tmp_path):
  with pytest.raises(UserError, match='hf download'):
    from_hf.understand(tmp_path / 'google' / 'flan-t5-small')
