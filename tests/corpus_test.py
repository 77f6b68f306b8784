"""The docstring corpus: its rules, its order, its cache."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from st_moe.data import corpus, docstrings

ROOT = Path(__file__).resolve().parent.parent

# English by the rules: 80 characters, 12 words, a fifth of them common.
RIVER = (
  'The river is used by the boats that wait for the wind, and the miller is '
  'often seen on the bank of the river.'
)
WINTER = (
  'In the winter the river is frozen and the children of the village walk '
  'over it to the school on the other side.'
)
LAMP = (
  'A lamp is lit in the window of the mill when the night comes, so that the '
  'last boat can find the way to the bank.'
)
BRIDGE = (
  'The bridge is made of wood, and it is not wide: the carts that come from '
  'the market wait for each other on the road.'
)
SHED = (
  'There is a shed by the road in which the tools of the miller are kept, '
  'and it is used as a shelter when the rain falls.'
)


def function(name: str, text: str) -> str:
  body = textwrap.indent(text, '  ')
  return f'def {name}():\n  """{body.lstrip()}\n  """\n'


# --- the rules


@pytest.mark.parametrize(
  'paragraph',
  [
    'The river is used by the boats.',  # too short
    f'>>> {RIVER}',
    f'.. note:: {RIVER}',
    f'| {RIVER}',
    f'+- {RIVER}',
    f'# {RIVER}',
    'incomprehensibilities of internationalization is the uncharacteristically '
    'disproportionate misunderstanding of telecommunications',  # 10 words
    '1 + 2 = 3, 4 + 5 = 9, 10 / 2 = 5 and that is it for the sums of the day, '
    '11 * 11 = 121, 12 * 12 = 144 to 20 * 20 = 400',  # too few letters
    'Fluss Boote warten Wind Wasser Dorf Kinder Schule Winter gehen Eis '
    'Fenster Lampe Nacht Ufer Weg letzte Boot',  # no English words
  ],
)
def test_what_is_not_english_prose_is_dropped(paragraph):
  assert not docstrings.is_english_prose(paragraph)


def test_english_prose_is_kept_with_spaces_collapsed():
  text = f'Short title.\n\n  {RIVER[:30]}\n    {RIVER[31:]}\n \n{WINTER}'
  assert docstrings.prose_paragraphs(text) == [RIVER, WINTER]


def test_docstrings_come_in_the_order_of_ast_walk():
  source = f'''"""{LAMP}"""
class Boat:
  def inner(self):
    """{WINTER}"""
if True:
  async def later():
    """{BRIDGE}"""
def outer():
  """{RIVER}"""
class Empty:
  """Too short to keep."""
'''
  assert list(docstrings.docstrings(source.encode())) == [
    LAMP,
    RIVER,
    WINTER,
    BRIDGE,
  ]


@pytest.mark.parametrize(
  'source', [b'def broken(:', b'x = "\0"', b'# coding: klingon\n', b'\xff\xfe']
)
def test_files_that_do_not_parse_give_nothing(source):
  assert list(docstrings.docstrings(source)) == []


def test_lone_surrogates_do_not_reach_the_texts():
  source = f'"""{RIVER} \\ud800"""'
  (text,) = docstrings.docstrings(source.encode())
  assert text == f'{RIVER} ?'


# --- collecting


@pytest.fixture
def installation(tmp_path, monkeypatch):
  """A small Python installation; `write(path, *texts)` adds a file to it."""
  stdlib = tmp_path / 'test' / 'python'  # 'test' above the root means nothing
  packages = stdlib / 'site-packages'
  packages.mkdir(parents=True)
  monkeypatch.setattr(
    corpus.sysconfig,
    'get_paths',
    lambda: {'stdlib': str(stdlib), 'purelib': str(packages)},
  )
  monkeypatch.setattr(corpus, '_pydoc_topics', lambda: [[('topic', [SHED])]])

  def write(path: str, *texts: str) -> None:
    target = stdlib / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
      '\n'.join(function(f'f{i}', text) for i, text in enumerate(texts))
    )

  return write


def test_a_file_is_a_document_in_sorted_order(installation, tmp_path):
  installation('zebra.py', RIVER, WINTER)
  installation('alpha/beta.py', LAMP)
  installation('site-packages/gamma/delta.py', BRIDGE)
  documents = corpus.docstring_documents(cache_root=tmp_path)
  assert documents.texts == (LAMP, f'{RIVER}\n\n{WINTER}', BRIDGE, SHED)
  assert documents.sources == {'stdlib': 2, 'site_packages': 1, 'pydoc': 1}


def test_tests_and_our_own_package_are_left_out(installation, tmp_path):
  installation('kept.py', RIVER)
  for folder in ('test', 'tests', 'idlelib/idle_test', 'a/tests/b'):
    installation(f'{folder}/x.py', WINTER)
  for folder in ('test', 'a/tests', 'st_moe', 'st_moe/data'):
    installation(f'site-packages/{folder}/x.py', LAMP)
  documents = corpus.docstring_documents(cache_root=tmp_path)
  assert documents.texts == (RIVER, SHED)


def test_packages_can_be_left_out(installation, tmp_path):
  installation('kept.py', RIVER)
  installation('site-packages/x.py', LAMP)
  documents = corpus.docstring_documents(False, tmp_path)
  assert documents.texts == (RIVER, SHED)


def test_repeated_docstrings_and_paragraphs_appear_once(installation, tmp_path):
  installation('a.py', RIVER, f'{WINTER}\n\n{RIVER}')
  installation('b.py', RIVER, LAMP)
  installation('c.py', RIVER)
  installation('d.py', SHED)
  documents = corpus.docstring_documents(cache_root=tmp_path)
  assert documents.texts == (f'{RIVER}\n\n{WINTER}', LAMP, SHED)


def test_any_number_of_workers_finds_the_same(installation, monkeypatch):
  paths = [Path(docstrings.__file__), Path(corpus.__file__)] * 150
  found = []
  for cores in (1, 3):
    monkeypatch.setattr(corpus.os, 'cpu_count', lambda cores=cores: cores)
    found.append(
      [
        [(digest, list(paragraphs)) for digest, paragraphs in file]
        for file in corpus._prose_of_files(paths)
      ]
    )
  assert found[0] == found[1]
  assert any(found[0])


# --- the cache


def test_the_second_time_nothing_is_collected(
  installation, tmp_path, monkeypatch
):
  installation('a.py', RIVER)
  first = corpus.docstring_documents(cache_root=tmp_path)
  monkeypatch.setattr(corpus, '_collect', None)
  assert corpus.docstring_documents(cache_root=tmp_path) == first


def test_new_packages_make_a_new_corpus(installation, tmp_path):
  installation('a.py', RIVER)
  first = corpus.docstring_documents(cache_root=tmp_path)
  installation('site-packages/boat-1.0.dist-info/unused.py')
  installation('site-packages/boat.py', LAMP)
  second = corpus.docstring_documents(cache_root=tmp_path)
  assert second.texts == (RIVER, LAMP, SHED)
  assert second.sha256 != first.sha256


@pytest.mark.parametrize('damage', ['', '{"texts": []}', 'changed text'])
def test_a_damaged_copy_is_made_again(installation, tmp_path, damage):
  installation('a.py', RIVER)
  first = corpus.docstring_documents(cache_root=tmp_path)
  (path,) = (tmp_path / 'docstrings').iterdir()
  if damage == 'changed text':
    fields = json.loads(path.read_text())
    fields['texts'][0] += '!'
    damage = json.dumps(fields)
  path.write_text(damage)
  assert corpus.docstring_documents(cache_root=tmp_path) == first


def test_a_cache_that_cannot_be_written_does_not_matter(installation, tmp_path):
  installation('a.py', RIVER)
  blocked = tmp_path / 'file'
  blocked.write_text('no folder')
  assert corpus.docstring_documents(cache_root=blocked).texts == (RIVER, SHED)


# --- the real installation


def test_the_standard_library_alone_is_a_corpus(tmp_path):
  """From a program without a main guard, and without JAX or TensorFlow."""
  program = tmp_path / 'program.py'
  program.write_text(
    'import json, sys\n'
    'from st_moe.data.corpus import docstring_documents\n'
    f'documents = docstring_documents(False, {str(tmp_path)!r})\n'
    'heavy = {"jax", "tensorflow", "seqio", "grain"} & set(sys.modules)\n'
    'print(json.dumps([documents.texts, documents.sources, list(heavy)]))\n'
  )
  output = subprocess.run(
    [sys.executable, str(program)],
    check=True,
    capture_output=True,
    text=True,
    env={'PYTHONPATH': str(ROOT)},
  )
  assert output.stderr == ''
  texts, sources, heavy = json.loads(output.stdout)
  assert heavy == []
  assert sources['stdlib'] > 300 and sources['pydoc'] > 50
  assert sources['site_packages'] == 0
  assert 1_000_000 < sum(map(len, texts)) < 3_000_000
  paragraphs = [part for text in texts for part in text.split('\n\n')]
  assert len(set(paragraphs)) == len(paragraphs)
  assert all(map(docstrings.is_english_prose, paragraphs))
  again = corpus.docstring_documents(False, tmp_path)  # from its cache
  assert list(again.texts) == texts


# --- sentences


def test_short_sentences_are_plain_and_one_per_text():
  texts = [
    f'Not this. {WINTER} The miller waves his hat when the boat leaves.',
    'This one calls f(x) and returns the result of it. Too short.',
    'The lamp is lit in the window of the mill. The boat finds the way home.',
    'The wind comes from the sea and fills the red sail.',
  ]
  assert corpus.short_sentences(texts, 2) == [
    'The miller waves his hat when the boat leaves.',
    'The lamp is lit in the window of the mill.',
  ]
  assert len(corpus.short_sentences(texts, 10)) == 3
