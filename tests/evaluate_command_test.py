"""`st_moe evaluate` on tasks: what it prints and writes, what it refuses."""

import json
import re
import shutil

import pytest
from made_models import write_run
from small_job import Job, fail
from tiny_model import tiny_config

from st_moe.main import main

MODEL = tiny_config(
  vocab_size=384, num_encoder_layers=1, num_decoder_layers=1, sparse_every=1
)
LABELS = ('entailment', 'contradiction', 'neutral')
TASKS = ('superglue.cb', 'superglue.wsc')


def rows(labelled):
  cb = [
    {'premise': 'p', 'hypothesis': f'{i}', 'idx': i, 'label': LABELS[i % 3]}
    for i in range(4)
  ]
  wsc = [
    {'text': 'Ann met Sue because she ran.', 'label': True, 'idx': 0, 'target':
     {'span1_text': 'Sue', 'span1_index': 2, 'span2_text': 'she',
      'span2_index': 4}}
  ]  # fmt: skip
  if not labelled:
    for row in cb + wsc:
      del row['label']
  return {'CB': cb, 'WSC': wsc}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  write_run(path, MODEL)
  return path


@pytest.fixture
def files(tmp_path):
  for split in ('val', 'test'):
    for folder, some in rows(split == 'val').items():
      path = tmp_path / 'files' / folder / f'{split}.jsonl'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(''.join(json.dumps(row) + '\n' for row in some))
  return tmp_path / 'files'


def command(model, files, *more):
  return [
    'evaluate',
    f'--checkpoint={model}',
    f'--gin.TASK={",".join(TASKS)}',
    f'--gin.TASK_DIR={files}',
    '--gin.BATCH_SIZE=8',
    '--gin.DataConfig.inputs_length=24',
    '--gin.DataConfig.targets_length=15',
    *more,
  ]


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_table_and_every_answer(model, files, tmp_path, capsys):
  out = tmp_path / 'out'
  flags = ('--gin.METHOD=rank', f'--output={out}')
  assert main(command(model, files, *flags)) == 0
  printed = capsys.readouterr()
  assert printed.err == ''
  record = json.loads((out / 'scores.json').read_text())
  lines = [
    re.split(r'\s{2,}', line.strip()) for line in printed.out.splitlines()
  ]
  scores = {name: f'{record[f"eval/{name}"]:.2f}' for name in (
    'superglue.cb/accuracy', 'superglue.cb/f1', 'superglue.wsc/accuracy',
    'score')}  # fmt: skip
  start = lines.index(
    [
      'task',
      'split',
      'examples',
      'no answer',
      'metric',
      'model',
      'constant',
      'which is',
    ]
  )
  table = [[cell for cell in row if cell] for row in lines[start + 1 :]]
  assert table[:4] == [
    ['superglue.cb', 'validation', '4', '0', 'accuracy',
     scores['superglue.cb/accuracy'], '50.00', 'entailment'],
    ['f1', scores['superglue.cb/f1'], '22.22'],
    ['superglue.wsc', 'validation', '1', '0', 'accuracy',
     scores['superglue.wsc/accuracy'], '100.00', 'True'],
    ['all', 'mean of 2', scores['score'], '68.06'],
  ]  # fmt: skip

  answers = read(out / 'superglue.cb.jsonl')
  assert [row['idx'] for row in answers] == [0, 1, 2, 3]
  for row in answers:
    likelihoods = dict(row['log_likelihoods'])
    assert list(likelihoods) == list(LABELS)
    assert row['prediction'] == max(likelihoods, key=likelihoods.get)
    assert row['answer'] == LABELS.index(row['prediction'])
    assert row['targets'] == LABELS[row['label']]
    assert row['score'] == 100.0 * (row['answer'] == row['label'])
  mean = sum(row['score'] for row in answers) / 4
  assert record['eval/superglue.cb/accuracy'] == mean
  (wsc,) = read(out / 'superglue.wsc.jsonl')
  assert wsc['inputs'] == 'wsc: Ann met Sue because *she* ran.'
  assert 'log_likelihoods' not in wsc
  assert read(model / 'evaluations.jsonl')[-1] == record
  assert record['step'] == 7
  assert record['evaluation']['method'] == 'rank'
  assert record['evaluation']['batch_size'] == 8
  assert record['tasks']['superglue.cb']['labelled'] == 4
  assert not (model / 'evaluations').exists()


def test_examples_without_a_label_are_answered_and_not_counted(
  model, files, tmp_path, capsys
):
  path = files / 'CB' / 'val.jsonl'
  first, *rest = path.read_text().splitlines()
  row = json.loads(first)
  del row['label']
  path.write_text('\n'.join([json.dumps(row), *rest]) + '\n')
  out = tmp_path / 'out'
  flags = ['--gin.TASK=superglue.cb', f'--output={out}']
  assert main(command(model, files, *flags)) == 0
  assert re.search(
    r'superglue\.cb +validation +3 of 4 ', capsys.readouterr().out
  )
  record = json.loads((out / 'scores.json').read_text())['tasks']
  assert record['superglue.cb']['examples'] == 4
  assert record['superglue.cb']['labelled'] == 3
  assert len(read(out / 'superglue.cb.jsonl')) == 4


