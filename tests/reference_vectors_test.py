"""Routing and whole layers against the paper's released code, number by number.

Reads every `.npz` of the folder given by `--reference-vectors` (default:
tests/golden, whose README describes the format) and takes every setting from
the file itself. The other side is mesh-tensorflow 0.1.21.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.config import RouterConfig
from st_moe.layers import ACTIVATIONS
from st_moe.moe import MoeLayer, Router
from st_moe.routing import num_groups, route

GATING_OF_FUNCTION = {
  '_top_n_gating': 'top_n',
  '_top_2_gating': 'top_2',
  '_switch_gating': 'switch',
  '_switch_max_gating': 'switch_max',
  '_expert_selection_gating': 'expert_selection',
}
# Settings of the released code that these tests read.
KNOWN_SETTINGS = {
  'fn', 'train', 'num_experts', 'capacity', 'activation',
  'moe_gating', 'moe_num_experts', 'moe_hidden_size', 'moe_group_size',
  'moe_capacity_factor_train', 'moe_capacity_factor_eval',
  'moe_min_expert_capacity', 'moe_loss_coef', 'moe_z_loss',
  'moe_use_second_place_loss', 'moe_second_policy_train',
  'moe_second_policy_eval', 'moe_second_threshold_train',
  'moe_second_threshold_eval', 'moe_top_n_num_experts_per_token',
  'moe_switch_policy_train', 'moe_switch_policy_eval', 'moe_dropout_rate',
  'moe_output_dim', 'moe_use_experts_attention', 'moe_word_embed_mode',
  'moe_use_second_place_expert_prob',
  # Read by gatings or policies that draw at random, and by no other.
  'moe_switch_dropout', 'moe_switch_temperature', 'moe_switch_jitter',
  'moe_ntlb_top_k', 'moe_use_second_place_expert_prob_temp',
}  # fmt: skip


def pytest_generate_tests(metafunc):
  folder = metafunc.config.getoption('--reference-vectors')
  paths = sorted(folder.glob('*.npz')) if folder.is_dir() else []
  if not paths:
    raise pytest.UsageError(
      f'--reference-vectors: no .npz files in {folder}; give the folder that '
      'holds the reference vectors'
    )
  cases = []
  for path in paths:
    if 'fn' in read(path)[0]:
      cases.append(pytest.param(path, 'gating', id=path.stem))
    else:
      for backend in ('einsum', 'gather'):
        cases.append(pytest.param(path, backend, id=f'{path.stem}-{backend}'))
  metafunc.parametrize(('path', 'backend'), cases)


def test_equals_the_released_code(path, backend):
  config, arrays = read(path)
  unknown = sorted(set(config) - KNOWN_SETTINGS)
  if unknown:
    pytest.fail(f'{path.name}: unknown settings {unknown}')
  if backend == 'gating':
    check_gating(path.name, config, arrays)
  else:
    check_layer(path.name, config, arrays, backend)


def read(path):
  """Returns the settings and the arrays of one file."""
  with np.load(path) as file:
    arrays = {key: file[key] for key in file.files}
  config = json.loads(str(arrays.pop('config')))
  for key, value in config.items():
    if value in ('true', 'True', 'false', 'False'):
      config[key] = value.lower() == 'true'
  return config, arrays


def router_config(name, config, gating):
  """Returns the released settings in our words; fails where we cannot."""
  mode = 'train' if config['train'] else 'eval'

  def require(condition, setting):
    if not condition:
      pytest.fail(
        f'{name}: cannot reproduce {setting}={config[setting]!r} with '
        f'{gating} when train={config["train"]}'
      )

  require(config['moe_word_embed_mode'] is None, 'moe_word_embed_mode')
  common = {
    'group_size': config['moe_group_size'],
    'train_capacity_factor': config['moe_capacity_factor_train'],
    'eval_capacity_factor': config['moe_capacity_factor_eval'],
    'min_expert_capacity': config['moe_min_expert_capacity'],
  }
  if gating in ('top_2', 'top_n'):
    choices = 2
    if gating == 'top_n':
      choices = config['moe_top_n_num_experts_per_token']
    if choices > 1:  # random streams differ
      setting = f'moe_second_policy_{mode}'
      require(config[setting] in ('all', 'none', 'threshold'), setting)
    return RouterConfig(
      num_choices=choices,
      **{
        f'{mode}_choice_policy': config[f'moe_second_policy_{mode}'],
        f'{mode}_choice_threshold': config[f'moe_second_threshold_{mode}'],
      },
      **common,
    )
  setting = f'moe_switch_policy_{mode}'
  quiet = ('argmax',)
  if not config['train']:
    quiet += ('input_jitter', 'input_dropout')
  require(config[setting] in quiet, setting)
  if gating == 'expert_selection':
    return RouterConfig(kind='expert_choice', **common)
  if config['train']:
    setting = 'moe_use_second_place_expert_prob'
    require(config[setting] is None, setting)
  if gating not in ('switch', 'switch_max'):
    pytest.fail(f'{name}: unknown gating {gating!r}')
  return RouterConfig(
    num_choices=1,
    balance_loss='switch',
    priority='probability' if gating == 'switch_max' else 'position',
    **common,
  )


def aux_loss(config, gating, stats, logits, mask):
  """Returns the released total, before `moe_loss_coef`."""
  loss = stats.balance_loss
  if config['moe_use_second_place_loss'] and gating == 'top_2':
    loss += 0.5 * stats.second_choice_loss
  if config['moe_use_second_place_loss'] and gating == 'top_n':
    loss += 0.5 * third_choice_loss(logits, mask)
  if config['train'] and config['moe_z_loss'] is not None:
    loss += config['moe_z_loss'] * stats.z_loss
  return loss


def third_choice_loss(logits, mask):
  """What the released top_n computes under the name of second-place loss.

  It reads the third choice, and the probabilities without the first two; a
  defect (moe.py:1814-1828) that the package does not have.
  """
  rest = jax.nn.softmax(logits, axis=-1)
  for _ in range(2):
    top = jax.nn.one_hot(jnp.argmax(rest, axis=-1), rest.shape[-1])
    rest = rest * (1.0 - top * mask[..., None])
  third = jax.nn.one_hot(jnp.argmax(rest, axis=-1), rest.shape[-1])
  density = jnp.mean(third * mask[..., None], axis=1)
  rest /= rest.sum(axis=-1, keepdims=True) + 1e-9
  return jnp.mean(density * rest.mean(axis=1)) * rest.shape[-1] ** 2


def check_gating(name, config, arrays):
  """One gating function: dispatch, combine, loss."""
  if config['fn'] not in GATING_OF_FUNCTION:
    pytest.fail(f'{name}: unknown gating function {config["fn"]!r}')
  gating = GATING_OF_FUNCTION[config['fn']]
  router = router_config(name, config, gating)
  groups, tokens, _ = arrays['inputs'].shape
  num_experts, capacity = config['num_experts'], config['capacity']
  mask = jnp.asarray(arrays['nonpadding'] > 0)

  @jax.jit
  def gate(inputs, kernel):
    logits = Router(num_experts, router, init_scale=1.0).apply(
      {'params': {'kernel': kernel}}, inputs, None, train=config['train']
    )
    routing, stats = route(
      logits,
      mask,
      router,
      capacity=capacity,
      train=config['train'],
      rng=None,
    )
    loss = aux_loss(config, gating, stats, logits, mask)
    return routing.dispatch_mask(), routing.combine_weights(), loss

  ours_sent, ours, loss = map(
    np.asarray, gate(arrays['inputs'], arrays['router_kernel'])
  )
  combine, sent = arrays['combine'], arrays['dispatch'].astype(bool)
  slots_then_tokens = (groups, num_experts, capacity, tokens)
  if gating == 'switch_max' and combine.shape == slots_then_tokens:
    combine, sent = (np.moveaxis(a, -1, 1) for a in (combine, sent))
  if gating == 'expert_selection':
    combine = combine * holds_real_tokens(mask)[:, None, None, None]
  np.testing.assert_allclose(ours, combine, rtol=1e-6, atol=1e-5)
  # A slot with zero weight carries no meaning.
  np.testing.assert_array_equal(ours_sent & (ours != 0), sent & (combine != 0))
  np.testing.assert_allclose(loss, arrays['aux_loss'], rtol=1e-6, atol=1e-5)


def holds_real_tokens(mask):
  """Which groups hold more than padding.

  In the others the released experts choose padding, and ours nothing.
  """
  return np.asarray(mask).any(axis=1)


def check_layer(name, config, arrays, backend):
  """A whole layer: outputs, loss, gradient of the inputs."""
  if 'activation' not in config:
    pytest.fail(f'{name}: config has neither "fn" nor "activation"')
  gating = config['moe_gating']
  router = router_config(name, config, gating)
  inputs = jnp.asarray(arrays['inputs'])
  d_model = inputs.shape[-1]
  if config['train'] and config['moe_dropout_rate']:
    pytest.fail(f'{name}: expert dropout draws at random')
  if config['moe_use_experts_attention']:
    pytest.fail(f'{name}: moe_use_experts_attention is not supported')
  if config['moe_output_dim'] not in (None, d_model):
    pytest.fail(f'{name}: moe_output_dim {config["moe_output_dim"]} is not '
                f'the inputs\' width {d_model}')  # fmt: skip
  layer = MoeLayer(
    num_experts=config['moe_num_experts'],
    d_ff=config['moe_hidden_size'],
    activations=read_activations(name, config),
    router=router,
    dispatch=backend,
  )
  params, kernel = read_params(name, arrays)
  mask = jnp.asarray(arrays['nonpadding'] > 0)
  groups = num_groups(mask.size, router.group_size, shards=1)
  grouped_mask = mask.reshape(groups, -1)  # [G, S]

  def objective(inputs):
    outputs, stats = layer.apply(
      {'params': params}, inputs, mask, train=config['train']
    )
    logits = inputs.reshape(groups, -1, d_model) @ kernel
    loss = config['moe_loss_coef'] * aux_loss(
      config, gating, stats, logits, grouped_mask
    )
    total = jnp.sum(outputs * arrays['output_cotangent']) + loss
    return total, (outputs, loss)

  gradient, (outputs, loss) = jax.jit(jax.grad(objective, has_aux=True))(inputs)
  expected = arrays['outputs'], arrays['grad_inputs']
  if gating == 'expert_selection':
    keep = np.repeat(holds_real_tokens(grouped_mask), grouped_mask.shape[1])
    expected = (a * keep.reshape(*mask.shape, 1) for a in expected)
  expected_outputs, expected_gradient = expected
  np.testing.assert_allclose(outputs, expected_outputs, rtol=1e-6, atol=1e-5)
  np.testing.assert_allclose(loss, arrays['aux_loss'], rtol=1e-6, atol=1e-5)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-4)


def read_activations(name, config):
  """Returns the activations in our words."""
  names = config['activation']
  names = [names] if isinstance(names, str) else names
  names = tuple('silu' if a == 'swish' else a for a in names)
  if not set(names) <= set(ACTIVATIONS):
    pytest.fail(f'{name}: unknown activation {config["activation"]!r}')
  return names


def read_params(name, arrays):
  """Returns the layer's parameter tree and the router's kernel."""
  params = {'router': {}, 'expert': {}}
  for key, value in arrays.items():
    if not key.startswith('var/'):
      continue
    _, owner, leaf = key.split('/')
    if leaf != 'kernel':
      pytest.fail(f'{name}: unknown variable {key!r}')
    if owner.endswith('_gating'):
      params['router']['kernel'] = jnp.asarray(value)
    else:
      params['expert'][owner] = {'kernel': jnp.asarray(value)}
  return params, params['router']['kernel']
