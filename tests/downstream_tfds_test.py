"""Tasks from tfds: the same rows give the same examples as published files.

The datasets are written here, with the features of tfds' own builders. Those
builders, run over real files of ../shared/data, gave the same examples too.
"""

import json
from pathlib import Path

import pytest
from downstream_glue_test import TABLES
from downstream_pronouns_test import DPR
from downstream_questions_test import SQUAD, TRIVIA_QA, WEB_QUESTIONS
from downstream_reasoning_test import ANLI, ARC, CNN, WINOGRANDE
from downstream_test import ROWS
from prepared_tfds import prepare_dataset

from st_moe.config import DataConfig
from st_moe.data.downstream.catalog import load_examples, names
from st_moe.data.pipeline import open_data
from st_moe.errors import UserError

WSC = ROWS['WSC'] | {'idx': 3}
RECORD = ROWS['ReCoRD']['passage']['text']
PAGE = SQUAD['data'][0]['paragraphs'][0]

# Task: (published file, its content, rows as tfds has them).
SAME = {
  'superglue.cb': ('CB/train.jsonl', ROWS['CB'] | {'idx': 1}, [
    ROWS['CB'] | {'idx': 1}]),
  'superglue.multirc': ('MultiRC/train.jsonl', ROWS['MultiRC'], [
    {'paragraph': '<b>One</b><br>day.', 'question': 'When?', 'answer': answer,
     'label': label, 'idx': {'paragraph': 3, 'question': 0, 'answer': i}}
    for i, (answer, label) in enumerate((('Then', 1), ('Never', 0)))]),
  'superglue.record': ('ReCoRD/train.jsonl', ROWS['ReCoRD'], [
    {'passage': RECORD, 'query': '@placeholder ran',
     'entities': ['Al', 'Bob'], 'answers': ['Al', 'Bob'],
     'idx': {'passage': 5, 'query': 9}}]),
  'superglue.wsc': ('WSC/train.jsonl', WSC, [
    {'text': WSC['text'], 'label': 1, 'idx': 3, **WSC['target']}]),
  'superglue.dpr': ('DPR/train.c.txt', DPR, [
    {'sentence': 'Bob told Tom that he was late.', 'pronoun': 'he',
     'candidates': ['Bob', 'Tom'], 'label': 1},
    {'sentence': 'He saw it, and it was red.', 'pronoun': 'it',
     'candidates': ['the car', 'the sky'], 'label': 0}]),
  'glue.stsb': ('STS-B/train.tsv', TABLES['STS-B'], [
    {'sentence1': 'A dog.', 'sentence2': 'A cat.', 'label': 2.5, 'idx': 0}]),
  'glue.mnli_matched': ('MNLI/train.tsv', TABLES['MNLI'], [
    {'premise': 'It rains.', 'hypothesis': 'Wet.', 'label': 1, 'idx': 0}]),
  'squad_v2': ('train-v2.0.json', SQUAD, [
    {'id': qa['id'], 'title': 'Tea', 'context': PAGE['context'],
     'question': qa['question'], 'is_impossible': qa['is_impossible'],
     'plausible_answers': {'text': [], 'answer_start': []},
     'answers': {key: [a[key] for a in qa['answers']]
                 for key in ('text', 'answer_start')}}
    for qa in PAGE['qas']]),
  'anli.r1': ('anli_v1.0/R1/train.jsonl', ANLI, [
    {key: ANLI[key] for key in ('uid', 'context', 'hypothesis', 'label')}]),
  'winogrande_xl': ('winogrande_1.1/train_xl.jsonl', WINOGRANDE | {
    'qID': None}, [
    {'sentence': WINOGRANDE['sentence'], 'option1': 'Ann', 'option2': 'Sue',
     'label': '2'}]),
  'arc.easy': ('ARC-Easy/ARC-Easy-Train.jsonl', ARC, [
    {'id': 'Mercury_1', 'question': 'Why?', 'answerKey': 'C', 'choices': {
      'text': ['Ice', 'Sun', 'Rain'], 'label': ['A', 'B', 'C']}}]),
  'cnn_dailymail': ('cnn_dailymail/train.jsonl', CNN, [
    CNN | {'publisher': 'cnn'}]),
  'natural_questions': ('NQ-open.train.jsonl', {
    'question': 'who ran', 'answer': ['Bob', 'Bob Ray']}, [
    {'question': 'who ran', 'answer': ['Bob', 'Bob Ray']}]),
  'web_questions': ('webquestions.examples.train.json', WEB_QUESTIONS, [
    {'url': 'u1', 'question': 'where is rome?',
     'answers': ['Italy', 'Lazio, Italy']}]),
  'trivia_qa': ('unfiltered-web-train.json', TRIVIA_QA, [
    {'question': 'Who?', 'question_id': 'tc_1', 'question_source': '',
     'entity_pages': {key: [] for key in (
       'doc_source', 'filename', 'title', 'wiki_context')},
     'search_results': {key: [] for key in (
       'description', 'filename', 'rank', 'title', 'url', 'search_context')},
     'answer': {
       'value': 'Bob', 'aliases': ['Bobby', 'Bob'], 'type': 'FreeForm',
       'normalized_aliases': [], 'normalized_value': 'bob',
       'matched_wiki_entity_name': '',
       'normalized_matched_wiki_entity_name': ''}}]),
}  # fmt: skip
DATASETS = {
  'superglue.cb': 'super_glue/cb',
  'superglue.multirc': 'super_glue/multirc',
  'superglue.record': 'super_glue/record',
  'superglue.wsc': 'super_glue/wsc.fixed',
  'superglue.dpr': 'definite_pronoun_resolution',
  'glue.stsb': 'glue/stsb',
  'glue.mnli_matched': 'glue/mnli',
  'squad_v2': 'squad/v2.0',
  'anli.r1': 'anli/r1',
  'winogrande_xl': 'winogrande',
  'arc.easy': 'ai2_arc/ARC-Easy',
  'cnn_dailymail': 'cnn_dailymail',
  'natural_questions': 'natural_questions_open',
  'web_questions': 'web_questions',
  'trivia_qa': 'trivia_qa/unfiltered.nocontext',
}


