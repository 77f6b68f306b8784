"""Which tokens go to which expert: decisions, numbers, files, command line."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_models import DENSE, write_run
from tiny_model import (
  ROUTER,
  init_params,
  place,
  tiny_batch,
  tiny_config,
)

from st_moe import partitioning
from st_moe.config import DataConfig, MeshConfig, RouterConfig, RunConfig
from st_moe.data.vocabularies import load_vocabulary
from st_moe.errors import UserError
from st_moe.main import main
from st_moe.moe import MoeLayer
from st_moe.stacking import STACKS, stack_layers
from st_moe.trace import statistics, texts, words, writing
from st_moe.trace.recording import StackRecord, record, with_capacity
from st_moe.transformer import apply_model

BYTES = load_vocabulary('byte', extra_ids=100)
SPARSE = tiny_config(sparse_every=1, vocab_size=384)
TIGHT = dataclasses.replace(ROUTER, eval_capacity_factor=0.5)


def one_device():
  return partitioning.make_mesh(MeshConfig(), jax.devices()[:1])


def traced(config, params=None, batches=None, mesh=None):
  mesh = mesh or one_device()
  params = init_params(config) if params is None else params
  return record(
    config, params, batches or [tiny_batch()], mesh, lambda done: None
  )


# MARK: decisions


@pytest.mark.parametrize('kind', ['token_choice', 'expert_choice'])
def test_a_layer_tells_what_it_did(kind):
  router = RouterConfig(
    kind=kind, group_size=8, eval_capacity_factor=0.75, min_expert_capacity=1
  )
  layer = MoeLayer(4, 8, ('gelu',), router)
  x = jax.random.normal(jax.random.key(0), (2, 8, 4))
  mask = jnp.arange(8)[None] < jnp.array([8, 5])[:, None]
  params = layer.init(jax.random.key(1), x, mask, train=False)
  plain, without = layer.apply(params, x, mask, train=False)
  y, stats = layer.apply(params, x, mask, train=False, record=True)
  np.testing.assert_array_equal(y, plain)
  assert without.decisions is None
  made = stats.decisions
  assert made.expert.shape == made.kept.shape
  assert made.expert.shape[:2] == (2, 8)

  wanted = np.asarray(made.wanted)
  assert not wanted[~np.asarray(mask)].any()
  load = np.bincount(np.asarray(made.expert)[wanted], minlength=4)
  np.testing.assert_allclose(load / load.sum(), stats.expert_load, rtol=1e-6)
  lost = np.asarray(mask & ~made.kept.any(-1)).sum() / 13
  np.testing.assert_allclose(lost, stats.fraction_dropped, rtol=1e-6)
  assert lost > 0
  # A token's experts are in the order of their gates.
  gate = np.where(wanted, made.gate, -1.0)
  assert (np.diff(gate, axis=-1) <= 0).all()


def assert_same_records(actual, expected):
  assert actual.keys() == expected.keys() == set(STACKS)
  for stack in STACKS:
    for field in dataclasses.fields(StackRecord):
      a, b = (getattr(x[stack], field.name) for x in (actual, expected))
      if field.name == 'gate':
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
      else:
        np.testing.assert_array_equal(a, b, field.name)


def test_scanned_and_written_out_models_give_the_same_record():
  config = tiny_config(sparse_every=1)
  params = init_params(config)
  scanned = dataclasses.replace(config, scan_layers=True)
  whole = traced(config, params)
  assert whole['encoder'].layers == (0, 1)
  assert whole['encoder'].expert.shape == (2, 8, 10, 2)
  assert whole['decoder'].expert.shape == (2, 8, 6, 2)
  assert_same_records(traced(scanned, stack_layers(params, config)), whole)


@pytest.mark.parametrize('axis_types', ['auto', 'explicit'])
def test_any_mesh_gives_the_record_of_one_device(axis_types):
  # A group is one sequence, so that it does not depend on the devices.
  config = tiny_config(TIGHT, num_encoder_layers=2, num_decoder_layers=2)
  params, alone = init_params(config), None
  alone = traced(config, params)
  mesh_config = MeshConfig(data=2, expert=2, model=2, axis_types=axis_types)
  mesh = partitioning.make_mesh(mesh_config)
  placed = place(params, config, mesh, mesh_config)
  assert_same_records(traced(config, placed, mesh=mesh), alone)
  assert (alone['encoder'].wanted & ~alone['encoder'].kept).any()


def test_rows_of_zeros_are_left_out_and_padding_decides_nothing():
  router = dataclasses.replace(ROUTER, mask_padding=False)  # padding is routed
  config = tiny_config(router, sparse_every=1)
  batch = tiny_batch()
  half = {
    k: np.where(np.arange(8)[:, None] < 3, v, 0) for k, v in batch.items()
  }
  both = traced(config, batches=[batch, half])['decoder']
  assert both.tokens.shape == (11, 6)
  np.testing.assert_array_equal(
    both.tokens[8:], batch['decoder_input_tokens'][:3]
  )
  np.testing.assert_array_equal(both.real, both.targets > 0)
  assert not both.wanted[:, ~both.real].any()
  assert both.wanted[:, both.real, 0].all()


def test_capacity_is_that_of_evaluation_of_training_or_none():
  router = dataclasses.replace(
    ROUTER, eval_capacity_factor=4.0, train_capacity_factor=0.5
  )
  config = tiny_config(router, sparse_every=1)

  def dropped(capacity, config=config):
    found = traced(with_capacity(config, capacity))['encoder']
    return (found.wanted & ~found.kept).sum()

  assert dropped('eval') == 0 < dropped('train')
  tight = tiny_config(TIGHT, sparse_every=1)
  assert dropped('eval', tight) > 0 == dropped('none', tight)


# MARK: words


def test_tokens_have_the_class_of_their_word():
  pieces = [
    '▁The', '▁king', '▁walk', 'ed', '▁to', '▁Lond', 'on', ',', '▁and', '▁don',
    "'", 't', '▁say', '▁"', 'He', '▁is', '▁', 'Mary', "'s", '.',
    '▁<extra_id_0>', '▁Forty', '-', 'two', '▁red', '▁1', '2', '▁morning',
    '▁Well', '▁"', '</s>',
  ]  # fmt: skip
  assert list(zip(pieces, words.classify(pieces), strict=True)) == [
    ('▁The', 'conjunction or article'),
    ('▁king', 'other'),
    ('▁walk', 'verb'),
    ('ed', 'verb'),
    ('▁to', 'preposition'),
    ('▁Lond', 'name'),
    ('on', 'name'),
    (',', 'punctuation'),
    ('▁and', 'conjunction or article'),
    ('▁don', 'verb'),
    ("'", 'verb'),
    ('t', 'verb'),
    ('▁say', 'verb'),
    ('▁"', 'punctuation'),
    ('He', 'pronoun'),
    ('▁is', 'verb'),
    ('▁', 'name'),
    ('Mary', 'name'),
    ("'s", 'name'),
    ('.', 'punctuation'),
    ('▁<extra_id_0>', 'sentinel'),
    ('▁Forty', 'number'),
    ('-', 'punctuation'),
    ('two', 'number'),
    ('▁red', 'visual'),
    ('▁1', 'number'),
    ('2', 'number'),
    ('▁morning', 'other'),
    ('▁Well', 'name'),
    ('▁"', 'punctuation'),
    ('</s>', 'special'),
  ]


def test_a_word_that_begins_a_sentence_is_no_name():
  assert words.word_class('Irene', begins_sentence=False) == 'name'
  assert words.word_class('Irene', begins_sentence=True) == 'other'
  assert words.classify(['▁Yes', '.', '▁Rain']) == [
    'other',
    'punctuation',
    'other',
  ]


def test_pieces_of_bytes_are_letters_with_marks_for_spaces():
  ids = [*BYTES.encode('a é'), BYTES.sentinel_id(3), BYTES.eos_id, 999]
  assert [BYTES.piece(i) for i in ids] == [
    'a', '▁', '<0xC3>', '<0xA9>', '<extra_id_3>', '</s>', '<unk>',
  ]  # fmt: skip


# MARK: numbers


def by_hand():
  """One layer, two experts; 'ab' thrice, the third without a slot."""
  a, b, mark = BYTES.encode('a')[0], BYTES.encode('b')[0], BYTES.sentinel_id(0)
  tokens = np.array([[a, b, a, b], [a, mark, mark, 0]], np.int32)
  first = np.array([[0, 1, 0, 1], [0, 1, 0, 0]])
  wanted = np.zeros((2, 4, 2), bool)
  wanted[..., 0] = tokens > 0
  wanted[0, 0, 1] = True  # one second choice
  kept = wanted.copy()
  kept[0, 3] = False  # reaches no expert
  kept[0, 0, 1] = False  # loses its second choice only
  return StackRecord(
    layers=(5,),
    tokens=tokens,
    targets=None,
    real=tokens > 0,
    expert=np.stack([first, 1 - first], axis=-1)[None].astype(np.int16),
    gate=np.full((1, 2, 4, 2), 0.5, np.float32),
    wanted=wanted[None],
    kept=kept[None],
  )


def test_numbers_are_those_counted_by_hand():
  found = statistics.describe({'encoder': by_hand()}, BYTES, 2, shown_rows=1)
  assert found['uniform_entropy'] == math.log(2)
  stack = found['stacks']['encoder']
  assert (stack['tokens'], stack['sentinels']) == (7, 2)
  (layer,) = stack['layers']
  assert layer['layer'] == 5
  assert [
    {k: e[k] for k in ('expert', 'first', 'other', 'kept', 'dropped', 'load')}
    for e in layer['experts']
  ] == [
    {'expert': 0, 'first': 4, 'other': 0, 'kept': 4, 'dropped': 0, 'load': 0.5},
    {'expert': 1, 'first': 3, 'other': 1, 'kept': 2, 'dropped': 2, 'load': 0.5},
  ]
  assert layer['entropy'] == pytest.approx(
    {
      'sentinels': math.log(2),  # one to each
      'others': -(0.6 * math.log(0.6) + 0.4 * math.log(0.4)),  # 3 and 2
      'all_choices_sentinels': math.log(2),
      'all_choices_others': math.log(2),  # the second choice evens them out
    }
  )
  assert (layer['unrouted'], layer['unrouted_share']) == (1, 1 / 7)
  assert layer['unrouted_tokens'] == [{'piece': 'b', 'count': 1, 'of': 2}]
  # Three of expert 0's four tokens are a, of which there are three among seven.
  assert layer['experts'][0]['tokens'][0] == {
    'id': BYTES.encode('a')[0],
    'piece': 'a',
    'count': 3,
    'of': 3,
    'lift': pytest.approx(7 / 4),
  }
  assert layer['experts'][0]['examples'][0] == {
    'before': '', 'token': 'a', 'after': 'bab',
  }  # fmt: skip
  assert layer['experts'][1]['class_lift']['sentinel'] == pytest.approx(7 / 6)
  (row,) = found['rows']
  assert row['encoder']['layers'] == [
    {
      'expert': [[0, 1], [1, -1], [0, -1], [1, -1]],
      'gate': [[50, 50], [50, 0], [50, 0], [50, 0]],
      'dropped': [[0, 1], [3, 0]],
    }
  ]


def test_an_expert_is_named_for_what_it_takes_mostly():
  tokens = np.array([[BYTES.sentinel_id(0)] * 30 + BYTES.encode('x') * 70])
  first = np.array([[0] * 24 + [1] * 6 + [2] * 70])
  wanted = np.ones((1, 1, 100, 1), bool)
  found = statistics.describe(
    {
      'encoder': StackRecord(
        layers=(0,),
        tokens=tokens.astype(np.int32),
        targets=None,
        real=tokens > 0,
        expert=first[None, ..., None].astype(np.int16),
        gate=np.ones((1, 1, 100, 1), np.float32),
        wanted=wanted,
        kept=wanted,
      )
    },
    BYTES,
    3,
    shown_rows=1,
  )
  experts = found['stacks']['encoder']['layers'][0]['experts']
  # Expert 1 has nothing but sentinels, but too few to say so.
  assert [e['specialised'] for e in experts] == [['sentinel'], [], []]


def test_entropy_of_nothing_is_none():
  assert statistics.entropy(np.array([0, 0])) is None
  assert statistics.entropy(np.array([5, 0])) == 0.0


# MARK: text


def lines_of(tmp_path, text, num_rows=100, **data):
  path = tmp_path / 'lines.txt'
  path.write_text(text, encoding='utf-8')
  settings = {'vocabulary': 'byte', 'inputs_length': 16, 'targets_length': 8}
  config = RunConfig(data=DataConfig(**(settings | data)))
  return texts.read_lines(path, BYTES, config, num_rows)


def test_lines_are_masked_and_long_ones_go_on(tmp_path):
  found = lines_of(tmp_path, 'a river runs past the mill\n\nx\n')
  inputs = [BYTES.decode(row['encoder_input_tokens']) for row in found.rows]
  targets = [BYTES.decode(row['decoder_target_tokens']) for row in found.rows]
  assert len(inputs) == 3  # the first line is two windows
  assert inputs[2] == 'x'  # nothing can be masked of one token
  restored = ''
  for masked, spans in zip(inputs[:2], targets[:2], strict=True):
    kept, span = masked.split('<extra_id_0>')[0], spans.split('<extra_id_0>')
    assert '<extra_id_0>' in masked
    after = masked.split('<extra_id_0>')[1]
    restored += kept + span[1].split('<extra_id_')[0] + after
  assert restored == 'a river runs past the mill'
  again = lines_of(tmp_path, 'a river runs past the mill\n')
  np.testing.assert_array_equal(
    again.rows[0]['encoder_input_tokens'], found.rows[0]['encoder_input_tokens']
  )


def test_sentinels_in_a_line_that_is_masked_are_refused(tmp_path):
  with pytest.raises(UserError, match='lines.txt, line 2: it has sentinels'):
    lines_of(tmp_path, 'a\nb <extra_id_0> c\n')
  assert lines_of(tmp_path, 'b <extra_id_0>\t<extra_id_0> c\n').rows


def test_pairs_are_taken_as_they_are(tmp_path, caplog):
  found = lines_of(tmp_path, 'ab\tcd\n' + 'y' * 40 + '\tz\n')
  row = found.rows[0]
  assert BYTES.decode(row['encoder_input_tokens']) == 'ab'
  assert BYTES.decode(row['decoder_target_tokens']) == 'cd'
  assert found.cut == 1
  assert 'are longer than a row and were cut' in caplog.text


def test_batches_are_filled_and_each_process_has_its_part(tmp_path):
  found = lines_of(tmp_path, 'ab\tcd\nef\tgh\nij\tkl\n')
  whole = list(found.batches(4, index=0, count=1))
  assert [len(b['encoder_input_tokens']) for b in whole] == [4]
  assert not whole[0]['encoder_input_tokens'][3].any()
  parts = [list(found.batches(4, index=i, count=2))[0] for i in (0, 1)]
  for name, value in whole[0].items():
    np.testing.assert_array_equal(
      np.concatenate([part[name] for part in parts]), value
    )


# MARK: the command


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp('trace') / 'run'
  write_run(path, SPARSE)
  return path


TEXT = (
  'Mary walked to the mill, and "two" dogs ran.\nAB<extra_id_0>\tcd </script>\n'
)


@pytest.fixture(scope='module')
def output(run, tmp_path_factory):
  folder = tmp_path_factory.mktemp('out')
  (folder / 'lines.txt').write_text(TEXT)
  argv = ['trace', f'--checkpoint={run}', f'--input={folder}/lines.txt']
  argv += [f'--output={folder}/trace', '--gin.RunConfig.batch_size=8']
  argv += ['--gin.DataConfig.inputs_length=64']
  assert main(argv) == 0
  return folder / 'trace'


def test_the_files_of_a_trace(output):
  found = json.loads((output / 'trace.json').read_text())
  assert found['source']['step'] == 7
  assert found['source']['rows'] == 2
  encoder = found['stacks']['encoder']
  assert [layer['layer'] for layer in encoder['layers']] == [0, 1]
  # To bytes a sentinel is twelve letters; 'AB' and the end are three more.
  inputs = found['rows'][0]['encoder']['tokens']
  assert encoder['tokens'] == len(inputs) + 15
  for layer in encoder['layers']:
    first = sum(expert['first'] for expert in layer['experts'])
    assert first == encoder['tokens']
    shares = sum(expert['load'] for expert in layer['experts'])
    assert shares == pytest.approx(1)
  text = (output / 'trace.md').read_text()
  assert '## decoder layer 1' in text
  assert f'ln 4 = {math.log(4):.3f}' in text
  # The text of the page cannot end its data.
  html = (output / 'trace.html').read_text()
  assert html.count('</script>') == 2
  assert 'http://' not in html.replace('http://www.w3.org/2000/svg', '')
  assert 'https://' not in html


def test_a_summary_for_each_layer(run, output, capsys):
  from rich.console import Console

  found = json.loads((output / 'trace.json').read_text())
  writing.print_summary(found, Console())
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == (
    'entropy of first choices in nats, 1.39 is even use of 4 experts; max load '
    'is of all choices'
  )
  assert 'takes mostly' in lines[1] and '...' not in '\n'.join(lines)
  assert [line.split('  ')[0] for line in lines[2:6]] == [
    'encoder 0', 'encoder 1', 'decoder 0', 'decoder 1',
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('flags', 'error'),
  [
    (['--input=nowhere.txt'], '--input=nowhere.txt does not exist'),
    (['--batches=0'], '--batches=0 must be at least 1'),
    (['--output=/etc/hosts/no'], '/etc/hosts is a file'),
    (['--step=3'], 'step 3'),
  ],
)
def test_wrong_words_are_one_line(run, capsys, monkeypatch, flags, error):
  monkeypatch.chdir(run.parent)
  assert main(['trace', f'--checkpoint={run}', *flags]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert lines[0].startswith('error: ')
  assert error in lines[0]


def test_a_dense_model_has_nothing_to_trace(tmp_path, capsys):
  write_run(tmp_path / 'dense', DENSE)
  (tmp_path / 'a.txt').write_text('some text\n')
  argv = [
    'trace',
    f'--checkpoint={tmp_path}/dense',
    f'--input={tmp_path}/a.txt',
  ]
  assert main([*argv, '--gin.RunConfig.batch_size=8']) == 2
  assert 'this model is dense' in capsys.readouterr().err


def test_experts_that_choose_always_have_a_capacity():
  router = dataclasses.replace(ROUTER, kind='expert_choice')
  config = tiny_config(encoder_router=router)
  with pytest.raises(Exception, match='always have a capacity'):
    with_capacity(config, 'none')


def test_recording_changes_nothing_of_the_model():
  config = tiny_config(sparse_every=1)
  params, batch = init_params(config), tiny_batch()

  @functools.partial(jax.jit, static_argnums=1)
  def logits(params, record):
    return apply_model(config, params, batch, train=False, record=record).logits

  np.testing.assert_allclose(
    logits(params, True), logits(params, False), rtol=1e-6
  )
