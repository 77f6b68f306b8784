"""Evaluation on held-out text: losses, a baseline to beat, filled sentences.

The paper's quality is the negative log perplexity, minus the cross entropy
per target token in nats (higher is better). Two are reported: over every
target token, as the paper does, and over text alone, without sentinels and
end-of-sequence, which are easy.
"""

import dataclasses
import functools
import json
import logging
import re
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from st_moe import losses, partitioning, processes
from st_moe.checkpoint import find_steps, restore_params
from st_moe.config import ModelConfig, RunConfig
from st_moe.data.pipeline import open_data
from st_moe.data.span_corruption import (
  MIN_SENTENCE_TOKENS,
  corrupt_sentence,
  model_features,
)
from st_moe.data.vocabularies import load_vocabulary
from st_moe.decoding import generate
from st_moe.initialize import check_vocabulary, with_vocabulary
from st_moe.model_directory import find_model
from st_moe.train_state import abstract_state, state_shardings
from st_moe.transformer import EncoderDecoder, apply_model

log = logging.getLogger(__name__)

# Scores of `Evaluator.losses`, of which one may say which step is the best.
HELD_OUT_SCORES = (
  'eval/loss', 'eval/neg_log_perplexity', 'eval/neg_log_perplexity_all_targets',
  'eval/accuracy',
)  # fmt: skip
_SPAN_CHARACTERS = 60  # of a filled span, as it is shown


def text_weights(batch: dict[str, np.ndarray], vocabulary: Any) -> np.ndarray:
  """Returns the loss weights with sentinels and end-of-sequence left out."""
  targets = batch['decoder_target_tokens']
  easy = vocabulary.is_sentinel(targets) | (targets == vocabulary.eos_id)
  return batch['decoder_loss_weights'] * ~easy


