"""Which tensors of a source make each parameter, and the proof that all do.

A conversion is a list of `Leaf`s, one for each parameter of ours: an array of
`View`s, each a tensor of the source or a part of one, perhaps transposed.
Scanned stacks and experts, which we keep in one array, are views side by side
along the leading axes. Read backwards, the same list says which part of which
parameter each tensor of the source is.

`check` compares a list with what the source has before anything is read:
every tensor is used once or passed over for a stated reason, every parameter
is filled, and shapes agree.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, Protocol

import numpy as np

from st_moe.config import ModelConfig
from st_moe.errors import UserError, did_you_mean
from st_moe.stacking import superblock_size

_SHOWN = 3  # names in a message

# An array of one layer of a written-out model; in the state of an optimizer
# something stands before.
LAYER = re.compile(
  r'(?P<before>.*/|)(?P<stack>encoder|decoder)/layers_(?P<layer>\d+)/'
  r'(?P<end>.*)'
)

Index = tuple[slice, ...]


class Source(Protocol):
  """Tensors by name, read when they are wanted.

  Attributes:
    where: path, for messages.
    tensors: an object with `shape` and `dtype` for each name.
  """

  where: str
  tensors: dict[str, Any]

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns a tensor, or the part of it that `index` (a slice for each
    axis) says, in its own dtype."""


