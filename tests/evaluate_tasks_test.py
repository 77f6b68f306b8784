"""Tasks with answers: what a model answers, and what that scores.

A random tiny model answers small published-like files: its texts are
nonsense, and the same nonsense on any number of devices.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_model import apply, init_params, make_batch, place, tiny_config

from st_moe import development, partitioning
from st_moe.config import DataConfig, EvaluationConfig, MeshConfig, RunConfig
from st_moe.data.downstream import catalog
from st_moe.data.downstream.example import Example
from st_moe.data.downstream.majority import Majority
from st_moe.data.vocabularies import load_vocabulary
from st_moe.errors import UserError
from st_moe.evaluate import outputs
from st_moe.evaluate.tasks import (
  TaskEvaluator,
  TaskScores,
  make_result,
  named_tasks,
)
from st_moe.predictor import Predictor

VOCABULARY = load_vocabulary('byte', extra_ids=100)
MODEL = tiny_config(
  vocab_size=384, num_encoder_layers=1, num_decoder_layers=1, sparse_every=1
)
LABELS = ('entailment', 'contradiction', 'neutral')
CB, COPA = 'superglue.cb', 'superglue.copa'
WSC, MULTIRC = 'superglue.wsc', 'superglue.multirc'
ALONE = MeshConfig(data=1)
MESHED = MeshConfig(data=2, expert=2, model=2)


def write(root, folder, rows, split='val'):
  path = root / folder / f'{split}.jsonl'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """13 examples of CB, 6 of COPA, 3 of WSC, 5 of MultiRC: no batch is full."""
  root = tmp_path_factory.mktemp('superglue')
  cb = [
    {'premise': 'p', 'hypothesis': f'{"h" * i}{i * i}', 'idx': i,
     'label': LABELS[i % 4 % 3]}
    for i in range(13)
  ]  # fmt: skip
  write(root, 'CB', cb)
  copa = [
    {'choice1': f'{i * i}', 'choice2': 'o', 'premise': 'p',
     'question': 'cause', 'idx': i, 'label': i % 2}
    for i in range(6)
  ]  # fmt: skip
  write(root, 'COPA', copa)
  spans = {'span1_text': 'Sue', 'span1_index': 2, 'span2_text': 'she',
           'span2_index': 4}  # fmt: skip
  wsc = [
    {'text': f'{name} met Sue because she ran.', 'label': name != 'Ann',
     'idx': i, 'target': spans}
    for i, name in enumerate(('Ann', 'Bob', 'Eve'))
  ]  # fmt: skip
  write(root, 'WSC', wsc)
  for split in ('train', 'val'):
    write(root, 'WSC', wsc, split)
  questions = [
    {'question': f'{q}?', 'idx': q, 'answers': [
      {'text': f'{q}{a}', 'idx': 3 * q + a, 'label': int(a == q)}
      for a in range(3 - q)]}
    for q in range(2)
  ]  # fmt: skip
  write(root, 'MultiRC', [
    {'idx': 0, 'passage': {'text': 'One.', 'questions': questions}}
  ])  # fmt: skip
  return root


@functools.cache
def params():
  """Random ones; what the encoder says is loud, lest every text is the same."""
  drawn = init_params(MODEL, seed=3)
  scale = drawn['encoder']['encoder_norm']['scale']
  drawn['encoder']['encoder_norm'] = {'scale': 8 * scale}
  return drawn


def config(files, mesh=ALONE, **evaluation):
  return RunConfig(
    model=MODEL,
    mesh=mesh,
    batch_size=5,
    data=DataConfig(
      task=f'{CB},{COPA},{WSC},{MULTIRC}',
      task_dir=str(files),
      vocabulary='byte',
      inputs_length=24,
      targets_length=15,
    ),
    evaluation=EvaluationConfig(**evaluation),
  )


def evaluator(run):
  size = run.mesh.data * run.mesh.expert * run.mesh.model
  mesh = partitioning.make_mesh(run.mesh, jax.devices()[:size])
  return TaskEvaluator(run, VOCABULARY, mesh), mesh


def scores_of(run) -> TaskScores:
  scorer, mesh = evaluator(run)
  return scorer.evaluate(place(params(), MODEL, mesh, run.mesh))


@pytest.fixture(scope='module')
def alone(files):
  """By method: the scores on one device, one example at a time."""
  return {
    method: scores_of(config(files, method=method, batch_size=1))
    for method in ('generate', 'rank')
  }


@pytest.mark.parametrize('mesh', [ALONE, MESHED])
@pytest.mark.parametrize('method', ['generate', 'rank'])
def test_answers_depend_on_neither_devices_nor_batch_size(
  files, alone, mesh, method
):
  found = scores_of(config(files, mesh, method=method, batch_size=32))
  expected = alone[method]
  assert list(found.results) == [CB, COPA, WSC, MULTIRC]
  for name, result in found.results.items():
    assert result.texts == expected.results[name].texts
    assert result.answers == expected.results[name].answers
    assert result.metrics == expected.results[name].metrics
    for mine, other in zip(
      result.log_likelihoods,
      expected.results[name].log_likelihoods,
      strict=True,
    ):
      np.testing.assert_allclose(mine, other, rtol=1e-5)
  assert found.scalars() == expected.scalars()


def test_the_tests_above_see_different_answers(alone):
  generated, ranked = alone['generate'].results, alone['rank'].results
  assert len(set(generated[CB].texts)) > 4
  assert len(set(ranked[COPA].texts)) == 2
  assert ranked[WSC].texts == generated[WSC].texts  # it has no choices


def test_ranking_takes_the_likeliest_choice(files, alone):
  result = alone['rank'].results[COPA]
  dropless = dataclasses.replace(MODEL.encoder_router, eval_dropless=True)
  model = dataclasses.replace(
    MODEL, encoder_router=dropless, decoder_router=dropless
  )
  for index in (0, 5):
    ids = VOCABULARY.encode(result.examples[index].inputs)[:23]
    sums = []
    for choice in ('choice1', 'choice2'):
      targets = np.array([[*VOCABULARY.encode(choice), 1]], np.int32)
      batch = make_batch(np.array([[*ids, 1]], np.int32), targets)
      logits = np.asarray(apply(model, params(), batch).logits[0], np.float64)
      log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      sums.append(log_probs[np.arange(targets.size), targets[0]].sum())
    np.testing.assert_allclose(result.log_likelihoods[index], sums, rtol=1e-5)
    best = int(np.argmax(sums))
    assert result.answers[index] == best
    assert result.texts[index] == f'choice{best + 1}'


def test_beams_are_searched_if_wanted(files, alone):
  settings = {'num_beams': 3, 'length_penalty': 0.5, 'early_stopping': 'never'}
  found = scores_of(config(files, tasks=CB, **settings))
  result = found.results[CB]
  assert result.texts != alone['generate'].results[CB].texts
  _, mesh = evaluator(config(files))
  beams = Predictor(
    MODEL,
    place(params(), MODEL, mesh, ALONE),
    mesh,
    eos_id=1,
    targets_length=15,
    batch_size=5,
    **settings,
  )
  inputs = [VOCABULARY.encode(one.inputs)[:23] for one in result.examples]
  outputs = beams.generate([[*ids, 1] for ids in inputs])
  assert result.texts == tuple(map(VOCABULARY.decode, outputs))


def test_the_names_of_scores_are_known_before(files, alone):
  names = evaluator(config(files))[0].score_names()
  assert names == tuple(alone['generate'].scalars())


def oracle(files, name):
  task = catalog.find_task(name)
  examples = catalog.load_examples(
    name, 'validation', DataConfig(task_dir=str(files))
  )
  right = [
    example.targets if name != WSC or example.label else 'nobody'
    for example in examples
  ]
  return task, examples, right


def test_scalars_by_hand(files):
  # CB, of 13: 7 + 3 + 3 labels. "entailment" for all: F1 2*7/20, 0, 0.
  task, examples, _ = oracle(files, CB)
  assert [e.label for e in examples].count(0) == 7
  cb = make_result(task, 'validation', examples, ['entailment'] * 13)
  # WSC: 2 of 3 are right; nothing is written for one of those.
  task, examples, right = oracle(files, WSC)
  wsc = make_result(task, 'validation', examples, [*right[:2], ''])
  # MultiRC: all but the last answer, of the second question.
  task, examples, right = oracle(files, MULTIRC)
  multirc = make_result(task, 'validation', examples, [*right[:4], 'maybe'])
  scores = TaskScores(
    {one.name: one for one in (cb, wsc, multirc)}, {'two': (CB, WSC)}
  )
  expected = {
    'eval/superglue.cb/accuracy': 700 / 13,
    'eval/superglue.cb/f1': 70 / 3,
    'eval/superglue.cb/score': (700 / 13 + 70 / 3) / 2,
    'eval/superglue.wsc/accuracy': 200 / 3,
    'eval/superglue.wsc/score': 200 / 3,
    # The invalid answer to a right one is a miss: recall 1/2, precision 1.
    'eval/superglue.multirc/f1a': 200 / 3,
    'eval/superglue.multirc/exact_match': 50.0,
    'eval/superglue.multirc/score': (200 / 3 + 50) / 2,
    'eval/two/score': ((700 / 13 + 70 / 3) / 2 + 200 / 3) / 2,
  }
  expected['eval/score'] = (
    sum(expected[f'eval/{name}/score'] for name in (CB, WSC, MULTIRC)) / 3
  )
  assert scores.scalars() == pytest.approx(expected, abs=1e-9)
  assert [one.no_answers for one in (cb, wsc, multirc)] == [0, 1, 1]
  assert [cb.example_score(i) for i in range(3)] == [100.0, 0.0, 0.0]
  assert [wsc.example_score(i) for i in range(3)] == [100.0, 100.0, 0.0]


def test_mnli_counts_once_in_means(capsys):
  choices = ('entailment', 'neutral', 'contradiction')

  def scored(name, right):
    examples = [Example('x', 'neutral', choices=choices, label=1)] * 4
    texts = ['neutral'] * right + ['entailment'] * (4 - right)
    task = catalog.find_task(name)
    bar = Majority(answer=1, metrics={'accuracy': 40.0}, score=10.0 * right)
    return make_result(task, 'validation', examples, texts, majority=bar)

  right = {'glue.mnli_matched': 4, 'glue.mnli_mismatched': 2, 'glue.qnli': 1}
  names = tuple(right)
  scores = TaskScores(
    {name: scored(name, count) for name, count in right.items()},
    {'glue': names},
  )
  found = scores.scalars()
  assert found['eval/glue.mnli_mismatched/score'] == 50.0
  # Of the constants, (40 + 20) / 2 and 10.
  assert found['eval/glue/score'] == found['eval/score'] == (75 + 25) / 2
  assert scores.constant_mean(names) == 20.0
  assert development.lines(scores)[-1] == [
    'glue:', 'mean of 2 tasks 50.00 (constant 20.00)'
  ]  # fmt: skip
  outputs.print_scores(scores, 5, Path('runs/a'))
  (mean,) = re.findall(r'glue +mean of .*', capsys.readouterr().out)
  assert mean.split() == ['glue', 'mean', 'of', '2', '50.00', '20.00']


def test_examples_without_labels_are_answered_and_not_scored(files):
  task, examples, right = oracle(files, CB)
  unlabelled = [dataclasses.replace(e, label=None) for e in examples]
  result = make_result(task, 'test', unlabelled, right)
  assert result.answers == tuple(example.label for example in examples)
  assert (result.metrics, result.score, result.majority) == ({}, None, None)
  assert TaskScores({CB: result}, {'superglue': (CB,)}).scalars() == {}
  some = [*unlabelled[:6], *examples[6:]]
  wrong_where_unknown = ['neutral'] * 6 + right[6:]
  result = make_result(task, 'test', some, wrong_where_unknown)
  assert result.metrics == {'accuracy': 100.0, 'f1': 100.0}
  assert result.example_score(0) is None


def test_the_training_split_is_answered_as_it_was_published(files):
  run = config(files, split='train', tasks=WSC)
  assert len(evaluator(run)[0].examples[WSC]) == 3
  held = catalog.load_examples(WSC, 'train', run.data)
  assert len(held) == 2  # false rows are not trained on


def test_which_tasks_are_scored(files):
  run = config(files)
  assert named_tasks(run) == (CB, COPA, WSC, MULTIRC)
  assert named_tasks(config(files, tasks='superglue.copa')) == (
    'superglue.copa',
  )
  text = dataclasses.replace(run.data, task='text:1,superglue.cb:2')
  assert named_tasks(dataclasses.replace(run, data=text)) == (CB,)
  text = dataclasses.replace(run.data, task='text')
  assert named_tasks(dataclasses.replace(run, data=text)) == ()
  few = evaluator(config(files, tasks=(CB, WSC), max_examples=2))[0]
  assert {name: len(some) for name, some in few.examples.items()} == {
    CB: 2,
    WSC: 2,
  }


@pytest.mark.parametrize(
  ('evaluation', 'message'),
  [
    ({'tasks': 'superglue.multi'}, 'did you mean superglue.multirc?'),
    ({'split': 'dev'}, "has no split 'dev' (it has train, validation, test)"),
    ({'split': 'test'}, 'there is no CB/test.jsonl in '),
  ],
)
def test_what_cannot_be_scored_is_refused(files, evaluation, message):
  with pytest.raises(UserError, match=re.escape(message)):
    evaluator(config(files, **evaluation))


def test_what_does_not_fit_is_counted(files, caplog):
  caplog.set_level('INFO', 'st_moe')
  run = config(files, tasks=CB)
  evaluator(dataclasses.replace(
    run, data=dataclasses.replace(run.data, targets_length=11)
  ))  # fmt: skip
  assert 'superglue.cb, validation: 13 examples' in caplog.messages
  assert (
    'superglue.cb, validation: 13 of the inputs are cut to 24 tokens '
    '(DataConfig.inputs_length)'
  ) in caplog.messages
  # Bytes and end-of-sequence: of the labels only "contradiction" is too long.
  (warning,) = [r.message for r in caplog.records if r.levelname == 'WARNING']
  assert warning.startswith(
    'superglue.cb, validation: 3 examples have targets or choices of more than '
    '11 tokens'
  )
