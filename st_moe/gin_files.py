"""gin files: where they are, and reading them as data.

gin is used here and nowhere else, and of gin only the parser. Every statement
binds a field of a dataclass in config/ or a macro; imports and references
are refused. So a gin file is data, wherever it comes from: nothing in it can
import or call anything, and no global state is left behind. Names, macros and
types are checked against the dataclasses, with the file and line.
"""

import dataclasses
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

from st_moe.bindings import Binding, Macro, Resolver, inside
from st_moe.config import RunConfig
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


@dataclasses.dataclass(frozen=True)
class Reference:
  """`@name` or `@name()` as a value: always refused."""

  name: str


class _Names(config_parser.ParserDelegate):
  """Keeps references and macros as names: nothing is looked up or called."""

  def configurable_reference(self, name, evaluate):
    return Reference(name)

  def macro(self, name):
    return Macro(name)


def _parse(text: str) -> Iterator[Any]:
  """Yields gin statements; raises SyntaxError with a line number."""
  try:
    parser = config_parser.ConfigParser(text, _Names())
    while statement := parser.parse_statement():
      yield statement
  except tokenize.TokenError as e:
    raise SyntaxError(e.args[0], (None, e.args[1][0], None, None)) from None
  # gin runs out of tokens, or meets a name that is none, or nests too deep.
  except (StopIteration, ValueError, RecursionError) as e:
    raise SyntaxError(str(e), (None, None, None, None)) from None


def _binding(name: str, value: Any, where: str) -> Binding:
  for reference in inside(value, Reference):
    raise UserError(
      f'{where}: the reference @{reference.name} is refused: a configuration '
      'holds values and %MACROS only'
    )
  return Binding(name, value, where)


def read_file(path: Path, chain: tuple[Path, ...] = ()) -> list[Binding]:
  """Reads a gin file and what it includes, in order.

  Raises:
    UserError: with file and line, for what is not gin or not data.
  """
  if path in chain:
    raise UserError(f'{shown(chain[-1])} includes {shown(path)}: a circle')
  bindings = []
  try:
    for statement in _parse(path.read_text(encoding='utf-8')):
      where = f'{shown(path)}:{statement.location.line_num}'
      if isinstance(statement, config_parser.IncludeStatement):
        included = find(statement.filename, included_by=path)
        bindings += read_file(included, (*chain, path))
      elif isinstance(statement, config_parser.ImportStatement):
        raise UserError(
          f'{where}: `{statement.format()}` is refused: a configuration holds '
          'values only and imports nothing'
        )
      elif isinstance(statement, config_parser.BindingStatement):
        scope = f'{statement.scope}/' if statement.scope else ''
        field = f'.{statement.arg_name}' if statement.arg_name else ''
        name = f'{scope}{statement.selector}{field}'
        bindings.append(_binding(name, statement.value, where))
  except SyntaxError as e:
    line = f':{e.lineno}' if e.lineno else ''
    raise UserError(
      f'{shown(path)}{line}: not gin; write NAME = VALUE, strings in quotes'
    ) from e
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f'cannot read {shown(path)}: {e}') from e
  return bindings


def parse_flag(text: str, flag: str = '--gin.') -> Binding:
  """Reads 'NAME=VALUE' of `--gin.NAME=VALUE`, or of another flag.

  What is no gin value is a string: `--gin.TASK=docstrings`.
  """
  name, equals, value_text = text.partition('=')
  if not equals or not name:
    raise UserError(f'{flag}{name} needs a value: {flag}{name}=VALUE')
  try:
    (statement,) = _parse(f'value = {value_text}')
    value = statement.value
  except (SyntaxError, ValueError):
    value = value_text
  return _binding(name, value, f'{flag}{name}')


def read_bindings(
  files: Sequence[str], flags: Sequence[Binding] = (), seed: int | None = None
) -> list[Binding]:
  """Returns all that files, then flags, then --seed bind; later ones win."""
  bindings = [b for name in files for b in read_file(find(name))]
  bindings += flags
  if seed is not None:
    bindings.append(Binding('RunConfig.seed', seed, '--seed'))
  return bindings


def load_config(
  files: Sequence[str], flags: Sequence[Binding] = (), seed: int | None = None
) -> RunConfig:
  """Builds a run's configuration from gin files and command-line bindings.

  Raises:
    UserError: one line that names what is wrong, and where.
  """
  return Resolver(read_bindings(files, flags, seed)).run_config()
