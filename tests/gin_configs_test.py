"""Every gin file of the package: read, resolved, built, and described."""

import functools
import math
import re

import pytest

from st_moe import gin_files
from st_moe.bindings import Binding, operative_config
from st_moe.config import RunConfig
from st_moe.gin_files import load_config, parse_flag, read_file

MODELS = sorted(
  path.stem for path in (gin_files.GIN_ROOT / 'models').glob('*.gin')
)
ABLATIONS = sorted(
  path.relative_to(gin_files.GIN_ROOT).as_posix()
  for path in (gin_files.GIN_ROOT / 'ablations').rglob('*.gin')
)
# Files of a complete run, with the macros that have no default.
RUNS = {
  'quickstart': (['runs/quickstart.gin'], []),
  'pretrain': (
    ['models/st_moe_l.gin', 'runs/pretrain.gin'],
    ['VOCABULARY=spiece.model'],
  ),
  'small': (['models/tiny.gin', 'runs/small.gin'], []),
  'finetune_sparse': (
    ['models/st_moe_l.gin', 'runs/finetune_sparse.gin'],
    ['TASK=text', 'DataConfig.files=a.txt'],
  ),
  'finetune_dense': (
    ['models/dense_l.gin', 'runs/finetune_dense.gin'],
    ['TASK=text', 'DataConfig.files=a.txt'],
  ),
  'evaluate': (['models/st_moe_l.gin', 'runs/evaluate.gin'], ['TASK=c4']),
}

# Parameters, and what the source prints: Table 11 for the paper's models, the
# model card for Switch-base. XL has no printed size.
PARAMETERS = {
  'tiny': (2_920_448, None),
  'base': (700_641_024, None),
  'dense_l': (783_150_080, 0.8e9),
  'st_moe_l': (4_105_444_352, 4.1e9),
  'dense_xl': (2_849_757_184, None),
  'st_moe_xl': (14_930_163_712, None),
  'st_moe_32b': (269_104_613_376, 269e9),
  'switch_base': (619_339_008, 619e6),
}
SIZES = {
  'vocab_size',
  'd_model',
  'd_ff',
  'd_kv',
  'num_heads',
  'num_encoder_layers',
  'num_decoder_layers',
  'num_experts',
}
UNITS = {'million': 1e6, 'billion': 1e9}


def flags(texts: list[str]) -> list[Binding]:
  return [parse_flag(text) for text in texts]


def load_run(name: str, *more: str) -> RunConfig:
  files, texts = RUNS[name]
  return load_config([*files, *more], flags(texts))


def header(name: str) -> str:
  """Returns the comment that opens a file, without its marks."""
  lines = gin_files.find(name).read_text(encoding='utf-8').splitlines()
  comment = []
  for line in lines:
    if not line.startswith('#'):
      break
    comment.append(line.removeprefix('#').strip())
  return '\n'.join(comment)


@functools.cache
def abstract_parameters(files: tuple[str, ...]) -> dict:
  """Returns the parameter shapes of a model; nothing is allocated."""
  import jax
  import jax.numpy as jnp

  from st_moe.transformer import EncoderDecoder

  model = EncoderDecoder(load_config(files).model)
  inputs = jax.ShapeDtypeStruct((8, 512), jnp.int32)
  targets = jax.ShapeDtypeStruct((8, 114), jnp.int32)
  return jax.eval_shape(
    lambda key, x, y: model.init(key, x, y, y, train=False)['params'],
    jax.random.key(0),
    inputs,
    targets,
  )


def count(parameters: dict) -> int:
  import jax

  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))


def test_the_models_and_runs_of_the_house_are_there():
  assert set(PARAMETERS) == set(MODELS)
  assert set(RUNS) == {
    path.stem for path in (gin_files.GIN_ROOT / 'runs').glob('*.gin')
  }
  assert len(ABLATIONS) >= 10


