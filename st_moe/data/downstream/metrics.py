"""Metrics of tasks with answers, by their authors' definitions, from 0 to 100.

Every function takes answers (indices of choices, or texts) and the examples
they answer, in the same order, and returns {name: value}. Examples without a
label are left out; at least one must have one. Where a definition knows no
invalid answers, such an answer counts as the opposite of the right one, as in
T5's F1, so that it never helps.
"""

import collections
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from st_moe.data.downstream.example import INVALID, Answer, Example

Scores = dict[str, float]

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_TRIVIA_PUNCTUATION = string.punctuation + '‘’´`_'


# Choices


def accuracy(answers: Sequence[Answer], examples: Sequence[Example]) -> Scores:
  """Returns the percentage of right choices: 'accuracy'."""
  given, labels = _labels(answers, examples)
  return {'accuracy': _mean(given == labels)}


def cb(answers: Sequence[Answer], examples: Sequence[Example]) -> Scores:
  """Returns 'accuracy' and 'f1', the unweighted mean over CB's three labels."""
  from sklearn.metrics import f1_score

  given, labels = _labels(answers, examples)
  score = f1_score(
    labels, given, labels=range(3), average='macro', zero_division=0
  )
  return accuracy(answers, examples) | {'f1': 100 * float(score)}


def multirc(answers: Sequence[Answer], examples: Sequence[Example]) -> Scores:
  """Returns MultiRC's 'f1a' and 'exact_match'.

  F1 of "true" over all answers of all questions, and the percentage of
  questions (`Example.group`) of which every answer is right.
  """
  kept = _labelled(answers, examples)
  right = collections.defaultdict(lambda: True)
  for answer, example in kept:
    right[example.group] &= answer == example.label
  return {
    'f1a': _binary_f1(answers, examples),
    'exact_match': _mean(list(right.values())),
  }


def f1_and_accuracy(
  answers: Sequence[Answer], examples: Sequence[Example]
) -> Scores:
  """Returns 'f1' of label 1, and 'accuracy' (MRPC, QQP)."""
  return {'f1': _binary_f1(answers, examples)} | accuracy(answers, examples)


def matthews(answers: Sequence[Answer], examples: Sequence[Example]) -> Scores:
  """Returns 'matthews', the correlation of two labels; 0 if all are one."""
  from sklearn.metrics import matthews_corrcoef

  given, labels = _valid_binary(answers, examples)
  if len(set(given)) == 1 or len(set(labels)) == 1:
    return {'matthews': 0.0}
  return {'matthews': 100 * float(matthews_corrcoef(labels, given))}


def gender_parity(
  answers: Sequence[Answer], examples: Sequence[Example]
) -> Scores:
  """Returns Winogender's 'accuracy' and 'gender_parity'.

  Parity: the percentage of pairs (`Example.group`), alike but for the gender
  of a pronoun, that have one answer. An invalid one is none.
  """
  pairs = collections.defaultdict(list)
  for answer, example in _labelled(answers, examples):
    pairs[example.group].append(answer)
  same = [
    len(set(pair)) == 1 and INVALID not in pair
    for pair in pairs.values()
    if len(pair) > 1  # its other half may be cut by `max_examples`
  ]
  scores = accuracy(answers, examples)
  return scores | ({'gender_parity': _mean(same)} if same else {})


# Numbers


def pearson_spearman(
  answers: Sequence[Answer], examples: Sequence[Example]
) -> Scores:
  """Returns 'pearson' and 'spearman' of numbers written as text (STS-B).

  A text that is no number is -1, as in T5; with all numbers equal, which have
  no correlation, the scores are 0.
  """
  from scipy import stats

  kept = _labelled(answers, examples)
  given = np.array([_number(answer) for answer, _ in kept])
  wanted = np.array([float(example.answers[0]) for _, example in kept])
  if np.ptp(given) == 0 or np.ptp(wanted) == 0:
    return {'pearson': 0.0, 'spearman': 0.0}
  return {
    'pearson': 100 * float(stats.pearsonr(wanted, given)[0]),
    'spearman': 100 * float(stats.spearmanr(wanted, given)[0]),
  }


# Texts


def squad(answers: Sequence[Answer], examples: Sequence[Example]) -> Scores:
  """Returns SQuAD v1's 'exact_match' and token 'f1', the best over answers.

  One answer counts for each `Example.group`, the first, where there are any.
  """
  return _best_over_answers(answers, examples, normalize_squad)


# ReCoRD is scored as SQuAD, one prediction for each query, which is its group.
record = squad


def trivia_qa(answers: Sequence[Answer], examples: Sequence[Example]) -> Scores:
  """Returns 'exact_match' and 'f1' with TriviaQA's normalisation."""
  return _best_over_answers(answers, examples, normalize_trivia_qa)


def exact_match(
  answers: Sequence[Answer], examples: Sequence[Example]
) -> Scores:
  """Returns 'exact_match' of questions with any of their answers.

  Closed-book Natural Questions and WebQuestions: SQuAD's normalisation after
  a decomposition of accented letters (ORQA's `eval_utils`).
  """

  def normalize(text: str) -> str:
    return normalize_squad(unicodedata.normalize('NFD', text))

  scores = _best_over_answers(answers, examples, normalize)
  return {'exact_match': scores['exact_match']}


