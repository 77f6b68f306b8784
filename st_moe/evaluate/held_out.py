"""Held-out text: losses, a baseline to beat, filled sentences.

The paper's quality is the negative log perplexity, minus the cross entropy
per target token in nats (higher is better). Two are reported: over every
target token, as the paper does, and over text alone, without sentinels and
end-of-sequence, which are easy.
"""

import dataclasses
import functools
import re
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from st_moe import losses, partitioning, processes
from st_moe.config import ModelConfig, RunConfig
from st_moe.data.span_corruption import (
  MIN_SENTENCE_TOKENS,
  corrupt_sentence,
  model_features,
)
from st_moe.decoding import generate
from st_moe.transformer import apply_model

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
