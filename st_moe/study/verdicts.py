"""From values over seeds to intervals, and from intervals to verdicts.

All intervals have 95% confidence and are not adjusted for the number of claims.
Arms that share seeds are compared seed by seed, since runs of one seed see the
same batches and begin alike; others by Welch's interval. Shares of stable runs
are compared by Newcombe's interval, made of Wilson's two (Newcombe 1998,
Statistics in Medicine 17, 873-890, method 10), and because that is too narrow
for a few runs, Barnard's exact test has to agree.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from st_moe.study.declaration import Claim

CONFIDENCE = 0.95
AGREES, DISAGREES = 'agrees', 'disagrees'
UNRESOLVED = 'not resolved at this scale'
_NAMED_ARMS = 4  # that were not run, of a claim
Samples = Mapping[str, Mapping[int, float]]  # {arm: {seed: value}}


@dataclasses.dataclass(frozen=True)
class Interval:
  """An estimate with its confidence interval.

  Attributes:
    estimate: None when an arm has no value.
    low, high: None when there are too few seeds.
    seeds: over which it is.
    method: 'paired', 'welch' or 'newcombe'.
    p: of Barnard's exact test, for shares of stable runs.
  """

  estimate: float | None
  low: float | None
  high: float | None
  seeds: int
  method: str
  p: float | None = None


def _t_interval(
  estimate: float, variance: float, freedom: float, seeds: int, method: str
) -> Interval:
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
  return Interval(estimate, estimate - half, estimate + half, seeds, method)


def mean_interval(values: Sequence[float]) -> Interval:
  """Returns the mean of values with Student's interval."""
  n = len(values)
  if n < 2:
    mean = float(values[0]) if n else None
    return Interval(mean, None, None, n, 'paired')
  mean, variance = float(np.mean(values)), float(np.var(values, ddof=1))
  return _t_interval(mean, variance / n, n - 1, n, 'paired')


def contrast(weights: Mapping[str, float], samples: Samples) -> Interval:
  """Returns a weighted sum of arms with its interval.

  Args:
    weights: {arm: weight}.
    samples: values of the metric; seeds that are absent were not run, or were
      unstable.
  """
  used = {arm: samples.get(arm, {}) for arm in weights}
  shared = sorted(set.intersection(*(set(values) for values in used.values())))
  if len(shared) >= 2 or not all(used.values()):
    return mean_interval(
      [
        sum(w * used[arm][seed] for arm, w in weights.items())
        for seed in shared
      ]
    )
  estimate = sum(
    w * float(np.mean([*used[a].values()])) for a, w in weights.items()
  )
  fewest = min(map(len, used.values()))
  if fewest < 2:
    return Interval(estimate, None, None, fewest, 'welch')
  terms = [
    (
      w**2 * float(np.var([*used[arm].values()], ddof=1)) / len(used[arm]),
      len(used[arm]),
    )
    for arm, w in weights.items()
  ]
  variance = sum(term for term, _ in terms)
  below = sum(term**2 / (n - 1) for term, n in terms)
  freedom = variance**2 / below if below else math.inf
  return _t_interval(estimate, variance, freedom, fewest, 'welch')


def stability_contrast(
  weights: Mapping[str, float], stable: Mapping[str, Sequence[bool]]
) -> Interval:
  """Returns the difference of two shares of stable runs with its interval.

  Args:
    weights: of two arms, 1 and -1.
    stable: {arm: for each of its runs whether it was}.
  """
  first, second = sorted(weights, key=lambda arm: -weights[arm])
  runs = [list(stable.get(arm, ())) for arm in (first, second)]
  fewest = min(map(len, runs))
  if not fewest:
    return Interval(None, None, None, 0, 'newcombe')
  (p, p_low, p_high), (q, q_low, q_high) = map(_wilson, runs)
  if fewest < 2:
    return Interval(p - q, None, None, fewest, 'newcombe')
  return Interval(
    p - q,
    p - q - math.hypot(p - p_low, q_high - q),
    p - q + math.hypot(p_high - p, q - q_low),
    fewest,
    'newcombe',
    _barnard(*runs),
  )


def _barnard(first: Sequence[bool], second: Sequence[bool]) -> float:
  """Returns the two-sided p of equal shares; 1 where all runs are alike."""
  counts = [[sum(runs), len(runs) - sum(runs)] for runs in (first, second)]
  table = np.array(counts).T  # columns are samples
  if not table.any(axis=1).all():
    return 1.0
  return float(stats.barnard_exact(table).pvalue)


def _wilson(runs: Sequence[bool]) -> tuple[float, float, float]:
  """Returns a share with the ends of Wilson's interval."""
  count = sum(map(bool, runs))
  interval = stats.binomtest(count, len(runs)).proportion_ci(
    CONFIDENCE, method='wilson'
  )
  return count / len(runs), float(interval.low), float(interval.high)


def verdict(interval: Interval, expects: str, margin: float = 0.0) -> str:
  """Returns AGREES, DISAGREES or UNRESOLVED.

  Args:
    interval: of the contrast.
    expects: of the claim: 'above' is decided when the interval leaves out 0;
      'not_below' when it leaves out -margin; 'within' when it lies inside
      (-margin, margin), or outside of it.
    margin: of the claim.
  """
  low, high = interval.low, interval.high
  if low is None or high is None:
    return UNRESOLVED
  if interval.p is not None and interval.p >= 1 - CONFIDENCE:
    return UNRESOLVED
  floor = -margin if expects != 'above' else 0.0
  if expects == 'within':
    if -margin < low and high < margin:
      return AGREES
    return DISAGREES if high < -margin or low > margin else UNRESOLVED
  if low > floor:
    return AGREES
  return DISAGREES if high < floor else UNRESOLVED


def reason(
  interval: Interval, claim: Claim, text: str, not_run: Sequence[str] = ()
) -> str:
  """Returns why a verdict is what it is, in a few words.

  Args:
    interval: of the contrast.
    claim: that is judged.
    text: the verdict.
    not_run: arms of the claim of which there is no run yet.
  """
  if not_run:
    named = ', '.join(not_run[:_NAMED_ARMS])
    more = len(not_run) - _NAMED_ARMS
    return f'not run yet: {named}' + (f' and {more} more' if more > 0 else '')
  if interval.estimate is None:
    return 'no stable run of an arm'
  if interval.low is None:
    return 'no verdict from one seed'
  if text != UNRESOLVED:
    return ''
  if interval.p is not None:
    return f"p = {interval.p:.2f} in Barnard's exact test"
  if claim.expects == 'above':
    return 'the interval spans zero'
  return f'the interval spans the margin of {claim.margin:g}'


def as_json(interval: Interval) -> dict[str, Any]:
  return dataclasses.asdict(interval)
