"""Routing written from the paper's equations with loops: slow and obvious.

The oracle of the routing tests. It shares no code with the package. Softmax is
in float32, where small probabilities are exactly 0; the rest is in float64.
The algorithms are the released code's (moe.py), equations 5 and 7-9 the
paper's.
"""

import math

import numpy as np


def softmax(values):
  values = np.asarray(values, np.float32)
  exps = np.exp(values - values.max())
  return (exps / exps.sum()).astype(np.float64)


def top_choices(probs, num_choices):
  """Returns [(expert, probability)] of one token; the first of equals wins."""
  rest = list(probs)
  choices = []
  for _ in range(num_choices):
    expert = rest.index(max(rest))
    choices.append((expert, rest[expert]))
    rest[expert] = 0.0
  return choices


def token_choice(
  logits,
  mask,
  *,
  num_choices,
  capacity,
  normalization='before_drop',
  policy='all',
  threshold=0.2,
  priority='position',
):
  """Returns combine weights [G, S, E, C] (appendices D and G)."""
  groups, tokens, num_experts = logits.shape
  combine = np.zeros((groups, tokens, num_experts, capacity))
  for g in range(groups):
    choices, first_probability = [], []
    for s in range(tokens):
      chosen = top_choices(softmax(logits[g, s]), num_choices)
      first_probability.append(chosen[0][1])
      if normalization == 'before_drop' and num_choices > 1:
        total = sum(gate for _, gate in chosen)
        chosen = [(expert, gate / total) for expert, gate in chosen]
      choices.append(chosen)
    order = [s for s in range(tokens) if mask[g, s]]
    if priority == 'probability':
      order.sort(key=lambda s: -first_probability[s])
    used = [0] * num_experts
    for rank in range(num_choices):  # all first choices, then all second
      for s in order:
        expert, gate = choices[s][rank]
        if rank > 0 and policy == 'none':
          continue
        if rank > 0 and policy == 'threshold' and gate <= threshold:
          continue
        if used[expert] < capacity:
          combine[g, s, expert, used[expert]] = gate
          used[expert] += 1
    if normalization == 'after_drop':
      for s in range(tokens):
        total = combine[g, s].sum()
        if total > 0:
          combine[g, s] /= total
  return combine


def expert_choice(logits, mask, *, capacity):
  """Returns combine weights [G, S, E, C]."""
  groups, tokens, num_experts = logits.shape
  combine = np.zeros((groups, tokens, num_experts, capacity))
  for g in range(groups):
    real = [s for s in range(tokens) if mask[g, s]]
    if not real:
      continue
    takers = dict.fromkeys(real, 0)
    taken = []
    for e in range(num_experts):
      probs = softmax([logits[g, s, e] for s in real])
      ranking = sorted(range(len(real)), key=lambda i: -probs[i])
      for slot, i in enumerate(ranking[:capacity]):
        taken.append((real[i], e, slot, probs[i]))
        takers[real[i]] += 1
    for s, e, slot, prob in taken:
      combine[g, s, e, slot] = prob / takers[s]
  return combine


def balance_loss(logits, mask, *, form, num_choices=1):
  """Returns N * sum_i f_i P_i, averaged over groups (equations 7-9).

  Fractions are of all S tokens of the group; padding is left out of the sums.
  'switch' leaves it in and scales by the share of real tokens.
  """
  groups, tokens, num_experts = logits.shape
  counted = num_choices if form == 'all_choices' else 1
  total = 0.0
  for g in range(groups):
    f, p = np.zeros(num_experts), np.zeros(num_experts)
    for s in range(tokens):
      if form != 'switch' and not mask[g, s]:
        continue
      probs = softmax(logits[g, s])
      p += probs / tokens
      for expert, _ in top_choices(probs, counted):
        f[expert] += 1 / tokens
    scale = mask[g].sum() / tokens if form == 'switch' else 1.0
    total += scale * num_experts * (f * p).sum()
  return total / groups


def second_choice_loss(logits, mask):
  """Returns the loss over second choices, without the factor 0.5."""
  groups, tokens, num_experts = logits.shape
  total = 0.0
  for g in range(groups):
    f, p = np.zeros(num_experts), np.zeros(num_experts)
    for s in range(tokens):
      probs = softmax(logits[g, s])
      (first, _), (second, _) = top_choices(probs, 2)
      if mask[g, s]:
        f[second] += 1 / tokens
        probs[first] = 0.0  # padding keeps its first choice
      p += probs / probs.sum() / tokens
    total += num_experts * (f * p).sum()
  return total / groups


def expert_choice_loss(logits, mask):
  """Returns expert choice's own balance loss."""
  groups, tokens, num_experts = logits.shape
  total = 0.0
  for g in range(groups):
    real = [s for s in range(tokens) if mask[g, s]]
    if not real:
      continue
    wanted = np.zeros(len(real))
    for e in range(num_experts):
      wanted += softmax([logits[g, s, e] for s in real]) / num_experts
    total += (wanted**2).sum() * len(real)
  return total / groups


def z_loss(logits, mask):
  """Returns the mean of (log sum exp)^2 over real tokens (equation 5)."""
  squares = [
    (row.max() + math.log(np.exp(row - row.max()).sum())) ** 2
    for row in np.asarray(logits, np.float64)[mask]
  ]
  return sum(squares) / max(len(squares), 1)