@dataclasses.dataclass(frozen=True)
class View:
  """A tensor of the source, or a part of it, as a parameter wants it.

  Attributes:
    name: of the tensor.
    at: fixed positions of leading-to-last axes; None keeps an axis. (None, 2)
      of [d_model, layers, heads] is [d_model, heads] of layer 2.
    transpose: whether the two axes that remain change places.
    merge: whether the last two of three remaining axes are written as one
      ([d_model, heads, d_kv] to [d_model, heads * d_kv]), or with -1 the first
      two.
  """

  name: str
  at: tuple[int | None, ...] = ()
  transpose: bool = False
  merge: int = 0


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A parameter and what it is made of.

  Attributes:
    name: 'encoder/layers_0/mlp/wo/kernel'.
    shape: of the whole parameter.
    views: object array of Views, of the shape of the leading axes along which
      they stand side by side; () where one view is the parameter.
  """

  name: str
  shape: tuple[int, ...]
  views: np.ndarray

  @property
  def part_shape(self) -> tuple[int, ...]:
    """Of what one view gives."""
    return self.shape[self.views.ndim :]


def one(name: str, shape: Sequence[int], view: View) -> Leaf:
  """Returns a leaf that is one view."""
  views = np.empty((), object)
  views[()] = view
  return Leaf(name, tuple(shape), views)


def side_by_side(leaves: Sequence[Leaf], name: str) -> Leaf:
  """Returns leaves of one shape as one, along a new leading axis."""
  return Leaf(
    name,
    (len(leaves), *leaves[0].shape),
    np.stack([leaf.views for leaf in leaves]),
  )


def in_form(leaves: Sequence[Leaf], config: ModelConfig) -> list[Leaf]:
  """Returns leaves of a written-out model as its `scan_layers` wants them.

  Args:
    leaves: named as in a written-out model ('encoder/layers_0/...').
    config: of the model.
  """
  if not config.scan_layers:
    return list(leaves)
  scanned: dict[str, list[Leaf]] = {}
  for leaf in leaves:
    if in_layer := LAYER.fullmatch(leaf.name):
      stack = in_layer['stack']
      j = int(in_layer['layer']) % superblock_size(config, stack)
      before, end = in_layer['before'], in_layer['end']
      name = f'{before}{stack}/superblocks/layer_{j}/{end}'
      scanned.setdefault(name, []).append(leaf)
    else:
      scanned[leaf.name] = [leaf]
  return [
    side_by_side(parts, name) if '/superblocks/' in name else parts[0]
    for name, parts in scanned.items()
  ]


def kept_shape(view: View, shape: Sequence[int]) -> tuple[int, ...]:
  """Returns the shape that a view of a tensor of `shape` gives."""
  at = view.at + (None,) * (len(shape) - len(view.at))
  kept = [n for n, fixed in zip(shape, at, strict=True) if fixed is None]
  if view.merge and len(kept) == 3:
    a, b, c = kept
    kept = [a, b * c] if view.merge > 0 else [a * b, c]
  if view.transpose:
    kept[-2:] = kept[:-3:-1]
  return tuple(kept)


def read_view(source: Source, view: View, index: Index) -> np.ndarray:
  """Returns the part `index` of what a view gives."""
  shape = source.tensors[view.name].shape
  at = view.at + (None,) * (len(shape) - len(view.at))
  if view.merge:
    whole = tuple(
      slice(None) if fixed is None else slice(fixed, fixed + 1) for fixed in at
    )
    value = source.read(view.name, whole).reshape(
      kept_shape(dataclasses.replace(view, transpose=False), shape)
    )
    return (value.swapaxes(-1, -2) if view.transpose else value)[index]
  wanted = list(index)
  if view.transpose:
    wanted[-2:] = wanted[:-3:-1]
  slices = iter(wanted)
  box = tuple(
    next(slices) if fixed is None else slice(fixed, fixed + 1) for fixed in at
  )
  value = source.read(view.name, box)
  value = value.reshape(
    [n for n, fixed in zip(value.shape, at, strict=True) if fixed is None]
  )
  return value.swapaxes(-1, -2) if view.transpose else value


def read_leaf(
  source: Source, leaf: Leaf, index: Index | None = None
) -> np.ndarray:
  """Returns a parameter, or the part of it that `index` says, in float32.

  What is one tensor of float32 is not copied, so it may be a transposed view.
  """
  index = index or (slice(None),) * len(leaf.shape)
  lead = leaf.views.ndim
  if not lead:
    value = read_view(source, leaf.views[()], index)
    return value.astype(np.float32, copy=False)
  bounds = [
    range(*each.indices(n)) for each, n in zip(index, leaf.shape, strict=True)
  ]
  value = np.empty([len(each) for each in bounds], np.float32)
  for place in itertools.product(*(range(len(b)) for b in bounds[:lead])):
    at = tuple(b[i] for b, i in zip(bounds[:lead], place, strict=True))
    value[place] = read_view(source, leaf.views[at], index[lead:])
  return value


@dataclasses.dataclass(frozen=True)
class Coverage:
  """What became of the tensors of a source.

  Attributes:
    used: how many went into parameters.
    ignored: the reason for each that did not.
    filled: how many parameters were made.
  """

  used: int
  ignored: dict[str, str]
  filled: int

  def describe(self) -> str:
    """Returns 'N tensors used, N passed over (why), N parameters filled'."""
    reasons = collections.Counter(self.ignored.values())
    why = '; '.join(f'{n} {reason}' for reason, n in sorted(reasons.items()))
    return (
      f'{self.used} tensors used, {len(self.ignored)} passed over'
      f'{f" ({why})" if why else ""}, {self.filled} parameters filled'
    )


def check(
  leaves: Sequence[Leaf],
  shapes: dict[str, tuple[int, ...]],
  source: Source,
  ignored: Callable[[str], str | None],
) -> Coverage:
  """Proves that a list of leaves is a conversion; reads nothing.

  Args:
    leaves: of every parameter that is made.
    shapes: of every parameter that must be made.
    source: of the tensors.
    ignored: why a tensor is passed over, or None where it must be used.

  Raises:
    UserError: for tensors that are missing, left over, used twice or of
      another shape, and for parameters that nothing fills.
  """
  made = {leaf.name: leaf.shape for leaf in leaves}
  if made != shapes:  # our own tables, not the user's files
    raise ValueError(f'leaves and parameters differ: {set(made) ^ set(shapes)}')
  views = [view for leaf in leaves for view in leaf.views.flat]
  names = {view.name for view in views}
  _refuse_missing(source, names)
  for leaf in leaves:
    for view in leaf.views.flat:
      _check_shape(source, leaf, view)
  _check_once(source, views)
  reasons = {name: ignored(name) for name in source.tensors.keys() - names}
  surplus = sorted(name for name, reason in reasons.items() if not reason)
  _refuse_surplus(source, surplus)
  return Coverage(
    used=len(names),
    ignored=dict(sorted(reasons.items())),
    filled=len(leaves),
  )


def _refuse_missing(source: Source, wanted: Set[str]) -> None:
  missing = sorted(wanted - source.tensors.keys())
  if not missing:
    return
  unused = sorted(source.tensors.keys() - wanted)
  raise UserError(
    f'{source.where} lacks {_first(missing)}; correct the configuration beside '
    'it, or fetch the checkpoint again'
    f'{did_you_mean(missing[0], unused)}'
  )


def _refuse_surplus(source: Source, names: Sequence[str]) -> None:
  if not names:
    return
  raise UserError(
    f'{source.where} holds {_first(names)}, for which the model that it '
    'describes has no place; nothing was converted: the configuration does not '
    'belong to these tensors'
  )


def _first(names: Sequence[str]) -> str:
  more = len(names) - _SHOWN
  return ', '.join(names[:_SHOWN]) + (f' and {more} more' if more > 0 else '')


def _check_shape(source: Source, leaf: Leaf, view: View) -> None:
  shape = tuple(source.tensors[view.name].shape)
  given = kept_shape(view, shape)
  if given == leaf.part_shape:
    return
  want = list(leaf.part_shape)
  if view.transpose:
    want[-2:] = want[:-3:-1]
  raise UserError(
    f'{view.name} of {source.where} is {list(shape)} where the configuration '
    f'makes it {want}{" after a position is taken" if view.at else ""}; '
    + (
      'it seems to be transposed'
      if sorted(given) == sorted(leaf.part_shape)
      else 'one of them is not of this model'
    )
  )


def _check_once(source: Source, views: Sequence[View]) -> None:
  """Refuses tables that use a part twice or a part of a tensor only."""
  parts: dict[str, list[tuple[int | None, ...]]] = {}
  for view in views:
    parts.setdefault(view.name, []).append(view.at)
  for name, used in parts.items():
    if len(set(used)) != len(used):
      raise ValueError(f'{name} is used twice')
    shape = source.tensors[name].shape
    fixed = [
      n
      for n, position in zip(shape, used[0], strict=False)
      if position is not None
    ]
    if int(np.prod(fixed)) != len(used):
      raise UserError(
        f'{name} of {source.where} is {list(shape)}, of which the '
        f'configuration takes {len(used)} of {int(np.prod(fixed))} parts; one '
        'of them is not of this model'
      )


def reversed_leaves(
  leaves: Sequence[Leaf],
) -> Iterator[tuple[str, Leaf, tuple[int, ...], View]]:
  """Yields each source tensor's name, the leaf it is in, where, and its view.

  For exports, of tables without partial views.
  """
  for leaf in leaves:
    for at in np.ndindex(leaf.views.shape):
      view = leaf.views[at]
      yield view.name, leaf, at, view
