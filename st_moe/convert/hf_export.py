"""config.json of a model of ours, where transformers has a class for it."""

from collections.abc import Iterator
from typing import Any, Literal

from st_moe.config import ModelConfig, RouterConfig
from st_moe.convert.hf_config import CLASSES, SAME, their_sparse_layers
from st_moe.stacking import sparse_layers

_THEIR_ACTIVATIONS = {'relu': 'relu', 'gelu': 'gelu_new', 'silu': 'silu'}


def model_type_of(config: ModelConfig) -> Literal['t5', 'switch_transformers']:
  """Returns the family that a model would be of."""
  return 'switch_transformers' if config.num_experts else 't5'


def why_not(config: ModelConfig) -> str | None:
  """Returns why transformers has no class for a model; None: it has one."""
  return '; '.join(_reasons(config)) or None


def _reasons(config: ModelConfig) -> Iterator[str]:
  activations = config.mlp_activations
  if activations[0] not in _THEIR_ACTIVATIONS or activations[1:] not in (
    (),
    ('linear',),
  ):
    yield f'activations {activations}'
  if not config.layer_norm_scale:
    yield 'norms without a learned scale'
  if not config.num_experts:
    return
  if len(activations) > 1:
    yield 'gated experts'
  if (config.expert_d_ff or config.d_ff) != config.d_ff:
    yield 'experts of another width than the dense FFN'
  if (config.expert_activations or activations) != activations:
    yield 'experts of another activation than the dense FFN'
  encoder, decoder = config.encoder_router, config.decoder_router
  reasons = {'encoder': [*_router_reasons(encoder)]}
  reasons['decoder'] = [*_router_reasons(decoder)]
  if reasons['encoder'] == reasons['decoder']:
    yield from reasons['encoder']
  else:
    for stack, of_stack in reasons.items():
      yield from (f'{stack}/{reason}' for reason in of_stack)
  for stack in ('encoder', 'decoder'):
    if _num_sparse(config, stack) is None:
      yield f'sparse layers {sparse_layers(config, stack)} of the {stack}'
  if encoder.fixed_capacity != decoder.fixed_capacity:
    yield 'another capacity in the decoder than in the encoder'
  if encoder.dtype != decoder.dtype:
    yield "another dtype of the decoder's routers than of the encoder's"


def _router_reasons(router: RouterConfig) -> Iterator[str]:
  """Yields what of a router transformers cannot do."""
  wanted = {
    'kind': 'token_choice',
    'num_choices': 1,
    'capacity_formula': 'fixed',
    'group_size': None,
    'eval_dropless': False,
    'priority': 'position',
    'mask_padding': False,
    'word_embedding': 'none',
    'extra_ffn': 'none',
    'expert_bias': 'none',
  }
  for name, value in wanted.items():
    if getattr(router, name) != value:
      yield f'RouterConfig.{name} {getattr(router, name)!r}'
  if router.gate_normalization == 'after_drop':
    yield "RouterConfig.gate_normalization 'after_drop'"


def _num_sparse(config: ModelConfig, stack: str) -> int | None:
  """Returns the number that makes transformers place sparse layers as we do."""
  depth = getattr(config, f'num_{stack}_layers')
  wanted = sparse_layers(config, stack)
  for number in range(depth, 0, -1):
    if their_sparse_layers(depth, number) == wanted:
      return number
  return None


def config_json(
  config: ModelConfig, *, model_type: str, dtype: str
) -> dict[str, Any]:
  """Returns config.json of a model for which `why_not` has no reason.

  `tie_word_embeddings` says what transformers 4 and 5 both take it for: whether
  the decoder's output is scaled.

  Args:
    config: of the model.
    model_type: 't5', 'mt5' or 'switch_transformers'.
    dtype: of the weights.
  """
  first = _THEIR_ACTIVATIONS[config.mlp_activations[0]]
  content = {
    'architectures': [CLASSES[model_type]],
    'model_type': model_type,
    'is_encoder_decoder': True,
    **{name: getattr(config, name) for name in SAME},
    'num_layers': config.num_encoder_layers,
    'num_decoder_layers': config.num_decoder_layers,
    'dropout_rate': config.dropout_rate,
    'tie_word_embeddings': config.tie_embeddings,
    'pad_token_id': 0,
    'eos_token_id': 1,
    'decoder_start_token_id': 0,
    'use_cache': True,
    'torch_dtype': dtype,
    'dense_act_fn': first,
  }
  if not config.num_experts:
    gated = len(config.mlp_activations) > 1
    name = {'gelu_new': 'gelu'}.get(first, first) if gated else first
    content['is_gated_act'] = gated
    content['feed_forward_proj'] = f'gated-{name}' if gated else name
    return content
  router = config.encoder_router
  return content | {
    'num_sparse_encoder_layers': _num_sparse(config, 'encoder'),
    'num_sparse_decoder_layers': _num_sparse(config, 'decoder'),
    'num_experts': config.num_experts,
    'expert_capacity': router.fixed_capacity,
    'router_bias': False,
    'router_dtype': router.dtype,
    'router_jitter_noise': router.jitter,
    'router_z_loss_coef': router.z_loss_weight,
    'router_aux_loss_coef': router.balance_loss_weight,
    'router_ignore_padding_tokens': False,
  }
