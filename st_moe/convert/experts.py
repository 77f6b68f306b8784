"""`st_moe convert experts`: more experts, fewer, or merged ones.

Each new expert is an old one or a mean of several, in every sparse layer the
same or as a JSON file says. Columns of the router follow: a copy has the
logits of its original, a merged expert their mean.
"""

import argparse
import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from st_moe.bindings import Binding
from st_moe.config import ModelConfig, RouterConfig
from st_moe.convert.mapping import LAYER
from st_moe.convert.own_models import (
  TRAINING,
  Conversion,
  OwnModel,
  check_same,
  computed_params,
  configure,
  generator,
  model_bindings,
  open_model,
  with_noise,
  write,
)
from st_moe.errors import UserError, did_you_mean
from st_moe.metrics import read_metrics
from st_moe.model_directory import check_output
from st_moe.stacking import STACKS, sparse_layers

# Old experts that each new one is the mean of.
Members = tuple[tuple[int, ...], ...]

_LOAD_LINES = 10  # of metrics.jsonl, the last, over which load is averaged
_MAY_CHANGE = ('num_experts', 'encoder_router', 'decoder_router', *TRAINING)
_ROUTER_MAY_CHANGE = (
  'num_choices', 'train_capacity_factor', 'eval_capacity_factor',
  'fixed_capacity', 'eval_dropless', 'train_choice_policy',
  'eval_choice_policy', 'train_choice_threshold', 'eval_choice_threshold',
  'gate_normalization', 'balance_loss_weight', 'z_loss_weight', 'jitter',
)  # fmt: skip


def run(args: argparse.Namespace, config: None) -> None:
  """Makes the model with other experts; prints how the two compare.

  Args:
    args: source, output, experts or num_experts, by, noise, step, seed and
      gin flags.
    config: not used: gin flags change the source's configuration.

  Raises:
    UserError: when the source is no sparse model of ours, the experts are not
      described right, or the output exists.
  """
  del config
  output = Path(args.output)
  check_output(output)
  if args.noise < 0:
    raise UserError(f'--noise={args.noise} must be >= 0')
  if (args.experts is None) == (args.num_experts is None):
    both = '' if args.experts is None else ', not both'
    raise UserError(
      f'give --experts=SPEC or --num_experts=N{both}; see `st_moe convert '
      'experts --help`'
    )
  source = open_model(Path(args.source), args.step)
  old = source.config.model
  if not old.num_experts:
    raise UserError(
      f'{args.source} is dense; `st_moe convert upcycle` makes experts of it'
    )
  loads = expert_loads(source) if args.by == 'load' else None
  members = choose(args, old, loads)
  (count,) = {len(of_layer) for of_layer in members.values()}
  target = configure(
    args,
    model_bindings(source.config),
    str(source.found.gin_file),
    [Binding('ModelConfig.num_experts', count, f'{count} experts are made')],
  ).model
  check_target(old, target, count)
  for layer, of_layer in members.items():
    print(f'{layer}: {old.num_experts} experts -> {count}: {shown(of_layer)}')
  for line in what_is_kept(old, target, members, args.noise):
    print(line)
  print('optimizer: fresh; statistics of the old experts, if any, are left out')
  conversion = Conversion(
    source=source,
    config=target,
    params=computed_params(
      args.source,
      target,
      make_params(source, members, loads, args.noise, args.seed),
    ),
    opt_state=None,
    used=list(source.leaves.values()),
    ignored=lambda _: None,
    record={
      'kind': 'experts',
      'experts': {layer: shown(m) for layer, m in members.items()},
      'by': args.by,
      'noise': args.noise,
      'seed': args.seed or 0,
    },
  )
  write(conversion, output, check=not args.no_check)


# MARK: which experts


def shown(members: Members) -> str:
  """Returns the experts of a layer as they are typed: '0+1,2+3'."""
  return ','.join('+'.join(map(str, olds)) for olds in members)


def parse(spec: str, num_experts: int, where: str) -> Members:
  """Reads '0,2,5', '0+1,2+3' or '0,0,1,1'.

  Args:
    spec: what was typed.
    num_experts: of the old model.
    where: it stands, for messages.

  Raises:
    UserError: for what is no such list, and experts that do not exist.
  """
  try:
    members = tuple(
      tuple(int(word) for word in part.split('+')) for part in spec.split(',')
    )
  except ValueError:
    raise UserError(
      f"{where}: {spec!r} is no list of experts; write '0,2,5' to keep three, "
      "'0+1,2+3' to merge pairs, '0,0,1,1' to copy"
    ) from None
  for olds in members:
    for old in olds:
      if not 0 <= old < num_experts:
        raise UserError(
          f'{where}: there is no expert {old}; the source has {num_experts}, '
          f'0 to {num_experts - 1}'
        )
    if len(set(olds)) != len(olds):
      raise UserError(
        f'{where}: {"+".join(map(str, olds))} names an expert twice'
      )
  return members


