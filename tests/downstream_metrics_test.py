"""Metrics of choices against a second computation, by hand, and on real files.

Random cases compare the metrics with `Second`; scenarios have their numbers
worked out by hand.
"""

import random

import pytest
from second_metrics import Second, chosen, close, free

from st_moe.config import DataConfig
from st_moe.data.downstream import metrics, superglue
from st_moe.data.downstream.catalog import load_examples
from st_moe.data.downstream.example import Example

SEEDS = range(20)


def binary_case(seed):
  """Random labels and answers, some invalid; and those answers made wrong."""
  draw = random.Random(seed)
  labels = [draw.randint(0, 1) for _ in range(40)]
  given = [draw.choice([0, 1, label, label, -1]) for label in labels]
  wrong = [
    1 - label if g == -1 else g for g, label in zip(given, labels, strict=True)
  ]
  return given, labels, wrong


@pytest.mark.parametrize('seed', SEEDS)
def test_two_choices_against_the_second_computation(seed):
  given, labels, wrong = binary_case(seed)
  examples = chosen(labels)
  right = sum(g == x for g, x in zip(given, labels, strict=True))
  expected = {
    'f1': 100 * Second.f1(wrong, labels, 1),
    'accuracy': 100 * right / 40,
  }
  assert metrics.f1_and_accuracy(given, examples) == close(expected)
  assert metrics.accuracy(given, examples) == close(
    {'accuracy': expected['accuracy']}
  )
  assert metrics.matthews(given, examples) == close(
    {'matthews': 100 * Second.matthews(wrong, labels)}
  )


@pytest.mark.parametrize('seed', SEEDS)
def test_cb_against_the_second_computation(seed):
  draw = random.Random(seed)
  labels = [draw.choice([0, 0, 1, 1, 2]) for _ in range(30)]
  given = [draw.choice([0, 1, 2, label, label, -1]) for label in labels]
  right = sum(g == label for g, label in zip(given, labels, strict=True))
  assert metrics.cb(given, chosen(labels)) == close(
    {'accuracy': 100 * right / 30, 'f1': 100 * Second.macro_f1(given, labels)}
  )


@pytest.mark.parametrize('seed', SEEDS)
def test_multirc_against_the_second_computation(seed):
  given, labels, wrong = binary_case(seed)
  draw = random.Random(seed)
  groups = [draw.randint(0, 9) for _ in labels]
  questions = set(groups)
  whole = sum(
    all(
      g == label
      for g, label, group in zip(given, labels, groups, strict=True)
      if group == question
    )
    for question in questions
  )
  assert metrics.multirc(given, chosen(labels, groups)) == close(
    {
      'f1a': 100 * Second.f1(wrong, labels, 1),
      'exact_match': 100 * whole / len(questions),
    }
  )


@pytest.mark.parametrize('seed', SEEDS)
def test_correlations_against_the_second_computation(seed):
  draw = random.Random(seed)
  wanted = [draw.randint(0, 25) / 5 for _ in range(25)]  # with ties
  given = [round(w + draw.gauss(0, 1), 1) for w in wanted]
  texts = [str(g) for g in given]
  texts[3], given[3] = 'four', -1.0
  texts[4], given[4] = 'nan', -1.0
  examples = [free(str(w)) for w in wanted]
  assert metrics.pearson_spearman(texts, examples) == close(
    {
      'pearson': 100 * Second.pearson(given, wanted),
      'spearman': 100 * Second.spearman(given, wanted),
    }
  )


# By hand


def test_the_majority_of_the_cb_test_set_scores_what_superglue_published():
  # 250 examples, of which 121 have the most frequent label: 48.4 and 21.7.
  examples = chosen([1] * 121 + [0] * 100 + [2] * 29)
  scores = metrics.cb([1] * 250, examples)
  assert scores['accuracy'] == close(48.4)
  assert round(scores['f1'], 1) == 21.7


