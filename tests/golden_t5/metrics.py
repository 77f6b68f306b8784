"""Makes metrics.json: texts that models may write, and t5's scores of them.

Run where generate.py runs: `python metrics.py`. Every case has random right
answers and texts, some of them no answer at all; t5 reads the answers from the
texts and scores them. No test needs it.
"""

import functools
import json
import random
from pathlib import Path

import numpy as np
from t5.data import postprocessors
from t5.evaluation import metrics

HERE = Path(__file__).resolve().parent
WORDS = (
  'The', 'a', "Cat's", 'hat,', 'sat.', 'on-top', 'of', '(mats)', 'U.S.', 'it!',
  'Rock_and', "'n'",
)  # fmt: skip
BOOLS = ['False', 'True']
CB = ['entailment', 'contradiction', 'neutral']
ROWS = 60
CASES = 5


def text(draw: random.Random, longest: int) -> str:
  return ' '.join(draw.choices(WORDS, k=draw.randint(1, longest)))


def choices(draw: random.Random, labels: list[str], metric_fns) -> dict:
  right = [draw.randrange(len(labels)) for _ in range(ROWS)]
  texts = [
    draw.choice([*labels, labels[label], labels[label].lower(), 'maybe', ''])
    for label in right
  ]
  read = [
    postprocessors.string_label_to_class_id(one, label_classes=labels)
    for one in texts
  ]
  scores = {}
  for metric in metric_fns:  # which may change the array
    scores |= metric(np.array(right), np.array(read))
  return {'labels': right, 'texts': texts, 'scores': scores}


def multirc(draw: random.Random) -> dict:
  case = choices(draw, BOOLS, [])
  groups = [draw.randrange(20) for _ in range(ROWS)]
  targets = [
    {'value': label, 'group': group}
    for label, group in zip(case['labels'], groups, strict=True)
  ]
  found = [postprocessors.multirc(one) for one in case['texts']]
  exact = metrics.mean_group_metric(metrics.all_match)(targets, found)
  f1 = metrics.multirc_f1_over_all_answers(targets, found)
  return case | {'groups': groups, 'scores': f1 | exact}


def wsc(draw: random.Random) -> dict:
  referents = [text(draw, 3) for _ in range(ROWS)]
  labels = [draw.randrange(2) for _ in range(ROWS)]
  texts = [
    draw.choice([one, one.lower(), text(draw, 2), f'the {one}', 'the', ''])
    for one in referents
  ]
  found = [
    postprocessors.wsc_simple(one, {'targets_pretokenized': referent})
    for one, referent in zip(texts, referents, strict=True)
  ]
  scores = metrics.accuracy(labels, found)
  return {
    'labels': labels,
    'texts': texts,
    'referents': referents,
    'scores': scores,
  }


def free(draw: random.Random, metric) -> dict:
  answers = [
    [text(draw, 4) for _ in range(draw.randint(1, 3))] for _ in range(ROWS)
  ]
  texts = [
    draw.choice([one[-1], one[0].lower(), text(draw, 4), '']) for one in answers
  ]
  groups = [draw.randrange(40) for _ in range(ROWS)]
  targets = [
    {'value': one, 'group': group}
    for one, group in zip(answers, groups, strict=True)
  ]
  found = [{'value': one} for one in texts]
  scores = {'alone': metric(answers, texts)}
  scores['grouped'] = metrics.deduplicate_metric(metric)(targets, found)
  return {'answers': answers, 'texts': texts, 'groups': groups} | scores


def numbers(draw: random.Random) -> dict:
  right = [draw.randrange(26) / 5 for _ in range(ROWS)]
  texts = [
    draw.choice([str(one), f'{one + draw.gauss(0, 1):.1f}', 'four'])
    for one in right
  ]
  found = [postprocessors.string_to_float(one) for one in texts]
  scores = metrics.pearson_corrcoef(right, found)
  scores |= metrics.spearman_corrcoef(right, found)
  return {'numbers': right, 'texts': texts, 'scores': scores}


MAKERS = {
  'accuracy': lambda draw: choices(draw, BOOLS, [metrics.accuracy]),
  'cb': lambda draw: choices(
    draw, CB, [metrics.accuracy, metrics.mean_multiclass_f1(num_classes=3)]
  ),
  'f1_and_accuracy': lambda draw: choices(
    draw, BOOLS, [metrics.accuracy, metrics.f1_score_with_invalid]
  ),
  'multirc': multirc,
  'wsc': wsc,
  'squad': functools.partial(free, metric=metrics.squad),
  'trivia_qa': functools.partial(free, metric=metrics.trivia_qa),
  'pearson_spearman': numbers,
}


def main() -> None:
  cases = {
    name: [make(random.Random(seed)) for seed in range(CASES)]
    for name, make in MAKERS.items()
  }
  (HERE / 'metrics.json').write_text(json.dumps(cases) + '\n')


if __name__ == '__main__':
  main()
