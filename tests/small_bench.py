"""A tiny layer to be timed, shared by the tests of `st_moe bench`."""

import json
from pathlib import Path

from st_moe.bench import sizes
from st_moe.config import RouterConfig

LAYER = [
  '--tokens=64',
  '--d_model=16',
  '--d_ff=32',
  '--experts=4',
  '--group_size=32',
  '--rounds=2',
]


def small_size(**changes) -> sizes.LayerSize:
  settings = {
    'tokens': 64,
    'group_size': 32,
    'd_model': 16,
    'd_ff': 32,
    'num_experts': 4,
    'activations': ('gelu', 'linear'),
    'dtype': 'float32',
    'router': RouterConfig(group_size=32),
    'init_scale': 1.0,
  }
  return sizes.LayerSize(**(settings | changes))


def results(folder: str) -> dict:
  return json.loads(Path(folder, 'results.json').read_text())
