"""safetensors files: a `Source` that reads them, and a writer of shards.

Files are mapped into memory while they are read, and what was touched counts
as memory of the process until the mapping ends. So every block is read from a
mapping of its own, and the peak does not grow with the file.

The writer streams: the library's own takes all tensors of a file at once.
"""

import contextlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from st_moe.convert.mapping import Index
from st_moe.errors import UserError, did_you_mean

ONE_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
_PICKLES = ('pytorch_model.bin', 'pytorch_model.bin.index.json')
_BLOCK_BYTES = 32 << 20

DTYPES = {
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(jnp.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
  """What a file says of a tensor.

  Attributes:
    shape: of the tensor.
    dtype: float32, float16 or bfloat16.
    file: that holds it.
    stored_as: its name there.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  file: Path
  stored_as: str

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
  """The tensors of model.safetensors, or of the shards of an index.

  Attributes:
    where: the folder, for messages.
    tensors: `Tensor` for each name.
  """

  def __init__(self, folder: Path):
    """Reads the headers.

    Args:
      folder: as `save_pretrained` of transformers makes it.

    Raises:
      UserError: when there are no such files, or one is not whole.
    """
    self.where = str(folder)
    self.tensors: dict[str, Tensor] = {}
    index = folder / INDEX_FILE
    if (folder / ONE_FILE).is_file():
      self._add(folder / ONE_FILE)
    elif index.is_file():
      self._add_shards(folder, _weight_map(index))
    else:
      raise UserError(f'{folder} has no {ONE_FILE}{_instead(folder)}')

  def _add_shards(self, folder: Path, weight_map: dict[str, str]) -> None:
    for name in sorted(set(weight_map.values())):
      if not (folder / name).is_file():
        raise UserError(
          f'{folder / INDEX_FILE} names {name}, which is not there; fetch the '
          'checkpoint again'
        )
      self._add(folder / name)
    absent = [
      name
      for name, file in weight_map.items()
      if name not in self.tensors or self.tensors[name].file.name != file
    ]
    if absent:
      raise UserError(
        f'{folder / INDEX_FILE} says that {absent[0]} is in '
        f'{weight_map[absent[0]]}, which does not have it; fetch the '
        'checkpoint again'
      )

  def _add(self, file: Path) -> None:
    with _opened(file) as opened:
      for name in opened.keys():  # noqa: SIM118, it is no dict
        described = opened.get_slice(name)
        if name in self.tensors:
          raise UserError(
            f'{name} is in {self.tensors[name].file.name} and in {file.name} '
            f'of {self.where}; fetch the checkpoint again'
          )
        if described.get_dtype() not in DTYPES:
          raise UserError(
            f'{name} of {file} is {described.get_dtype()}; only '
            f'{", ".join(DTYPES)} are read: save the weights as one of them, '
            'as they were before they were quantized, if they were'
          )
        self.tensors[name] = Tensor(
          shape=tuple(described.get_shape()),
          dtype=DTYPES[described.get_dtype()],
          file=file,
          stored_as=name,
        )

  def name_also(self, name: str, other: str) -> None:
    """Gives the tensor `other` a second name."""
    self.tensors[name] = self.tensors[other]

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns a tensor, or the part that `index` says, in its own dtype.

    Raises:
      UserError: when it holds numbers that are not finite.
    """
    tensor = self.tensors[name]
    index = index or (slice(None),) * len(tensor.shape)
    bounds = [
      range(*each.indices(n))
      for each, n in zip(index, tensor.shape, strict=True)
    ]
    value = np.empty([len(each) for each in bounds], tensor.dtype)
    if not bounds:
      raise UserError(f'{name} of {self.where} is one number; it has no place')
    row_bytes = tensor.nbytes // max(tensor.shape[0], 1)
    rows = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    first = bounds[0].start
    for start in range(0, len(bounds[0]), rows):
      stop = min(start + rows, len(bounds[0]))
      block = (slice(first + start, first + stop), *index[1:])
      with _opened(tensor.file) as opened:
        value[start:stop] = opened.get_slice(tensor.stored_as)[block]
      if not np.isfinite(value[start:stop].astype(np.float32)).all():
        raise UserError(
          f'{name} of {tensor.file} holds infinities or NaN (float16 '
          'overflows so); fetch the checkpoint again, or one in another dtype'
        )
    return value


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
  """Maps a file until the end of a `with` block."""
  try:
    mapped = safe_open(file, framework='numpy')
  except (SafetensorError, OSError) as e:
    raise UserError(
      f'{file} is no whole safetensors file ({e}); fetch it again'
    ) from e
  with mapped:
    yield mapped


def _weight_map(index: Path) -> dict[str, str]:
  try:
    found = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    return {str(name): str(file) for name, file in found.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(
      f'{index} is no index of safetensors files ({type(e).__name__}: {e}); '
      'fetch it again'
    ) from e


def _instead(folder: Path) -> str:
  """Returns the end of a message about a folder without safetensors."""
  if any((folder / name).exists() for name in _PICKLES):
    return (
      ', only a pickle; make one where torch and transformers are: python -c '
      '"import transformers as t; '
      f"t.AutoModelForSeq2SeqLM.from_pretrained('{folder}')"
      f".save_pretrained('{folder}-safetensors')\""
    )
  others = [path.name for path in folder.glob('*.safetensors')]
  near = did_you_mean(ONE_FILE, others)
  return f' and no {INDEX_FILE}{near}; give the folder of a model'


@dataclass(frozen=True)
class Entry:
  """A tensor to write.

  Attributes:
    name: in the file.
    shape: of the tensor.
    dtype: one of DTYPES.
    make: returns its values, when its turn comes.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def shards_of(
  entries: Iterable[Entry], max_bytes: int
) -> dict[str, list[Entry]]:
  """Returns which tensors each file gets, in order.

  Args:
    entries: of all tensors.
    max_bytes: of a file's tensors; a larger tensor has a file of its own.
  """
  shards: list[list[Entry]] = []
  used = 0
  for entry in entries:
    if not shards or used + entry.nbytes > max_bytes:
      shards.append([])
      used = 0
    shards[-1].append(entry)
    used += entry.nbytes
  if len(shards) == 1:
    return {ONE_FILE: shards[0]}
  return {
    f'model-{i:05}-of-{len(shards):05}.safetensors': shard
    for i, shard in enumerate(shards, 1)
  }


def write_shards(folder: Path, shards: dict[str, list[Entry]]) -> None:
  """Writes files of tensors, one tensor at a time, and their index."""
  for name, entries in shards.items():
    _write_file(folder / name, entries)
  if len(shards) > 1:
    index = {
      'metadata': {
        'total_size': sum(e.nbytes for each in shards.values() for e in each)
      },
      'weight_map': {
        entry.name: file for file, each in shards.items() for entry in each
      },
    }
    text = json.dumps(index, indent=2, sort_keys=True) + '\n'
    (folder / INDEX_FILE).write_text(text)


def _write_file(path: Path, entries: Sequence[Entry]) -> None:
  """Writes one file: length of the header, header, tensors end to end.

  https://github.com/huggingface/safetensors#format
  """
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for entry in entries:
    start, end = end, end + entry.nbytes
    header[entry.name] = {
      'dtype': _CODES[entry.dtype],
      'shape': list(entry.shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of 8
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for entry in entries:
      value = entry.make()
      if value.shape != entry.shape:
        raise ValueError(f'{entry.name}: {value.shape} is not {entry.shape}')
      data = np.ascontiguousarray(value, dtype=entry.dtype)
      file.write(data.view(np.uint8).data)
