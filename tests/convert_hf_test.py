"""Models of transformers in and out: the same numbers, the same bytes."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from st_moe import partitioning, trees
from st_moe.checkpoint import ArrayReader
from st_moe.config import MeshConfig, ModelConfig, RouterConfig
from st_moe.convert import from_hf, hf_reference
from st_moe.convert.own_models import open_model
from st_moe.data.vocabularies import train_vocabulary
from st_moe.decoding import generate
from st_moe.main import main
from st_moe.transformer import apply_model, encode

GOLDEN = Path(__file__).parent / 'golden_hf'
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
ONE_DEVICE = MeshConfig(data=1, expert=1, model=1)
TOLERANCE = 1e-4  # of float32 logits
INPUTS = (
  'encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens'
)  # fmt: skip


def maker():
  """Returns tests/golden_hf/make.py; skips where it cannot be imported."""
  for name in ('torch', 'transformers'):
    pytest.importorskip(name, reason=f'{name} makes the models')
  spec = importlib.util.spec_from_file_location('make', GOLDEN / 'make.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def run(*argv) -> None:
  assert main([str(word) for word in argv]) == 0


def fails(capsys, *argv) -> str:
  """Returns the one line with which a command ends that changes nothing."""
  assert main([str(word) for word in argv]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  return line.removeprefix('error: ')


def copy(case: str, place: Path) -> Path:
  return shutil.copytree(GOLDEN / case, place / 'source')


def edit_config(folder: Path, **changes) -> None:
  path = folder / 'config.json'
  content = json.loads(path.read_text()) | changes
  path.write_text(json.dumps(content))


def edit_tensors(folder: Path, change) -> None:
  """Rewrites model.safetensors after `change(tensors)`."""
  path = folder / 'model.safetensors'
  tensors = dict(safetensors_numpy.load_file(path))
  change(tensors)
  safetensors_numpy.save_file(
    {n: np.ascontiguousarray(x) for n, x in tensors.items()}, path
  )


def assert_same_model(
  config: ModelConfig, params, batch: dict[str, np.ndarray]
) -> None:
  """Compares encoder output, logits and generated tokens with the batch's."""
  inputs = {name: batch[name] for name in INPUTS}
  tokens = inputs['encoder_input_tokens']
  encoded = encode(config, params, tokens)
  logits = apply_model(config, params, inputs, train=False).logits
  real = tokens > 0
  assert np.abs(encoded - batch['encoded'])[real].max() < TOLERANCE
  real = inputs['decoder_target_tokens'] > 0
  assert np.abs(logits - batch['logits'])[real].max() < TOLERANCE
  generated = generate(
    config, params, tokens, max_length=batch['generated'].shape[1]
  )
  np.testing.assert_array_equal(generated, batch['generated'])


def load(folder: Path):
  mesh = partitioning.make_mesh(ONE_DEVICE, jax.devices()[:1])
  return from_hf.load(folder, mesh, ONE_DEVICE)


# Compiling generation takes long: two cases stand for all in fast runs.
FAST = ('t5_v1_1', 'switch_step_4')


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(case, marks=() if case in FAST else pytest.mark.slow)
    for case in CASES
  ],
)
def test_outputs_and_generation_are_those_of_transformers(case):
  batch = dict(np.load(GOLDEN / case / 'batch.npz'))
  assert_same_model(*load(GOLDEN / case), batch)


def test_the_capacity_of_the_switch_models_is_what_drops_their_tokens():
  case = GOLDEN / 'switch_step_4'
  config, params = load(case)
  assert config.encoder_router.fixed_capacity == 2
  router = dataclasses.replace(config.encoder_router, eval_dropless=True)
  roomy = dataclasses.replace(config, encoder_router=router)
  batch = np.load(case / 'batch.npz')
  tokens = batch['encoder_input_tokens']
  difference = encode(roomy, params, tokens) - batch['encoded']
  assert np.abs(difference)[tokens > 0].max() > 0.01


