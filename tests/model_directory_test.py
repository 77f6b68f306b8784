"""Model directories: whole or not at all, and read back array by array."""

import numpy as np
import pytest

from st_moe.checkpoint import ArrayReader
from st_moe.config import ModelConfig
from st_moe.errors import UserError
from st_moe.gin_files import load_config
from st_moe.model_directory import ModelWriter

CONFIG = ModelConfig(d_model=24, num_experts=0)
BIG = np.arange(6 << 20, dtype=np.float32).reshape(2, -1)  # in two chunks
SMALL = {'x/a': np.arange(6.0).reshape(2, 3).T, 'x/b/c': np.ones(5)}


def write(path) -> None:
  with ModelWriter(path, step=7) as writer:
    writer.add('params', 'big', BIG)
    for name, value in SMALL.items():
      writer.add('params', name, value)
    writer.commit(CONFIG, record={'a': 1}, vocabulary=None, comment='mine')


def test_what_was_added_is_read_back(tmp_path):
  write(tmp_path / 'model')
  arrays = ArrayReader(tmp_path / 'model', None)
  assert arrays.step == 7
  for name, value in (SMALL | {'big': BIG}).items():
    np.testing.assert_array_equal(arrays.read(name), value)
  index = (slice(1, 2), slice(0, 2))
  np.testing.assert_array_equal(arrays.read('x/a', index), SMALL['x/a'][index])
  assert load_config([str(tmp_path / 'model' / 'model.gin')]).model == CONFIG


def test_an_error_leaves_nothing(tmp_path):
  with pytest.raises(RuntimeError), ModelWriter(tmp_path / 'model') as writer:
    writer.add('params', 'x', np.ones(3))
    raise RuntimeError
  assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept(tmp_path):
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(UserError, match='exists already'):
    ModelWriter(tmp_path)
  with pytest.raises(UserError, match='file is a file'):
    ModelWriter(tmp_path / 'file' / 'no' / 'model')
  assert [path.name for path in tmp_path.iterdir()] == ['file']
