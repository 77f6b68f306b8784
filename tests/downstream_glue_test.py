"""GLUE from its published tables: T5's texts, and what is refused.

The rows are invented. Tables of real sentences, read by tfds' own builders and
turned into texts by t5 0.9.4's preprocessors, gave the same texts.
"""

import pytest

from st_moe.config import DataConfig
from st_moe.data import mixtures
from st_moe.data.downstream.catalog import expand, load_examples
from st_moe.errors import UserError

_MNLI = (
  'index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\t'
  'sentence2_binary_parse\tsentence1_parse\tsentence2_parse\t'
  'sentence1\tsentence2\tlabel1\tgold_label\n'
)
_STSB = (
  'index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\t'
  'sentence1\tsentence2\tscore\n'
)

# As published: no header in CoLA, quotes that mean nothing.
TABLES = {
  'CoLA': 'gj04\t1\t\tHe "ran.\ngj04\t0\t*\tRan he.\n',
  'SST-2': 'sentence\tlabel\na fine film \t1\n',
  'MRPC': (
    'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n'
    '1\t11\t12\tHe ran.\tHe fled.\n'
  ),
  'STS-B': f'{_STSB}0\tg\tf\ty\t1\ts\ts\tA dog.\tA cat.\t2.500\n',
  'QQP': (
    'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n'
    '5\t1\t2\tWhy me?\tWhy?\t0\n6\t1\t2\tbroken\n7\t1\t2\tWho?\tWho\t1\n'
  ),
  'MNLI': f'{_MNLI}0\t1\t1n\tg\tp\tp\tp\tp\tIt rains.\tWet.\te\tneutral\n',
  'QNLI': 'index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n',
  'RTE': 'index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n',
  'WNLI': 'index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t0\n',
}
MNLI = [('mnli hypothesis: Wet. premise: It rains.', 'neutral', 1, 0)]
# (inputs, targets, label, number of the row)
EXAMPLES = {
  'cola': [
    ('cola sentence: He "ran.', 'acceptable', 1, 0),
    ('cola sentence: Ran he.', 'unacceptable', 0, 1),
  ],
  'sst2': [('sst2 sentence: a fine film ', 'positive', 1, 0)],
  'mrpc': [('mrpc sentence1: He ran. sentence2: He fled.', 'equivalent', 1, 0)],
  'stsb': [('stsb sentence1: A dog. sentence2: A cat.', '2.4', None, 0)],
  'qqp': [
    ('qqp question1: Why me? question2: Why?', 'not_duplicate', 0, 0),
    ('qqp question1: Who? question2: Who', 'duplicate', 1, 2),
  ],
  'mnli_matched': MNLI,
  'mnli_mismatched': MNLI,
  'qnli': [('qnli question: Who? sentence: He.', 'not_entailment', 1, 0)],
  'rte': [('rte sentence1: A. sentence2: B.', 'entailment', 0, 0)],
  'wnli': [('wnli sentence1: A. sentence2: B.', 'not_entailment', 0, 0)],
}


def write(root):
  for folder, text in TABLES.items():
    (root / folder).mkdir(parents=True)
    (root / folder / 'train.tsv').write_text(text)
    for dev in ('dev', 'dev_matched', 'dev_mismatched'):
      (root / folder / f'{dev}.tsv').write_text(text)


def config(root, **settings):
  return DataConfig(task_dir=str(root), **settings)


def load(root, name, split='validation'):
  return load_examples(f'glue.{name}', split, config(root))


@pytest.mark.parametrize('name', EXAMPLES)
def test_the_texts_of_t5(tmp_path, name):
  write(tmp_path / 'glue')
  found = load(tmp_path, name)
  assert [(e.inputs, e.targets, e.label, e.idx) for e in found] == EXAMPLES[
    name
  ]
  if name == 'mnli_mismatched':
    with pytest.raises(UserError, match="no split 'train' .it has validation,"):
      load(tmp_path, name, 'train')
  else:
    assert load(tmp_path, name, 'train') == found


def test_scores_of_stsb_are_rounded_for_the_model_only(tmp_path):
  write(tmp_path)
  row = '0\tg\tf\ty\t1\ts\ts\tA\tB\t{}\n'
  scores = ('3.800', '0.3', '0.1', '4.999', '5', '3.100')
  path = tmp_path / 'STS-B' / 'train.tsv'
  path.write_text(_STSB + ''.join(row.format(score) for score in scores))
  found = load(tmp_path, 'stsb', 'train')
  # 0.3 and 3.1 are 1.5 and 15.5 fifths: to the even number, in float32.
  assert [e.targets for e in found] == [
    '3.8',
    '0.4',
    '0.0',
    '5.0',
    '5.0',
    '3.2',
  ]
  assert [e.answers for e in found] == [
    ('3.8',), ('0.3',), ('0.1',), ('4.999',), ('5.0',), ('3.1',)
  ]  # fmt: skip


