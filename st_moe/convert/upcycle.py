"""`st_moe convert upcycle`: a sparse model of a dense one.

Komatsuzaki et al. 2022 (arXiv 2212.05055): every expert of a layer is a copy
of the dense FFN it replaces, the router is drawn with a deviation of 0.02, all
else is kept. Combine weights that add up to 1 after drops (their appendix B.7)
make the sparse model compute what the dense one did wherever a token is not
dropped. There, that and a carried optimizer helped vision models; in their
language models the first hurt and the second changed nothing (B.6).
"""

import argparse
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from st_moe import trees
from st_moe.bindings import Binding
from st_moe.checkpoint import ArrayReader
from st_moe.config import ModelConfig, OptimizerConfig, RouterConfig, RunConfig
from st_moe.convert import mapping
from st_moe.convert.own_models import (
  TRAINING,
  Computed,
  Conversion,
  OwnModel,
  check_same,
  computed_params,
  configure,
  generator,
  layer_leaves,
  model_bindings,
  open_model,
  with_noise,
  write,
  written_out,
)
from st_moe.errors import UserError
from st_moe.initializers import variance_scaling
from st_moe.model_directory import check_output
from st_moe.optimizer import Slots
from st_moe.stacking import STACKS, sparse_layers
from st_moe.train_state import abstract_state
from st_moe.transformer import EncoderDecoder

ROUTER_STDDEV = 0.02  # Komatsuzaki et al., section 2.2

# Settings of an upcycled model unless they are bound: the function is kept.
_DEFAULTS = {
  'RouterConfig.gate_normalization': 'after_drop',
  'RouterConfig.extra_ffn': 'none',
}
_MAY_CHANGE = (
  'num_experts', 'expert_d_ff', 'expert_activations', 'sparse_every',
  'sparse_placement', 'decoder_sparse_placement', 'encoder_router',
  'decoder_router', *TRAINING,
)  # fmt: skip
_EXPERT = '/moe/expert/'
_FACTORS = ('row', 'column')


def run(args: argparse.Namespace, config: None) -> None:
  """Makes the sparse model; prints what it does and how the two compare.

  Args:
    args: source, output, optimizer, noise, step, seed and gin flags.
    config: not used: gin flags change the source's configuration.

  Raises:
    UserError: when the source is no dense model of ours, the target is not
      one that it can become, or the output exists.
  """
  del config
  output = Path(args.output)
  check_output(output)
  if args.noise < 0:
    raise UserError(f'--noise={args.noise} must be >= 0')
  source = open_model(Path(args.source), args.step)
  dense = source.config.model
  if dense.num_experts:
    raise UserError(
      f'{args.source} is sparse already, with {dense.num_experts} experts; '
      '`st_moe convert experts` changes their number'
    )
  target = configure(
    args,
    _base(source.config),
    str(source.found.gin_file),
    [Binding(name, value, 'upcycle') for name, value in _DEFAULTS.items()],
  )
  check_target(dense, target.model)
  for stack in STACKS:
    layers = sparse_layers(target.model, stack)
    print(f'{stack}: layers {list(layers)} of {args.source} become sparse')
  compute = make_params(source, target.model, args.noise, args.seed)
  opt_state = None
  if args.optimizer == 'carried':
    opt_state = make_opt_state(source, target, Path(args.source))
  for line in what_is_kept(target.model, args.noise):
    print(line)
  conversion = Conversion(
    source=source,
    config=target.model,
    params=computed_params(args.source, target.model, compute),
    opt_state=opt_state,
    used=list(source.leaves.values()),
    ignored=lambda _: None,
    record={
      'kind': 'upcycle',
      'noise': args.noise,
      'seed': args.seed or 0,
      'optimizer': args.optimizer,
    },
  )
  write(conversion, output, check=not args.no_check)


def _base(dense: RunConfig) -> dict[str, Any]:
  """Returns the settings of a dense run, but those of which we have our own."""
  values = model_bindings(dense) | {'ModelConfig.num_experts': 0}
  return {
    name: value
    for name, value in values.items()
    if name.rpartition('/')[2] not in _DEFAULTS
  }


