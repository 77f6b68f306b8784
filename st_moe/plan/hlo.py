"""The text of a compiled XLA program: its computations and their loops.

Only what is needed to say how often an instruction runs. In a scheduled
program one instruction is one line, and an instruction that runs others names
their computation: `body=`, `calls=`, `to_apply=`, `branch_computations=`.
"""

import dataclasses
import functools
import re

_HEADER = re.compile(
  r'(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> (.*) \{$'
)
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r'%?([\w.-]+)')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `%name = type opcode(operands), attributes`."""

  name: str
  type: str
  opcode: str
  line: str

  @functools.cached_property
  def operands(self) -> list[str]:
    """Returns the names of the operands; the texts of a literal's items."""
    begin = self.line.index(f' {self.opcode}(') + len(self.opcode) + 2
    inside = self.line[begin : self.line.index(')', begin)]
    inside = re.sub(r'/\*.*?\*/', '', inside)
    return [item.strip().lstrip('%') for item in inside.split(',')]

  def computations(self, attribute: str) -> list[str]:
    """Returns the computations that an attribute names."""
    match = re.search(rf'\b{attribute}=(\{{[^}}]*\}}|[^,\s]+)', self.line)
    return _NAME.findall(match[1]) if match else []

  @property
  def op_name(self) -> str:
    """Returns the name scopes of the JAX operation it comes from, or ''."""
    match = re.search(r'\bop_name="([^"]*)"', self.line)
    return match[1] if match else ''


def instruction(line: str) -> Instruction:
  """Returns the instruction of a line."""
  match = _INSTRUCTION.match(line)
  return Instruction(match[1], match[2], match[3], line)


@dataclasses.dataclass
class Computation:
  """A named list of instructions, each a line that is parsed when asked for."""

  name: str
  type: str  # of its result
  lines: list[str] = dataclasses.field(default_factory=list)

  @functools.cached_property
  def instructions(self) -> dict[str, Instruction]:
    # A literal may go on over lines of its own.
    whole = filter(_INSTRUCTION.match, self.lines)
    parsed = (instruction(line) for line in whole)
    return {found.name: found for found in parsed}

  @property
  def root(self) -> Instruction:
    return instruction(
      next(line for line in self.lines if line.startswith('  ROOT '))
    )

  def constant(self, name: str) -> int | None:
    """Returns the integer that an instruction or a copy of it holds."""
    found = self.instructions.get(name)
    while found and found.opcode in ('copy', 'bitcast', 'convert'):
      found = self.instructions.get(found.operands[0])
    if found is None or found.opcode != 'constant':
      return None
    value = found.operands[0]
    return int(value) if re.fullmatch(r'-?\d+', value) else None


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations of a program, by name, and where it begins."""

  computations: dict[str, Computation]
  entry: str
  devices: int  # that run one program together

  def trips(self, loop: Instruction, caller: Computation) -> int | None:
    """Returns how often a `while` runs its body; None if that is not known.

    XLA's own count where it prints one, else what it would have computed: a
    counter in the loop's tuple that begins at a constant, grows by a constant
    and is compared with a constant.
    """
    if known := _TRIPS.search(loop.line):
      return int(known[1])
    condition = self.computations[loop.computations('condition')[0]]
    body = self.computations[loop.computations('body')[0]]
    test = condition.root  # a comparison, or a fusion of just that
    if test.opcode not in ('compare', 'fusion') or len(test.operands) != 2:
      return None
    counter = condition.instructions.get(test.operands[0])
    if counter is None or counter.opcode != 'get-tuple-element':
      return None
    index = int(re.search(r'\bindex=(\d+)', counter.line)[1])
    bound = condition.constant(test.operands[1])
    begins = caller.instructions[loop.operands[0]]
    if bound is None or begins.opcode != 'tuple':
      return None
    first = caller.constant(begins.operands[index])
    step = self._step(body, index)
    if first is None or step is None or self._direction(test) != 'LT':
      return None
    return max(0, -((first - bound) // step))

  def _direction(self, test: Instruction) -> str | None:
    if test.opcode == 'fusion':
      test = self.computations[test.computations('calls')[0]].root
    match = re.search(r'\bdirection=(\w+)', test.line)
    return match[1] if match else None

  def _step(self, body: Computation, index: int) -> int | None:
    """Returns what one trip adds to the counter."""
    if body.root.opcode != 'tuple':
      return None
    grows = body.instructions[body.root.operands[index]]
    while grows.opcode in ('copy', 'bitcast'):
      grows = body.instructions[grows.operands[0]]
    steps = [body.constant(name) for name in grows.operands]
    if grows.opcode == 'fusion':  # the addition alone
      inner = self.computations[grows.computations('calls')[0]]
      steps += [inner.constant(name) for name in inner.root.operands]
      grows = inner.root
    steps = [step for step in steps if step is not None and step > 0]
    return steps[0] if grows.opcode == 'add' and len(steps) == 1 else None


def parse(text: str) -> Program:
  """Returns the program of `compiled.as_text()`.

  Raises:
    ValueError: when the text has no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry, current = None, None
  for line in text.splitlines():
    if current is not None and line.startswith('  '):
      current.lines.append(line)
    elif match := _HEADER.match(line):
      current = Computation(match['name'], match[3])
      computations[current.name] = current
      entry = current.name if match['entry'] else entry
    else:
      current = None
  if entry is None:
    raise ValueError('no ENTRY in this text: is it compiled.as_text()?')
  count = re.search(r'\bnum_partitions=(\d+)', text[: text.index('\n')])
  return Program(computations, entry, int(count[1]) if count else 1)
