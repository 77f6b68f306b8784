"""Starting a run from given weights: another run's, or a converted model's.

T5X's INITIAL_CHECKPOINT_PATH. Parameters go straight onto the mesh; a model
stored written out starts a scanned run, and the other way round. The
optimizer's state and the step are new, or carried on, or its state alone
(`RunConfig.initial_optimizer`).
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from st_moe import trees
from st_moe.checkpoint import check_newest, find_steps, restore_items
from st_moe.config import DataConfig, ModelConfig, RunConfig, to_dict
from st_moe.data.vocabularies import Vocabulary, load_vocabulary
from st_moe.errors import UserError
from st_moe.integrity import manifest_hash
from st_moe.model_directory import FoundModel, find_model
from st_moe.optimizer import at_step_0
from st_moe.stacking import STACKS, stack_layers, unstack_layers
from st_moe.train_state import (
  AbstractState,
  TrainState,
  abstract_state,
  state_shardings,
)
from st_moe.train_step import StepProgram
from st_moe.transformer import EncoderDecoder
from st_moe.workdir import differences

log = logging.getLogger(__name__)

# Settings that change what the same weights compute.
_MEANING = (
  'mlp_activations', 'expert_activations', 'sparse_every', 'sparse_placement',
  'decoder_sparse_placement', 'layer_norm_epsilon',
  'relative_attention_max_distance', 'encoder_router', 'decoder_router',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class InitialState:
  """The state that a run begins with, and where it comes from.

  Attributes:
    state: on the mesh.
    record: for run.json: path, step and hash of the weights, what was new.
  """

  state: TrainState
  record: dict[str, Any]


def find_source(config: RunConfig) -> FoundModel | None:
  """Returns where the weights of a new run are; None: drawn from its seed.

  Raises:
    UserError: when there are none, or they are all trained already.
  """
  if config.initial_checkpoint is None:
    return None
  path = Path(config.initial_checkpoint)
  try:
    _, steps = find_steps(path, config.initial_step)
  except UserError as e:
    raise UserError(f'RunConfig.initial_checkpoint: {e}') from e
  if config.initial_optimizer == 'carried' and steps[-1] >= config.steps:
    raise UserError(
      f'RunConfig.steps {config.steps} is reached: the weights of {path} are '
      f'from step {steps[-1]}, which is carried on; raise RunConfig.steps '
      "above it, or set RunConfig.initial_optimizer = 'slots' or 'fresh'"
    )
  return find_model(path)


def with_vocabulary(config: DataConfig, source: FoundModel) -> DataConfig:
  """Replaces the vocabulary 'auto' by that of the weights, if it is known."""
  if config.vocabulary != 'auto' or config.task == 'cache':
    return config  # a cache has a vocabulary of its own
  known = source.vocabulary_spec()
  if known is None:
    raise UserError(
      f"{source.path} has no vocabulary, and DataConfig.vocabulary 'auto' "
      'would train another; give --gin.DataConfig.vocabulary=FILE, that of the '
      'weights'
    )
  return dataclasses.replace(config, vocabulary=known)


def with_own_vocabulary(config: DataConfig, source: FoundModel) -> DataConfig:
  """Replaces the vocabulary of the run that `source` is by the copy it keeps.

  Where a run is used from another folder, or was moved, only that is there.
  """
  run = source.run_config()
  unchanged = run is not None and config.vocabulary == run.data.vocabulary
  if unchanged and source.vocabulary_spec() is not None:
    config = dataclasses.replace(config, vocabulary='auto')
  return with_vocabulary(config, source)


def check_vocabulary(
  found: str, config: DataConfig, source: FoundModel
) -> None:
  """Refuses a vocabulary that is known to be another than the model's.

  Args:
    found: fingerprint of the vocabulary in use.
    config: says which was asked for, and how many sentinels it has.
    source: the model.

  Raises:
    UserError: when they differ.
  """
  known, spec = source.vocabulary_hash, source.vocabulary_spec()
  if known is None and spec is not None:
    known = load_vocabulary(spec, config.extra_ids).fingerprint
  if known is not None and found != known:
    raise UserError(
      f'the vocabulary {config.vocabulary} is not the one that the model in '
      f"{source.path} was trained with; set DataConfig.vocabulary to the run's"
    )


def check_size(
  vocabulary: Vocabulary, config: DataConfig, model: ModelConfig
) -> None:
  """Refuses a vocabulary with more ids than the model has embeddings.

  Raises:
    UserError: with both numbers.
  """
  if vocabulary.vocab_size > model.vocab_size:
    raise UserError(
      f'the vocabulary {config.vocabulary} has {vocabulary.vocab_size} ids, '
      'sentinels included, but ModelConfig.vocab_size is '
      f"{model.vocab_size}; set DataConfig.vocabulary to the model's"
    )


def check_shapes(config: RunConfig) -> None:
  """Refuses weights of another model; reads none of them.

  Raises:
    UserError: when names or shapes differ, or nothing of this model is to be
      trained.
  """

  def wanted(stored: dict[str, Any]) -> Any:
    return _shapes(config, _is_scanned(stored)).shapes.params

  check_newest(Path(config.initial_checkpoint), config.initial_step, wanted)


def initial_state(
  config: RunConfig, program: StepProgram, source: FoundModel, mesh: Mesh
) -> InitialState:
  """Restores the weights of `source` as the first state of a run.

  Args:
    config: the run.
    program: its step; nothing of it is compiled here.
    source: from `find_source`.
    mesh: of the run.

  Raises:
    UserError: when shapes or the optimizer's state do not fit.
  """
  with_slots = config.initial_optimizer != 'fresh'
  scans: list[bool] = []

  def wanted(stored: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the trees to read, in the form in which they are stored."""
    scanned = _is_scanned(stored['params'])
    scans[:] = [scanned]
    abstract = _in_stored_form(config, program, scanned, mesh)
    trees_wanted = {'params': abstract.params}
    if with_slots:
      opt_state = abstract.opt_state
      if _optimizer_difference(stored, opt_state):
        # Weights that were trained as a whole have more: it is left out below.
        whole = _training_all(config)
        opt_state = _in_stored_form(whole, None, scanned, mesh).opt_state
      _check_optimizer(stored, opt_state, source.path)
      trees_wanted['opt_state'] = opt_state
    return trees_wanted

  restored = restore_items(
    Path(config.initial_checkpoint), config.initial_step, wanted
  )
  (scanned,) = scans
  step = restored.step if config.initial_optimizer == 'carried' else 0
  convert = None
  if scanned != config.model.scan_layers:
    convert = unstack_layers if scanned else stack_layers
  state = _assemble(program, restored.items, step, convert)
  where = restored.directory
  schedule = step + config.optimizer.schedule_offset
  log.info(
    'weights of %s, step %d%s; optimizer %s, this run begins at step %d, its '
    'learning rate at step %d of the schedule, its data at their beginning',
    where,
    restored.step,
    '' if convert is None else ', layers restacked',
    config.initial_optimizer,
    step,
    schedule,
  )
  _tell_differences(config.model, source)
  record = {
    'path': str(where),
    'step': restored.step,
    'manifest_sha256': manifest_hash(where),
    'optimizer': config.initial_optimizer,
  }
  return InitialState(state, record)


