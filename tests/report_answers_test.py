"""The report of a fine-tune: scores, constant answers, labels, mistakes."""

import json
import re

import numpy as np
import pytest

from st_moe.metrics import MetricsWriter
from st_moe.report import draw_tasks, write_report
from st_moe.report.run import read_run

CB = 'superglue.cb'
LABELS = ['entailment', 'contradiction', 'neutral']
# Right and given labels; -1 is a text that is none.
ANSWERS = [(0, 0)] * 5 + [(0, 1), (1, 1), (1, 1), (2, -1), (2, 0)]


def write_answers(folder, name, rows):
  folder.mkdir(exist_ok=True)
  with (folder / f'{name}.jsonl').open('w') as file:
    for row in rows:
      file.write(json.dumps(row) + '\n')


def cb_row(index, right, given):
  return {
    'idx': index,
    'inputs': f'cb hypothesis: {index} < 5 premise: ' + 'long ' * 200,
    'targets': LABELS[right],
    'prediction': LABELS[given] if given >= 0 else '',
    'label': right,
    'answer': given,
    'score': 100.0 * (right == given),
  }


@pytest.fixture
def workdir(tmp_path):
  """Returns the work directory of a fine-tune on CB and a free task."""
  writer = MetricsWriter(tmp_path, tensorboard=False)
  for step, f1, em in ((10, 30.0, 0.0), (20, 60.0, 25.0), (30, 50.0, 50.0)):
    writer.write(step, {'loss': 5.0 - step / 10})
    writer.write(
      step,
      {
        'eval/loss': 1.0,
        f'eval/{CB}/f1': f1,
        f'eval/{CB}/accuracy': f1 + 10,
        'eval/web_questions/exact_match': em,
        'eval/score': (f1 + 5 + em) / 2,
      },
    )
  writer.close()
  constant = {'f1': 25.0, 'accuracy': 60.0}
  development = {
    'step': 20,
    'tasks': {
      CB: {
        'examples': 10,
        'labels': LABELS,
        'metrics': {'f1': 60.0, 'accuracy': 70.0},
        'score': 65.0,
        'majority': {'answer': 0, 'metrics': constant, 'score': 42.5},
      },
      'web_questions': {
        'examples': 4,
        'labels': [],
        'metrics': {'exact_match': 25.0},
        'score': 25.0,
        'majority': None,
      },
    },
    'means': [
      {
        'name': 'all',
        'scalar': 'eval/score',
        'tasks': 2,
        'score': 45.0,
        'constant': None,
      }
    ],
  }
  summary = {
    'step': 30,
    'best': {'metric': 'eval/score', 'step': 20, 'value': 45.0},
    'development': development,
  }
  (tmp_path / 'summary.json').write_text(json.dumps(summary))
  folder = tmp_path / 'best_answers'
  write_answers(folder, CB, [cb_row(i, *a) for i, a in enumerate(ANSWERS)])
  free = [
    {'inputs': f'q {i}', 'targets': 'a', 'prediction': 'b', 'score': 0.0}
    for i in range(4)
  ]
  free[2]['score'] = 100.0
  write_answers(folder, 'web_questions', free)
  return tmp_path


def cells(row):
  return [
    re.sub('<.*?>', '', cell) for cell in re.findall(r'<t[dh].*?</t[dh]>', row)
  ]


def test_scores_stand_beside_the_constant_answer_and_the_last_step(workdir):
  page = write_report(workdir).read_text()
  (table,) = re.findall(r'<table class="scores">.*?</table>', page, re.S)
  rows = [cells(row) for row in re.findall(r'<tr.*?</tr>', table, re.S)]
  assert rows == [
    [
      'task', 'metric', 'best step', '', 'last step', 'constant',
      'best - constant',
    ],
    [CB, 'f1', '60.00', '', '50.00', '25.00', '+35.00'],
    ['', 'accuracy', '70.00', '', '60.00', '60.00', '+10.00'],
    ['web_questions', 'exact_match', '25.00', '', '50.00', '', ''],
    ['all', 'mean of 2', '45.00', '', '52.50', '', ''],
  ]  # fmt: skip
  assert 'Step 20, the best by <code>eval/score</code> (45), and' in page


