"""Texts that t5 0.9.4 read and scored (golden_t5): the same numbers here."""

import json
from pathlib import Path

import pytest
from second_metrics import close

from st_moe.data.downstream import answers, metrics
from st_moe.data.downstream.example import Example

GOLDEN = json.loads(
  (Path(__file__).resolve().parent / 'golden_t5' / 'metrics.json').read_text()
)
BOOLS = ('False', 'True')
CB = ('entailment', 'contradiction', 'neutral')
NAMES = {
  'mean_3class_f1': 'f1', 'em': 'exact_match', 'pearson_corrcoef': 'pearson',
  'spearman_corrcoef': 'spearman',
}  # fmt: skip


def ours(scores):
  return close({NAMES.get(name, name): value for name, value in scores.items()})


def cases(*names):
  return [
    pytest.param(name, case, id=f'{name}-{seed}')
    for name in names
    for seed, case in enumerate(GOLDEN[name])
  ]


@pytest.mark.parametrize(
  ('name', 'case'), cases('accuracy', 'cb', 'f1_and_accuracy', 'multirc')
)
def test_choices(name, case):
  words = CB if name == 'cb' else BOOLS
  groups = case.get('groups', [''] * len(case['texts']))
  examples = [
    Example('', words[label], words, label, group=str(group))
    for label, group in zip(case['labels'], groups, strict=True)
  ]
  found = list(map(answers.choice, case['texts'], examples))
  assert -1 in found
  scores = getattr(metrics, name)(found, examples)
  if 'f1a' in scores:
    scores['f1'] = scores.pop('f1a')
  assert scores == ours(case['scores'])


@pytest.mark.parametrize(('name', 'case'), cases('wsc'))
def test_wsc(name, case):
  examples = [
    Example('', referent, label=label)
    for referent, label in zip(case['referents'], case['labels'], strict=True)
  ]
  found = list(map(answers.wsc, case['texts'], examples))
  assert {-1, 0, 1} <= set(found)
  assert metrics.accuracy(found, examples) == ours(case['scores'])


@pytest.mark.parametrize(('name', 'case'), cases('squad', 'trivia_qa'))
def test_free_answers(name, case):
  score = getattr(metrics, name)
  for groups, expected in (
    ([''] * len(case['texts']), case['alone']),
    (case['groups'], case['grouped']),
  ):
    examples = [
      Example('', right[0], answers=tuple(right), group=str(group))
      for right, group in zip(case['answers'], groups, strict=True)
    ]
    found = list(map(answers.free_text, case['texts'], examples))
    assert score(found, examples) == ours(expected)


@pytest.mark.parametrize(('name', 'case'), cases('pearson_spearman'))
def test_numbers(name, case):
  examples = [
    Example('', '', answers=(str(number),)) for number in case['numbers']
  ]
  found = list(map(answers.free_text, case['texts'], examples))
  assert metrics.pearson_spearman(found, examples) == ours(case['scores'])