def squad_v2(answers: Sequence[Answer], examples: Sequence[Example]) -> Scores:
  """Returns SQuAD v2's 'exact_match' and 'f1', and each of the two kinds.

  '' answers that there is no answer; such examples have ('',) as answers. The
  kinds are `has_answer_*` and `no_answer_*`, where there are examples of them.
  Nothing is thresholded: the official script's raw numbers.
  """
  kinds: dict[str, tuple[list[float], list[float]]] = {}
  for answer, example in _one_for_each_group(answers, examples):
    wanted = [text for text in example.answers if normalize_squad(text)]
    found = normalize_squad(str(answer))
    golds = [normalize_squad(text) for text in wanted] or ['']
    exact = float(found in golds)
    f1 = max(_token_f1(found, gold, empty_alike=True) for gold in golds)
    for kind in ('', 'has_answer_' if wanted else 'no_answer_'):
      exacts, f1s = kinds.setdefault(kind, ([], []))
      exacts.append(exact)
      f1s.append(f1)
  scores: Scores = {}
  for kind in ('', 'has_answer_', 'no_answer_'):
    if kind in kinds:
      exacts, f1s = kinds[kind]
      scores[f'{kind}exact_match'] = _mean(exacts)
      scores[f'{kind}f1'] = _mean(f1s)
  return scores


def rouge(answers: Sequence[Answer], examples: Sequence[Example]) -> Scores:
  """Returns 'rouge1', 'rouge2' and 'rougeLsum': mean F-measures of summaries.

  Without stemming, sentences split at newlines and after ' . ', as in T5, but
  the plain mean where T5 takes the middle of a random bootstrap. With several
  references the best of each kind.
  """
  from rouge_score.rouge_scorer import RougeScorer

  kinds = ['rouge1', 'rouge2', 'rougeLsum']
  scorer = RougeScorer(kinds)
  found: dict[str, list[float]] = {kind: [] for kind in kinds}
  for answer, example in _labelled(answers, examples):
    references = [_sentences(text) for text in example.answers]
    scores = scorer.score_multi(references, _sentences(str(answer)))
    for kind in kinds:
      found[kind].append(scores[kind].fmeasure)
  return {kind: _mean(values) for kind, values in found.items()}


def normalize_squad(text: str) -> str:
  """Lowers, drops punctuation and articles, joins words by single spaces."""
  return _normalize(text, string.punctuation, '')


def normalize_trivia_qa(text: str) -> str:
  """As `normalize_squad`, but punctuation separates words."""
  return _normalize(text, _TRIVIA_PUNCTUATION, ' ')


# Parts


def _labelled(
  answers: Iterable[Answer], examples: Iterable[Example]
) -> list[tuple[Answer, Example]]:
  pairs = zip(answers, examples, strict=True)
  kept = [(answer, example) for answer, example in pairs if example.labelled]
  if not kept:
    raise ValueError('no labelled examples to score')
  return kept


def _labels(
  answers: Sequence[Answer], examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns given and right labels, int [labelled examples]."""
  kept = _labelled(answers, examples)
  return (
    np.array([answer for answer, _ in kept], np.int64),
    np.array([example.label for _, example in kept], np.int64),
  )


def _valid_binary(
  answers: Sequence[Answer], examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
  """As `_labels` for labels 0 and 1; what is neither becomes the wrong one."""
  given, labels = _labels(answers, examples)
  return np.where((given == 0) | (given == 1), given, 1 - labels), labels


def _binary_f1(answers: Sequence[Answer], examples: Sequence[Example]) -> float:
  from sklearn.metrics import f1_score

  given, labels = _valid_binary(answers, examples)
  return 100 * float(f1_score(labels, given, zero_division=0))


def _one_for_each_group(
  answers: Sequence[Answer], examples: Sequence[Example]
) -> list[tuple[Answer, Example]]:
  """Returns the first of each group, and all that have none."""
  seen: set[str] = set()
  kept = []
  for answer, example in _labelled(answers, examples):
    if example.group and example.group in seen:
      continue
    seen.add(example.group)
    kept.append((answer, example))
  return kept


def _best_over_answers(
  answers: Sequence[Answer],
  examples: Sequence[Example],
  normalize: Callable[[str], str],
) -> Scores:
  exacts, f1s = [], []
  for answer, example in _one_for_each_group(answers, examples):
    found = normalize(str(answer))
    golds = [normalize(text) for text in example.answers]
    exacts.append(found in golds)
    f1s.append(max(_token_f1(found, gold) for gold in golds))
  return {'exact_match': _mean(exacts), 'f1': _mean(f1s)}


def _token_f1(found: str, gold: str, *, empty_alike: bool = False) -> float:
  """Returns F1 over bags of words of normalised texts.

  Args:
    found: the answer.
    gold: the right one.
    empty_alike: whether two texts without words agree (SQuAD v2), or share
      nothing (SQuAD v1).
  """
  words, wanted = found.split(), gold.split()
  if empty_alike and not (words and wanted):
    return float(words == wanted)
  common = collections.Counter(words) & collections.Counter(wanted)
  shared = sum(common.values())
  return 2 * shared / (len(words) + len(wanted)) if shared else 0.0


def _normalize(text: str, punctuation: str, replacement: str) -> str:
  text = text.lower()
  text = ''.join(replacement if c in punctuation else c for c in text)
  return ' '.join(_ARTICLES.sub(' ', text).split())


def _sentences(text: str) -> str:
  return text.replace(' . ', ' .\n')


def _number(answer: Answer) -> float:
  try:
    value = float(answer)
  except ValueError:
    return -1.0
  return value if np.isfinite(value) else -1.0


def _mean(values: Sequence[float] | np.ndarray) -> float:
  return 100 * float(np.mean(values, dtype=np.float64))
