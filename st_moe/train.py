"""Pretraining: one jitted step on the mesh, and the loop around it.

Restore order: the latest good checkpoint of the work directory, else given
weights (`initial_checkpoint`), else fresh parameters. Evaluation and saving
happen after a step, at multiples of `eval_every` and `checkpoint_every`; the
data position is saved with the state, so that a resumed run sees exactly the
batches it would have seen.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from st_moe import evaluate, initialize, metrics, partitioning, processes
from st_moe.checkpoint import Checkpointer, steps_in
from st_moe.config import DataConfig, RunConfig
from st_moe.data.pipeline import open_data
from st_moe.errors import UserError
from st_moe.experts import choose_backend
from st_moe.model_directory import FoundModel, find_model
from st_moe.report import write_report
from st_moe.routing import num_groups
from st_moe.step_log import StepLog
from st_moe.train_state import (
  AbstractState,
  TrainState,
  parameter_counts,
  trained_parameters,
)
from st_moe.train_step import step_program
from st_moe.workdir import (
  WorkDirectory,
  open_workdir,
  write_json,
)

log = logging.getLogger(__name__)


# Embedding tables have a multiple of this many rows: the hardware's tile, and
# divisible by every usual model axis.
_ROWS = 128


def check_run(config: RunConfig, vocabulary_size: int, mesh: Mesh) -> None:
  """Refuses what cannot be divided or does not fit, before compiling.

  Raises:
    UserError: with both numbers.
  """
  model, shape = config.model, mesh.shape
  if vocabulary_size > model.vocab_size:
    rows = _ROWS * math.ceil(vocabulary_size / _ROWS)
    raise UserError(
      f'the vocabulary has {vocabulary_size} ids, sentinels included, but '
      f'ModelConfig.vocab_size is {model.vocab_size}; set '
      f'--gin.ModelConfig.vocab_size={rows}, or '
      f'make one of at most {model.vocab_size - config.data.extra_ids} pieces'
    )
  parts = partitioning.batch_shards(mesh) * config.microbatches
  if config.batch_size % parts:
    raise UserError(
      f'RunConfig.batch_size {config.batch_size} is not divisible by '
      f'{partitioning.batch_shards(mesh)} data shards x {config.microbatches} '
      f'microbatches = {parts}'
    )
  divisions = [
    ('num_heads', model.num_heads, 'model'),
    ('d_ff', model.d_ff, 'model'),
    ('vocab_size', model.vocab_size, 'model'),
  ]
  if model.num_experts:
    divisions.append(('num_experts', model.num_experts, 'expert'))
    divisions.append(('expert_d_ff', model.expert_d_ff or model.d_ff, 'model'))
  for name, size, axis in divisions:
    if size % shape[axis]:
      raise UserError(
        f'ModelConfig.{name} {size} is not divisible by MeshConfig.{axis} '
        f'{shape[axis]}'
      )


def describe_run(
  config: RunConfig, shapes: AbstractState, mesh: Mesh
) -> dict[str, Any]:
  """Logs and returns what a run is: its size, its mesh, what it chose."""
  device = mesh.devices.flat[0]
  counts = parameter_counts(shapes)
  description: dict[str, Any] = {
    'parameters': counts,
    'mesh': dict(mesh.shape),
    'device': device.device_kind,
    'processes': jax.process_count(),
  }
  log.info(
    'parameters: %s in all, %s in experts',
    f'{counts["total"]:,}',
    f'{counts["expert"]:,}',
  )
  if config.optimizer.trainable != 'all':
    description['trained_parameters'] = trained_parameters(shapes, config)
    log.info(
      'trained: %s of them (OptimizerConfig.trainable %r)',
      f'{description["trained_parameters"]:,}',
      config.optimizer.trainable,
    )
  job = ''
  if jax.process_count() > 1:
    job = f': {jax.process_count()} processes, {mesh.devices.size} devices'
  log.info(
    'mesh: %s on %s%s',
    partitioning.describe(mesh.shape),
    device.device_kind,
    job,
  )
  if config.model.num_experts:
    description['dispatch'] = describe_dispatch(config, mesh)
  if config.checkpoint_every > config.steps:
    log.info(
      'checkpoints: only one, at the end (RunConfig.checkpoint_every %d is '
      'more than the %d steps of this run)',
      config.checkpoint_every,
      config.steps,
    )
  return description


def describe_dispatch(config: RunConfig, mesh: Mesh) -> str:
  """Logs how tokens travel, and why; returns the backend's name."""
  model = config.model
  routers = {'encoder': model.encoder_router, 'decoder': model.decoder_router}
  choose = functools.partial(
    choose_backend,
    model.dispatch,
    platform=mesh.devices.flat[0].platform,
    group_tokens=model.encoder_router.group_size or config.data.inputs_length,
    d_ff=model.expert_d_ff or model.d_ff,
    experts_per_device=model.num_experts // mesh.shape['expert'],
  )
  backend = choose()
  log.info('dispatch: %s (%s)', backend.name, backend.reason)
  rows = config.batch_size // config.microbatches
  for stack, router in routers.items():
    length = config.data.lengths[stack]
    tokens, size = rows * length, router.group_size or length
    groups = num_groups(tokens, size, partitioning.batch_shards(mesh))
    log.info(
      'routing in the %s: %d groups of %d tokens',
      stack,
      groups,
      tokens // groups,
    )
  for stack, router in routers.items():
    if router.eval_dropless and backend.name != 'ragged':
      evaluation = choose(dropless=True)
      log.info(
        'dispatch of the %s in evaluation: %s (%s)',
        stack,
        evaluation.name,
        evaluation.reason,
      )
  return backend.name