@pytest.mark.parametrize('name', MODELS)
def test_a_model_has_the_parameters_of_its_source(name):
  expected, printed = PARAMETERS[name]
  built = count(abstract_parameters((f'models/{name}.gin',)))
  assert built == expected
  if printed:
    # 0.8B is printed with one digit; 783 million is 2.1% away.
    assert built == pytest.approx(printed, rel=0.025)


@pytest.mark.parametrize('name', MODELS)
def test_a_model_says_its_size_in_its_first_line(name):
  first = header(f'models/{name}.gin').splitlines()[0]
  size, unit = re.search(r'([\d.]+) (million|billion)', first).groups()
  digits = len(size.partition('.')[2])
  assert round(PARAMETERS[name][0] / UNITS[unit], digits) == float(size)


@pytest.mark.parametrize('name', MODELS)
def test_a_model_file_sets_the_model_and_nothing_else(name):
  bindings = read_file(gin_files.find(f'models/{name}.gin'))
  classes = {b.name.rpartition('.')[0].rpartition('/')[2] for b in bindings}
  allowed = {'ModelConfig', 'RouterConfig'}
  if name == 'st_moe_32b':  # no device holds it: a mesh is part of it
    allowed |= {'MeshConfig'}
  assert classes <= allowed
  # One given after another must replace its size whole.
  assert {f'ModelConfig.{field}' for field in SIZES} <= {
    b.name for b in bindings
  }


@pytest.mark.parametrize('name', ['st_moe_l', 'st_moe_xl', 'st_moe_32b'])
def test_the_paper_s_models_route_as_the_paper_did(name):
  model = load_config([f'models/{name}.gin']).model
  assert (model.encoder_router.group_size, model.decoder_router.group_size) == (
    4 * 512,
    4 * 114,
  )
  assert model.encoder_router.train_capacity_factor == 1.25
  assert model.encoder_router.eval_capacity_factor == 2.0
  assert model.encoder_router.num_choices == 2
  assert model.encoder_router.extra_ffn == 'after'
  # Six sparse layers in each stack, section 7.
  assert model.num_encoder_layers // model.sparse_every == 6
  assert model.num_decoder_layers // model.sparse_every == 6


def test_switch_base_is_hugging_face_s():
  model = load_config(['models/switch_base.gin']).model
  assert model.tie_embeddings
  assert model.mlp_activations == ('relu',)
  assert (model.sparse_every, model.sparse_placement) == (2, 'hf')
  for router in (model.encoder_router, model.decoder_router):
    assert (router.num_choices, router.fixed_capacity) == (1, 64)
    assert router.extra_ffn == 'none'


@pytest.mark.parametrize('name', RUNS)
def test_a_run_resolves_and_its_operative_config_alone_gives_it_again(
  name, tmp_path
):
  config = load_run(name)
  alone = tmp_path / 'config.gin'
  alone.write_text(operative_config(config))
  assert load_config([str(alone)]) == config
  assert operative_config(load_config([str(alone)])) == operative_config(config)


@pytest.mark.parametrize('name', RUNS)
def test_a_run_opens_with_its_contract(name):
  text = header(f'runs/{name}.gin')
  command = name.split('_')[0]
  command = command if command in ('evaluate', 'finetune') else 'pretrain'
  assert f'st_moe {command}' in text
  for promise in ('Cost', 'You see', 'Macros'):
    assert promise in text
  own = [b for b in read_file(gin_files.find(f'runs/{name}.gin')) if b.is_macro]
  assert own
  for macro in own:
    assert re.search(rf'^ *{macro.name} ', text, re.MULTILINE), macro.name


