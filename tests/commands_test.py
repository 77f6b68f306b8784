"""`st_moe vocab` and `st_moe cache` behind the command line, on real tasks."""

import pytest

from st_moe.config import DataConfig
from st_moe.errors import UserError

pytest.importorskip('seqio')

from st_moe.data.cache import open_cache  # noqa: E402
from st_moe.data.commands import cache_command, vocab_command  # noqa: E402
from st_moe.data.vocabularies import load_vocabulary  # noqa: E402


def text_number(i: int) -> str:
  return f'Boat number {i} waits below the old mill for wind from the sea.'


@pytest.fixture
def config(tmp_path) -> DataConfig:
  """200 documents, every tenth held out."""
  path = tmp_path / 'text.txt'
  path.write_text('\n'.join(map(text_number, range(200))))
  return DataConfig(
    task='text',
    files=str(path),
    holdout_every=10,
    inputs_length=64,
    targets_length=14,
  )


def test_vocab_trains_and_measures_a_model(config, tmp_path):
  lines = []
  output = tmp_path / 'new' / 'my.model'
  vocab_command(config, output, 50, report=lines.append)
  vocabulary = load_vocabulary(str(output), 100)
  assert vocabulary.vocab_size == 150
  held_out = [text_number(i) for i in range(9, 200, 10)]
  tokens = sum(len(vocabulary.encode(text)) for text in held_out)
  per_token = sum(map(len, held_out)) / tokens
  assert lines == [
    f'{output}: 50 pieces; on held-out text {per_token:.2f} characters per '
    'token, 0.0000% unknown'
  ]


def test_vocab_overwrites_nothing(config, tmp_path):
  output = tmp_path / 'precious.model'
  output.write_text('precious')
  with pytest.raises(UserError, match='exists and is not overwritten'):
    vocab_command(config, output, 60)
  assert output.read_text() == 'precious'


def test_vocab_says_when_the_text_is_too_small(config, tmp_path):
  output = tmp_path / 'my.model'
  with pytest.raises(UserError, match='the largest possible size is'):
    vocab_command(config, output, 5000)
  assert not output.exists()


def test_cache_writes_what_training_reads(config, tmp_path):
  lines = []
  folder = tmp_path / 'cache'
  options = {'num_shards': 2, 'cache_root': tmp_path, 'report': lines.append}
  config = DataConfig(**vars(config) | {'vocabulary': 'byte'})
  cache_command(config, folder, shard='0/2', **options)
  assert lines[-1] == f'{folder}: shards of other parts are still missing'
  cache_command(config, folder, shard='1/2', **options)
  tokens = sum(len(text_number(i)) for i in range(200) if i % 10 != 9)
  assert lines[-1].startswith(f'{folder}: {tokens} training tokens; train')
  cache_command(
    config, folder, num_shards=2, cache_root=tmp_path, report=lines.append
  )
  assert lines[-2] == f'{folder}: already complete, nothing to write'
  data = open_cache(
    DataConfig(**vars(config) | {'task': 'cache', 'cache_dir': str(folder)}),
    seed=0,
  )
  assert next(data.train_batches(4))['encoder_input_tokens'].shape == (4, 64)
  # Numbers make no plain sentence, so there is nothing to show.
  assert data.eval_texts(3) == []


def test_a_cache_of_a_cache_is_refused(config, tmp_path):
  config = DataConfig(task='cache', cache_dir=str(tmp_path))
  for command in (
    lambda: vocab_command(config, tmp_path / 'x.model', 60),
    lambda: cache_command(config, tmp_path / 'y'),
  ):
    with pytest.raises(UserError, match="task 'cache' is tokenized already"):
      command()


def test_paths_that_cannot_be_written_are_named(config, tmp_path):
  config = DataConfig(**vars(config) | {'vocabulary': 'byte'})
  (tmp_path / 'file').write_text('no folder')
  for command, message in (
    (
      lambda: vocab_command(config, tmp_path / 'file' / 'x.model', 50),
      'file/x.model cannot be written: .*file is no folder',
    ),
    (
      lambda: cache_command(config, tmp_path / 'file' / 'cache'),
      'file.* cannot be written: ',
    ),
    (lambda: cache_command(config, tmp_path / 'file'), 'file is a file'),
  ):
    with pytest.raises(UserError, match=message):
      command()
