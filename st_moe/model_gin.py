"""The gin file beside weights: which it is, and what it binds of the model.

Loads neither JAX nor orbax, as `model_directory` does.
"""

from pathlib import Path

from st_moe.bindings import Binding, flatten
from st_moe.errors import UserError, did_you_mean
from st_moe.gin_files import load_config
from st_moe.workdir import CONFIG_FILE, MODEL_FILE


def gin_file_of(path: Path) -> Path | None:
  """Returns the gin file of a model directory or of a run, if it is one."""
  names = (path / MODEL_FILE, path / CONFIG_FILE)
  return next((name for name in names if name.is_file()), None)


def no_model(path: Path, flag: str = '') -> UserError:
  """Returns the error about a path at which there is no model.

  Args:
    path: as given.
    flag: '--checkpoint=', if it came from there.
  """
  if not path.exists():
    near = [other.name for other in path.parent.glob('*') if other.is_dir()]
    return UserError(
      f'{flag}{path} holds no model: there is no such folder'
      f'{did_you_mean(path.name, near)}'
    )
  return UserError(
    f'{flag}{path} holds no model: it has no {MODEL_FILE} and no '
    f'{CONFIG_FILE}; give the work directory of a run, or a model that '
    '`st_moe convert` made'
  )


def model_bindings(path: Path) -> list[Binding]:
  """Returns what the gin file beside given weights binds of the model.

  Args:
    path: of a run, a model directory, or the checkpoints in one.

  Raises:
    UserError: there is no such file.
  """
  found = gin_file_of(path.parent if path.name == 'checkpoints' else path)
  if found is None:
    raise no_model(path, '--checkpoint=')
  config = load_config([str(found)])
  sections = [
    'ModelConfig',
    *(['RouterConfig'] * (config.model.num_experts > 0)),
  ]
  return [
    Binding(name, value, str(found))
    for name, value in flatten(config).items()
    if name.rpartition('.')[0].rpartition('/')[2] in sections
    or name == 'DataConfig.extra_ids'  # a part of the vocabulary
  ]
