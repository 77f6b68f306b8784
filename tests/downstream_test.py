"""SuperGLUE from published files: T5's texts, and what is refused.

Where ../shared/data is there, the formats were also compared with t5 0.9.4's
preprocessors; the rows here are invented.
"""

import json
from pathlib import Path

import pytest

from st_moe.config import DataConfig
from st_moe.data import mixtures
from st_moe.data.downstream.catalog import expand, load_examples
from st_moe.data.pipeline import open_data
from st_moe.errors import UserError

REAL = Path(__file__).resolve().parents[2] / 'shared' / 'data'

ROWS = {
  'BoolQ': {'passage': 'Tea is hot.', 'question': 'is tea hot', 'label': True},
  'CB': {'premise': 'It rains.', 'hypothesis': 'It is wet.',
         'label': 'contradiction'},
  'COPA': {'premise': 'He fell.', 'choice1': 'Ice.', 'choice2': 'Sun.',
           'question': 'cause', 'label': 0},
  'RTE': {'premise': 'A.', 'hypothesis': 'B.', 'label': 'not_entailment'},
  'WiC': {'word': 'run', 'sentence1': 'A run.', 'sentence2': 'They run.',
          'label': False},
  'WSC': {'text': 'Ann met Sue because she called.', 'label': True, 'target': {
    'span1_text': 'Sue', 'span1_index': 2,
    'span2_text': 'she', 'span2_index': 4}},
  'MultiRC': {'idx': 3, 'passage': {'text': '<b>One</b><br>day.', 'questions': [
    {'question': 'When?', 'idx': 0, 'answers': [
      {'text': 'Then', 'idx': 0, 'label': 1},
      {'text': 'Never', 'idx': 1, 'label': 0}]}]}},
  'ReCoRD': {'idx': 5, 'passage': {
    'text': 'Bob saw Al.\n@highlight\nAl ran', 'entities': [
      {'start': 8, 'end': 9}, {'start': 0, 'end': 2},
      {'start': 23, 'end': 24}]},
    'qas': [{'query': '@placeholder ran', 'idx': 9, 'answers': [
      {'start': 8, 'end': 9, 'text': 'Al'},
      {'start': 0, 'end': 2, 'text': 'Bob'}]}]},
}  # fmt: skip

TEXTS = {
  'boolq': [('boolq passage: Tea is hot. question: is tea hot', 'True')],
  'cb': [('cb hypothesis: It is wet. premise: It rains.', 'contradiction')],
  'copa': [
    ('copa choice1: Ice. choice2: Sun. premise: He fell. question: cause',
     'choice1')
  ],
  'rte': [('rte hypothesis: B. premise: A.', 'not_entailment')],
  'wic': [('wic sentence1: A run. sentence2: They run. word: run', 'False')],
  'wsc': [('wsc: Ann met Sue because *she* called.', 'Sue')],
  'multirc': [
    ('multirc question: When? answer: Then paragraph: One day.', 'True'),
    ('multirc question: When? answer: Never paragraph: One day.', 'False'),
  ],
  'record': [
    ('record query: @placeholder ran entities: Al, Bob passage: Bob saw Al. '
     'Al ran', answer)
    for answer in ('Al', 'Bob')
  ],
}  # fmt: skip


def write(root, rows=ROWS):
  for folder, row in rows.items():
    for split in ('train', 'val'):
      path = root / folder / f'{split}.jsonl'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(row) + '\n')


def config(root, **settings):
  return DataConfig(task_dir=str(root), **settings)


@pytest.mark.parametrize('name', TEXTS)
def test_the_texts_of_t5(tmp_path, name):
  write(tmp_path / 'superglue')
  examples = load_examples(f'superglue.{name}', 'train', config(tmp_path))
  assert [(e.inputs, e.targets) for e in examples] == TEXTS[name]


def test_held_out_rows_are_scored_once_and_whatever_their_label(tmp_path):
  write(tmp_path, {'WSC': ROWS['WSC'] | {'label': False}, **{
    'ReCoRD': ROWS['ReCoRD']}})  # fmt: skip
  settings = config(tmp_path)
  (wsc,) = load_examples('superglue.wsc', 'validation', settings)
  assert (wsc.targets, wsc.label) == ('Sue', 0)
  with pytest.raises(UserError, match='no example of superglue.wsc'):
    load_examples('superglue.wsc', 'train', settings)
  (record,) = load_examples('superglue.record', 'validation', settings)
  assert record.answers == ('Al', 'Bob')
  assert record.choices == ('Al', 'Bob')


def test_a_pronoun_at_another_place_is_found(tmp_path):
  target = ROWS['WSC']['target'] | {'span2_index': 5}
  text = 'Ann met Sue because she, too, called.'
  write(tmp_path, {'WSC': ROWS['WSC'] | {'target': target, 'text': text}})
  (example,) = load_examples('superglue.wsc', 'train', config(tmp_path))
  assert example.inputs == 'wsc: Ann met Sue because *she* , too, called.'


def test_what_is_attached_to_a_pronoun_stays(tmp_path):
  row = ROWS['WSC'] | {
    'text': 'Ann met Sue. "Good for her," she said.',
    'target': ROWS['WSC']['target'] | {'span2_text': 'her', 'span2_index': 5},
  }
  write(tmp_path, {'WSC': row})
  (example,) = load_examples('superglue.wsc', 'train', config(tmp_path))
  assert example.inputs == 'wsc: Ann met Sue. "Good for *her* ," she said.'


