"""Models of ours made of models of ours: what `upcycle` and `experts` share.

Opening the source and the configuration of what is made; arrays that are
computed from the source's when they are read, one at a time; the fixed batch
that both models see; and writing.
"""

import dataclasses
import logging
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from st_moe import losses, trees
from st_moe.best import Step
from st_moe.bindings import Binding, Resolver, flatten
from st_moe.checkpoint import ArrayReader, find_steps
from st_moe.config import DataConfig, ModelConfig, RunConfig
from st_moe.convert import fixed_batch, mapping
from st_moe.convert.mapping import Index, Leaf, View
from st_moe.convert.writing import next_step, parameter_shapes, progress
from st_moe.errors import UserError
from st_moe.gin_files import read_bindings
from st_moe.integrity import manifest_hash
from st_moe.model_directory import FoundModel, ModelWriter, find_model
from st_moe.model_gin import no_model
from st_moe.stacking import STACKS, superblock_size
from st_moe.transformer import apply_model

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OwnModel:
  """A model of ours that another is made of.

  Attributes:
    found: its files.
    config: its run's, or the model's alone with defaults.
    reader: of its parameters.
    leaves: of its parameters, written out whatever the form they are stored
      in, by name.
  """

  found: FoundModel
  config: RunConfig
  reader: ArrayReader
  leaves: dict[str, Leaf]

  def read(self, name: str) -> np.ndarray:
    """Returns a parameter of the written-out model, float32."""
    return mapping.read_leaf(self.reader, self.leaves[name])


def written_out(config: ModelConfig) -> ModelConfig:
  """Returns the same model without a scan."""
  return dataclasses.replace(config, scan_layers=False)


def open_model(path: Path, step: Step) -> OwnModel:
  """Opens a model directory or a run; reads no array.

  Raises:
    UserError: when there is no whole checkpoint or no configuration, or they
      do not belong together.
  """
  found = find_model(path)
  config = found.run_config()
  if config is None:
    raise no_model(path)
  directory, _ = find_steps(path, step)
  reader = ArrayReader(directory, step)
  difference = trees.difference(
    trees.nested({'params': trees.nested(reader.tensors)}),
    {'params': trees.nested(_described(parameter_shapes(config.model)))},
  )
  if difference:
    raise UserError(
      f'the checkpoint {reader.where} does not fit {found.gin_file}; '
      f'{difference}; bring back the gin file that it was made with'
    )
  shapes = parameter_shapes(written_out(config.model))
  return OwnModel(found, config, reader, layer_leaves(shapes, config.model))