def test_test_sets_have_no_labels(tmp_path):
  tables = {
    'CoLA': ('index\tsentence\n0\tHe ran.\n', 'cola'),
    'STS-B': (f'{_STSB}0\tg\tf\ty\t1\ts\ts\tA\tB\n', 'stsb'),
    'QNLI': ('index\tquestion\tsentence\n0\tWho?\tHe.\n', 'qnli'),
  }
  tables['STS-B'] = (tables['STS-B'][0].replace('\tscore', ''), 'stsb')
  for folder, (text, name) in tables.items():
    (tmp_path / folder).mkdir()
    (tmp_path / folder / 'test.tsv').write_text(text)
    (example,) = load(tmp_path, name, 'test')
    assert (example.targets, example.labelled) == ('<unk>', False)
  assert load(tmp_path, 'cola', 'test')[0].inputs == 'cola sentence: He ran.'


def test_mrpc_from_the_files_of_its_authors(tmp_path):
  rows = ''.join(f'{i % 2}\t{i}\t{i + 9}\tA{i}\tB{i}\n' for i in range(4))
  header = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n'
  folder = tmp_path / 'MRPC'
  folder.mkdir()
  for split in ('train', 'test'):
    (folder / f'msr_paraphrase_{split}.txt').write_text(header + rows)
  with pytest.raises(UserError, match='mrpc_dev_ids.tsv is not there'):
    load(tmp_path, 'mrpc')
  (folder / 'mrpc_dev_ids.tsv').write_text('2\t11\n')
  assert [(e.inputs, e.label, e.idx) for e in load(tmp_path, 'mrpc')] == [
    ('mrpc sentence1: A2 sentence2: B2', 0, 2)
  ]
  assert [e.idx for e in load(tmp_path, 'mrpc', 'train')] == [0, 1, 3]
  assert {e.label for e in load(tmp_path, 'mrpc', 'test')} == {None}


@pytest.mark.parametrize(
  ('name', 'line', 'message'),
  [
    ('RTE', '1\tA.\tB.', "RTE/train.tsv:3: 3 values between tabs, and no 'la"),
    ('RTE', '1\tA.\tB.\tmaybe', "RTE/train.tsv:3: label 'maybe' is none of"),
    ('RTE', '1\tA.\tB.\t', "RTE/train.tsv:3: the row has no 'label', which"),
    ('RTE', '1\tA.\tB.\t2', 'RTE/train.tsv:3: label 2 is none of entailment'),
    ('STS-B', '0\tg\tf\ty\t1\ts\ts\tA\tB\thigh', "score 'high' is no number"),
    (
      'STS-B',
      '0\tg\tf\ty\t1\ts\ts\tA\tB\t',
      "no 'score', which training needs",
    ),
  ],
)
def test_a_broken_line_is_named(tmp_path, name, line, message):
  write(tmp_path)
  with (tmp_path / name / 'train.tsv').open('a') as file:
    file.write(line + '\n')
  with pytest.raises(UserError) as error:
    load(tmp_path, name.replace('-', '').lower(), 'train')
  assert message in str(error.value)


def test_bytes_that_are_no_text_and_missing_files_are_named(tmp_path):
  write(tmp_path)
  (tmp_path / 'RTE' / 'dev.tsv').write_bytes(b'index\tsent\xffence1\n')
  with pytest.raises(UserError, match=r'RTE/dev.tsv:1: not UTF-8 \(byte 0xff'):
    load(tmp_path, 'rte')
  with pytest.raises(UserError, match='there is no RTE/test.tsv in'):
    load(tmp_path, 'rte', 'test')


def test_lines_of_qqp_that_are_no_rows_are_counted(tmp_path, caplog):
  write(tmp_path)
  load(tmp_path, 'qqp', 'train')
  assert 'QQP/train.tsv: lines without all columns, left out: 1' in caplog.text


def test_the_mixture_counts_the_training_rows_of_mnli_once(tmp_path):
  write(tmp_path)
  parts = mixtures.parse(config(tmp_path, task='glue'))
  assert tuple(part.name for part in parts) == expand('glue')
  rates = {part.name: part.rate for part in parts}
  assert 'glue.wnli' not in rates
  assert (rates['glue.cola'], rates['glue.mnli_matched']) == (2, 1)
  capped = config(tmp_path, task='glue', max_examples_per_task=1)
  assert {part.rate for part in mixtures.parse(capped)} == {1}
