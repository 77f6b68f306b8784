"""Task names, mixtures, tfds folders, registered tasks; what is refused."""

import functools
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from prepared_tfds import prepare_tfds

from st_moe.config import DataConfig
from st_moe.data import streaming, tasks
from st_moe.data.corpus import Documents
from st_moe.data.mixtures import Part, parse
from st_moe.data.pipeline import check_names, open_data
from st_moe.errors import UserError

T5 = Path(__file__).resolve().parent / 'golden_t5'
LENGTHS = {'inputs_length': 128, 'targets_length': 29}


def open_bytes(task, **settings):
  settings = {'vocabulary': 'byte'} | LENGTHS | settings
  return open_data(DataConfig(task=task, **settings), seed=0, cache_root=None)


def numbered(name, count):
  return ''.join(f'{name} number {i} is here\n' for i in range(count))


def texts_of(data, batch):
  return [data.vocabulary.decode(row) for row in batch['encoder_input_tokens']]


@pytest.fixture
def corpus_file(tmp_path):
  path = tmp_path / 'corpus.txt'
  path.write_text(numbered('file', 200))
  return str(path)


@pytest.fixture
def registered_task():
  """A user's own task: questions and answers, registered with seqio."""
  name = 'sums_of_the_user'
  rows = {
    'train': [
      (f'{a} plus {b}', str(a + b)) for a in range(9) for b in range(9)
    ],
    'validation': [('1 plus 1', '2')],
  }

  def read(split, shuffle_files, seed=None):
    inputs, targets = zip(*rows[split], strict=True)
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': list(inputs), 'targets': list(targets)}
    )

  feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=100), add_eos=True)
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(read, ['train', 'validation']),
    preprocessors=[
      functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature, 'targets': feature},
  )
  yield name
  seqio.TaskRegistry.remove(name)


def test_the_text_task_gives_the_stream_of_t5(tmp_path):
  with np.load(T5 / 'documents.npz') as file:
    (tmp_path / 'train.txt').write_bytes(file['text'].tobytes())
  (tmp_path / 'held_out.txt').write_text('never read')
  data = open_bytes(
    'text',
    files=str(tmp_path / 'train.txt'),
    eval_files=str(tmp_path / 'held_out.txt'),
    shuffle=False,
  )
  with np.load(T5 / 'span_corruption_seed0.npz') as file:
    expected = dict(file)
  # The reference is one epoch; ours goes on, so its last group of documents
  # (all but the first 128) is merged with the next epoch's.
  batch = next(data.train_batches(500))
  for name, rows in expected.items():
    np.testing.assert_array_equal(batch[name], rows[:500])


class TestNames:
  @pytest.mark.parametrize(
    ('task', 'message'),
    [
      ('docstring', "unknown task 'docstring'; did you mean docstrings"),
      ('c4-json', 'did you mean c4_json'),
      ('cach', 'did you mean cache'),
      ('sums_of_the_usr', 'did you mean sums_of_the_user'),
      (
        'xyzzy',
        'built in are c4, c4_json, docstrings, mc4, text, cache, ',
      ),
    ],
  )
  def test_an_unknown_task_is_refused_with_the_nearest(
    self, task, message, registered_task
  ):
    with pytest.raises(UserError, match=message):
      parse(DataConfig(task=task))

  def test_a_built_in_name_cannot_be_registered_too(self, registered_task):
    tasks.check_name(registered_task)
    task = seqio.TaskRegistry.get(registered_task)
    seqio.TaskRegistry.add_provider('text', task)
    try:
      with pytest.raises(UserError, match="'text' is built in and registered"):
        tasks.check_name('text')
    finally:
      seqio.TaskRegistry.remove('text')

  def test_files_are_for_tasks_that_read_them(self):
    with pytest.raises(UserError, match="files is set but task 'docstrings'"):
      parse(DataConfig(task='docstrings', files='a.txt'))

  def test_text_needs_files(self):
    with pytest.raises(UserError, match='DataConfig.files is empty'):
      open_bytes('text')

  def test_the_two_splits_must_differ(self, corpus_file):
    with pytest.raises(UserError, match="are both 'train'"):
      open_bytes('text', files=corpus_file, eval_split='train')

  def test_too_few_documents_to_hold_one_out_are_refused(self, corpus_file):
    message = 'corpus.txt: 200 documents are too few to hold out one in 201'
    with pytest.raises(UserError, match=message):
      open_bytes('text', files=corpus_file, holdout_every=201)

  def test_json_without_a_held_out_document_is_refused(self, tmp_path):
    path = tmp_path / 'a.json.gz'
    path.write_bytes(gzip.compress(json.dumps({'text': 'x'}).encode()))
    with pytest.raises(UserError, match='no document is left for validation'):
      open_bytes('c4_json', files=str(path))

  def test_short_targets_are_refused(self, corpus_file):
    with pytest.raises(UserError, match='targets_length 28 .* least 29'):
      open_bytes('text', files=corpus_file, targets_length=28)


