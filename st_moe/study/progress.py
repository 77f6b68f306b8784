"""How a whole grid is doing: bars on a terminal, elsewhere a line a run."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from st_moe.metrics import describe, duration
from st_moe.study.grid import Run, steps_to_train
from st_moe.study.results import Result

_SECONDS_BETWEEN_LINES = 60.0  # of one run, where there are no bars
# What is shown of a run that is done, as far as it has it.
_SHOWN = {
  'peak/eval/score': 'highest score {:.2f}',
  'eval/neg_log_perplexity_all_targets': 'negative log perplexity {:.4f}',
}


class GridProgress:
  """Counts the steps of all runs that are to be done.

  On a terminal two bars: all steps, and those of the run. Elsewhere a line when
  a run begins and when it ends, and every minute between.
  """

  def __init__(
    self, runs: int, steps: Sequence[int], console: Console | None = None
  ):
    """Begins.

    Args:
      runs: in the whole grid.
      steps: of each run that is to be done, in order.
      console: where to show; None: standard output.
    """
    self._runs = runs
    self._done = runs - len(steps)
    self._left = sum(steps)
    self._trained = 0  # steps that were trained here
    self._began = self._told = time.monotonic()
    self._console = console or Console(highlight=False, soft_wrap=True)
    self._bars = Progress(
      TextColumn('{task.description}'),
      BarColumn(),
      MofNCompleteColumn(),
      TimeRemainingColumn(),
      TextColumn('{task.fields[state]}'),
      console=self._console,
      disable=not self._console.is_terminal,
    )

  def __enter__(self) -> 'GridProgress':
    self._bars.start()
    self._all = self._bars.add_task('all runs', total=self._left, state='')
    self._one = self._bars.add_task('', total=1, state='', visible=False)
    return self

  def __exit__(self, *error) -> None:
    self._bars.stop()

  def run(self, run: Run, state: Any) -> '_RunProgress':
    """Returns what the training loop tells its steps to."""
    title = f'run {self._done + 1}/{self._runs}  {run.name}  seed {run.seed}'
    done = int(state.step) - (run.config.steps - steps_to_train(run.config))
    self._left -= done
    self._bars.update(self._all, advance=done)
    return _RunProgress(self, title, int(state.step), run.config.steps)

  def begin_run(self, title: str, start: int, total: int) -> None:
    self._bars.reset(
      self._one, total=total, completed=start, description=title, visible=True,
      state='compiling',
    )  # fmt: skip
    if not self._console.is_terminal:
      going_on = f' (from step {start})' if start else ''
      self._print(f'{title}{going_on}')

  def steps(self, count: int, state: str) -> None:
    """Counts steps of the present run."""
    self._left -= count
    self._trained += count
    self._bars.update(self._all, advance=count)
    self._bars.update(self._one, advance=count, state=state)

  def tell(self, line: str) -> None:
    """Prints how far a run is, where there are no bars, each minute."""
    late = time.monotonic() - self._told >= _SECONDS_BETWEEN_LINES
    if late and not self._console.is_terminal:
      self._print(line)

  def finished(self, run: Run, results: Sequence[Result]) -> None:
    """Prints what a run came to, and what is left."""
    self._done += 1
    for result in results:
      parts = [f'  {result.arm}  seed {result.seed}']
      parts += [
        form.format(result.values[name])
        for name, form in _SHOWN.items()
        if name in result.values
      ]
      if not result.stable:
        parts.append(f'unstable: {result.reason}')
      self._print('  '.join(parts))
    if self._trained and self._left:
      pace = (time.monotonic() - self._began) / self._trained
      self._print(
        f'  {self._done} of {self._runs} runs done, '
        f'{duration(pace * self._left)} left'
      )

  def _print(self, line: str) -> None:
    self._console.print(line)
    self._console.file.flush()
    self._told = time.monotonic()


class _RunProgress:
  """The steps of one run, for the training loop; as `metrics.Progress`."""

  def __init__(self, grid: GridProgress, title: str, start: int, total: int):
    self._grid, self._title = grid, title
    self._step, self._total = start, total

  def __enter__(self) -> '_RunProgress':
    self._grid.begin_run(self._title, self._step, self._total)
    return self

  def __exit__(self, *error) -> None:
    """The bars stay; a run that stopped itself leaves the rest out."""
    left = self._total - self._step
    if error and error[0] is not None and left:
      self._grid.steps(left, '')

  def begin(self, step: int) -> None:
    """The loop has compiled, or scored, or saved."""

  def update(
    self, step: int, scalars: dict[str, float], health: Any = None
  ) -> None:
    count, self._step = step - self._step, step
    state = '  '.join(describe(scalars)[:1])
    self._grid.tell(f'  step {step} of {self._total}  {state}')
    self._grid.steps(count, state)

  def note(
    self, step: int, scores: dict[str, float], lines: Sequence[Any] = ()
  ) -> None:
    """Scores within a run are in its metrics.jsonl."""
