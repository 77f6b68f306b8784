"""The parts of a run, checked, made and restored, that its loop works with."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from st_moe import (
  development,
  evaluate,
  initialize,
  metrics,
  partitioning,
  processes,
)
from st_moe.alarms import Alarms
from st_moe.best import BEST_FILE, BestStep, choose_metric
from st_moe.checkpoint import Checkpointer, steps_in
from st_moe.config import DataConfig, RunConfig
from st_moe.data.pipeline import open_data
from st_moe.evaluate.tasks import TaskEvaluator, TaskScores, check_tasks
from st_moe.model_directory import FoundModel, find_model
from st_moe.preflight import check_run, describe_run
from st_moe.train_state import TrainState
from st_moe.train_step import step_program
from st_moe.workdir import WorkDirectory, write_json

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What an evaluation of a run found; the same in all processes.

  Attributes:
    scores: by name, as they are logged.
    answered: to the development sets of tasks with answers, if there are any.
    is_best: whether no step was better.
  """

  scores: dict[str, float]
  answered: TaskScores | None
  is_best: bool

  def lines(self) -> list[list[str]]:
    """Returns a line for each task."""
    return development.lines(self.answered) if self.answered else []


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
  tasks: TaskEvaluator | None
  best: BestStep
  alarms: Alarms

  def evaluate(self, step: int) -> Evaluation:
    """Scores the parameters and writes the scores.

    Of tasks with answers the answers are kept, if this is the best step.

    Args:
      step: steps done.
    """
    scores, answered = self.evaluator.losses(self.state.params), None
    if self.tasks is not None:
      answered = self.tasks.evaluate(self.state.params)
      scores |= answered.scalars()
    # Those of one process, since they decide what all do next.
    scores = processes.from_leader(scores)
    self.writer.write(step, scores)
    is_best = self.best.add(step, scores)
    wanted = is_best or not self.best.metric
    if answered and wanted and processes.is_leader():
      development.write_answers(self.workdir.path, answered, step)
    return Evaluation(scores, answered, is_best)

  def save(self, step: int, scores: dict[str, float] | None = None) -> None:
    """Saves state, data position and the unfinished log interval.

    Args:
      step: steps done.
      scores: of an evaluation of this very state, if there was one.
    """
    self.writer.flush()
    self.checkpointer.save(
      step,
      self.state,
      data_state=self.batches.get_state(),
      metadata={
        'interval': self.rows,
        'best': self.best.state(),
        'health': self.alarms.state(),
      },
      scores=scores,
    )
    self.write_best()

  def write_best(self) -> None:
    """Writes best.json: the score that decides, and the best so far."""
    if self.best.step is not None and processes.is_leader():
      write_json(self.workdir.path / BEST_FILE, self.best.record())


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


@dataclasses.dataclass(frozen=True)
class _Opened:
  """What a run reads.

  Attributes:
    data: batches, held-out ones too.
    vocabulary: which it is, as DataConfig says it.
    source: whose weights a new run begins with; None: fresh ones.
    tasks: the development sets of its tasks with answers, if it has any.
    fingerprint: of the data and of those.
  """

  data: Any
  vocabulary: str
  source: FoundModel | None
  tasks: TaskEvaluator | None
  fingerprint: dict[str, Any]

  def best_step(self, config: RunConfig) -> BestStep:
    """Returns which step is the best so far: none.

    Raises:
      UserError: evaluations have no such score.
    """
    names = [*evaluate.HELD_OUT_SCORES]
    names += self.tasks.score_names() if self.tasks else []
    return BestStep(
      choose_metric(config.best_metric, names),
      config.early_stopping,
      config.early_stopping_from,
    )


def _open(
  config: RunConfig, workdir: WorkDirectory, mesh: Mesh, *, allow_change: bool
) -> _Opened:
  """Opens what the run reads.

  Raises:
    UserError: when data, model, mesh and weights do not go together.
  """
  # First what takes no time: reading the data may.
  names = check_tasks(config)
  if not names:
    choose_metric(config.best_metric, evaluate.HELD_OUT_SCORES)
  data_config, source = _beginnings(config, workdir)
  if source:
    initialize.check_shapes(config)
  data = open_data(data_config, seed=config.seed, cache_root=None)
  check_run(config, data.vocabulary.vocab_size, mesh)
  if source:
    initialize.check_vocabulary(
      data.fingerprint['vocabulary'], data_config, source
    )
  tasks, fingerprint = None, data.fingerprint
  if names:
    tasks = TaskEvaluator(config, data.vocabulary, mesh)
    fingerprint = fingerprint | {'development': tasks.fingerprint}
  workdir.check_data(fingerprint, allow=allow_change)
  return _Opened(data, data_config.vocabulary, source, tasks, fingerprint)


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
  opened = _open(config, workdir, mesh, allow_change=allow_config_change)
  data, best = opened.data, opened.best_step(config)
  alarms = Alarms(config.health, config.model, workdir.path)
  log.info('building the model')
  program = step_program(config, mesh)  # what cannot be divided is found here
  batches = data.train_batches(
    config.batch_size, process_index=part.index, process_count=part.count
  )
  processes.check_same(opened.fingerprint, 'give every process the same data')
  checkpointer = Checkpointer(
    workdir.checkpoints,
    keep_last=config.keep_last,
    keep_best=config.keep_best if best.metric else 0,
    metric=best.metric,
  )
  # The latest good checkpoint of the run, else given weights, else scratch.
  origin: dict[str, Any] = {}
  rows: list[dict[str, float]] = []
  if checkpointer.latest_step() is not None:
    restored = checkpointer.restore(None, program.abstract)
    state, rows = restored.state, list(restored.metadata['interval'])
    batches.set_state(restored.data_state)
    best.restore(restored.metadata.get('best'), restored.step)
    alarms.restore(restored.metadata.get('health'))
    log.info('resumed at step %d', restored.step)
  elif opened.source:
    begun = initialize.initial_state(config, program, opened.source, mesh)
    state = begun.state
    vocabulary = {'vocabulary': opened.vocabulary}
    origin = {'initial_weights': begun.record | vocabulary}
  else:
    state = program.initial_state()
  workdir.keep_vocabulary(data.vocabulary.spec)
  workdir.record(
    config,
    operative_config=operative_config,
    command=command,
    details={
      'data': opened.fingerprint,
      **describe_run(config, program.shapes, mesh),
      **origin,
    },
  )
  writer = metrics.MetricsWriter(workdir.path, tensorboard=config.tensorboard)
  writer.truncate_after(int(state.step))
  processes.settle()
  trainer = Trainer(
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
    tasks=opened.tasks,
    best=best,
    alarms=alarms,
  )
  trainer.write_best()
  return trainer