@dataclasses.dataclass
class Trainer:
  """The parts of a run, made by `start`, that the loop works with."""

  config: RunConfig
  workdir: WorkDirectory
  data: Any
  mesh: Mesh
  state: TrainState
  checkpointer: Checkpointer
  writer: metrics.MetricsWriter
  batches: Any
  rows: list[dict[str, float]]
  train_step: Callable
  evaluator: evaluate.Evaluator

  def save(self, step: int, scores: dict[str, float] | None = None) -> None:
    """Saves state, data position and the unfinished log interval."""
    self.writer.flush()
    self.checkpointer.save(
      step,
      self.state,
      data_state=self.batches.get_state(),
      metadata={'interval': self.rows},
      metrics=scores,
    )


def _beginnings(
  config: RunConfig, workdir: WorkDirectory
) -> tuple[DataConfig, FoundModel | None]:
  """Returns what to read, and whose weights a run begins with, if any."""
  data_config = workdir.data_config(config.data)
  if steps_in(workdir.checkpoints):
    if config.initial_checkpoint:  # which may be gone by now
      own = find_model(workdir.path)
      data_config = initialize.with_vocabulary(data_config, own)
    return data_config, None
  source = initialize.find_source(config)
  if source:
    data_config = initialize.with_vocabulary(data_config, source)
  return data_config, source


def start(
  config: RunConfig,
  workdir: WorkDirectory,
  *,
  operative_config: str,
  command: list[str],
  allow_config_change: bool,
) -> Trainer:
  """Checks everything, restores or initializes, then writes run.json."""
  mesh = partitioning.make_mesh(config.mesh)
  processes.check_joined()
  part = partitioning.batch_part(mesh)
  data_config, source = _beginnings(config, workdir)
  data = open_data(data_config, seed=config.seed, cache_root=None)
  check_run(config, data.vocabulary.vocab_size, mesh)
  workdir.check_data(data.fingerprint, allow=allow_config_change)
  if source:
    initialize.check_vocabulary(
      data.fingerprint['vocabulary'], data_config, source
    )

  log.info('building the model')
  program = step_program(config, mesh)  # what cannot be divided is found here

  batches = data.train_batches(
    config.batch_size, process_index=part.index, process_count=part.count
  )
  processes.check_same(data.fingerprint, 'give every process the same data')
  checkpointer = Checkpointer(
    workdir.checkpoints,
    keep_last=config.keep_last,
    keep_best=config.keep_best,
  )
  # Restore order: 1. the work directory's latest good checkpoint, 2. given
  # weights, 3. scratch.
  origin: dict[str, Any] = {}
  rows: list[dict[str, float]] = []
  if checkpointer.latest_step() is not None:
    restored = checkpointer.restore(None, program.abstract)
    state = restored.state
    batches.set_state(restored.data_state)
    rows = list(restored.metadata['interval'])
    log.info('resumed at step %d', restored.step)
  elif source:
    begun = initialize.initial_state(config, program, source, mesh)
    state = begun.state
    vocabulary = {'vocabulary': data_config.vocabulary}
    origin = {'initial_weights': begun.record | vocabulary}
  else:
    state = program.initial_state()
  workdir.keep_vocabulary(data.vocabulary.spec)
  workdir.record(
    config,
    operative_config=operative_config,
    command=command,
    details={
      'data': data.fingerprint,
      **describe_run(config, program.shapes, mesh),
      **origin,
    },
  )
  writer = metrics.MetricsWriter(workdir.path, tensorboard=config.tensorboard)
  writer.truncate_after(int(state.step))
  processes.settle()
  return Trainer(
    config=config,
    workdir=workdir,
    data=data,
    mesh=mesh,
    state=state,
    checkpointer=checkpointer,
    writer=writer,
    batches=batches,
    rows=rows,
    train_step=program.step,
    evaluator=evaluate.Evaluator(config, data, mesh),
  )


