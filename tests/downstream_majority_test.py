"""The best constant answer, by hand and on the published development sets."""

import dataclasses

import pytest
from second_metrics import chosen, close, free

from st_moe.config import DataConfig
from st_moe.data.downstream import catalog, metrics
from st_moe.data.downstream.majority import majority

# Labels counted in the files.
PUBLISHED = {
  'boolq': (1, {'accuracy': 100 * 2033 / 3270}),
  'cb': (1, {'accuracy': 50.0, 'f1': 200 / 9}),
  'copa': (0, {'accuracy': 55.0}),
  'rte': (0, {'accuracy': 100 * 146 / 277}),
  'wic': (0, {'accuracy': 50.0}),
  'wsc': (0, {'accuracy': 100 * 66 / 104}),
}


def of_file(shared_data, name):
  name = f'superglue.{name}'
  config = DataConfig(task_dir=str(shared_data))
  examples = catalog.load_examples(name, 'validation', config)
  return majority(catalog.find_task(name), examples)


@pytest.mark.parametrize('name', PUBLISHED)
def test_of_published_files(shared_data, name):
  answer, expected = PUBLISHED[name]
  found = of_file(shared_data, name)
  assert found.answer == answer
  assert found.metrics == close(expected)
  assert found.score == close(sum(expected.values()) / len(expected))


def test_the_best_of_multirc_is_the_rarer_label(shared_data):
  # 2075 of 4848 are true; "False" for all has an F1 of 0.
  found = of_file(shared_data, 'multirc')
  assert found.answer == 1
  assert found.metrics['f1a'] == close(100 * 2 * 2075 / (2075 + 4848))


def test_free_answers_are_tried_by_how_often_they_are_right():
  squad = catalog.find_task('superglue.record')
  examples = [
    free('Rome', 'the Rome'),
    free('Rome'),
    free('Paris'),
    free('Oslo'),
  ]
  found = majority(squad, examples)
  assert found.answer == 'Rome'
  assert found.metrics == {'exact_match': 50.0, 'f1': 50.0}
  found = majority(squad, [free('Rome'), free('Bern')])
  assert (found.answer, found.score) == ('Bern', 50.0)
  summary = ' '.join('abcdefghij')  # is not tried
  found = majority(squad, [free(summary), free(summary)])
  assert (found.answer, found.score) == ('', 0.0)


def test_no_answer_may_be_the_best_one():
  squad_v2 = dataclasses.replace(
    catalog.find_task('superglue.record'),
    metrics=metrics.squad_v2,
    main_metrics=('exact_match', 'f1'),
  )
  examples = [free(''), free('Rome'), free('Rome'), free(''), free('')]
  found = majority(squad_v2, examples)
  assert (found.answer, found.score) == ('', 60.0)


def test_nothing_is_known_without_labels():
  cb = catalog.find_task('superglue.cb')
  assert majority(cb, chosen([None, None])) is None
  assert majority(cb, chosen([None, 2, 2, 0])).metrics == close(
    {'accuracy': 200 / 3, 'f1': 80 / 3}
  )
