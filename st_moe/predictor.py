"""Outputs and likelihoods of any number of inputs, on any mesh.

Inputs are padded to one of a few lengths and batches to one size, so that
each length (of scores: each pair of them) is compiled once. A result is a
function of its example: nothing is dropped (`transformer.generation_config`),
the padded length is that of the example itself, and rows that fill a batch up
are padding, which no expert sees. Experts that choose their tokens look at the
whole group, as always; `group_size = None` keeps sequences apart.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from st_moe import losses, partitioning
from st_moe.config import ModelConfig
from st_moe.decoding import (
  GREEDY,
  PAD_ID,
  BeamSearch,
  Sampling,
  check_method,
  generate,
  keys_for,
)
from st_moe.errors import UserError
from st_moe.transformer import apply_model, generation_config

_SHORTEST = 16  # tokens, of the lengths to which sequences are padded

Ids = Sequence[int]
Progress = Callable[[int, int], None]  # given examples done, and all


def padded_length(length: int, longest: int | None = None) -> int:
  """Returns the length to which a sequence is padded.

  That is 16, doubled as often as it takes: less than half is padding.

  Args:
    length: of the sequence, in tokens.
    longest: of all sequences that may come; none is padded beyond.
  """
  padded = _SHORTEST
  while padded < length:
    padded *= 2
  return padded if longest is None else min(padded, longest)


def _pad(rows: Sequence[Ids], size: int, length: int) -> np.ndarray:
  """Returns int32 [size, length]: the rows, then rows of padding."""
  padded = np.full((size, length), PAD_ID, np.int32)
  for index, row in enumerate(rows):
    padded[index, : len(row)] = row
  return padded


def _until(ids: list[int], eos_id: int) -> list[int]:
  """Returns the ids before end-of-sequence or padding, whichever is first."""
  ends = (i for i, token in enumerate(ids) if token in (eos_id, PAD_ID))
  return ids[: next(ends, len(ids))]


def _draw(
  model: ModelConfig,
  params: Any,
  inputs: jax.Array,
  numbers: jax.Array,
  *,
  seed: int,
  **settings: Any,
) -> jax.Array:
  """Samples an output for every input, with keys of the inputs' numbers."""
  keys = keys_for(jax.random.key(seed), numbers)
  return generate(model, params, inputs, rng=keys, **settings)


def _score(
  config: ModelConfig, params: Any, inputs: jax.Array, targets: jax.Array
) -> jax.Array:
  """Returns log-likelihoods float32 [batch], of padding 0."""
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
  }
  logits = apply_model(config, params, batch, train=False).logits
  return losses.log_likelihoods(logits, targets, targets != PAD_ID)