def layer_names(config: ModelConfig) -> list[str]:
  """Returns the sparse layers as 'encoder/1'."""
  return [
    f'{stack}/{layer}'
    for stack in STACKS
    for layer in sparse_layers(config, stack)
  ]


def choose(
  args: argparse.Namespace,
  config: ModelConfig,
  loads: dict[str, np.ndarray] | None,
) -> dict[str, Members]:
  """Returns the members of the new experts of every sparse layer.

  Args:
    args: experts or num_experts, and by.
    config: of the old model.
    loads: share of the tokens of each expert, by layer.

  Raises:
    UserError: for lists that are wrong, or of unequal lengths.
  """
  names, old = layer_names(config), config.num_experts
  if args.num_experts is not None:
    return _by_number(args.num_experts, names, old, loads)
  if not args.experts.endswith('.json'):
    members = parse(args.experts, old, '--experts')
    return dict.fromkeys(names, members)
  path = Path(args.experts)
  try:
    specs = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(f'--experts={path} cannot be read as JSON: {e}') from e
  if not isinstance(specs, dict) or not all(
    isinstance(spec, str) for spec in specs.values()
  ):
    raise UserError(
      f'{path} must be an object of lists by layer: '
      f'{{"{names[0]}": "0,2,5", ...}}'
    )
  for name in specs:
    if name not in names:
      raise UserError(
        f'{path}: {name} is no sparse layer of the source, which are '
        f'{", ".join(names)}{did_you_mean(name, names)}'
      )
  missing = [name for name in names if name not in specs]
  if missing:
    raise UserError(f'{path} says nothing of {", ".join(missing)}')
  members = {name: parse(specs[name], old, f'{path}: {name}') for name in names}
  lengths = {name: len(of_layer) for name, of_layer in members.items()}
  if len(set(lengths.values())) > 1:
    raise UserError(
      f'{path}: layers would have different numbers of experts ({lengths}); '
      'give every layer as many'
    )
  return members


def _by_number(
  count: int, names: list[str], old: int, loads: dict[str, np.ndarray] | None
) -> dict[str, Members]:
  """Returns whole copies of all experts, or the `count` busiest of a layer."""
  if count > old and count % old == 0:
    return dict.fromkeys(names, tuple((i % old,) for i in range(count)))
  if count < 1:
    raise UserError(f'--num_experts={count} must be at least 1')
  if count >= old:
    raise UserError(
      f'--num_experts={count} is no multiple of the {old} experts that are '
      f'there, nor fewer; give {2 * old}, or say which with --experts'
    )
  if loads is None:
    raise UserError(
      f'--num_experts={count} of {old}: which? add --by=load to keep the '
      'busiest of each layer, or name them with --experts'
    )
  return {
    name: tuple(
      (int(i),)
      for i in np.sort(np.argsort(-loads[name], kind='stable')[:count])
    )
    for name in names
  }


def expert_loads(source: OwnModel) -> dict[str, np.ndarray]:
  """Returns each expert's share of the tokens, by layer, of the last lines.

  Raises:
    UserError: when the run has not logged it.
  """
  config = source.config.model
  rows = read_metrics(source.found.path)
  loads = {}
  for name in layer_names(config):
    key = f'router/{name}/expert_load'
    logged = [row[key] for row in rows if key in row][-_LOAD_LINES:]
    if not logged or len(logged[0]) != config.num_experts:
      raise UserError(
        f'--by=load: metrics.jsonl in {source.found.path} has no {key} of '
        f'{config.num_experts} experts; name the experts with --experts'
      )
    loads[name] = np.mean(logged, axis=0)
  return loads


# MARK: the model


