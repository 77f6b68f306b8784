"""The laws of the house (docs/design.md, section 2), read from the source."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'st_moe'

# Every module of the JAX tower has a floor; imports run downward, or sideways
# on the same floor, never in a circle. `data` is the TensorFlow tower.
FLOORS = {
  'errors': 0,
  'checks': 0,
  'config': 0,
  'bindings': 0,
  'gin_files': 0,
  'arguments': 0,
  'partitioning': 0,
  'processes': 0,
  'tables': 0,
  'initializers': 1,
  'routing': 1,
  'losses': 1,
  'layers': 2,
  'attention': 2,
  'experts': 2,
  'moe': 2,
  'stacking': 3,
  'blocks': 3,
  'transformer': 3,
  'incremental': 3,
  'decoding': 3,
  'trees': 4,
  'trainable': 4,
  'best': 4,
  'optimizer': 4,
  'train_state': 4,
  'integrity': 4,
  'checkpoint': 4,
  'metrics': 4,
  'alarms': 4,
  'workdir': 4,
  'model_directory': 4,
  'model_gin': 4,
  'report': 5,
  'evaluate': 5,
  'predictor': 5,
  'predict': 6,
  'initialize': 5,
  'step_log': 5,
  'train_step': 5,
  'preflight': 5,
  'development': 5,
  'trainer': 5,
  'closing': 5,
  'train': 5,
  'plan': 6,
  'study': 6,
  'trace': 6,
  'convert': 6,
  'bench': 6,
  'commands': 7,
  'main': 7,
  '__main__': 7,
}
ROOF = 5  # the floor where the towers meet
DATA_MAY_IMPORT = {'config', 'errors', 'data'}

TENSORFLOW = {'tensorflow', 'tensorflow_text', 'tensorflow_datasets', 'seqio'}
JAX = {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_LOOP_LINES = 160  # the train loop, flat
TRAIN_LOOP = ('train.py', 'run_steps')


@functools.cache
def sources() -> dict[str, ast.Module]:
  """Returns {path below st_moe/: syntax tree}."""
  return {
    path.relative_to(PACKAGE).as_posix(): ast.parse(
      path.read_text(encoding='utf-8')
    )
    for path in sorted(PACKAGE.rglob('*.py'))
  }


def imports(tree: ast.AST) -> Iterator[str]:
  """Yields the dotted names a file imports, at its top or inside functions.

  `from a import b` gives 'a.b': whether b is a module or a name in one.
  """
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are absolute'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def module_of(path: str) -> str:
  """'routing/capacity.py' -> 'routing', 'moe.py' -> 'moe'."""
  return Path(path).parts[0].removesuffix('.py')


def our_imports(tree: ast.AST) -> set[str]:
  names = {
    name.split('.')[1] for name in imports(tree) if name.startswith('st_moe.')
  }
  return names - {'__version__'}


def users_of(packages: set[str]) -> set[str]:
  """Returns the files that import any of the top-level packages."""
  return {
    path
    for path, tree in sources().items()
    if any(name.split('.')[0] in packages for name in imports(tree))
  }


def attributes(tree: ast.AST) -> Iterator[tuple[str, str]]:
  """Yields ('nn', 'Dense') for `nn.Dense`, ('', 'x') for `f().x`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      owner = node.value.id if isinstance(node.value, ast.Name) else ''
      yield owner, node.attr


def test_every_module_has_a_floor():
  modules = {module_of(path) for path in sources()} - {'__init__', 'data'}
  assert modules <= set(FLOORS), 'give the new module a floor in FLOORS'


def test_imports_run_downward():
  upward = [
    f'{path} (floor {FLOORS[module_of(path)]}) imports {name} ({FLOORS[name]})'
    for path, tree in sources().items()
    if module_of(path) in FLOORS
    for name in our_imports(tree) - {'data'}
    if FLOORS[name] > FLOORS[module_of(path)]
  ]
  assert upward == []


def test_imports_make_no_circle():
  graph: dict[str, set[str]] = {}
  for path, tree in sources().items():
    name = module_of(path)
    graph.setdefault(name, set()).update(our_imports(tree) - {name})
  while free := {name for name in graph if not graph[name] & set(graph)}:
    graph = {name: to for name, to in graph.items() if name not in free}
  assert graph == {}


