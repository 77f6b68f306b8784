"""Held-out scores: what is counted, and the baseline they are held against."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_model import ROOMY, apply, init_params, place, tiny_config

from st_moe import evaluate, partitioning
from st_moe.config import DataConfig, MeshConfig, RunConfig
from st_moe.data.vocabularies import load_vocabulary

VOCABULARY = load_vocabulary('byte', extra_ids=10)  # 3 + 256 + 10 = 269 ids
SENTINEL = VOCABULARY.sentinel_id(0)
EOS = VOCABULARY.eos_id

# Every expert has room for every token (capacity factor 4 with 4 experts), so
# that a row's score depends neither on the rows beside it nor on the number of
# devices, over which rows are grouped.
CONFIG = RunConfig(
  model=tiny_config(
    ROOMY,
    vocab_size=272,
    sparse_every=1,
    num_encoder_layers=1,
    num_decoder_layers=1,
  ),
  data=DataConfig(vocabulary='byte', inputs_length=12, targets_length=6),
  batch_size=8,
  eval_batches=2,
)


@dataclasses.dataclass
class FakeData:
  """Held-out and training batches given by hand."""

  batches: list[dict[str, np.ndarray]]
  vocabulary: object = VOCABULARY

  def eval_batches(self, batch_size, num_batches, **_):
    yield from self.batches[:num_batches]

  def train_batches(self, batch_size, **_):
    return iter(self.batches * 2)

  def eval_texts(self, n):
    return ['a short sentence', 'and another one'][:n]


def make_batch(targets):
  targets = np.asarray(targets, np.int32)
  rows = len(targets)
  inputs = np.tile(np.arange(5, 17, dtype=np.int32), (rows, 1))
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.roll(targets, 1, axis=1) * (targets > 0),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets > 0).astype(np.int32),
  }


def eight_rows():
  rng = np.random.default_rng(0)
  targets = rng.integers(3, 200, (8, 6))
  targets[:, 0], targets[:, 4], targets[:, 5] = SENTINEL, EOS, 0
  return make_batch(targets)


@pytest.fixture(scope='module')
def params():
  return init_params(CONFIG.model)


def one_device():
  return partitioning.make_mesh(MeshConfig(), jax.devices()[:1])


def test_sentinels_end_of_sequence_and_padding_are_no_text():
  batch = make_batch([[SENTINEL, 40, 41, SENTINEL - 1, EOS, 0]])
  np.testing.assert_array_equal(
    evaluate.text_weights(batch, VOCABULARY), [[0, 1, 1, 0, 0, 0]]
  )


def test_losses_are_means_over_all_targets_and_over_text(params):
  data = FakeData([eight_rows(), eight_rows()])
  mesh_config = MeshConfig(data=2, expert=2, model=2)
  mesh = partitioning.make_mesh(mesh_config)
  placed = place(params, CONFIG.model, mesh, mesh_config)
  scores = evaluate.Evaluator(CONFIG, data, mesh).losses(placed)
  batch = data.batches[0]
  logits = np.asarray(apply(CONFIG.model, params, batch).logits, np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  targets = batch['decoder_target_tokens']
  chosen = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
  real = targets > 0
  np.testing.assert_allclose(
    scores['eval/neg_log_perplexity_all_targets'],
    chosen[real].mean(),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    scores['eval/neg_log_perplexity'], chosen[:, 1:4].mean(), rtol=1e-5
  )
  assert scores['eval/loss'] == -scores['eval/neg_log_perplexity_all_targets']
  assert scores['eval/text_tokens'] == 2 * 8 * 3
  assert scores['eval/accuracy'] == pytest.approx(
    (logits.argmax(-1) == targets)[real].mean()
  )


def test_rows_without_weight_change_nothing(params):
  full = eight_rows()
  padded = {key: value.copy() for key, value in full.items()}
  for value in padded.values():
    value[4:] = 0
  half = {key: value[:4] for key, value in full.items()}
  doubled = {key: np.concatenate([v, v]) for key, v in half.items()}

  data = FakeData([])
  evaluator = evaluate.Evaluator(CONFIG, data, one_device())

  def score(batch):
    data.batches = [batch]
    return evaluator.losses(params)['eval/loss']

  np.testing.assert_allclose(score(padded), score(doubled), rtol=1e-5)


def test_the_unigram_baseline_by_hand():
  # Training text: three times 40, once 41; smoothed over 272 ids.
  train = make_batch([[SENTINEL, 40, 40, 41, 40, EOS]])
  counts, tokens = evaluate.unigram_counts(FakeData([train]), CONFIG, 1)
  assert counts[40] == 3 and counts[41] == 1 and counts.sum() == 4
  assert tokens == 12 + 6
  held_out = make_batch([[SENTINEL, 40, 41, 99, EOS, 0]])
  evaluator = evaluate.Evaluator(CONFIG, FakeData([held_out]), one_device())
  expected = np.log([4 / 276, 2 / 276, 1 / 276]).mean()
  np.testing.assert_allclose(
    evaluate.unigram_neg_log_perplexity(counts, evaluator), expected, rtol=1e-9
  )


def test_sentences_are_masked_and_filled_the_same_way_every_time(params):
  config = dataclasses.replace(
    CONFIG,
    data=dataclasses.replace(CONFIG.data, inputs_length=40, targets_length=12),
  )
  data = FakeData([])
  first = evaluate.fill_sentences(config, params, data, 2)
  assert first == evaluate.fill_sentences(config, params, data, 2)
  assert len(first) == 2
  for sample in first:
    assert '<extra_id_0>' in sample.masked
    assert sample.answer.startswith('<extra_id_0>')


def test_fillings_are_put_back_where_they_belong():
  masked = 'A <extra_id_0> sends each <extra_id_1> on.'
  answer = '<extra_id_0> router <extra_id_1> token <extra_id_2>'
  assert evaluate.fill_in(masked, answer) == 'A [router] sends each [token] on.'
  assert evaluate.fill_in(masked, 'the <extra_id_1> a <extra_id_9> b') == (
    'A [-] sends each [a] on.'
  )
  endless = '<extra_id_0> ' + 'of the ' * 40
  assert evaluate.fill_in('A <extra_id_0> b.', endless) == (
    'A [of the of the of the of the of the of the of the of the ...] b.'
  )
