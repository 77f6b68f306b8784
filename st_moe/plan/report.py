"""A plan in the terminal and as JSON."""

import argparse
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
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

_LARGEST = 8  # kinds of collectives shown
_FLOP_UNITS = (('PFLOP', 1e15), ('TFLOP', 1e12), ('GFLOP', 1e9))
_COMPILERS = {'tpu': 'libtpu', 'cuda': 'jax-cuda13-plugin', 'cpu': 'jaxlib'}
_SEARCH_COLUMNS = (
  'mesh',
  'remat',
  'GiB',
  'fits',
  'model FLOPs',  # of all
  'step at least',
  'MFU at most',
)


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
    with _still(console, doing):
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


@contextlib.contextmanager
def _still(console: Console, doing: str) -> Iterator[None]:
  """Says every minute that something goes on."""
  done, begin = threading.Event(), time.monotonic()

  def speak() -> None:
    while not done.wait(60):
      minutes = (time.monotonic() - begin) / 60
      console.print(f'  still {doing}, {minutes:.0f} min')

  threading.Thread(target=speak, daemon=True).start()
  try:
    yield
  finally:
    done.set()


def gib(size: float | None) -> str:
  """Returns '11.92', or '-'."""
  return '-' if size is None else f'{size / 2**30:.2f}'


def _unit(sizes: Iterable[int]) -> tuple[str, Callable[[int], str]]:
  """Returns 'GiB' or 'MiB', by the largest size, and how to write sizes."""
  if max(sizes, default=0) < 2**30:
    return 'MiB', lambda size: f'{size / 2**20:.2f}'
  return 'GiB', gib


def _seconds(value: float | None) -> str:
  return '-' if value is None else f'{value:.3g} s'


def _print(console: Console, plan: Plan) -> None:
  _print_run(console, plan)
  _print_flops(console, plan)
  _print_memory(console, plan)
  _print_collectives(console, plan)
  _print_times(console, plan)
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


def _print_run(console: Console, plan: Plan) -> None:
  """Prints what was planned, and with which compiler."""
  counts, config = plan.parameters, plan.config
  model, lengths = config.model, config.data.lengths
  console.print(
    f'parameters: {counts["total"]:,} in all, {counts["expert"]:,} in experts, '
    f'{counts["active_per_token"]:,} used for a token'
  )
  parts = ''
  if config.microbatches > 1:
    parts = f' in {config.microbatches} microbatches'
  console.print(
    f'batch: {config.batch_size:,} rows of {lengths["encoder"]} + '
    f'{lengths["decoder"]} tokens{parts}, {plan.tokens:,} tokens a step; '
    f'{model.activation_dtype}, remat {model.remat_policy}, '
    f'{config.optimizer.name}'
  )
  stored = [
    name
    for name, chosen in (
      ('dense', config.mesh.fsdp_dense),
      ('expert', config.mesh.fsdp_experts),
    )
    if chosen
  ]
  fsdp = f'; FSDP of {" and ".join(stored)} weights' if stored else ''
  if config.mesh.fsdp_slices and plan.mesh['slice'] > 1:
    fsdp += ', of experts between slices too'
  console.print(f'mesh: {partitioning.describe(plan.mesh)}{fsdp}')
  tools = [
    f'{name} {version}'
    for name, version in versions().items()
    if name in ('jax', _COMPILERS.get(plan.target.platform))
  ]
  console.print(f'compiler: {", ".join(tools)}\n')


def _print_times(console: Console, plan: Plan) -> None:
  """Prints the least time of a step, what sets it, and what follows."""
  chip, steps = plan.target.chip, plan.config.steps
  if chip.peak is None:
    console.print(f'no peak is known for {chip.name}: no times')
    return
  model = plan.seconds(plan.model_flops)
  console.print(
    f'least times of a step, each alone: {_seconds(model)} for model FLOPs at '
    f'{chip.peak / 1e12:,.0f} TFLOP/s a device'
    + ''.join(
      f', {_seconds(time)} for {"all FLOPs" if name == "arithmetic" else name}'
      for name, time in plan.times.items()
      if time
    )
  )
  slowest = max(plan.times, key=plan.times.get)
  console.print(
    f'so a step takes {_seconds(plan.bound)} at least ({slowest}): MFU at '
    f'most {plan.utilization:.0%}, {plan.tokens / plan.bound:,.0f} tokens/s at '
    f'most, {steps:,} steps in {_duration(steps * plan.bound)} at least'
  )


