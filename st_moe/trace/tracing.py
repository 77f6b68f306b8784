"""One trace: the checkpoint, the text, the forward passes, the files."""

import dataclasses
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from st_moe import partitioning, processes
from st_moe.best import Step
from st_moe.checkpoint import find_steps, restore_params
from st_moe.config import RunConfig
from st_moe.data.pipeline import open_data
from st_moe.data.vocabularies import Vocabulary, load_vocabulary
from st_moe.errors import UserError
from st_moe.initialize import check_size, check_vocabulary, with_own_vocabulary
from st_moe.model_directory import FoundModel, find_model
from st_moe.trace import statistics, texts, writing
from st_moe.trace.recording import record, with_capacity
from st_moe.train_state import abstract_state, state_shardings
from st_moe.transformer import EncoderDecoder
from st_moe.workdir import check_parents

log = logging.getLogger(__name__)

_CAPACITIES = {
  'eval': 'capacity as in evaluation',
  'train': 'capacity as in training',
  'none': 'no capacity, nothing is dropped',
}


@dataclasses.dataclass(frozen=True)
class Request:
  """What the command line asks for.

  Attributes:
    checkpoint: a run, or a model directory.
    step: of its checkpoint, or 'best'; None for the newest.
    input: a file whose lines are traced; None for the data of the config.
    output: folder for the files.
    batches: how many are traced at most.
    rows: how many rows are kept word by word.
    capacity: 'eval', 'train' or 'none'.
  """

  checkpoint: Path
  step: Step
  input: Path | None
  output: Path
  batches: int
  rows: int
  capacity: str


def check(request: Request) -> None:
  """Refuses what cannot be, before anything is loaded.

  Raises:
    UserError: counts below one, files that are not there, an output that
      cannot be made.
  """
  for name in ('batches', 'rows'):
    if getattr(request, name) < 1:
      raise UserError(f'--{name}={getattr(request, name)} must be at least 1')
  if request.input is not None and not request.input.is_file():
    raise UserError(f'--input={request.input} does not exist, or is no file')
  output = request.output
  if output.exists() and not output.is_dir():
    raise UserError(f'--output={output} is a file; name a folder')
  check_parents(output / 'trace.html', f'--output={output}')


def trace(config: RunConfig, request: Request) -> dict[str, Any]:
  """Traces a checkpoint, writes the files, prints the table.

  Args:
    config: of the run, perhaps with other data.
    request: checked by `check`.

  Returns:
    What trace.json holds.

  Raises:
    UserError: no such checkpoint, a dense model, data that does not fit.
  """
  mesh = partitioning.make_mesh(config.mesh)
  processes.check_joined()
  find_steps(request.checkpoint, request.step)
  found = find_model(request.checkpoint)
  model = with_capacity(config.model, request.capacity)
  part = partitioning.batch_part(mesh)
  opened = _open(config, request, found)
  processes.check_same(opened.fingerprint, 'give every process the same text')
  shards = partitioning.batch_shards(mesh)
  if config.batch_size % shards:
    raise UserError(
      f'RunConfig.batch_size {config.batch_size} is not divisible by the '
      f'{shards} data shards of the mesh'
    )
  processes.settle()
  log.info('restoring the checkpoint')
  shapes = abstract_state(config, EncoderDecoder(config.model))
  shardings = state_shardings(shapes, mesh, config.mesh)
  restored = restore_params(
    request.checkpoint,
    request.step,
    shapes.with_shardings(shardings).params,
  )
  total = opened.most_batches(config, request)
  rows = f'{total * config.batch_size:,}'
  log.info('tracing %s rows at most', rows)
  records = record(
    model,
    restored.params,
    opened.batches(config, request, part),
    mesh,
    lambda done: _report(done, total),
  )
  rows = max(len(one.real) for one in records.values())
  log.info('counting the tokens of %s rows', f'{rows:,}')
  result = statistics.describe(
    records, opened.vocabulary, config.model.num_experts, request.rows
  )
  result |= {
    'source': {
      'checkpoint': str(request.checkpoint),
      'step': restored.step,
      'text': opened.text,
      'rows': rows,
      'batch_size': config.batch_size,
      'capacity': request.capacity,
      'capacity_text': _CAPACITIES[request.capacity],
    },
    'rule': writing.RULE,
  }
  if processes.is_leader():
    request.output.mkdir(parents=True, exist_ok=True)
    writing.write(request.output, result)
    writing.print_summary(result, Console(highlight=False))
    print(f'page: {request.output / "trace.html"}', flush=True)
  return result


def _report(done: int, total: int) -> None:
  """Says how far it is, about ten times."""
  if done == 1 or done == total or done % max(1, total // 10) == 0:
    log.info('batch %d/%d', done, total)


@dataclasses.dataclass(frozen=True)
class _Opened:
  """The text of a trace.

  Attributes:
    vocabulary: of the model.
    text: what it is, in words.
    fingerprint: plain values that all processes share.
    source: LineText, or data of pipeline.py.
  """

  vocabulary: Vocabulary
  text: str
  fingerprint: dict[str, Any]
  source: Any

  def most_batches(self, config: RunConfig, request: Request) -> int:
    """Returns how many there can be; held-out text may end before."""
    if isinstance(self.source, texts.LineText):
      return math.ceil(len(self.source.rows) / config.batch_size)
    return request.batches

  def batches(
    self,
    config: RunConfig,
    request: Request,
    part: partitioning.BatchPart,
  ) -> Iterable[dict[str, Any]]:
    """Yields this process's part of every batch."""
    if isinstance(self.source, texts.LineText):
      return self.source.batches(
        config.batch_size, index=part.index, count=part.count
      )
    return self.source.eval_batches(
      config.batch_size,
      request.batches,
      process_index=part.index,
      process_count=part.count,
    )


def _open(config: RunConfig, request: Request, found: FoundModel) -> _Opened:
  """Opens the text that is traced; its vocabulary is the model's."""
  data_config = with_own_vocabulary(config.data, found)
  own = None
  if data_config.vocabulary != 'auto':  # before text is opened
    own = load_vocabulary(data_config.vocabulary, data_config.extra_ids)
    check_size(own, data_config, config.model)
    check_vocabulary(own.fingerprint, config.data, found)
  if request.input is not None:
    if own is None:
      raise UserError(
        f'{request.checkpoint} keeps no vocabulary; add '
        '--gin.DataConfig.vocabulary=FILE'
      )
    lines = texts.read_lines(
      request.input, own, config, request.batches * config.batch_size
    )
    return _Opened(
      own,
      f'the lines of {request.input}',
      {'lines': str([row['encoder_input_tokens'].sum() for row in lines.rows])},
      lines,
    )
  data = open_data(data_config, seed=config.seed, cache_root=None)
  check_vocabulary(data.fingerprint['vocabulary'], config.data, found)
  files = data_config.eval_files or data_config.files
  what = files if isinstance(files, str) else ', '.join(files)
  return _Opened(
    data.vocabulary,
    f'held-out text of {what or f"the task {data_config.task}"}',
    data.fingerprint,
    data,
  )
