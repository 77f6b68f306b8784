"""Errors of `st_moe convert from-t5x`: one line each, nothing written."""

import dataclasses
import shutil

import numpy as np
import pytest
from t5x_checkpoints import DENSE, ST_MOE, Model, save, written_out

from st_moe.bindings import model_config_text
from st_moe.config import ROUTER_PRESETS
from st_moe.convert import from_t5x, t5x_presets
from st_moe.main import main


@pytest.fixture(scope='module')
def dense_folder(tmp_path_factory):
  """A folder with a dense checkpoint; not to be changed."""
  folder = tmp_path_factory.mktemp('dense')
  save(folder, written_out(Model(DENSE)))
  return folder


@pytest.fixture
def dense(dense_folder, tmp_path):
  """A copy of that folder, tmp_path/in."""
  return shutil.copytree(dense_folder, tmp_path / 'in')


@pytest.fixture(scope='module')
def st_moe_folder(tmp_path_factory):
  """A folder with a checkpoint of ST-MoE; not to be changed."""
  folder = tmp_path_factory.mktemp('st_moe')
  save(folder, written_out(Model(ST_MOE)))
  return folder


def refuses(tmp_path, capsys, *flags, source=None):
  """Returns the one line with which a conversion ends."""
  capsys.readouterr()
  before = sorted(tmp_path.iterdir())
  paths = [str(source or tmp_path / 'in'), str(tmp_path / 'out')]
  assert main(['convert', 'from-t5x', *paths, *flags]) == 2
  assert sorted(tmp_path.iterdir()) == before
  (line,) = capsys.readouterr().err.splitlines()
  return line.replace(str(tmp_path), 'TMP')


def changed(tmp_path, change, model=None):
  """Saves a checkpoint whose tensors were changed."""
  names = written_out(model or Model(DENSE))
  change(names)
  save(tmp_path / 'in', names)


QUERY = 'encoder/layers_1/attention/query/kernel'
HERE = 'TMP/in/checkpoint_100'


def test_a_missing_tensor(tmp_path, capsys):
  changed(tmp_path, lambda names: names.pop(QUERY))
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE} lacks target/{QUERY}; correct the configuration '
    'beside it, or fetch the checkpoint again'
  )


def test_a_surplus_tensor(tmp_path, capsys):
  bias = np.zeros(22, np.float32)
  changed(
    tmp_path,
    lambda names: names.update({'encoder/layers_0/mlp/wi_0/bias': bias}),
  )
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE} holds target/encoder/layers_0/mlp/wi_0/bias, for which the '
    'model that it describes has no place; nothing was converted: the '
    'configuration does not belong to these tensors'
  )


def test_a_transposed_tensor(tmp_path, capsys):
  changed(tmp_path, lambda names: names.update({QUERY: names[QUERY].T}))
  assert refuses(tmp_path, capsys) == (
    f'error: target/{QUERY} of {HERE} is [15, 14] where the configuration '
    'makes it [14, 15]; it seems to be transposed'
  )


def test_a_missing_layer(tmp_path, capsys):
  def drop(names):
    for name in [n for n in names if n.startswith('encoder/layers_1/')]:
      del names[name]

  changed(tmp_path, drop)
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE} lacks target/encoder/layers_1, and has '
    'target/encoder/layers_2; fetch the checkpoint again'
  )


