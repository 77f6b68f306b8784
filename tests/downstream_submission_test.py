"""Submission files: right answers give back the labels of published files."""

import json

import pytest

from st_moe.config import DataConfig
from st_moe.data.downstream import catalog, submission
from st_moe.data.downstream.example import Example
from st_moe.errors import UserError

FILES = {
  'boolq': 'BoolQ', 'cb': 'CB', 'copa': 'COPA', 'multirc': 'MultiRC',
  'record': 'ReCoRD', 'rte': 'RTE', 'wic': 'WiC', 'wsc': 'WSC',
}  # fmt: skip
WORDS = {
  'boolq': {True: 'true', False: 'false'},
  'wic': {True: 'true', False: 'false'},
  'wsc': {True: 'True', False: 'False'},
}


def right_answers(examples):
  return [
    example.answers[0] if example.label is None else example.label
    for example in examples
  ]


def wanted(name, rows):
  """What is to be sent, from the published rows."""
  if name == 'multirc':
    return [
      {'idx': row['idx'], 'passage': {'questions': [
        {'idx': question['idx'], 'answers': [
          {'idx': answer['idx'], 'label': answer['label']}
          for answer in question['answers']]}
        for question in row['passage']['questions']]}}
      for row in rows
    ]  # fmt: skip
  if name == 'record':
    return [
      {'idx': query['idx'], 'label': min(a['text'] for a in query['answers'])}
      for row in rows
      for query in row['qas']
    ]
  words = WORDS.get(name, {})
  return [
    {'idx': row['idx'], 'label': words.get(row['label'], row['label'])}
    if name != 'copa'
    else {'idx': row['idx'], 'label': row['label']}
    for row in rows
  ]


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize('name', FILES)
def test_right_answers_are_the_published_labels(shared_data, tmp_path, name):
  config = DataConfig(task_dir=str(shared_data))
  full = f'superglue.{name}'
  examples = catalog.load_examples(full, 'validation', config)
  submission.check(full, examples)
  path = submission.write(tmp_path, full, right_answers(examples), examples)
  assert path.name == f'{FILES[name]}.jsonl'
  rows = read(catalog.find_file(full, 'validation', config))
  assert read(path) == wanted(name, rows)


def test_invalid_answers_are_sent_as_the_first_label(tmp_path):
  examples = [Example('', '', idx=i) for i in range(3)]
  path = submission.write(tmp_path, 'superglue.wic', [-1, 1, 0], examples)
  assert [row['label'] for row in read(path)] == ['false', 'true', 'false']


@pytest.mark.parametrize(
  ('name', 'file'), [('superglue.axb', 'AX-b'), ('superglue.axg', 'AX-g')]
)
def test_diagnostics_are_sent_as_words(tmp_path, name, file):
  examples = [Example('', '', idx=i) for i in range(2)]
  path = submission.write(tmp_path, name, [1, 0], examples)
  assert path.name == f'{file}.jsonl'
  assert read(path) == [
    {'idx': 0, 'label': 'not_entailment'},
    {'idx': 1, 'label': 'entailment'},
  ]


def test_what_a_whole_submission_also_has():
  assert submission.missing([f'superglue.{name}' for name in FILES]) == [
    'AX-b',
    'AX-g',
  ]


@pytest.mark.parametrize('idx', [None, {'passage': 3, 'query': None}])
def test_rows_without_a_number_are_refused(idx):
  examples = [Example('', '', idx=0), Example('', '', idx=idx)]
  with pytest.raises(UserError, match="superglue.rte: a row has no 'idx'"):
    submission.check('superglue.rte', examples)


def test_other_tasks_are_refused():
  with pytest.raises(UserError, match='glue.cola has no submission file'):
    submission.check('glue.cola', [])