def test_a_submission_answers_the_test_split(model, files, tmp_path, capsys):
  out = tmp_path / 'sent'
  assert main(command(model, files, f'--submission={out}')) == 0
  printed = capsys.readouterr().out
  assert sorted(path.name for path in out.iterdir()) == [
    'CB.jsonl',
    'WSC.jsonl',
  ]
  folder = model / 'evaluations' / 'step_7_test'
  answers = read(folder / 'superglue.cb.jsonl')
  assert [row['label'] for row in read(out / 'CB.jsonl')] == [
    LABELS[max(row['answer'], 0)] for row in answers
  ]
  assert [row['score'] for row in answers] == [None] * 4
  assert [row['targets'] for row in answers] == [None] * 4
  assert 'no labels' in printed
  # Random bytes are no label: that is said.
  assert (
    'texts that are no label are sent as the first label: superglue.cb 4'
  ) in printed
  assert 'a whole submission also has BoolQ, COPA, MultiRC, ReCoRD' in printed
  record = json.loads((folder / 'scores.json').read_text())
  assert not any(name.startswith('eval/') for name in record)
  # Another evaluation of the step leaves those answers alone.
  kept = (folder / 'superglue.cb.jsonl').read_bytes()
  flags = ['--gin.TASK=superglue.wsc', '--gin.SPLIT=test']
  assert main(command(model, files, *flags)) == 0
  again = folder.with_name('step_7_test_2')
  assert {path.name for path in again.iterdir()} == {
    'superglue.wsc.jsonl', 'scores.json',
  }  # fmt: skip
  assert (folder / 'superglue.cb.jsonl').read_bytes() == kept


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--gin.TASK=superglue.cd'], "unknown task 'superglue.cd'"),
    (['--gin.TASK=superglue.cd', '--output=s'], 'did you mean superglue.cb'),
    (['--gin.TASK=superglue.cb,superglue.cd'], "unknown task 'superglue.cd'"),
    (['--gin.SPLIT=dev'], "task 'superglue.cb' has no split 'dev'"),
    (['--gin.SPLIT=train'], "task 'superglue.cb': there is no CB/train.jsonl"),
    (['--gin.TASK_DIR=nowhere'], 'DataConfig.task_dir: there is no folder'),
    (['--gin.METHOD=guess'], 'EvaluationConfig.method must be one of'),
    (['--step=8'], 'no checkpoint of step 8'),
    (['--output=FILE/x'], 'FILE/x cannot be written (Not a directory); give '),
    (['--gin.TASK=text', '--gin.FILES=FILE', '--submission=s'],
     "DataConfig.task 'text' has no answers, which --output and --submission"),
  ],
)  # fmt: skip
def test_what_is_refused(model, files, tmp_path, flags, message, capsys):
  file = tmp_path / 'file.txt'
  file.write_text('text\n')
  flags = [flag.replace('FILE', str(file)) for flag in flags[:]]
  flags = [flag.replace('--gin.' + str(file), '--gin.FILE') for flag in flags]
  assert main(command(model, files, *flags)) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert message.replace('FILE', str(file)) in error


def test_of_its_own_task_fields_are_set(model, capsys):
  flags = ['--gin.METHOD=rank']
  assert main(['evaluate', f'--workdir={model}', *flags]) == 2
  assert 'did you mean EvaluationConfig.method?' in capsys.readouterr().err


def test_a_row_without_a_number_cannot_be_submitted(
  model, files, tmp_path, capsys
):
  path = files / 'CB' / 'test.jsonl'
  path.write_text('{"premise": "p", "hypothesis": "h"}\n')
  out = tmp_path / 'sent'
  assert main(command(model, files, f'--submission={out}')) == 2
  assert "superglue.cb: a row has no 'idx'" in capsys.readouterr().err
  assert not out.exists()


@pytest.mark.slow
def test_two_processes_answer_as_one(model, files, tmp_path):
  mesh = [f'--gin.MeshConfig.{k}' for k in ('data=2', 'expert=1', 'model=2')]
  words = command(model, files, '--gin.METHOD=rank', *mesh)
  found = []
  for processes, devices in ((1, 4), (2, 2)):
    out = tmp_path / str(processes)
    ended = Job(
      [*words, f'--output={out}'], processes=processes, devices=devices
    ).succeed()
    assert 'superglue.cb' in ended[0].out
    assert all(one.out == '' for one in ended[1:])
    found.append(
      [[row['prediction'], row['score']]
       for task in TASKS for row in read(out / f'{task}.jsonl')]
    )  # fmt: skip
  assert len(found[0]) == 5
  assert found[0] == found[1]


@pytest.mark.slow
def test_processes_refuse_different_files_together(model, files, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(files, other / 'files')
  path = other / 'files' / 'CB' / 'val.jsonl'
  path.write_text(path.read_text().replace('"p"', '"q"'))
  lines = fail(
    command(model, 'files', '--gin.MeshConfig.data=8'),
    folders={0: files.parent, 1: other},
  )
  assert lines[0] == lines[1]
  assert lines[0].startswith('error: process 1 has superglue.cb = ')
  assert lines[0].endswith('give every process the same files')
