"""From a study, a scale and seeds to runs: which are trained, in which order.

Arms that differ in evaluation only (capacity factor and policy of evaluation)
are one run, trained once and scored once for each of them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from st_moe.bindings import Binding, Resolver, flatten
from st_moe.config import RunConfig
from st_moe.errors import UserError, did_you_mean
from st_moe.gin_files import find, read_bindings, read_file, shown
from st_moe.model_gin import model_bindings
from st_moe.study.declaration import Arm, Study
from st_moe.study.results import result_file

# Fields of RouterConfig that training does not look at.
_EVALUATION_ONLY = (
  'eval_capacity_factor', 'eval_choice_policy', 'eval_choice_threshold',
  'eval_dropless', 'generation_dropless',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
  """A size at which a study is run.

  Attributes:
    files: gin files of model and run.
    settings: macros and fields, after the files.
    text: what it is, for `st_moe study --help` and reports.
  """

  files: tuple[str, ...]
  settings: Mapping[str, Any]
  text: str


_QUIET = {'RunConfig.num_samples': 0, 'RunConfig.tensorboard': False}

SCALES = {
  'tiny': Scale(
    ('models/tiny.gin', 'runs/small.gin'),
    {
      'TASK': 'docstrings',
      'STEPS': 300,
      'RunConfig.eval_every': 300,
      'RunConfig.eval_batches': 50,
      'RunConfig.keep_last': 1,
      'RunConfig.keep_best': 0,
    }
    | _QUIET,
    '2.9 million parameters, 300 steps of 2,048 encoder tokens of docstrings: '
    'about a minute a run on two CPU cores',
  ),
  'small': Scale(
    ('models/base.gin', 'runs/pretrain.gin'),
    {'STEPS': 20_000, 'BATCH_SIZE': 256} | _QUIET,
    '0.7 billion parameters, 20,000 steps of 131,072 encoder tokens',
  ),
  'l': Scale(
    ('models/st_moe_l.gin', 'runs/pretrain.gin'),
    {'STEPS': 100_000} | _QUIET,
    '4.1 billion parameters, 100,000 steps of a million encoder tokens: the '
    "paper's ablations",
  ),
  'xl': Scale(
    ('models/st_moe_xl.gin', 'runs/pretrain.gin'),
    {'STEPS': 20_000} | _QUIET,
    '14.9 billion parameters, 20,000 steps of a million encoder tokens: the '
    "paper's test bed of stability",
  ),
  '32b': Scale(
    ('models/st_moe_32b.gin', 'runs/pretrain.gin'),
    {'STEPS': 100_000} | _QUIET,
    '269 billion parameters, 100,000 steps of a million encoder tokens',
  ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the user chose for all arms.

  Attributes:
    scale: a name of SCALES.
    files: gin files, read after those of the scale.
    flags: bindings of the command line, which win over everything.
    checkpoint: with which arms of a fine-tuning study begin.
    dense_checkpoint: with which its dense arms begin.
  """

  scale: str
  files: tuple[str, ...] = ()
  flags: tuple[Binding, ...] = ()
  checkpoint: str | None = None
  dense_checkpoint: str | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """One training: a seed, and the arms that are scored on its weights.

  Attributes:
    arms: {name: configuration}; the first one is trained.
    seed: of all of them.
  """

  arms: Mapping[str, RunConfig]
  seed: int

  @property
  def name(self) -> str:
    """The arm that is trained."""
    return next(iter(self.arms))

  @property
  def config(self) -> RunConfig:
    return self.arms[self.name]


def find_scale(name: str) -> Scale:
  if name not in SCALES:
    raise UserError(
      f'--scale={name} is none of {", ".join(SCALES)}'
      f'{did_you_mean(name, SCALES)}'
    )
  return SCALES[name]


def _bindings(settings: Mapping[str, Any], where: str) -> list[Binding]:
  return [Binding(name, value, where) for name, value in settings.items()]


def _pretraining(settings: Settings) -> list[Binding]:
  """Returns what all arms of a pretraining study begin with."""
  scale = find_scale(settings.scale)
  files = [find(name) for name in (*scale.files, *settings.files)]
  given = [binding for file in files for binding in read_file(file)]
  return given + _bindings(scale.settings, f'--scale {settings.scale}')


def _finetuning(settings: Settings, *, dense: bool) -> list[Binding]:
  """Returns what arms of a fine-tuning study begin with.

  The model of the checkpoint, with the paper's recipe for such a model. It is
  given: the command leaves arms out whose model is not.
  """
  flag = 'dense_checkpoint' if dense else 'checkpoint'
  path = getattr(settings, flag)
  recipe = f'runs/finetune_{"dense" if dense else "sparse"}.gin'
  given = model_bindings(Path(path))
  for name in (recipe, *settings.files):
    given += read_file(find(name))
  given += _bindings(
    {'RunConfig.initial_checkpoint': path, 'RunConfig.tensorboard': False},
    f'--{flag}',
  )
  return given


