"""Numbers about recorded decisions: what trace.json holds.

A token's first choice is its likeliest expert; 'other' are choices 2..K that
the policy keeps. Loads, classes and typical tokens are of choices before
capacity: what routers want; `kept` and `dropped` say what capacity made of it.
Table 14's entropy is that of the first choices of sentinel tokens over
experts, in nats (the paper does not say whether it counts other choices too;
`all_choices` does).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from st_moe.data.vocabularies import Vocabulary
from st_moe.trace.recording import StackRecord
from st_moe.trace.words import CLASSES, SPACE, classify

# An expert is said to be one of a class whose share of the expert's tokens is
# LIFT times its share of all, if it makes PART of them, or if the expert takes
# TAKEN of that class. Table 13's were chosen by eye; these are ours.
LIFT, PART, TAKEN = 2.0, 0.2, 0.3
_ENOUGH = 20  # tokens of a class, and of an expert, before anything is said

TYPICAL_TOKENS = 12  # of an expert
EXAMPLES = 4  # of an expert, in context
_CONTEXT = 6  # pieces on either side
START = '<start>'  # how the decoder's first input is shown


def describe(
  records: Mapping[str, StackRecord],
  vocabulary: Vocabulary,
  num_experts: int,
  shown_rows: int,
) -> dict[str, Any]:
  """Returns all numbers about a trace, ready for JSON.

  Args:
    records: by stack.
    vocabulary: of the text.
    num_experts: E.
    shown_rows: how many rows are kept word by word.

  Returns:
    'num_experts', 'uniform_entropy' (ln E, nats), 'classes', 'stacks' (numbers
    by stack and layer), 'pieces' (text of every id in 'rows') and 'rows'.
  """
  pieces = _pieces(records, vocabulary)
  stacks, rows = {}, []
  for stack, record in records.items():
    words = _Words(record, pieces, stack)
    stacks[stack] = {
      'tokens': int(record.real.sum()),
      'sentinels': int(words.of('sentinel').sum()),
      'classes': words.counts(),
      'layers': [
        _layer(record, i, words, num_experts) for i in range(len(record.layers))
      ],
    }
    rows.append([{stack: row} for row in _rows(record, words, shown_rows)])
  joined = [
    {key: value for part in parts for key, value in part.items()}
    for parts in zip(*rows, strict=True)
  ]
  ids = {i for row in joined for part in row.values() for i in part['tokens']}
  ids |= {i for row in joined for part in row.values() for i in part['targets']}
  return {
    'num_experts': num_experts,
    'uniform_entropy': math.log(num_experts),
    'classes': list(CLASSES),
    'stacks': stacks,
    'pieces': {str(i): pieces[i] for i in sorted(ids)} | {'0': START},
    'rows': joined,
  }


def entropy(counts: np.ndarray) -> float | None:
  """Returns the entropy of counts in nats; None where nothing was counted."""
  total = counts.sum()
  if not total:
    return None
  share = counts[counts > 0] / total
  return float(max(0.0, -(share * np.log(share)).sum()))


def _pieces(
  records: Mapping[str, StackRecord], vocabulary: Vocabulary
) -> dict[int, str]:
  """Returns the text of every id that occurs."""
  ids: set[int] = set()
  for record in records.values():
    for tokens in (record.tokens, record.targets):
      if tokens is not None:
        ids |= set(np.unique(tokens).tolist())
  return {i: vocabulary.piece(i) for i in ids}


class _Words:
  """The text of a stack: pieces and lexical classes, position by position.

  Attributes:
    tokens: int32 [N, L].
    real: bool [N, L].
    kinds: int8 [N, L], index into CLASSES; -1 at padding.
    pieces: text of every id.
    first_is_start: whether id 0 at the beginning of a row is the decoder's.
  """

  def __init__(self, record: StackRecord, pieces: dict[int, str], stack: str):
    self.tokens, self.real, self.pieces = record.tokens, record.real, pieces
    self.first_is_start = stack == 'decoder'
    number = {name: i for i, name in enumerate(CLASSES)}
    self.kinds = np.full(self.tokens.shape, -1, np.int8)
    for row, (ids, real) in enumerate(zip(self.tokens, self.real, strict=True)):
      at = np.flatnonzero(real)
      names = classify([pieces[i] for i in ids[at].tolist()])
      self.kinds[row, at] = [number[name] for name in names]

  def of(self, kind: str) -> np.ndarray:
    """Returns bool [N, L]: real tokens of a class."""
    return self.kinds == CLASSES.index(kind)

  def counts(self) -> dict[str, int]:
    """Returns the number of tokens of each class."""
    counts = np.bincount(self.kinds[self.real], minlength=len(CLASSES))
    return dict(zip(CLASSES, counts.tolist(), strict=True))

  def text(self, i: int) -> str:
    return START if i == 0 and self.first_is_start else self.pieces[i]

  def context(self, row: int, column: int) -> dict[str, str]:
    """Returns what stands before, at and after a position, as text."""
    real = np.flatnonzero(self.real[row])
    at = int(np.searchsorted(real, column))

    def join(start: int, end: int) -> str:
      ids = self.tokens[row, real[max(0, start) : max(0, end)]].tolist()
      return ''.join(map(self.text, ids)).replace(SPACE, ' ')

    return {
      'before': join(at - _CONTEXT, at).lstrip(),
      'token': self.text(int(self.tokens[row, column])),
      'after': join(at + 1, at + 1 + _CONTEXT).rstrip(),
    }


def _layer(
  record: StackRecord, index: int, words: _Words, num_experts: int
) -> dict[str, Any]:
  """Returns the numbers of one sparse layer."""
  expert = record.expert[index].astype(np.int64)  # [N, L, K]
  wanted, kept = record.wanted[index], record.kept[index]
  first = wanted[..., 0]

  def by_expert(chosen: np.ndarray) -> np.ndarray:
    """Counts choices [N, L, K] by expert."""
    return np.bincount(expert[chosen], minlength=num_experts)

  def first_entropy(chosen: np.ndarray) -> float | None:
    counts = np.bincount(expert[..., 0][first & chosen], minlength=num_experts)
    return entropy(counts)

  sentinel = words.of('sentinel')
  rank = np.broadcast_to(np.arange(expert.shape[-1]), expert.shape)
  counts = {
    'first': by_expert(wanted & (rank == 0)),
    'other': by_expert(wanted & (rank > 0)),
    'kept': by_expert(kept),
    'dropped': by_expert(wanted & ~kept),
  }
  total = max(1, int(wanted.sum()))
  lost = record.real & ~kept.any(axis=-1)
  tables = _Typical(expert[..., 0], first, words, num_experts)
  experts = []
  for e in range(num_experts):
    numbers = {name: int(values[e]) for name, values in counts.items()}
    experts.append(
      {'expert': e}
      | numbers
      | {'load': (numbers['first'] + numbers['other']) / total}
      | tables.expert(e)
    )
  return {
    'layer': record.layers[index],
    'entropy': {
      'sentinels': first_entropy(sentinel),
      'others': first_entropy(record.real & ~sentinel),
      'all_choices_sentinels': entropy(by_expert(wanted & sentinel[..., None])),
      'all_choices_others': entropy(
        by_expert(wanted & (record.real & ~sentinel)[..., None])
      ),
    },
    'max_load': max(expert['load'] for expert in experts) * num_experts,
    'unrouted': int(lost.sum()),
    'unrouted_share': float(lost.sum() / max(1, record.real.sum())),
    'unrouted_tokens': _most_unrouted(lost, words),
    'experts': experts,
  }


def _most_unrouted(lost: np.ndarray, words: _Words) -> list[dict[str, Any]]:
  """Returns the ids that most often reach no expert, with their counts."""
  ids, counts = np.unique(words.tokens[lost], return_counts=True)
  order = np.argsort(-counts, kind='stable')[:TYPICAL_TOKENS]
  result = []
  for i, count in zip(ids[order].tolist(), counts[order].tolist(), strict=True):
    everywhere = int(((words.tokens == i) & words.real).sum())
    result.append({'piece': words.text(i), 'count': count, 'of': everywhere})
  return result


class _Typical:
  """Which tokens and classes the experts of a layer take by first choice."""

  def __init__(
    self,
    expert: np.ndarray,
    chosen: np.ndarray,
    words: _Words,
    num_experts: int,
  ):
    """Counts.

    Args:
      expert: int64 [N, L], first choices.
      chosen: bool [N, L], where there is one.
      words: the text.
      num_experts: E.
    """
    self._expert, self._chosen, self._words = expert, chosen, words
    self._ids, place = np.unique(words.tokens[chosen], return_inverse=True)
    size = max(1, len(self._ids))
    key = expert[chosen] * size + place
    self._tokens = np.bincount(key, minlength=num_experts * size).reshape(
      num_experts, size
    )
    key = expert[chosen] * len(CLASSES) + words.kinds[chosen]
    self._classes = np.bincount(
      key, minlength=num_experts * len(CLASSES)
    ).reshape(num_experts, -1)

  def expert(self, e: int) -> dict[str, Any]:
    """Returns typical tokens, examples, and classes of one expert.

    Tokens are ordered by count x ln(lift), their part of the divergence of the
    expert's tokens from all: a rare token that only this expert takes and a
    frequent one that it prefers both count. Lift is the share of a token among
    the expert's over its share among all.
    """
    kinds = dict(zip(CLASSES, self._classes[e].tolist(), strict=True))
    lifts = {name: self._lift(e, name) for name in CLASSES}
    tokens = self._typical(e)
    return {
      'classes': kinds,
      'class_lift': lifts,
      'specialised': self._specialised(e),
      'tokens': tokens,
      'examples': self._examples(e, [token['id'] for token in tokens]),
    }

  def _lift(self, e: int, name: str) -> float | None:
    column, row = self._classes[:, CLASSES.index(name)], self._classes[e]
    if not column.sum() or not row.sum():
      return None
    share = column.sum() / self._classes.sum()
    return float(column[e] / row.sum() / share)

  def _specialised(self, e: int) -> list[str]:
    """Returns the classes of which it can be said to be an expert."""
    row = self._classes[e]
    found = []
    for i, name in enumerate(CLASSES):
      column = self._classes[:, i]
      if name == 'other' or min(row.sum(), column.sum()) < _ENOUGH:
        continue
      share, taken = row[i] / row.sum(), row[i] / column.sum()
      if self._lift(e, name) >= LIFT and (share >= PART or taken >= TAKEN):
        found.append(name)
    return sorted(found, key=lambda name: -row[CLASSES.index(name)])

  def _typical(self, e: int) -> list[dict[str, Any]]:
    row, total = self._tokens[e], self._tokens.sum()
    if not row.sum():
      return []
    with np.errstate(divide='ignore', invalid='ignore'):
      lift = row / row.sum() / (self._tokens.sum(axis=0) / total)
      score = np.where(row > 0, row * np.log(lift), -np.inf)
    order = np.argsort(-score, kind='stable')[:TYPICAL_TOKENS]
    return [
      {
        'id': int(self._ids[i]),
        'piece': self._words.text(int(self._ids[i])),
        'count': int(row[i]),
        'of': int(self._tokens[:, i].sum()),
        'lift': float(lift[i]),
      }
      for i in order
      if score[i] > 0
    ]

  def _examples(self, e: int, ids: Sequence[int]) -> list[dict[str, str]]:
    """Returns the first place of each of its most typical tokens."""
    mine = self._chosen & (self._expert == e)
    found = []
    for i in ids[:EXAMPLES]:
      row, column = np.argwhere(mine & (self._words.tokens == i))[0]
      found.append(self._words.context(int(row), int(column)))
    return found


def _rows(
  record: StackRecord, words: _Words, count: int
) -> list[dict[str, Any]]:
  """Returns the first rows, token by token, without their padding.

  'layers' has for each sparse layer 'expert' [tokens, K], -1 where the policy
  declines a choice, 'gate' [tokens, K] in hundredths, and 'dropped', [token,
  choice] of each that had no slot.
  """
  found = []
  for row in range(min(count, len(record.real))):
    real = record.real[row]
    layers = []
    for i in range(len(record.layers)):
      wanted, kept = record.wanted[i, row, real], record.kept[i, row, real]
      used = max(1, int(wanted.any(axis=0).sum()))
      expert = np.where(wanted, record.expert[i, row, real], -1)
      gate = np.where(wanted, record.gate[i, row, real], 0)
      layers.append(
        {
          'expert': expert[:, :used].tolist(),
          'gate': np.rint(100 * gate[:, :used]).astype(int).tolist(),
          'dropped': np.argwhere(wanted & ~kept).tolist(),
        }
      )
    targets = [] if record.targets is None else record.targets[row, real]
    found.append(
      {
        'tokens': record.tokens[row, real].tolist(),
        'targets': np.asarray(targets).tolist(),
        'classes': words.kinds[row, real].tolist(),
        'layers': layers,
      }
    )
  return found
