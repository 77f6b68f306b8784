"""ANLI, WinoGrande, ARC and summaries from published files; what is refused."""

import hashlib
import json
from pathlib import Path

import pytest

from st_moe.config import DataConfig
from st_moe.data.downstream.catalog import expand, load_examples
from st_moe.errors import UserError

REAL = Path(__file__).resolve().parents[2] / 'shared' / 'data'

ANLI = {'uid': 'u', 'context': 'It rains.', 'hypothesis': 'Wet.', 'label': 'n',
        'reason': 'r'}  # fmt: skip
WINOGRANDE = {'qID': 'q', 'sentence': 'Ann saw Sue but _ left.',
              'option1': 'Ann', 'option2': 'Sue', 'answer': '2'}  # fmt: skip
ARC = {'id': 'Mercury_1', 'answerKey': '3', 'question': {'stem': 'Why?',
       'choices': [{'text': text, 'label': str(i)} for i, text in enumerate(
         ('Ice', 'Sun', 'Rain'), 1)]}}  # fmt: skip
XSUM = {'document': 'He ran.\nHe fled.', 'summary': 'He left.', 'id': '7'}
CNN = {'article': 'He ran. He fled.', 'highlights': 'He left .\nHe is gone .',
       'id': '8'}  # fmt: skip

FILES = {
  'anli.r2': ('anli_v1.0/R2/train.jsonl', ANLI),
  'winogrande_xl': ('winogrande_1.1/train_xl.jsonl', WINOGRANDE),
  'arc.challenge': (
    'ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Train.jsonl',
    ARC,
  ),
  'xsum': ('xsum/train.jsonl', XSUM),
  'cnn_dailymail': ('cnn_dailymail/train.jsonl', CNN),
}
EXAMPLES = {
  'anli.r2': ('anli hypothesis: Wet. premise: It rains.', 'neutral', 1, 'u'),
  'winogrande_xl': (
    'winogrande option1: Ann option2: Sue sentence: Ann saw Sue but _ left.',
    'option2', 1, 'q',
  ),
  'arc.challenge': (
    'arc choice1: Ice choice2: Sun choice3: Rain question: Why?',
    'choice3', 2, 'Mercury_1',
  ),
  'xsum': ('summarize: He ran.\nHe fled.', 'He left.', None, '7'),
  'cnn_dailymail': (
    'summarize: He ran. He fled.', 'He left .\nHe is gone .', None, '8',
  ),
}  # fmt: skip


def write(root, name, content):
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content if isinstance(content, str) else json.dumps(content))


def load(root, name, split='train'):
  return load_examples(name, split, DataConfig(task_dir=str(root)))


@pytest.mark.parametrize('name', FILES)
def test_whole_texts(tmp_path, name):
  write(tmp_path, *FILES[name])
  (one,) = load(tmp_path, name)
  assert (one.inputs, one.targets, one.label, one.idx) == EXAMPLES[name]
  if one.label is None:
    assert one.answers == (one.targets,)
  else:
    assert one.choices[one.label] == one.targets


@pytest.mark.parametrize(
  ('name', 'label', 'none'),
  [
    ('anli.r2', 'label', 'x'),
    ('winogrande_xl', 'answer', '3'),
    ('arc.challenge', 'answerKey', 'A'),
    ('xsum', 'summary', 4),
    ('cnn_dailymail', 'highlights', 4),
  ],
)
def test_labels_that_are_missing_or_none_of_the_choices(
  tmp_path, name, label, none
):
  file, row = FILES[name]
  shown = '/'.join(file.split('/')[-2:])
  for value, message in (
    (None, f'{shown}:1: the row has no '),
    (none, f'{shown}:1: '),
  ):
    write(tmp_path, file, {**row, label: value})
    with pytest.raises(UserError) as error:
      load(tmp_path, name)
    assert message in str(error.value)
  # A test set has none.
  row = {key: value for key, value in row.items() if key != label}
  write(tmp_path, f'{Path(file).parent}/test.jsonl', row)
  (one,) = load(tmp_path, name, 'test')
  assert (one.targets, one.labelled) == ('<unk>', False)


@pytest.mark.parametrize(
  ('name', 'row', 'message'),
  [
    ('anli.r2', {'context': 'a', 'label': 'e'}, "no text 'hypothesis'"),
    ('winogrande_xl', {'sentence': 'a', 'answer': '1'}, "no text 'option1'"),
    ('arc.challenge', {'question': 'a'}, 'no question.stem and choices[]'),
    ('xsum', {'summary': 'a'}, "no text 'document'"),
  ],
)
def test_a_row_of_another_shape_is_named(tmp_path, name, row, message):
  write(tmp_path, FILES[name][0], '\n' + json.dumps(row))
  with pytest.raises(UserError) as error:
    load(tmp_path, name)
  assert f'{Path(FILES[name][0]).name}:2: the row has {message}' in (
    str(error.value)
  )


