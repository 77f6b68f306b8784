"""Datasets that tfds prepared: finding their version, and reading all rows.

Nothing is downloaded or prepared here. TensorFlow is loaded when it is needed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from st_moe.config import DataConfig
from st_moe.data.tensorflow_loading import load_tensorflow
from st_moe.errors import UserError


def tfds_version(
  name: str, dataset: str, config: DataConfig, otherwise: str
) -> str:
  """Returns the newest prepared version of a tfds dataset, `3.0.1`.

  Args:
    name: of the task, for messages.
    dataset: 'c4/en'.
    config: has the folder, `tfds_data_dir`; None: tfds' own.
    otherwise: what to do without it, for messages.

  Raises:
    UserError: it is not in the tfds folder; nothing is downloaded.
  """
  root = config.tfds_data_dir
  # Known before TensorFlow is loaded, where it is a folder of this machine.
  local = root is not None and '://' not in root
  if not local or Path(root).is_dir():
    load_tensorflow()
    import tensorflow as tf
    import tensorflow_datasets as tfds

    root = root or str(tfds.core.constants.DATA_DIR)
    infos = tf.io.gfile.glob(
      f'{root.rstrip("/")}/{dataset}/*/dataset_info.json'
    )
    if infos:
      versions = (tfds.core.Version(info.split('/')[-2]) for info in infos)
      return str(max(versions))
  raise UserError(
    f'task {name!r}: no prepared tfds dataset in {root.rstrip("/")}/{dataset}; '
    f'set DataConfig.tfds_data_dir, or {otherwise}'
  )


def rows(
  name: str, dataset: str, version: str, split: str, config: DataConfig
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the rows of a prepared split as plain Python values, in file order.

  Args:
    name: of the task, for messages.
    dataset: 'super_glue/cb'.
    version: as prepared.
    split: as tfds names it.
    config: has the folder.

  Yields:
    where the row stands, for messages; the row. Texts are str, sequences
    lists, labels numbers.

  Raises:
    UserError: no such split.
  """
  load_tensorflow()
  import tensorflow_datasets as tfds

  builder = tfds.builder(f'{dataset}:{version}', data_dir=config.tfds_data_dir)
  if split not in builder.info.splits:
    raise UserError(
      f'task {name!r}: {dataset}:{version} has no split {split!r} (it has '
      f'{", ".join(builder.info.splits)})'
    )
  found = builder.as_dataset(
    split=split,
    read_config=tfds.ReadConfig(interleave_cycle_length=1),
    shuffle_files=False,
  )
  for number, row in enumerate(tfds.as_numpy(found)):
    yield f'{dataset}:{version}, {split}[{number}]', plain(row)


def plain(value: Any) -> Any:
  """Returns what tfds gives as Python values."""
  if isinstance(value, dict):
    return {name: plain(each) for name, each in value.items()}
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, np.ndarray):
    return [plain(each) for each in value]
  return value.item() if isinstance(value, np.generic) else value