def test_cb_by_hand():
  # Right: 0 once of two, 1 once of one, 2 never. F1: 2/3, 2/3, 0.
  examples = chosen([0, 0, 1, 2])
  assert metrics.cb([0, 1, 1, -1], examples) == close(
    {'accuracy': 50.0, 'f1': 400 / 9}
  )


def test_multirc_by_hand():
  # Two questions; of the first one answer is invalid, the second is right.
  examples = chosen([1, 0, 1, 1], groups=[7, 7, 8, 8])
  assert metrics.multirc([-1, 0, 1, 1], examples) == close(
    {'f1a': 80.0, 'exact_match': 50.0}  # precision 2/2, recall 2/3
  )
  # An invalid answer where "false" is right is a false alarm.
  assert metrics.multirc([1, -1, 1, 1], examples)['f1a'] == close(600 / 7)
  assert metrics.multirc([0, 0, 0, 0], examples) == {
    'f1a': 0.0,
    'exact_match': 0.0,
  }


@pytest.mark.parametrize(
  'score',
  [
    metrics.accuracy,
    metrics.f1_and_accuracy,
    metrics.matthews,
    metrics.multirc,
    metrics.gender_parity,
    metrics.cb,
  ],
)
def test_right_wrong_and_shuffled_choices(score):
  labels = [0, 1, 1, 0, 1, 0, 1, 1] + [2] * (score == metrics.cb)
  pairs = [k // 2 for k in range(len(labels))]
  examples = chosen(labels, pairs)
  right = score(labels, examples)
  parity = right.pop('gender_parity', None)
  assert right == close(dict.fromkeys(right, 100.0))
  wrong = score([(label + 1) % 2 for label in labels], examples)
  wrong.pop('gender_parity', None)
  worst = {'matthews': -100.0}
  if score != metrics.cb:
    assert wrong == close({k: worst.get(k, 0.0) for k in wrong})
  if parity is not None:  # only the last of four pairs has two labels alike
    assert parity == close(25.0)
  order = random.Random(0).sample(range(len(labels)), len(labels))
  again = score([labels[k] for k in order], [examples[k] for k in order])
  again.pop('gender_parity', None)
  assert again == right


def test_shuffled_answers_by_hand():
  # Rotated by one: 0110 1001 against 1011 0100 is right at two places.
  examples = chosen([0, 1, 1, 0, 1, 0, 0, 1])
  given = [1, 0, 1, 1, 0, 1, 0, 0]
  # 1: found 4, of them right 1 (third); 0: right 1 (seventh).
  assert metrics.f1_and_accuracy(given, examples) == close(
    {'f1': 25.0, 'accuracy': 25.0}
  )
  assert metrics.matthews(given, examples) == close({'matthews': -50.0})


def test_matthews_of_one_answer_is_zero():
  assert metrics.matthews([1, 1, 1], chosen([0, 1, 1])) == {'matthews': 0.0}
  assert metrics.matthews([0, 1, 1], chosen([1, 1, 1])) == {'matthews': 0.0}


def test_gender_parity_by_hand():
  examples = chosen([1, 1, 0, 0, 1, 1, 0], groups=[1, 1, 2, 2, 3, 3, 4])
  # Pairs: alike and right; different; both invalid; half a pair.
  assert metrics.gender_parity([1, 1, 0, 1, -1, -1, 0], examples) == close(
    {'accuracy': 400 / 7, 'gender_parity': 100 / 3}
  )
  assert metrics.gender_parity([1], examples[:1]) == {'accuracy': 100.0}


def test_numbers_without_a_correlation_score_zero():
  zero = {'pearson': 0.0, 'spearman': 0.0}
  examples = [free('1.0'), free('3.5'), free('5.0')]
  assert metrics.pearson_spearman(['2.0'] * 3, examples) == zero
  assert metrics.pearson_spearman([''] * 3, examples) == zero
  assert metrics.pearson_spearman(['1', '2', '9'], examples) == close(
    {
      'pearson': 100 * Second.pearson([1.0, 2.0, 9.0], [1.0, 3.5, 5.0]),
      'spearman': 100.0,
    }
  )


def test_examples_without_a_label_are_left_out():
  unlabelled = Example(inputs='', targets='<unk>', choices=('no', 'yes'))
  assert metrics.accuracy([1, 0], [*chosen([1]), unlabelled]) == {
    'accuracy': 100.0
  }
  assert metrics.squad(['x', 'y'], [free('x'), unlabelled]) == {
    'exact_match': 100.0,
    'f1': 100.0,
  }
  with pytest.raises(ValueError, match='no labelled examples'):
    metrics.accuracy([1], [unlabelled])


# The real development sets


TASKS = {task.name.partition('.')[2]: task for task in superglue.TASKS}


def real(shared_data, name):
  config = DataConfig(task_dir=str(shared_data))
  return load_examples(f'superglue.{name}', 'validation', config)


@pytest.mark.parametrize('name', TASKS)
def test_the_right_texts_score_100_and_no_texts_0(shared_data, name):
  task, examples = TASKS[name], real(shared_data, name)

  def score(texts):
    pairs = zip(texts, examples, strict=True)
    return task.metrics([task.answer(*pair) for pair in pairs], examples)

  # Of WSC the target is the candidate, right or not.
  right = [
    example.targets if name != 'wsc' or example.label else 'zzz'
    for example in examples
  ]
  scores = score(right)
  assert scores == close(dict.fromkeys(scores, 100.0))
  assert task.score(scores) == close(100.0)
  assert score([''] * len(examples)) == dict.fromkeys(scores, 0.0)


def constant(shared_data, name, answer):
  examples = real(shared_data, name)
  return TASKS[name].metrics([answer] * len(examples), examples)


def test_majorities_by_hand(shared_data):
  # CB: 28 of 56; F1 of that label 2 x 1/2 / (3/2), of the others 0.
  assert constant(shared_data, 'cb', 1) == close(
    {'accuracy': 50.0, 'f1': 200 / 9}
  )
  expected = {
    ('boolq', 1): 2033 / 3270,
    ('copa', 0): 55 / 100,
    ('rte', 0): 146 / 277,
    ('wic', 1): 319 / 638,
    ('wsc', 0): 66 / 104,
  }
  for (name, answer), share in expected.items():
    assert constant(shared_data, name, answer) == close(
      {'accuracy': 100 * share}
    )
  # MultiRC: 2075 of 4848 answers are true.
  assert constant(shared_data, 'multirc', 1)['f1a'] == close(
    100 * 2 * 2075 / (2075 + 4848)
  )
  assert constant(shared_data, 'multirc', 0)['f1a'] == 0.0


def test_what_is_scored_together_needs_no_published_number():
  answers = [{'text': 'A', 'label': 1}, {'text': 'B', 'label': 0}]
  questions = [{'question': q, 'answers': answers} for q in ('X?', 'Y?')]
  row = {'passage': {'text': 'P', 'questions': questions}}
  examples = TASKS['multirc'].examples(row, 'MultiRC/val.jsonl:1', False)
  # All of the first question is right, one answer of the second.
  scores = metrics.multirc([1, 0, 1, 1], examples)
  assert scores == close({'f1a': 80.0, 'exact_match': 50.0})
  queries = [{'query': f'@placeholder {n}', 'answers': [{'text': 'Al'}]}
             for n in range(2)]  # fmt: skip
  row = {'passage': {'text': 'Al ran', 'entities': []}, 'qas': queries}
  examples = TASKS['record'].examples(row, 'ReCoRD/val.jsonl:1', False)
  scores = metrics.record(['Al', 'Bob'], examples)
  assert scores == close({'f1': 50.0, 'exact_match': 50.0})
