"""The runner: trains what has no result yet, scores it, writes results.

Training is `trainer.start` and `train.run_steps`, in a work directory for each
run (`DIR/runs/ARM/seed_N`), which goes on from its last checkpoint. Compiled
programs are kept in `DIR/compiled`: runs that differ in their seed alone share
one, and a study that is started again compiles nothing twice.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from st_moe import evaluate, train
from st_moe.bindings import operative_config
from st_moe.errors import RunStopped
from st_moe.metrics import read_metrics
from st_moe.study import results
from st_moe.study.declaration import METRICS
from st_moe.study.grid import Run, fingerprint, left_to_do, steps_to_train
from st_moe.study.progress import GridProgress
from st_moe.study.results import Result
from st_moe.trainer import start
from st_moe.workdir import open_workdir, versions

_HISTORY = 'step', 'cross_entropy', 'router_z_loss'


def run_grid(
  directory: Path,
  runs: Sequence[Run],
  *,
  metrics: set[str],
  command: list[str],
) -> str | None:
  """Trains and scores runs; returns the signal that stopped it, if one did.

  Args:
    directory: of the study.
    runs: to do; those with results are passed over.
    metrics: names of METRICS that are asked for.
    command: what the user typed, for run.json.
  """
  _keep_programs(directory / 'compiled')
  todo = left_to_do(directory, runs)
  timed = any(not METRICS[name].repeats for name in metrics)
  logging.getLogger('st_moe').setLevel(logging.WARNING)
  steps = [steps_to_train(run.config) for run in todo]
  with GridProgress(len(runs), steps) as progress:
    for run in todo:
      done = _execute(directory, run, progress, command, timed)
      if isinstance(done, str):
        return done
      for result in done:
        results.write_result(directory, result)
      progress.finished(run, done)
  return None


def _keep_programs(folder: Path) -> None:
  """Keeps compiled programs on disk, unless the user keeps them elsewhere."""
  if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return
  jax.config.update('jax_compilation_cache_dir', str(folder.resolve()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


def _execute(
  directory: Path,
  run: Run,
  progress: GridProgress,
  command: list[str],
  timed: bool,
) -> list[Result] | str:
  """Trains one run to its end; returns a result for each arm, or a signal."""
  path = directory / 'runs' / run.name / f'seed_{run.seed}'
  workdir = open_workdir(path)
  trainer, stopped = None, ''
  try:
    workdir.check_configuration(run.config, allow=False)
    trainer = start(
      run.config,
      workdir,
      operative_config=operative_config(run.config),
      command=command,
      allow_config_change=False,
    )
    try:
      signal = train.run_steps(trainer, progress.run(run, trainer.state))
      if signal:
        return signal
    except RunStopped as e:
      stopped = str(e).partition(';')[0]
    trainer.writer.flush()
    return _results(run, trainer, read_metrics(path), stopped, timed)
  finally:
    if trainer is not None:
      trainer.writer.close()
      trainer.checkpointer.close()
    workdir.close()


def _results(
  run: Run,
  trainer: Any,
  rows: list[dict[str, Any]],
  stopped: str,
  timed: bool,
) -> list[Result]:
  """Returns what a run says of each of its arms."""
  logged = [row for row in rows if 'cross_entropy' in row]
  history = {name: [] for name in _HISTORY}
  for row in logged:
    history['step'].append(row['step'])
    history['cross_entropy'].append(row['cross_entropy'])
    history['router_z_loss'].append(results.mean_over_layers(row, 'z_loss'))
  reason = stopped or results.instability(
    history['step'],
    history['cross_entropy'],
    int(logged[-1]['skipped_steps']),
    steps_to_train(run.config),
  )
  common = dict(
    seed=run.seed,
    data=_hash(trainer.data.fingerprint),
    stable=not reason,
    reason=reason,
    step=int(rows[-1]['step']),
    history=history,
    made_by=_made_by(trainer),
  )
  statistics = {} if stopped else _statistics(rows, logged, timed)
  return [
    Result(
      arm=arm,
      configuration=fingerprint(config),
      values={}
      if stopped
      else statistics | _scores(config, run, trainer, rows),
      **common,
    )
    for arm, config in run.arms.items()
  ]


def _statistics(
  rows: list[dict[str, Any]], logged: list[dict[str, Any]], timed: bool
) -> dict[str, float]:
  """Returns what the log says of a run at its end, and at its best."""
  last = logged[-1]
  scores = [row['eval/score'] for row in rows if 'eval/score' in row]
  values = {'train/cross_entropy': last['cross_entropy']}
  values['router/z_loss'] = results.mean_over_layers(last, 'z_loss')
  values['router/fraction_dropped'] = last.get('router/fraction_dropped')
  if scores:
    values['peak/eval/score'] = max(scores)
  if timed:
    seconds = [
      row['tokens'] / row['tokens_per_second']
      for row in logged
      if row.get('tokens_per_second')
    ]
    values['seconds_per_step'] = float(np.median(seconds)) if seconds else None
  return {name: value for name, value in values.items() if value is not None}


def _scores(
  config: Any, run: Run, trainer: Any, rows: list[dict[str, Any]]
) -> dict[str, float]:
  """Returns held-out scores of the last weights, as an arm evaluates them."""
  if config == run.config:  # the loop has scored them
    scores = {k: v for k, v in rows[-1].items() if k.startswith('eval/')}
  else:
    evaluator = evaluate.Evaluator(config, trainer.data, trainer.mesh)
    scores = evaluator.losses(trainer.state.params)
  return {
    name: value
    for name, value in scores.items()
    if value is not None and math.isfinite(value)
  }


def _hash(value: Any) -> str:
  text = json.dumps(value, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _made_by(trainer: Any) -> dict[str, str]:
  device = trainer.mesh.devices.flat[0]
  packages = versions()
  return {
    'device': f'{trainer.mesh.devices.size} x {device.device_kind}',
    **{name: packages[name] for name in ('python', 'jax', 'numpy')},
  }