def write(root, name):
  file, content, _ = SAME[name]
  path = root / file
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content if isinstance(content, str) else json.dumps(content))


def prepare(root, name, **more):
  train = 'train_xl' if name == 'winogrande_xl' else 'train'
  prepare_dataset(root, DATASETS[name], {train: SAME[name][2]} | more)


@pytest.mark.parametrize('name', SAME)
def test_the_same_rows_give_the_same_examples(tmp_path, name):
  write(tmp_path / 'files', name)
  prepare(tmp_path / 'tfds', name)
  published = DataConfig(task_dir=str(tmp_path / 'files'))
  prepared = DataConfig(tfds_data_dir=str(tmp_path / 'tfds'))
  found = load_examples(name, 'train', prepared)
  wanted = load_examples(name, 'train', published)
  assert found == wanted


def test_every_task_has_a_dataset_that_tfds_knows():
  import tensorflow_datasets as tfds

  from st_moe.data.downstream.catalog import find_task, is_answer_task, members

  for name in names():
    assert is_answer_task(name)
    for task in members(name):
      assert tfds.builder(find_task(task).prepared.dataset).info.features


def test_the_readme_names_every_task():
  """In its table: 'superglue.cb', or 'cb' behind 'superglue.boolq'."""
  readme = Path(__file__).resolve().parent.parent / 'README.md'
  table = [
    line
    for line in readme.read_text(encoding='utf-8').splitlines()
    if line.startswith('| `')
  ]
  for name in names():
    benchmark, _, task = name.rpartition('.')
    rows = [line for line in table if f'`{benchmark}.' in line] or table
    assert any(f'`{name}`' in row or f'`{task}`' in row for row in rows), name


def test_batches_of_what_tfds_prepared(tmp_path):
  prepare(tmp_path, 'anli.r1', validation=SAME['anli.r1'][2])
  config = DataConfig(
    task='anli.r1', tfds_data_dir=str(tmp_path), vocabulary='byte',
    inputs_length=64, targets_length=16,
  )  # fmt: skip
  data = open_data(config, seed=0, cache_root=tmp_path)
  batch = next(data.train_batches(2))
  assert {
    data.vocabulary.decode(row) for row in batch['encoder_input_tokens']
  } == {'anli hypothesis: Wet. premise: It rains.'}
  assert data.fingerprint['text']['anli.r1']['examples'] == {
    'train': 1,
    'validation': 1,
  }


def test_what_is_missing_or_unlabelled_is_named(tmp_path):
  def load(root, split='train'):
    return load_examples(
      'superglue.cb', split, DataConfig(tfds_data_dir=str(root))
    )

  with pytest.raises(
    UserError, match='or DataConfig.tfds_data_dir with super_g'
  ):
    load_examples('superglue.cb', 'train', DataConfig())
  for root in (tmp_path, tmp_path / 'no'):
    with pytest.raises(
      UserError, match='no prepared tfds dataset in .*glue/cb;'
    ):
      load(root)
  row = SAME['superglue.cb'][2][0]
  prepare_dataset(tmp_path, 'super_glue/cb', {'train': [row | {'label': -1}]})
  with pytest.raises(
    UserError, match=r"cb:1.*, train\[0\]: the row has no 'la"
  ):
    load(tmp_path)
  with pytest.raises(
    UserError, match="has no split 'validation' .it has train"
  ):
    load(tmp_path, 'validation')
  with pytest.raises(
    UserError, match="no split 'dev' .it has train, validation"
  ):
    load(tmp_path, 'dev')
