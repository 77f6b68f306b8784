"""Which backend, and why: by platform, sizes, and what may be dropped."""

import dataclasses
from typing import Literal

from st_moe.experts.grouped_matmul import form_for

BackendName = Literal['einsum', 'gather', 'ragged']

# On TPU einsum is chosen while it costs less than about 10% of the experts:
# 2 S / (3 F) < 0.1.
EINSUM_GROUP_PER_D_FF = 0.15


@dataclasses.dataclass(frozen=True)
class Backend:
  """A backend and, for the run log, why it was chosen."""

  name: BackendName
  reason: str


def choose_backend(
  requested: Literal['auto', 'einsum', 'gather', 'ragged'],
  *,
  platform: str,
  group_tokens: int,
  d_ff: int,
  experts_per_device: int | None = None,
  dropless: bool = False,
) -> Backend:
  """Returns the backend to use.

  'auto' takes the faster of 'einsum' and 'gather', which compute the same. It
  does not take 'ragged' for a model with a capacity: that would be another
  model. What must be dropless is 'ragged' whatever was requested: room for a
  whole group at every expert would multiply E rows for every token.

  Args:
    requested: `ModelConfig.dispatch`.
    platform: 'cpu', 'gpu' or 'tpu'.
    group_tokens: S.
    d_ff: F, of one expert.
    experts_per_device: for the reason; None: unknown.
    dropless: whether nothing may be dropped (evaluation, decoding).
  """
  if requested == 'ragged' or dropless:
    why = 'as configured' if requested == 'ragged' else 'evaluation'
    held = ''
    if experts_per_device is not None:
      held = f'; {experts_per_device} experts per device'
    return Backend(
      'ragged', f'dropless {why}, {form_for(platform)} products{held}'
    )
  if requested != 'auto':
    return Backend(requested, 'as configured')
  if platform != 'tpu':
    return Backend('gather', f'row gathers are the fastest form on {platform}')
  limit = EINSUM_GROUP_PER_D_FF * d_ff
  sizes = f'{group_tokens} tokens per group, limit {limit:g} = 0.15 d_ff'
  if group_tokens <= limit:
    return Backend('einsum', f'small groups on tpu ({sizes})')
  return Backend('gather', f'large groups on tpu ({sizes})')
