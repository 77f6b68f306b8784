"""`st_moe bench generate`: batched generation with a configuration's model.

What is timed is `Predictor.generate`, as `st_moe predict` calls it, with a
model as at its start: random inputs of full length, answered with as many
tokens as `DataConfig.targets_length` says, since no end of sequence is ever
chosen. A sample is one batch, the way to the device and back included.
"""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np

from st_moe import partitioning, processes
from st_moe.bench import pictures
from st_moe.bench.results import Output, as_json, milliseconds, open_output
from st_moe.bench.timing import Sample, Spread, ratio, run_rounds
from st_moe.config import RunConfig, to_dict
from st_moe.errors import RunStopped, UserError
from st_moe.optimizer import make_optimizer
from st_moe.predictor import Predictor
from st_moe.preflight import check_run
from st_moe.train_state import (
  abstract_state,
  create_state,
  parameter_counts,
  state_shardings,
)
from st_moe.train_step import init_key
from st_moe.transformer import EncoderDecoder


def method_name(num_beams: int) -> str:
  """Returns 'greedy' or '4 beams'."""
  return 'greedy' if num_beams == 1 else f'{num_beams} beams'


class Generation:
  """Outputs for one batch of inputs.

  Attributes:
    batch_size: inputs.
    num_beams: of the search; 1: greedy.
    tokens: that all outputs have together.
    compile_seconds: of the first call.
  """

  def __init__(
    self,
    config: RunConfig,
    params: Any,
    mesh: Any,
    batch_size: int,
    num_beams: int,
  ):
    """Compiles it, and looks at what it gives.

    Raises:
      UserError: when the batch does not divide over the mesh.
      RunStopped: when outputs are not whole.
    """
    self.batch_size, self.num_beams = batch_size, num_beams
    self.name = f'{batch_size}, {method_name(num_beams)}'
    lengths = config.data
    self._predictor = Predictor(
      config.model,
      params,
      mesh,
      eos_id=config.model.vocab_size,  # no token's
      targets_length=lengths.targets_length,
      batch_size=batch_size,
      inputs_length=lengths.inputs_length,
      num_beams=num_beams,
    )
    if self._predictor.batch_size != batch_size:
      raise UserError(
        f'--batch_size={batch_size} does not divide over the '
        f'{partitioning.batch_shards(mesh)} data shards'
      )
    rng = np.random.default_rng(0)
    shape = (batch_size, lengths.inputs_length)
    self._inputs = rng.integers(1, config.model.vocab_size, shape).tolist()
    begin = time.perf_counter()
    outputs = self._predictor.generate(self._inputs)
    self.compile_seconds = time.perf_counter() - begin
    self.tokens = sum(map(len, outputs))
    if self.tokens != batch_size * lengths.targets_length:
      raise RunStopped(
        f'{self.name}: {self.tokens} tokens came, not {batch_size} x '
        f'{lengths.targets_length}; nothing was timed'
      )

  def measure(self) -> Sample:
    """Answers the batch once."""
    wall, cpu = time.perf_counter(), time.process_time()
    self._predictor.generate(self._inputs)
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


@dataclasses.dataclass(frozen=True)
class Measured:
  """A form of generation and its samples.

  Attributes:
    form: what was timed.
    samples: one per round.
    over_greedy: its time over that of greedy decoding of the same batch, in
      the same rounds; None where that was not timed.
  """

  form: Generation
  samples: list[Sample]
  over_greedy: Spread | None

  @property
  def tokens_per_second(self) -> Spread:
    """Tokens of the outputs a second."""
    return Spread.of([self.form.tokens / s.wall for s in self.samples])

  def as_json(self) -> dict[str, Any]:
    form, over = self.form, self.over_greedy
    return {
      'batch_size': form.batch_size,
      'num_beams': form.num_beams,
      'tokens': form.tokens,
      'compile_s': form.compile_seconds,
      'time': as_json(self.samples),
      'tokens_per_second': dataclasses.asdict(self.tokens_per_second),
      'over_greedy': None if over is None else dataclasses.asdict(over),
    }


def _check(args: argparse.Namespace) -> None:
  for name in ('batch_size', 'num_beams'):
    values = getattr(args, name)
    if len(set(values)) < len(values):
      raise UserError(f'--{name}: {values} has a number twice')
  if args.rounds < 1:
    raise UserError(f'--rounds must be positive, got {args.rounds}')


def run(args: argparse.Namespace, config: RunConfig) -> None:
  """Times generation in turns, prints a table, writes JSON and a picture.

  Raises:
    UserError: for a configuration that cannot run here.
    RunStopped: when outputs are not whole.
  """
  args.batch_size = args.batch_size or [1, 8, 32]
  args.num_beams = args.num_beams or [1, 4]
  _check(args)
  processes.check_joined()
  output = Output(open_output(args.output, 'generate'), 'generate', args.argv)
  mesh = partitioning.make_mesh(config.mesh)
  one = dataclasses.replace(
    config, batch_size=partitioning.batch_shards(mesh), microbatches=1
  )
  check_run(one, config.model.vocab_size, mesh)  # batches have flags
  model = EncoderDecoder(config.model)
  shapes = abstract_state(config, model)
  params = create_state(
    config,
    model,
    make_optimizer(config.optimizer, shapes.axes, config.steps),
    init_key(config.seed),
    state_shardings(shapes, mesh, config.mesh),
  ).params
  counts = parameter_counts(shapes)
  output.say(
    f'{", ".join(args.gin_file)}: {counts["total"]:,} parameters '
    f'({counts["expert"]:,} in experts); {config.data.inputs_length} tokens '
    f'in, {config.data.targets_length} out'
  )
  forms = []
  for batch_size in args.batch_size:
    for num_beams in args.num_beams:
      form = Generation(config, params, mesh, batch_size, num_beams)
      output.say(f'  {form.name}: compiled in {form.compile_seconds:.0f} s')
      forms.append(form)
  samples = run_rounds(forms, args.rounds)
  measured = [_measured(form, samples) for form in forms]
  _print(output, measured, args.rounds)
  results = {
    'config': to_dict(config),
    'parameters': counts,
    'mesh': dict(mesh.shape),
    'measurements': [one.as_json() for one in measured],
  }
  output.finish(results, pictures.draw_generation(measured))


def _measured(form: Generation, samples: dict[str, list[Sample]]) -> Measured:
  greedy = f'{form.batch_size}, {method_name(1)}'
  over = None
  if greedy in samples and form.num_beams > 1:
    over = ratio(samples[form.name], samples[greedy])
  return Measured(form, samples[form.name], over)


def _print(output: Output, measured: list[Measured], rounds: int) -> None:
  rows = []
  for one in measured:
    speed = one.tokens_per_second
    wall = Spread.of([sample.wall for sample in one.samples])
    rows.append(
      (
        one.form.name,
        milliseconds(wall.median),
        f'{speed.median:,.0f} [{speed.low:,.0f} {speed.high:,.0f}]',
        '-' if one.over_greedy is None else str(one.over_greedy),
      )
    )
  output.table(
    f'generation: medians of {rounds} rounds, and quartiles',
    ('inputs, method', 'ms', 'tokens/s', 'time / greedy'),
    rows,
  )
