"""Local text files: found, checked, split and read."""

import gzip
import json

import pytest

from st_moe.data import sources
from st_moe.data.c4_json import JsonChunks, JsonDocuments
from st_moe.data.sources import (
  SUFFIXES,
  TextDocuments,
  hold_out,
  resolve_files,
)
from st_moe.errors import UserError


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  content = content if isinstance(content, bytes) else content.encode()
  if path.name.endswith('.gz'):
    content = gzip.compress(content)
  path.write_bytes(content)
  return path


def lines_of(path, document='line', limit=1000):
  return list(TextDocuments([path], document, limit))


def jsonl(*texts):
  return ''.join(
    json.dumps({'text': text, 'url': 'u'}) + '\n' for text in texts
  )


def find(patterns, suffixes=SUFFIXES['text']):
  return resolve_files(patterns, suffixes, 'DataConfig.files')


class TestResolveFiles:
  def test_files_globs_and_folders_come_sorted_and_once(self, tmp_path):
    b = write(tmp_path / 'b.txt', 'b')
    a = write(tmp_path / 'deep' / 'er' / 'a.txt.gz', 'a')
    c = write(tmp_path / 'c.md', 'c')
    write(tmp_path / 'picture.png', 'p')
    assert find(str(tmp_path)) == (b, c, a)
    assert find((str(c), str(tmp_path / '*.txt'), str(b))) == (b, c)
    assert find(str(tmp_path / '**' / 'a*')) == (a,)

  def test_a_file_of_any_name_can_be_given(self, tmp_path):
    odd = write(tmp_path / 'corpus[1]', 'x')
    assert find(str(odd)) == (odd,)

  @pytest.mark.parametrize(
    ('pattern', 'message'),
    [
      ('none.txt', 'none.txt does not exist'),
      ('none*', 'no file matches .*none'),
      ('empty', 'folder .*empty holds no .txt, .text, .md'),
      ('gs://bucket/x.txt', 'gs://bucket/x.txt is not a local path'),
    ],
  )
  def test_what_is_not_there_is_named(self, tmp_path, pattern, message):
    (tmp_path / 'empty').mkdir()
    if '://' not in pattern:
      pattern = str(tmp_path / pattern)
    with pytest.raises(UserError, match=f'DataConfig.files: .*{message}'):
      find(pattern)

  def test_no_pattern_at_all_is_refused(self):
    with pytest.raises(UserError, match='DataConfig.files is empty'):
      find(())

  def test_a_held_out_file_must_not_be_trained_on(self, tmp_path):
    a, b = write(tmp_path / 'a.txt', 'a'), write(tmp_path / 'b.txt', 'b')
    sources.check_disjoint([a], [b])
    with pytest.raises(UserError, match='b.txt is in both'):
      sources.check_disjoint([a, b], [tmp_path / 'x' / '..' / 'b.txt'])

  def test_the_fingerprint_changes_with_a_byte_and_not_with_the_folder(
    self, tmp_path
  ):
    one = write(tmp_path / '1' / 'a.txt', 'words')
    two = write(tmp_path / '2' / 'a.txt', 'words')
    three = write(tmp_path / '3' / 'a.txt', 'sword')
    prints = [sources.fingerprint_files([p]) for p in (one, two, three)]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0] | {'sha256': ''} == {'files': 1, 'bytes': 5, 'sha256': ''}


