"""Which parameters are trained: subsets of Figure 5, or names (section 4.4).

A frozen parameter is None in a selected tree, which JAX takes for an empty
one: it has no gradient, no optimizer state and no update.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax

from st_moe import trees
from st_moe.errors import UserError, did_you_mean

# By name, as `trees.by_name` spells them. The router is a part of the MoE
# layer, and so are its biases; the extra dense FFN beside it is an FFN.
# Position biases are T5's attention's. Norms and embeddings are in none but
# 'all' and 'non_moe'.
SUBSETS = {
  'all': r'',
  'non_moe': r'^(?!.*/moe/)',
  'moe': r'/moe/',
  'attention': r'/(attention|self_attention|encoder_decoder_attention)/'
  r'|(^|/)relpos_bias/',
  'ffn': r'/(mlp|extra_mlp)/',
}


def _is_axes(node: Any) -> bool:
  return isinstance(node, tuple)


def _matches(pattern: str, names: Sequence[str]) -> set[str]:
  """Returns the names in which a subset's or a user's pattern is found."""
  where = f'OptimizerConfig.trainable: {pattern!r}'
  try:
    expression = re.compile(SUBSETS.get(pattern, pattern))
  except re.error as e:
    raise UserError(f'{where} is no regular expression ({e})') from e
  found = {name for name in names if expression.search(name)}
  if found:
    return found
  if pattern in SUBSETS:
    raise UserError(f'{where} has no parameter in this model')
  known = {part for name in names for part in name.split('/')}
  near = did_you_mean(pattern, [*SUBSETS, *known])
  raise UserError(
    f'{where} matches no parameter{near}; it is one of '
    f'{", ".join(SUBSETS)}, or patterns found in names such as {names[0]}'
  )


def trainable_mask(axes: Any, trainable: Sequence[str] | str) -> Any:
  """Returns a tree of bools like the parameters: which of them are trained.

  Args:
    axes: tree of tuples of logical axis names, one per parameter.
    trainable: names of `SUBSETS` or regular expressions, searched in names
      such as 'encoder/layers_0/mlp/wo/kernel'; any of them is enough.

  Raises:
    UserError: a broken pattern, or one that matches nothing.
  """
  patterns = [trainable] if isinstance(trainable, str) else list(trainable)
  if not patterns:
    raise UserError('OptimizerConfig.trainable names no parameter')
  flags = jax.tree.map(lambda _: True, axes, is_leaf=_is_axes)
  names = list(trees.by_name(flags))
  chosen = set().union(*(_matches(pattern, names) for pattern in patterns))
  return trees.like(flags, {name: name in chosen for name in names})


def select(tree: Any, mask: Any) -> Any:
  """Returns a tree like the parameters with None for what is frozen."""
  if mask is None:
    return tree
  return jax.tree.map(lambda use, leaf: leaf if use else None, mask, tree)


def merge(trained: Any, params: Any, mask: Any) -> Any:
  """Returns `params` with the trained ones replaced.

  Args:
    trained: selected parameters.
    params: all parameters.
    mask: from `trainable_mask`; None: all are trained.
  """
  if mask is None:
    return trained
  leaves = iter(jax.tree.leaves(trained))
  return jax.tree.map(
    lambda use, old: next(leaves) if use else old, mask, params
  )
