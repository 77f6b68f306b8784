"""`st_moe evaluate`: a checkpoint's losses, or its answers to tasks."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from st_moe import partitioning, processes
from st_moe.best import Step
from st_moe.checkpoint import RestoredParams, find_steps, restore_params
from st_moe.config import RunConfig, to_dict
from st_moe.data.pipeline import check_names, open_data
from st_moe.data.vocabularies import load_vocabulary
from st_moe.errors import UserError
from st_moe.evaluate import outputs
from st_moe.evaluate.held_out import Evaluator
from st_moe.evaluate.tasks import TaskEvaluator, named_tasks
from st_moe.initialize import check_size, check_vocabulary, with_own_vocabulary
from st_moe.model_directory import FoundModel, find_model
from st_moe.train_state import abstract_state, state_shardings
from st_moe.transformer import EncoderDecoder

log = logging.getLogger(__name__)


def evaluate(
  config: RunConfig,
  workdir: Path,
  *,
  step: Step,
  output: Path | None = None,
  submission: Path | None = None,
) -> None:
  """Scores a checkpoint of a run; prints the scores and keeps them as JSON.

  Held-out text is scored by losses, tasks with answers by their metrics.

  Args:
    config: the run's, perhaps with other data.
    workdir: of the run, or a model directory; one line is added to
      `evaluations.jsonl`.
    step: of the checkpoint: a number, 'best', or None for the newest.
    output: folder for the answers to every example; None: in `workdir`.
    submission: folder for SuperGLUE's submission files, if any.

  Raises:
    UserError: no such checkpoint, or data that does not fit the model.
  """
  check_names(config.data.task)
  mesh = partitioning.make_mesh(config.mesh)
  processes.check_joined()
  find_steps(workdir, step)
  model = find_model(workdir)
  names = named_tasks(config)
  if names:
    where = outputs.Folders(workdir, output, submission)
    _evaluate_tasks(config, where, model, mesh, step)
  elif output or submission:
    raise UserError(
      f'DataConfig.task {config.data.task!r} has no answers, which --output '
      'and --submission are for'
    )
  else:
    _evaluate_text(config, workdir, model, mesh, step)


def _restore(
  config: RunConfig, workdir: Path, mesh: Mesh, step: Step
) -> RestoredParams:
  """Reads the parameters of a checkpoint onto the mesh."""
  shapes = abstract_state(config, EncoderDecoder(config.model))
  shardings = state_shardings(shapes, mesh, config.mesh)
  abstract = shapes.with_shardings(shardings)
  return restore_params(workdir, step, abstract.params)


def _add(workdir: Path, record: dict[str, Any]) -> None:
  path = workdir / 'evaluations.jsonl'
  with path.open('a', encoding='utf-8') as file:
    file.write(json.dumps(record, sort_keys=True) + '\n')
  print(f'added to {path}')


def _evaluate_text(
  config: RunConfig,
  workdir: Path,
  model: FoundModel,
  mesh: Mesh,
  step: Step,
) -> None:
  data_config = with_own_vocabulary(config.data, model)
  if data_config.vocabulary != 'auto':  # before text is opened
    own = load_vocabulary(data_config.vocabulary, data_config.extra_ids)
    check_size(own, data_config, config.model)
    check_vocabulary(own.fingerprint, config.data, model)
  data = open_data(data_config, seed=config.seed, cache_root=None)
  check_vocabulary(data.fingerprint['vocabulary'], config.data, model)
  processes.check_same(data.fingerprint, 'give every process the same data')
  processes.settle()
  log.info(
    'restoring; scoring rows of %d inputs and %d targets',
    *config.data.lengths.values(),
  )
  restored = _restore(config, workdir, mesh, step)
  scores: dict[str, Any] = {'step': restored.step, 'task': config.data.task}
  scores |= Evaluator(config, data, mesh).losses(restored.params)
  if not processes.is_leader():
    return
  record = scores | {
    'data': data.fingerprint,
    'files': config.data.files,
    'eval_files': config.data.eval_files,
    'split': config.data.eval_split,
    'eval_batches': config.eval_batches,
    'batch_size': config.batch_size,
  }
  for name, value in scores.items():
    if isinstance(value, float):
      value = f'{value:.0f}' if name == 'eval/text_tokens' else f'{value:.4f}'
    print(f'{name:36} {value}')
  _add(workdir, record)


def _evaluate_tasks(
  config: RunConfig,
  folders: outputs.Folders,
  model: FoundModel,
  mesh: Mesh,
  step: Step,
) -> None:
  names = ','.join(named_tasks(config))
  # Neither text nor a cache is opened: their vocabularies do not matter.
  data = dataclasses.replace(config.data, task=names)
  data = with_own_vocabulary(data, model)
  vocabulary = load_vocabulary(data.vocabulary, data.extra_ids)
  check_vocabulary(vocabulary.fingerprint, data, model)
  check_size(vocabulary, data, config.model)
  config = dataclasses.replace(config, data=data)
  evaluator = TaskEvaluator(config, vocabulary, mesh)
  if processes.is_leader():
    folders.check(evaluator.examples)
  processes.check_same(
    evaluator.fingerprint, 'give every process the same files'
  )
  processes.settle()
  log.info('restoring')
  restored = _restore(config, folders.workdir, mesh, step)
  scores = evaluator.evaluate(restored.params)
  if not processes.is_leader():
    return
  record = outputs.record(scores, restored.step) | {
    'task': names,
    'task_dir': data.task_dir,
    'data': evaluator.fingerprint,
    'evaluation': to_dict(config.evaluation)
    | {'batch_size': evaluator.batch_size},
    'inputs_length': data.inputs_length,
    'targets_length': data.targets_length,
  }
  outputs.print_scores(scores, restored.step, folders.workdir)
  folders.write(scores, record)
  _add(folders.workdir, record)
