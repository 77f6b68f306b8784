"""`st_moe bench peers`: other implementations of the layer, in turns with ours.

Each peer that uses torch lives in a process of its own, with as many threads
as there are cores, and is called in the same rounds as ours; flaxformer runs
in this process. Sizes, slots and the kind of experts are the same; what differs
is said by each peer's `note`. A peer that cannot be imported or does not have
such a layer is named with the reason. torch's OpenMP threads suffer from other
work on the machine far more than XLA's and wait by spinning, so there is a
pause between forms, and results count on a quiet machine only.

Two more rows say what there is to win: the bare matrix products of the experts
in XLA and, beside a torch peer, in torch. Each layer is to be held against the
products of its own library; only what skips empty slots may be below them.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import st_moe
from st_moe.bench import pictures
from st_moe.bench.flaxformer_peer import ROUTERS, flaxformer_programs
from st_moe.bench.forms import MODES, LayerForms
from st_moe.bench.results import (
  Output,
  as_json,
  medians,
  number,
  open_output,
)
from st_moe.bench.sizes import LayerSize, layer_sizes
from st_moe.bench.timing import (
  MAX_CALLS,
  MIN_SAMPLE_SECONDS,
  CompiledForm,
  Sample,
  Spread,
  ratio,
  run_rounds,
)
from st_moe.config import RunConfig, to_dict
from st_moe.errors import UserError

OURS = 'ours'
BARE = {'xla': 'bare matmuls, XLA', 'torch': 'bare matmuls, torch'}
_PAUSE = 0.1  # seconds in which the threads of the last form fall asleep
_COLUMNS = ('layer', 'wall ms', 'cpu ms', 'time / ours', 'cpu', 'fastest')


@dataclasses.dataclass(frozen=True)
class Peer:
  """Another implementation.

  Attributes:
    name: as shown.
    packages: that must be importable.
    install: how to get them.
    why_not: returns why it has no layer of a size, or None.
    note: in what it differs from ours.
  """

  name: str
  packages: tuple[str, ...]
  install: str
  why_not: Callable[[LayerSize], str | None]
  note: str

  def missing(self) -> str | None:
    """Returns what is not installed, or None."""
    names = [p for p in self.packages if importlib.util.find_spec(p) is None]
    if not names:
      return None
    return f'not installed: {", ".join(names)}; {self.install}'


def _first(*reasons: tuple[bool, str]) -> str | None:
  return next((reason for holds, reason in reasons if holds), None)


def _why_not_st_moe_pytorch(size: LayerSize) -> str | None:
  return _first(
    (size.router.kind != 'token_choice', 'tokens choose there'),
    (size.choices < 2, 'it has no top-1'),
    (size.activations != ('gelu', 'linear'), 'its experts are GEGLU'),
    (size.dtype != 'float32', 'it fails in bfloat16'),
    (size.router.capacity_formula != 'tokens', 'its slots are S x factor / E'),
  )


def _why_not_hf_switch(size: LayerSize) -> str | None:
  return _first(
    (size.router.kind != 'token_choice', 'tokens choose there'),
    (size.choices != 1, 'it has top-1 only'),
    (len(size.activations) != 1, 'its experts are not gated'),
  )


def _why_not_flaxformer(size: LayerSize) -> str | None:
  return _first(
    (size.router.kind != 'token_choice', 'only its token choice is built here'),
    (
      size.groups % size.num_experts != 0,
      f'it needs a multiple of {size.num_experts} groups, not {size.groups}',
    ),
    (size.router.capacity_formula != 'tokens', 'its slots are S x factor / E'),
  )


_FROM_INDEX = "pip install -e '.[peers]' -c constraints.txt"
_TORCH = (
  Peer(
    'st-moe-pytorch',
    ('torch', 'st_moe_pytorch'),
    _FROM_INDEX,
    _why_not_st_moe_pytorch,
    'biases in the experts; second experts at random, threshold 0.2',
  ),
  Peer(
    'hf-switch',
    ('torch', 'transformers'),
    _FROM_INDEX,
    _why_not_hf_switch,
    'computes kept rows only; no router losses',
  ),
)
_FLAXFORMER = tuple(
  Peer(
    name,
    ('flaxformer',),
    'clone github.com/google/flaxformer and put it on PYTHONPATH',
    _why_not_flaxformer,
    'every second expert, gates not renormalised',
  )
  for name in ROUTERS
)
PEERS = (*_TORCH, *_FLAXFORMER)


class ChildForm:
  """A torch layer in a process of its own, in one mode."""

  def __init__(self, name: str, mode: str, process: subprocess.Popen):
    self.name = name
    self._mode = mode
    self._process = process
    self._calls = 1

  def warm_up(self) -> None:
    """Calls it and decides how many calls make a sample."""
    seconds = max(self.measure().wall, 1e-9)
    self._calls = min(MAX_CALLS, math.ceil(MIN_SAMPLE_SECONDS / seconds))

  def measure(self) -> Sample:
    request = {'mode': self._mode, 'calls': self._calls}
    answer = _ask(self._process, self.name, request)
    return Sample(answer['wall'], answer['cpu'])


def _ask(
  process: subprocess.Popen, name: str, request: dict[str, Any] | None
) -> dict[str, Any]:
  """Sends a request and returns the answer; None reads the greeting."""
  try:
    if request is not None:
      process.stdin.write(json.dumps(request) + '\n')
      process.stdin.flush()
    line = process.stdout.readline()
  except BrokenPipeError:
    line = ''
  if not line:
    raise UserError(
      f'the process of {name} ended with status {process.wait()}; its last '
      'words are above'
    )
  return json.loads(line)


def start_child(
  peer: str, size: LayerSize, seed: int
) -> tuple[subprocess.Popen, dict[str, Any]]:
  """Starts a torch peer; returns its process and its greeting."""
  router = size.router
  settings = {
    'peer': peer,
    'threads': os.cpu_count(),
    'seed': seed,
    'groups': size.groups,
    'group_size': size.group_size,
    'd_model': size.d_model,
    'd_ff': size.d_ff,
    'num_experts': size.num_experts,
    'num_choices': size.choices,
    'capacity': size.capacity,
    'capacity_factor': router.train_capacity_factor,
    'threshold': router.train_choice_threshold,
    'balance_loss_weight': router.balance_loss_weight,
    'z_loss_weight': router.z_loss_weight,
    'jitter': router.jitter,
    'activation': size.activations[0],
    'gated': len(size.activations) > 1,
    'dtype': size.dtype,
  }
  # The child finds this package wherever this process found it.
  paths = [str(Path(st_moe.__file__).parents[1]), os.environ.get('PYTHONPATH')]
  process = subprocess.Popen(
    [
      sys.executable, '-m', 'st_moe.bench.torch_peers', json.dumps(settings)
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, paths))},
  )  # fmt: skip
  return process, _ask(process, peer, None)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One size in one mode: ours and the peers that have such a layer.

  Attributes:
    size: of the layer.
    mode: 'forward' or 'forward+backward'.
    samples: one per round, by name; ours first.
  """

  size: LayerSize
  mode: str
  samples: dict[str, list[Sample]]

  def ratio(self, name: str, clock: str = 'wall') -> Spread:
    """Returns a peer's time over ours: above 1, we are faster."""
    return ratio(self.samples[name], self.samples[OURS], clock)

  def fastest(self, name: str) -> float:
    """Returns the ratio of the shortest times."""
    peer, ours = (min(s.wall for s in self.samples[n]) for n in (name, OURS))
    return peer / ours