def test_a_missing_and_a_truncated_chunk(dense, tmp_path, capsys):
  path = dense / 'checkpoint_100'
  chunk = path / f'target.{QUERY.replace("/", ".")}' / '1.0'
  whole = chunk.read_bytes()
  chunk.write_bytes(whole[: len(whole) // 2])
  line = refuses(tmp_path, capsys)
  folder = f'{HERE}/{chunk.parent.name}'
  assert line.startswith(f'error: {folder} cannot be read (')
  assert line.endswith('); fetch the checkpoint again')
  chunk.unlink()
  assert refuses(tmp_path, capsys) == (
    f'error: {folder} lacks its chunk 1.0; fetch the checkpoint again'
  )
  (chunk.parent / '.zarray').unlink()
  line = refuses(tmp_path, capsys)
  assert line.startswith(
    f'error: {folder}, which {HERE}/checkpoint names, holds no array ('
  )
  shutil.rmtree(chunk.parent)
  assert refuses(tmp_path, capsys).startswith(f'error: {folder}, which')


def test_a_damaged_and_a_missing_msgpack_file(dense, tmp_path, capsys):
  path = dense / 'checkpoint_100'
  whole = (path / 'checkpoint').read_bytes()
  (path / 'checkpoint').write_bytes(whole[:-40])
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE}/checkpoint is damaged (Unpack failed: incomplete input); '
    'fetch the checkpoint again'
  )
  (path / 'checkpoint').write_bytes(b'model_checkpoint_path: "model.ckpt-7"')
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE}/checkpoint is of a TensorFlow checkpoint (Mesh TensorFlow '
    'T5), not of T5X; convert it with T5X first'
  )
  (path / 'checkpoint').unlink()
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE} lacks its msgpack file `checkpoint`, which lists the '
    'parameters; fetch the checkpoint again'
  )


def test_an_unknown_version(tmp_path, capsys):
  save(tmp_path / 'in', written_out(Model(DENSE)), version=4)
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE}/checkpoint is of version 4, and only versions 2 and 3 of '
    'T5X checkpoints are known; save it again with a T5X that writes one of '
    'them'
  )


def test_folders_without_a_finished_checkpoint(tmp_path, capsys):
  unfinished = tmp_path / 'in/checkpoint_5.tmp-1700000000'
  unfinished.mkdir(parents=True)
  assert refuses(tmp_path, capsys) == (
    'error: TMP/in holds no T5X checkpoint: no checkpoint_STEP that was '
    'finished, nor a file `checkpoint`'
  )
  assert refuses(tmp_path, capsys, source=unfinished) == (
    'error: TMP/in/checkpoint_5.tmp-1700000000 is a checkpoint that was never '
    'finished; give another step'
  )
  assert refuses(tmp_path, capsys, source=tmp_path / 'nowhere') == (
    'error: TMP/nowhere is no directory; give a T5X checkpoint'
  )
  assert refuses(tmp_path, capsys, source='gs://t5-data/switch/8') == (
    'error: gs://t5-data/switch/8 is not on this machine; copy it first, for '
    'example with `gcloud storage cp -r gs://t5-data/switch/8 .`'
  )


def test_a_step_that_is_not_there(dense, tmp_path, capsys):
  path = dense / 'checkpoint_100'
  assert refuses(tmp_path, capsys, '--step=3') == (
    'error: TMP/in has no checkpoint_3; it has 100'
  )
  assert refuses(tmp_path, capsys, '--step=3', source=path) == (
    f'error: {HERE} is of step 100, not 3; leave --step out, or give the '
    'folder above'
  )


def test_a_path_that_leaves_the_checkpoint(tmp_path, capsys):
  path = save(tmp_path / 'in', written_out(Model(DENSE)), orbax=True)
  index = path / 'state/checkpoint'
  place = b'PLACEHOLDER://target.token_embedder.embedding'
  evil = b'PLACEHOLDER:///target.token_embedder/../../x'
  assert len(evil) == len(place) - 1
  index.write_bytes(index.read_bytes().replace(place, evil + b'y'))
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE}/state/checkpoint places target/token_embedder/embedding in '
    "'/target.token_embedder/../../xy', outside of the checkpoint; do not "
    'trust this file'
  )


