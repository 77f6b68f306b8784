"""Eight CPU devices for every test, and the folders some tests read."""

import importlib.metadata
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
  # Tests compile much and compute little.
  ' --xla_backend_optimization_level=0'
)
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  # Halves the time to compile; XLA stops at names it no longer knows.
  os.environ['XLA_FLAGS'] += (
    ' --xla_cpu_use_fusion_emitters=false'
    ' --xla_cpu_parallel_codegen_split_count=1'
  )
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Compiled programs are kept between runs of the suite.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(ROOT / '.pytest_cache' / 'jax')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')

import pytest  # noqa: E402


def pytest_addoption(parser):
  parser.addoption(
    '--reference-vectors',
    type=Path,
    default=ROOT / 'tests' / 'golden',
    help='folder of .npz files made by the reference implementation',
  )


# Files run whole, each on one core: those that take longest begin first.
LONGEST_FIRST = (
  'multiprocess_test.py',
  'resume_test.py',
  'readme_test.py',
  'sharding_equivalence_test.py',
  'loss_invariance_test.py',
  'learns_test.py',
  'transformer_test.py',
  'moe_test.py',
  'pipeline_test.py',
  'tasks_test.py',
)


def pytest_collection_modifyitems(items):
  rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
  items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope='session')
def shared_data() -> Path:
  """Real text and task files beside the checkout; skips where absent."""
  path = ROOT.parent / 'shared' / 'data'
  if not path.is_dir():
    pytest.skip('needs the data folder ../shared/data beside the checkout')
  return path
