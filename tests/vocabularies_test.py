"""Vocabularies: seqio's ids without TensorFlow, loading, training."""

import hashlib
import pickle
import re

import numpy as np
import pytest
import sentencepiece

from st_moe.data.vocabularies import load_vocabulary, train_vocabulary
from st_moe.errors import UserError

TEXTS = [
  'The river runs past the old mill and the miller watches the river.',
  'A small boat with a red sail waits below the mill for the wind.',
  'When the wind comes, the boat leaves and the miller waves his hat.',
  'In winter the river is frozen, and children walk over it to school.',
]
SIZE = 60
T5_MODEL = 'vocab/t5_cc_all_32000_spiece.model'


@pytest.fixture(scope='module')
def model_path(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'small.model'
  train_vocabulary(TEXTS, SIZE, path)
  return path


@pytest.fixture
def small(model_path):
  return load_vocabulary(str(model_path), extra_ids=10)


def message_of(error) -> str:
  message = str(error.value)
  assert '\n' not in message
  return message


# --- bytes


def test_byte_ids_are_utf8_bytes_plus_three():
  vocabulary = load_vocabulary('byte', extra_ids=100)
  assert vocabulary.encode('Hi é') == [75, 108, 35, 198, 172]
  assert vocabulary.vocab_size == 359
  assert vocabulary.decode([75, 108, 35, 198, 172]) == 'Hi é'


def test_byte_decode_stops_at_eos_and_shows_sentinels():
  vocabulary = load_vocabulary('byte', extra_ids=2)
  a, b = vocabulary.encode('ab')
  ids = [0, a, 260, 2, b, 259, 400, 1, a, a]
  assert vocabulary.decode(ids) == 'a<extra_id_0>b<extra_id_1>'


def test_byte_vocabulary_equals_seqios():
  seqio = pytest.importorskip('seqio')
  ours = load_vocabulary('byte', extra_ids=7)
  assert ours.as_seqio() == seqio.ByteVocabulary(extra_ids=7)
  theirs = ours.as_seqio()
  assert ours.encode('straße {x}\n') == theirs.encode('straße {x}\n')
  assert (ours.vocab_size, ours.eos_id, ours.unk_id, ours.pad_id) == (
    theirs.vocab_size,
    theirs.eos_id,
    theirs.unk_id,
    theirs.pad_id,
  )


# --- SentencePiece models


def test_sentinels_are_the_last_ids_counted_down(small):
  assert small.vocab_size == SIZE + 10
  assert [small.sentinel_id(k) for k in (0, 1, 9)] == [69, 68, 60]
  assert small.is_sentinel([[0, 59, 60], [69, 70, 1]]).tolist() == [
    [False, False, True],
    [True, False, False],
  ]


def test_sentinels_in_a_text_become_their_ids(small):
  ids = small.encode('the <extra_id_0> runs <extra_id_9>')
  assert [i for i in ids if small.is_sentinel(i)] == [69, 60]
  assert small.decode(ids) == 'the <extra_id_0> runs <extra_id_9>'


def test_decode_drops_padding_and_stops_at_eos(small):
  ids = small.encode('the river')
  assert small.decode([0, *ids, 0, 1, *ids]) == 'the river'
  assert small.decode(np.array([*ids, 69])) == 'the river <extra_id_0>'


def test_ids_of_the_models_padded_rows_read_as_unknown(small):
  assert small.decode([small.vocab_size + 5]) == small.decode([2])


def test_batches_encode_as_single_texts(small):
  assert small.encode_batch(TEXTS) == [small.encode(text) for text in TEXTS]


def test_lone_surrogates_read_as_question_marks(small):
  broken = 'the \ud800 river'  # json.loads makes these
  for vocabulary in (small, load_vocabulary('byte', 0)):
    assert vocabulary.encode(broken) == vocabulary.encode('the ? river')
    assert vocabulary.encode_batch([broken]) == [vocabulary.encode(broken)]


def test_vocabularies_travel_to_other_processes(small):
  copy = pickle.loads(pickle.dumps(small))
  assert copy.encode(TEXTS[0]) == small.encode(TEXTS[0])
  assert copy.fingerprint == small.fingerprint


def test_fingerprint_names_model_and_number_of_sentinels(model_path, small):
  content = model_path.read_bytes()
  assert small.model_sha256 == hashlib.sha256(content).hexdigest()
  again = load_vocabulary(str(model_path), extra_ids=10)
  fewer = load_vocabulary(str(model_path), extra_ids=9)
  assert again.fingerprint == small.fingerprint
  assert fewer.fingerprint != small.fingerprint
  assert fewer.model_sha256 == small.model_sha256


def test_ids_equal_seqios_on_a_trained_model(model_path, small):
  pytest.importorskip('seqio')
  theirs = small.as_seqio()
  assert theirs.vocab_size == small.vocab_size
  for text in [*TEXTS, '', ' two  spaces ', 'a <extra_id_3>b', 'ünknöwn 漢']:
    assert small.encode(text) == list(theirs.encode(text))
    assert small.encode(text) == theirs.encode_tf(text).numpy().tolist()


def test_t5_vocabulary_equals_seqios(shared_data):
  pytest.importorskip('seqio')
  ours = load_vocabulary(str(shared_data / T5_MODEL), extra_ids=100)
  theirs = ours.as_seqio()
  assert ours.vocab_size == theirs.vocab_size == 32100
  assert ours.sentinel_id(0) == 32099
  assert ours.encode('Hello <extra_id_0> world') == [8774, 32099, 296]
  books = shared_data / 'pretrain' / 'books' / 'validation.txt'
  for text in books.read_text().splitlines()[:100]:
    assert ours.encode(text) == list(theirs.encode(text))


# --- what may be wrong


def test_missing_file_is_named(tmp_path):
  with pytest.raises(UserError) as error:
    load_vocabulary(str(tmp_path / 'no.model'), 100)
  assert 'no.model does not exist' in message_of(error)


def test_folder_is_refused(tmp_path):
  with pytest.raises(UserError) as error:
    load_vocabulary(str(tmp_path), 100)
  assert f'{tmp_path} is a folder' in message_of(error)


@pytest.mark.parametrize('content', [b'', b'not a model\n', bytes(1000)])
def test_other_files_are_refused_quietly(tmp_path, capfd, content):
  path = tmp_path / 'other.model'
  path.write_bytes(content)
  with pytest.raises(UserError) as error:
    load_vocabulary(str(path), 100)
  assert f'{path} is not a SentencePiece model' in message_of(error)
  assert capfd.readouterr() == ('', '')


def test_special_ids_must_be_t5s(tmp_path):
  path = tmp_path / 'llama.model'
  with path.open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS),
      model_writer=file,
      vocab_size=SIZE,
      minloglevel=2,
    )
  with pytest.raises(UserError) as error:
    load_vocabulary(str(path), 100)
  assert 'ids are (-1, 2, 0), T5 models have (0, 1, 2)' in message_of(error)


