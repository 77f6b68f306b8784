"""What a step costs: FLOPs by part, and bytes of the state on a device.

FLOPs are counted on the traced step (its jaxpr): matrix products only, those of
rematerialization and of one-hot dispatch included, scan bodies times their
length. XLA's own count (`cost_analysis`) takes a loop's body once.
"""

import collections
import math
from collections.abc import Iterator
from typing import Any

import jax

from st_moe.bench.shares import part_of
from st_moe.config import RunConfig
from st_moe.train_state import AbstractState, parameter_counts
from st_moe.train_step import StepProgram

# Loops whose trips are not in the program, or depend on the data.
_UNCOUNTED = ('while', 'pallas_call')


def traced_flops(traced: Any) -> dict[str, float]:
  """Returns the FLOPs of a traced step over all devices, by part of the model.

  Parts are those of `bench step`. A `while` loop, whose trips are not in the
  program, counts once (see `uncounted_parts`); of the branches of a `cond` the
  costliest counts.
  """
  return dict(_count(traced.jaxpr.jaxpr, ''))


def uncounted_parts(traced: Any) -> list[str]:
  """Returns the parts of which `traced_flops` sees one trip of a loop only.

  That is the dropless dispatch: how many blocks of rows its experts multiply
  depends on the routing.
  """
  return sorted(_uncounted(traced.jaxpr.jaxpr, ''))


def _uncounted(jaxpr: Any, scope: str) -> set[str]:
  parts: set[str] = set()
  for eqn in jaxpr.eqns:
    name = f'{scope}/{eqn.source_info.name_stack}'
    look = _count if eqn.primitive.name in _UNCOUNTED else _uncounted
    for each in _inner_jaxprs(eqn.params):
      parts.update(look(each, name))
  return parts


def _count(jaxpr: Any, scope: str) -> collections.Counter:
  total: collections.Counter = collections.Counter()
  for eqn in jaxpr.eqns:
    name = f'{scope}/{eqn.source_info.name_stack}'
    if eqn.primitive.name == 'dot_general':
      total[part_of(f'{name}/')] += _product_flops(eqn)
      continue
    inner = [_count(each, name) for each in _inner_jaxprs(eqn.params)]
    if eqn.primitive.name == 'cond' and inner:
      inner = [max(inner, key=lambda counter: counter.total())]
    times = _executions(eqn)
    for counter in inner:
      for part, flops in counter.items():
        total[part] += times * flops
  return total


def _product_flops(eqn: Any) -> float:
  (contracted, _), _ = eqn.params['dimension_numbers']
  left = eqn.invars[0].aval.shape
  depth = math.prod(left[axis] for axis in contracted)
  return 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)


def _executions(eqn: Any) -> int:
  """Returns how often what is inside runs, over all devices."""
  if eqn.primitive.name == 'scan':
    return eqn.params['length']
  if eqn.primitive.name == 'shard_map':
    return eqn.params['mesh'].size
  return 1


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for each in value if isinstance(value, tuple | list) else (value,):
      jaxpr = getattr(each, 'jaxpr', each)
      if hasattr(jaxpr, 'eqns'):
        yield jaxpr


def state_bytes(program: StepProgram) -> dict[str, int]:
  """Returns the bytes on one device of what lives from step to step.

  'dense weights', 'expert weights' and 'optimizer state'; gradients, which
  live within a step, are as large as the weights in float32.
  """
  shapes, axes = program.shapes.shapes, program.shapes.axes
  sizes = jax.tree.map(_bytes_on_device, shapes, program.shardings)
  leaves, tree = jax.tree.flatten(sizes.params)
  parts = {'dense weights': 0, 'expert weights': 0}
  for size, names in zip(leaves, tree.flatten_up_to(axes), strict=True):
    parts['expert weights' if 'expert' in names else 'dense weights'] += size
  parts['optimizer state'] = sum(jax.tree.leaves(sizes.opt_state))
  return parts


def _bytes_on_device(leaf: Any, sharding: Any) -> int:
  return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def parameters(config: RunConfig, shapes: AbstractState) -> dict[str, int]:
  """Returns numbers of parameters: in all, in experts, and used by a token.

  A token uses all dense ones and `num_choices` of each layer's experts.
  """
  counts = parameter_counts(shapes)
  active = float(counts['dense'])
  leaves = jax.tree_util.tree_leaves_with_path(shapes.shapes.params)
  tree = jax.tree.structure(shapes.shapes.params)
  for (path, leaf), names in zip(
    leaves, tree.flatten_up_to(shapes.axes), strict=True
  ):
    if 'expert' in names:
      router = getattr(config.model, f'{path[0].key}_router')
      chosen = router.num_choices / config.model.num_experts
      active += math.prod(leaf.shape) * chosen
  return {
    'total': counts['total'],
    'expert': counts['expert'],
    'active_per_token': round(active),
  }
