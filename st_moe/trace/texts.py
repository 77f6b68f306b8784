"""What is traced: held-out batches of a run, or lines of a file.

Every line of a file is a row of its own. Spans of it are masked as in
pretraining, so that sentinels occur; a line INPUTS<tab>TARGETS is taken as it
is, and may hold sentinels of its own, `<extra_id_0>` to a SentencePiece
vocabulary. Lines that are longer than a row go on in the next one.
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from st_moe.config import DataConfig, RunConfig
from st_moe.data.span_corruption import (
  Example,
  check_lengths,
  model_features,
  span_corruption,
  span_corruption_lengths,
)
from st_moe.data.vocabularies import Vocabulary
from st_moe.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LineText:
  """Rows made of the lines of a file.

  Attributes:
    rows: model features, [length] each.
    cut: how many INPUTS<tab>TARGETS lines were longer than a row.
  """

  rows: list[Batch]
  cut: int

  def batches(self, size: int, *, index: int, count: int) -> Iterator[Batch]:
    """Yields batches of `size` rows, the last filled with rows of zeros.

    Args:
      size: rows over all processes.
      index: which of `count` equal parts of every batch to give.
      count: of parts.
    """
    empty = {name: np.zeros_like(x) for name, x in self.rows[0].items()}
    part = size // count
    for start in range(0, len(self.rows), size):
      rows = self.rows[start : start + size]
      rows = rows + [empty] * (size - len(rows))
      own = rows[index * part : (index + 1) * part]
      yield {name: np.stack([row[name] for row in own]) for name in empty}


def read_lines(
  path: Path, vocabulary: Vocabulary, config: RunConfig, num_rows: int
) -> LineText:
  """Makes the rows of a file.

  Args:
    path: of UTF-8 text.
    vocabulary: of the model.
    config: gives lengths, what is masked, and the seed of the masks.
    num_rows: at most so many.

  Raises:
    UserError: no such file, no text in it, or sentinels in what is masked.
  """
  data = config.data
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as e:
    why = getattr(e, 'strerror', None) or 'it is not UTF-8 text'
    raise UserError(f'--input={path} cannot be read: {why}') from e
  lengths = {
    'inputs_length': data.inputs_length,
    'targets_length': _targets_length(data, vocabulary),
    'eos_id': vocabulary.eos_id,
  }
  rows: list[Batch] = []
  cut = 0
  for number, line in enumerate(lines):
    if len(rows) >= num_rows:
      break
    if not line.strip():
      continue
    if '\t' in line:
      example, whole = _given(line, vocabulary, lengths)
      cut += not whole
      rows.append(model_features(example, **lengths))
      continue
    if '<extra_id_' in line:
      raise UserError(
        f'--input={path}, line {number + 1}: it has sentinels, which masking '
        'would repeat; give inputs, a tab and targets'
      )
    tokens = np.asarray(vocabulary.encode(line), np.int32)
    for example in _masked(tokens, vocabulary, data, (config.seed, number)):
      rows.append(model_features(example, **lengths))
  if not rows:
    raise UserError(f'--input={path} holds no text: give lines of it')
  if cut:
    log.warning('%d lines of %s are longer than a row and were cut', cut, path)
  return LineText(rows[:num_rows], cut)


def _targets_length(data: DataConfig, vocabulary: Vocabulary) -> int:
  """Returns a length of targets that holds all that masking takes out."""
  longest = span_corruption_lengths(
    data.inputs_length, data.noise_density, data.mean_noise_span_length
  )
  # Two more: see `check_lengths`.
  length = max(data.targets_length, longest.targets + 2)
  check_lengths(
    'span_corruption',
    inputs_length=data.inputs_length,
    targets_length=length,
    noise_density=data.noise_density,
    mean_noise_span_length=data.mean_noise_span_length,
    extra_ids=vocabulary.extra_ids,
  )
  return length


def _given(
  line: str, vocabulary: Vocabulary, lengths: dict[str, int]
) -> tuple[Example, bool]:
  """Returns INPUTS<tab>TARGETS as an example, and whether all of it fits."""
  inputs, _, targets = line.partition('\t')
  sides = []
  whole = True
  for text, name in ((inputs, 'inputs_length'), (targets, 'targets_length')):
    ids = np.asarray(vocabulary.encode(text), np.int32)
    whole &= len(ids) < lengths[name]
    sides.append(ids[: lengths[name] - 1])
  return Example(*sides), whole


def _masked(
  tokens: np.ndarray,
  vocabulary: Vocabulary,
  data: DataConfig,
  seed: tuple[int, int],
) -> Iterator[Example]:
  """Yields the windows of a line with spans masked, one row each."""
  window = span_corruption_lengths(
    data.inputs_length, data.noise_density, data.mean_noise_span_length
  ).window
  for start in range(0, len(tokens), window):
    part = tokens[start : start + window]
    if len(part) < 2:  # nothing can be masked of a token
      yield Example(part, part[:0])
      continue
    yield span_corruption(
      part,
      np.random.default_rng([*seed, start]),
      vocab_size=vocabulary.vocab_size,
      noise_density=data.noise_density,
      mean_noise_span_length=data.mean_noise_span_length,
    )