def check_target(old: ModelConfig, new: ModelConfig, count: int) -> None:
  """Refuses changes of the configuration other than of its experts.

  Raises:
    UserError: naming the setting.
  """
  if new.num_experts != count:
    raise UserError(
      f'ModelConfig.num_experts {new.num_experts} is not the {count} experts '
      'that are made; leave it out'
    )
  check_same(old, new, _MAY_CHANGE)
  for stack in STACKS:
    before, after = (getattr(c, f'{stack}_router') for c in (old, new))
    for field in dataclasses.fields(RouterConfig):
      values = [getattr(router, field.name) for router in (before, after)]
      if values[0] != values[1] and field.name not in _ROUTER_MAY_CHANGE:
        raise UserError(
          f'{stack}/RouterConfig.{field.name} is {values[0]!r} in the source '
          f'and {values[1]!r} in what is made; only numbers of choices, '
          'capacities, policies and weights may change'
        )


def what_is_kept(
  old: ModelConfig,
  new: ModelConfig,
  members: dict[str, Members],
  noise: float,
) -> list[str]:
  """Returns one line that says whether the function is kept, and why not."""
  reasons: list[str] = []
  for layer, of_layer in members.items():
    stack = layer.partition('/')[0]
    before, after = (getattr(c, f'{stack}_router') for c in (old, new))
    reason = _change(before, after, of_layer, old.num_experts)
    if reason and reason not in reasons:
      reasons.append(reason)
  copied = any(
    len(set(of_layer)) < len(of_layer) for of_layer in members.values()
  )
  if noise and copied:
    reasons.append(f'--noise={noise} moves the copies')
  if reasons:
    return [f'the function may change: {"; ".join(reasons)}']
  return ['the function is kept wherever a token is not dropped']


def _change(
  before: RouterConfig, after: RouterConfig, members: Members, num_experts: int
) -> str | None:
  """Returns why one layer computes something else, or None."""
  if any(len(olds) > 1 for olds in members):
    return 'experts are merged'
  copies = collections.Counter(olds[0] for olds in members)
  if len(copies) < num_experts:
    return 'experts are left out'
  most, least = max(copies.values()), min(copies.values())
  same = dataclasses.replace(after, num_choices=before.num_choices) == before
  if most == 1:
    if after == before:
      return None
    return 'the router is set otherwise'
  if before.kind == 'expert_choice':
    return 'experts that choose choose anew'
  if not same:
    return 'the router is set otherwise'
  renormalised = before.gate_normalization == 'after_drop'
  if before.num_choices == after.num_choices == 1:
    if renormalised:
      return None
    return 'copies share the probability of their original, the gate'
  policy, all_copies = before.eval_choice_policy, most * before.num_choices
  kept = policy == 'all' and (
    renormalised
    or before.num_choices > 1
    or before.gate_normalization == 'none'
  )
  if most > least or after.num_choices != all_copies:
    return 'copies take the places of other choices' + (
      f' (num_choices = {all_copies} would choose all copies)' if kept else ''
    )
  if kept:
    return None
  by = (
    '' if policy == 'all' else f", and eval_choice_policy '{policy}' goes by it"
  )
  return f'copies share the probability of their original{by}'


def make_params(
  source: OwnModel,
  members: dict[str, Members],
  loads: dict[str, np.ndarray] | None,
  noise: float,
  seed: int | None,
) -> Callable[[str], np.ndarray]:
  """Returns what makes a parameter of the written-out model.

  Args:
    source: the old model.
    members: of the new experts of every sparse layer.
    loads: weights of the mean of merged experts; None: all the same.
    noise: on second and later copies, in units of their RMS.
    seed: of the noise.
  """

  def compute(name: str) -> np.ndarray:
    value, in_layer = source.read(name), LAYER.fullmatch(name)
    if in_layer is None or not in_layer['end'].startswith('moe/'):
      return value
    layer = f'{in_layer["stack"]}/{in_layer["layer"]}'
    load = None if loads is None else loads[layer]
    is_router = in_layer['end'] == 'moe/router/kernel'
    by_expert = value.T if is_router else value
    made = np.stack([mean(by_expert, olds, load) for olds in members[layer]])
    noisy = with_noise(made, noise, generator(seed, name))
    seen: set[tuple[int, ...]] = set()
    for i, olds in enumerate(members[layer]):
      if olds in seen:
        made[i] = noisy[i]
      seen.add(olds)
    return made.T if is_router else made

  return compute


def mean(
  values: np.ndarray, olds: tuple[int, ...], load: np.ndarray | None
) -> np.ndarray:
  """Returns the mean of some of `values` [experts, ...], weighted by load."""
  if len(olds) == 1:
    return values[olds[0]]
  chosen = list(olds)
  weights = None
  if load is not None and load[chosen].sum() > 0:
    weights = load[chosen]
  return np.average(values[chosen], axis=0, weights=weights).astype(np.float32)
