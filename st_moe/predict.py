"""`st_moe predict`: a line of text in, a line of text out.

Lines are read in blocks, so that files may be of any size. Of standard input a
block is what is there: a line at a terminal and a pipe that is written to now
and then are answered at once. An answer depends on its line, its number and the
seed alone.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from st_moe import partitioning, processes
from st_moe.best import Step
from st_moe.checkpoint import find_steps, restore_params
from st_moe.config import DataConfig, ModelConfig, RunConfig
from st_moe.data.vocabularies import Vocabulary, load_vocabulary
from st_moe.decoding import Sampling
from st_moe.errors import UserError
from st_moe.initialize import check_size, check_vocabulary, with_own_vocabulary
from st_moe.model_directory import FoundModel, find_model
from st_moe.predictor import Predictor
from st_moe.train_state import abstract_state, state_shardings
from st_moe.transformer import EncoderDecoder

log = logging.getLogger(__name__)

_BLOCK = 32  # batches of lines that are read before they are answered
_SECONDS = 5.0  # of answering, between two lines of progress
# Within this many seconds a writer that goes on has written more.
_PAUSE = 0.05

# Answers are lines: what would end one is written as in Python, and so is the
# backslash.
_ESCAPES = str.maketrans({'\\': '\\\\', '\n': '\\n', '\r': '\\r'})


@dataclasses.dataclass(frozen=True)
class Texts:
  """Where inputs come from and outputs go.

  Attributes:
    prompt: the only input.
    input: a file with an input in each line; standard input if there is
      neither.
    output: a file for the outputs, a line each; None: standard output.
  """

  prompt: str | None = None
  input: Path | None = None
  output: Path | None = None

  def blocks(self, size: int) -> Iterator[list[str]]:
    """Yields the inputs in blocks of `size` at most.

    Raises:
      UserError: a line that is not UTF-8.
    """
    if self.prompt is not None:
      yield [self.prompt]
    elif self.input is not None:
      with self.input.open('rb') as file:
        yield from _decoded(_blocks(file, size), str(self.input))
    else:
      if sys.stdin.isatty():
        log.info('reading lines from the terminal; Ctrl-D ends them')
      yield from _decoded(_standard_input(size), 'standard input')

  @contextlib.contextmanager
  def writer(self) -> Iterator[Callable[[str], None]]:
    """Gives a function that writes a line; a file appears when it is whole."""
    if self.output is None:
      yield print
      sys.stdout.flush()
      return
    folder = self.output.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=folder)
    try:
      with os.fdopen(number, 'w', encoding='utf-8', newline='\n') as file:
        yield lambda line: print(line, file=file)
      mask = os.umask(0)
      os.umask(mask)
      os.chmod(name, 0o666 & ~mask)
      os.replace(name, self.output)
    except BaseException:
      os.unlink(name)
      raise


def _blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
  items = iter(items)
  while block := list(itertools.islice(items, size)):
    yield block


def _standard_input(size: int) -> Iterator[list[bytes]]:
  try:
    number = sys.stdin.buffer.fileno()
  except OSError:  # not a file of the system's
    return _blocks(sys.stdin.buffer, size)
  return lines_at_hand(number, size)


def lines_at_hand(number: int, size: int) -> Iterator[list[bytes]]:
  """Yields the lines of a pipe or a terminal as they come.

  Args:
    number: of the open file; nothing else reads it.
    size: lines of a block at most. It has fewer when no more follow at once.
  """
  lines: list[bytes] = []
  rest = bytearray()  # of a line without its end
  while True:
    # For the first line it waits without end.
    wait = _PAUSE if lines else None
    if len(lines) < size and select.select([number], [], [], wait)[0]:
      data = os.read(number, 1 << 16)
      rest += data
      if b'\n' in data:
        *whole, end = bytes(rest).split(b'\n')
        lines, rest = lines + whole, bytearray(end)
      if not data:
        break
    else:
      yield lines[:size]
      lines = lines[size:]
  yield from _blocks([*lines, bytes(rest)] if rest else lines, size)


def _decoded(blocks: Iterable[list[bytes]], name: str) -> Iterator[list[str]]:
  """Yields lines without their ends; only a newline ends one."""
  first = 1
  for block in blocks:
    texts = []
    for number, line in enumerate(block, start=first):
      try:
        text = line.decode()
      except UnicodeDecodeError as e:
        raise UserError(
          f'{name}, line {number}: not UTF-8 (byte {line[e.start]:#04x} at '
          f'{e.start}); convert the text to UTF-8'
        ) from e
      texts.append(text.removesuffix('\n').removesuffix('\r'))
    yield texts
    first += len(block)


def one_line(text: str) -> str:
  r"""Returns a text as one line: newlines read \n, backslashes \\."""
  return text.translate(_ESCAPES)


def _vocabulary(config: DataConfig, model: FoundModel) -> Vocabulary:
  """Loads the vocabulary of a model, the copy that it came with if it has one.

  Raises:
    UserError: it is not known, or not the one of the model.
  """
  given = dataclasses.replace(config, task='text')  # a cache is not opened
  given = with_own_vocabulary(given, model)
  vocabulary = load_vocabulary(given.vocabulary, given.extra_ids)
  check_vocabulary(vocabulary.fingerprint, given, model)
  return vocabulary


def _warn_of_neighbours(model: ModelConfig) -> None:
  router = model.encoder_router
  if not model.num_experts or router.kind != 'expert_choice':
    return
  if router.group_size is not None:
    log.warning(
      'the experts of this model choose their tokens: an answer depends on '
      'the lines beside it; --gin.encoder/RouterConfig.group_size=None keeps '
      'lines apart'
    )


class _Answers:
  """Turns blocks of lines into answers, and says how far it is."""

  def __init__(
    self, predictor: Predictor, vocabulary: Vocabulary, inputs_length: int
  ):
    self._predictor = predictor
    self._vocabulary = vocabulary
    self._longest = inputs_length
    self._seconds = self._said = 0.0  # of answering, not of waiting for lines
    self._began = time.monotonic()
    self._quiet = sys.stdin.isatty()  # where answers stand among the lines
    self.lines = self.tokens = self.cut = 0

  def __call__(self, block: list[str]) -> list[str]:
    vocabulary, rows = self._vocabulary, []
    self._began = time.monotonic()
    for text in block:
      ids = vocabulary.encode_prompt(text)
      self.cut += len(ids) > self._longest - 1
      rows.append([*ids[: self._longest - 1], vocabulary.eos_id])
    outputs = self._predictor.generate(
      rows, first=self.lines, progress=self._say
    )
    self.lines += len(block)
    self.tokens += sum(map(len, outputs))
    self._seconds = self._so_far()
    return [one_line(vocabulary.decode(ids)) for ids in outputs]

  def _say(self, done: int, _: int) -> None:
    seconds = self._so_far()
    if self._quiet or seconds - self._said < _SECONDS:
      return
    self._said = seconds
    done += self.lines
    log.info('lines answered: %d (%.1f a second)', done, done / seconds)

  def _so_far(self) -> float:
    return self._seconds + time.monotonic() - self._began

  def summary(self) -> None:
    if self.cut:
      log.warning(
        'cut: %d of %d lines, which have more than %d tokens; '
        '--gin.DataConfig.inputs_length=N lets more in',
        *(self.cut, self.lines, self._longest - 1),
      )
    log.info(
      'answered in %.1f s: lines %d, tokens %d',
      *(self._seconds, self.lines, self.tokens),
    )


def predict(
  config: RunConfig,
  checkpoint: Path,
  texts: Texts,
  *,
  step: Step,
  batch_size: int,
  num_beams: int,
  length_penalty: float,
  early_stopping: bool | Literal['never'],
  sampling: Sampling,
) -> None:
  """Answers texts, in their order.

  Args:
    config: of the checkpoint; `data.targets_length` tokens are generated at
      most, and `seed` is that of draws.
    checkpoint: a run or a model directory.
    texts: where they come from and where answers go.
    step: of the checkpoint: a number, 'best', or None for the newest.
    batch_size: lines computed together; changes no answer.
    num_beams, length_penalty, early_stopping, sampling: see `Predictor`.

  Raises:
    UserError: no such checkpoint, or a line that cannot be read.
  """
  mesh = partitioning.make_mesh(config.mesh)
  processes.check_joined()
  find_steps(checkpoint, step)
  vocabulary = _vocabulary(config.data, find_model(checkpoint))
  check_size(vocabulary, config.data, config.model)
  predictor = Predictor(
    config.model,
    None,
    mesh,
    eos_id=vocabulary.eos_id,
    targets_length=config.data.targets_length,
    batch_size=batch_size,
    inputs_length=config.data.inputs_length,
    num_beams=num_beams,
    length_penalty=length_penalty,
    early_stopping=early_stopping,
    sampling=sampling,
    seed=config.seed,
  )
  _warn_of_neighbours(config.model)
  blocks = texts.blocks(_BLOCK * predictor.batch_size)
  if processes.joined():  # the first process reads for all, to the end
    blocks = processes.from_leader(
      list(blocks) if processes.is_leader() else None
    )
  processes.settle()
  log.info('restoring')
  shapes = abstract_state(config, EncoderDecoder(config.model))
  shardings = state_shardings(shapes, mesh, config.mesh)
  abstract: Any = shapes.with_shardings(shardings)
  restored = restore_params(checkpoint, step, abstract.params)
  predictor.params = restored.params
  log.info('answering with the checkpoint of step %d', restored.step)
  answers = _Answers(predictor, vocabulary, config.data.inputs_length)
  with _written(texts) as write:
    for block in blocks:
      for answer in answers(block):
        write(answer)
      sys.stdout.flush()
  answers.summary()


def _written(texts: Texts) -> Any:
  """Returns `texts.writer()`, which writes in the first process alone."""
  if processes.is_leader():
    return texts.writer()
  return contextlib.nullcontext(lambda line: None)
