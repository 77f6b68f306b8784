"""What the results of a study say, as plain values: report.json.

Nothing here depends on how often the study was interrupted, on which machine a
run was, or on the clock.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from st_moe.study import verdicts
from st_moe.study.declaration import METRICS, Arm, Study
from st_moe.study.results import CRITERION, Result

_LEARNED = 0.05  # of the loss at the first log line; less is hardly learning


def summarize(
  study: Study, record: dict[str, Any], results: Sequence[Result]
) -> dict[str, Any]:
  """Returns the report of a study.

  Args:
    study: what is reported.
    record: study.json: scale, flags, configurations of the arms.
    results: all that there are; those of other configurations are left out,
      and named in 'warnings'.
  """
  scale, known = record['scale'], record['arms']
  study = study.with_arms(known)
  mine = [r for r in results if known.get(r.arm) == r.configuration]
  arms = [_arm(arm, scale, study, mine) for arm in study.arms_at(scale)]
  return {
    'study': study.name,
    'title': study.title,
    'paper': study.paper,
    'setting': study.setting,
    'scale': scale,
    'command': _command(record['command'], [*known], mine),
    'metric': {
      'name': study.metric,
      'label': METRICS[study.metric].label,
      'digits': METRICS[study.metric].digits,
    },
    'reference': study.reference,
    'seeds': sorted({result.seed for result in mine}),
    'arms': arms,
    'differences': _differences(study, scale, mine),
    'claims': _claims(study, scale, mine),
    'stability': CRITERION,
    'confidence': verdicts.CONFIDENCE,
    'notes': list(study.notes),
    'warnings': _warnings(study, arms, mine, results),
    'made_by': sorted(
      {', '.join(f'{k} {v}' for k, v in r.made_by.items()) for r in mine}
    ),
  }


def _command(
  command: str, arms: Sequence[str], results: Sequence[Result]
) -> str:
  """Returns a command that makes these results, in a folder DIR."""
  seeds = sorted({result.seed for result in results})
  if not seeds or seeds != [*range(len(seeds))]:
    return command  # no --seeds gives these
  made = {result.arm for result in results}
  if made < {*arms}:
    command += ''.join(f' --arm={arm}' for arm in arms if arm in made)
  return f'{command} --seeds={len(seeds)} --workdir=DIR'


def _values(
  results: Sequence[Result], metric: str
) -> dict[str, dict[int, float]]:
  """Returns {arm: {seed: value}} of stable runs."""
  key = METRICS[metric].key
  found: dict[str, dict[int, float]] = {}
  for result in results:
    if result.stable and key in result.values:
      found.setdefault(result.arm, {})[result.seed] = result.values[key]
  return found


def _stable(results: Sequence[Result]) -> dict[str, list[bool]]:
  found: dict[str, list[bool]] = {}
  for result in results:
    found.setdefault(result.arm, []).append(result.stable)
  return found


def _arm(
  arm: Arm, scale: str, study: Study, results: Sequence[Result]
) -> dict[str, Any]:
  """Returns a row of the table."""
  own = [result for result in results if result.arm == arm.name]
  values = _values(own, study.metric).get(arm.name, {})
  interval = verdicts.mean_interval([*values.values()])
  paper = arm.paper_at(scale)
  return {
    'name': arm.name,
    'runs': len(own),
    'stable_runs': sum(result.stable for result in own),
    'unstable': {
      str(result.seed): result.reason for result in own if not result.stable
    },
    'values': {str(seed): value for seed, value in values.items()},
    'mean': interval.estimate,
    'sd': float(np.std([*values.values()], ddof=1))
    if len(values) > 1
    else None,
    'low': interval.low,
    'high': interval.high,
    'paper': {
      'value': paper.value,
      'sd': paper.sd,
      'stable': paper.stable and list(paper.stable),
    },
    'curve': _curve(own),
  }


def _curve(results: Sequence[Result]) -> dict[str, list]:
  """Returns the mean of the histories of all runs, stable or not."""
  histories = [result.history for result in results]
  if not histories:
    return {}
  steps = max((history['step'] for history in histories), key=len)
  curve: dict[str, list] = {'step': list(steps)}
  for name in ('cross_entropy', 'router_z_loss'):
    curve[name] = []
    for index in range(len(steps)):
      at = [h[name][index] for h in histories if index < len(h[name])]
      at = [value for value in at if value is not None]
      curve[name].append(float(np.mean(at)) if at else None)
  return curve


def _differences(
  study: Study, scale: str, results: Sequence[Result]
) -> list[dict[str, Any]]:
  """Returns each arm minus the reference."""
  samples = _values(results, study.metric)
  arms = {arm.name: arm for arm in study.arms_at(scale)}
  if study.reference not in arms:
    return []
  rows = []
  for name in arms:
    if name == study.reference:
      continue
    weights = {name: 1.0, study.reference: -1.0}
    interval = verdicts.contrast(weights, samples)
    rows.append(
      {
        'arm': name,
        'paper': _paper_contrast(study, scale, weights, study.metric),
      }
      | verdicts.as_json(interval)
    )
  return rows


def _paper_contrast(
  study: Study, scale: str, weights: dict[str, float], metric: str
) -> float | None:
  """Returns what the paper's own numbers give; None where one is missing."""
  papers = {arm.name: arm.paper_at(scale) for arm in study.arms}
  total = 0.0
  for arm, weight in weights.items():
    paper = papers[arm]
    if metric == 'stable' and paper.stable:
      total += weight * paper.stable[0] / paper.stable[1]
    elif metric == study.metric and paper.value is not None:
      total += weight * paper.value
    else:
      return None
  return round(total, 6)