def check_target(dense: ModelConfig, target: ModelConfig) -> None:
  """Refuses a model that a dense one cannot become.

  Raises:
    UserError: naming the setting.
  """
  if not target.num_experts:
    raise UserError(
      'the target is dense; add --gin.ModelConfig.num_experts=8, and '
      '--gin.ModelConfig.sparse_every=2 or another placement'
    )
  for name, own in (
    ('expert_d_ff', dense.d_ff),
    ('expert_activations', dense.mlp_activations),
  ):
    value = getattr(target, name)
    if value not in (None, own):
      raise UserError(
        f'ModelConfig.{name} {value!r} differs from the {own!r} of the dense '
        'FFN, of which experts are copies; leave it at None'
      )
  check_same(dense, target, _MAY_CHANGE)


def what_is_kept(config: ModelConfig, noise: float) -> list[str]:
  """Returns lines that say whether the dense function is kept, and why not."""
  reasons = [f'--noise={noise} moves the copies'] if noise else []
  notes = []
  for stack in STACKS:
    router: RouterConfig = getattr(config, f'{stack}_router')
    if not sparse_layers(config, stack):
      continue
    reasons += [f'{stack}: {reason}' for reason in _changes(router)]
    if router.num_choices == 1 and router.gate_normalization == 'after_drop':
      notes.append(
        f'{stack}: the one gate of a token is always 1, so that its router '
        'learns from the balance and z-losses alone'
      )
  if reasons:
    return [f'the dense function is not kept: {"; ".join(reasons)}', *notes]
  return [
    'the dense function is kept wherever a token is not dropped; capacity '
    'drops tokens (RouterConfig.eval_dropless evaluates without)',
    *notes,
  ]


def _changes(router: RouterConfig) -> list[str]:
  """Returns why experts that are all the dense FFN give something else."""
  if router.kind == 'expert_choice':
    return ['experts that choose take a token several times or never']
  if router.gate_normalization == 'after_drop':
    return []
  whole = router.gate_normalization == 'before_drop' and router.num_choices > 1
  if whole and router.eval_choice_policy == 'all':
    return []
  return [
    f'gates do not add up to 1 (gate_normalization = '
    f"'{router.gate_normalization}')"
  ]


def dense_name(name: str) -> str:
  """Returns the array of the dense model whose copies experts are."""
  return name.replace(_EXPERT, '/mlp/')


def make_params(
  source: OwnModel, config: ModelConfig, noise: float, seed: int | None
) -> Callable[[str], np.ndarray]:
  """Returns what makes a parameter of the written-out sparse model.

  Args:
    source: the dense model.
    config: of the sparse one.
    noise: on copies, in units of their RMS.
    seed: of router, noise and extra FFN.
  """
  shapes = computed_params('', config, source.read).tensors

  def compute(name: str) -> np.ndarray:
    shape, rng = shapes[name].shape, generator(seed, name)
    if name in source.leaves:
      return source.read(name)
    if _EXPERT in name and dense_name(name) in source.leaves:
      copies = np.broadcast_to(source.read(dense_name(name)), shape)
      return with_noise(copies, noise, rng)
    if name.endswith('/router/kernel'):
      return ROUTER_STDDEV * rng.standard_normal(shape, np.float32)
    if name.endswith('/extra_mlp/wo/kernel'):
      return np.zeros(shape, np.float32)  # adds nothing at first
    if re.search(r'/extra_mlp/wi\w*/kernel$', name):
      init = variance_scaling(config.init_scale, shape[0])
      return np.asarray(init(jax.random.key(rng.integers(2**31)), shape))
    if name.endswith('/pre_extra_mlp_layer_norm/scale'):
      return np.ones(shape, np.float32)
    if name.endswith(f'{_EXPERT}bias'):
      stack = name.partition('/')[0]
      is_sum = getattr(config, f'{stack}_router').expert_bias == 'additive'
      return np.full(shape, 0.0 if is_sum else 1.0, np.float32)
    raise ValueError(f'nothing makes {name}')

  return compute


# MARK: the optimizer's state


@dataclasses.dataclass(frozen=True)
class _OptState:
  """Shapes of the state of an optimizer for a written-out model.

  Attributes:
    tensors: the description of each array, by name.
    factored_dims: of each parameter that Adafactor factors.
  """

  tensors: dict[str, Any]
  factored_dims: dict[str, tuple[int, int]]


