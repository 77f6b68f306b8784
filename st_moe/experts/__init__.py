"""How tokens travel to experts and back: the backends, proven equal.

choice.py picks one and says why; buffers.py fills buffers of a fixed capacity
with one-hot products or by index; ragged.py computes every kept choice and
drops nothing; index_tables.py holds the moves by index that both use, and
grouped_matmul.py the products of rows sorted by expert.
"""

from st_moe.experts.buffers import combine, dispatch
from st_moe.experts.choice import Backend, BackendName, choose_backend
from st_moe.experts.ragged import (
  BIAS_AXES,
  WI_AXES,
  WO_AXES,
  ExpertWeights,
  process_ragged,
)

__all__ = [
  'BIAS_AXES',
  'Backend',
  'BackendName',
  'ExpertWeights',
  'WI_AXES',
  'WO_AXES',
  'choose_backend',
  'combine',
  'dispatch',
  'process_ragged',
]
