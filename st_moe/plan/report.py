"""A plan in the terminal and as JSON."""

import argparse
from pathlib import Path

from rich.console import Console

from st_moe import partitioning
from st_moe.config import RunConfig, to_dict
from st_moe.errors import UserError
from st_moe.plan.planning import Plan, make_plan, suggestions
from st_moe.plan.search import search
from st_moe.plan.targets import Target
from st_moe.tables import print_table
from st_moe.workdir import versions, write_json

_LARGEST = 8  # collectives shown


def plan(args: argparse.Namespace, config: RunConfig, target: Target) -> None:
  """Makes the plan or the search; prints it; writes JSON.

  Raises:
    UserError: also when nothing fits, after the numbers.
  """
  console = Console(highlight=False, soft_wrap=True, markup=False)
  if args.search is not None:
    plans = _search(console, config, target, args.search)
  else:
    doing = 'tracing' if args.no_compile else 'tracing and compiling'
    console.print(f'{doing} the step for {_named(target)}')
    plans = [make_plan(config, target, compiles=not args.no_compile)]
    _print(console, plans[0])
  if args.json is not None:
    _write(Path(args.json), args, plans)
    console.print(f'JSON: {args.json}')
  if plans[0].fits is False:
    raise UserError(_does_not_fit(plans[0]))


def _write(path: Path, args: argparse.Namespace, plans: list[Plan]) -> None:
  first, *others = plans
  content = {
    'command': ['st_moe', *args.argv],
    'versions': versions(),
    'config': to_dict(first.config),
    **first.as_json(),
  }
  if args.search is not None:
    content['others'] = [
      {'config': to_dict(each.config), **each.as_json()} for each in others
    ]
  try:
    write_json(path, content)
  except OSError as error:
    raise UserError(f'--json={path}: {error.strerror}') from error


def _named(target: Target) -> str:
  slices = f'{target.slices} x ' if target.slices > 1 else ''
  return f'{slices}{target.name} ({target.devices:,} devices)'


def gib(size: float | None) -> str:
  """Returns '11.92', or '-'."""
  return '-' if size is None else f'{size / 2**30:.2f}'


def _seconds(value: float | None) -> str:
  return '-' if value is None else f'{value:.3g} s'


def _print(console: Console, plan: Plan) -> None:
  counts, chip = plan.parameters, plan.target.chip
  axes = partitioning.describe(plan.mesh)
  console.print(
    f'parameters: {counts["total"]:,} in all, {counts["expert"]:,} in experts, '
    f'{counts["active_per_token"]:,} for a token'
  )
  console.print(f'mesh: {axes}; {plan.tokens:,} tokens a step')
  console.print('')
  _print_flops(console, plan)
  _print_memory(console, plan)
  _print_collectives(console, plan)
  if chip.peak is None:
    console.print(f'no peak is known for {chip.name}: no times')
  else:
    console.print(
      f'least time of a step at {chip.peak:.4g} FLOP/s a device: '
      f'{_seconds(plan.seconds(plan.model_flops))} for model FLOPs, '
      f'{_seconds(plan.seconds(plan.program_flops))} for those of the program; '
      f'MFU at most {plan.utilization:.0%}'
    )
  for finding in plan.findings:
    console.print(f'look at {finding.rule}: {finding.text}')
  if plan.fits is None:
    unknown = (
      'the memory of the devices is not known'
      if plan.available is None
      else 'activations are not in this: only compiling tells'
    )
    console.print(f'fits: unknown; {unknown}')
  elif plan.fits:
    console.print(
      f'fits: {gib(plan.peak)} of {gib(plan.available)} GiB on a device'
    )
  else:
    console.print('does not fit; what helps, best first:')
    for suggestion in suggestions(plan):
      console.print(f'  {suggestion}')


def _print_flops(console: Console, plan: Plan) -> None:
  model, program = plan.model_flops, plan.program_flops
  total = sum(program.values())
  rows = [
    (
      part,
      f'{model[name]:.3g}' if (name := part.split(',')[0]) in model else '-',
      f'{flops:.3g}',
      f'{flops / total:.1%}',
    )
    for part, flops in sorted(program.items(), key=lambda item: -item[1])
  ]
  rows.append(('sum', f'{sum(model.values()):.4g}', f'{total:.4g}', ''))
  print_table(
    console,
    'FLOPs of a step, all devices',
    ('part', 'model', 'program', 'share'),
    rows,
  )


def _print_memory(console: Console, plan: Plan) -> None:
  weights = plan.state['dense weights'] + plan.state['expert weights']
  rows = [(part, gib(size)) for part, size in plan.state.items()]
  rows.append(('gradients, float32, within a step', gib(weights)))
  if plan.peak is not None:
    rows.append(("the compiler's scratch memory", gib(plan.scratch)))
    rows.append(("the compiler's peak", gib(plan.peak)))
  if plan.needs:
    rows.append(('the compiler needs', gib(plan.needs)))
  if plan.available is not None:
    rows.append(('a program can have', gib(plan.available)))
  print_table(console, 'memory of a device', ('', 'GiB'), rows)


def _print_collectives(console: Console, plan: Plan) -> None:
  if plan.traffic is None:
    return
  counts = plan.traffic.counts_by_kind()
  print_table(
    console,
    'collectives of a step, results on one device',
    ('kind', 'times', 'GiB'),
    [
      (kind, str(counts[kind]), gib(size))
      for kind, size in plan.traffic.bytes_by_kind().items()
    ]
    or [('none', '0', '0')],
  )
  largest = plan.traffic.collectives[:_LARGEST]
  if largest:
    print_table(
      console,
      'the largest',
      ('kind', 'shape', 'times', 'GiB', 'over'),
      [
        (
          c.kind,
          c.shape,
          str(c.count),
          gib(c.total_bytes),
          ','.join(c.axes) or f'{c.group_size} devices',
        )
        for c in largest
      ],
    )
  links = plan.links or {}
  console.print(
    'least time on links, were nothing else done: '
    f'{_seconds(links.get("interconnect"))} within a slice or node, '
    f'{_seconds(links.get("network"))} between'
  )


def _search(
  console: Console, config: RunConfig, target: Target, compiles: int
) -> list[Plan]:
  console.print(f'compiling up to {compiles} candidates for {_named(target)}')

  def report(plan: Plan) -> None:
    console.print(
      f'  {", ".join(_row(plan))}; compiled in {plan.compile_seconds:.0f} s'
    )

  plans = search(config, target, compiles, report)
  console.print('')
  print_table(
    console,
    'candidates, best first',
    ('mesh', 'remat', 'GiB', 'fits', 'MFU at most', 'step at least', 'links'),
    [_row(plan) for plan in plans],
  )
  return plans


def _row(plan: Plan) -> tuple[str, ...]:
  links = [time for time in (plan.links or {}).values() if time is not None]
  return (
    partitioning.describe(plan.mesh),
    plan.config.model.remat_policy,
    gib(plan.needs if plan.peak is None else plan.peak),
    {True: 'yes', False: 'no', None: '?'}[plan.fits],
    f'{plan.utilization:.0%}',
    _seconds(plan.bound),
    _seconds(max(links, default=None)),
  )


def _does_not_fit(plan: Plan) -> str:
  least = plan.needs if plan.peak is None else plan.peak
  needs = f'{gib(least)} GiB' if least else f'over {gib(plan.resident)} GiB'
  return (
    f'does not fit {_named(plan.target)}: a device needs {needs} and has '
    f'{gib(plan.available)} GiB; {suggestions(plan)[0]}'
  )
