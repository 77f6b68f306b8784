"""How many groups, and how many slots per expert (paper section 2.2).

Tokens are cut into groups; routing, capacity and balance live inside a group.
"""

import math

from st_moe.config import RouterConfig
from st_moe.errors import UserError

ROUNDING = {'floor': math.floor, 'round': round, 'ceil': math.ceil}


def num_groups(num_tokens: int, group_size: int, shards: int) -> int:
  """Returns into how many groups `num_tokens` are cut (moe.py:335-376).

  Starts from num_tokens // group_size (at least 1) and grows until every shard
  holds the same number of whole groups of equal size.

  Args:
    num_tokens: tokens of the microbatch, over all shards, padding included.
    group_size: tokens per group, before that growth.
    shards: parts into which the batch is split (`partitioning.batch_shards`).

  Raises:
    UserError: when the tokens do not divide over the shards.
  """
  if num_tokens % shards:
    raise UserError(
      f'{num_tokens} tokens do not divide over {shards} devices of the batch '
      'axes; change the batch size or the mesh'
    )
  groups = max(1, num_tokens // group_size)
  groups = math.ceil(groups / shards) * shards
  while num_tokens % groups:
    groups += shards
  return groups


def expert_capacity(
  config: RouterConfig, group_tokens: int, num_experts: int, *, train: bool
) -> int:
  """Returns C, the slots per expert and group.

  'tokens' is Mesh TensorFlow's rule, S x CF / E without a factor K
  (moe.py:381-392): at most S, then at least `min_expert_capacity`, rounded
  down. T5X rounds to nearest. 'assignments' has the factor K (V-MoE). 'fixed'
  takes `fixed_capacity` as it is, neither rounded nor raised to the minimum.

  Args:
    config: the router's settings.
    group_tokens: S.
    num_experts: E.
    train: which capacity factor.

  Raises:
    UserError: when an expert would have no slot at all.
  """
  if config.capacity_formula == 'fixed':
    return min(group_tokens, config.fixed_capacity)
  factor = config.train_capacity_factor
  if not train:
    factor = config.eval_capacity_factor
  share = group_tokens * factor / num_experts
  if config.capacity_formula == 'assignments':
    share = group_tokens * config.num_choices * factor / num_experts
  capacity = min(group_tokens, ROUNDING[config.capacity_rounding](share))
  capacity = max(capacity, config.min_expert_capacity)
  if not capacity:
    raise UserError(
      f'RouterConfig: {group_tokens} tokens per group at capacity factor '
      f'{factor} leave each of {num_experts} experts {share:.2f} slots, '
      'rounded to none; raise min_expert_capacity, the factor or group_size'
    )
  return capacity