def _described(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
  return {
    name: jax.ShapeDtypeStruct(shape, np.float32)
    for name, shape in shapes.items()
  }


def layer_leaves(
  shapes: dict[str, tuple[int, ...]], config: ModelConfig
) -> dict[str, Leaf]:
  """Returns each array of the written-out form as a part of what is stored.

  Args:
    shapes: of the written-out form.
    config: of the model; says in which form it is stored.
  """
  leaves = {}
  for name, shape in shapes.items():
    view = View(name)
    in_layer = mapping.LAYER.fullmatch(name)
    if config.scan_layers and in_layer:
      size = superblock_size(config, in_layer['stack'])
      superblock, j = divmod(int(in_layer['layer']), size)
      stack = in_layer['before'] + in_layer['stack']
      view = View(
        f'{stack}/superblocks/layer_{j}/{in_layer["end"]}', (superblock,)
      )
    leaves[name] = mapping.one(name, shape, view)
  return leaves


def configure(
  args: Any, base: dict[str, Any], where: str, defaults: Sequence[Binding] = ()
) -> RunConfig:
  """Returns the configuration of what is made.

  Args:
    args: the command line; its resolver then locates errors.
    base: values of the source, by gin name.
    where: they stand, for messages.
    defaults: what the user's files and flags may change.

  Raises:
    UserError: one line, with the place.
  """
  bindings = [Binding(name, value, where) for name, value in base.items()]
  bindings += defaults
  bindings += read_bindings(args.gin_file, args.gin_bindings, args.seed)
  args.resolver = Resolver(bindings, allow_missing=True)
  return args.resolver.run_config()


def model_bindings(config: RunConfig) -> dict[str, Any]:
  """Returns the settings of a model and its run's optimizer, by gin name.

  A setting that both routers share is bound once, so that a flag without a
  scope changes it.
  """
  kept = ('ModelConfig', 'OptimizerConfig')
  values = {
    name: value
    for name, value in flatten(config).items()
    if name.split('.')[0] in kept
  } | {'RunConfig.steps': config.steps}
  encoder, decoder = config.model.encoder_router, config.model.decoder_router
  for field in dataclasses.fields(encoder):
    one, other = getattr(encoder, field.name), getattr(decoder, field.name)
    if one == other:
      values[f'RouterConfig.{field.name}'] = one
    else:
      values[f'encoder/RouterConfig.{field.name}'] = one
      values[f'decoder/RouterConfig.{field.name}'] = other
  return values


def check_same(
  source: ModelConfig, target: ModelConfig, may_change: Sequence[str]
) -> None:
  """Refuses settings that would make another model of the same weights.

  Raises:
    UserError: naming the first that differs.
  """
  for field in dataclasses.fields(source):
    old, new = getattr(source, field.name), getattr(target, field.name)
    if old != new and field.name not in may_change:
      raise UserError(
        f'ModelConfig.{field.name} is {old!r} in the source and {new!r} in '
        'what is made; only what concerns experts and training may change'
      )


# What any model may be given anew: how it is computed and trained.
TRAINING = (
  'dispatch', 'dropout_rate', 'init_scale', 'output_z_loss_weight',
  'attention_z_loss_weight', 'loss_normalization', 'activation_dtype',
  'scan_layers', 'scan_unroll', 'remat_policy',
)  # fmt: skip


def generator(seed: int | None, name: str) -> np.random.Generator:
  """Returns the random numbers of one array, whatever is drawn before."""
  return np.random.default_rng([seed or 0, zlib.crc32(name.encode())])


def with_noise(
  value: np.ndarray, noise: float, rng: np.random.Generator
) -> np.ndarray:
  """Adds normal noise of `noise` times the RMS of one copy.

  Args:
    value: [copies, ...].
    noise: 0 changes nothing.
    rng: of the noise.
  """
  if not noise:
    return value
  rms = np.sqrt(np.mean(np.square(value), axis=tuple(range(1, value.ndim))))
  scale = noise * rms.reshape(-1, *[1] * (value.ndim - 1))
  return (value + scale * rng.standard_normal(value.shape)).astype(np.float32)


class Computed:
  """Arrays that are computed when they are read: a Source of `mapping`.

  Attributes:
    where: for messages.
    tensors: the description of each array, by name.
  """

  def __init__(
    self,
    where: str,
    tensors: dict[str, Any],
    compute: Callable[[str], np.ndarray],
  ):
    self.where = where
    self.tensors = tensors
    self._compute = compute

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns an array, or the part of it that `index` says."""
    value = self._compute(name)
    wanted = self.tensors[name].shape
    if value.shape != wanted:
      raise ValueError(f'{name} was made {value.shape}, not {wanted}')
    return value if index is None else value[index]


def computed_params(
  where: str, config: ModelConfig, compute: Callable[[str], np.ndarray]
) -> Computed:
  """Returns the parameters of a written-out model, made by `compute`."""
  shapes = parameter_shapes(written_out(config))
  return Computed(where, _described(shapes), compute)


@dataclasses.dataclass(frozen=True)
class Conversion:
  """A model that is made of another.

  Attributes:
    source: the other model.
    config: of the model that is made.
    params: its parameters, written out.
    opt_state: arrays of its optimizer, written out; None: fresh.
    used: leaves of the source that go into it, for the proof.
    ignored: why a parameter of the source does not.
    record: of model.json: the kind of conversion and its settings.
  """

  source: OwnModel
  config: ModelConfig
  params: Computed
  opt_state: Computed | None
  used: Sequence[Leaf]
  ignored: Callable[[str], str | None]
  record: dict[str, Any]


def _joined(tensors: Computed, config: ModelConfig) -> list[Leaf]:
  """Returns leaves in the form of `config` over written-out arrays."""
  return mapping.in_form(
    [
      mapping.one(name, tensor.shape, View(name))
      for name, tensor in tensors.tensors.items()
    ],
    config,
  )


def write(conversion: Conversion, output: Path, *, check: bool) -> None:
  """Proves the coverage, writes a model directory, and compares the models.

  One array at a time; with `check` all of both models are in memory, and the
  fixed batch comes before anything shows under `output`.

  Args:
    conversion: what to make.
    output: of the model directory; must not hold anything.
    check: whether to run the fixed batch.

  Raises:
    UserError: when `output` cannot be written; nothing is left.
  """
  source, config = conversion.source, conversion.config
  leaves = _joined(conversion.params, config)
  mapping.check(
    leaves, parameter_shapes(config), conversion.params, lambda _: None
  )
  coverage = mapping.check(
    conversion.used,
    {leaf.name: leaf.shape for leaf in conversion.used},
    source.reader,
    conversion.ignored,
  )
  coverage = dataclasses.replace(coverage, filled=len(leaves))
  print(coverage.describe())
  kept: dict[str, np.ndarray] = {}
  items = [('params', conversion.params, leaves)]
  if conversion.opt_state is not None:
    items.append(
      ('opt_state', conversion.opt_state, _joined(conversion.opt_state, config))
    )
  row_lengths = _row_lengths(source)
  record = conversion.record | {
    'row_lengths': row_lengths,
    'source': source.reader.where,
    'source_step': source.reader.step,
    'source_manifest_sha256': manifest_hash(Path(source.reader.where)),
    'vocabulary': 'byte'
    if source.found.vocabulary_spec() == 'byte'
    else 'vocabulary.model'
    if source.found.vocabulary
    else None,
  }
  with ModelWriter(output, source.reader.step) as writer:
    for item, computed, item_leaves in items:
      for leaf in progress(item_leaves, f'writing {item}'):
        value = mapping.read_leaf(computed, leaf)
        dtype = computed.tensors[leaf.views.flat[0].name].dtype
        writer.add(item, leaf.name, value.astype(dtype))
        if check and item == 'params':
          kept[leaf.name] = value
    if check:
      record['fixed_batch'] = compare(source, config, kept)
    writer.commit(
      config,
      record=record,
      vocabulary=source.found.vocabulary,
      comment=f'Made by st_moe convert {conversion.record["kind"]}.',
    )
  optimizer = 'fresh' if conversion.opt_state is None else 'carried'
  flags = [f'--gin.DataConfig.{k}={v}' for k, v in row_lengths.items()]
  if conversion.opt_state is not None:
    flags += ['--gin.RunConfig.initial_optimizer=carried', '--gin.STEPS=N']
  print(
    f'{output}: written, step {source.reader.step}, optimizer {optimizer}; '
    f'{next_step(output, *flags)}',
    flush=True,
  )


def _row_lengths(source: OwnModel) -> dict[str, int]:
  """Returns the lengths of rows on which a model was trained, as far as known.

  Those that are not the default.
  """
  data = source.config.data
  known = {
    name: getattr(data, name)
    for name in ('inputs_length', 'targets_length')
    if getattr(data, name) != getattr(DataConfig(), name)
  }
  return known or source.found.record.get('row_lengths', {})


def _dropless(config: ModelConfig) -> ModelConfig:
  """Returns the model with evaluation that drops nothing, where it can."""
  routers = {
    f'{stack}_router': dataclasses.replace(router, eval_dropless=True)
    for stack in STACKS
    if (router := getattr(config, f'{stack}_router')).kind == 'token_choice'
  }
  return dataclasses.replace(config, **routers)


@dataclasses.dataclass(frozen=True)
class _Scored:
  """Logits at real targets [targets, vocab], and the loss per target."""

  logits: np.ndarray
  loss: float


def _score(config: ModelConfig, params: dict[str, np.ndarray]) -> _Scored:
  config = dataclasses.replace(config, activation_dtype='float32')
  batch = fixed_batch.make_batch(config.vocab_size)
  targets = batch['decoder_target_tokens']
  real = targets > 0

  def run(params):
    logits = apply_model(config, params, batch, train=False).logits
    total = losses.cross_entropy(logits, targets, real.astype(np.float32))
    return logits, total.loss / total.weight

  logits, loss = jax.jit(run)(trees.nested(params))
  return _Scored(np.asarray(logits)[real], float(loss))


def compare(
  source: OwnModel, config: ModelConfig, params: dict[str, np.ndarray]
) -> dict[str, float]:
  """Runs source and target on the fixed batch; prints and returns what came.

  Args:
    source: the model that the other was made of.
    config: of the other.
    params: of the other, by name.
  """
  old_params = {
    name: source.reader.read(name) for name in source.reader.tensors
  }
  old = _score(_dropless(source.config.model), old_params)
  new = _score(_dropless(config), params)
  with_capacity = _score(config, params)
  result = {
    'source_loss': old.loss,
    'loss': new.loss,
    'loss_with_capacity': with_capacity.loss,
    'largest_logit_difference': float(np.abs(new.logits - old.logits).max()),
    'largest_logit_difference_with_capacity': float(
      np.abs(with_capacity.logits - old.logits).max()
    ),
  }
  print(
    f'fixed random batch, nothing dropped: loss {new.loss:.6f}, source '
    f'{old.loss:.6f}, largest difference of logits '
    f'{result["largest_logit_difference"]:.2e}'
  )
  print(
    f'fixed random batch, as it is set:    loss {with_capacity.loss:.6f}, '
    'largest difference of logits '
    f'{result["largest_logit_difference_with_capacity"]:.2e}',
    flush=True,
  )
  return result
