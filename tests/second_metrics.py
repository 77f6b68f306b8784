"""Metrics written anew in plain Python, from the official evaluators' rules.

What st_moe's metrics are compared with; and examples to score.
"""

import collections
import itertools
import math
import re

import pytest

from st_moe.data.downstream.example import Example


def chosen(labels, groups=None):
  """Examples with these labels."""
  groups = groups or [''] * len(labels)
  return [
    Example(inputs='', targets='', label=label, group=str(group))
    for label, group in zip(labels, groups, strict=True)
  ]


def free(*answers, group=''):
  """An example with these right texts."""
  return Example(inputs='', targets='', answers=tuple(answers), group=group)


def close(expected):
  return pytest.approx(expected, abs=1e-9)


class Second:
  """The definitions again, without libraries."""

  @staticmethod
  def f1(given, labels, positive):
    true_positive = sum(
      g == positive and label == positive
      for g, label in zip(given, labels, strict=True)
    )
    if not true_positive:
      return 0.0
    precision = true_positive / given.count(positive)
    recall = true_positive / labels.count(positive)
    return 2 * precision * recall / (precision + recall)

  @classmethod
  def macro_f1(cls, given, labels):
    return sum(cls.f1(given, labels, k) for k in range(3)) / 3

  @staticmethod
  def matthews(given, labels):
    count = collections.Counter(zip(given, labels, strict=True))
    tp, tn, fp, fn = (count[k] for k in ((1, 1), (0, 0), (1, 0), (0, 1)))
    under = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(under) if under else 0.0

  @staticmethod
  def pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    under = sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)
    return over / math.sqrt(under)

  @classmethod
  def spearman(cls, x, y):
    def ranks(values):  # ties share their mean rank
      below = [sum(w < v for w in values) for v in values]
      same = [sum(w == v for w in values) for v in values]
      return [b + (s + 1) / 2 for b, s in zip(below, same, strict=True)]

    return cls.pearson(ranks(x), ranks(y))

  @staticmethod
  def words(text):
    text = re.sub(r'[!-/:-@\[-`{-~]', '', text.lower())
    return [w for w in text.split() if w not in ('a', 'an', 'the')]

  @classmethod
  def token_f1(cls, text, gold):
    left, shared = cls.words(gold), 0
    for word in cls.words(text):
      if word in left:
        left.remove(word)
        shared += 1
    if not shared:
      return 0.0
    precision = shared / len(cls.words(text))
    recall = shared / len(cls.words(gold))
    return 2 * precision * recall / (precision + recall)

  @staticmethod
  def rouge_n(text, gold, n):
    def grams(words):
      shifted = (words[i:] for i in range(n))
      return collections.Counter(zip(*shifted, strict=False))

    found, wanted = (
      grams(re.findall('[a-z0-9]+', s.lower())) for s in (text, gold)
    )
    shared = (found & wanted).total()
    if not shared:
      return 0.0
    return 2 * shared / (found.total() + wanted.total())

  @classmethod
  def rouge_l_sum(cls, text, gold):
    """Union of longest common subsequences, each word used once."""

    def sentences(s):
      parts = s.lower().replace(' . ', ' .\n').split('\n')
      return [w for part in parts if (w := re.findall('[a-z0-9]+', part))]

    found, wanted = sentences(text), sentences(gold)
    if not found or not wanted:
      return 0.0
    left_found = collections.Counter(itertools.chain(*found))
    left_wanted = collections.Counter(itertools.chain(*wanted))
    hits = 0
    for gold_words in wanted:
      union = set()
      for words in found:
        union |= set(cls.common_positions(gold_words, words))
      for position in sorted(union):
        word = gold_words[position]
        if left_found[word] > 0 and left_wanted[word] > 0:
          hits += 1
          left_found[word] -= 1
          left_wanted[word] -= 1
    if not hits:
      return 0.0
    precision = hits / sum(map(len, found))
    recall = hits / sum(map(len, wanted))
    return 2 * precision * recall / (precision + recall)

  @staticmethod
  def common_positions(wanted, found):
    """Positions in `wanted` of a longest common subsequence, the last ones."""
    best = [[0] * (len(found) + 1) for _ in range(len(wanted) + 1)]
    for i, j in itertools.product(range(len(wanted)), range(len(found))):
      same = wanted[i] == found[j]
      best[i + 1][j + 1] = (
        best[i][j] + 1 if same else max(best[i][j + 1], best[i + 1][j])
      )
    positions, i, j = [], len(wanted), len(found)
    while i and j:
      if wanted[i - 1] == found[j - 1]:
        positions.append(i - 1)
        i, j = i - 1, j - 1
      elif best[i][j - 1] > best[i - 1][j]:
        j -= 1
      else:
        i -= 1
    return positions
