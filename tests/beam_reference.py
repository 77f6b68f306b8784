"""Beam search in plain Python, on lists, without a cache.

Written from the description of the search (`decoding.BeamSearch`), to be read;
`decoding/beam.py` is held against it.
"""

from collections.abc import Callable, Sequence

Score = Callable[[Sequence[int]], Sequence[float]]


def beam_search(
  next_log_probs: Score,
  *,
  num_beams: int,
  length_penalty: float,
  early_stopping: bool | str,
  max_length: int,
  eos_id: int,
) -> list[int]:
  """Returns the best sequence, end-of-sequence included if it ends.

  Args:
    next_log_probs: from the tokens so far to the log-probabilities of the next
      token; that of padding, id 0, is not looked at.
    num_beams, length_penalty, early_stopping: see `decoding.BeamSearch`.
    max_length: tokens at most.
    eos_id: ends a sequence.
  """
  running = [(0.0, [])]
  finished = []
  for length in range(1, max_length + 1):
    candidates = []
    for score, tokens in running:
      for token, log_prob in enumerate(next_log_probs(tokens)):
        if token:
          candidates.append((score + log_prob, [*tokens, token]))
    candidates.sort(key=lambda one: -one[0])
    candidates = candidates[: 2 * num_beams]
    done = [
      tokens[-1] == eos_id or length == max_length for _, tokens in candidates
    ]
    for (score, tokens), ends in list(zip(candidates, done, strict=True))[
      :num_beams
    ]:
      if ends:
        finished.append((score / length**length_penalty, tokens))
    finished = sorted(finished, key=lambda one: -one[0])[:num_beams]
    running = [
      one for one, ends in zip(candidates, done, strict=True) if not ends
    ][:num_beams]
    if len(finished) < num_beams:
      continue
    if early_stopping is True or not running:
      break
    hoped = length
    if early_stopping == 'never' and length_penalty > 0:
      hoped = max_length
    if running[0][0] / hoped**length_penalty <= finished[-1][0]:
      break
  return finished[0][1]
