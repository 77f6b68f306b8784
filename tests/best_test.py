"""Which step is the best, and when a run has waited long enough."""

import json
import math

import pytest

from st_moe.best import BestStep, choose_metric, find_best, rank
from st_moe.errors import UserError
from st_moe.main import main

MEASURED = ('eval/loss', 'eval/superglue.cb/f1', 'eval/superglue.cb/score')


def run(best, values):
  """Returns what each evaluation said, every tenth step."""
  name = best.metric
  return [
    best.add(10 * (i + 1), {name: value}) for i, value in enumerate(values)
  ]


def test_a_score_counts_upward_and_of_equals_the_first_is_best():
  best = BestStep('eval/score')
  values = [50.0, 60.0, 60.0, math.nan, 59.0, 61.0]
  assert run(best, values) == [True, True, False, False, False, True]
  assert best.record() == {'metric': 'eval/score', 'step': 60, 'value': 61.0}


def test_held_out_loss_decides_between_equal_scores():
  # No answer has the form that is asked for yet, but the model learns.
  best = BestStep('eval/score', patience=2)
  evaluations = [(0.0, 6.2), (0.0, 3.7), (0.0, math.nan), (0.0, 4.0)]
  found = []
  for i, (score, loss) in enumerate(evaluations):
    best = BestStep(
      'eval/score',
      patience=2,
      **{
        k: v
        for k, v in json.loads(json.dumps(best.state())).items()
        if k != 'metric'
      },
    )
    found.append(best.add(i, {'eval/score': score, 'eval/loss': loss}))
  assert found == [True, True, False, False]
  assert (best.step, best.waited, best.over) == (1, 2, True)
  assert best.add(4, {'eval/score': 0.1, 'eval/loss': 9.0})


def test_a_loss_counts_downward():
  best = BestStep('eval/loss')
  assert run(best, [2.0, 2.5, 1.5]) == [True, False, True]
  assert (best.step, best.value, best.waited) == (30, 1.5, 0)
  assert rank('eval/loss', {'eval/loss': 1.0}, 9) > rank(
    'eval/loss', {'eval/loss': 1.0}, 10
  )


def test_patience_ends_a_run_and_goes_on_from_a_checkpoint():
  best = BestStep('eval/score', patience=2)
  run(best, [50.0, 40.0])
  assert not best.over
  again = BestStep('eval/score', patience=2)
  again.restore(json.loads(json.dumps(best.state())), 20)
  assert not again.add(30, {'eval/score': 45.0})
  assert again.over
  assert again.why() == (
    'eval/score has not been better than 50.0000 at step 10 in 2 evaluations'
  )
  # Another score begins anew; so does a checkpoint that knows of none.
  other = BestStep('eval/loss', patience=2)
  other.restore(best.state(), 20)
  other.restore(None, 20)
  assert other.state() == BestStep('eval/loss').state()


def test_patience_counts_from_a_step():
  best = BestStep('eval/score', patience=2, begin=40)
  assert run(best, [0.0, 0.0, 0.0]) == [True, False, False]
  assert best.waited == 0  # it may have been learning the form of answers
  assert best.record() == {'metric': 'eval/score', 'step': 10, 'value': 0.0}
  for step, waited in ((40, 1), (50, 2)):
    assert not best.over
    best.add(step, {'eval/score': 0.0})
    assert best.waited == waited
  assert best.over
  # A run that goes on with a later beginning counts anew.
  for begin, waited in ((50, 2), (60, 0)):
    again = BestStep('eval/score', patience=2, begin=begin)
    again.restore(best.state(), 50)
    assert again.waited == waited
  nothing = BestStep('eval/score', patience=1, begin=20)
  run(nothing, [math.nan])
  assert not nothing.over
  nothing.add(20, {})
  assert nothing.over


def test_a_score_that_is_never_finite_ends_a_run_too():
  best = BestStep('eval/score', patience=2)
  assert run(best, [math.nan, math.inf]) == [False, False]
  assert best.over
  assert best.why() == 'eval/score was not finite in 2 evaluations'


def test_without_a_score_there_is_no_best():
  best = BestStep('')
  assert not best.add(10, {'eval/loss': 1.0})
  assert best.step is None and not best.over


@pytest.mark.parametrize(
  ('name', 'measured', 'chosen'),
  [
    ('auto', MEASURED, 'eval/loss'),
    ('auto', (*MEASURED, 'eval/score'), 'eval/score'),
    ('eval/superglue.cb/f1', MEASURED, 'eval/superglue.cb/f1'),
    ('', MEASURED, ''),
  ],
)
def test_the_score_that_decides(name, measured, chosen):
  assert choose_metric(name, measured) == chosen


def test_an_unknown_score_is_refused_with_the_nearest():
  with pytest.raises(UserError) as e:
    choose_metric('eval/superglue.cb/f2', MEASURED)
  assert str(e.value) == (
    "RunConfig.best_metric 'eval/superglue.cb/f2' is no score of this run; did "
    'you mean eval/superglue.cb/f1?; it has eval/loss, eval/superglue.cb/f1, '
    'eval/superglue.cb/score'
  )


def write_scores(workdir, scores):
  for step, own in scores.items():
    folder = workdir / 'checkpoints' / str(step) / 'metrics'
    folder.mkdir(parents=True)
    (folder / 'metrics').write_text(json.dumps(own))


def test_the_best_on_disk_is_that_of_the_scores_beside_the_checkpoints(
  tmp_path,
):
  scores = {
    5: {'eval/score': 70.0},
    8: {'eval/score': 80.0},
    9: {'eval/score': 80.0},
    10: {'eval/loss': 0.1},
  }
  write_scores(tmp_path, scores)
  directory = tmp_path / 'checkpoints'
  best = {'metric': 'eval/score', 'step': 7, 'value': 90.0}  # not on disk
  (tmp_path / 'best.json').write_text(json.dumps(best))
  assert find_best(directory, list(scores)) == 8
  with pytest.raises(UserError) as e:
    find_best(directory, [10])
  assert str(e.value) == (
    f'no checkpoint in {directory} was scored by eval/score; give a number of '
    'steps ([10])'
  )


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'has no best step: it has no best.json, which a run writes'),
    ('{', 'best.json is damaged; give a number of steps ([5])'),
    ('[]', 'best.json is damaged; give a number of steps ([5])'),
  ],
)
def test_what_does_not_say_which_is_the_best_is_refused(
  tmp_path, content, message
):
  if content is not None:
    (tmp_path / 'best.json').write_text(content)
  with pytest.raises(UserError) as e:
    find_best(tmp_path / 'checkpoints', [5])
  assert message in str(e.value)


@pytest.mark.parametrize('command', ['evaluate', 'convert to-hf'])
def test_a_step_is_a_number_or_the_best(command, tmp_path, capsys):
  words = command.split()
  where = [f'--workdir={tmp_path}'] if len(words) == 1 else ['a', 'b']
  assert main([*words, *where, '--step=last']) == 2
  assert (
    "argument --step: 'last' is neither a number of steps nor 'best'"
    in capsys.readouterr().err
  )
