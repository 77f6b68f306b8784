"""Eight CPU devices for every test, and the folders some tests read."""

import os
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
  parser.addoption(
    '--reference-vectors',
    type=Path,
    default=ROOT / 'tests' / 'golden',
    help='folder of .npz files made by the reference implementation',
  )


@pytest.fixture(scope='session')
def shared_data() -> Path:
  """Real text and task files beside the checkout; skips where absent."""
  path = ROOT.parent / 'shared' / 'data'
  if not path.is_dir():
    pytest.skip('needs the data folder ../shared/data beside the checkout')
  return path
