"""DPR in WSC's format, the diagnostic sets, T5's mixture of SuperGLUE."""

import json

import pytest
from downstream_test import ROWS, config, write

from st_moe.data import mixtures
from st_moe.data.downstream.catalog import expand, load_examples, members
from st_moe.data.pipeline import open_data
from st_moe.errors import UserError

DPR = """Bob told Tom that he was late.
he
Bob,Tom
Tom

He saw it, and it was red.
it
the car, the sky
the car

"""


def write_dpr(root, text=DPR):
  for split in ('train', 'test'):
    path = root / 'DPR' / f'{split}.c.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_diagnostics(root):
  rows = {
    'AX-b': [
      {'sentence1': 'A cat sat.', 'sentence2': 'It sat.', 'idx': 4,
       'label': 'not_entailment', 'logic': 'Negation'},
    ],
    'AX-g': [
      {'premise': f'The cook said {one} slept.', 'hypothesis': 'It slept.',
       'idx': i, 'pair_id': 7, 'label': 'entailment'}
      for i, one in enumerate(('he', 'she'))
    ],
  }  # fmt: skip
  for name, each in rows.items():
    (root / name).mkdir(parents=True)
    text = ''.join(json.dumps(row) + '\n' for row in each)
    (root / name / f'{name}.jsonl').write_text(text)


def test_dpr_has_the_format_of_wsc(tmp_path):
  write_dpr(tmp_path)
  examples = load_examples('superglue.dpr', 'train', config(tmp_path))
  assert [(e.inputs, e.targets, e.choices) for e in examples] == [
    ('wsc: Bob told Tom that *he* was late.', 'Tom', ('Bob', 'Tom')),
    ('wsc: He saw *it*, and it was red.', 'the car', ('the car', 'the sky')),
  ]


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (DPR.replace('he\n', '', 1), 'DPR/train.c.txt:1: 3 lines before an empty'),
    (DPR.replace('the car\n\n', 'a car\n\n'), "DPR/train.c.txt:6: 'a car' is"),
    (DPR.replace('Bob,Tom', 'Tom'), 'none of the two candidates'),
  ],
)
def test_a_broken_row_of_dpr_is_named(tmp_path, text, message):
  write_dpr(tmp_path, text)
  with pytest.raises(UserError) as error:
    load_examples('superglue.dpr', 'train', config(tmp_path))
  assert message in str(error.value)


def test_diagnostic_sets_have_the_format_of_rte(tmp_path):
  write_diagnostics(tmp_path / 'superglue')
  for split in ('validation', 'test'):
    (axb,) = load_examples('superglue.axb', split, config(tmp_path))
    assert axb.inputs == 'rte hypothesis: It sat. premise: A cat sat.'
    assert (axb.targets, axb.label, axb.idx) == ('not_entailment', 1, 4)
  pair = load_examples('superglue.axg', 'test', config(tmp_path))
  assert [(e.inputs, e.label, e.group) for e in pair] == [
    ('rte hypothesis: It slept. premise: The cook said he slept.', 0, '7'),
    ('rte hypothesis: It slept. premise: The cook said she slept.', 0, '7'),
  ]
  with pytest.raises(UserError, match="no split 'train' .it has validation, t"):
    load_examples('superglue.axb', 'train', config(tmp_path))


def test_task_dir_may_be_the_folder_of_the_task(tmp_path):
  write(tmp_path)
  own = config(tmp_path / 'CB')
  assert len(load_examples('superglue.cb', 'train', own)) == 1
  # The folder of another task is not read, though RTE's rows look alike.
  with pytest.raises(UserError, match='there is no RTE/train.jsonl in'):
    load_examples('superglue.rte', 'train', own)


def test_the_mixture_of_t5_is_not_capped_and_trains_on_dpr(tmp_path):
  write(tmp_path)
  write_dpr(tmp_path)
  settings = config(
    tmp_path, task='superglue_t5', max_examples_per_task=1, vocabulary='byte',
    inputs_length=96, targets_length=16,
  )  # fmt: skip
  rates = {part.name: part.rate for part in mixtures.parse(settings)}
  assert tuple(rates) == members('superglue_t5')
  assert rates['superglue.dpr'] == rates['superglue.multirc'] == 2
  assert expand('superglue_t5') == expand('superglue')
  data = open_data(settings, seed=0, cache_root=tmp_path)
  batches = data.train_batches(8)
  read = {
    data.vocabulary.decode(row)
    for _ in range(8)
    for row in next(batches)['encoder_input_tokens']
  }
  assert 'wsc: Bob told Tom that *he* was late.' in read
  held_out = {
    data.vocabulary.decode(row)
    for batch in data.eval_batches(16, 4)
    for row in batch['encoder_input_tokens']
  }
  assert any(text.startswith('wsc: Ann') for text in held_out)
  assert not any(text.startswith('wsc: Bob') for text in held_out)


def test_a_task_of_a_mixture_may_be_scored_only(tmp_path):
  write(tmp_path, {'RTE': ROWS['RTE']})
  write_diagnostics(tmp_path)
  settings = config(
    tmp_path, task='superglue.rte:1,superglue.axg:99', vocabulary='byte',
    inputs_length=96, targets_length=24,
  )  # fmt: skip
  data = open_data(settings, seed=0, cache_root=tmp_path)
  (held_out,) = data.eval_batches(4, 1)
  texts = [data.vocabulary.decode(r) for r in held_out['encoder_input_tokens']]
  # seqio ends where the first of its tasks does.
  assert texts[:2] == [
    f'rte hypothesis: It slept. premise: The cook said {one} slept.'
    for one in ('he', 'she')
  ]
  trained = next(data.train_batches(4))['encoder_input_tokens']
  assert {data.vocabulary.decode(row) for row in trained} == {
    'rte hypothesis: B. premise: A.'
  }