def _duration(seconds: float) -> str:
  for unit, size in (('days', 86400), ('hours', 3600), ('minutes', 60)):
    if seconds >= 2 * size:
      return f'{seconds / size:.1f} {unit}'
  return f'{seconds:.1f} s'


def _print_flops(console: Console, plan: Plan) -> None:
  model, program = plan.model_flops, plan.program_flops
  total = sum(program.values())
  unit, size = next(
    (each for each in _FLOP_UNITS if total >= each[1]), _FLOP_UNITS[-1]
  )

  def shown(flops: float) -> str:
    return f'{flops / size:,.2f}'

  rows = [
    (
      part,
      shown(model[name]) if (name := part.split(',')[0]) in model else '-',
      shown(flops),
      f'{flops / total:.1%}',
    )
    for part, flops in sorted(program.items(), key=lambda item: -item[1])
  ]
  rows.append(('sum', shown(sum(model.values())), shown(total), ''))
  print_table(
    console,
    f'{unit} of a step, all devices',
    ('part', 'model', 'program', 'share'),
    rows,
  )


def _print_memory(console: Console, plan: Plan) -> None:
  there_is = 'there is, for a program'
  if plan.target.platform == 'cuda':
    there_is += " (JAX's share of a GPU)"
  sizes = {
    **plan.state,
    'together, always there': plan.resident,
    'gradients, within a step': plan.gradients,
    "the compiler's buffers within a step": plan.scratch,
    'peak, as the compiler says': plan.peak,
    'the compiler needs': plan.needs or None,
    there_is: plan.available,
  }
  known = {name: size for name, size in sizes.items() if size is not None}
  unit, shown = _unit(known.values())
  rows = [(name, shown(size)) for name, size in known.items()]
  print_table(console, 'memory of a device', ('', unit), rows)
  if plan.peak is not None:
    console.print(
      'Buffers hold gradients and activations, and are not all alive at once: '
      'the peak decides.\n'
    )


def _print_collectives(console: Console, plan: Plan) -> None:
  if plan.traffic is None:
    return
  counts, sizes = plan.traffic.counts_by_kind(), plan.traffic.bytes_by_kind()
  unit, shown = _unit(sizes.values())
  print_table(
    console,
    'collectives of a step, results on one device',
    ('kind', 'times', unit),
    [(kind, str(counts[kind]), shown(size)) for kind, size in sizes.items()]
    or [('none', '0', '0')],
  )
  alike: dict[tuple[str, str, str], tuple[int, int]] = {}
  for c in plan.traffic.collectives:
    over = ','.join(c.axes) or f'{c.group_size} devices'
    count, size = alike.get((c.kind, c.shape, over), (0, 0))
    alike[c.kind, c.shape, over] = count + c.count, size + c.total_bytes
  largest = sorted(alike.items(), key=lambda item: -item[1][1])[:_LARGEST]
  if largest:
    print_table(
      console,
      'the largest',
      ('kind', 'shape', 'over', 'times', unit),
      [(*what, str(count), shown(size)) for what, (count, size) in largest],
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
    _SEARCH_COLUMNS,
    [_row(plan) for plan in plans],
  )
  return plans


def _row(plan: Plan) -> tuple[str, ...]:
  return (
    partitioning.describe(plan.mesh),
    plan.config.model.remat_policy,
    gib(plan.needs if plan.peak is None else plan.peak),
    {True: 'yes', False: 'no', None: '?'}[plan.fits],
    f'{plan.model_share:.0%}',
    _seconds(plan.bound),
    f'{plan.utilization:.0%}',
  )


def _does_not_fit(plan: Plan) -> str:
  least = plan.needs if plan.peak is None else plan.peak
  needs = f'{gib(least)} GiB' if least else f'over {gib(plan.least)} GiB'
  return (
    f'does not fit {_named(plan.target)}: a device needs {needs} and has '
    f'{gib(plan.available)} GiB; {suggestions(plan)[0]}'
  )
