"""The report of a study: its command, its reasons, its pictures."""

import re

import pytest

from st_moe.study import declaration, pictures
from st_moe.study.results import Result
from st_moe.study.summary import summarize


def result_of(study, arm, seed, stable=True, losses=(7.0, 3.0)):
  key = declaration.METRICS[study.metric].key
  values = {key: -1.0 - seed} if stable else {}
  reason = '' if stable else 'the loss was not finite at step 2'
  return Result(
    arm, seed, 'same', 'text', stable, reason, 2, values,
    {
      'step': [*range(len(losses))],
      'cross_entropy': [*losses],
      'router_z_loss': [4.0] * len(losses),
    },
    {},
  )  # fmt: skip


def summary_of(results):
  study = declaration.find_study('bias')
  arms = {arm.name: 'same' for arm in study.arms}
  record = {'scale': 'tiny', 'command': 'st_moe study bias', 'arms': arms}
  made = [result_of(study, *result) for result in results]
  return summarize(study, record, made)


def test_arms_that_were_not_run_are_not_called_unstable():
  """The claims are of multiplicative, none and additive, in pairs."""
  found = summary_of([('none', 0), ('multiplicative', 0, False)])
  assert [claim['why'] for claim in found['claims']] == [
    'no stable run of an arm',
    'not run yet: additive',
    'not run yet: additive',
  ]
  found = summary_of([('none', 0), ('multiplicative', 0)])
  assert found['claims'][0]['why'] == 'no verdict from one seed'


def test_runs_that_hardly_learned_are_said_to_have():
  untrained = [('none', 0, True, (7.0, 6.9)), ('additive', 0, True, (7.0, 6.8))]
  (warning, *_) = summary_of(untrained)['warnings']
  assert warning.startswith(
    'no run has learned much: training cross entropy fell by 3% at most'
  )
  (warning, *_) = summary_of([('none', 0, True, (7.0,))])['warnings']
  assert warning.startswith('no run has two lines in its log')
  trained = [*untrained, ('none', 1)]
  assert 'fell by' not in ' '.join(summary_of(trained)['warnings'])


@pytest.mark.parametrize(
  ('seeds', 'flags'),
  [
    ((0, 1), ' --arm=none --seeds=2 --workdir=DIR'),
    ((0, 2), ''),  # which no --seeds gives
    ((), ''),
  ],
)
def test_the_command_of_a_report_makes_it_again(seeds, flags):
  found = summary_of([('none', seed) for seed in seeds])
  assert found['command'] == f'st_moe study bias{flags}'


def test_ticks_of_the_curves_are_plain_numbers():
  found = summary_of([('none', 0)])
  for low, high in ((3.8, 4.6), (0.02, 30.0)):
    curve = found['arms'][1]['curve']
    curve.update(
      step=[10, 30], cross_entropy=[3.0, 2.0], router_z_loss=[high, low]
    )
    figure = pictures.draw(found)['curves.png']
    figure.canvas.draw()
    for axes in figure.axes:
      for axis in (axes.xaxis, axes.yaxis):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        assert len(labels) > 2
        assert all(re.fullmatch(r'[−\d.,]+', label) for label in labels)
      steps = [label.get_text() for label in axes.get_xticklabels()]
      assert all('.' not in label for label in steps)
