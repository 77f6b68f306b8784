"""When a run warns of its routers, and what it keeps of a loss spike."""

import dataclasses

from st_moe.checks import Checked


@dataclasses.dataclass(frozen=True)
class HealthConfig(Checked):
  """Thresholds of the alarms in training; 0 turns one off."""

  # An expert that no token has chosen for so many steps is dead. Among tokens
  # by the thousand a live one misses not even one step by chance; a hundred are
  # left for the balance loss to bring it back.
  dead_expert_steps: int = 100
  # A router has collapsed when fewer experts than this share of them are in
  # use, counted as exp(entropy of the loads), or hardly more than each token
  # takes: balance has failed, and capacity drops most tokens.
  min_experts_used: float = 0.125
  # ... or when the mean entropy of its distributions is below this share of
  # ln E: choices are all but certain, and gradients of the router vanish. The
  # routers of small models trained here stay above 0.7.
  min_entropy: float = 0.02
  collapse_steps: int = 20  # in a row, until that is an alarm
  # Router logits beyond this. At 128 the roundoff of bfloat16 is 0.5, which
  # changes a probability by a third (ST-MoE, footnote 7); with the router
  # z-loss logits stay far below.
  max_logit: float = 128.0
  # A loss is a spike when it is so many standard deviations above the mean of
  # the last `spike_window` losses: the spike score of OLMo 2 (arXiv 2501.00656)
  # counts values seven away, in a window of 1000.
  spike_deviations: float = 7.0
  spike_window: int = 128
  # Steps whose router statistics and token ids are kept for such a moment.
  history_steps: int = 16

  def check(self) -> None:
    self.require_nonnegative(
      'dead_expert_steps min_experts_used min_entropy collapse_steps max_logit '
      'spike_deviations spike_window history_steps'
    )
    self.require_rate('min_experts_used min_entropy')
    self.require_positive('collapse_steps')
    self.require(
      not self.spike_deviations or self.spike_window >= 2,
      f'spike_window {self.spike_window} must be >= 2: a deviation needs two '
      'losses; spike_deviations = 0 turns spikes off',
    )