def test_experts_need_a_preset(st_moe_folder, tmp_path, capsys):
  shutil.copytree(st_moe_folder, tmp_path / 'in')
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE} has experts, and does not say how tokens choose them: add '
    '--preset=NAME, or describe the model with --gin_file (with its shapes go '
    'st_moe_base: top-2, groups of 4096, capacity factors 1.25 and 2, z-loss '
    '1e-4; st_moe_xl: top-2, groups of 1024, capacity factors 2 and 4, z-loss '
    '1e-4; st_moe_32b: top-2, groups of 4096, capacity factors 1.25 and 2, '
    "z-loss 1e-3; st_moe_paper: weights of Mesh TensorFlow: the paper's "
    'router, gates renormalised)'
  )
  assert refuses(tmp_path, capsys, '--preset=st_moe_bose') == (
    'error: --preset=st_moe_bose is unknown; did you mean st_moe_base?; there '
    f'are {", ".join(t5x_presets.PRESETS)}'
  )
  advice = 'choose another, or describe the model with --gin_file'
  for preset, verdict in {
    'switch_base': 'has no gated FFNs (wi_0 and wi_1)',
    'tokens_choose': 'has no FFNs beside the experts (extra_mlp)',
    't5_1_1': 'has no experts',
  }.items():
    assert refuses(tmp_path, capsys, f'--preset={preset}') == (
      f'error: --preset={preset} {verdict}, unlike {HERE}; {advice}'
    )
  both = ['--preset=st_moe_base', '--gin.ModelConfig.d_ff=22']
  assert refuses(tmp_path, capsys, *both) == (
    'error: --preset=st_moe_base and gin files both describe the model; leave '
    'one of them out'
  )


@pytest.mark.usefixtures('dense')
def test_a_dense_checkpoint_is_no_moe(tmp_path, capsys):
  assert refuses(tmp_path, capsys, '--preset=st_moe_base') == (
    f'error: --preset=st_moe_base has experts, unlike {HERE}; choose another, '
    'or describe the model with --gin_file'
  )


def test_other_architectures(tmp_path, capsys):
  def rename(names):
    for name in list(names):
      if name.startswith('encoder/layers_'):
        names[name.replace('layers_', 'block_')] = names.pop(name)

  changed(tmp_path, rename)
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE} has no layers that are known: neither '
    'target/encoder/layers_0 nor target/encoder/encoder nor '
    'target/encoder/layers; only encoder-decoders of T5X and flaxformer can be '
    'converted'
  )


def test_position_biases_must_be_there(tmp_path, capsys):
  name = 'encoder/relpos_bias/rel_embedding'
  changed(tmp_path, lambda names: names.pop(name))
  assert refuses(tmp_path, capsys) == (
    f'error: {HERE} has no relative position biases (target/{name}); only T5 '
    'and models like it can be converted'
  )


def test_attention_that_is_fused_over_joined_heads(tmp_path, capsys):
  name = 'encoder/layers_0/attention/qkv_fused/kernel'

  def join(names):
    for kind in ('query', 'key', 'value'):
      del names[f'encoder/layers_0/attention/{kind}/kernel']
    names[name] = np.zeros((14, 45), np.float32)

  changed(tmp_path, join)
  assert refuses(tmp_path, capsys) == (
    f'error: target/{name} of {HERE} is [14, 45], whose heads are joined with '
    'what is fused; save it with split_head_kernel, or without kernels_to_fuse'
  )


@pytest.mark.usefixtures('dense')
def test_an_output_that_is_there(tmp_path, capsys):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/file').touch()
  assert refuses(tmp_path, capsys) == (
    'error: TMP/out exists already; remove it, or name another output'
  )


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'d_ff': 24}, 'ModelConfig.d_ff 24, the tensors of {} 22'),
    (
      {'mlp_activations': ('relu',)},
      'whether FFNs are gated False, the tensors of {} True',
    ),
    (
      {'sparse_placement': 0, 'decoder_sparse_placement': 't5x'},
      'the sparse layers of the encoder [0], the tensors of {} [3]',
    ),
    (
      {'tie_embeddings': True},
      'ModelConfig.tie_embeddings True, the tensors of {} False',
    ),
    (
      {'decoder_router': dataclasses.replace(
        ROUTER_PRESETS['t5x'], extra_ffn='none'
      )},
      'decoder/RouterConfig.extra_ffn False, the tensors of {} True',
    ),
  ],
)  # fmt: skip
def test_a_gin_file_must_not_contradict(
  changes, said, st_moe_folder, tmp_path, capsys
):
  config = from_t5x.plan(str(st_moe_folder), preset='st_moe_base').config
  gin = tmp_path / 'mine.gin'
  gin.write_text(model_config_text(dataclasses.replace(config, **changes)))
  line = refuses(tmp_path, capsys, f'--gin_file={gin}', source=st_moe_folder)
  said = said.format(st_moe_folder / 'checkpoint_100')
  assert line.startswith(f'error: the gin files say {said}; correct the gin ')
