"""A tiny layer and a tiny run to be timed, for the tests of `st_moe bench`."""

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

STEP = [
  '--gin_file=gin_configs/runs/quickstart.gin',
  '--gin.BATCH_SIZE=8',
  '--gin.ModelConfig.d_model=16',
  '--gin.ModelConfig.d_ff=32',
  '--gin.ModelConfig.d_kv=8',
  '--gin.ModelConfig.num_heads=2',
  '--gin.ModelConfig.num_experts=4',
  '--gin.ModelConfig.num_encoder_layers=1',
  '--gin.ModelConfig.num_decoder_layers=1',
  '--gin.ModelConfig.sparse_every=1',
  '--gin.ModelConfig.vocab_size=128',
  '--gin.DataConfig.inputs_length=16',
  '--gin.DataConfig.targets_length=8',
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