class Predictor:
  """Generates and scores, batch by batch.

  In a job all processes call its methods with the same arguments, and all get
  the results of all examples.

  Attributes:
    params: of `EncoderDecoder`, on the mesh; may be set to others of the same
      shapes and places, for which nothing is compiled again.
    batch_size: rows of a batch: those asked for, rounded up to divide over
      the mesh.
  """

  def __init__(
    self,
    model: ModelConfig,
    params: Any,
    mesh: Mesh,
    *,
    eos_id: int,
    targets_length: int,
    batch_size: int,
    inputs_length: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal['never'] = False,
    sampling: Sampling = GREEDY,
    seed: int = 0,
  ):
    """Compiles nothing yet.

    Args:
      model: of the parameters.
      params: on the mesh; None if they are given later.
      mesh: to compute on.
      eos_id: ends a target.
      targets_length: tokens of the longest target, end-of-sequence included.
      batch_size: rows computed together, at least.
      inputs_length: tokens of the longest input, end-of-sequence included;
        None: any.
      num_beams: of `generate`; 1 takes tokens one by one, as `sampling` says.
      length_penalty, early_stopping: see `decoding.BeamSearch`; of several
        beams.
      sampling: how tokens are chosen one by one; the likeliest by default.
      seed: of draws; those of an output depend on its input's number, too.

    Raises:
      UserError: a size below 1, beams that sample, `top_k` beyond the
        vocabulary, or a mesh that does not go with the processes.
    """
    for name, value in (
      ('inputs_length', inputs_length),
      ('targets_length', targets_length),
      ('batch_size', batch_size),
    ):
      if value is not None and value < 1:
        raise UserError(f'{name} must be at least 1, got {value}')
    search = BeamSearch(num_beams, length_penalty, early_stopping)
    draws = sampling.temperature > 0
    if draws and num_beams > 1:
      raise UserError(
        f'temperature {sampling.temperature:g} draws tokens and num_beams '
        f'{num_beams} searches for the likeliest; choose one of them'
      )
    check_method(model, sampling)
    shards = partitioning.batch_shards(mesh)
    self.params = params
    self.batch_size = -(-batch_size // shards) * shards
    self._mesh, self._part = mesh, partitioning.batch_part(mesh)
    self._eos_id = eos_id
    self._inputs_length = inputs_length
    self._targets_length = targets_length
    self._draws = draws
    settings = {
      'max_length': targets_length,
      'eos_id': eos_id,
      'method': search if num_beams > 1 else sampling,
    }
    replicated = partitioning.replicated(mesh)
    self._generate = jax.jit(
      functools.partial(_draw, model, seed=seed, **settings)
      if draws
      else functools.partial(generate, model, **settings),
      out_shardings=replicated,
    )
    self._score = jax.jit(
      functools.partial(_score, generation_config(model)),
      out_shardings=replicated,
    )

  def generate(
    self,
    inputs: Sequence[Ids],
    *,
    params: Any = None,
    progress: Progress | None = None,
    first: int = 0,
  ) -> list[list[int]]:
    """Returns an output for every input.

    Args:
      inputs: ids as the encoder sees them: with the end-of-sequence that the
        model was trained with, without padding.
      params: None: `self.params`.
      progress: called after every batch.
      first: number of the first input, the others follow; matters to draws.

    Returns:
      The ids before end-of-sequence, in the order of the inputs.

    Raises:
      UserError: an input without a token, too long, or with padding inside.
    """
    self._check('input', inputs, self._inputs_length)
    examples = [(row,) for row in inputs]
    numbers = [[first + i] for i in range(len(inputs))] if self._draws else []
    outputs = self._run(self._generate, examples, params, progress, numbers)
    return [_until(row.tolist(), self._eos_id) for row in outputs]

  def log_likelihoods(
    self,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    params: Any = None,
    progress: Progress | None = None,
  ) -> np.ndarray:
    """Returns the log-likelihood of each target, given its input.

    Args:
      pairs: inputs as of `generate`, and targets without end-of-sequence,
        which is added.
      params: None: `self.params`.
      progress: called after every batch.

    Returns:
      float32 [pairs] in nats, summed over tokens, end-of-sequence included.

    Raises:
      UserError: an input without a token, either too long, or with padding
        inside.
    """
    ended = [(row, [*target, self._eos_id]) for row, target in pairs]
    self._check('input', [row for row, _ in ended], self._inputs_length)
    self._check('target', [row for _, row in ended], self._targets_length)
    return np.array(self._run(self._score, ended, params, progress), np.float32)

  def _check(self, what: str, rows: Sequence[Ids], longest: int | None) -> None:
    for index, row in enumerate(rows):
      if not len(row):
        raise UserError(
          f'{what} {index} has no token; an empty text is its end-of-sequence'
        )
      if longest is not None and len(row) > longest:
        raise UserError(
          f'{what} {index} has {len(row)} tokens, end-of-sequence included; '
          f'it may have {longest}'
        )
      if PAD_ID in row:
        raise UserError(f'{what} {index} has padding (id {PAD_ID}) inside')

  def _batches(
    self, examples: Sequence[tuple[Ids, ...]]
  ) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """Yields which examples form a batch, and their padded lengths."""
    limits = (self._inputs_length, self._targets_length)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
      lengths = tuple(
        padded_length(len(row), longest)
        for row, longest in zip(example, limits, strict=False)
      )
      groups.setdefault(lengths, []).append(index)
    for lengths, members in sorted(groups.items()):
      for start in range(0, len(members), self.batch_size):
        yield members[start : start + self.batch_size], lengths

  def _run(
    self,
    function: Callable[..., jax.Array],
    examples: Sequence[tuple[Ids, ...]],
    params: Any,
    progress: Progress | None,
    numbers: Sequence[Ids] = (),
  ) -> list[np.ndarray]:
    """Returns a function's row for every example, in their order.

    Args:
      function: of parameters, the parts of examples, and their numbers.
      examples: of parts.
      params: None: `self.params`.
      progress: called after every batch.
      numbers: [examples, 1], if the function takes them.
    """
    params = self.params if params is None else params
    rows = self.batch_size // self._part.count
    own = slice(self._part.index * rows, (self._part.index + 1) * rows)
    results: list[Any] = [None] * len(examples)
    done = 0
    with partitioning.use_mesh(self._mesh):
      for members, lengths in self._batches(examples):
        batch = {}
        for part, length in enumerate(lengths):
          ids = [examples[index][part] for index in members]
          batch[str(part)] = _pad(ids, self.batch_size, length)[own]
        if numbers:
          ids = [numbers[index] for index in members]
          batch['number'] = _pad(ids, self.batch_size, 1)[own][:, 0]
        placed = partitioning.shard_batch(batch, self._mesh)
        output = jax.device_get(function(params, *placed.values()))
        for index, row in zip(members, output, strict=False):
          results[index] = row
        done += len(members)
        if progress is not None:
          progress(done, len(examples))
    return results
