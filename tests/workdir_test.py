"""A work directory has one configuration, one vocabulary, one process."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import pytest

from st_moe import workdir
from st_moe.config import ModelConfig, RunConfig
from st_moe.errors import UserError

CONFIG = RunConfig(model=ModelConfig(d_model=64))


def record(directory, config=CONFIG, data=None):
  directory.record(
    config,
    operative_config='# all of it\n',
    command=['st_moe', 'pretrain'],
    details={'data': data or {'vocabulary': 'abc', 'corpus': 'one'}},
  )


def test_a_fresh_directory_accepts_any_configuration(tmp_path):
  directory = workdir.open_workdir(tmp_path / 'a' / 'b')
  directory.check_configuration(CONFIG, allow=False)
  directory.check_data({'vocabulary': 'abc'}, allow=False)
  directory.close()


def test_another_configuration_is_refused_and_every_difference_named(tmp_path):
  directory = workdir.open_workdir(tmp_path)
  record(directory)
  model = dataclasses.replace(CONFIG.model, dropout_rate=0.1)
  other = dataclasses.replace(CONFIG, model=model, seed=3)
  with pytest.raises(UserError) as e:
    directory.check_configuration(other, allow=False)
  assert 'model.dropout_rate: 0.0 -> 0.1; seed: 0 -> 3' in str(e.value)
  assert 'or --allow_config_change' in str(e.value)
  directory.check_configuration(other, allow=True)
  directory.check_configuration(CONFIG, allow=False)
  directory.close()


@pytest.mark.parametrize('allow', [True, False])
def test_other_shapes_are_refused_and_no_flag_is_offered(tmp_path, allow):
  directory = workdir.open_workdir(tmp_path)
  record(directory)
  other = dataclasses.replace(
    CONFIG, batch_size=64, model=ModelConfig(d_model=128)
  )
  with pytest.raises(UserError) as e:
    directory.check_configuration(other, allow=allow)
  assert '(model.d_model: 64 -> 128; batch_size: 128 -> 64)' in str(e.value)
  assert '--allow_config_change' not in str(e.value)
  directory.close()


def test_a_folder_with_other_things_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('')
  with pytest.raises(UserError, match='holds no run .it has thesis.tex'):
    workdir.open_workdir(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


def test_what_an_early_kill_leaves_is_taken_up_again(tmp_path):
  for name in ('vocabulary.model', 'vocabulary.model.tmp', '.lock'):
    (tmp_path / name).write_text('')
  (tmp_path / 'checkpoints').mkdir()
  workdir.open_workdir(tmp_path).close()


def test_a_directory_that_was_never_used_is_removed(tmp_path):
  workdir.open_workdir(tmp_path / 'new').close()
  assert not (tmp_path / 'new').exists()
  (tmp_path / 'old').mkdir()
  workdir.open_workdir(tmp_path / 'old').close()
  assert (tmp_path / 'old').exists()


def test_a_finished_run_is_known_by_its_summary_and_checkpoint(tmp_path):
  directory = workdir.open_workdir(tmp_path)
  record(directory)
  assert directory.finished(5) is None
  (tmp_path / 'summary.json').write_text('{"step": 5}')
  assert directory.finished(5) is None
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  assert directory.finished(5) == {'step': 5}
  assert directory.finished(6) is None
  directory.close()


def test_another_vocabulary_is_refused_even_when_changes_are_allowed(tmp_path):
  directory = workdir.open_workdir(tmp_path)
  record(directory)
  with pytest.raises(UserError, match='vocabulary does not fit'):
    directory.check_data({'vocabulary': 'xyz', 'corpus': 'one'}, allow=True)
  with pytest.raises(UserError, match="corpus: 'one' -> 'two'"):
    directory.check_data({'vocabulary': 'abc', 'corpus': 'two'}, allow=False)
  directory.check_data({'vocabulary': 'abc', 'corpus': 'two'}, allow=True)
  directory.close()


def test_a_restart_keeps_the_record_of_the_first_start(tmp_path):
  directory = workdir.open_workdir(tmp_path)
  record(directory)
  record(directory)
  run = json.loads(directory.run_file.read_text())
  assert run['config']['model']['d_model'] == 64
  assert len(run['restarts']) == 1
  assert run['restarts'][0]['command'] == ['st_moe', 'pretrain']
  assert (tmp_path / 'config.gin').read_text() == '# all of it\n'
  directory.close()


def test_a_full_disk_is_the_users_to_fix(tmp_path, monkeypatch):
  directory = workdir.open_workdir(tmp_path)

  def full(path, value):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(workdir, 'write_json', full)
  with pytest.raises(
    UserError, match='written .No space left on device.; make'
  ):
    record(directory)
  directory.close()


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
  code = (
    'import sys, pathlib\n'
    'from st_moe.workdir import open_workdir\n'
    'd = open_workdir(pathlib.Path(sys.argv[1]))\n'
    'print("open", flush=True)\n'
    'sys.stdin.read()\n'
  )
  child = subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {'PYTHONPATH': os.getcwd()},
  )
  assert child.stdout.readline() == 'open\n'
  with pytest.raises(UserError, match=f'in use by process {child.pid}'):
    workdir.open_workdir(tmp_path)
  child.kill()
  child.communicate()
  workdir.open_workdir(tmp_path).close()


def test_a_file_is_no_work_directory(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='is a file'):
    workdir.open_workdir(tmp_path / 'file')


def test_a_torn_run_file_is_reported(tmp_path):
  (tmp_path / 'run.json').write_text('{"config": ')
  directory = workdir.open_workdir(tmp_path)
  with pytest.raises(UserError, match='run.json is not valid JSON'):
    directory.check_configuration(CONFIG, allow=False)
  directory.close()
