"""`st_moe cache` by files: each process reads its own, all make one cache."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from st_moe.config import DataConfig
from st_moe.data import cache_format, cache_writer
from st_moe.data.cache_text import divide
from st_moe.data.cache_windows import Windows
from st_moe.data.commands import cache_command
from st_moe.data.pieces import Files, Streamed
from st_moe.data.vocabularies import load_vocabulary
from st_moe.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
BYTES = load_vocabulary('byte', extra_ids=100)

# `st_moe cache`, with a list of every file below TEXT that Python opens; with
# KILL it is killed when it opens a file with that in its name.
CHILD = """
import os, signal, sys
text, kill, *argv = sys.argv[1:]
opened = set()
def watch(event, arguments):
  if event == 'open' and isinstance(arguments[0], (str, os.PathLike)):
    path = os.fspath(arguments[0])
    if path.startswith(text):
      opened.add(os.path.basename(path))
    if kill and kill in path:
      os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from st_moe.main import main
status = main(['cache', *argv])
print('opened', *sorted(opened))
print('loaded', *({'tensorflow', 'jax'} & set(sys.modules)))
sys.exit(status)
"""


def jsonl(texts) -> str:
  return ''.join(json.dumps({'text': text}) + '\n' for text in texts)


def write_c4(folder: Path, *, files=7, documents=30, name='c4-train') -> None:
  """Writes gzipped shards; the third has nothing but blank texts."""
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(files):
    texts = [
      f'{name} {i} says {k} times' if i != 2 else ' ' for k in range(documents)
    ]
    path = folder / f'{name}.{i:05d}.json.gz'
    path.write_bytes(gzip.compress(jsonl(texts).encode()))


def write_text(folder: Path, *, files=7) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(files):
    lines = [f'file {i}, line {k}\n' for k in range(20)] if i != 2 else ['\n']
    (folder / f'{i}.txt').write_text('\n'.join(lines))


def flags(kind: str, text: Path) -> list[str]:
  """Writes the text of a kind; returns the flags that name it."""
  values = {'task': kind.split()[0], 'files': text / 'train'}
  if kind == 'text':
    write_text(text / 'train')
    write_text(text / 'held_out', files=4)
  else:
    write_c4(text / 'train')
    write_c4(text / 'held_out', files=4, name='c4-validation')
  if kind == 'c4_json alone':
    values |= {'holdout_every': 10}
  else:
    values |= {'eval_files': text / 'held_out'}
  return [f'--gin.DataConfig.{name}={value}' for name, value in values.items()]


def start(text: Path, output: Path, *argv: str, kill='') -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-c', CHILD, str(text), kill]
    + [*argv, f'--output={output}', '--vocabulary=byte'],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen) -> dict[str, set[str]]:
  """Waits for success; returns what was opened, and which modules loaded."""
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  words = [line.split() for line in out.splitlines()]
  return {
    line[0]: set(line[1:]) for line in words if line[0] in ('opened', 'loaded')
  }


def files_of(folder: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_of(folder: Path, split: str) -> list[str]:
  manifest = cache_format.read_manifest(folder)
  records = Windows(folder, manifest, split, 100).records()
  return [BYTES.decode(tokens) for tokens in records]


TRAIN = [f'c4-train.{i:05d}.json.gz' for i in range(7)]
VALIDATION = [f'c4-validation.{i:05d}.json.gz' for i in range(4)]
# Shard k of 6 holds files [7k/6, 7(k+1)/6): the last one two. Part i of three
# writes shards i and i + 3, of the held-out split's min(6, 4) too.
OPENED = {
  'c4_json alone': [
    {TRAIN[0], TRAIN[3]},
    {TRAIN[1], TRAIN[4]},
    {TRAIN[2], TRAIN[5], TRAIN[6]},
  ],
  'c4_json': [
    {TRAIN[0], TRAIN[3], VALIDATION[0], VALIDATION[3]},
    {TRAIN[1], TRAIN[4], VALIDATION[1]},
    {TRAIN[2], TRAIN[5], TRAIN[6], VALIDATION[2]},
  ],
  # Training and held-out files have the same names.
  'text': [
    {'0.txt', '3.txt'},
    {'1.txt', '4.txt'},
    {'2.txt', '5.txt', '6.txt'},
  ],
}


@pytest.mark.parametrize('kind', OPENED)
def test_three_processes_at_once_read_their_own_files(kind, tmp_path):
  text = tmp_path / 'text'
  argv = [*flags(kind, text), '--num_shards=6']
  parts = [start(text, tmp_path / 'c', *argv, f'--shard={i}/3') for i in (0, 1)]
  parts.append(start(text, tmp_path / 'c', *argv, '--shard=2/3'))
  found = [finish(process) for process in parts]
  assert [part['opened'] for part in found] == OPENED[kind]
  assert [part['loaded'] for part in found] == [set()] * 3
  alone = finish(start(text, tmp_path / 'alone', *argv))
  assert alone['opened'] == set.union(*OPENED[kind])
  assert files_of(tmp_path / 'c') == files_of(tmp_path / 'alone')
  assert (tmp_path / 'c' / 'manifest.json').is_file()
  # Again, without --shard and --num_shards: there is nothing to read.
  assert finish(start(text, tmp_path / 'c', *argv[:-1]))['opened'] == set()


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(tmp_path):
  text = tmp_path / 'text'
  argv = [*flags('c4_json alone', text), '--num_shards=6']
  cache = tmp_path / 'c'
  finish(start(text, tmp_path / 'alone', *argv))
  # All tokens of shard 3 are in a temporary file, its offsets are not.
  killed = start(
    text, cache, *argv, '--shard=0/3', kill='.train-00003-of-00006.offsets'
  )
  killed.communicate(timeout=120)
  assert killed.returncode == -signal.SIGKILL
  assert list(cache.glob('.train-00003-of-00006.array_record.*.tmp'))
  finished = [path.name for path in cache.glob('*-of-*.json')]
  assert finished == ['train-00000-of-00006.json']
  with pytest.raises(UserError, match='is not finished'):
    cache_format.read_manifest(cache)
  for i in (1, 2):
    finish(start(text, cache, *argv, f'--shard={i}/3'))
  assert not (cache / 'manifest.json').exists()
  again = finish(start(text, cache, *argv, '--shard=0/3'))
  # Shard 0 is there; held-out shards 0 and 3 are read from its files too.
  assert again['opened'] == OPENED['c4_json alone'][0]
  assert files_of(cache) == files_of(tmp_path / 'alone')


def c4_config(folder: Path, **settings) -> DataConfig:
  values = {'task': 'c4_json', 'files': str(folder), 'vocabulary': 'byte'}
  return DataConfig(**values | settings)


def test_documents_order_and_split_are_those_of_the_stream(tmp_path):
  pytest.importorskip('seqio')
  from st_moe.data.pipeline import open_stream

  write_c4(tmp_path / 'text')
  config = c4_config(tmp_path / 'text', holdout_every=10)
  for count in (1, 4, 7, 20):  # 20 divides documents
    folder = tmp_path / str(count)
    cache_command(config, folder, num_shards=count, report=lambda line: None)
    plan = cache_writer.read_plan(folder)
    assert plan.unit == ('files' if count < 20 else 'documents')
  stream = open_stream(config, seed=0, cache_root=tmp_path)
  for split in ('train', 'validation'):
    expected = list(stream.documents(split))
    for count in (1, 4, 7, 20):
      assert texts_of(tmp_path / str(count), split) == expected


def test_how_a_text_is_divided(tmp_path):
  write_c4(tmp_path / 'c4', documents=2)
  write_text(tmp_path / 'train')
  c4 = c4_config(tmp_path / 'c4')
  text = DataConfig(task='text', files=str(tmp_path / 'train'))
  held_out = DataConfig(
    task='text',
    files=tuple(str(tmp_path / f'train/{i}.txt') for i in range(6)),
    eval_files=str(tmp_path / 'train/6.txt'),
  )
  one = c4_config(tmp_path / 'c4' / TRAIN[0])
  docstrings = DataConfig(task='docstrings')
  for config, asked, shards, by_files in (
    (c4, None, 7, True),  # fewer than 16
    (c4, 7, 7, True),
    (c4, 2, 2, True),
    (c4, 8, 8, False),  # more shards than files
    (one, None, 16, False),
    (text, None, 16, False),  # every 50th line of all the text is held out
    (held_out, None, 6, True),
    (docstrings, None, 16, False),
  ):
    division = divide(config, asked, None)
    assert division.num_shards == shards
    assert (division.files is not None) == by_files


def test_a_cache_stays_divided_as_it_was_begun(tmp_path):
  write_c4(tmp_path / 'c4', documents=2)
  config = c4_config(tmp_path / 'c4')
  plan = cache_writer.Plan({}, 'byte', '', shards={'train': 5, 'validation': 1})
  documents = cache_writer.Plan(**vars(plan) | {'documents': {'train': 9}})
  files = cache_writer.Plan(**vars(plan) | {'files': {'train': 7}})
  assert divide(config, None, documents).files is None
  assert divide(config, None, documents).num_shards == 5
  assert divide(config, None, files).files is not None
  # Another number is refused by the writer, which knows the plan.
  assert divide(config, 8, files).num_shards == 8


def test_a_part_needs_a_vocabulary(tmp_path):
  write_c4(tmp_path / 'c4')
  config = c4_config(tmp_path / 'c4', vocabulary='auto')
  with pytest.raises(UserError, match='make it once with `st_moe vocab`'):
    cache_command(config, tmp_path / 'c', shard='0/2')
  assert not (tmp_path / 'c').exists()


def test_text_that_is_all_blank_is_refused(tmp_path):
  folder = tmp_path / 'c4'
  folder.mkdir()
  for i in range(3):
    (folder / f'{i}.json').write_text(jsonl([' ']))
  with pytest.raises(UserError, match="'c4_json' has no train documents"):
    cache_command(c4_config(folder), tmp_path / 'c', report=lambda line: None)
  assert not (tmp_path / 'c' / 'manifest.json').exists()


def test_a_broken_record_is_named_and_the_rest_stays(tmp_path):
  write_c4(tmp_path / 'c4')
  broken = tmp_path / 'c4' / TRAIN[3]
  good = broken.read_bytes()
  broken.write_bytes(gzip.compress(b'{"text": "a"}\n{broken\n'))
  os.utime(broken, ns=(1, 1))
  config = c4_config(tmp_path / 'c4', holdout_every=10)
  lines = []
  with pytest.raises(UserError, match=f'{TRAIN[3]}:2: broken JSON'):
    cache_command(config, tmp_path / 'c', report=lines.append)
  assert [line.split(':')[0][:11] for line in lines] == [
    'train-00000',
    'train-00001',
    'train-00002',
  ]
  # Mended, it is another text: sizes and dates say so.
  broken.write_bytes(good)
  with pytest.raises(UserError, match='holds a cache with content'):
    cache_command(config, tmp_path / 'c', report=lines.append)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one\n')

  def texts(number):
    yield 'one'
    path.write_text('one\ntwo\n')

  with pytest.raises(UserError, match='a.txt changed while it was read'):
    list(Files([path], texts).read(0, 1))


def test_a_stream_is_read_forward_in_one_pass():
  passes = []

  class Counted:
    def __iter__(self):
      passes.append(0)
      return iter('abcdefgh')

  pieces = Streamed(Counted())
  assert len(pieces) == 8
  assert [''.join(pieces.read(*run)) for run in ((1, 3), (5, 6), (6, 9))] == [
    'bc',
    'f',
    'gh',
  ]
  assert len(passes) == 2
  assert ''.join(pieces.read(0, 2)) == 'ab'
  assert pieces.end_at(8) and not pieces.end_at(7)


class TestTfds:
  """tfds gives any documents from the files that hold them."""

  @pytest.fixture
  def prepared(self, tmp_path):
    pytest.importorskip('seqio')
    from prepared_tfds import prepare_tfds

    texts = [f'number {i} of the documents' for i in range(20)]
    splits = {'train': texts, 'validation': ['held', 'out']}
    prepare_tfds(tmp_path, 'en', splits, files=5)
    return tmp_path / 'c4' / 'en' / '3.0.1'

  def config(self, tmp_path, **settings) -> DataConfig:
    values = {'task': 'c4', 'tfds_data_dir': str(tmp_path)}
    return DataConfig(**values | {'vocabulary': 'byte'} | settings)

  def test_each_part_needs_its_own_files_only(self, tmp_path, prepared):
    config = self.config(tmp_path)
    quiet = {'num_shards': 5, 'report': lambda line: None}
    cache_command(config, tmp_path / 'alone', **quiet)
    expected = [f'number {i} of the documents' for i in range(20)]
    assert texts_of(tmp_path / 'alone', 'train') == expected
    for i in range(5):
      hidden = [
        p for p in prepared.glob('c4-train*') if f'-0000{i}-' not in str(p)
      ]
      assert len(hidden) == 4
      for path in hidden:
        path.rename(path.with_name(f'hidden.{path.name}'))
      cache_command(config, tmp_path / 'c', shard=f'{i}/5', **quiet)
      for path in hidden:
        path.with_name(f'hidden.{path.name}').rename(path)
    assert files_of(tmp_path / 'c') == files_of(tmp_path / 'alone')

  def test_a_cache_begun_in_another_order_is_refused(self, tmp_path, prepared):
    folder = tmp_path / 'c'
    options = {'num_shards': 5, 'report': lambda line: None}
    cache_command(self.config(tmp_path), folder, shard='0/5', **options)
    plan = json.loads((folder / 'plan.json').read_text())
    del plan['text']['content']['order']  # as files were once read in turns
    (folder / 'plan.json').write_text(json.dumps(plan))
    with pytest.raises(UserError, match='holds a cache with content'):
      cache_command(self.config(tmp_path), folder, **options)

  def test_runs_may_begin_inside_files_and_slices(self, tmp_path, prepared):
    config = self.config(tmp_path, train_split='train[10%:]')
    for count in (1, 3, 7):
      folder = tmp_path / str(count)
      cache_command(config, folder, num_shards=count, report=lambda line: None)
      assert texts_of(folder, 'train') == [
        f'number {i} of the documents' for i in range(2, 20)
      ]
