"""Trees of arrays by name: 'encoder/layers_0/mlp/wo/kernel'.

Names are what a user sees and what a checkpoint stores; they do not depend on
whether a node is a dict, a tuple or a dataclass.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

_SHOWN = 3  # names of each kind in a message


def by_name(tree: Any) -> dict[str, Any]:
  """Returns the leaves by name, in the order of the tree."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
  """Returns named leaves as plain nested dicts."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *outer, last = name.split('/')
    node = tree
    for key in outer:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def like(tree: Any, leaves: dict[str, Any]) -> Any:
  """Returns named leaves in the structure of `tree`."""
  order = [leaves[name] for name in by_name(tree)]
  return jax.tree.structure(tree).unflatten(order)


def difference(have: Any, want: Any) -> str:
  """Returns in one line how two trees of shapes differ; '' if they do not.

  Args:
    have: tree whose leaves have a shape and a dtype.
    want: the same.
  """
  have, want = (
    {name: _describe(leaf) for name, leaf in by_name(tree).items()}
    for tree in (have, want)
  )
  kinds = {
    'missing': want.keys() - have.keys(),
    'surplus': have.keys() - want.keys(),
    'different': {
      f'{name} is {have[name]} but must be {want[name]}'
      for name in have.keys() & want.keys()
      if have[name] != want[name]
    },
  }
  return '; '.join(
    f'{kind}: {_shorten(names)}' for kind, names in kinds.items() if names
  )


def _describe(leaf: Any) -> str:
  return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def _shorten(names: Iterable[str]) -> str:
  # Parameters first: the optimizer's slots only follow them.
  names = sorted(names, key=lambda name: (not name.startswith('params'), name))
  more = len(names) - _SHOWN
  text = ', '.join(names[:_SHOWN])
  return text if more <= 0 else f'{text} and {more} more'