ODD_SIZES = {
  'vocab_size': 101,
  'd_model': 28,
  'd_kv': 7,
  'd_ff': 45,
  'num_heads': 5,
  'relative_attention_num_buckets': 17,
  'relative_attention_max_distance': 50,
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_other_sizes_where_torch_is(case, tmp_path):
  make = maker()
  model_type, settings = make.CASES[case]
  model = make.make_model(model_type, make.SIZES | ODD_SIZES | settings, 100)
  model.save_pretrained(tmp_path)
  batch = make.make_batch(ODD_SIZES['vocab_size'], 100)
  assert_same_model(*load(tmp_path), batch | make.outputs(model, batch))


@pytest.mark.parametrize('case', CASES)
def test_there_and_back_gives_the_same_bytes(case, tmp_path):
  there, back = tmp_path / 'there', tmp_path / 'back'
  run('convert', 'from-hf', GOLDEN / case, there, '--no_check')
  run('convert', 'to-hf', there, back)
  want = safetensors_numpy.load_file(GOLDEN / case / 'model.safetensors')
  have = safetensors_numpy.load_file(back / 'model.safetensors')
  assert {n: (x.dtype, x.shape, x.tobytes()) for n, x in have.items()} == {
    n: (x.dtype, x.shape, x.tobytes()) for n, x in want.items()
  }
  # The configuration says the same model too.
  again = from_hf.understand(back).model
  assert again == from_hf.understand(GOLDEN / case).model
  assert 'dtype' in json.loads((there / 'model.json').read_text())


def test_transformers_reads_what_we_export(tmp_path):
  make = maker()
  for case in ('t5_v1_1', 't5_relu_tied', 'switch_uneven'):
    run('convert', 'from-hf', GOLDEN / case, tmp_path / case, '--no_check')
    out = tmp_path / f'{case}_back'
    run('convert', 'to-hf', tmp_path / case, out, '--max_shard_size=20KB')
    assert len(list(out.glob('model-*-of-*.safetensors'))) > 1
    batch = dict(np.load(GOLDEN / case / 'batch.npz'))
    want, found = (
      make.outputs(
        make.transformers.AutoModelForSeq2SeqLM.from_pretrained(path).eval(),
        {n: batch[n] for n in INPUTS},
      )
      for path in (GOLDEN / case, out)
    )
    np.testing.assert_array_equal(found['logits'], want['logits'])
    np.testing.assert_array_equal(found['generated'], batch['generated'])


def params_of(path: Path) -> dict[str, np.ndarray]:
  arrays = ArrayReader(path, None)
  return {name: arrays.read(name) for name in arrays.tensors}


def test_a_scanned_model_on_a_mesh_is_the_same_model(tmp_path):
  case = GOLDEN / 'switch_step_2'
  run(
    'convert', 'from-hf', case, tmp_path / 'scanned',
    '--gin.ModelConfig.scan_layers=True', '--mesh=data=8,expert=1,model=1',
    '--gin.ModelConfig.vocab_size=37', '--no_check',
  )  # fmt: skip
  run('convert', 'from-hf', case, tmp_path / 'plain', '--no_check')
  plain, scanned = (
    params_of(tmp_path / 'plain'),
    params_of(tmp_path / 'scanned'),
  )
  name = 'layers_{}/moe/expert/wi/kernel'
  np.testing.assert_array_equal(
    scanned['encoder/superblocks/layer_1/moe/expert/wi/kernel'],
    [plain[f'encoder/{name.format(i)}'] for i in (1, 3)],
  )
  run('convert', 'to-hf', tmp_path / 'scanned', tmp_path / 'back')
  want = safetensors_numpy.load_file(case / 'model.safetensors')
  have = safetensors_numpy.load_file(tmp_path / 'back' / 'model.safetensors')
  assert {n: x.tobytes() for n, x in have.items()} == {
    n: x.tobytes() for n, x in want.items()
  }


def test_the_fixed_batch_is_run_and_recorded(tmp_path, caplog):
  for form in ('False', 'True'):
    out = tmp_path / form
    run(
      'convert', 'from-hf', GOLDEN / 'switch_step_2', out,
      f'--gin.ModelConfig.scan_layers={form}',
    )  # fmt: skip
    text = caplog.text
    assert '109 tensors used, 0 passed over, 93 parameters filled' in text
    assert f'--gin.INITIAL_CHECKPOINT={out} --gin.VOCABULARY=VOCABULARY' in text
    record = json.loads((out / 'model.json').read_text())['fixed_batch']
    for name in ('no capacity', 'capacity 4'):
      if 'reference' not in record:  # torch and transformers are here
        assert record[name]['logits'] < TOLERANCE
        assert record[name]['encoded'] < TOLERANCE
      else:
        assert record[name]['largest_logit'] > 0.1


def test_transformers_is_left_out_where_memory_is_short(monkeypatch):
  maker()
  monkeypatch.setattr(hf_reference, '_available', lambda: 10**9)
  assert hf_reference.why_absent(0) is None
  assert hf_reference.why_absent(1 << 30) == (
    'transformers needs 1.6 GB of memory, and 1 GB are free'
  )


def test_a_full_model_is_exported_with_our_names(tmp_path, caplog):
  out, export = tmp_path / 'sparse', tmp_path / 'export'
  run('convert', 'from-hf', GOLDEN / 'switch_step_2', out, '--no_check',
      '--gin.RouterConfig.capacity_formula=tokens',
      '--gin.RouterConfig.fixed_capacity=None',
      '--gin.ModelConfig.scan_layers=True')  # fmt: skip
  run('convert', 'to-hf', out, export, '--dtype=float32')
  assert 'transformers has no class for this model' in caplog.text
  content = json.loads((export / 'config.json').read_text())
  assert (content['format'], content['format_version']) == ('st_moe', 1)
  assert content['sparse_layers'] == {'encoder': [1, 3], 'decoder': [1, 3]}
  assert content['model']['d_model'] == 12
  have = safetensors_numpy.load_file(export / 'model.safetensors')
  opened = open_model(out, None)
  stacked = opened.reader.read(
    'encoder/superblocks/layer_1/moe/expert/wi/kernel'
  )
  np.testing.assert_array_equal(
    have['encoder.layers_3.moe.expert.wi.kernel'], stacked[1]
  )
  assert have['token_embedder.embedding'].shape == (37, 12)
  # As docs/export.md says it is run.
  fields = dict(content['model'])
  for stack in ('encoder', 'decoder'):
    fields[f'{stack}_router'] = RouterConfig(**fields[f'{stack}_router'])
  config = ModelConfig(**fields | {'scan_layers': False})
  params = trees.nested({n.replace('.', '/'): x for n, x in have.items()})
  batch = np.load(GOLDEN / 'switch_step_2' / 'batch.npz')
  logits = apply_model(
    config, params, {name: batch[name] for name in INPUTS}, train=False
  ).logits
  assert logits.shape == batch['logits'].shape


# What is refused: one line, and nothing is left.

TENSOR = 'encoder.block.0.layer.0.SelfAttention.q.weight'


def _rename(tensors):
  tensors['encoder.block.7.layer.0.SelfAttention.q.weight'] = tensors[TENSOR]


DAMAGES = {
  'missing': (lambda t: t.pop(TENSOR), 'lacks encoder.block.0.layer.0.Self'),
  'surplus': (_rename, 'holds encoder.block.7'),
  'transposed': (
    lambda t: t.update({TENSOR: t[TENSOR].T}),
    'is [12, 15] where the configuration makes it [15, 12]; it seems to be '
    'transposed',
  ),
  'not finite': (
    lambda t: t.update({TENSOR: t[TENSOR] * np.float32('inf')}),
    'holds infinities or NaN',
  ),
  'a copy that is none': (
    lambda t: t.update({'encoder.embed_tokens.weight': t['shared.weight'] + 1}),
    'differs from shared.weight',
  ),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_tensors_are_one_line_and_nothing_is_written(
  damage, tmp_path, capsys
):
  change, message = DAMAGES[damage]
  source = copy('t5_v1_1', tmp_path)
  edit_tensors(source, change)
  out = tmp_path / 'out'
  assert message in fails(capsys, 'convert', 'from-hf', source, out)
  assert [path.name for path in tmp_path.iterdir()] == ['source']


def test_a_truncated_file_is_one_line_and_nothing_is_written(tmp_path, capsys):
  source = copy('t5_v1_1', tmp_path)
  path = source / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-1])
  line = fails(capsys, 'convert', 'from-hf', source, tmp_path / 'out')
  assert f'{path} is no whole safetensors file' in line
  assert [path.name for path in tmp_path.iterdir()] == ['source']