def run_steps(
  trainer: Trainer, progress: metrics.Progress | None = None
) -> str | None:
  """Trains to the last step; returns the signal that stopped it, if one did.

  Order at a step: train, log, evaluate, save. The data iterator moves only
  after the save of the step before.
  """
  config = trainer.config
  step = saved = int(trainer.state.step)
  scores = None
  with (
    processes.StopSignals() as signals,
    partitioning.use_mesh(trainer.mesh, config.mesh),
    progress or metrics.Progress(config.steps, start=step) as progress,
  ):
    step_log = StepLog(config, trainer.writer, progress, trainer.rows)
    while step < config.steps and not signals.requested(step):
      begin = time.monotonic()
      batch = partitioning.shard_batch(next(trainer.batches), trainer.mesh)
      waited = time.monotonic() - begin
      trainer.state, result = trainer.train_step(trainer.state, batch)
      step += 1
      step_log.add(step, result, waited)
      last = step == config.steps
      if step % config.eval_every == 0 or last:
        step_log.pause()
        scores = trainer.evaluator.losses(trainer.state.params)
        trainer.writer.write(step, scores)
        progress.note(step, scores)
      if step % config.checkpoint_every == 0 or last:
        step_log.pause()
        trainer.save(step, scores)
        scores = None
        saved = step
    if signals.received and saved != step:
      step_log.pause()
      trainer.save(step)
    trainer.checkpointer.wait()
  return signals.received


def pretrain(
  config: RunConfig,
  workdir: Path,
  *,
  operative_config: str,
  command: list[str],
  resume_command: str,
  allow_config_change: bool = False,
) -> None:
  """Trains a model in `workdir`, from scratch or from where it stopped.

  Args:
    config: the run.
    workdir: its directory; created when absent.
    operative_config: gin text that describes the same run by itself.
    command: what the user typed, for run.json.
    resume_command: what to type to go on, shown when the run is stopped.
    allow_config_change: go on although configuration or data changed.

  Raises:
    UserError: before anything is compiled or overwritten.
    RunStopped: when too many steps in a row are not finite.
  """
  directory = open_workdir(workdir)
  try:
    directory.check_configuration(config, allow=allow_config_change)
    summary = directory.finished(config.steps)
    if summary is not None:
      print(
        f'{workdir}: this run finished at step {config.steps}; to train on:\n'
        f'  {resume_command} --gin.RunConfig.steps={2 * config.steps} '
        '--allow_config_change'
      )
      print_summary(summary)
      if processes.is_leader():
        print(f'report: {write_report(workdir)}', flush=True)
      return
    trainer = start(
      config,
      directory,
      operative_config=operative_config,
      command=command,
      allow_config_change=allow_config_change,
    )
    stopped = run_steps(trainer)
    if stopped:
      saved = trainer.checkpointer.latest_step()  # a failed save only warns
      print(f'{stopped}: saved step {saved}; resume with:')
      print(f'  {resume_command}', flush=True)
    else:
      finish(trainer)
    trainer.writer.close()
    trainer.checkpointer.close()
  finally:
    directory.close()


def finish(trainer: Trainer) -> None:
  """Writes summary.json and the report; prints what was learned.

  All processes score; the first counts, writes and prints.
  """
  config, data = trainer.config, trainer.data
  params = trainer.state.params
  log.info('scoring held-out text, and a unigram distribution to compare')
  summary: dict[str, Any] = {'step': int(trainer.state.step)}
  summary |= trainer.evaluator.losses(params)
  log.info('filling masked sentences')
  samples = evaluate.fill_sentences(config, params, data, config.num_samples)
  if not processes.is_leader():
    return
  begin = time.monotonic()
  counts, tokens = evaluate.unigram_counts(data, config, config.unigram_batches)
  summary['data_tokens_per_second'] = tokens / (time.monotonic() - begin)
  summary['eval/unigram_neg_log_perplexity'] = (
    evaluate.unigram_neg_log_perplexity(counts, trainer.evaluator)
  )
  speeds = metrics.read_column(trainer.workdir.path, 'tokens_per_second')
  if speeds:
    summary['tokens_per_second'] = float(np.median(speeds))
  summary['samples'] = [dataclasses.asdict(sample) for sample in samples]
  write_json(trainer.workdir.summary_file, summary)
  trainer.writer.flush()
  print_summary(summary)
  print(f'report: {write_report(trainer.workdir.path)}', flush=True)


def print_summary(summary: dict[str, Any]) -> None:
  """Prints the end of a run: samples, speed, and the score to beat."""
  if summary['samples']:
    print('masked [text], and what the model put there, - for nothing:')
  for sample in summary['samples']:
    print(f'  text:  {sample["text"]}')
    print(f'  model: {sample["model"]}\n')
  score = summary['eval/neg_log_perplexity']
  unigram = summary['eval/unigram_neg_log_perplexity']
  word = 'better' if score >= unigram else 'worse'
  print('held-out negative log perplexity of text tokens, nats per token:')
  print(f'  model   {score:.4f}')
  print(f'  unigram {unigram:.4f}   ({word} by {abs(score - unigram):.2f})')
  feed = summary['data_tokens_per_second']
  if 'tokens_per_second' in summary:
    used = summary['tokens_per_second']
    print(
      f'training used {used:,.0f} tokens/s; the data path feeds '
      f'{feed:,.0f} tokens/s ({feed / used:.1f}x)'
    )
