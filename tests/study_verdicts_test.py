"""Intervals and verdicts of a study, against arithmetic done by hand."""

import math

import pytest
from scipy import stats

from st_moe.study import verdicts
from st_moe.study.results import instability
from st_moe.study.verdicts import AGREES, DISAGREES, UNRESOLVED, Interval


def interval(low, high):
  middle = None if low is None else (low + high) / 2
  return Interval(middle, low, high, 3, 'paired')


def test_arms_that_share_seeds_are_compared_seed_by_seed():
  samples = {'a': {0: 11.0, 1: 22.0, 2: 33.0}, 'b': {0: 10.0, 1: 20.0, 2: 30.0}}
  found = verdicts.contrast({'a': 1, 'b': -1}, samples)
  # Differences 1, 2, 3: mean 2, sd 1; Student's t of 2 degrees is 4.302653,
  # over the root of 3: 2.484138. Apart, the seeds would hide it all.
  assert (found.seeds, found.method) == (3, 'paired')
  assert found.estimate == 2.0
  assert math.isclose(found.low, -0.484138, abs_tol=1e-6)
  assert math.isclose(found.high, 4.484138, abs_tol=1e-6)


def test_only_shared_seeds_are_paired():
  samples = {'a': {0: 1.0, 1: 2.0, 7: 99.0}, 'b': {0: 0.0, 1: 0.0, 8: -99.0}}
  found = verdicts.contrast({'a': 1, 'b': -1}, samples)
  # 1 and 2: mean 1.5, sd 0.707107; t of 1 degree is 12.706205, half 6.353102.
  assert (found.estimate, found.seeds) == (1.5, 2)
  assert math.isclose(found.high, 7.853102, abs_tol=1e-6)


def test_a_sum_of_four_arms():
  samples = {
    'a': {0: 4.0, 1: 5.0},
    'b': {0: 1.0, 1: 1.0},
    'c': {0: 2.0, 1: 2.0},
    'd': {0: 1.0, 1: 0.0},
  }
  weights = {'a': 1, 'b': -1, 'c': -1, 'd': 1}
  # 4 - 1 - 2 + 1 = 2 and 5 - 1 - 2 + 0 = 2: no spread at all.
  found = verdicts.contrast(weights, samples)
  assert (found.estimate, found.low, found.high) == (2.0, 2.0, 2.0)


def test_arms_without_shared_seeds_have_welch_s_interval():
  first, second = [1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 9.0]
  samples = {
    'a': dict(enumerate(first)),
    'b': {10 + i: value for i, value in enumerate(second)},
  }
  found = verdicts.contrast({'a': 1, 'b': -1}, samples)
  expected = stats.ttest_ind(first, second, equal_var=False)
  low, high = expected.confidence_interval(0.95)
  assert (found.estimate, found.method) == (2.0 - 5.25, 'welch')
  assert math.isclose(found.low, low, rel_tol=1e-12)
  assert math.isclose(found.high, high, rel_tol=1e-12)


@pytest.mark.parametrize(
  'samples',
  [
    {'a': {0: 5.0}, 'b': {0: 1.0}},
    {'a': {0: 5.0}, 'b': {1: 1.0}},
    {'a': {0: 5.0, 1: 6.0}, 'b': {2: 1.0}},
  ],
)
def test_one_seed_gives_no_interval_and_no_verdict(samples):
  found = verdicts.contrast({'a': 1, 'b': -1}, samples)
  assert found.estimate >= 4.0
  assert (found.low, found.high) == (None, None)
  assert verdicts.verdict(found, 'above') == UNRESOLVED


def test_an_arm_that_is_never_stable_gives_no_estimate():
  found = verdicts.contrast({'a': 1, 'b': -1}, {'a': {0: 5.0, 1: 6.0}})
  assert found.estimate is None
  assert verdicts.verdict(found, 'above') == UNRESOLVED