def run(args: argparse.Namespace, config: RunConfig) -> None:
  """Times every size against every peer there is.

  Raises:
    UserError: when there is no peer to compare with, or this is no CPU.
  """
  sizes = layer_sizes(args, config.model)
  missing = {peer.name: peer.missing() for peer in PEERS}
  present = [peer for peer in PEERS if missing[peer.name] is None]
  reasons = {
    size: {peer.name: peer.why_not(size) for peer in present} for size in sizes
  }
  if not any(None in found.values() for found in reasons.values()):
    why = {k: v for k, v in missing.items() if v} | reasons[sizes[0]]
    raise UserError(
      'no peer to compare with: '
      + '; '.join(
        f'{", ".join(n for n in why if why[n] == reason)}: {reason}'
        for reason in dict.fromkeys(why.values())
      )
    )
  if jax.default_backend() != 'cpu':
    raise UserError(
      f'bench peers compares on CPU, and JAX runs on {jax.default_backend()}; '
      'set JAX_PLATFORMS=cpu'
    )
  output = Output(open_output(args.output, 'peers'), 'peers', args.argv)
  for name, reason in missing.items():
    if reason:
      output.say(f'{name}: {reason}')
  compared = []
  for index, size in enumerate(sizes):
    output.say(f'[{index + 1}/{len(sizes)}] {size}')
    for name, reason in reasons[size].items():
      if reason:
        output.say(f'  without {name}: {reason}')
    names = [peer.name for peer in present if reasons[size][peer.name] is None]
    if not names:
      continue
    found = compare(size, names, args.rounds, config.seed, output.say)
    compared += found
    for comparison in found:
      _print(output, comparison)
  if not compared:
    raise UserError('no peer could be started; the reasons are above')
  for peer in present:
    output.say(f'{peer.name}: {peer.note}')
  output.say('bare matmuls: the experts on ready buffers, empty slots too')
  output.finish(
    {
      'missing': {k: v for k, v in missing.items() if v},
      'comparisons': [_as_json(c) for c in compared],
    },
    pictures.draw_peers(compared),
  )


