"""Sentinels in fine-tuning: seqio's layout, and answers without them."""

import dataclasses

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from downstream_test import ROWS, write
from evaluate_tasks_test import MODEL, VOCABULARY

from st_moe import partitioning
from st_moe.config import (
  DataConfig,
  EvaluationConfig,
  MeshConfig,
  RunConfig,
)
from st_moe.data.downstream import sentinels
from st_moe.data.pipeline import open_data
from st_moe.data.preprocessors import insert_sentinels
from st_moe.errors import UserError
from st_moe.evaluate import tasks

LENGTHS = {'inputs': 9, 'targets': 12}


@pytest.mark.parametrize('count', [1, 3])
def test_the_layout_is_that_of_seqio(count):
  """A short example, and one whose inputs are cut."""
  feature = seqio.Feature(VOCABULARY.as_seqio())
  texts = {'inputs': ['abc', 'abcdefghijk'], 'targets': ['xy', 'z']}
  name = f'layout_{count}'
  source = seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
      texts
    ),
    ['train'],
  )
  end = seqio.preprocessors.append_eos_after_trim
  seqio.TaskRegistry.add(
    name,
    source,
    preprocessors=[seqio.preprocessors.tokenize, end],
    output_features={'inputs': feature, 'targets': feature},
  )
  seqio.experimental.add_task_with_sentinels(name, count)
  theirs = seqio.TaskRegistry.get(f'{name}_{count}_sentinel').get_dataset(
    LENGTHS, 'train', shuffle=False
  )
  config = DataConfig(insert_sentinels=count)
  ids = sentinels.sentinel_ids(config, VOCABULARY)
  encoded = tf.data.Dataset.from_generator(
    lambda: (
      {key: VOCABULARY.encode(value[i]) for key, value in texts.items()}
      for i in range(2)
    ),
    output_signature=dict.fromkeys(texts, tf.TensorSpec([None], tf.int32)),
  )
  features = {'inputs': feature, 'targets': feature}
  ours = insert_sentinels(encoded, LENGTHS, features, sentinels=ids)
  ours = end(ours, features, LENGTHS)
  found = [
    {key: row[key].tolist() for key in texts}
    for row in ours.as_numpy_iterator()
  ]
  assert found == [
    {key: row[key].tolist() for key in texts}
    for row in theirs.as_numpy_iterator()
  ]
  # The evaluation's way of putting them in.
  for i, row in enumerate(found):
    inputs = VOCABULARY.encode(texts['inputs'][i])
    targets = VOCABULARY.encode(texts['targets'][i])
    end_of = [VOCABULARY.eos_id]
    assert sentinels.behind(inputs, ids, 8) + end_of == row['inputs']
    assert sentinels.before(targets, ids, 11) + end_of == row['targets']


def test_only_the_sentinels_that_were_put_in_are_taken_off():
  put_in = [357, 356]
  assert sentinels.without([357, 356, 5], put_in) == [5]
  assert sentinels.without([357, 5], put_in) == [357, 5]
  assert sentinels.without([357, 356, 357], put_in) == [357]
  assert sentinels.without([357, 5], []) == [357, 5]


def config(root, **settings):
  return DataConfig(
    task='superglue.cb', task_dir=str(root), vocabulary='byte',
    inputs_length=40, targets_length=24, **settings,
  )  # fmt: skip


def test_batches_have_them(tmp_path, caplog):
  write(tmp_path, {'CB': ROWS['CB']})
  data = open_data(
    config(tmp_path, insert_sentinels=1), seed=0, cache_root=tmp_path
  )
  batch = next(data.train_batches(1))
  texts = {
    name: data.vocabulary.decode(batch[f'{name}_tokens'][0])
    for name in ('encoder_input', 'decoder_target')
  }
  # 44 bytes are cut to 38, a sentinel and the end follow.
  assert texts == {
    'encoder_input': 'cb hypothesis: It is wet. premise: It <extra_id_0>',
    'decoder_target': '<extra_id_0>contradiction',
  }
  assert '1 of 1 inputs to train on have more than the 40 tok' in caplog.text


def test_what_cannot_have_them_is_refused(tmp_path):
  with pytest.raises(UserError, match='insert_sentinels is 3, and there are 2'):
    DataConfig(insert_sentinels=3, extra_ids=2)
  with pytest.raises(UserError, match="is for tasks with answers; task 'docs"):
    open_data(DataConfig(insert_sentinels=1), seed=0, cache_root=tmp_path)
  cache = DataConfig(task='cache', insert_sentinels=1)
  with pytest.raises(UserError, match="answers; task 'cache' has none"):
    open_data(cache, seed=0, cache_root=tmp_path)
  misspelt = DataConfig(task='superglue_t', insert_sentinels=1)
  with pytest.raises(
    UserError, match='unknown task .superglue_t.; did you mean'
  ):
    open_data(misspelt, seed=0, cache_root=tmp_path)


class Parrot:
  """Writes what it is told, and remembers what it was asked."""

  batch_size = 1

  def __init__(self, answers):
    self._answers = answers
    self.inputs, self.pairs = [], []

  def generate(self, inputs, **unused):
    self.inputs += inputs
    return [self._answers for _ in inputs]

  def log_likelihoods(self, pairs, **unused):
    self.pairs += pairs
    return np.array([-len(choice) for _, choice in pairs], np.float32)


@pytest.mark.parametrize('count', [0, 1])
def test_answers_are_read_without_them(tmp_path, monkeypatch, count):
  write(tmp_path, {'CB': ROWS['CB']})
  sentinel = VOCABULARY.sentinel_id(0)
  right = VOCABULARY.encode('contradiction')
  mesh_config = MeshConfig(data=1)
  mesh = partitioning.make_mesh(mesh_config, jax.devices()[:1])
  run = RunConfig(
    model=MODEL,
    mesh=mesh_config,
    data=config(tmp_path, insert_sentinels=count),
    evaluation=EvaluationConfig(),
  )
  parrot = Parrot([sentinel, *right])
  monkeypatch.setattr(tasks, 'Predictor', lambda *a, **k: parrot)
  result = tasks.TaskEvaluator(run, VOCABULARY, mesh).evaluate({})
  cb = result.results['superglue.cb']
  whole = '<extra_id_0>contradiction'
  assert cb.texts == (('contradiction',) if count else (whole,))
  assert cb.metrics['accuracy'] == (100 if count else 0)
  (asked,) = parrot.inputs
  assert asked[-1 - count :] == [sentinel] * count + [VOCABULARY.eos_id]
  assert len(asked) == 40

  ranked = dataclasses.replace(run, evaluation=EvaluationConfig(method='rank'))
  tasks.TaskEvaluator(ranked, VOCABULARY, mesh).evaluate({})
  assert [choice for _, choice in parrot.pairs] == [
    [sentinel] * count + VOCABULARY.encode(text)
    for text in ('entailment', 'contradiction', 'neutral')
  ]