def test_copies_of_the_embedding_and_the_unused_bias_are_passed_over(
  tmp_path, caplog
):
  source = copy('t5_relu_tied', tmp_path)
  bias = 'decoder.block.0.layer.{}.relative_attention_bias.weight'

  def add(tensors):
    for name in ('encoder.embed_tokens', 'decoder.embed_tokens', 'lm_head'):
      tensors[f'{name}.weight'] = tensors['shared.weight']
    tensors[bias.format('1.EncDecAttention')] = tensors[
      bias.format('0.SelfAttention')
    ]

  edit_tensors(source, add)
  run('convert', 'from-hf', source, tmp_path / 'out', '--no_check')
  assert (
    '4 passed over (1 a position bias that cross-attention never used; 3 equal '
    'to shared.weight)'
  ) in caplog.text


def test_an_embedding_under_its_second_name_is_used_not_passed_over(
  tmp_path, caplog
):
  source = copy('t5_relu_tied', tmp_path)

  def rename(tensors):
    tensors['encoder.embed_tokens.weight'] = tensors.pop('shared.weight')

  edit_tensors(source, rename)
  run('convert', 'from-hf', source, tmp_path / 'out', '--no_check')
  assert ' tensors used, 0 passed over, ' in caplog.text


def test_an_mt5_without_a_head_is_read_as_the_version_that_wrote_it(tmp_path):
  source = copy('mt5', tmp_path)
  edit_tensors(source, lambda tensors: tensors.pop('lm_head.weight'))
  edit_config(source, tie_word_embeddings=True, transformers_version='5.23.0')
  config, params = load(source)
  assert not config.tie_embeddings
  np.testing.assert_array_equal(
    params['decoder']['logits_dense']['kernel'].T,
    params['token_embedder']['embedding'],
  )
  edit_config(source, transformers_version='4.57.1')
  assert load(source)[0].tie_embeddings