def compare(
  size: LayerSize,
  names: list[str],
  rounds: int,
  seed: int,
  say: Callable[[str], None],
) -> list[Comparison]:
  """Times ours, the named peers and bare products, in turns, in both modes.

  Returns:
    One comparison for each mode; none when no peer could be started.
  """
  layer = LayerForms(size, seed)
  ours = layer.moe('auto')
  bare = layer.batched_floor(BARE['xla'], size.slots // size.num_experts)
  forms: dict[str, list[Any]] = {
    mode: [CompiledForm(dataclasses.replace(ours[mode], name=OURS))]
    for mode in MODES
  }
  made_peers = 0
  children = []
  if any(name not in ROUTERS for name in names):
    names = [*names, BARE['torch']]
  try:
    for name in names:
      try:
        if name in ROUTERS:
          found = flaxformer_programs(name, layer)
          made = [CompiledForm(found[mode]) for mode in MODES]
        else:
          process, greeting = start_child(name, size, seed)
          children.append(process)
          if 'error' in greeting:
            raise RuntimeError(greeting['error'])
          made = [ChildForm(name, mode, process) for mode in MODES]
      # Whatever a foreign layer dislikes is its reason not to be compared.
      except Exception as e:
        say(f'  without {name}: {" ".join(str(e).split())}')
        continue
      made_peers += name != BARE['torch']
      for mode, form in zip(MODES, made, strict=True):
        forms[mode].append(form)
    if not made_peers:
      return []
    for mode in MODES:
      forms[mode].append(CompiledForm(bare[mode]))
    compared = []
    for mode in MODES:
      for form in forms[mode]:
        form.warm_up()
      samples = run_rounds(forms[mode], rounds, pause=_PAUSE)
      compared.append(Comparison(size, mode, samples))
    return compared
  finally:
    for process in children:
      process.stdin.close()
      process.wait()


def _print(output: Output, c: Comparison) -> None:
  rows = [
    (
      name,
      *medians(samples),
      str(c.ratio(name)),
      number(c.ratio(name, 'cpu').median),
      number(c.fastest(name)),
    )
    for name, samples in c.samples.items()
  ]
  count = len(c.samples[OURS])
  output.table(
    f'{c.mode}: medians of {count} rounds [quartiles]', _COLUMNS, rows
  )


def _as_json(c: Comparison) -> dict[str, Any]:
  return {
    'size': to_dict(c.size),
    'mode': c.mode,
    'capacity': c.size.capacity,
    'layers': {
      name: {
        **as_json(samples),
        'over_ours': dataclasses.asdict(c.ratio(name)),
        'fastest_over_ours': c.fastest(name),
      }
      for name, samples in c.samples.items()
    },
  }
