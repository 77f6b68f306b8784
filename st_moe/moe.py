"""The sparse layer: a router, experts, and the way between them.

Owns the router's and the experts' weights and nothing else; the arithmetic is
in routing/ and experts/. Paper section 2, appendices A, C and D; Mesh
TensorFlow moe.py:487-565 and 1932-1953.

Letters: B sequences, L length, G groups, S tokens per group, E experts,
C capacity, D d_model, F d_ff.
"""

import functools
import operator
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from st_moe import experts, partitioning
from st_moe.config import Activation, RouterConfig
from st_moe.initializers import variance_scaling
from st_moe.layers import ACTIVATIONS, Kernel
from st_moe.routing import (
  RouterStats,
  Routing,
  expert_capacity,
  num_groups,
  route,
)


class MoeLayer(nn.Module):
  """A sparse layer: each token is processed by the experts it is routed to.

  Attributes:
    num_experts: E.
    d_ff: F, of one expert.
    activations: one, or two for a gated expert ('gelu', 'linear': GEGLU).
    router: the router's settings.
    dispatch: how tokens travel (experts/).
    expert_dropout_rate: of the experts' hidden units, in training.
    init_scale: variance of all kernels.
    dtype: of the experts' arithmetic.
  """

  num_experts: int
  d_ff: int
  activations: tuple[Activation, ...]
  router: RouterConfig
  dispatch: Literal['auto', 'einsum', 'gather', 'ragged'] = 'auto'
  expert_dropout_rate: float = 0.0
  init_scale: float = 1.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None,
    *,
    train: bool,
    decode: bool = False,
    token_embeddings: jax.Array | None = None,
    record: bool = False,
  ) -> tuple[jax.Array, RouterStats]:
    """Routes tokens to experts and back.

    Tokens are grouped row-major over [B, L]: "first come" inside a group means
    sequence by sequence (moe.py:335-376).

    Args:
      x: [B, L, D].
      mask: bool [B, L], real tokens; None: all.
      train: training or evaluation settings; jitter and dropout.
      decode: drop nothing, so that no example depends on its neighbours.
      token_embeddings: [B, L, D], for `router.word_embedding` modes.
      record: whether the stats hold the decisions, [B, L, K].

    Returns:
      y [B, L, D], zeros for tokens that reach no expert, and the layer's
      losses and health.

    Raises:
      UserError: when tokens or experts do not divide over the mesh, or a
        random policy has no 'router' key.
    """
    batch, length, d_model = x.shape
    tokens = batch * length
    groups = num_groups(
      tokens, self.router.group_size or length, partitioning.batch_shards()
    )
    shape = (groups, tokens // groups, d_model)  # [G, S, D]
    names = ('group', None, 'embed')
    x = partitioning.reshape(x.astype(self.dtype), shape, names)
    if mask is not None:
      mask = partitioning.reshape(mask, shape[:2], names[:2])
    if token_embeddings is not None:
      token_embeddings = partitioning.reshape(token_embeddings, shape, names)
    dropless = self._is_dropless(train=train, decode=decode)
    capacity = shape[1]
    if not dropless:
      capacity = expert_capacity(
        self.router, shape[1], self.num_experts, train=train
      )
    with jax.named_scope('route'):
      logits = Router(
        self.num_experts, self.router, self.init_scale, name='router'
      )(x, token_embeddings, train=train)
      routing, stats = route(
        logits,
        mask,
        self.router,
        capacity=capacity,
        train=train,
        rng=self._routing_key(),
        record=record,
      )
    y = self._through_experts(
      x, routing, train=train, dropless=dropless
    )  # [G, S, D]
    y = partitioning.reshape(
      y, (batch, length, d_model), ('batch', 'length', 'embed')
    )
    if record:
      decisions = jax.tree.map(
        lambda a: partitioning.reshape(
          a, (batch, length, a.shape[-1]), ('batch', 'length', None)
        ),
        stats.decisions,
      )
      stats = stats.replace(decisions=decisions)
    return y, stats

  def _routing_key(self) -> jax.Array | None:
    """Returns a key for the 'random' policy, if the caller gave one."""
    if self.has_rng('router') or self.is_initializing():
      return self.make_rng('router')
    return None

  def _is_dropless(self, *, train: bool, decode: bool) -> bool:
    """Returns whether every choice is computed, whatever its expert's load."""
    if self.router.kind == 'expert_choice':
      return False  # experts choose as many tokens as they have slots
    return (
      decode
      or self.dispatch == 'ragged'
      or (self.router.eval_dropless and not train)
    )

  def _through_experts(
    self, x: jax.Array, routing: Routing, *, train: bool, dropless: bool
  ) -> jax.Array:
    """Sends tokens x [G, S, D] to their experts; returns the sums [G, S, D]."""
    backend = experts.choose_backend(
      self.dispatch,
      platform=partitioning.platform(),
      group_tokens=x.shape[1],
      d_ff=self.d_ff,
      dropless=dropless,
    ).name
    feed_forward = Experts(
      num_experts=self.num_experts,
      d_ff=self.d_ff,
      activations=self.activations,
      bias=self.router.expert_bias,
      dropout_rate=self.expert_dropout_rate,
      init_scale=self.init_scale,
      dtype=self.dtype,
      name='expert',
    )
    if backend == 'ragged':
      with jax.named_scope('experts'):
        return feed_forward(x, routing, train=train)
    with jax.named_scope('dispatch'):
      y = experts.dispatch(x, routing, backend)
      # All-to-all: from each group's devices to each expert's. Both ends are
      # named, so that gradients come back the same way.
      y = partitioning.shard(y, None, 'group', 'capacity', 'embed')
      y = partitioning.shard(y, 'expert', 'expert_group', 'capacity', 'embed')
    with jax.named_scope('experts'):
      y = feed_forward(y, None, train=train)
    with jax.named_scope('combine'):
      y = partitioning.shard(y, None, 'group', 'capacity', 'embed')
      return experts.combine(y, routing, backend)


class Router(nn.Module):
  """Router logits of every token, without bias.

  Inputs, kernel and product are in `config.dtype`: float32 by default, at full
  precision also on TPU, where the released code multiplied in bfloat16.
  """

  num_experts: int
  config: RouterConfig
  init_scale: float

  @nn.compact
  def __call__(
    self, x: jax.Array, token_embeddings: jax.Array | None, *, train: bool
  ) -> jax.Array:
    """Returns float32 [G, S, E].

    Args:
      x: [G, S, D].
      token_embeddings: [G, S, D], for the word-embedding modes.
      train: whether to jitter `x`.
    """
    x = x.astype(jnp.float32)
    if train and self.config.jitter:
      low, high = 1.0 - self.config.jitter, 1.0 + self.config.jitter
      x = x * partitioning.uniform(
        self.make_rng('router'), x.shape, ('group', None, 'embed'), low, high
      )
    x = self._mix(x, token_embeddings)
    dtype = jnp.dtype(self.config.dtype)
    kernel = partitioning.param(
      self,
      'kernel',
      variance_scaling(self.init_scale, fan_in=x.shape[-1]),
      (x.shape[-1], self.num_experts),
      ('embed', 'router_experts'),
      dtype,
    )
    with jax.default_matmul_precision('highest'):
      logits = partitioning.einsum('gsd,de->gse', x.astype(dtype), kernel)
    return logits.astype(jnp.float32)

  def _mix(self, x: jax.Array, token_embeddings: jax.Array | None) -> jax.Array:
    """Adds word embeddings to the router's input (appendix C)."""
    mode = self.config.word_embedding
    if mode == 'none':
      return x
    if token_embeddings is None:
      raise ValueError(f'word_embedding={mode!r} needs token_embeddings')
    words = token_embeddings.astype(jnp.float32)
    if mode.endswith('stop_grad'):
      words = jax.lax.stop_gradient(words)
    if mode == 'embed_only':
      return words
    if mode.startswith('concat'):
      return jnp.concatenate([x, words], axis=-1)
    return x + words


class Experts(nn.Module):
  """E feed-forward networks, without biases in the kernels.

  One activation: act(x wi) wo. Two: (act_0(x wi_0) * act_1(x wi_1)) wo
  (equation 3). `bias` adds to or multiplies the hidden units (Table 17).
  """

  num_experts: int
  d_ff: int
  activations: tuple[Activation, ...]
  bias: Literal['none', 'additive', 'multiplicative']
  dropout_rate: float
  init_scale: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: jax.Array, routing: Routing | None, *, train: bool
  ) -> jax.Array:
    """Processes buffers, or tokens with their routing.

    Args:
      x: buffers [E, G, C, D]; with a routing, tokens [G, S, D].
      routing: of tokens that are sent to their experts and back dropless.
      train: whether dropout acts.

    Returns:
      Like `x`.
    """
    weights = self._weights(x.shape[-1])
    dropout = train and self.dropout_rate > 0
    draw = None
    if routing is not None:
      if dropout:
        draw = partitioning.uniform(
          self.make_rng('dropout'),
          (*routing.gate.shape, self.d_ff),
          ('group', None, None, 'mlp'),
        )
      return experts.process_ragged(x, routing, weights, self._hidden, draw)
    # One axis of rows: with two, XLA transposes operands of weight gradients.
    names = ('expert', 'expert_group', 'embed')
    rows = partitioning.reshape(
      x, (x.shape[0], x.shape[1] * x.shape[2], x.shape[3]), names
    )
    products = [
      partitioning.multiply_experts(rows, wi, experts.WI_AXES)
      for wi in weights.wi
    ]
    if dropout:
      draw = partitioning.uniform(
        self.make_rng('dropout'),
        products[0].shape,
        ('expert', 'expert_group', 'mlp'),
      )
    bias = weights.bias
    if bias is not None:
      bias = bias[:, None, :]
    hidden = self._hidden(products, bias, draw)
    y = partitioning.multiply_experts(
      hidden, weights.wo, experts.WO_AXES, out=names
    )
    return partitioning.reshape(
      y, x.shape, ('expert', 'expert_group', 'capacity', 'embed')
    )

  def _hidden(
    self,
    products: list[jax.Array],
    bias: jax.Array | None,
    draw: jax.Array | None,
  ) -> jax.Array:
    """Returns hidden units [..., F] from products with each `wi`.

    Args:
      products: [..., F], one for each activation.
      bias: broadcasts to a product; None: none.
      draw: uniform in [0, 1), like a product; a unit is dropped where it
        exceeds the rate's complement; None: no dropout.
    """
    hidden = [
      ACTIVATIONS[activation](product)
      for activation, product in zip(self.activations, products, strict=True)
    ]
    h = functools.reduce(operator.mul, hidden)
    if bias is not None:
      h = h + bias if self.bias == 'additive' else h * bias
    if draw is not None:
      keep = 1.0 - self.dropout_rate
      h = jnp.where(draw < keep, h / keep, 0)
    return h

  def _weights(self, d_model: int) -> experts.ExpertWeights:
    """Declares the kernels and the bias."""
    shape, axes = (self.num_experts, d_model, self.d_ff), experts.WI_AXES
    gated = len(self.activations) > 1
    wi = tuple(
      self._kernel(f'wi_{i}' if gated else 'wi', shape, axes)
      for i in range(len(self.activations))
    )
    bias = None
    if self.bias != 'none':
      bias = partitioning.param(
        self,
        'bias',
        nn.initializers.zeros
        if self.bias == 'additive'
        else nn.initializers.ones,
        (self.num_experts, self.d_ff),
        experts.BIAS_AXES,
        self.dtype,
      )
    wo = self._kernel(
      'wo', (self.num_experts, self.d_ff, d_model), experts.WO_AXES
    )
    return experts.ExpertWeights(wi=wi, wo=wo, bias=bias)

  def _kernel(
    self, name: str, shape: tuple[int, int, int], axes: tuple[str, str, str]
  ) -> jax.Array:
    """Declares `name/kernel`; experts do not count in its fan-in."""
    init = variance_scaling(self.init_scale, fan_in=shape[1])
    return Kernel(shape, axes, init, self.dtype, name=name)()