class TestTextDocuments:
  def test_a_line_is_a_document_and_blank_lines_are_none(self, tmp_path):
    path = write(tmp_path / 'a.txt', 'one\r\n\n \t\ntwo, 2\nlast')
    assert lines_of(path) == ['one', 'two, 2', 'last']

  def test_a_paragraph_is_a_document_with_its_line_ends(self, tmp_path):
    path = write(tmp_path / 'a.txt', '\n\nA b\nc\n\n  \nD\r\n\r\nE\nf')
    assert lines_of(path, 'paragraph') == ['A b\nc', 'D', 'E\nf']

  def test_gzipped_text_reads_like_plain_text(self, tmp_path):
    text = 'é ü\n\nzwei\n'
    plain = write(tmp_path / 'a.txt', text)
    packed = write(tmp_path / 'a.txt.gz', text)
    assert lines_of(packed) == lines_of(plain) == ['é ü', 'zwei']

  def test_files_follow_each_other_and_empty_ones_are_passed(self, tmp_path):
    files = [
      write(tmp_path / name, text)
      for name, text in [
        ('a.txt', 'a1\na2\n'),
        ('b.txt', ''),
        ('c.txt.gz', 'c1\n'),
        ('d.txt', 'd1\nd2'),
      ]
    ]
    documents = TextDocuments(files, 'line', 100)
    assert list(documents) == ['a1', 'a2', 'c1', 'd1', 'd2']
    assert documents[3] == 'd1'

  def test_a_byte_order_mark_is_no_text(self, tmp_path):
    path = write(tmp_path / 'a.txt', b'\xef\xbb\xbfone\ntwo\n')
    assert lines_of(path) == ['one', 'two']

  def test_a_line_of_exactly_the_limit_passes(self, tmp_path):
    path = write(tmp_path / 'a.txt', 'x' * 10 + '\r\n' + 'y' * 10)
    assert lines_of(path, limit=10) == ['x' * 10, 'y' * 10]

  @pytest.mark.parametrize('name', ['a.txt', 'a.txt.gz'])
  @pytest.mark.parametrize(
    ('content', 'document', 'message'),
    [
      (
        b'good\nbad \xff byte\n',
        'line',
        ':2: invalid UTF-8 .byte 0xff at 5.*iconv',
      ),
      (b'a\n\nb\n\xc3(\n', 'paragraph', ':4: invalid UTF-8 .byte 0xc3 at 1'),
      (b'ok\nok\n' + b'x' * 21, 'line', ':3: line of more than 20 bytes'),
      (b'\n' + b'abcdefg\n' * 3, 'paragraph', ':2: paragraph of more than 20'),
      (b' \n\n\t\n', 'line', 'empty, or only blank lines'),
      (b'', 'paragraph', 'empty, or only blank lines'),
    ],
  )
  def test_bad_text_is_named_by_file_and_line(
    self, tmp_path, name, content, document, message
  ):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=f'{name}.*{message}') as raised:
      lines_of(path, document, limit=20)
    assert '\n' not in str(raised.value)

  def test_a_cut_or_wrong_gzip_file_is_refused(self, tmp_path):
    whole = gzip.compress(b'some words in a line\n' * 1000)
    for content in (whole[:-20], b'plain text, not gzip', whole[:30]):
      path = tmp_path / 'a.txt.gz'
      path.write_bytes(content)
      with pytest.raises(UserError, match='a.txt.gz: broken gzip file'):
        lines_of(path)

  def test_too_much_gzipped_text_says_to_unpack_it(self, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'MAX_UNPACKED_BYTES', 100)
    a = write(tmp_path / 'a.txt.gz', 'x' * 60)
    b = write(tmp_path / 'b.txt.gz', 'x' * 60)
    with pytest.raises(UserError, match='b.txt.gz: .*more than 100 .*gunzip'):
      TextDocuments([a, b], 'line', 100)

  @pytest.mark.parametrize('content', [b'short', b'\xff' * 30, None])
  def test_a_file_that_changes_under_the_run_is_an_error(
    self, tmp_path, content
  ):
    path = write(tmp_path / 'a.txt', 'first line\nsecond line\n')
    documents = TextDocuments([path], 'line', 100)
    path.unlink()
    if content is not None:
      path.write_bytes(content)
    with pytest.raises(UserError, match='a.txt (changed|cannot be read)'):
      documents[1]


class TestHoldOut:
  def test_every_third_document_is_held_out_and_no_other_is_lost(self):
    documents = [f'd{i}' for i in range(8)]
    split = hold_out(documents, 3, 'corpus')
    assert list(split.train) == ['d0', 'd1', 'd3', 'd4', 'd6', 'd7']
    assert list(split.held_out) == ['d2', 'd5']

  @pytest.mark.parametrize('every', [2, 3, 7, 50])
  @pytest.mark.parametrize('count', [50, 51, 99, 100, 101])
  def test_the_two_parts_are_disjoint_and_whole(self, every, count):
    split = hold_out(list(range(count)), every, 'corpus')
    assert sorted([*split.train, *split.held_out]) == list(range(count))
    assert len(split.held_out) == count // every

  def test_too_few_documents_are_refused_with_both_numbers(self):
    with pytest.raises(UserError, match='corpus: 49 documents .* one in 50'):
      hold_out(['x'] * 49, 50, 'corpus')