def _training_all(config: RunConfig) -> RunConfig:
  optimizer = dataclasses.replace(config.optimizer, trainable='all')
  return dataclasses.replace(config, optimizer=optimizer)


def _in_stored_form(
  config: RunConfig, program: StepProgram | None, scanned: bool, mesh: Mesh
) -> TrainState:
  """Returns the state's shapes, scanned or written out as they are stored.

  Args:
    config: the run.
    program: its step, if it is there: it has the shapes already.
    scanned: whether the stored layers are.
    mesh: of the run.
  """
  if program is not None and scanned == config.model.scan_layers:
    return program.abstract
  shapes = _shapes(config, scanned)
  return shapes.with_shardings(state_shardings(shapes, mesh, config.mesh))


def _is_scanned(stored: dict[str, Any]) -> bool:
  return any('/superblocks/' in name for name in stored)


def _shapes(config: RunConfig, scanned: bool) -> AbstractState:
  model = dataclasses.replace(config.model, scan_layers=scanned)
  stored = dataclasses.replace(config, model=model)
  return abstract_state(stored, EncoderDecoder(model))


def _optimizer_difference(
  stored: dict[str, dict[str, Any]], abstract: Any
) -> str:
  have = {'opt_state': trees.nested(stored.get('opt_state') or {})}
  return trees.difference(have, {'opt_state': abstract})


def _check_optimizer(
  stored: dict[str, dict[str, Any]], abstract: Any, path: Path
) -> None:
  way_out = "set RunConfig.initial_optimizer = 'fresh' to begin without it"
  if not stored.get('opt_state'):
    raise UserError(f'{path} holds no state of an optimizer; {way_out}')
  difference = _optimizer_difference(stored, abstract)
  if difference:
    raise UserError(
      f'the state of the optimizer in {path} is of another form than this '
      f"run's; {difference}; {way_out}"
    )


def _assemble(
  program: StepProgram,
  items: dict[str, Any],
  step: int,
  convert: Callable[[Any, ModelConfig], Any] | None,
) -> TrainState:
  """Makes the state in place, by one compiled function."""
  model = program.config.model

  def assemble(params: Any, opt_state: Any) -> TrainState:
    if convert is not None:
      params = convert(params, model)
      if opt_state is not None:
        named = trees.nested(trees.by_name(opt_state))
        opt_state = _convert_stacks(named, model, convert)
    if opt_state is None:
      opt_state = program.optimizer.init(params)
    else:  # of the trained parameters alone
      named = trees.by_name(opt_state)
      opt_state = trees.like(program.shapes.shapes.opt_state, named)
      if not step:
        opt_state = at_step_0(opt_state)
    zero = jnp.zeros([], jnp.int32)
    return TrainState(zero + step, params, opt_state, zero, zero)

  jitted = jax.jit(
    assemble,
    out_shardings=program.shardings,
    # Restacked layers are other arrays.
    donate_argnums=(0, 1) if convert is None else (),
  )
  return jitted(items['params'], items.get('opt_state'))


def _convert_stacks(
  tree: Any, model: ModelConfig, convert: Callable[[Any, ModelConfig], Any]
) -> Any:
  """Applies `convert` to every tree inside that is like the parameters."""
  if not isinstance(tree, dict):
    return tree
  if set(STACKS) <= tree.keys():
    return convert(tree, model)
  return {k: _convert_stacks(v, model, convert) for k, v in tree.items()}


def _tell_differences(model: ModelConfig, source: FoundModel) -> None:
  """Says in one line which settings give the same weights another meaning."""
  before = source.model_config()
  if before is None:
    return
  old, new = to_dict(before), to_dict(model)
  if not before.num_experts:
    old = {k: v for k, v in old.items() if not k.endswith('router')}
  for router in ('encoder_router', 'decoder_router'):
    for settings in (old, new):
      # Dropout is a matter of training, which fine-tuning sets anew.
      if router in settings:
        settings[router].pop('expert_dropout_rate')
  changed = differences(
    {name: old[name] for name in _MEANING if name in old},
    {name: new[name] for name in _MEANING if name in old},
    'model',
  )
  if changed:
    log.warning(
      'this model is not set as that of %s: %s',
      source.path,
      '; '.join(changed),
    )