class TestRegistered:
  def test_its_features_are_taken_as_they_are(self, registered_task):
    data = open_data(
      DataConfig(
        task=registered_task,
        objective='none',
        inputs_length=16,
        targets_length=4,
      ),
      seed=0,
      cache_root=None,
    )
    assert data.vocabulary.vocab_size == 359
    batch = next(data.train_batches(8))
    for row, target in zip(
      texts_of(data, batch), batch['decoder_target_tokens'], strict=True
    ):
      a, b = row.split(' plus ')
      assert data.vocabulary.decode(target) == str(int(a) + int(b))
    (held_out,) = data.eval_batches(4, 10)
    assert held_out['decoder_loss_weights'].sum(axis=1).tolist() == [2, 0, 0, 0]

  def test_an_objective_is_refused(self, registered_task):
    with pytest.raises(UserError, match="set DataConfig.objective = 'none'"):
      open_bytes(registered_task)

  def test_plain_text_needs_an_objective(self, corpus_file):
    with pytest.raises(UserError, match="'text' is plain text"):
      open_bytes('text', files=corpus_file, objective='none')

  def test_another_vocabulary_is_refused(self, registered_task):
    with pytest.raises(UserError, match='100 extra ids, not with byte and 50'):
      open_bytes(registered_task, objective='none', extra_ids=50)

  def test_a_missing_split_is_named(self, registered_task):
    with pytest.raises(UserError, match="no split 'test' .it has train, val"):
      open_bytes(registered_task, objective='none', eval_split='test')

  def test_held_out_examples_that_vanish_are_an_error(self, tmp_path):
    prepare_tfds(tmp_path, 'en', {'train': ['words'], 'validation': ['']})
    data = open_bytes('c4', tfds_data_dir=str(tmp_path))
    with pytest.raises(UserError, match='no held-out example in split .valid'):
      next(data.eval_batches(2, 1))

  def test_it_mixes_with_text_at_the_rates(self, registered_task, corpus_file):
    data = open_bytes(f'{registered_task}:3,text:1', files=corpus_file)
    batch = next(data.train_batches(400))
    sums = sum(' plus ' in text for text in texts_of(data, batch))
    assert 260 < sums < 340  # 300 expected, standard deviation 9

  def test_it_has_no_text_for_a_cache(self, registered_task):
    data = open_bytes(registered_task, objective='none')
    with pytest.raises(UserError, match='cannot be cached'):
      data.documents('train')

  def test_a_source_that_cannot_be_resumed_is_refused_at_once(self):
    feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=100))

    def read(split, shuffle_files, seed=None):
      return tf.data.Dataset.from_generator(
        lambda: ({'inputs': [5], 'targets': [6]} for _ in range(99)),
        output_signature={
          name: tf.TensorSpec([None], tf.int32)
          for name in ('inputs', 'targets')
        },
      )

    seqio.TaskRegistry.add(
      'generated_by_the_user',
      source=seqio.FunctionDataSource(read, ['train', 'validation']),
      preprocessors=[],
      output_features={'inputs': feature, 'targets': feature},
    )
    try:
      data = open_bytes('generated_by_the_user', objective='none')
      with pytest.raises(UserError, match='position in this task cannot be'):
        data.train_batches(2)
    finally:
      seqio.TaskRegistry.remove('generated_by_the_user')


