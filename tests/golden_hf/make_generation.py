"""Makes what transformers generates with models of this folder.

`python tests/golden_hf/make_generation.py` needs torch and transformers.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.generation import logits_process

HERE = Path(__file__).parent
# Each: the id that ends sequences, one that these models like to write at
# various places. The second model has room for every token.
MODELS = {'t5_v1_1': 13, 'switch_step_2': 22}
PROMPTS, LONGEST, GENERATED, BEAMS = 50, 14, 12, 4
# Each: length penalty, early stopping.
SEARCHES = {
  'beam_0.6': (0.6, False),
  'beam_1.0': (1.0, False),
  'beam_2.0': (2.0, False),
  'beam_early': (1.0, True),
  'beam_never': (2.0, 'never'),
}
# Each: temperature, top_k, top_p; of logits [ROWS, VOCAB].
FILTERS = {
  'temperature': (0.7, None, None),
  'top_k': (1.0, 5, None),
  'top_p': (1.0, None, 0.8),
  'all': (1.5, 12, 0.6),
}
ROWS, VOCAB = 8, 40


def prompts(vocab_size: int, seed: int) -> np.ndarray:
  """Returns random tokens [PROMPTS, LONGEST] of every length from 1 on."""
  rng = np.random.default_rng(seed)
  lengths = 1 + np.arange(PROMPTS) % LONGEST
  ids = rng.integers(1, vocab_size, (PROMPTS, LONGEST))
  return (ids * (np.arange(LONGEST) < lengths[:, None])).astype(np.int32)


def generate(model, tokens: np.ndarray, eos: int, **settings) -> np.ndarray:
  """Returns what follows the decoder's start, padded to GENERATED.

  Behind its end a sequence is padded, where beam search repeats the end.
  """
  ids = torch.tensor(tokens).long()
  with torch.no_grad():
    found = model.generate(
      input_ids=ids,
      attention_mask=(ids > 0).long(),
      max_new_tokens=GENERATED,
      do_sample=False,
      eos_token_id=eos,
      suppress_tokens=[0],  # padding is no word
      **settings,
    )[:, 1:].numpy()
  padded = np.zeros((len(tokens), GENERATED), np.int8)
  padded[:, : found.shape[1]] = found
  ended = np.cumsum(padded == eos, axis=1) - (padded == eos)
  return padded * (ended == 0)


def filtered(logits: np.ndarray, temperature, top_k, top_p) -> np.ndarray:
  """Returns the probabilities that transformers would draw from."""
  warpers = [
    logits_process.SuppressTokensLogitsProcessor([0]),
    logits_process.TemperatureLogitsWarper(temperature),
  ]
  if top_k is not None:
    warpers.append(logits_process.TopKLogitsWarper(top_k))
  if top_p is not None:
    warpers.append(logits_process.TopPLogitsWarper(top_p))
  scores = torch.tensor(logits)
  for warper in warpers:
    scores = warper(None, scores)
  return torch.softmax(scores, dim=-1).numpy()


def main(folder: Path) -> None:
  for seed, (name, eos) in enumerate(MODELS.items()):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(HERE / name)
    tokens = prompts(model.config.vocab_size, seed)
    outputs = {'greedy': generate(model.eval(), tokens, eos, num_beams=1)}
    for search, (penalty, early) in SEARCHES.items():
      outputs[search] = generate(
        model,
        tokens,
        eos,
        num_beams=BEAMS,
        length_penalty=penalty,
        early_stopping=early,
      )
    np.savez_compressed(
      folder / f'generated_{name}.npz',
      prompts=tokens.astype(np.int8),
      **outputs,
    )
  logits = np.random.default_rng(0).normal(0, 2, (ROWS, VOCAB))
  logits = logits.astype(np.float32)
  probabilities = {k: filtered(logits, *v) for k, v in FILTERS.items()}
  np.savez_compressed(
    folder / 'sampling_filters.npz', logits=logits, **probabilities
  )
  settings = {
    'eos': MODELS,
    'searches': SEARCHES,
    'filters': FILTERS,
    'beams': BEAMS,
  }
  (folder / 'generation.json').write_text(json.dumps(settings) + '\n')


if __name__ == '__main__':
  main(Path(sys.argv[1]) if sys.argv[1:] else HERE)
