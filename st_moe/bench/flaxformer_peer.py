"""flaxformer's layer (T5X's mixture of experts) as programs of ours.

It runs in this process, on the same XLA. Its package is on no index: clone
github.com/google/flaxformer and put it on PYTHONPATH. It imports aqt, for
quantization that is not used here; names of aqt are made up where that is not
installed.
"""

import importlib.util
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp

from st_moe.bench.forms import LayerForms, programs
from st_moe.bench.timing import Program

ROUTERS = {
  'flaxformer masked': 'TokensChooseMaskedRouter',
  'flaxformer scatter': 'TokensChooseScatterRouter',
}

_AQT = ('flax_layers', 'quant_config', 'quantization')


class _Placeholder:
  """Stands for a class of aqt in annotations and default values."""


class _Names(types.ModuleType):
  """A module in which every name is there, as a class with such names."""

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__'):
      raise AttributeError(name)
    nested = {inner: _Placeholder for inner in ('WeightParams', 'ActHParams')}
    return type(name, (_Placeholder,), nested)


def _import_flaxformer() -> tuple[Any, Any, Any]:
  """Returns its modules for experts, layers and routing."""
  # A module that was made up here has no spec, and asking for it fails.
  if 'aqt' not in sys.modules and importlib.util.find_spec('aqt') is None:
    names = ['aqt', 'aqt.jax_legacy', 'aqt.jax_legacy.jax']
    names += [f'aqt.jax_legacy.jax.{name}' for name in _AQT]
    for name in names:
      sys.modules.setdefault(name, _Names(name))
    for name in _AQT:
      parent = sys.modules['aqt.jax_legacy.jax']
      setattr(parent, name, sys.modules[f'aqt.jax_legacy.jax.{name}'])
  from flaxformer.architectures.moe import moe_layers, routing
  from flaxformer.components import dense

  return dense, moe_layers, routing


def flaxformer_programs(peer: str, layer: LayerForms) -> dict[str, Program]:
  """Returns the layer with one of its routers, by mode.

  Args:
    peer: a key of ROUTERS.
    layer: ours: its size, its input and the weights of its output are taken.

  Raises:
    Exception: whatever flaxformer does where it does not fit.
  """
  dense, moe_layers, routing = _import_flaxformer()
  size, router = layer.size, layer.size.router
  dtype = jnp.dtype(size.dtype)
  module = moe_layers.MoeLayer(
    num_experts=size.num_experts,
    max_group_size=size.group_size,
    train_capacity_factor=router.train_capacity_factor,
    eval_capacity_factor=router.eval_capacity_factor,
    expert=dense.MlpBlock(
      use_bias=False,
      intermediate_dim=size.d_ff,
      activations=size.activations,
      intermediate_dropout_rate=0.0,
      final_dropout_rate=0.0,
      dtype=dtype,
    ),
    router=getattr(routing, ROUTERS[peer])(
      router_weights=routing.RouterWeights(use_bias=False, dtype=jnp.float32),
      jitter_noise=router.jitter,
      dtype=dtype,
      ignore_padding_tokens=False,
      num_selected_experts=router.num_choices,
      batch_prioritized_routing=router.priority == 'probability',
    ),
    num_expert_partitions=1,
    num_model_partitions=1,
    min_expert_capacity=router.min_expert_capacity,
    dropout_rate=0.0,
    dtype=dtype,
    strict_group_size=True,
  )
  rngs = {'params': layer.key, 'jitter': layer.key}
  variables = jax.jit(module.init)(rngs, layer.x)

  def apply(params, x, key):
    y, state = module.apply(
      {'params': params}, x, rngs={'jitter': key}, mutable=['intermediates']
    )
    found = state['intermediates']
    losses = router.balance_loss_weight * jnp.sum(found['auxiliary_loss'][0])
    losses += router.z_loss_weight * jnp.sum(found['router_z_loss'][0])
    return {'y': y, 'losses': losses, 'stats': found}

  return programs(
    peer, apply, variables['params'], layer.x, layer.weights, layer.key
  )
