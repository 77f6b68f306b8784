"""The end of a run: what it has learned, as JSON, in words, as a report."""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from st_moe import development, evaluate, metrics, processes
from st_moe.config import RunConfig
from st_moe.report import write_report
from st_moe.trainer import Trainer
from st_moe.workdir import write_json

log = logging.getLogger(__name__)


def finish(trainer: Trainer) -> None:
  """Writes summary.json and the report; prints what was learned.

  All processes score; the first counts, writes and prints.
  """
  config, data = trainer.config, trainer.data
  params = trainer.state.params
  log.info('scoring held-out text')
  summary: dict[str, Any] = {'step': int(trainer.state.step)}
  summary |= _course(trainer)
  summary |= trainer.evaluator.losses(params)
  samples = []
  if config.num_samples:
    log.info('filling masked sentences')
    samples = evaluate.fill_sentences(config, params, data, config.num_samples)
  if not processes.is_leader():
    return
  if trainer.tasks is not None:
    # Those of the best step, which may be from before an interruption.
    summary['development'] = development.read_scores(trainer.workdir.path)
  else:
    summary |= _unigram(trainer)
  speeds = metrics.read_column(trainer.workdir.path, 'tokens_per_second')
  if speeds:
    summary['tokens_per_second'] = float(np.median(speeds))
  summary['samples'] = [dataclasses.asdict(sample) for sample in samples]
  write_json(trainer.workdir.summary_file, summary)
  trainer.writer.flush()
  print_summary(summary, trainer.workdir.path)
  print(f'report: {write_report(trainer.workdir.path)}', flush=True)


def _unigram(trainer: Trainer) -> dict[str, float]:
  """Returns the score of the unigram distribution, a bar for text models."""
  log.info('counting a unigram distribution to compare')
  config, data = trainer.config, trainer.data
  begin = time.monotonic()
  counts, tokens = evaluate.unigram_counts(data, config, config.unigram_batches)
  seconds = time.monotonic() - begin
  score = evaluate.unigram_neg_log_perplexity(counts, trainer.evaluator)
  return {
    'data_tokens_per_second': tokens / seconds,
    'eval/unigram_neg_log_perplexity': score,
  }


def _course(trainer: Trainer) -> dict[str, Any]:
  """Returns what the summary says of the best step and of an early end."""
  best, found = trainer.best, {}
  if best.step is not None:
    found['best'] = best.record()
  if best.over and int(trainer.state.step) < trainer.config.steps:
    found['stopped_early'] = {
      'early_stopping': best.patience,
      'why': best.why(),
    }
  return found


def show_finished(
  summary: dict[str, Any],
  config: RunConfig,
  workdir: Path,
  resume_command: str,
) -> None:
  """Shows the summary of a run that was finished before, and how to go on."""
  more = f'--gin.RunConfig.steps={2 * config.steps}'
  if 'stopped_early' in summary:
    more = '--gin.RunConfig.early_stopping=None'
  print(
    f'{workdir}: this run finished at step {summary["step"]}; to train on:\n'
    f'  {resume_command} {more} --allow_config_change'
  )
  print_summary(summary, workdir)
  if processes.is_leader():
    print(f'report: {write_report(workdir)}', flush=True)


def print_summary(summary: dict[str, Any], workdir: Path) -> None:
  """Prints the end of a run: samples, speed, and the score to beat."""
  if 'stopped_early' in summary:
    print(
      f'stopped early, at step {summary["step"]}: '
      f'{summary["stopped_early"]["why"]}'
    )
  if summary['samples']:
    print('masked [text], and what the model put there, - for nothing:')
  for sample in summary['samples']:
    print(f'  text:  {sample["text"]}')
    print(f'  model: {sample["model"]}\n')
  if summary.get('development'):
    development.print_scores(summary['development'])
  if 'eval/unigram_neg_log_perplexity' in summary:
    _print_text_score(summary)
  if 'best' in summary:
    best = summary['best']
    print(
      f'best {best["metric"]}: {best["value"]:.4f} at step {best["step"]}; to '
      'score its checkpoint:'
    )
    print(f'  st_moe evaluate --checkpoint={workdir} --step=best')


def _print_text_score(summary: dict[str, Any]) -> None:
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
      f'training used {used:,.0f} tokens/s; the data path alone feeds '
      f'{feed:,.0f} tokens/s ({feed / used:.1f}x)'
    )