def test_xsum_from_the_files_of_its_authors(tmp_path, caplog):
  article = (
    '[SN]URL[SN]\nhttp://a\n\n[SN]TITLE[SN]\nNews\n\n'
    '[SN]FIRST-SENTENCE[SN]\nHe left.\n\n[SN]RESTBODY[SN]\nShare this with\n'
    'He ran.\n\nHe fled.\n'
  )
  data = (
    '[XSUM]URL[XSUM]\nb\n\n[XSUM]INTRODUCTION[XSUM]\nShe left.\n\n'
    '[XSUM]RESTBODY[XSUM]\nShe ran.\n'
  )
  splits = {'train': ['7'], 'validation': ['8'], 'test': ['9', '7']}
  write(tmp_path, 'XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json', splits)
  with pytest.raises(
    UserError, match='none of the folders bbc-summary-data, x'
  ):
    load(tmp_path, 'xsum')
  write(tmp_path, 'bbc-summary-data/7.summary', article)
  write(tmp_path, 'xsum-extracts-from-downloads/8.data', data)
  (one,) = load(tmp_path, 'xsum')
  assert (one.inputs, one.targets, one.idx) == (
    'summarize: He ran.\nHe fled.', 'He left.', '7'
  )  # fmt: skip
  (two,) = load(tmp_path, 'xsum', 'validation')
  assert (two.inputs, two.targets) == ('summarize: She ran.', 'She left.')
  assert len(load(tmp_path, 'xsum', 'test')) == 1
  assert '5.json: 1 of 2 articles are not there, and are left' in caplog.text
  other = tmp_path / 'other'
  write(other, 'XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json', splits)
  write(other, 'bbc-summary-data/7.summary', 'nothing')
  with pytest.raises(
    UserError, match='bbc-summary-data/7.summary: the row has'
  ):
    load(other, 'xsum')
  with pytest.raises(UserError, match='no example of xsum; is it whole'):
    load(other, 'xsum', 'validation')


def test_cnn_dailymail_from_the_stories(tmp_path):
  urls = ['http://cnn/a', 'http://dm/b', 'http://dm/empty']
  names = [hashlib.sha1(url.encode()).hexdigest() for url in urls]
  write(tmp_path, 'url_lists/all_train.txt', '\n'.join(urls))
  write(
    tmp_path,
    f'cnn/stories/{names[0]}.story',
    'He ran\n\nHe fled.\n\n@highlight\n\nHe left\n\n@highlight\n\nGone!\n',
  )
  write(tmp_path, f'dailymail/stories/{names[1]}.story', 'A\n@highlight\nB\n')
  write(tmp_path, f'dailymail/stories/{names[2]}.story', '@highlight\nB\n')
  assert [
    (e.inputs, e.targets, e.idx) for e in load(tmp_path, 'cnn_dailymail')
  ] == [
    ('summarize: He ran. He fled.', 'He left.\nGone!', names[0]),
    ('summarize: A.', 'B.', names[1]),
  ]


def test_missing_files_are_named(tmp_path):
  for name, (file, _) in FILES.items():
    if name not in ('xsum', 'cnn_dailymail'):
      with pytest.raises(UserError, match=f'there is no {file} in'):
        load(tmp_path, name)
  for name, message in (
    ('xsum', 'there is no xsum/XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json in'),
    ('cnn_dailymail', 'no cnn_dailymail/url_lists/all_train.txt in'),
  ):
    with pytest.raises(UserError, match=message):
      load(tmp_path, name)


@pytest.mark.skipif(not REAL.is_dir(), reason='no ../shared/data')
def test_the_real_files():
  def counts(name, split):
    found = load(REAL, name, split)
    labels = [example.label for example in found]
    return [labels.count(label) for label in sorted(set(labels))]

  assert counts('anli.r1', 'validation') == [334, 333, 333]
  assert counts('anli.r2', 'validation') == [334, 333, 333]
  assert counts('winogrande_xl', 'validation') == [628, 639]
  for name, split, count in (
    ('arc.easy', 'train', 2251),
    ('arc.easy', 'test', 2376),
    ('arc.challenge', 'train', 1119),
  ):
    found = load(REAL, name, split)
    assert len(found) == count
    assert {len(example.choices) for example in found} == {3, 4, 5}
  assert expand('anli') == ('anli.r1', 'anli.r2', 'anli.r3')


@pytest.mark.skipif(not REAL.is_dir(), reason='no ../shared/data')
def test_the_real_articles(tmp_path):
  for name, file in (
    ('xsum', 'xsum/test_1000.jsonl'),
    ('cnn_dm', 'cnn_dm/test_1000_articles_no_highlights.jsonl'),
  ):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'test.jsonl').symlink_to(REAL / file)
  found = load(tmp_path, 'xsum', 'test')
  assert len(found) == 1000
  assert all(example.labelled for example in found)
  found = load(tmp_path, 'cnn_dailymail', 'test')
  assert len(found) == 1000
  assert not any(example.labelled for example in found)