def _eval_step(
  config: ModelConfig, params: Any, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns sums over a batch: cross entropy and weights, all and text."""
  output = apply_model(config, params, batch, train=False)
  targets = batch['decoder_target_tokens']
  everything = losses.cross_entropy(
    output.logits, targets, batch['decoder_loss_weights']
  )
  text = losses.cross_entropy(output.logits, targets, batch['text_weights'])
  return {
    'loss': everything.loss,
    'weight': everything.weight,
    'correct': everything.correct,
    'text_loss': text.loss,
    'text_weight': text.weight,
  }


class Evaluator:
  """Scores parameters on the same held-out batches every time."""

  def __init__(self, config: RunConfig, data: Any, mesh: Mesh):
    self._config = config
    self._data = data
    self._mesh = mesh
    self._part = partitioning.batch_part(mesh)
    with partitioning.use_mesh(mesh):
      self._step = jax.jit(
        functools.partial(_eval_step, config.model),
        out_shardings=partitioning.replicated(mesh),
      )

  def batches(self, *, whole: bool = False):
    """Yields the held-out batches, `text_weights` added.

    Args:
      whole: all rows; else those that this process reads.
    """
    part = partitioning.BatchPart(0, 1) if whole else self._part
    for batch in self._data.eval_batches(
      self._config.batch_size,
      self._config.eval_batches,
      process_index=part.index,
      process_count=part.count,
    ):
      yield batch | {'text_weights': text_weights(batch, self._data.vocabulary)}

  def losses(self, params: Any) -> dict[str, float]:
    """Returns held-out metrics, named as they are logged.

    `eval/loss` is the cross entropy per target token in nats;
    `eval/neg_log_perplexity_all_targets` is its negative, the paper's number;
    `eval/neg_log_perplexity` is over text tokens alone.
    """
    sums: dict[str, float] = {}
    with partitioning.use_mesh(self._mesh):
      for batch in self.batches():
        step = self._step(params, partitioning.shard_batch(batch, self._mesh))
        for key, value in jax.device_get(step).items():
          sums[key] = sums.get(key, 0.0) + float(value)
    weight = max(sums['weight'], 1.0)
    return {
      'eval/loss': sums['loss'] / weight,
      'eval/neg_log_perplexity_all_targets': -sums['loss'] / weight,
      'eval/neg_log_perplexity': -sums['text_loss']
      / max(sums['text_weight'], 1.0),
      'eval/accuracy': sums['correct'] / weight,
      'eval/text_tokens': sums['text_weight'],
    }


def unigram_counts(
  data: Any, config: RunConfig, num_batches: int
) -> tuple[np.ndarray, int]:
  """Counts text tokens among the targets of the first training batches.

  Returns:
    Counts [vocab_size] and the number of all non-padding tokens read.
  """
  counts = np.zeros(config.model.vocab_size, np.int64)
  tokens = 0
  batches = data.train_batches(config.batch_size)
  for _ in range(num_batches):
    batch = next(batches)
    targets = batch['decoder_target_tokens']
    chosen = text_weights(batch, data.vocabulary) > 0
    counts += np.bincount(targets[chosen], minlength=len(counts))
    tokens += int(np.count_nonzero(batch['encoder_input_tokens']))
    tokens += int(np.count_nonzero(targets))
  return counts, tokens


def unigram_neg_log_perplexity(
  counts: np.ndarray, evaluator: Evaluator
) -> float:
  """Returns the score of the training unigram distribution on held-out text.

  The distribution is over text tokens alone, with one count added to each id,
  and is scored on the very tokens of `eval/neg_log_perplexity`.

  Args:
    counts: text tokens of the training targets [vocab_size].
    evaluator: whose held-out batches are scored.
  """
  log_probs = np.log((counts + 1) / (counts + 1).sum())
  total = weight = 0.0
  for batch in evaluator.batches(whole=True):
    weights = batch['text_weights']
    total += float((log_probs[batch['decoder_target_tokens']] * weights).sum())
    weight += float(weights.sum())
  return total / max(weight, 1.0)


def fill_in(masked: str, targets: str) -> str:
  """Returns a masked sentence with its spans put back, [in brackets].

  Args:
    masked: text with `<extra_id_k>` where spans were.
    targets: `<extra_id_0> span <extra_id_1> span ...`; what stands under a
      sentinel that `masked` does not have is left out, a span that is
      missing or empty reads [-], and one that does not end is cut.
  """
  parts = re.split(r'<extra_id_(\d+)>', targets)
  spans = dict(zip(parts[1::2], parts[2::2], strict=True))

  def span(found: re.Match) -> str:
    text = ' '.join(spans.get(found[1], '').split()) or '-'
    return f'[{textwrap.shorten(text, _SPAN_CHARACTERS, placeholder=" ...")}]'

  return re.sub(r'<extra_id_(\d+)>', span, masked)


@dataclasses.dataclass(frozen=True)
class FilledSentence:
  """A masked sentence, what was there, and what the model wrote.

  Attributes:
    masked: the input, with sentinels.
    answer: the target, sentinels and spans.
    filled: what the model wrote in its place.
    text: the sentence, its masked spans [in brackets].
    model: the same with the model's spans.
  """

  masked: str
  answer: str
  filled: str
  text: str
  model: str


def fill_sentences(
  config: RunConfig, params: Any, data: Any, num_sentences: int
) -> list[FilledSentence]:
  """Masks held-out sentences and lets the model fill them greedily.

  Args:
    config: the run; its seed chooses the spans.
    params: parameters.
    data: gives held-out sentences and the vocabulary.
    num_sentences: how many.
  """
  vocabulary, lengths = data.vocabulary, config.data
  rows, answers = [], []
  for index, text in enumerate(data.eval_texts(num_sentences)):
    tokens = vocabulary.encode(text)[: lengths.inputs_length - 1]
    if len(tokens) < MIN_SENTENCE_TOKENS:
      continue
    example = corrupt_sentence(
      np.asarray(tokens),
      np.random.default_rng([config.seed, index]),
      vocab_size=vocabulary.vocab_size,
    )
    answers.append(vocabulary.decode(example.targets))
    rows.append(
      model_features(
        example,
        inputs_length=lengths.inputs_length,
        targets_length=lengths.inputs_length,
        eos_id=vocabulary.eos_id,
      )['encoder_input_tokens']
    )
  if not rows:
    return []
  inputs = np.stack(rows)
  outputs = processes.to_host(
    generate(
      config.model,
      params,
      jnp.asarray(inputs),
      max_length=lengths.targets_length,
      eos_id=vocabulary.eos_id,
    )
  )

  def sentence(row: np.ndarray, answer: str, output: np.ndarray):
    masked = vocabulary.decode(_until(row, vocabulary.eos_id))
    filled = vocabulary.decode(_until(output, vocabulary.eos_id))
    return FilledSentence(
      masked=masked,
      answer=answer,
      filled=filled,
      text=fill_in(masked, answer),
      model=fill_in(masked, filled),
    )

  return list(map(sentence, inputs, answers, outputs))


def _until(ids: np.ndarray, eos_id: int) -> list[int]:
  """Returns the ids before the first end-of-sequence."""
  ids = ids.tolist()
  return ids[: ids.index(eos_id)] if eos_id in ids else ids


def evaluate(config: RunConfig, workdir: Path, *, step: int | None) -> None:
  """Scores a checkpoint of a run; prints the scores and keeps them as JSON.

  Args:
    config: the run's, perhaps with other data.
    workdir: of the run, or a model directory; one line is added to
      `evaluations.jsonl`.
    step: of the checkpoint; None for the newest.

  Raises:
    UserError: no such checkpoint, or data that does not fit the model.
  """
  mesh = partitioning.make_mesh(config.mesh)
  processes.check_joined()
  find_steps(workdir, step)
  model = find_model(workdir)
  data_config = with_vocabulary(config.data, model)
  if data_config.vocabulary != 'auto':  # before text is opened
    own = load_vocabulary(data_config.vocabulary, data_config.extra_ids)
    check_vocabulary(own.fingerprint, config.data, model)
  data = open_data(data_config, seed=config.seed, cache_root=None)
  check_vocabulary(data.fingerprint['vocabulary'], config.data, model)
  processes.check_same(data.fingerprint, 'give every process the same data')
  processes.settle()
  log.info('restoring and scoring')
  shapes = abstract_state(config, EncoderDecoder(config.model))
  shardings = state_shardings(shapes, mesh, config.mesh)
  abstract = shapes.with_shardings(shardings)
  restored = restore_params(workdir, step, abstract.params)
  scores: dict[str, Any] = {'step': restored.step, 'task': config.data.task}
  scores |= Evaluator(config, data, mesh).losses(restored.params)
  if not processes.is_leader():
    return
  record = scores | {
    'data': data.fingerprint,
    'files': config.data.files,
    'eval_files': config.data.eval_files,
    'split': config.data.eval_split,
    'eval_batches': config.eval_batches,
    'batch_size': config.batch_size,
  }
  for name, value in scores.items():
    if isinstance(value, float):
      value = f'{value:.0f}' if name == 'eval/text_tokens' else f'{value:.4f}'
    print(f'{name:36} {value}')
  path = workdir / 'evaluations.jsonl'
  with path.open('a', encoding='utf-8') as file:
    file.write(json.dumps(record, sort_keys=True) + '\n')
  print(f'added to {path}')