@pytest.mark.parametrize(
  ('low', 'high', 'expects', 'margin', 'expected'),
  [
    (0.1, 0.2, 'above', 0.0, AGREES),
    (-0.2, -0.1, 'above', 0.0, DISAGREES),
    (-0.1, 0.2, 'above', 0.0, UNRESOLVED),
    (0.0, 0.2, 'above', 0.0, UNRESOLVED),  # zero is in the interval
    (-0.01, 0.2, 'not_below', 0.02, AGREES),
    (-0.03, 0.2, 'not_below', 0.02, UNRESOLVED),
    (-0.2, -0.03, 'not_below', 0.02, DISAGREES),
    (-0.01, 0.01, 'within', 0.02, AGREES),
    (-0.03, 0.01, 'within', 0.02, UNRESOLVED),
    (-0.2, 0.2, 'within', 0.02, UNRESOLVED),
    (0.03, 0.2, 'within', 0.02, DISAGREES),
    (-0.2, -0.03, 'within', 0.02, DISAGREES),
  ],
)
def test_verdicts(low, high, expects, margin, expected):
  assert verdicts.verdict(interval(low, high), expects, margin) == expected


def test_the_paper_s_own_shares_of_stable_runs_leave_it_open():
  """3 of 3 with the z-loss, 4 of 6 without (Table 4)."""
  stable = {'z_loss': [True] * 3, 'baseline': [True] * 4 + [False] * 2}
  found = verdicts.stability_contrast({'z_loss': 1, 'baseline': -1}, stable)
  # Wilson's intervals: 0.438503 to 1 and 0.299993 to 0.903228. Newcombe's:
  # 1/3 - hypot(0.561497, 0.236561) and 1/3 + hypot(0, 0.366673).
  assert math.isclose(found.estimate, 1 / 3)
  assert math.isclose(found.low, -0.275962, abs_tol=2e-6)
  assert math.isclose(found.high, 0.700006, abs_tol=2e-6)
  assert verdicts.verdict(found, 'above') == UNRESOLVED


def test_shares_of_stable_runs_that_leave_no_doubt():
  stable = {'a': [True] * 6, 'b': [False] * 6}
  # Wilson's: z^2 / (6 + z^2) = 0.390334 from either end; d = 1,
  # low = 1 - 0.390334 * sqrt(2) = 0.447984.
  found = verdicts.stability_contrast({'b': -1, 'a': 1}, stable)
  assert math.isclose(found.low, 0.447984, abs_tol=2e-6)
  assert verdicts.verdict(found, 'above') == AGREES
  one = verdicts.stability_contrast(
    {'b': -1, 'a': 1}, {'a': [True], 'b': [False]}
  )
  assert (one.estimate, one.low) == (1.0, None)


def test_a_few_runs_that_differ_altogether():
  """Barnard's p of k of k and 0 of k is the largest 2 x^k (1 - x)^k."""
  for runs, p, expected in ((2, 2 / 16, UNRESOLVED), (3, 2 / 64, AGREES)):
    stable = {'a': [True] * runs, 'b': [False] * runs}
    found = verdicts.stability_contrast({'a': 1, 'b': -1}, stable)
    assert found.low > 0
    assert math.isclose(found.p, p, rel_tol=1e-3)
    assert verdicts.verdict(found, 'above') == expected


def test_runs_that_are_all_stable_are_alike():
  stable = {'a': [True] * 3, 'b': [True] * 3}
  found = verdicts.stability_contrast({'a': 1, 'b': -1}, stable)
  assert (found.estimate, found.p) == (0.0, 1.0)
  assert verdicts.verdict(found, 'above') == UNRESOLVED


STEPS = list(range(10, 410, 10))  # 40 log lines of a run of 400 steps


def falling(count=40):
  return [7.0 - 0.05 * i for i in range(count)]


def test_a_falling_loss_is_stable():
  assert instability(STEPS, falling(), 0, 400) == ''


def test_a_spike_that_recovers_within_a_twentieth_is_stable():
  losses = falling()
  losses[30] = 7.0  # 10 steps above 5.55 + 0.5; 20 are too many
  assert instability(STEPS, losses, 0, 400) == ''


def test_a_rise_that_stays_is_unstable():
  losses = falling()
  losses[30], losses[31] = 7.0, 7.0
  assert instability(STEPS, losses, 0, 400) == (
    'cross entropy above 5.55 + 0.5 nats (of step 300) from step 300 to 320'
  )


def test_what_is_not_finite_is_unstable():
  assert instability(STEPS, falling(), 3, 400) == '3 steps were not finite'
  assert instability(STEPS, falling(), 1, 400) == '1 step was not finite'
  losses = falling()
  losses[5] = None
  expected = 'the loss was not finite at step 60'
  assert instability(STEPS, losses, 0, 400) == expected
