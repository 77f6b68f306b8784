"""Writing a token cache: the same bytes, part by part, and after a crash."""

import json
from pathlib import Path

import numpy as np
import pytest

from st_moe.config import DataConfig
from st_moe.data import cache_format, cache_writer
from st_moe.data.cache_windows import Windows
from st_moe.data.cache_writer import Part, Text, write_cache
from st_moe.data.vocabularies import load_vocabulary
from st_moe.errors import UserError

BYTES = load_vocabulary('byte', extra_ids=100)
TEXTS = {
  'train': [f'document number {i} of the training text' for i in range(20)],
  'validation': ['held out', 'text'],
}

HELD_OUT = 'validation-00000-of-00001'


def text_of(texts=TEXTS, vocabulary=BYTES, name='x') -> Text:
  return Text(texts.__getitem__, {'sha256': name}, vocabulary)


def write(folder: Path, text=None, *, num_shards=4, **options):
  """Returns the manifest and the names of the shards that were written."""
  lines = []
  manifest = write_cache(
    DataConfig(),
    folder,
    text or text_of(),
    num_shards=num_shards,
    report=lines.append,
    **options,
  )
  written = [line.split(':')[0] for line in lines if ' documents, ' in line]
  return manifest, written


def files_of(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokens_of(folder: Path, split: str) -> list[int]:
  manifest = cache_format.read_manifest(folder)
  return Windows(folder, manifest, split, 10**9)[0].tolist()


@pytest.fixture
def folder(tmp_path) -> Path:
  return tmp_path / 'cache'


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
  """The files of a cache written at once."""
  write(tmp_path / 'whole')
  return files_of(tmp_path / 'whole')


def test_documents_become_tokens_counts_and_hashes(folder):
  manifest, _ = write(folder)
  assert [shard.documents for shard in manifest.splits['train']] == [5] * 4
  assert [s.documents for s in manifest.splits['validation']] == [2]
  for split, texts in TEXTS.items():
    assert tokens_of(folder, split) == BYTES.encode(''.join(texts))
  assert cache_format.read_manifest(folder) == manifest
  content = json.loads((folder / 'manifest.json').read_text())
  assert content['totals']['validation'] == {
    'documents': 2,
    'records': 2,
    'tokens': 12,
  }


def test_the_same_text_gives_the_same_bytes(folder, whole):
  write(folder)
  assert files_of(folder) == whole


def test_streams_and_sequences_give_the_same_bytes(folder, whole):
  text = Text(lambda split: iter(TEXTS[split]), {'sha256': 'x'}, BYTES)
  write(folder, text)
  assert files_of(folder) == whole


def test_a_finished_cache_is_not_written_again(folder, monkeypatch):
  manifest, written = write(folder)
  assert len(written) == 5
  monkeypatch.setattr(cache_writer, '_write_shard', None)
  assert write(folder) == (manifest, [])


def test_there_are_no_more_shards_than_documents(folder):
  manifest, _ = write(folder, num_shards=100)
  assert len(manifest.splits['train']) == 20


@pytest.mark.parametrize('stop', [0, 7, 19])
@pytest.mark.parametrize('stream', [False, True])
def test_goes_on_after_an_interruption(folder, whole, stop, stream):
  class Interrupted(list):
    def __getitem__(self, i):
      if i == stop:
        raise KeyboardInterrupt
      return super().__getitem__(i)

    def __iter__(self):
      return (self[i] for i in range(len(self)))

  texts = TEXTS | {'train': Interrupted(TEXTS['train'])}
  with pytest.raises(KeyboardInterrupt):
    write(folder, text_of(texts))
  finished = {shard for shard in ('0', '1', '2') if stop // 5 > int(shard)}
  assert not list(folder.glob('.*')), 'no temporary files stay'
  with pytest.raises(UserError, match='not finished'):
    cache_format.read_manifest(folder)
  text = text_of()
  if stream:
    text = Text(lambda split: iter(TEXTS[split]), {'sha256': 'x'}, BYTES)
  _, written = write(folder, text)
  assert files_of(folder) == whole
  assert not {f'train-0000{i}-of-00004' for i in finished} & set(written)
  assert len(written) == 5 - len(finished)


def test_leftovers_of_a_killed_process_vanish(folder, whole):
  folder.mkdir()
  write(folder)
  (folder / 'train-00002-of-00004.json').unlink()
  (folder / '.train-00002-of-00004.array_record.123.tmp').write_text('half')
  _, written = write(folder)
  assert written == ['train-00002-of-00004']
  assert files_of(folder) == whole


@pytest.mark.parametrize('name', ['array_record', 'offsets.npy', 'json'])
@pytest.mark.parametrize('damage', ['delete', 'truncate', 'change'])
def test_a_damaged_shard_is_written_again(folder, whole, name, damage):
  write(folder)
  path = folder / f'train-00001-of-00004.{name}'
  content = path.read_bytes()
  if damage == 'delete':
    path.unlink()
  elif damage == 'truncate':
    path.write_bytes(content[:-10])
  else:
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  _, written = write(folder)
  assert written == ['train-00001-of-00004']
  assert files_of(folder) == whole


def test_a_damaged_manifest_is_written_again(folder, whole):
  write(folder)
  (folder / 'manifest.json').write_text('{')
  _, written = write(folder)
  assert written == []
  assert files_of(folder) == whole


# --- several processes


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
def test_parts_in_any_order_make_the_same_cache(folder, whole, order):
  shards = {
    0: ['train-00000-of-00004', 'train-00003-of-00004', HELD_OUT],
    1: ['train-00001-of-00004'],
    2: ['train-00002-of-00004'],
  }
  for index in order:
    manifest, written = write(folder, part=Part(index, 3))
    assert written == shards[index]
    assert (manifest is None) == (index != order[-1])
  assert files_of(folder) == whole


def test_two_parts_may_finish_at_the_same_moment(folder, whole, monkeypatch):
  """Both find every shard there, and write the manifest into each other."""
  last = cache_writer._write_manifest

  def finish_meanwhile(*arguments):
    monkeypatch.setattr(cache_writer, '_write_manifest', last)
    write(folder, part=Part(1, 2))
    return last(*arguments)

  monkeypatch.setattr(cache_writer, '_write_manifest', finish_meanwhile)
  manifest, _ = write(folder, part=Part(0, 2))
  assert manifest == cache_format.read_manifest(folder)
  assert files_of(folder) == whole


def test_the_files_of_a_process_still_at_work_are_left_alone(folder, whole):
  folder.mkdir()
  write(folder, part=Part(0, 2))
  other = folder / '.train-00001-of-00004.array_record.123.tmp'
  other.write_text('half')
  again = cache_writer._write_shard(
    folder, 'train-00001-of-00004', iter(TEXTS['train'][5:10]), BYTES
  )
  assert again.documents == 5
  assert other.exists()
  write(folder)
  assert files_of(folder) == whole


def test_processes_that_begin_with_other_settings_are_told(folder):
  def documents(split):  # while the text is counted, another process begins
    if not (folder / 'plan.json').exists():
      write(folder, num_shards=2)
    return TEXTS[split]

  message = refused(folder, Text(documents, {'sha256': 'x'}, BYTES))
  assert 'num_shards 2, this one would have 4' in message


def test_more_parts_than_shards_are_refused(folder):
  assert refused(folder, part=Part(1, 5)) == (
    '--shard=1/5: 5 processes cannot share 4 shards; give all of them '
    '--num_shards=5 or more'
  )
  assert not folder.exists()


def test_a_plan_of_before_files_were_divided_is_gone_on_with(folder, whole):
  write(folder, part=Part(0, 2))
  plan = json.loads((folder / 'plan.json').read_text())
  assert plan.pop('files') == {}
  (folder / 'plan.json').write_text(json.dumps(plan))
  manifest, written = write(folder)
  assert manifest == cache_format.read_manifest(folder)
  assert written == ['train-00001-of-00004', 'train-00003-of-00004']


def test_parts_read_from_the_command_line():
  assert Part.parse('2/5') == Part(2, 5)
  for text in ('5/5', '-1/2', '1', 'a/b', '0/0', '1/2/3', ''):
    with pytest.raises(UserError, match="is not 'i/n' with 0 <= i < n"):
      Part.parse(text)


# --- what the records hold


def test_long_documents_become_several_records(folder, monkeypatch):
  monkeypatch.setattr(cache_writer, 'RECORD_TOKENS', 10)
  text = {'train': ['a' * 25, '', 'b' * 10], 'validation': ['c']}
  manifest, _ = write(folder, text_of(text), num_shards=1)
  (shard,) = manifest.splits['train']
  assert (shard.documents, shard.records, shard.tokens) == (3, 4, 35)
  offsets = np.load(folder / f'{shard.name}.offsets.npy')
  assert offsets.tolist() == [0, 10, 20, 25, 35]
  assert tokens_of(folder, 'train') == BYTES.encode('a' * 25 + 'b' * 10)


def test_batches_of_documents_are_bounded(folder, whole, monkeypatch):
  monkeypatch.setattr(cache_writer, '_BATCH_DOCUMENTS', 2)
  write(folder)
  assert files_of(folder) == whole
  monkeypatch.setattr(cache_writer, '_BATCH_CHARACTERS', 1)
  batches = list(cache_writer._batches(iter(['a', '', 'bc'])))
  assert batches == [['a'], ['', 'bc']]


def test_large_vocabularies_take_four_bytes_a_token():
  class Large:
    vocab_size = 2**16 + 1

  assert cache_writer._token_bytes(Large()) == 4
  assert cache_writer._token_bytes(BYTES) == 2
  assert cache_format.token_dtype(4).itemsize == 4


# --- what may be wrong


def refused(*arguments, **options) -> str:
  with pytest.raises(UserError) as error:
    write(*arguments, **options)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_another_text_or_layout_is_not_mixed_in(folder):
  write(folder)
  before = files_of(folder)
  assert 'content' in refused(folder, text_of(name='y'))
  assert 'num_shards 4, this one would have 5' in refused(folder, num_shards=5)
  with pytest.raises(UserError, match='holdout_every 50, .* have 20'):
    write_cache(DataConfig(holdout_every=20), folder, text_of(), num_shards=4)
  assert files_of(folder) == before


def test_another_vocabulary_is_not_mixed_in(folder, shared_data):
  write(folder)
  path = shared_data / 'vocab' / 't5_cc_all_32000_spiece.model'
  vocabulary = load_vocabulary(str(path), 100)
  assert 'holds a cache with vocabulary' in refused(
    folder, text_of(vocabulary=vocabulary)
  )


@pytest.mark.parametrize('count', [18, 19, 21])
def test_a_text_that_changes_on_the_way_is_noticed(folder, count):
  calls = []

  def documents(split):
    calls.append(split)
    texts = TEXTS[split]
    if split == 'train' and calls.count('train') > 1:
      texts = [*texts, 'more'][:count]
    return iter(texts)

  text = Text(documents, {'sha256': 'x'}, BYTES)
  message = refused(folder, text)
  assert 'the train text changed' in message
  assert 'its plan counts 20 documents' in message


def test_folders_with_other_things_are_left_alone(tmp_path):
  (tmp_path / 'thesis.txt').write_text('important')
  assert 'is not empty and holds no cache' in refused(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']


def test_a_cache_that_another_process_begins_is_joined(folder, shared_data):
  path = shared_data / 'vocab' / 't5_cc_all_32000_spiece.model'
  vocabulary = load_vocabulary(str(path), 100)
  folder.mkdir()
  copy = folder / 'vocabulary.model'
  copy.write_bytes(path.read_bytes())
  (folder / '.plan.json.0123abcd.tmp').write_text('{"te')
  assert write(folder, text_of(vocabulary=vocabulary)) is not None
  (folder / 'plan.json').unlink()
  for shard in folder.glob('*-of-*'):
    shard.unlink()
  (folder / 'manifest.json').unlink()
  copy.write_bytes(b'mine')
  message = refused(folder, text_of(vocabulary=vocabulary))
  assert f'{copy} is not the vocabulary {path}' in message
  assert copy.read_bytes() == b'mine'


def test_a_damaged_plan_is_named(folder):
  write(folder)
  (folder / 'plan.json').write_text('{')
  assert f'{folder}/plan.json is damaged' in refused(folder)


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_a_split_without_documents_is_refused(folder, split):
  message = refused(folder, text_of(TEXTS | {split: []}))
  assert f"task 'docstrings' has no {split} documents" in message
  assert not folder.exists()


def test_the_number_of_shards_must_be_positive(folder):
  assert 'num_shards must be >= 1, got 0' in refused(folder, num_shards=0)


def test_a_literal_sentinel_in_a_document_is_text(folder, shared_data):
  path = shared_data / 'vocab' / 't5_cc_all_32000_spiece.model'
  vocabulary = load_vocabulary(str(path), 100)
  texts = TEXTS | {'train': ['a literal <extra_id_0> here']}
  write(folder, text_of(texts, vocabulary))
  assert max(tokens_of(folder, 'train')) < 32000