def test_a_vocabulary_that_is_none_is_refused(tmp_path, capsys):
  source, out = copy('t5_v1_1', tmp_path), tmp_path / 'out'
  (source / 'spiece.model').write_bytes(b'junk')
  line = fails(capsys, 'convert', 'from-hf', source, out)
  assert 'spiece.model' in line and 'SentencePiece' in line
  text = [f'{chr(97 + i % 26)}{i} and {i * 7}' for i in range(500)]
  train_vocabulary(text, 40, source / 'spiece.model')
  assert '40 pieces, and the model 37 embeddings' in fails(
    capsys, 'convert', 'from-hf', source, out
  )
  assert not out.exists()


def test_a_model_that_computes_something_else_is_no_success(
  tmp_path, capsys, caplog, monkeypatch
):
  def zeros(folder, batch, capacity):
    rows, inputs = batch['encoder_input_tokens'].shape
    targets = batch['decoder_target_tokens'].shape[1]
    return {
      'encoded': np.zeros((rows, inputs, 12)),
      'logits': np.zeros((rows, targets, 37)),
    }

  monkeypatch.setattr(hf_reference, 'why_absent', lambda _: None)
  monkeypatch.setattr(hf_reference, 'run_in_child', zeros)
  out = tmp_path / 'out'
  line = fails(capsys, 'convert', 'from-hf', GOLDEN / 't5_v1_1', out)
  assert 'was written, and does not compute what transformers does' in line
  assert 'train it further' not in caplog.text
  record = json.loads((out / 'model.json').read_text())
  assert record['fixed_batch']['no capacity']['agrees'] is False


CONTRADICTIONS = [
  ('--gin.ModelConfig.d_model=16', 'd_model 16 contradicts'),
  ('--gin.ModelConfig.tie_embeddings=True', 'which says False'),
  ('--mesh=expart=2', "'expart=2' is not AXIS=SIZE"),
  (
    '--mesh=data=4,expert=1,model=2',
    'ModelConfig.num_heads 3 is not divisible by MeshConfig.model 2',
  ),
]


@pytest.mark.parametrize('flag, message', CONTRADICTIONS)
def test_flags_that_contradict_the_tensors_are_refused(
  flag, message, tmp_path, capsys
):
  case, out = GOLDEN / 't5_v1_1', tmp_path / 'out'
  assert message in fails(capsys, 'convert', 'from-hf', case, out, flag)
  assert not out.exists()


def test_a_vocabulary_without_rows_in_the_model_is_refused(
  tmp_path, capsys, caplog
):
  out = tmp_path / 'out'
  run('convert', 'from-hf', GOLDEN / 't5_v1_1', out, '--no_check')
  assert f'{out} has no vocabulary: put that file' in caplog.text
  assert 'as vocabulary.model, or give it' in caplog.text
  words = ['predict', f'--checkpoint={out}', '--prompt=a']
  assert main([str(word) for word in words]) == 2
  assert 'give --gin.DataConfig.vocabulary=FILE' in capsys.readouterr().err
  assert main([*words, '--gin.DataConfig.vocabulary=byte']) == 2
  error = capsys.readouterr().err
  assert 'the vocabulary byte has 359 ids, sentinels included, but' in error


def test_what_exists_is_not_overwritten(tmp_path, capsys):
  (tmp_path / 'mine').write_text('here')
  for kind in ('from-hf', 'to-hf'):
    line = fails(capsys, 'convert', kind, GOLDEN / 'mt5', tmp_path)
    assert 'exists already' in line
  line = fails(capsys, 'convert', 'to-hf', GOLDEN / 'mt5', tmp_path / 'out')
  assert 'holds no model' in line


def test_trees_of_loaded_parameters_have_every_name():
  config, params = load(GOLDEN / 'mt5')
  assert not config.tie_embeddings
  assert trees.by_name(params)['decoder/logits_dense/kernel'].shape == (12, 37)
