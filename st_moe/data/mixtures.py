"""Mixtures of tasks: `TASK = 'docstrings:1,text:3'`, `TASK = 'superglue'`.

Rates are relative numbers of examples, as seqio's. mC4 is a mixture of its
languages, sampled with the exponent of mT5 (Xue et al. 2021, section 3.1):
p(language) is proportional to |language| ** 0.3. Tasks with answers are drawn
in proportion to their examples, counted up to 65,536 (ST-MoE, section 6.1). A
mixture of your own can also be registered with seqio and named as the task.
"""

import dataclasses
from collections.abc import Sequence

import seqio
import tensorflow_datasets as tfds

from st_moe.config import DataConfig
from st_moe.data.downstream import catalog
from st_moe.data.prepared import tfds_version
from st_moe.data.sources import C4_JSON_INSTEAD, SUFFIXES
from st_moe.data.tasks import check_name
from st_moe.errors import UserError

_MC4_EXPONENT = 0.3
_MC4_DATASET = 'c4/multilingual'
_VALIDATION = '-validation'


@dataclasses.dataclass(frozen=True)
class Part:
  """A task of a mixture and its relative number of examples."""

  name: str
  rate: float


def parse(config: DataConfig) -> tuple[Part, ...]:
  """Reads `config.task`: one name, or names with rates, 'a:1,b:0.5'.

  Raises:
    UserError: an unknown task, a broken rate, a task named twice, two tasks
      that read `files`, or `files` that no task reads.
  """
  parts = tuple(
    part
    for name, rate in catalog.split_rates(config.task)
    for part in _parts(name, rate, config)
  )
  names = [part.name for part in parts]
  for name in names:
    check_name(name)
    if names.count(name) > 1:
      raise UserError(f'task {config.task!r} names {name!r} twice')
  readers = [name for name in names if name in SUFFIXES]
  if len(readers) > 1:
    raise UserError(
      f'{" and ".join(readers)} in task {config.task!r} would both read '
      'DataConfig.files: keep one of them'
    )
  if not readers and (config.files or config.eval_files):
    raise UserError(
      f'DataConfig.files is set but task {config.task!r} reads no files; set '
      "task = 'text' or 'c4_json'"
    )
  return _with_languages(parts, config)


def _parts(name: str, rate: float | None, config: DataConfig) -> list[Part]:
  """Returns a task, or the tasks of a mixture, with the numbers they mix in."""
  if not catalog.is_answer_task(name):
    return [Part(name, 1.0 if rate is None else rate)]
  most = config.max_examples_per_task if catalog.is_capped(name) else None
  sizes = {task: _size(task, most, config) for task in catalog.members(name)}
  scale = 1.0 if rate is None else rate / sum(sizes.values())
  return [Part(task, size * scale) for task, size in sizes.items()]


def _size(task: str, most: int | None, config: DataConfig) -> int:
  """Returns for how many examples a task counts.

  Those to train on; held-out ones of a task that is only scored.
  """
  split = catalog.splits(task, config)[0]
  count = len(catalog.load_examples(task, split, config))
  return count if most is None else min(count, most)


def _with_languages(
  parts: tuple[Part, ...], config: DataConfig
) -> tuple[Part, ...]:
  """Puts all languages in the place of 'mc4'."""
  found: list[Part] = []
  for part in parts:
    found += _mc4_parts(part.rate, config) if part.name == 'mc4' else [part]
  return tuple(found)


def _mc4_parts(rate: float, config: DataConfig) -> list[Part]:
  """Returns every prepared language of mC4; the rates sum to `rate`."""
  version = tfds_version('mc4', _MC4_DATASET, config, C4_JSON_INSTEAD)
  builder = tfds.builder(
    f'{_MC4_DATASET}:{version}', data_dir=config.tfds_data_dir
  )
  splits = builder.info.splits
  shares = {
    language: splits[language].num_examples ** _MC4_EXPONENT
    for language in sorted(splits)
    if f'{language}{_VALIDATION}' in splits
  }
  if not shares:
    raise UserError(
      f"task 'mc4': {_MC4_DATASET}:{version} has no language with a "
      f'validation split (it has {", ".join(splits)})'
    )
  total = sum(shares.values())
  return [
    Part(f'mc4.{language}', rate * share / total)
    for language, share in shares.items()
  ]


def make_mixture(
  name: str,
  parts: Sequence[Part],
  providers: Sequence[seqio.Task | seqio.Mixture],
) -> seqio.Task | seqio.Mixture:
  """Mixes tasks at their rates; one task is itself.

  Raises:
    UserError: the tasks have different features or vocabularies.
  """
  if len(providers) == 1:
    return providers[0]
  for part, provider in zip(parts, providers, strict=True):
    if _vocabularies(provider) != _vocabularies(providers[0]):
      raise UserError(
        f'task {part.name!r} in {name!r} has other features or another '
        f'vocabulary than {parts[0].name!r}; the tasks of a mixture share both'
      )
  rates = [part.rate for part in parts]
  return seqio.Mixture(name, list(zip(providers, rates, strict=True)))


def _vocabularies(
  provider: seqio.Task | seqio.Mixture,
) -> dict[str, seqio.Vocabulary]:
  features = provider.output_features
  return {name: feature.vocabulary for name, feature in features.items()}