class TestJson:
  def test_texts_come_shard_by_shard_plain_or_gzipped(self, tmp_path):
    a = write(tmp_path / 'c4-train.0.json.gz', jsonl('a1', 'a2'))
    b = write(tmp_path / 'c4-train.1.json', jsonl('b1', ' ', '') + '\n')
    files = find(str(tmp_path), SUFFIXES['c4_json'])
    assert files == (a, b)
    part = JsonDocuments(files, 1000).part(held_out=False)
    assert list(part) == ['a1', 'a2', 'b1']

  def test_the_held_out_documents_are_the_others(self, tmp_path):
    texts = [[f'{shard}-{i}' for i in range(20)] for shard in 'abc']
    files = [
      write(tmp_path / f'{i}.json.gz', jsonl(*t)) for i, t in enumerate(texts)
    ]
    documents = JsonDocuments(files, 1000, holdout_every=5)
    train = list(documents.part(held_out=False))
    held_out = list(documents.part(held_out=True))
    assert len(held_out) == 12
    assert held_out[:5] == ['a-4', 'a-9', 'a-14', 'a-19', 'b-3']
    assert sorted(train + held_out) == sorted(sum(texts, []))

  def test_chunks_in_any_order_hold_each_document_once(self, tmp_path):
    texts = [f't{i}' for i in range(150)]
    path = write(tmp_path / 'a.json.gz', jsonl(*texts))
    part = JsonDocuments([path], 1000).part(held_out=False)
    in_order = JsonChunks(part)
    chunks = [in_order.read(0, k) for k in range(4)]
    assert sum(chunks, []) == texts
    assert chunks[3] == []
    backwards = JsonChunks(part)
    found = [backwards.read(0, k) for k in (3, 1, 0, 2)]
    assert found == [chunks[k] for k in (3, 1, 0, 2)]

  @pytest.mark.parametrize(
    ('line', 'message'),
    [
      (b'{"text": "cut', ':3: broken JSON'),
      (b'{"txt": "x", "url": "u"}', ":3: no field 'text'.*txt, url"),
      (b'{"text": 7}', ":3: no field 'text'.*text"),
      (b'["text"]', ":3: no field 'text'.*no object"),
      (b'{"text": "\xff"}', ':3: invalid UTF-8'),
      (b'{"text": "' + b'x' * 200 + b'"}', ':3: line of more than 100 bytes'),
      (b'[' * 100, ':3: broken JSON'),
    ],
  )
  @pytest.mark.parametrize('name', ['a.json', 'a.json.gz'])
  def test_a_bad_record_is_named_before_training(
    self, tmp_path, name, line, message
  ):
    content = jsonl('one', 'two').encode() + line + b'\n'
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=f'{name}{message}'):
      JsonDocuments([path], 100).check()

  def test_a_bad_record_further_on_is_named_when_it_is_met(self, tmp_path):
    content = jsonl(*(f't{i}' for i in range(100))).encode() + b'{broken\n'
    path = write(tmp_path / 'a.json.gz', content)
    part = JsonDocuments([path], 1000).part(held_out=False)
    with pytest.raises(UserError, match='a.json.gz:101: broken JSON'):
      list(part)

  def test_a_shard_that_was_cut_is_no_silent_end(self, tmp_path):
    path = write(
      tmp_path / 'a.json.gz', jsonl(*(f'text {i * i}' for i in range(5000)))
    )
    path.write_bytes(path.read_bytes()[:-1000])
    part = JsonDocuments([path], 1000).part(held_out=False)
    with pytest.raises(UserError, match='a.json.gz: broken gzip file'):
      list(part)

  def test_shards_without_a_text_are_refused(self, tmp_path):
    path = write(tmp_path / 'a.json', jsonl('', ' '))
    with pytest.raises(UserError, match='no record with a text'):
      JsonDocuments([path], 1000).check()

  def test_half_a_surrogate_pair_becomes_a_question_mark(self, tmp_path):
    path = write(tmp_path / 'a.json', '{"text": "a \\ud800 b"}\n')
    assert list(JsonDocuments([path], 1000).part(False)) == ['a ? b']

  def test_the_c4_shards_of_the_data_folder(self, shared_data):
    files = find(str(shared_data / 'pretrain/c4-format/c4-train*'))
    texts = list(JsonDocuments(files, 10**7).part(held_out=False))
    assert len(texts) == 1200
    assert all(len(text) > 100 for text in texts)
