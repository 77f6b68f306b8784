"""Which mesh and remat policy: a few candidates, compiled and compared."""

import dataclasses
from collections.abc import Callable, Iterator

from st_moe.config import RunConfig
from st_moe.errors import UserError
from st_moe.plan.planning import Plan, make_plan
from st_moe.plan.targets import Target

POLICIES = ('none', 'dots_saveable', 'full')  # least computed again first


def search(
  config: RunConfig,
  target: Target,
  compiles: int,
  report: Callable[[Plan], None],
) -> list[Plan]:
  """Plans the run's mesh with each remat policy, then other meshes.

  Other meshes are tried with the first policy that fitted, else with 'full'.

  Args:
    config: the run.
    target: where.
    compiles: how many candidates at most.
    report: is given every plan once it is made.

  Returns:
    Plans that fit, best first (the least time of a step), then the others.
  """
  plans: list[Plan] = []

  def attempt(candidate: RunConfig) -> None:
    if len(plans) < compiles:
      plans.append(make_plan(candidate, target, compiles=True))
      report(plans[-1])

  for policy in POLICIES:
    attempt(_with(config, remat_policy=policy))
  fitting = [p.config.model.remat_policy for p in plans if p.fits is not False]
  policy = fitting[0] if fitting else 'full'
  for mesh in _meshes(config, plans[0]):
    if len(plans) == compiles:
      break
    try:
      attempt(_with(config, mesh, remat_policy=policy))
    except UserError:  # does not divide
      continue
  return sorted(plans, key=lambda p: (p.fits is False, p.bound or 0.0))


def _with(
  config: RunConfig, mesh: dict[str, int] | None = None, **model: str
) -> RunConfig:
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, **model),
    mesh=dataclasses.replace(config.mesh, **(mesh or {})),
  )


def _meshes(config: RunConfig, first: Plan) -> Iterator[dict[str, int]]:
  """Yields other meshes over the same devices, the likely ones first."""
  slices = first.mesh['slice']
  inner = first.target.devices // slices
  experts = config.model.num_experts or 1
  known = {(first.mesh['expert'], first.mesh['model'])}
  for model in (1, 2, 4, 8, 16):
    for expert in sorted(
      (n for n in range(1, experts + 1) if experts % n == 0), reverse=True
    ):
      if (expert, model) in known or inner % (expert * model):
        continue
      yield {
        'slice': slices,
        'data': inner // (expert * model),
        'expert': expert,
        'model': model,
      }
