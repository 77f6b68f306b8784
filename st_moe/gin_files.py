"""Where gin files are: the package's own, and the user's."""

from pathlib import Path

from st_moe.errors import UserError, did_you_mean

_PACKAGE = Path(__file__).resolve().parent


def _gin_root() -> Path:
  """The gin files: inside an installed package, beside it in a checkout."""
  inside_package = _PACKAGE / 'gin_configs'
  beside = _PACKAGE.parent / 'gin_configs'
  return inside_package if inside_package.is_dir() else beside


GIN_ROOT = _gin_root()


def names() -> list[str]:
  """Returns the package's own gin files as 'gin_configs/GROUP/NAME.gin'."""
  return sorted(
    f'gin_configs/{path.relative_to(GIN_ROOT).as_posix()}'
    for path in GIN_ROOT.rglob('*.gin')
  )


def is_ablation(name: str) -> bool:
  """Whether a file is one of the package's rows of a table, not a whole."""
  return find(name).is_relative_to(GIN_ROOT / 'ablations')


def shown(path: Path) -> str:
  """Returns a path as a person would type it."""
  for root in (GIN_ROOT.parent, Path.cwd()):
    if path.is_relative_to(root):
      return str(path.relative_to(root))
  return str(path)


def find(name: str, included_by: Path | None = None) -> Path:
  """Finds a gin file by path, or by its name in the package.

  The package's own files include each other only, whatever lies in the
  current directory.

  Raises:
    UserError: when there is none, with the nearest of the package's.
  """
  if included_by and included_by.is_relative_to(GIN_ROOT):
    roots = [GIN_ROOT]
  else:
    roots = [Path.cwd(), GIN_ROOT.parent, GIN_ROOT]
    if included_by:
      roots.insert(0, included_by.parent)
  for root in roots:
    if (root / name).is_file():
      return (root / name).resolve()
  for root in roots:
    if (root / name).exists():
      kind = 'folder' if (root / name).is_dir() else 'device or pipe'
      raise UserError(f'{name} is a {kind}; give a gin file')
  own = [n for n in names() if Path(n).stem == Path(name).stem]
  nearest = f'; did you mean {own[0]}?' if own else ''
  nearest = nearest or did_you_mean(name, names())
  nearest = nearest or '; see `st_moe config list`'
  by = f'{shown(included_by)}: ' if included_by else ''
  raise UserError(f'{by}no gin file {name}{nearest}')