def test_recipes_of_fine_tuning():
  # Figure 6 and Table 20: tokens of a batch (512 inputs), learning rate.
  sparse, dense = load_run('finetune_sparse'), load_run('finetune_dense')
  for run, tokens, rate in ((sparse, 2**16, 1e-3), (dense, 2**18, 1e-4)):
    assert run.data.lengths == {'encoder': 512, 'decoder': 62}
    assert run.batch_size * run.data.inputs_length == tokens
    assert run.optimizer.learning_rate == rate
    assert run.optimizer.schedule == 'constant'
    assert run.model.dropout_rate == 0.1
  for router in (sparse.model.encoder_router, sparse.model.decoder_router):
    assert router.expert_dropout_rate == 0.4
    assert router.train_capacity_factor == 1.25
    assert router.eval_capacity_factor == 2.0
    assert router.balance_loss_weight > 0


@pytest.mark.parametrize(
  'name',
  ['quickstart', 'small', 'pretrain', 'finetune_sparse', 'finetune_dense'],
)
def test_a_training_run_exposes_the_common_macros(name):
  bindings = read_file(gin_files.find(f'runs/{name}.gin'))
  macros = {b.name for b in bindings if b.is_macro}
  assert {'TASK', 'STEPS', 'BATCH_SIZE', 'LEARNING_RATE', 'SEED'} <= macros
  files, texts = RUNS[name]
  texts = [*texts, 'TASK=text', 'DataConfig.files=a.txt']
  texts += ['STEPS=70', 'BATCH_SIZE=16', 'LEARNING_RATE=0.5', 'SEED=3']
  config = load_config(files, flags(texts))
  assert config.data.task == 'text'
  assert (config.steps, config.batch_size, config.seed) == (70, 16, 3)
  assert config.optimizer.learning_rate == 0.5


@pytest.mark.parametrize('name', ['quickstart', 'small', 'pretrain'])
def test_a_run_s_lengths_are_what_span_corruption_fills(name):
  # Raw windows of t tokens become d inputs and n targets: T5's rule, mean span
  # 3 and density 0.15, end of sequence included.
  def lengths(tokens):
    noise = round(tokens * 0.15)
    spans = max(1, round(noise / 3))
    return tokens - noise + spans + 1, noise + spans + 1

  data = load_run(name).data
  window = data.inputs_length
  while lengths(window + 1)[0] <= data.inputs_length:
    window += 1
  assert lengths(window) == (data.inputs_length, data.targets_length)


@pytest.mark.parametrize('name', ['quickstart', 'small', 'pretrain'])
def test_a_run_s_vocabulary_fits_its_model(name):
  config = load_run(name)
  ids = config.data.auto_vocabulary_size + config.data.extra_ids
  assert ids <= config.model.vocab_size


@pytest.mark.parametrize('name', ABLATIONS)
def test_an_ablation_is_one_to_five_lines(name):
  lines = gin_files.find(name).read_text().splitlines()
  comments = [line for line in lines if line.startswith('#')]
  bound = [line for line in lines if line and not line.startswith('#')]
  assert len(comments) == 1
  assert 1 <= len(bound) <= 5
  assert len(read_file(gin_files.find(name))) == len(bound)


@pytest.mark.parametrize('name', ['router_hf_switch', 'router_t5x'])
def test_routers_of_others_build(name):
  files = ('models/tiny.gin', f'ablations/{name}.gin')
  assert count(abstract_parameters(files)) > 0


@pytest.mark.parametrize('name', gin_files.names())
def test_no_value_is_set_twice_along_an_include_chain(name):
  names = [binding.name for binding in read_file(gin_files.find(name))]
  assert len(names) == len(set(names))


@pytest.mark.parametrize('name', gin_files.names())
def test_a_run_is_at_most_three_files(name):
  included = re.findall(
    r"^include '(.*)'", gin_files.find(name).read_text(), re.MULTILINE
  )
  # A run may bring its model; an ablation is the third file.
  group = name.split('/')[1]
  assert len(included) <= (1 if group == 'runs' else 0)
  assert all(file.startswith('models/') for file in included)


@pytest.mark.parametrize('name', gin_files.names())
def test_a_file_opens_with_a_line_for_the_list(name):
  first = header(name).splitlines()[0]
  assert first.endswith('.')
  assert len(first) <= 78