class TestMixtures:
  def test_names_and_rates_are_read(self):
    config = DataConfig(task='docstrings: 0.5, text:2', files='x')
    assert parse(config) == (Part('docstrings', 0.5), Part('text', 2.0))
    assert parse(DataConfig(task='docstrings')) == (Part('docstrings', 1.0),)

  @pytest.mark.parametrize(
    ('task', 'message'),
    [
      ('docstrings:', "'docstrings:' is no part of a mixture"),
      ('docstrings:0', "'docstrings:0' is no part"),
      ('docstrings:nan', "'docstrings:nan' is no part"),
      ('docstrings:-1,c4:2', "'docstrings:-1' is no part"),
      ('docstrings,', "'' is no part"),
      ('docstrings,docstrings:2', "names 'docstrings' twice"),
      ('text,c4_json', 'text and c4_json .* would both read'),
      ('docstrings,txet', "unknown task 'txet'; did you mean text"),
    ],
  )
  def test_broken_mixtures_are_refused(self, task, message):
    with pytest.raises(UserError, match=message):
      parse(DataConfig(task=task))
    if 'is no part' in message:  # what can be told without TensorFlow
      with pytest.raises(UserError, match=message):
        check_names(task)

  def test_docstrings_and_text_share_one_trained_vocabulary(
    self, tmp_path, corpus_file, monkeypatch
  ):
    texts = tuple(f'Return the value of item {i} in b.' for i in range(100))
    monkeypatch.setattr(
      tasks,
      'docstring_documents',
      lambda cache_root: Documents(texts, 'hash', {'stdlib': 100}),
    )
    config = DataConfig(
      task='docstrings:1,text:1',
      files=corpus_file,
      auto_vocabulary_size=50,
      holdout_every=10,
      **LENGTHS,
    )
    data = open_data(config, seed=0, cache_root=tmp_path)
    (model,) = (tmp_path / 'vocabularies').iterdir()
    assert data.vocabulary.spec == str(model)
    written = model.stat().st_mtime_ns
    assert set(data.fingerprint['text']) == {'docstrings', 'text'}
    # Text of both is written with pieces of the vocabulary.
    for text in ('file number 7 is here', 'Return the value of item'):
      assert data.vocabulary.unk_id not in data.vocabulary.encode(text)
    rows = ' '.join(texts_of(data, next(data.train_batches(32))))
    assert 'Return' in rows and 'file' in rows
    again = open_data(config, seed=1, cache_root=tmp_path)
    assert again.fingerprint == data.fingerprint
    assert model.stat().st_mtime_ns == written  # not trained again


class TestTfds:
  def test_c4_reads_the_newest_prepared_version(self, tmp_path):
    splits = {
      'train': numbered('old', 30).splitlines(),
      'validation': numbered('old held out', 5).splitlines(),
    }
    prepare_tfds(tmp_path, 'en', splits, '2.3.1')
    splits['train'] = numbered('new', 30).splitlines()
    prepare_tfds(tmp_path, 'en', splits, '3.0.1')
    data = open_bytes('c4', tfds_data_dir=str(tmp_path))
    assert data.fingerprint['text']['c4'] == {
      'tfds': 'c4/en:3.0.1',
      'library': tfds.__version__,
      'documents': {'train': 30, 'validation': 5},
    }
    assert list(data.documents('train')) == splits['train']
    assert 'new number' in ''.join(texts_of(data, next(data.train_batches(4))))

  def test_what_is_not_prepared_is_never_downloaded(self, tmp_path):
    with pytest.raises(UserError, match="no prepared .*c4/en; set .*'c4_json'"):
      open_bytes('c4', tfds_data_dir=str(tmp_path))

  def test_a_missing_split_is_named(self, tmp_path):
    prepare_tfds(tmp_path, 'en', {'train': ['a']})
    with pytest.raises(UserError, match="no split 'validation' .it has train"):
      open_bytes('c4', tfds_data_dir=str(tmp_path))

  def test_mc4_mixes_its_languages_by_their_sizes_to_the_0_3(self, tmp_path):
    splits = {}
    for language, count in (('bg-Latn', 10), ('de', 1024 * 10)):
      splits[language] = numbered(language, count).splitlines()
      splits[f'{language}-validation'] = ['held out']
    splits['und'] = ['no validation split']
    prepare_tfds(tmp_path, 'multilingual', splits)
    config = DataConfig(task='mc4:2', tfds_data_dir=str(tmp_path))
    latin, german = parse(config)
    assert (latin.name, german.name) == ('mc4.bg-Latn', 'mc4.de')
    assert latin.rate + german.rate == pytest.approx(2)
    assert german.rate / latin.rate == pytest.approx(8)  # 1024 ** 0.3
    data = open_bytes('mc4', tfds_data_dir=str(tmp_path))
    rows = texts_of(data, next(data.train_batches(200)))
    german_rows = sum('de number' in row for row in rows)
    assert 160 < german_rows < 195  # 178 expected, standard deviation 4.4

  def test_one_language_of_mc4_is_a_task(self, tmp_path):
    prepare_tfds(
      tmp_path, 'multilingual', {'de': ['eins'], 'de-validation': ['x']}
    )
    data = open_bytes('mc4.de', tfds_data_dir=str(tmp_path))
    assert list(data.documents('validation')) == ['x']


def test_the_vocabulary_of_t5_is_understood_on_a_registered_task(shared_data):
  path = str(shared_data / 'vocab/t5_cc_all_32000_spiece.model')
  task = seqio.Task(
    'unregistered',
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files: None, ['train']
    ),
    output_features={
      'targets': seqio.Feature(seqio.SentencePieceVocabulary(path, 100))
    },
  )
  vocabulary = streaming.vocabulary_of(task, DataConfig())
  assert vocabulary.spec == path
  assert vocabulary.vocab_size == 32100
