"""What `st_moe plan` suggests for a run that does not fit."""

import dataclasses

from plan_test import configure, plan_of

from st_moe.plan import planning
from st_moe.plan.targets import parse_target


def plan_with_memory(size):
  chip = dataclasses.replace(parse_target('cpu:8').chip, hbm_bytes=size)
  target = dataclasses.replace(parse_target('cpu:8'), chip=chip)
  return planning.make_plan(configure(), target, compiles=False)


def test_suggestions_begin_with_what_the_run_lacks():
  least = plan_of(configure()).least
  plan = dataclasses.replace(plan_with_memory(2 * least), peak=3 * least)
  assert plan.fits is False
  found = planning.suggestions(plan)
  assert found[0].startswith('store weights in parts')
  assert found[1] == 'fewer experts per device: --mesh=data=-1,expert=8'
  assert found[2] == "keep less: --gin.ModelConfig.remat_policy='full'"
  assert found[3].endswith('--gin.RunConfig.microbatches=2')
  assert found[-1] == 'more devices than 8'


def test_several_slices_may_hold_parts_of_an_expert():
  flags = ['MeshConfig.slice=2', 'MeshConfig.fsdp_experts=True']
  alone, across = (
    plan_of(configure(*flags, *more))
    for more in ([], ['MeshConfig.fsdp_slices=True'])
  )
  assert across.resident < alone.resident
  tight = dataclasses.replace(
    alone, available=2 * alone.least, peak=3 * alone.least
  )
  found = planning.suggestions(tight)
  assert found[0].endswith('--gin.MeshConfig.fsdp_slices=True')
  tight = dataclasses.replace(tight, config=across.config)
  assert found[1:] == planning.suggestions(tight)


def test_where_weights_alone_are_too_much_nothing_else_is_suggested():
  least = plan_of(configure()).least
  plan = plan_with_memory(least // 3)
  assert plan.fits is False
  found = planning.suggestions(plan)
  assert not any('remat' in each or 'microbatches' in each for each in found)
  assert found[0].startswith('store weights in parts')  # which is enough
  assert not any('more devices' in each for each in found)
  # Stored in parts they are too much, too: no mesh helps.
  plan = plan_with_memory(plan.least_in_parts - 1)
  assert planning.suggestions(plan) == [
    'more devices: weights, optimizer state and gradients need at least 2 '
    'times 8, if all of them are stored in parts'
  ]
  assert plan.as_json()['suggestions'] == planning.suggestions(plan)
  assert plan_with_memory(least).fits is None  # only compiling tells
