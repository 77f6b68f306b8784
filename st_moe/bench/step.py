"""`st_moe bench step`: the training step of a configuration.

The step is the one that `st_moe pretrain` runs, on its mesh, with parameters
as at its start and batches of random tokens of full length; a new batch each
step, out of a few. Tokens are those of inputs and targets. Steps with other
settings are taken in turns with it, each from a state of its own.
"""

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from st_moe import partitioning
from st_moe.bench import pictures
from st_moe.bench.flops import step_flops
from st_moe.bench.peaks import peak_flops
from st_moe.bench.results import (
  Output,
  as_json,
  mebibytes,
  medians,
  milliseconds,
  number,
  open_output,
)
from st_moe.bench.shares import traced_shares
from st_moe.bench.timing import (
  Sample,
  Spread,
  flops,
  ratio,
  run_rounds,
  temp_bytes,
)
from st_moe.config import RunConfig, to_dict
from st_moe.errors import RunStopped, UserError
from st_moe.preflight import check_run
from st_moe.train_state import parameter_counts
from st_moe.train_step import step_program

AS_GIVEN = 'as given'
_BATCHES = 4
_TRACED_STEPS = 3
_COLUMNS = (
  'step', 'wall ms', 'cpu ms', 'time / as given', 'cpu', 'temp MiB',
  'compile s',
)  # fmt: skip


class TrainStep:
  """The compiled step of a run and its state.

  Attributes:
    name: AS_GIVEN, or the settings in which it differs.
    tokens: of a step.
    compiled: the executable.
    compile_seconds: of tracing and compiling.
    counts: numbers of parameters.
    mesh: of the run.
    digest: of the program, before XLA's optimizations.
  """

  def __init__(self, name: str, config: RunConfig, mesh: jax.sharding.Mesh):
    """Builds the step as training does, and takes one."""
    self.name, self.mesh = name, mesh
    lengths = config.data.inputs_length + config.data.targets_length
    self.tokens = config.batch_size * lengths
    begin = time.perf_counter()
    program = step_program(config, self.mesh)
    with partitioning.use_mesh(self.mesh, config.mesh):
      lowered = program.traced.lower()
      self.compiled = lowered.compile()
    self.compile_seconds = time.perf_counter() - begin
    self.digest = hashlib.sha256(lowered.as_text().encode()).digest()
    self._key = program.key
    self.counts = parameter_counts(program.shapes)
    self._state = program.initial_state()
    self._batches = [
      partitioning.shard_batch(random_batch(config, seed), self.mesh)
      for seed in range(_BATCHES)
    ]
    self._taken = 0
    self._result: dict[str, Any] = {}
    self.measure()

  def measure(self) -> Sample:
    """Takes one step."""
    batch = self._batches[self._taken % _BATCHES]
    wall, cpu = time.perf_counter(), time.process_time()
    self._state, self._result = self.compiled(self._state, batch, self._key)
    jax.block_until_ready((self._state, self._result))
    self._taken += 1
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)

  def check(self) -> float:
    """Returns the loss of the last step.

    Raises:
      RunStopped: when a step was not finite: it then changes nothing, and its
        time is not that of training.
    """
    loss, skipped = (
      float(self._result[name]) for name in ('loss', 'skipped_steps')
    )
    if skipped or not np.isfinite(loss):
      raise RunStopped(
        f'{skipped:.0f} of {self._taken} steps{_with(self.name)} were not '
        f'finite (loss {loss}); lower OptimizerConfig.learning_rate'
      )
    return loss


def _with(name: str) -> str:
  return '' if name == AS_GIVEN else f' with {name}'


def random_batch(config: RunConfig, seed: int) -> dict[str, np.ndarray]:
  """Returns a batch without padding: random ids, all of them targets."""
  rng = np.random.default_rng(seed)
  shape = (config.batch_size, config.data.targets_length)
  targets = rng.integers(1, config.model.vocab_size, shape, np.int32)
  shape = (config.batch_size, config.data.inputs_length)
  inputs = rng.integers(1, config.model.vocab_size, shape, np.int32)
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones_like(targets),
  }
  if config.data.pack:  # one segment fills a row
    for stack, tokens in (('encoder', inputs), ('decoder', targets)):
      batch[f'{stack}_segment_ids'] = np.ones_like(tokens)
      batch[f'{stack}_positions'] = np.broadcast_to(
        np.arange(tokens.shape[1], dtype=np.int32), tokens.shape
      )
  return batch