def test_sentinels_that_do_not_exist_are_refused(small):
  for k in (-1, 10):
    with pytest.raises(UserError, match='has 10 extra ids'):
      small.sentinel_id(k)


# --- training


def test_training_gives_the_same_bytes_again(tmp_path, model_path, capfd):
  train_vocabulary(iter(TEXTS), SIZE, tmp_path / 'new' / 'again.model')
  assert (tmp_path / 'new' / 'again.model').read_bytes() != b''
  train_vocabulary(TEXTS, SIZE, tmp_path / 'third.model')
  third = (tmp_path / 'third.model').read_bytes()
  assert third == model_path.read_bytes()
  assert capfd.readouterr() == ('', '')  # the library is silent


def test_too_little_text_names_the_largest_size(tmp_path):
  path = tmp_path / 'x.model'
  with pytest.raises(UserError) as error:
    train_vocabulary(TEXTS, 5000, path)
  message = message_of(error)
  assert 'too small for a vocabulary of 5000 pieces' in message
  assert list(tmp_path.iterdir()) == []
  largest = int(re.search(r'largest possible size is (\d+)', message)[1])
  with pytest.raises(UserError):
    train_vocabulary(TEXTS, largest + 1, path)
  train_vocabulary(TEXTS, largest, path)
  assert load_vocabulary(str(path), 0).vocab_size == largest


def test_too_few_pieces_name_the_smallest_size(tmp_path):
  path = tmp_path / 'x.model'
  with pytest.raises(UserError) as error:
    train_vocabulary(TEXTS, 5, path)
  message = message_of(error)
  assert 'cannot hold the characters' in message
  smallest = int(message.split()[-1])
  with pytest.raises(UserError):
    train_vocabulary(TEXTS, smallest - 1, path)
  train_vocabulary(TEXTS, smallest, path)
  assert load_vocabulary(str(path), 0).vocab_size == smallest


@pytest.mark.parametrize('texts', [[], ['', ' \n \n']])
def test_empty_text_is_refused(tmp_path, texts):
  with pytest.raises(UserError, match='training text is empty'):
    train_vocabulary(texts, 50, tmp_path / 'x.model')


def test_very_long_lines_are_used(tmp_path):
  path = tmp_path / 'x.model'
  train_vocabulary([' '.join(TEXTS * 200)], SIZE, path)
  ids = load_vocabulary(str(path), 0).encode('the river')
  assert 2 not in ids and len(ids) <= 4


def test_a_sequence_is_sampled_from_everywhere(tmp_path):
  texts = ['the river and the mill'] * 500 + ['ZEBRA QUAGGA ZEBRA'] * 500
  path = tmp_path / 'x.model'
  train_vocabulary(texts, 24, path, characters=2000)
  assert 2 not in load_vocabulary(str(path), 0).encode('ZEBRA')
