"""Makes the reference vectors of this folder with the t5 package.

Run in an environment with t5 0.9.4 (`pip install --no-deps t5==0.9.4`, then
babel, editdistance, nltk, rouge-score, sacrebleu, pandas) beside seqio:
`python generate.py`. No test needs it.
"""

import functools
from pathlib import Path

import numpy as np
import tensorflow as tf
from stream import stream
from t5.data import preprocessors

HERE = Path(__file__).resolve().parent
TEXT = (
  'the river of small stones ran under a wooden bridge and every boat that '
  'passed at night carried one lamp for two sailors'
)
DENSITY, MEAN = 0.15, 3.0
LENGTHS = {'inputs': 128, 'targets': 29}
PREFIX_LENGTHS = {'inputs': 64, 'targets': 64}


def documents() -> list[str]:
  """150 documents of 1 to 60 words, an empty one, and one of 70,000 bytes."""
  rng = np.random.default_rng(0)
  words = TEXT.split()
  texts = [
    ' '.join(rng.choice(words, size=rng.integers(1, 61))) for _ in range(150)
  ]
  texts[40] = ''
  texts[90] = (' '.join(rng.choice(words, size=100)) + ' ') * 200
  texts[90] = texts[90][:70_000]
  return texts


def lengths() -> dict[str, np.ndarray]:
  """Raw tokens and targets length for every inputs length from 10 to 2100."""
  inputs = np.arange(10, 2101)
  helper = functools.partial(
    preprocessors.random_spans_helper,
    extra_tokens_per_span_inputs=1,
    extra_tokens_per_span_targets=1,
    noise_density=DENSITY,
    mean_noise_span_length=MEAN,
  )
  found = [helper(inputs_length=int(length)) for length in inputs]
  return {'inputs': inputs, 'window_and_targets': np.array(found)}


def masks() -> dict[str, np.ndarray]:
  """Noise masks by length; row s of each is the mask for seeds (s, s + 1)."""
  result = {}
  for length in (1, 2, 5, 20, 100, 568, 1138):
    rows = [
      preprocessors.random_spans_noise_mask(
        tf.constant(length), DENSITY, [(s, s + 1), (s + 2, s + 3)], MEAN
      ).numpy()
      for s in range(10)
    ]
    result[f'length_{length}'] = np.stack(rows)
  return result


def t5_stream(objective, lengths, seed, shuffle) -> dict[str, np.ndarray]:
  """The inputs and targets of one epoch of `documents()`."""
  features = stream(documents(), objective, lengths, seed, shuffle)
  return {
    name: features[name].astype(np.uint16)
    for name in ('encoder_input_tokens', 'decoder_target_tokens')
  }


def main():
  np.savez_compressed(HERE / 'lengths.npz', **lengths())
  np.savez_compressed(HERE / 'masks.npz', **masks())
  text = '\n'.join(documents()).encode()
  np.savez_compressed(HERE / 'documents.npz', text=np.frombuffer(text, 'u1'))
  for seed in (0, 7):
    np.savez_compressed(
      HERE / f'span_corruption_seed{seed}.npz',
      **t5_stream(preprocessors.span_corruption, LENGTHS, seed, seed == 7),
    )
    np.savez_compressed(
      HERE / f'prefix_lm_seed{seed}.npz',
      **t5_stream(preprocessors.prefix_lm, PREFIX_LENGTHS, seed, seed == 7),
    )


if __name__ == '__main__':
  main()