def run(args: argparse.Namespace, config: RunConfig) -> None:
  """Times the step, traces it, prints tables, writes JSON and a picture.

  Raises:
    UserError: for a configuration that cannot run here.
    RunStopped: when a step is not finite.
  """
  if args.rounds < 1:
    raise UserError(f'--rounds must be positive, got {args.rounds}')
  configs = {AS_GIVEN: config} | args.compared
  meshes = {name: _mesh(name, c, config) for name, c in configs.items()}
  output = Output(open_output(args.output, 'step'), 'step', args.argv)
  steps = []
  for name, one in configs.items():
    files = ', '.join(args.gin_file)
    output.say(f'compiling the step of {files}{_with(name)}')
    step = TrainStep(name, one, meshes[name])
    output.say(
      f'  {step.counts["total"]:,} parameters ({step.counts["expert"]:,} in '
      f'experts), compiled in {step.compile_seconds:.0f} s'
    )
    if steps and step.digest == steps[0].digest:
      output.say(
        '  the same program as that of the step as given: these settings do '
        'nothing here'
      )
    steps.append(step)
  samples = run_rounds(steps, args.rounds)
  losses = {step.name: step.check() for step in steps}
  step = steps[0]

  def traced() -> None:
    for _ in range(_TRACED_STEPS):
      step.measure()

  shares = traced_shares(traced, step.compiled)
  results = _results(config, step, samples[AS_GIVEN]) | {
    'loss': losses[AS_GIVEN],
    'shares': shares,
    'compared': _compared(steps, samples, losses),
  }
  _print(output, results)
  if len(steps) > 1:
    _print_compared(output, steps, samples)
  output.finish(results, pictures.draw_step(results))


def _mesh(name: str, config: RunConfig, given: RunConfig) -> jax.sharding.Mesh:
  """Returns the mesh of a step.

  Args:
    name: AS_GIVEN, or the settings that make the step another one.
    config: of the step.
    given: of the step as given.

  Raises:
    UserError: when sizes do not divide over it, or there is nothing to compare.
  """
  if name != AS_GIVEN and config == given:
    raise UserError(f'--compare {name}: that is the step as given')
  if jax.process_count() > 1:
    raise UserError('bench step runs on the devices of one process only')
  try:
    mesh = partitioning.make_mesh(config.mesh)
    check_run(config, config.model.vocab_size, mesh)
  except UserError as e:
    if name == AS_GIVEN:
      raise
    raise UserError(f'--compare {name}: {e}') from e
  return mesh


def _over_given(
  steps: list[TrainStep], samples: Mapping[str, list[Sample]], clock: str
) -> dict[str, Spread]:
  """Returns each step's time over that of the step as given, by token."""
  by_token = {
    step.name: [
      Sample(sample.wall / step.tokens, sample.cpu / step.tokens)
      for sample in samples[step.name]
    ]
    for step in steps
  }
  return {
    name: ratio(found, by_token[AS_GIVEN], clock)
    for name, found in by_token.items()
  }


def _compared(
  steps: list[TrainStep],
  samples: Mapping[str, list[Sample]],
  losses: Mapping[str, float],
) -> dict[str, Any]:
  """Returns the numbers of the steps with other settings, ready for JSON."""
  over_given = _over_given(steps, samples, 'wall')
  return {
    step.name: {
      'step': as_json(samples[step.name]),
      'token_time_over_given': dataclasses.asdict(over_given[step.name]),
      'tokens': step.tokens,
      'parameters': step.counts,
      'mesh': dict(step.mesh.shape),
      'compile_s': step.compile_seconds,
      'temp_bytes': temp_bytes(step.compiled),
      'loss': losses[step.name],
    }
    for step in steps[1:]
  }


