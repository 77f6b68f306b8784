"""Which part of the model a step's time goes to, from a profiler's trace.

The step that is timed is also traced, as it is: `jax.profiler` gives the start
and the duration of every operation of the compiled program, and the program's
text says for every operation from which line of the model it comes (the name
scopes of Flax modules and of `jax.named_scope`). Durations are added up by
part. So nothing is taken out of its surroundings to be timed alone, and no
sum has to be made up.

Its limits: an operation that XLA fused from several parts counts for the one
at its root; operations that run at the same time on several threads or streams
each count in full, so shares are of busy time and not of the clock; waiting is
in no share. Operations without a name, copies mostly, are in 'other'; a
dropless backend sorts and moves its rows inside 'experts'.
"""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# Part and pattern of the name scope; the first that fits. The scopes are those
# of moe.py, blocks.py, transformer.py and train_step.py; what is differentiated
# and belongs to no module is the loss.
_PARTS = (
  ('optimizer', r'/optimizer/|jit\(train_step\)/(jit\(_where\)|is_finite|and)'),
  ('norms, residuals', r'_norm/|\._residual/|_pre_norm'),
  ('routing', r'/route/|/router/'),
  ('experts', r'/experts/'),
  ('dispatch, combine', r'/dispatch/|/combine/|/moe/|\._moe/'),
  ('attention', r'attention|relpos_bias'),
  ('dense FFN', r'/mlp/|/extra_mlp/|\._mlp/'),
  ('softmax, loss', r'_logits|logits_dense|jvp\((?!EncoderDecoder)'),
  ('embedding', r'token_embedder|EncoderDecoder'),
)
PARTS = (*(part for part, _ in _PARTS), 'other')

# Operations that contain others, which are counted themselves.
_CONTAINERS = ('while', 'call', 'conditional')

# '%name = shape opcode(...), ..., metadata={op_name="..."}'; shapes of tuples
# have spaces in them.
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][a-z0-9\-]*)\(', re.MULTILINE
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def part_of(scope: str) -> str:
  """Returns the part of the model that a name scope belongs to."""
  for part, pattern in _PARTS:
    if re.search(pattern, scope):
      return part
  return 'other'


def operation_parts(program: str) -> dict[str, str]:
  """Returns the part of every operation that does work itself.

  Args:
    program: text of a compiled program (`compiled.as_text()`).
  """
  parts = {}
  for match in _INSTRUCTION.finditer(program):
    name, opcode = match.groups()
    if opcode in _CONTAINERS:
      continue
    line = program[match.start() : program.find('\n', match.end())]
    scope = _OP_NAME.search(line)
    parts[name] = part_of(scope.group(1) if scope else '')
  return parts


def traced_shares(run: Callable[[], Any], compiled: Any) -> dict[str, float]:
  """Returns the share of each part in the busy time of a run; adds up to 1.

  Args:
    run: runs the program a few times and waits for it.
    compiled: the program.

  Returns:
    {part: share}; empty where the trace names no operation of the program.
  """
  text = compiled.as_text()
  module = text.split(maxsplit=2)[1].rstrip(',')
  parts = operation_parts(text)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    busy = _busy_time(Path(folder), module, parts)
  total = sum(busy.values())
  return {part: busy[part] / total for part in PARTS} if total else {}


def _busy_time(
  folder: Path, module: str, parts: dict[str, str]
) -> collections.Counter:
  """Returns nanoseconds by part, over all devices and threads."""
  busy: collections.Counter = collections.Counter()
  for path in folder.rglob('*.xplane.pb'):
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      for line in plane.lines:
        for event in line.events:
          stats = dict(event.stats)
          operation = str(stats.get('hlo_op', ''))
          if module in str(stats.get('hlo_module', '')) and operation in parts:
            busy[parts[operation]] += event.duration_ns
  return busy
