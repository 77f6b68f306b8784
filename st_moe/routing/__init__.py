"""Routing: which tokens go to which experts (paper sections 2 and 3).

capacity.py groups and slots; token_choice.py and expert_choice.py the ways to
route; router_losses.py the auxiliary losses; router.py puts them together.
"""

from st_moe.routing.capacity import expert_capacity, num_groups
from st_moe.routing.router import route
from st_moe.routing.types import Decisions, RouterStats, Routing

__all__ = [
  'Decisions',
  'RouterStats',
  'Routing',
  'expert_capacity',
  'num_groups',
  'route',
]
