"""How outputs are looked for: the likeliest token, a drawn one, or in beams."""

import dataclasses
import math
from typing import Literal

from st_moe.errors import UserError

PAD_ID = 0


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token (greedy).
    top_k: choose among this many likeliest tokens; None: among all.
    top_p: choose among the likeliest tokens that together have this
      probability, the one that reaches it included; None: among all.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not 0.0 <= self.temperature < math.inf:
      raise UserError(
        f'Sampling.temperature must be >= 0, got {self.temperature}'
      )
    if self.top_k is not None and self.top_k < 1:
      raise UserError(f'Sampling.top_k must be >= 1, got {self.top_k}')
    if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
      raise UserError(f'Sampling.top_p must be in (0, 1], got {self.top_p}')


GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class BeamSearch:
  """The search of `generate` in transformers, whose defaults these are.

  A sequence is scored by its log-likelihood in nats over its number of tokens
  to the power of `length_penalty`, end-of-sequence included in both.

  Attributes:
    num_beams: unfinished sequences kept at every step, and finished ones.
    length_penalty: 0 compares log-likelihoods, 1 means per token; above, long
      sequences gain.
    early_stopping: True: stop when there are `num_beams` finished sequences.
      False: stop when, besides, the likeliest unfinished one, were it finished
      now, would not be among them. 'never': stop when it could not come among
      them at any length, were all its further tokens certain.
  """

  num_beams: int = 4
  length_penalty: float = 1.0
  early_stopping: bool | Literal['never'] = False

  def __post_init__(self):
    if self.num_beams < 1:
      raise UserError(
        f'BeamSearch.num_beams must be >= 1, got {self.num_beams}'
      )
    if not math.isfinite(self.length_penalty):
      raise UserError(
        'BeamSearch.length_penalty must be a finite number, got '
        f'{self.length_penalty}'
      )
    if self.early_stopping not in (True, False, 'never'):
      raise UserError(
        "BeamSearch.early_stopping must be True, False or 'never', got "
        f'{self.early_stopping!r}'
      )