def _print_compared(
  output: Output, steps: list[TrainStep], samples: Mapping[str, list[Sample]]
) -> None:
  wall = _over_given(steps, samples, 'wall')
  cpu = _over_given(steps, samples, 'cpu')
  by_token = len({step.tokens for step in steps}) > 1
  output.table(
    f'in turns, medians of {len(samples[AS_GIVEN])} rounds [quartiles]',
    [
      name.replace('time', 'time of a token') if by_token else name
      for name in _COLUMNS
    ],
    [
      (
        step.name,
        *medians(samples[step.name]),
        str(wall[step.name]),
        number(cpu[step.name].median),
        mebibytes(temp_bytes(step.compiled)),
        f'{step.compile_seconds:.0f}',
      )
      for step in steps
    ],
  )


def _results(
  config: RunConfig, step: TrainStep, samples: list[Sample]
) -> dict[str, Any]:
  """Returns the numbers of the run, ready for JSON."""
  tokens = step.tokens
  devices = step.mesh.devices
  parts = step_flops(config, partitioning.batch_shards(step.mesh))
  model_flops = sum(parts.values())
  speeds = Spread.of([model_flops / sample.wall for sample in samples])
  peak = peak_flops(devices.flat[0].device_kind)
  return {
    'config': to_dict(config),
    'parameters': step.counts,
    'mesh': dict(step.mesh.shape),
    'step': as_json(samples),
    'compile_s': step.compile_seconds,
    'temp_bytes': temp_bytes(step.compiled),
    'compiled_flops_per_device': flops(step.compiled),
    'tokens': tokens,
    'tokens_per_second': dataclasses.asdict(
      Spread.of([tokens / sample.wall for sample in samples])
    ),
    'model_flops': parts,
    'model_flops_per_second': dataclasses.asdict(speeds),
    'peak_flops_per_device': peak,
    'mfu': None if peak is None else speeds.median / (peak * devices.size),
  }


def _print(output: Output, results: dict[str, Any]) -> None:
  parts, shares = results['model_flops'], results['shares']
  model_flops = sum(parts.values())
  wall, cpu = (Spread(**results['step'][clock]) for clock in ('wall', 'cpu'))
  speed = Spread(**results['tokens_per_second'])
  rate = results['model_flops_per_second']['median']
  count = len(results['step']['wall_s'])
  output.say(
    f'step: {milliseconds(wall.median)} ms [{milliseconds(wall.low)} '
    f'{milliseconds(wall.high)}], cpu {milliseconds(cpu.median)} ms, median of '
    f'{count} [quartiles]'
  )
  output.say(
    f'tokens/s: {speed.median:,.0f} [{speed.low:,.0f} {speed.high:,.0f}], '
    f'{results["tokens"]:,} tokens a step; scratch memory '
    f'{mebibytes(results["temp_bytes"])} MiB'
  )
  output.say(
    f'model FLOPs: {model_flops:.3g} a step, {rate:.3g} per second; '
    + _utilization(results)
  )
  output.say('')
  rows = [
    (
      part,
      f'{share:.1%}',
      f'{1e3 * wall.median * share:.1f}',
    )
    for part, share in shares.items()
  ]
  if rows:
    output.table(
      f'where the time goes: {_TRACED_STEPS} traced steps',
      ('part', 'share', 'ms of the step'),
      rows,
    )
  else:
    output.say('no shares: the profiler names no operations here')
  output.table(
    'model FLOPs of a step, forward and backward',
    ('part', 'FLOPs', 'share'),
    [
      (part, f'{value:.3g}', f'{value / model_flops:.1%}')
      for part, value in parts.items()
    ],
  )


def _utilization(results: dict[str, Any]) -> str:
  device = jax.devices()[0].device_kind
  if results['mfu'] is None:
    return f'no peak is known for {device}, so no MFU'
  peak = results['peak_flops_per_device']
  dtype = results['config']['model']['activation_dtype']
  note = '' if dtype == 'bfloat16' else f' (which is for bfloat16, not {dtype})'
  return f'MFU {results["mfu"]:.1%} of {peak:.4g} FLOP/s a device{note}'
