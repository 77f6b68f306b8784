"""A conversion needs memory for its largest array, not for the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from st_moe.config import ModelConfig
from st_moe.convert import hf_export, hf_names
from st_moe.convert.safetensors_files import Entry, shards_of, write_shards

# The converter's own memory at most, not that of transformers in a process of
# its own. It is read in the process that `run` makes of this one.
MEASURE = (
  'import atexit, pathlib, re\n'
  'from st_moe.main import run\n'
  'status = pathlib.Path("/proc/self/status")\n'
  'peak = lambda: re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1]\n'
  'atexit.register(lambda: print(peak()))\n'
  'run()'
)
ROOT = Path(__file__).resolve().parent.parent
CONFIG = ModelConfig(
  vocab_size=8000,
  d_model=512,
  d_ff=2048,
  num_heads=8,
  num_encoder_layers=20,
  num_decoder_layers=20,
  num_experts=0,
)


def write_source(folder: Path) -> int:
  """Writes a dense model of zeros; returns the bytes of its tensors."""
  entries = []
  for leaf in hf_names.make_leaves(CONFIG):
    view = leaf.views[()]
    shape = leaf.shape[::-1] if view.transpose else leaf.shape
    dtype = np.dtype(np.float32)
    entries.append(
      Entry(view.name, shape, dtype, lambda shape=shape: np.zeros(shape))
    )
  folder.mkdir()
  write_shards(folder, shards_of(entries, 200 << 20))
  content = hf_export.config_json(CONFIG, model_type='t5', dtype='float32')
  (folder / 'config.json').write_text(json.dumps(content))
  return sum(entry.nbytes for entry in entries)


@pytest.mark.slow
def test_the_peak_is_far_below_the_size_of_the_model(tmp_path):
  size = write_source(tmp_path / 'source')
  assert size > 700e6
  result = subprocess.run(
    [sys.executable, '-c', MEASURE, 'convert', 'from-hf', tmp_path / 'source',
     tmp_path / 'out'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  peak = int(result.stdout.splitlines()[-1]) * 1024
  # Python and JAX alone are 0.25 GB; 0.41 was seen.
  assert peak < 0.45e9, f'{peak / 1e9:.2f} GB'
