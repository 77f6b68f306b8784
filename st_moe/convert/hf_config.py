"""config.json of T5 and Switch Transformers, and our ModelConfig.

What transformers computes from a configuration is computed here the same way,
oddities included; what one side cannot hold is refused.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from st_moe.config import ROUTER_PRESETS, ModelConfig
from st_moe.errors import UserError, did_you_mean
from st_moe.workdir import read_json

log = logging.getLogger(__name__)

CONFIG_FILE = 'config.json'

# What transformers takes where config.json is silent.
_T5 = {
  'vocab_size': 32128,
  'd_model': 512,
  'd_kv': 64,
  'd_ff': 2048,
  'num_layers': 6,
  'num_decoder_layers': None,
  'num_heads': 8,
  'relative_attention_num_buckets': 32,
  'relative_attention_max_distance': 128,
  'dropout_rate': 0.1,
  'layer_norm_epsilon': 1e-6,
  'feed_forward_proj': 'relu',
  'is_encoder_decoder': True,
  'pad_token_id': 0,
  'eos_token_id': 1,
  'decoder_start_token_id': 0,
  'tie_word_embeddings': True,
}
_DEFAULTS = {
  't5': _T5,
  'mt5': _T5
  | {
    'vocab_size': 250112,
    'd_ff': 1024,
    'num_layers': 8,
    'num_heads': 6,
    'feed_forward_proj': 'gated-gelu',
  },
  'switch_transformers': _T5
  | {
    'd_model': 768,
    'num_layers': 12,
    'num_heads': 12,
    'num_sparse_encoder_layers': 3,
    'num_sparse_decoder_layers': 3,
    'num_experts': 8,
    'expert_capacity': 64,
    'router_bias': False,
    'router_jitter_noise': 0.01,
    'router_dtype': 'float32',
    'router_z_loss_coef': 0.001,
    'router_aux_loss_coef': 0.001,
    'dense_act_fn': 'relu',
  },
}
CLASSES = {
  't5': 'T5ForConditionalGeneration',
  'mt5': 'MT5ForConditionalGeneration',
  'switch_transformers': 'SwitchTransformersForConditionalGeneration',
}
# Heads or stacks that an encoder-decoder with logits does not have.
_OTHER_CLASSES = ('Encoder', 'Classification', 'QuestionAnswering')

# gelu_new and gelu_pytorch_tanh are the same function; 'gelu' is the exact one.
_ACTIVATIONS = {
  'relu': 'relu',
  'gelu_new': 'gelu',
  'gelu_pytorch_tanh': 'gelu',
  'silu': 'silu',
  'swish': 'silu',
}

# Sizes of tensors, which every file should say.
_SIZES = ('vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_layers', 'num_heads')

# Fields that both sides call the same.
SAME = (
  'vocab_size',
  'd_model',
  'd_kv',
  'd_ff',
  'num_heads',
  'relative_attention_num_buckets',
  'relative_attention_max_distance',
  'layer_norm_epsilon',
)


@dataclasses.dataclass(frozen=True)
class HfConfig:
  """A config.json, with what it leaves to the defaults of its class.

  Attributes:
    where: path, for messages.
    model_type: 't5', 'mt5' or 'switch_transformers'.
    given: what the file says.
  """

  where: str
  model_type: str
  given: dict[str, Any]

  def __getitem__(self, name: str) -> Any:
    return self.given.get(name, _DEFAULTS[self.model_type][name])

  @property
  def scales_outputs(self) -> bool | None:
    """Whether the decoder's output is multiplied by d_model^-0.5.

    transformers 4 takes `tie_word_embeddings` for it. transformers 5 writes
    `scale_decoder_outputs` for T5, and `tie_word_embeddings = true` always; its
    mT5 never scales. None: the versions differ.
    """
    tied = self['tie_word_embeddings'] is not False
    if self.model_type == 'mt5':
      return self._old_mt5_scales() if tied else False
    if self.model_type == 't5':
      return bool(self.given.get('scale_decoder_outputs', tied))
    return tied

  def _old_mt5_scales(self) -> bool | None:
    """Whether the version that wrote the file scales a tied mT5's outputs."""
    version = str(self.given.get('transformers_version', ''))
    major = version.partition('.')[0]
    return int(major) < 5 if major.isdigit() else None

  def number(self, name: str) -> float:
    """Returns a field that is a number.

    Raises:
      UserError: it is none.
    """
    value = self[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise UserError(f'{self.where}: {name} is {value!r}, which is no number')
    return float(value)

  def sparse_layers(self, stack: str, depth: int) -> tuple[int, ...]:
    """Returns which layers of a stack are sparse.

    A step that the file names wins over a number of sparse layers, as in
    transformers.
    """
    number = self[f'num_sparse_{stack}_layers']
    step = _their_step(depth, number)
    said = self.given.get(f'{stack}_sparse_step', step)
    if said != step:
      log.warning(
        '%s: %s_sparse_step %s and num_sparse_%s_layers %s contradict each '
        'other; the step holds, as in transformers',
        self.where, stack, said, stack, number,
      )  # fmt: skip
    return _layers_of_step(depth, said)


def read_config(folder: Path) -> HfConfig:
  """Reads config.json.

  Raises:
    UserError: when there is none, or it is of a model that we cannot hold.
  """
  path = folder / CONFIG_FILE
  if not path.is_file():
    raise UserError(
      f'{folder} has no {CONFIG_FILE}; give a folder as `hf download MODEL '
      '--local-dir DIR` makes it'
    )
  given = read_json(path)
  if not isinstance(given, dict):
    raise UserError(f'{path} is no configuration of a model; fetch it again')
  model_type = given.get('model_type')
  if model_type not in _DEFAULTS:
    raise UserError(
      f'{path}: model_type {model_type!r} is not supported; convert from-hf '
      f'reads {", ".join(_DEFAULTS)}'
      f'{did_you_mean(str(model_type), _DEFAULTS)}'
    )
  config = HfConfig(str(path), model_type, given)
  _refuse_others(config)
  taken = {name: config[name] for name in _SIZES if name not in given}
  if taken:
    log.warning(
      '%s lacks %s: taken as transformers takes %s',
      path,
      ', '.join(f'{name} ({value})' for name, value in taken.items()),
      'it' if len(taken) == 1 else 'them',
    )
  return config


def _refuse_others(config: HfConfig) -> None:
  """Raises UserError for what neither the model nor decoding can hold."""

  def refuse(text: str) -> None:
    raise UserError(f'{config.where}: {text}')

  for name in config.given.get('architectures') or []:
    if any(word in name for word in _OTHER_CLASSES):
      refuse(
        f'{name} is no encoder-decoder with logits; give a '
        f'{CLASSES[config.model_type]}'
      )
  if not config['is_encoder_decoder']:
    refuse('is_encoder_decoder is false; only encoder-decoders are converted')
  if config.given.get('quantization_config'):
    refuse('quantization_config is set; give the weights before quantization')
  wanted = {'pad_token_id': 0, 'eos_token_id': 1, 'decoder_start_token_id': 0}
  for name, value in wanted.items():
    found = value if config[name] is None else config[name]
    if found not in (value, [value]):
      refuse(f'{name} is {found}, and {value} is built in here')
  if config.model_type == 'switch_transformers':
    if config['router_bias']:
      refuse('router_bias is true; routers have no bias here')
    if config['router_dtype'] not in ('float32', 'bfloat16'):
      refuse(
        f'router_dtype {config["router_dtype"]!r} is neither float32 nor '
        'bfloat16'
      )


def _activations(config: HfConfig) -> tuple[str, ...]:
  """Returns the activations of the FFN, two if it is gated."""
  if config.model_type == 'switch_transformers':
    name, gated = config['dense_act_fn'], False
  else:
    text = config['feed_forward_proj']
    name, gated = text.removeprefix('gated-'), text.startswith('gated-')
    if text == 'gated-gelu':
      name = 'gelu_new'  # transformers does so for old files
    said = name, gated
    name = config.given.get('dense_act_fn', name)
    gated = config.given.get('is_gated_act', gated)
    if (_ACTIVATIONS.get(name), gated) != (_ACTIVATIONS.get(said[0]), said[1]):
      log.warning(
        '%s: feed_forward_proj %r and dense_act_fn %r with is_gated_act %s '
        'contradict each other; the latter two hold, as in transformers',
        config.where, text, name, gated,
      )  # fmt: skip
  if name not in _ACTIVATIONS:
    why = (
      'it is the exact one, where T5 and this code have the tanh form '
      "('gelu_new')"
      if name == 'gelu'
      else f'there are {", ".join(_ACTIVATIONS)}'
    )
    raise UserError(f'{config.where}: activation {name!r}: {why}')
  return (_ACTIVATIONS[name], *(('linear',) if gated else ()))


def their_sparse_layers(depth: int, num_sparse: int) -> tuple[int, ...]:
  """Returns which layers of a stack are sparse in transformers.

  A stack asked to have none has layer 1, or its only layer; where `num_sparse`
  does not divide `depth` there may be more than were asked for.

  Args:
    depth: of the stack.
    num_sparse: as config.json says.
  """
  return _layers_of_step(depth, _their_step(depth, num_sparse))


def _their_step(depth: int, num_sparse: int) -> int:
  return depth // num_sparse if num_sparse > 0 else depth


def _layers_of_step(depth: int, step: int) -> tuple[int, ...]:
  if step < 1:
    return ()
  return tuple(i for i in range(depth) if step == 1 or i % step == 1)


def _pattern(depth: int, chosen: tuple[int, ...]) -> str:
  """Returns the shortest pattern of 'd' and 's' that repeats to a stack."""
  kinds = ''.join('s' if i in chosen else 'd' for i in range(depth))
  return next(
    kinds[:size]
    for size in range(1, depth + 1)
    if depth % size == 0 and kinds[:size] * (depth // size) == kinds
  )


def _placement(config: HfConfig, encoder: int, decoder: int) -> dict[str, Any]:
  """Returns the ModelConfig fields that say which layers are sparse.

  'hf' with its step where one step says it of both stacks, else a pattern for
  each.
  """
  depths = {'encoder': encoder, 'decoder': decoder}
  chosen = {
    stack: config.sparse_layers(stack, n) for stack, n in depths.items()
  }
  for step in range(1, max(encoder, decoder) + 1):
    if all(
      chosen[stack] == tuple(i for i in range(n) if i % step == 1 % step)
      for stack, n in depths.items()
    ):
      return {'sparse_every': step, 'sparse_placement': 'hf'}
  if not any(chosen.values()):
    raise UserError(
      f'{config.where}: no layer is sparse with more sparse layers than layers'
    )
  patterns = {stack: _pattern(n, chosen[stack]) for stack, n in depths.items()}
  return {
    'sparse_every': 1,
    'sparse_placement': patterns['encoder'],
    'decoder_sparse_placement': patterns['decoder'],
  }


def model_config(config: HfConfig, *, tied: bool) -> ModelConfig:
  """Returns the model that a config.json describes.

  Args:
    config: of the file.
    tied: whether the output is the embedding, scaled.

  Raises:
    UserError: when we cannot hold it.
  """
  encoder = config['num_layers']
  decoder = config['num_decoder_layers']
  decoder = encoder if decoder is None else decoder
  try:
    return ModelConfig(
      num_encoder_layers=encoder,
      num_decoder_layers=decoder,
      mlp_activations=_activations(config),
      tie_embeddings=tied,
      dropout_rate=config.number('dropout_rate'),
      **{name: config[name] for name in SAME},
      **_experts(config, encoder, decoder),
    )
  except UserError as e:
    if config.where in str(e):
      raise
    raise UserError(f'{config.where}: {e}') from e


def _experts(config: HfConfig, encoder: int, decoder: int) -> dict[str, Any]:
  """Returns the fields that say where experts are, and their routers."""
  if config.model_type != 'switch_transformers':
    return {'num_experts': 0}
  router = dataclasses.replace(
    ROUTER_PRESETS['hf_switch'],
    fixed_capacity=config['expert_capacity'],
    jitter=config.number('router_jitter_noise'),
    dtype=config['router_dtype'],
    z_loss_weight=config.number('router_z_loss_coef'),
    balance_loss_weight=config.number('router_aux_loss_coef'),
  )
  return {
    'num_experts': config['num_experts'],
    'encoder_router': router,
    'decoder_router': router,
    **_placement(config, encoder, decoder),
  }