def _resolver(
  study: Study, arm: Arm, settings: Settings, seed: int
) -> Resolver:
  """Returns the configuration of an arm, with the places of its settings.

  Later ones win: files of the scale (or the weights' model and the recipe), the
  user's files, settings of the scale, of the study at it, the arm's gin file,
  its settings at the scale, flags.
  """
  find_scale(settings.scale)
  where = shown((study.folder / 'study.toml').resolve())
  if study.recipe == 'finetune':
    given = _finetuning(settings, dense=arm.dense)
  else:
    given = _pretraining(settings)
  if any(flag.name == 'FILES' for flag in settings.flags):
    given.append(Binding('TASK', 'text', '--gin.FILES'))
  given += _bindings(study.scales.get(settings.scale, {}), where)
  for file in arm.files:
    given += read_file(file.resolve())
  given += _bindings(arm.settings.get(settings.scale, {}), where)
  return Resolver(read_bindings([], [*given, *settings.flags], seed))


def configure(
  study: Study, arm: Arm, settings: Settings, seed: int
) -> RunConfig:
  """Returns the configuration of an arm at a scale.

  An arm that carries the optimizer of its weights on counts from their step: it
  is trained for as many steps as the others.

  Raises:
    UserError: with the arm's name.
  """
  try:
    config = _resolver(study, arm, settings, seed).run_config()
  except UserError as e:
    raise UserError(f'arm {arm.name}: {e}') from e
  if config.initial_optimizer == 'carried':
    before = _newest_step(Path(config.initial_checkpoint))
    return dataclasses.replace(config, steps=before + config.steps)
  return config


def steps_to_train(config: RunConfig) -> int:
  """Returns the steps of a run, without those that its weights bring along."""
  if config.initial_optimizer != 'carried':
    return config.steps
  return config.steps - _newest_step(Path(config.initial_checkpoint))


def _newest_step(path: Path) -> int:
  """Returns the step of given weights; 0 where there are none."""
  folder = path if path.name == 'checkpoints' else path / 'checkpoints'
  names = [child.name for child in folder.glob('*') if child.name.isdigit()]
  return max(map(int, names), default=0)


def fingerprint(config: RunConfig) -> str:
  """Returns 16 hexadecimal digits for a configuration without its seed."""
  fields = {k: v for k, v in flatten(config).items() if k != 'RunConfig.seed'}
  text = json.dumps(fields, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_trained(config: RunConfig) -> RunConfig:
  """Returns a configuration with what training does not see at its default."""
  stacks = {}
  for stack in ('encoder_router', 'decoder_router'):
    router = getattr(config.model, stack)
    default = type(router)()
    values = {name: getattr(default, name) for name in _EVALUATION_ONLY}
    stacks[stack] = dataclasses.replace(router, **values)
  model = dataclasses.replace(config.model, **stacks)
  return dataclasses.replace(config, model=model)


def make_grid(
  study: Study, settings: Settings, seeds: Sequence[int]
) -> list[Run]:
  """Returns the runs of a study, all arms with one seed before the next seed.

  Raises:
    UserError: when an arm is no legal configuration, or equals another one.
  """
  arms = study.arms_at(settings.scale)
  if not arms:
    raise UserError(f'{study.name} has no arms at --scale={settings.scale}')
  runs = []
  for seed in seeds:
    configs = {arm.name: configure(study, arm, settings, seed) for arm in arms}
    _check_different(configs)
    trained: dict[RunConfig, dict[str, RunConfig]] = {}
    for name, config in configs.items():
      trained.setdefault(as_trained(config), {})[name] = config
    runs += [Run(group, seed) for group in trained.values()]
  return runs


def _check_different(configs: Mapping[str, RunConfig]) -> None:
  seen: dict[RunConfig, str] = {}
  for name, config in configs.items():
    if config in seen:
      raise UserError(
        f'arms {seen[config]} and {name} are the same configuration; a flag '
        'or a file binds what tells them apart'
      )
    seen[config] = name


def choose(
  runs: Sequence[Run], arms: Sequence[str], shard: str | None
) -> list[Run]:
  """Returns the runs that this process does.

  Args:
    runs: all.
    arms: names; a run that trains one of them is done for all its arms. None
      given: all.
    shard: 'i/n': every n-th run, from i on, which counts from 0.
  """
  known = list(dict.fromkeys(name for run in runs for name in run.arms))
  for arm in arms:
    if arm not in known:
      raise UserError(
        f'--arm={arm} is none of {", ".join(known)}{did_you_mean(arm, known)}'
      )
  chosen = [run for run in runs if not arms or set(arms) & set(run.arms)]
  if shard is None:
    return chosen
  index, slash, count = shard.partition('/')
  if not (slash and index.isdigit() and count.isdigit()):
    raise UserError(f"--shard={shard} is not 'i/n', for example 0/4")
  if int(index) >= int(count):
    raise UserError(
      f"--shard={shard} is not 'i/n' with 0 <= i < n, for example 0/4"
    )
  return chosen[int(index) :: int(count)]


def left_to_do(directory: Path, runs: Sequence[Run]) -> list[Run]:
  """Returns the runs of which a result is missing."""
  return [
    run
    for run in runs
    if not all(
      result_file(directory, arm, run.seed).is_file() for arm in run.arms
    )
  ]
