"""Metrics of free texts against a second computation, and by hand."""

import dataclasses
import random

import pytest
from second_metrics import Second, close, free

from st_moe.data.downstream import metrics

SEEDS = range(20)
WORDS = (
  'The', 'a', 'an', "Cat's", 'hat,', 'sat.', 'on-top', 'of', '(mats)', '3.5',
  'U.S.', 'it!', 'the',
)  # fmt: skip


def sentence(draw, longest):
  return ' '.join(draw.choices(WORDS, k=draw.randint(1, longest)))


@pytest.mark.parametrize('seed', SEEDS)
def test_squad_against_the_second_computation(seed):
  draw = random.Random(seed)
  texts = [sentence(draw, 4) for _ in range(30)]
  golds = [
    [sentence(draw, 4) for _ in range(draw.randint(1, 3))] for _ in texts
  ]
  exact, f1 = 0.0, 0.0
  for text, answers in zip(texts, golds, strict=True):
    exact += any(Second.words(text) == Second.words(a) for a in answers)
    f1 += max(Second.token_f1(text, a) for a in answers)
  expected = {'exact_match': 100 * exact / 30, 'f1': 100 * f1 / 30}
  examples = [free(*answers) for answers in golds]
  assert metrics.squad(texts, examples) == close(expected)
  assert metrics.exact_match(texts, examples) == close(
    {'exact_match': expected['exact_match']}
  )


@pytest.mark.parametrize('seed', SEEDS)
def test_rouge_against_the_second_computation(seed):
  draw = random.Random(seed)
  texts, golds = (
    [
      ' . '.join(sentence(draw, 6) for _ in range(draw.randint(1, 4)))
      for _ in range(4)
    ]
    for _ in range(2)
  )
  pairs = list(zip(texts, golds, strict=True))
  assert metrics.rouge(texts, [free(gold) for gold in golds]) == close(
    {
      'rouge1': 25 * sum(Second.rouge_n(t, g, 1) for t, g in pairs),
      'rouge2': 25 * sum(Second.rouge_n(t, g, 2) for t, g in pairs),
      'rougeLsum': 25 * sum(Second.rouge_l_sum(t, g) for t, g in pairs),
    }
  )


def test_squad_by_hand():
  examples = [
    free('Denver Broncos', 'The Broncos'),
    free('1945'),
    free("the cat's whiskers"),
    free('yes'),
  ]
  texts = ['the Broncos!', 'in 1945', 'Cats whiskers', '']
  # Exact after normalisation; F1 2/3; exact; nothing.
  assert metrics.squad(texts, examples) == close(
    {'exact_match': 50.0, 'f1': 100 * (1 + 2 / 3 + 1 + 0) / 4}
  )


def test_a_query_of_record_counts_once():
  examples = [
    free('Paris', 'France', group='1-1'),
    free('Paris', 'France', group='1-1'),
    free('Rome', group='1-2'),
  ]
  assert metrics.record(['France', 'x', 'Milan'], examples) == close(
    {'exact_match': 50.0, 'f1': 50.0}
  )
  alone = [dataclasses.replace(example, group='') for example in examples]
  assert metrics.record(['France', 'x', 'Milan'], alone) == close(
    {'exact_match': 100 / 3, 'f1': 100 / 3}
  )


def test_texts_that_are_all_articles():
  # SQuAD v1 finds no common word in two empty texts, v2 takes them as equal.
  assert metrics.squad(['the'], [free('a')]) == {
    'exact_match': 100.0,
    'f1': 0.0,
  }
  assert metrics.squad_v2(['the'], [free('a')])['f1'] == 100.0


def test_trivia_qa_separates_words_at_punctuation():
  example = free('Rock-and_Roll', '\u2018Elvis\u2019')
  for text in ('rock and roll', 'The Rock, and roll', 'elvis'):
    assert metrics.trivia_qa([text], [example]) == {
      'exact_match': 100.0,
      'f1': 100.0,
    }
  assert metrics.squad(['rock and roll'], [example])['exact_match'] == 0.0
  assert metrics.squad(['rockandroll'], [example])['exact_match'] == 100.0


def test_accents_may_be_written_in_two_ways():
  composed, decomposed = 'Ren\u00e9', 'Rene\u0301'
  assert metrics.exact_match([composed], [free(decomposed)]) == {
    'exact_match': 100.0
  }
  assert metrics.exact_match(['Rene'], [free(composed)]) == {'exact_match': 0.0}


def test_squad_v2_by_hand():
  examples = [
    free('the Seine', 'River Seine'),
    free('1066'),
    free(''),
    free(''),
  ]
  texts = ['Seine river', '', '', '1066']
  # Has answer: F1 1 and exact no (other order); nothing. None: right; wrong.
  assert metrics.squad_v2(texts, examples) == close(
    {
      'exact_match': 25.0,
      'f1': 50.0,
      'has_answer_exact_match': 0.0,
      'has_answer_f1': 50.0,
      'no_answer_exact_match': 50.0,
      'no_answer_f1': 50.0,
    }
  )
  assert set(metrics.squad_v2([''], examples[2:3])) == {
    'exact_match',
    'f1',
    'no_answer_exact_match',
    'no_answer_f1',
  }


def test_rouge_by_hand():
  # rouge-score's own example: precision 1, recall 1/3.
  assert metrics.rouge(['testing'], [free('testing one two')]) == close(
    {'rouge1': 50.0, 'rouge2': 0.0, 'rougeLsum': 50.0}
  )
  # Sentences in another order: all words, two of three bigrams.
  scores = metrics.rouge(['c d . a b . '], [free('a b . c d .')])
  assert scores == close(
    {'rouge1': 100.0, 'rouge2': 200 / 3, 'rougeLsum': 100.0}
  )
  # Of several references the best of each kind.
  assert metrics.rouge(['a b'], [free('x', 'a b')]) == close(
    {'rouge1': 100.0, 'rouge2': 100.0, 'rougeLsum': 100.0}
  )
  assert metrics.rouge([''], [free('a b')]) == {
    'rouge1': 0.0,
    'rouge2': 0.0,
    'rougeLsum': 0.0,
  }


@pytest.mark.parametrize(
  'score',
  [
    metrics.squad,
    metrics.squad_v2,
    metrics.trivia_qa,
    metrics.exact_match,
    metrics.rouge,
  ],
)
def test_right_and_empty_texts(score):
  golds = ['Lake Ontario .', 'forty two', 'Anna and Bob']
  examples = [free(gold) for gold in golds]
  scores = score(golds, examples)
  assert scores == close(dict.fromkeys(scores, 100.0))
  assert score([''] * 3, examples) == dict.fromkeys(scores, 0.0)