def test_a_best_step_that_is_the_last_has_one_column(workdir):
  path = workdir / 'summary.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'step': 20}))
  page = write_report(workdir).read_text()
  (table,) = re.findall(r'<table class="scores">.*?</table>', page, re.S)
  head, first, *_ = re.findall(r'<tr.*?</tr>', table, re.S)
  assert cells(head) == [
    'task', 'metric', 'best step', '', 'constant', 'best - constant',
  ]  # fmt: skip
  assert cells(first) == [CB, 'f1', '60.00', '', '25.00', '+35.00']
  assert '<code>eval/score</code> (45), and the last. Scores' in page


def test_labels_are_counted_right_against_given(workdir):
  page = write_report(workdir).read_text()
  (table,) = re.findall(r'<table class="matrix">.*?</table>', page, re.S)
  assert f'<caption>{CB}</caption>' in table
  rows = [cells(row) for row in re.findall(r'<tr.*?</tr>', table, re.S)]
  assert rows == [
    ['', *LABELS, 'no label'],
    ['entailment', '5', '1', '0', '0'],
    ['contradiction', '0', '2', '0', '0'],
    ['neutral', '1', '0', '0', '1'],
  ]


def test_mistakes_are_shown_short_and_escaped(workdir):
  page = write_report(workdir).read_text()
  blocks = re.findall(r'<div class="mistake">(.*?)</div>', page, re.S)
  assert len(blocks) == 6
  assert '>superglue.cb: 3 of 10</h3>' in page
  assert '>web_questions: 3 of 4</h3>' in page
  assert 'cb hypothesis: 5 &lt; 5 premise: long long' in blocks[0]
  assert blocks[0].count('long') < 120
  assert '<span class="tag">right</span>entailment' in blocks[0]
  assert '<span class="tag">model</span>contradiction' in blocks[0]
  assert '<span class="tag">model</span>-' in blocks[1]  # it wrote nothing
  assert page.count('<img src="data:image/png;base64,') == 2
  assert '://' not in page  # opens without a network


def test_inputs_that_were_cut_are_said_to_be(workdir):
  data = {
    'vocabulary': 'byte', 'extra_ids': 10, 'inputs_length': 100,
    'insert_sentinels': 3,
  }  # fmt: skip
  (workdir / 'run.json').write_text(json.dumps({'config': {'data': data}}))
  page = write_report(workdir).read_text()
  tokens = len(cb_row(5, 0, 1)['inputs'])
  said = f'(the model saw the first 96 of {tokens:,} tokens)'
  assert page.count(said) == 3  # of CB; the other task's are short
  assert page.count('the model saw') == 3


def test_one_task_is_drawn_as_large_as_each_of_several(workdir):
  several = write_report(workdir).read_text()
  summary = json.loads((workdir / 'summary.json').read_text())
  summary['development']['means'] = []
  del summary['development']['tasks']['web_questions']
  (workdir / 'summary.json').write_text(json.dumps(summary))
  one = write_report(workdir).read_text()
  widths = [
    float(re.findall(r'style="max-width:([\d.]+)rem"', page)[0])
    for page in (several, one)
  ]
  assert widths[0] == 60.0 and 20 < widths[1] < 30


def test_curves_have_every_metric_the_constant_answer_and_the_best_step(
  workdir,
):
  mean, cb, web, *_ = draw_tasks(read_run(workdir)).axes
  assert [axes.get_title(loc='left') for axes in (mean, cb, web)] == [
    'all', CB, 'web_questions',
  ]  # fmt: skip
  f1, f1_bar, accuracy, accuracy_bar, best = cb.get_lines()
  np.testing.assert_array_equal(f1.get_xdata(), [10, 20, 30])
  np.testing.assert_array_equal(f1.get_ydata(), [30, 60, 50])
  np.testing.assert_array_equal(accuracy.get_ydata(), [40, 70, 60])
  np.testing.assert_array_equal(f1_bar.get_ydata(), [25, 25])
  np.testing.assert_array_equal(accuracy_bar.get_ydata(), [60, 60])
  np.testing.assert_array_equal(best.get_xdata(), [20, 20])
  assert len(web.get_lines()) == 2  # no constant answer is known


def test_a_run_whose_answers_are_gone_still_has_its_scores(workdir):
  for path in (workdir / 'best_answers').iterdir():
    path.unlink()
  page = write_report(workdir).read_text()
  assert 'Development scores' in page
  assert 'Right labels' not in page and 'mistakes' not in page
