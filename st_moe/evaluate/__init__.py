"""Evaluation: losses on held-out text, and tasks with answers."""

from st_moe.evaluate.commands import evaluate
from st_moe.evaluate.held_out import (
  HELD_OUT_SCORES,
  Evaluator,
  FilledSentence,
  fill_in,
  fill_sentences,
  text_weights,
  unigram_counts,
  unigram_neg_log_perplexity,
)

__all__ = [
  'HELD_OUT_SCORES',
  'Evaluator',
  'FilledSentence',
  'evaluate',
  'fill_in',
  'fill_sentences',
  'text_weights',
  'unigram_counts',
  'unigram_neg_log_perplexity',
]
