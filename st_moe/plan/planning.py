"""One run on one target: traced, compiled, measured against its devices."""

import dataclasses
import math
import re
import resource
import time
from typing import Any

import jax

from st_moe import partitioning
from st_moe.bench.flops import step_flops
from st_moe.config import RunConfig
from st_moe.experts import choose_backend
from st_moe.plan import costs, lint
from st_moe.plan.collectives import (
  Traffic,
  layout,
  link_seconds,
  read_collectives,
)
from st_moe.plan.devices import describe_devices
from st_moe.plan.targets import Target
from st_moe.preflight import check_run
from st_moe.train_step import StepProgram, step_program

# What a JAX process takes of a GPU's memory unless told otherwise
# (XLA_PYTHON_CLIENT_MEM_FRACTION).
_GPU_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a run on a target; None: not compiled, or no such rate.

  Bytes are of one device; FLOPs of one step on all devices.
  """

  target: Target
  config: RunConfig
  mesh: dict[str, int]
  parameters: dict[str, int]
  tokens: int
  model_flops: dict[str, float]
  program_flops: dict[str, float]
  state: dict[str, int]
  available: int | None
  findings: tuple[lint.Finding, ...]
  peak: int | None = None
  needs: int | None = None  # at least, where the compiler gave up
  arguments: int | None = None
  scratch: int | None = None
  traffic: Traffic | None = None
  links: dict[str, float | None] | None = None
  compile_seconds: float | None = None

  @property
  def fits(self) -> bool | None:
    """Whether the step fits; None: unknown without compiling."""
    if self.needs is not None:
      return False
    if self.available is None:
      return None
    if self.peak is not None:
      return self.peak <= self.available
    return None if self.least <= self.available else False

  @property
  def resident(self) -> int:
    """Bytes of weights and optimizer state."""
    return sum(self.state.values())

  @property
  def gradients(self) -> int:
    """Bytes of all gradients, in the dtype of activations."""
    weights = self.state['dense weights'] + self.state['expert weights']
    return weights // 4 * self._gradient_width

  @property
  def least(self) -> int:
    """Bytes that no choice of remat or microbatches makes fewer."""
    return self.resident + self.gradients

  @property
  def least_in_parts(self) -> int:
    """Bytes of weights and gradients, if all were stored in parts."""
    width = 4 + self._gradient_width
    return width * self.parameters['total'] // self.target.devices

  @property
  def _gradient_width(self) -> int:
    """Bytes of a number of a gradient; a weight has 4."""
    return 2 if self.config.model.activation_dtype == 'bfloat16' else 4

  @property
  def model_share(self) -> float:
    """Model FLOPs over those of the program."""
    return sum(self.model_flops.values()) / sum(self.program_flops.values())

  @property
  def utilization(self) -> float:
    """The ceiling of MFU; without rates, the model's share of the FLOPs."""
    needed, bound = self.seconds(self.model_flops), self.bound
    return needed / bound if needed and bound else self.model_share

  def seconds(self, flops: dict[str, float]) -> float | None:
    """Returns the least time for FLOPs at the devices' peak."""
    peak = self.target.chip.peak
    if peak is None:
      return None
    return sum(flops.values()) / (peak * self.target.devices)

  @property
  def times(self) -> dict[str, float]:
    """The least seconds of a step, were each of these all that is done."""
    links = self.links or {}
    times = {
      'arithmetic': self.seconds(self.program_flops),
      'links within a slice or node': links.get('interconnect'),
      'the network between them': links.get('network'),
    }
    return {name: time for name, time in times.items() if time is not None}

  @property
  def bound(self) -> float | None:
    """The least time of a step: the longest of `times`."""
    return max(self.times.values(), default=None)

  def as_json(self) -> dict[str, Any]:
    """Returns every number, ready for JSON."""
    traffic = self.traffic
    return {
      'target': dataclasses.asdict(self.target)
      | {'peak_flops_per_device': self.target.chip.peak},
      'mesh': self.mesh,
      'parameters': self.parameters,
      'tokens': self.tokens,
      'model_flops': self.model_flops,
      'program_flops': self.program_flops,
      'model_flops_share': self.model_share,
      'mfu_ceiling': self.utilization,
      'seconds': {
        'model_flops': self.seconds(self.model_flops),
        'program_flops': self.seconds(self.program_flops),
        'links': self.links,
        'bound': self.bound,
      },
      'bytes_per_device': {
        'state': self.state,
        'gradients': self.gradients,
        'arguments': self.arguments,
        'scratch': self.scratch,
        'peak': self.peak,
        'needs': self.needs,
        'least': self.least,
        'available': self.available,
      },
      'fits': self.fits,
      'collectives': traffic
      and {
        'bytes_by_kind': traffic.bytes_by_kind(),
        'counts_by_kind': traffic.counts_by_kind(),
        'unknown_loops': traffic.unknown_loops,
        'all': [dataclasses.asdict(c) for c in traffic.collectives],
      },
      'findings': [dataclasses.asdict(each) for each in self.findings],
      'suggestions': suggestions(self) if self.fits is False else [],
      'compile_seconds': self.compile_seconds,
      'max_rss_bytes': 1024
      * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def make_plan(config: RunConfig, target: Target, *, compiles: bool) -> Plan:
  """Plans a run.

  Args:
    config: the run.
    target: where.
    compiles: whether to compile; without, shapes alone speak, and CPU devices
      stand for the target's.

  Raises:
    UserError: when the run does not divide over its mesh, or the target's
      compiler refuses.
  """
  if compiles:
    devices = describe_devices(target)
  else:
    devices = jax.devices('cpu')[: target.devices]
    config = _as_on(target, config)
  mesh = partitioning.make_mesh(config.mesh, devices)
  check_run(config, config.model.vocab_size, mesh)
  program = step_program(config, mesh)
  shards = partitioning.batch_shards(mesh)
  model_flops = step_flops(config, shards)
  flops = costs.traced_flops(program.traced)
  loops = costs.uncounted_parts(program.traced)
  for part in loops:
    flops[part] = max(flops[part], model_flops.get(part, 0.0))
  available = target.chip.hbm_bytes
  if available is not None and target.platform == 'cuda':
    available = int(_GPU_FRACTION * available)
  plan = Plan(
    target=target,
    config=config,
    mesh=dict(mesh.shape),
    parameters=costs.parameters(config, program.shapes),
    tokens=config.batch_size * sum(config.data.lengths.values()),
    model_flops=model_flops,
    program_flops=flops,
    state=costs.state_bytes(program),
    available=available,
    findings=tuple(
      lint.lint_shapes(
        config,
        program,
        shards,
        flops,
        loops,
        mesh=mesh.shape,
        available=available,
        tiled=target.platform == 'tpu',
      )
    ),
  )
  return _compile(plan, program, mesh) if compiles else plan


def _as_on(target: Target, config: RunConfig) -> RunConfig:
  """Returns a run that chooses on CPU devices as it would on the target."""
  model, mesh = config.model, config.mesh
  if model.num_experts:
    backend = choose_backend(
      model.dispatch,
      platform='gpu' if target.platform == 'cuda' else target.platform,
      group_tokens=model.encoder_router.group_size or config.data.inputs_length,
      d_ff=model.expert_d_ff or model.d_ff,
    )
    model = dataclasses.replace(model, dispatch=backend.name)
  mesh = dataclasses.replace(mesh, slice=mesh.slice or target.slices)
  return dataclasses.replace(config, model=model, mesh=mesh)


def _compile(plan: Plan, program: StepProgram, mesh: Any) -> Plan:
  """Adds what the compiler says."""
  begin = time.monotonic()
  try:
    with partitioning.use_mesh(mesh, plan.config.mesh):
      compiled = program.traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    needs = _needed(str(error))
    if needs is None:
      raise
    seconds = time.monotonic() - begin
    return dataclasses.replace(plan, needs=needs, compile_seconds=seconds)
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes
  peak = memory.peak_memory_in_bytes
  if plan.target.platform == 'cpu' or not peak:  # XLA:CPU leaves buffers out
    peak = held + memory.temp_size_in_bytes - memory.alias_size_in_bytes
  traffic = read_collectives(compiled.as_text(), layout(mesh))
  return dataclasses.replace(
    plan,
    peak=peak,
    arguments=memory.argument_size_in_bytes,
    scratch=memory.temp_size_in_bytes,
    traffic=traffic,
    links=dataclasses.asdict(
      link_seconds(traffic.collectives, plan.target.chip)
    ),
    findings=plan.findings
    + tuple(lint.lint_traffic(traffic, plan.config.mesh)),
    compile_seconds=time.monotonic() - begin,
  )


_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def _needed(message: str) -> int | None:
  """Returns the bytes that XLA says a program needs, if it is out of memory.

  TPU: `Ran out of memory in memory space hbm. Used 27.30G of 15.75G hbm`, or
  `... (27.30G) exceeds available HBM (15.75G)`.
  """
  if 'RESOURCE_EXHAUSTED' not in message:
    return None
  match = re.search(r'(?:Used |required for [\w ]+\()([\d.]+)([KMGT])', message)
  return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def suggestions(plan: Plan) -> list[str]:
  """Returns what would make a run that does not fit need less, best first.

  Where weights, optimizer state and gradients alone are too much, nothing that
  changes activations.
  """
  config, available = plan.config, plan.available or 0
  model, mesh = config.model, config.mesh
  devices = plan.target.devices
  if plan.least_in_parts > available > 0:  # no mesh of these devices does
    return [_more_devices(devices, plan.least_in_parts / available)]
  activations_matter = plan.least <= available
  found = []
  if not (mesh.fsdp_dense or mesh.fsdp_experts) and (
    plan.resident > available // 4
  ):
    found.append(
      'store weights in parts: --gin.MeshConfig.fsdp_dense=True '
      '--gin.MeshConfig.fsdp_experts=True'
    )
  elif mesh.fsdp_experts and plan.mesh['slice'] > 1 and not mesh.fsdp_slices:
    found.append(
      'store experts in parts between slices too: '
      '--gin.MeshConfig.fsdp_slices=True'
    )
  if larger := lint.larger_expert_axes(model, plan.mesh):
    found.append(
      f'fewer experts per device: --mesh=data=-1,expert={larger[-1]}'
    )
  if model.remat_policy != 'full' and activations_matter:
    found.append("keep less: --gin.ModelConfig.remat_policy='full'")
  shards = plan.mesh['slice'] * plan.mesh['data'] * plan.mesh['expert']
  halves = config.batch_size % (shards * config.microbatches * 2) == 0
  if halves and activations_matter:
    found.append(
      'halve the activations: '
      f'--gin.RunConfig.microbatches={2 * config.microbatches}'
    )
  if plan.mesh['model'] == 1 and model.num_heads % 2 == 0:
    found.append('split layers: --mesh with model=2 or more')
  if activations_matter or not found:
    found.append(f'more devices than {devices}')
  return found


def _more_devices(devices: int, times: float) -> str:
  parts = 2 ** math.ceil(math.log2(times))
  return (
    f'more devices: weights, optimizer state and gradients need at least '
    f'{parts} times {devices}, if all of them are stored in parts'
  )
