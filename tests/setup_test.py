"""Packaging: what is installed, pinned, and runnable."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import st_moe

ROOT = Path(__file__).resolve().parent.parent


def canonical(name: str) -> str:
  return re.sub(r'[-_.]+', '-', name).lower()


@pytest.fixture(scope='module')
def setup_arguments():
  """The arguments of setup(), without building anything."""
  pytest.importorskip('setuptools')
  captured = {}
  code = compile((ROOT / 'setup.py').read_text(), 'setup.py', 'exec')
  old = Path.cwd()
  os.chdir(ROOT)
  import setuptools

  original = setuptools.setup
  setuptools.setup = captured.update
  try:
    exec(code, {'__file__': str(ROOT / 'setup.py')})
  finally:
    setuptools.setup = original
    os.chdir(old)
  return captured


@pytest.fixture(scope='module')
def pins() -> dict[str, list[str]]:
  """{package: its pinned versions with markers} of constraints.txt."""
  found: dict[str, list[str]] = {}
  for line in (ROOT / 'constraints.txt').read_text().splitlines():
    if line and not line.startswith('#'):
      name, _, rest = line.partition('==')
      assert rest, f'not pinned: {line}'
      found.setdefault(canonical(name), []).append(rest)
  return found


def requirements(lists) -> set[str]:
  return {
    canonical(re.match(r'[\w.-]+', requirement).group())
    for requirement in lists
  }


def test_every_requirement_is_pinned(setup_arguments, pins):
  extras = setup_arguments['extras_require']
  wanted = requirements(setup_arguments['install_requires'])
  for extra in extras.values():
    wanted |= requirements(extra)
  assert wanted - {'torch'} <= set(pins)


def test_jax_is_pinned_for_python_3_11_and_for_newer_ones(pins):
  old, new = pins['jax']
  assert old.startswith('0.10.') and "python_full_version < '3.12'" in old
  assert "python_full_version >= '3.12'" in new
  version = re.match(r'(\d+)\.(\d+)', new)
  assert tuple(map(int, version.groups())) > (0, 10)


def test_the_version_is_said_once_and_again_alike(setup_arguments):
  assert setup_arguments['version'] == st_moe.__version__


def test_constraints_name_no_host():
  text = (ROOT / 'constraints.txt').read_text()
  assert '://' not in text and '--index' not in text and '--find' not in text


def test_the_core_needs_no_tensorflow(setup_arguments):
  core = requirements(setup_arguments['install_requires'])
  assert not {name for name in core if 'tensorflow' in name or name == 'seqio'}
  assert 'seqio' in setup_arguments['extras_require']['data']
  assert set(setup_arguments['extras_require']) == {
    'data',
    'tpu',
    'cuda',
    'hf',
    'peers',
    'test',
  }


def test_an_installed_package_holds_every_module_and_gin_file(tmp_path):
  pytest.importorskip('setuptools')
  subprocess.run(
    [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', tmp_path],
    cwd=ROOT,
    check=True,
    capture_output=True,
  )
  built = tmp_path / 'st_moe'
  for source, folder, pattern in (
    (ROOT / 'gin_configs', built / 'gin_configs', '*.gin'),
    (ROOT / 'gin_configs', built / 'gin_configs', '*.toml'),
    (ROOT / 'st_moe', built, '*.py'),
  ):
    wanted = {path.relative_to(source) for path in source.rglob(pattern)}
    assert wanted
    missing = {path for path in wanted if not (folder / path).is_file()}
    assert missing == set()
  # From there, and from another directory, the gin files are found.
  result = subprocess.run(
    [sys.executable, '-m', 'st_moe', 'config', 'list'],
    cwd='/',
    env=os.environ | {'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert 'gin_configs/runs/quickstart.gin' in result.stdout


@pytest.mark.parametrize(
  'script',
  ['scripts/quickstart', 'scripts/test', 'scripts/environment.sh', '.ci/run'],
)
def test_scripts_are_valid_shell(script):
  path = ROOT / script
  assert subprocess.run(['bash', '-n', path]).returncode == 0
  if path.suffix != '.sh':
    assert os.access(path, os.X_OK)


def test_without_a_supported_python_the_script_says_so_in_one_line(tmp_path):
  scripts = tmp_path / 'scripts'
  scripts.mkdir()
  for name in ('quickstart', 'environment.sh'):
    (scripts / name).write_text((ROOT / 'scripts' / name).read_text())
  old = tmp_path / 'old_python'
  old.write_text('#!/bin/sh\nexit 1\n')
  old.chmod(0o755)
  result = subprocess.run(
    ['bash', scripts / 'quickstart'],
    env=os.environ | {'PYTHON': str(old)},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  assert result.stderr == (
    f'error: PYTHON={old} is not Python 3.11, 3.12 or 3.13\n'
  )
  assert not (tmp_path / '.venv').exists()