def test_the_towers_meet_in_the_roof():
  early = [
    path
    for path, tree in sources().items()
    if 'data' in our_imports(tree)
    and module_of(path) != 'data'
    and FLOORS[module_of(path)] < ROOF
  ]
  assert early == []


def test_data_imports_only_config_and_errors_of_ours():
  foreign = {
    path: our_imports(tree) - DATA_MAY_IMPORT
    for path, tree in sources().items()
    if module_of(path) == 'data'
  }
  assert {path: names for path, names in foreign.items() if names} == {}


def test_tensorflow_lives_in_the_data_tower():
  users = {path for path in users_of(TENSORFLOW) if module_of(path) != 'data'}
  assert users == set()


def test_no_jax_in_the_data_tower():
  assert [path for path in users_of(JAX) if module_of(path) == 'data'] == []


def test_t5_is_no_dependency():
  assert users_of({'t5'}) == set()


def test_gin_is_imported_by_gin_files_only():
  assert users_of({'gin'}) == {'gin_files.py'}


def test_orbax_is_imported_by_checkpoint_only():
  assert {module_of(path) for path in users_of({'orbax'})} <= {'checkpoint'}


def test_partition_specs_are_made_in_partitioning_only():
  users = {
    module_of(path)
    for path, tree in sources().items()
    if any(name.endswith('.PartitionSpec') for name in imports(tree))
    or any(name == 'PartitionSpec' for _, name in attributes(tree))
  }
  assert users == {'partitioning'}


def test_no_deprecated_or_private_flax_and_jax():
  banned = []
  for path, tree in sources().items():
    for name in imports(tree):
      parts = name.split('.')
      if name.startswith('flax.linen.partitioning') or (
        parts[0] in JAX and any(part.startswith('_') for part in parts)
      ):
        banned.append(f'{path}: {name}')
    for owner, name in attributes(tree):
      if name in ('sow', 'logical_axis_rules') or (
        owner in ('nn', 'flax', 'jax', 'jnp', 'lax') and name.startswith('_')
      ):
        banned.append(f'{path}: {owner}.{name}')
  assert banned == []


def test_modules_are_compact():
  with_setup = [
    f'{path}: {node.name}'
    for path, tree in sources().items()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
    and any(ast.unparse(base).endswith('Module') for base in node.bases)
    and any(
      isinstance(item, ast.FunctionDef) and item.name == 'setup'
      for item in node.body
    )
  ]
  assert with_setup == []


def test_every_file_says_what_it_holds():
  silent = [
    path
    for path, tree in sources().items()
    if tree.body and not ast.get_docstring(tree)
  ]
  assert silent == []


def test_no_file_is_long():
  long = {
    path.relative_to(ROOT).as_posix(): lines
    for folder in (PACKAGE, ROOT / 'tests', ROOT / 'scripts')
    for path in folder.rglob('*')
    if path.suffix in ('.py', '.sh')
    and (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
  }
  assert long == {}


def test_no_function_is_long():
  long = {}
  for path, tree in sources().items():
    for node in ast.walk(tree):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        lines = node.end_lineno - node.lineno + 1
        loop = (path, node.name) == TRAIN_LOOP
        if lines > (MAX_LOOP_LINES if loop else MAX_FUNCTION_LINES):
          long[f'{path}: {node.name}'] = lines
  assert long == {}


def loaded_after(code: str) -> set[str]:
  """Returns the top-level packages that a fresh Python has after `code`."""
  report = 'import sys; print(*{name.split(".")[0] for name in sys.modules})'
  result = subprocess.run(
    [sys.executable, '-c', f'{code}\n{report}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  return set(result.stdout.splitlines()[-1].split())


def test_no_tensorflow_before_it_is_needed():
  modules = (
    'main data.pipeline data.cache data.vocabularies evaluate train '
    'bench.commands'
  )
  code = '\n'.join(f'import st_moe.{name}' for name in modules.split())
  assert loaded_after(code) & TENSORFLOW == set()


@pytest.mark.parametrize('command', [['pretrain'], ['bench', 'layer']])
def test_help_loads_neither_jax_nor_tensorflow(command):
  code = (
    'import st_moe.main\n'
    f'try: st_moe.main.main([*{command}, "--help"])\n'
    'except SystemExit as e: assert e.code == 0'
  )
  assert loaded_after(code) & (TENSORFLOW | JAX | {'numpy'}) == set()