def _opt_state_of(model: ModelConfig, optimizer: OptimizerConfig) -> _OptState:
  config = RunConfig(
    model=model,
    optimizer=dataclasses.replace(
      optimizer, schedule='constant'
    ),  # no schedule has a state of its own
  )
  opt_state = abstract_state(config, EncoderDecoder(model)).shapes.opt_state
  slots = jax.tree_util.tree_leaves_with_path(
    opt_state, is_leaf=lambda x: isinstance(x, Slots)
  )
  return _OptState(
    tensors=trees.by_name(opt_state),
    factored_dims={
      jax.tree_util.keystr(path, simple=True, separator='/'): slot.factored_dims
      for path, slot in slots
      if isinstance(slot, Slots) and slot.factored_dims
    },
  )


def make_opt_state(source: OwnModel, target: RunConfig, path: Path) -> Computed:
  """Returns the state of the optimizer that goes on from the dense run's.

  Statistics of dense parameters are kept and those of an FFN are every
  expert's; what is new begins at 0.

  Args:
    source: the dense model.
    target: the sparse model, and the optimizer it will have.
    path: of the dense run, for messages.

  Raises:
    UserError: when the dense run has no such state.
  """
  dense = source.config.model
  reader = ArrayReader(
    Path(source.reader.where).parent, source.reader.step, 'opt_state'
  )
  way_out = 'convert with --optimizer=fresh'
  if not reader.tensors:
    raise UserError(f'{path} holds no state of an optimizer; {way_out}')
  stored = _opt_state_of(dense, source.config.optimizer).tensors
  difference = trees.difference(
    {'opt_state': trees.nested(reader.tensors)},
    {'opt_state': trees.nested(stored)},
  )
  if difference:
    raise UserError(
      f'the state of the optimizer in {path} is not of the form that its '
      f'configuration gives; {difference}; {way_out}'
    )
  old = _opt_state_of(written_out(dense), source.config.optimizer)
  new = _opt_state_of(written_out(target.model), target.optimizer)
  shapes = {name: tuple(leaf.shape) for name, leaf in old.tensors.items()}
  leaves = layer_leaves(shapes, dense)
  sparse = _EXPERT, '/router/', '/extra_mlp/', '/pre_extra_mlp_layer_norm/'
  for name, tensor in new.tensors.items():
    if any(part in name for part in sparse):
      continue
    if shapes.get(name) != tuple(tensor.shape):
      raise UserError(
        f'the optimizer of the target has {name} {list(tensor.shape)}, that of '
        f'{path} {list(shapes.get(name, []))}; {way_out}, or leave '
        'OptimizerConfig as it was'
      )

  def read(name: str) -> np.ndarray:
    return mapping.read_leaf(reader, leaves[name])

  def compute(name: str) -> np.ndarray:
    shape = tuple(new.tensors[name].shape)
    if name in leaves:
      return read(name)
    base = dense_name(name)
    parameter, _, kind = name.rpartition('/')
    if _EXPERT not in name or f'{_EXPERT}bias' in name:
      return np.zeros(shape, np.float32)
    dims = new.factored_dims.get(parameter)
    before = old.factored_dims.get(base.rpartition('/')[0])
    as_before = dims is None or dims == tuple(d + 1 for d in before or ())
    if base in leaves and (kind not in _FACTORS or as_before):
      return np.broadcast_to(read(base), shape)
    squares = _second_moment(base.rpartition('/')[0], before, leaves, read)
    experts = target.model.num_experts
    squares = np.broadcast_to(squares, (experts, *squares.shape))
    if kind == 'full':
      return squares
    return squares.mean(axis=dims[_FACTORS.index(kind)], dtype=np.float32)

  return Computed(str(path), new.tensors, compute)


def _second_moment(
  parameter: str,
  dims: tuple[int, int] | None,
  leaves: dict[str, Any],
  read: Callable[[str], np.ndarray],
) -> np.ndarray:
  """Returns what Adafactor knows of the squared gradients of a parameter.

  Args:
    parameter: name of its slots.
    dims: its factored dimensions; None: none.
    leaves: of the dense optimizer.
    read: one array of it.

  Raises:
    UserError: when it knows nothing of it.
  """
  if dims is None:
    if f'{parameter}/full' not in leaves:
      raise UserError(
        f'the dense optimizer has no statistics for {parameter}; convert with '
        '--optimizer=fresh'
      )
    return read(f'{parameter}/full')
  largest, second = dims
  row = np.expand_dims(read(f'{parameter}/row'), largest)
  column = np.expand_dims(read(f'{parameter}/column'), second)
  return row * column / row.mean(axis=second, keepdims=True)
