"""`st_moe config list`, `show` and `diff`."""

import argparse

from st_moe import gin_files
from st_moe.bindings import Resolver, flatten, operative_config
from st_moe.errors import UserError, did_you_mean
from st_moe.gin_files import load_config, read_bindings


def _config_list() -> None:
  """Prints the package's gin files, each with its first comment line."""
  names = gin_files.names()
  width = max(map(len, names))
  for group in ('runs', 'models', 'ablations'):
    for name in names:
      if name.startswith(f'gin_configs/{group}/'):
        path = gin_files.GIN_ROOT.parent / name
        first = path.read_text(encoding='utf-8').splitlines()[0]
        print(f'{name:{width}}  {first.lstrip("# ")}')


def _config_diff(args: argparse.Namespace) -> None:
  """Prints the fields in which two configurations differ."""
  first, second = args.files
  above = [first] if gin_files.is_ablation(second) else []
  old, new = (
    flatten(load_config([*args.gin_file, *names], args.gin_bindings, args.seed))
    for names in ([first], [*above, second])
  )
  changed = [name for name, value in old.items() if value != new[name]]
  for name in changed:
    print(f'{name}: {old[name]!r} -> {new[name]!r}')
  if not changed:
    print('no difference')


def config(args: argparse.Namespace) -> None:
  """Lists gin files, shows a configuration or compares two."""
  actions = ('list', 'show', 'diff')
  if args.action is None:
    raise UserError(
      f'config needs an action ({", ".join(actions)}); see '
      '`st_moe config --help`'
    )
  if args.action not in actions:
    raise UserError(
      f'config has no action {args.action} (only {", ".join(actions)})'
      f'{did_you_mean(args.action, actions)}'
    )
  expected = {'list': args.files == [], 'diff': len(args.files) == 2}
  if not expected.get(args.action, True):
    wants = 'no files' if args.action == 'list' else 'two gin files'
    raise UserError(
      f'config {args.action} takes {wants}, got {len(args.files)}'
    )
  if args.action == 'list':
    _config_list()
  elif args.action == 'diff':
    _config_diff(args)
  else:
    files = args.gin_file + args.files
    bindings = read_bindings(files, args.gin_bindings, args.seed)
    resolver = Resolver(bindings, allow_missing=True)
    config = resolver.run_config()
    print(operative_config(config, resolver.missing), end='')
