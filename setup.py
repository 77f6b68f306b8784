"""Packaging of st_moe; `constraints.txt` pins what is installed.

The core trains from ready batches and from a cache without TensorFlow; the
`data` extra adds seqio and TensorFlow for everything that reads raw text.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# The gin files live at the top of the repository and travel inside the
# package, so that an installed st_moe finds them too.
GIN_PACKAGES = [
  '.'.join(('st_moe', *path.relative_to(ROOT).parts))
  for path in (ROOT / 'gin_configs', *sorted((ROOT / 'gin_configs').rglob('*')))
  if path.is_dir()
]

DATA = [
  'importlib_resources',  # seqio imports it and does not declare it
  'seqio',
  'tensorboard',
  'tensorflow',
  'tensorflow-datasets',
  'tensorflow-text',
]

setup(
  name='st_moe',
  version='0.1.0',
  description='ST-MoE: stable and transferable sparse encoder-decoders in JAX',
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8')
  if (ROOT / 'README.md').exists()
  else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11,<3.14',
  packages=find_packages(include=['st_moe', 'st_moe.*']) + GIN_PACKAGES,
  package_dir={'st_moe.gin_configs': 'gin_configs'},
  package_data={name: ['*.gin', '*.toml'] for name in GIN_PACKAGES}
  | {'st_moe.trace': ['page.html']},
  entry_points={'console_scripts': ['st_moe = st_moe.main:run']},
  install_requires=[
    'absl-py',
    'array-record',
    'flax>=0.12',
    'gin-config>=0.5',
    'grain',
    'jax>=0.10',
    'matplotlib',
    'ml-dtypes',
    'msgpack',
    'numpy',
    'optax',
    'orbax-checkpoint>=0.12',
    'rich',
    'rouge-score',
    'safetensors',
    'scikit-learn',
    'scipy',
    'sentencepiece',
    'tensorboardX',
    'tensorstore',
  ],
  extras_require={
    'data': DATA,
    'tpu': ['jax[tpu]>=0.10'],
    'cuda': ['jax[cuda13]>=0.10'],
    # What `st_moe convert from-hf` compares with. Older versions drop no token
    # of a Switch Transformer, or others (st_moe/convert/hf_reference.py).
    'hf': ['torch', 'transformers>=5.18'],
    # What `st_moe bench peers` compares with; torch's CPU build is enough.
    'peers': ['st-moe-pytorch', 'torch', 'transformers>=5.18'],
    'test': ['pytest', 'pytest-xdist', 'pyyaml', 'ruff'],
  },
)