def _claims(
  study: Study, scale: str, results: Sequence[Result]
) -> list[dict[str, Any]]:
  rows = []
  run = {result.arm for result in results}
  for claim in study.claims_at(scale):
    if claim.metric == 'stable':
      interval = verdicts.stability_contrast(claim.contrast, _stable(results))
    else:
      interval = verdicts.contrast(
        claim.contrast, _values(results, claim.metric)
      )
    text = verdicts.verdict(interval, claim.expects, claim.margin)
    not_run = [arm for arm in claim.contrast if arm not in run]
    rows.append(
      {
        'text': claim.text,
        'contrast': dict(claim.contrast),
        'metric': claim.metric,
        'label': METRICS[claim.metric].label,
        'digits': METRICS[claim.metric].digits,
        'expects': claim.expects,
        'margin': claim.margin,
        'paper': _paper_contrast(study, scale, claim.contrast, claim.metric),
        'verdict': text,
        'why': verdicts.reason(interval, claim, text, not_run),
      }
      | verdicts.as_json(interval)
    )
  return rows


def _largest_fall(results: Sequence[Result]) -> float | None:
  """Returns the largest share of its loss that a run has lost, if any says."""
  shares = []
  for result in results:
    losses = [x for x in result.history['cross_entropy'] if x is not None]
    if len(losses) > 1:
      shares.append(1 - losses[-1] / losses[0])
  return max(shares, default=None)


def _hardly_learned(results: Sequence[Result]) -> list[str]:
  """Returns a warning where no run shows that it learned."""
  fell = _largest_fall(results)
  if fell is None:
    return [
      'no run has two lines in its log, so that none says whether it learned: '
      'verdicts say little; give more steps'
    ]
  if fell >= _LEARNED:
    return []
  return [
    f'no run has learned much: training cross entropy fell by {fell:.0%} at '
    'most, so that verdicts say little; give more steps'
  ]


def _warnings(
  study: Study,
  arms: Sequence[dict[str, Any]],
  mine: Sequence[Result],
  results: Sequence[Result],
) -> list[str]:
  found = []
  if others := len(results) - len(mine):
    are = 'result is' if others == 1 else 'results are'
    found.append(f'{others} {are} of another configuration: left out')
  if len({result.data for result in mine}) > 1:
    found.append(
      'the runs did not all read the same data: arms may differ for that alone'
    )
  if mine and METRICS[study.metric].repeats:  # steps are timed untrained too
    found += _hardly_learned(mine)
  most = max((arm['runs'] for arm in arms), default=0)
  absent = [arm['name'] for arm in arms if not arm['runs']]
  fewer = [arm['name'] for arm in arms if 0 < arm['runs'] < most]
  missing = [
    f'{what} {", ".join(names)}'
    for what, names in (('all of', absent), ('some of', fewer))
    if names
  ]
  if missing:
    found.append(f'not all runs are done; missing are {", and ".join(missing)}')
  return found
