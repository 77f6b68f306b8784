"""The training loop: one jitted step on the mesh, evaluations, checkpoints.

Evaluation and saving happen after a step, at multiples of `eval_every` and
`checkpoint_every`, and whenever an evaluation is the best so far; the data
position is saved with the state, so that a resumed run sees exactly the batches
it would have seen.
"""

import time
from pathlib import Path

from st_moe import metrics, partitioning, processes
from st_moe.closing import finish, show_finished
from st_moe.config import RunConfig
from st_moe.step_log import StepLog
from st_moe.trainer import Trainer, start
from st_moe.workdir import open_workdir


def run_steps(
  trainer: Trainer, progress: metrics.Progress | None = None
) -> str | None:
  """Trains to the end; returns the signal that stopped it, if one did.

  The end is the last step, or an evaluation with which patience is over.
  Order at a step: train, log, evaluate, save. The data iterator moves only
  after the save of the step before.

  Args:
    trainer: from `start`.
    progress: where to show it; None: by itself.
  """
  config, best = trainer.config, trainer.best
  step = saved = int(trainer.state.step)
  with (
    processes.StopSignals() as signals,
    partitioning.use_mesh(trainer.mesh, config.mesh),
    progress or metrics.Progress(config.steps, start=step) as progress,
  ):
    step_log = StepLog(
      config, trainer.writer, progress, trainer.rows, trainer.alarms
    )
    while step < config.steps and not best.over and not signals.requested(step):
      begin = time.monotonic()
      rows = next(trainer.batches)
      batch = partitioning.shard_batch(rows, trainer.mesh)
      waited = time.monotonic() - begin
      trainer.state, result = trainer.train_step(trainer.state, batch)
      step += 1
      step_log.add(step, result, waited, rows)
      last, found = step == config.steps, None
      if step % config.eval_every == 0 or last:
        step_log.pause()
        found = trainer.evaluate(step)
        progress.note(step, found.scores, found.lines())
      is_kept = found and found.is_best and config.keep_best
      if step % config.checkpoint_every == 0 or last or best.over or is_kept:
        step_log.pause()
        trainer.save(step, found and found.scores)
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
    summary = directory.finished(
      config.steps, config.early_stopping, config.early_stopping_from
    )
    if summary is not None:
      show_finished(summary, config, workdir, resume_command)
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
    processes.keep_to_the_end(trainer.batches)
  finally:
    directory.close()
