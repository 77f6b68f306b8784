"""From bindings of names to a RunConfig, and back.

A configuration is written as `NAME = VALUE`: fields of the dataclasses in
config/ and macros. main.py reads them from gin files and the command line;
this file checks every name, macro and type, and says where a wrong one stands.

Sections: RunConfig, ModelConfig, OptimizerConfig, DataConfig, MeshConfig,
EvaluationConfig, HealthConfig, and RouterConfig, which applies to both stacks
unless `encoder/` or `decoder/` stands before it. `RouterConfig.preset` names
the values that the other bindings change.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from st_moe.config import (
  ROUTER_PRESETS,
  DataConfig,
  EvaluationConfig,
  HealthConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RouterConfig,
  RunConfig,
)
from st_moe.errors import UserError, did_you_mean

_CLASSES = {
  cls.__name__: cls
  for cls in (
    RunConfig,
    ModelConfig,
    RouterConfig,
    OptimizerConfig,
    DataConfig,
    MeshConfig,
    EvaluationConfig,
    HealthConfig,
  )
}
_STACKS = ('encoder', 'decoder')
# Fields that hold a dataclass are built from its own bindings.
_PARTS = {
  'model': 'ModelConfig',
  'optimizer': 'OptimizerConfig',
  'data': 'DataConfig',
  'mesh': 'MeshConfig',
  'evaluation': 'EvaluationConfig',
  'health': 'HealthConfig',
  'encoder_router': 'encoder/RouterConfig',
  'decoder_router': 'decoder/RouterConfig',
}


@dataclasses.dataclass(frozen=True)
class Macro:
  """`%NAME` as a value."""

  name: str


@dataclasses.dataclass(frozen=True)
class Binding:
  """`NAME = VALUE`, and where it is written.

  A name with a dot is a field ('ModelConfig.d_model',
  'encoder/RouterConfig.jitter'), one without is a macro ('STEPS').
  """

  name: str
  value: Any
  where: str

  @property
  def is_macro(self) -> bool:
    return '.' not in self.name


def inside(value: Any, kind: type) -> list[Any]:
  """Returns every instance of `kind` in nested containers."""
  if isinstance(value, kind):
    return [value]
  if isinstance(value, dict):
    value = [*value.keys(), *value.values()]
  if isinstance(value, (list, tuple)):
    return [x for item in value for x in inside(item, kind)]
  return []


@dataclasses.dataclass(frozen=True)
class Setting:
  """A value without macros, and where it is written."""

  value: Any
  where: str


_MISSING = object()  # the value of what is required and not given


def _fields(class_name: str) -> list[str]:
  """Returns the bindable fields of a class: all but the nested dataclasses."""
  names = [
    field.name
    for field in dataclasses.fields(_CLASSES[class_name])
    if not dataclasses.is_dataclass(field.default)
  ]
  return names + ['preset'] if class_name == 'RouterConfig' else names


def owners(field: str) -> list[str]:
  """Returns 'Class.field' for every class that has the field."""
  return [f'{name}.{field}' for name in _CLASSES if field in _fields(name)]


def _check_name(binding: Binding) -> None:
  """Raises UserError for a field that does not exist."""
  where, (scoped_class, _, field) = binding.where, binding.name.rpartition('.')
  scope, _, class_name = scoped_class.rpartition('/')
  if class_name not in _CLASSES:
    raise UserError(
      f'{where}: unknown class {class_name} in {binding.name}'
      f'{did_you_mean(class_name, _CLASSES)}'
    )
  if scope and (class_name != 'RouterConfig' or scope not in _STACKS):
    raise UserError(
      f'{where}: {binding.name} has no meaning; only encoder/RouterConfig and '
      'decoder/RouterConfig are scoped'
    )
  if field not in _fields(class_name):
    near = did_you_mean(field, _fields(class_name))
    near = near or '; `st_moe config show` lists them all'
    if field in _PARTS:
      near = f'; bind the fields of {_PARTS[field]}'
    elif having := owners(field):
      near = f'; did you mean {having[0]}?'
    raise UserError(f'{where}: {class_name} has no field {field}{near}')


def _last_of_each(bindings: Sequence[Binding]) -> dict[str, Binding]:
  """Returns the binding that counts of each name that is no macro.

  A flag for both routers replaces what files before it bind of one of them: a
  scope would win, and the config.gin of a run binds every field by scope.
  """
  found: dict[str, Binding] = {}
  for binding in bindings:
    if binding.is_macro:
      continue
    if binding.where.startswith('--gin.RouterConfig.'):
      for stack in _STACKS:
        scoped = found.get(f'{stack}/{binding.name}')
        if scoped is not None and not scoped.where.startswith('--'):
          del found[scoped.name]
    found[binding.name] = binding
  return found


class Resolver:
  """Turns bindings into a RunConfig; the last binding of a name counts.

  Attributes:
    missing: {field: macro, or the field itself} of required values that were
      not given; empty unless `allow_missing`.
  """

  def __init__(self, bindings: Sequence[Binding], allow_missing: bool = False):
    self.missing: dict[str, str] = {}
    self._allow_missing = allow_missing
    self._fields = _last_of_each(bindings)
    self._order = {b.name: i for i, b in enumerate(bindings)}
    self._macros = {b.name: b for b in bindings if b.is_macro}
    self._used: set[str] = set()
    for binding in bindings:
      if not binding.is_macro:
        _check_name(binding)
    self._check_macros(bindings)

  def _check_macros(self, bindings: Sequence[Binding]) -> None:
    """Raises UserError for a macro that is read or defined, but not both."""
    read = {'gin.REQUIRED'}
    for binding in bindings:
      for macro in inside(binding.value, Macro):
        read.add(macro.name)
        if macro.name not in self._macros and macro.name != 'gin.REQUIRED':
          raise UserError(
            f'{binding.where}: macro %{macro.name} is not defined'
            f'{did_you_mean(macro.name, self._macros)}'
          )
    for name, binding in self._macros.items():
      if name not in read:
        known = read - {'gin.REQUIRED'}
        near = did_you_mean(name, known)
        having = owners(name.lower())
        if having and not near:
          near = f'; did you mean {having[0]}?'
        if known and not near:
          near = f'; there are {", ".join(sorted(known))}'
        raise UserError(f'{binding.where}: nothing reads macro {name}{near}')

  def _resolve(self, value: Any, where: str, chain: tuple[str, ...]) -> Setting:
    """Follows macros; `chain` is the names that led here."""
    if isinstance(value, (list, tuple)):
      items = [self._resolve(item, where, chain).value for item in value]
      return Setting(tuple(items), where)
    if not isinstance(value, Macro):
      return Setting(value, where)
    if value.name == 'gin.REQUIRED':
      if self._allow_missing:
        self.missing[chain[0]] = chain[-1]
        return Setting(_MISSING, where)
      raise UserError(
        f'{where}: {chain[-1]} is required; give --gin.{chain[-1]}=VALUE'
      )
    if value.name in chain:
      raise UserError(f'{where}: macro %{value.name} is defined by itself')
    self._used.add(value.name)
    macro = self._macros[value.name]
    return self._resolve(macro.value, macro.where, (*chain, value.name))

  def _settings(self, class_name: str) -> dict[str, Setting]:
    """Returns {field: setting} of a class, or of a scoped class."""
    settings = {
      name.rpartition('.')[2]: self._resolve(b.value, b.where, (name,))
      for name, b in self._fields.items()
      if name.rpartition('.')[0] == class_name
    }
    return {
      field: setting
      for field, setting in settings.items()
      if setting.value is not _MISSING
    }

  def binds(self, class_name: str) -> bool:
    """Whether any field of a class is bound."""
    return any(name.startswith(f'{class_name}.') for name in self._fields)

  def bound(self, section: str) -> dict[str, Any]:
    """Returns the fields of a section ('encoder/RouterConfig') that are bound.

    `RouterConfig` is a section of its own here: a scope's has only its own.
    """
    settings = self._settings(section)
    return {field: setting.value for field, setting in settings.items()}

  def located(self, error: UserError) -> UserError:
    """Returns an error with the places where the fields it names are bound."""
    places = []
    for name in re.findall(r'\b(?:\w+/)?\w+Config\.\w+', str(error)):
      if name in self._fields:
        value, where = self._fields[name].value, self._fields[name].where
        place = self._resolve(value, where, (name,)).where
        if isinstance(value, Macro) and not place.startswith('--'):
          place += f', --gin.{value.name}=VALUE'
        places.append(place)
    places = [p for p in dict.fromkeys(places) if p not in str(error)]
    return UserError(f'{error} ({", ".join(places)})') if places else error

  def _build(
    self,
    base: Any,
    settings: dict[str, Setting],
    *,
    related: Sequence[str] = (),
    **parts,
  ) -> Any:
    """Returns `base` with these fields; an error says where they are bound.

    Args:
      base: gives the other fields.
      settings: by field.
      related: classes whose fields an error may be about too.
      **parts: fields that hold a dataclass.
    """
    values = {field: setting.value for field, setting in settings.items()}
    try:
      return dataclasses.replace(base, **values, **parts)
    except UserError as e:
      about = [settings, *map(self._settings, related)]
      places = [
        setting.where
        for group in about
        for field, setting in group.items()
        if re.search(rf'\b{field}\b', str(e))
      ]
      raise UserError(f'{e} ({", ".join(places)})' if places else e) from None

  def _router(self, stack: str) -> RouterConfig:
    scoped = self._settings(f'{stack}/RouterConfig')
    settings = self._settings('RouterConfig') | scoped
    preset = settings.pop('preset', Setting('paper', ''))
    if preset.value not in ROUTER_PRESETS:
      raise UserError(
        f'{preset.where}: RouterConfig.preset must be one of '
        f'{", ".join(ROUTER_PRESETS)}, got {preset.value!r}'
        f'{did_you_mean(str(preset.value), ROUTER_PRESETS)}'
      )
    return self._build(ROUTER_PRESETS[preset.value], settings)

  def run_config(self) -> RunConfig:
    """Builds the parts and the whole."""
    model = self._build(
      ModelConfig(),
      self._settings('ModelConfig'),
      related=['RouterConfig', *(f'{s}/RouterConfig' for s in _STACKS)],
      encoder_router=self._router('encoder'),
      decoder_router=self._router('decoder'),
    )
    config = self._build(
      RunConfig(),
      self._settings('RunConfig'),
      model=model,
      optimizer=self._build(
        OptimizerConfig(), self._settings('OptimizerConfig')
      ),
      data=self._build(DataConfig(), self._settings('DataConfig')),
      mesh=self._build(MeshConfig(), self._settings('MeshConfig')),
      evaluation=self._build(
        EvaluationConfig(), self._settings('EvaluationConfig')
      ),
      health=self._build(HealthConfig(), self._settings('HealthConfig')),
    )
    self._check_effects(model)
    return config

  def _check_effects(self, model: ModelConfig) -> None:
    """Raises UserError for a binding that changes nothing."""
    for field, setting in self._settings('RouterConfig').items():
      scoped = [
        self._fields.get(f'{stack}/RouterConfig.{field}') for stack in _STACKS
      ]
      # gin's rule: a scope wins, whichever binding comes last.
      last = self._order[f'RouterConfig.{field}']
      if all(b is not None and self._order[b.name] < last for b in scoped):
        raise UserError(
          f'{setting.where}: RouterConfig.{field} has no effect, since '
          + ' and '.join(f'{b.name} ({b.where})' for b in scoped)
          + ' are bound; bind those'
        )
    for binding in (*self._fields.values(), *self._macros.values()):
      if not binding.where.startswith('--'):
        continue
      if binding.is_macro and binding.name not in self._used:
        raise UserError(
          f'{binding.where} has no effect: what read %{binding.name} is bound '
          'again by a later file; bind the field itself'
        )
      if 'RouterConfig.' in binding.name and not model.num_experts:
        raise UserError(
          f'{binding.where} has no effect: ModelConfig.num_experts is 0, so '
          'nothing is routed'
        )


def flatten(config: RunConfig) -> dict[str, Any]:
  """Returns every field by its gin name, in sections, sorted in each."""
  return _by_name(
    {
      'RunConfig': config,
      **_model_sections(config.model),
      'OptimizerConfig': config.optimizer,
      'DataConfig': config.data,
      'MeshConfig': config.mesh,
      'EvaluationConfig': config.evaluation,
      'HealthConfig': config.health,
    }
  )


def model_config_text(config: ModelConfig) -> str:
  """Returns gin text that binds every field of a model.

  Those of routers only where there are experts to route to.
  """
  sections = _model_sections(config)
  if not config.num_experts:
    sections = {'ModelConfig': config}
  return _text(_by_name(sections), {})


def _model_sections(config: ModelConfig) -> dict[str, Any]:
  return {
    'ModelConfig': config,
    'encoder/RouterConfig': config.encoder_router,
    'decoder/RouterConfig': config.decoder_router,
  }


def _by_name(sections: Mapping[str, Any]) -> dict[str, Any]:
  return {
    f'{section}.{field}': getattr(part, field)
    for section, part in sections.items()
    for field in sorted(vars(part))
    if not dataclasses.is_dataclass(getattr(part, field))
  }


def operative_config(
  config: RunConfig, missing: Mapping[str, str] | None = None
) -> str:
  """Returns gin text that alone gives exactly `config`: every field is bound.

  Defaults are written out too, so that a run can be repeated after they have
  changed.

  Args:
    config: the run.
    missing: {field: macro} of required values that were not given.
  """
  head = '# Every setting of a run. This file alone gives the same run.\n\n'
  return head + _text(flatten(config), missing or {})


def _text(fields: Mapping[str, Any], missing: Mapping[str, str]) -> str:
  lines: list[str] = []
  section = None
  for name, value in fields.items():
    if section != (section := name.rpartition('.')[0]):
      lines += ['', f'# {section}'] if lines else [f'# {section}']
    if name in missing:
      lines.append(f'{name} = %gin.REQUIRED  # --gin.{missing[name]}=VALUE')
    else:
      lines.append(f'{name} = {value!r}')
  return '\n'.join(lines) + '\n'