@pytest.mark.parametrize(
  ('folder', 'row', 'message'),
  [
    ('WSC', ROWS['WSC'] | {'target': ROWS['WSC']['target'] | {
      'span2_text': 4}}, "WSC/train.jsonl:1: the row has no text 'span2_text'"),
    ('WSC', ROWS['WSC'] | {'target': ROWS['WSC']['target'] | {
      'span1_text': 4}}, "WSC/train.jsonl:1: the row has no text 'span1_text'"),
    ('MultiRC', {'passage': {'text': 4, 'questions': []}, 'idx': 0},
     'MultiRC/train.jsonl:1: the row has no passage.text'),
    ('ReCoRD', ROWS['ReCoRD'] | {'qas': [{'query': 'q', 'idx': 0}]},
     "ReCoRD/train.jsonl:1: the row has no 'answers', which training needs"),
  ],
)  # fmt: skip
def test_a_row_of_another_shape_is_named(tmp_path, folder, row, message):
  write(tmp_path, {folder: row})
  with pytest.raises(UserError) as error:
    load_examples(f'superglue.{folder.lower()}', 'train', config(tmp_path))
  assert message in str(error.value)


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"premise": ', 'CB/train.jsonl:2: not JSON'),
    ('[1]', 'CB/train.jsonl:2: not a JSON object'),
    ('{"premise": "a"}', "CB/train.jsonl:2: the row has no text 'hypothesis'"),
    ('{"premise": "a", "hypothesis": "b"}', "no 'label', which training needs"),
    ('{"premise": "a", "hypothesis": "b", "label": "no"}',
     "label 'no' is none of entailment, contradiction, neutral"),
  ],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path, line, message):
  write(tmp_path)
  with (tmp_path / 'CB' / 'train.jsonl').open('a') as file:
    file.write(line + '\n')
  with pytest.raises(UserError) as error:
    load_examples('superglue.cb', 'train', config(tmp_path))
  assert message in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
  with pytest.raises(UserError, match='needs DataConfig.task_dir'):
    load_examples('superglue.cb', 'train', DataConfig())
  with pytest.raises(UserError, match='there is no CB/train.jsonl in'):
    load_examples('superglue.cb', 'train', config(tmp_path))
  with pytest.raises(UserError, match='there is no folder'):
    load_examples('superglue.cb', 'train', config(tmp_path / 'no'))


def test_tasks_are_mixed_in_proportion_to_their_examples(tmp_path):
  write(tmp_path)
  parts = mixtures.parse(config(tmp_path, task='superglue'))
  sizes = {part.name: part.rate for part in parts}
  assert list(sizes) == list(expand('superglue'))
  assert sizes['superglue.multirc'] == 2
  assert sizes['superglue.cb'] == 1
  capped = config(tmp_path, task='superglue', max_examples_per_task=1)
  assert {part.rate for part in mixtures.parse(capped)} == {1}
  own = config(tmp_path, task='superglue.cb:3,superglue.rte:1')
  assert [part.rate for part in mixtures.parse(own)] == [3, 1]


def test_batches_hold_the_texts_and_go_on_where_they_were(tmp_path, caplog):
  write(tmp_path)
  settings = config(
    tmp_path, task='superglue', vocabulary='byte', inputs_length=64,
    targets_length=16,
  )  # fmt: skip
  data = open_data(settings, seed=0, cache_root=tmp_path)
  assert 'superglue.record: 2 of 2 inputs to train on have more' in caplog.text
  batches = data.train_batches(4)
  rows = [next(batches) for _ in range(6)]
  texts = {
    data.vocabulary.decode(row)
    for batch in rows
    for row in batch['decoder_target_tokens']
  }
  assert texts <= {text for pairs in TEXTS.values() for _, text in pairs}
  assert len(texts) > 3
  again = data.train_batches(4)
  for _ in range(3):
    next(again)
  state = again.get_state()
  resumed = data.train_batches(4)
  resumed.set_state(state)
  for name, value in next(resumed).items():
    assert (value == rows[3][name]).all()
  (held_out,) = data.eval_batches(16, 1)
  assert held_out['decoder_loss_weights'].sum() > 0


@pytest.mark.skipif(not REAL.is_dir(), reason='no ../shared/data')
def test_the_published_files_have_their_numbers_of_examples():
  counts = {
    name: tuple(
      len(load_examples(f'superglue.{name}', split, config(REAL)))
      for split in ('train', 'validation')
    )
    for name in ('cb', 'copa', 'multirc', 'rte', 'wic', 'wsc')
  }
  assert counts == {
    'cb': (250, 56), 'copa': (400, 100), 'multirc': (27243, 4848),
    'rte': (2490, 277), 'wic': (5428, 638), 'wsc': (259, 104),
  }  # fmt: skip


def test_a_referent_is_written_as_in_its_text(tmp_path):
  row = ROWS['WSC'] | {'text': 'The old cat bit Sue when she fell.'}
  for referent, index, wanted in (
    ('the old cat.', 0, 'The old cat'),
    ('Old\ncat', 1, 'old cat'),
    ('the dog', 0, 'the dog'),
    ('Sue and the cat', 40, 'Sue and the cat'),
  ):
    target = row['target'] | {'span1_text': referent, 'span1_index': index}
    write(tmp_path / str(index) / wanted, {'WSC': row | {'target': target}})
    (example,) = load_examples(
      'superglue.wsc', 'train', config(tmp_path / str(index) / wanted)
    )
    assert example.targets == wanted
