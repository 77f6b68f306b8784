"""One layer of the encoder or the decoder.

ST-MoE section 2 and appendix C: pre-norm sublayers, each RMSNorm, layer,
dropout, residual. A sparse layer has a mixture of experts in place of its FFN
and an ordinary FFN beside it (Table 16), as a sublayer of its own.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from st_moe import layers
from st_moe.attention import (
  Attention,
  AttentionOutput,
  KeyValue,
  RelativePositionBias,
)
from st_moe.config import ModelConfig, RouterConfig
from st_moe.moe import MoeLayer


@flax.struct.dataclass
class LayerCache:
  """Keys and values of one decoder layer, or of several, stacked.

  Attributes:
    self_attention: of the positions decoded so far, [batch, max length,
      heads, d_kv].
    cross_attention: of the encoded input, [inputs, input length, heads, d_kv];
      each input has as many rows of the batch as another.
  """

  self_attention: KeyValue
  cross_attention: KeyValue


@flax.struct.dataclass
class DecodeCache:
  """What decoding carries from step to step.

  Attributes:
    index: int32 [] position of the next token.
    encoded_segments: int [inputs, input length]; 0 is padding.
    layers: one LayerCache per layer, or, of a scanned model, per layer of a
      superblock, with a leading axis of superblocks.
  """

  index: jax.Array
  encoded_segments: jax.Array
  layers: tuple[LayerCache, ...]


@flax.struct.dataclass
class StackInputs:
  """What every block of a stack is given beside its activations.

  Attributes:
    segments: int [batch, length]; 0 is padding.
    key_segments: int [batch, keys] of what self-attention looks at.
    positions: int [length].
    key_positions: int [keys] of what self-attention looks at.
    bias: float32 [batch shards, heads, length, keys], or None where every
      layer has position biases of its own.
    token_embeddings: [batch, length, d_model], for routers that want them.
    encoded: [batch, input length, d_model]; None in an encoder.
    encoded_segments: int [batch, input length]; None in an encoder.
    index: int32 [] the position being decoded; None outside decoding.
    record: whether stats hold the decisions of routers, token by token.
  """

  segments: jax.Array
  key_segments: jax.Array
  positions: jax.Array
  key_positions: jax.Array
  bias: jax.Array | None
  token_embeddings: jax.Array
  encoded: jax.Array | None = None
  encoded_segments: jax.Array | None = None
  index: jax.Array | None = None
  record: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class BlockOutput:
  """What layers give beside their activations.

  Attributes:
    stats: tuple with the RouterStats of each sparse layer.
    attention_z_loss: [] sum over real queries, heads and attention layers.
    caches: tuple with the LayerCache of each layer; empty unless decoding.
  """

  stats: tuple[Any, ...]
  attention_z_loss: jax.Array
  caches: tuple[LayerCache, ...]


def activation_dtype(config: ModelConfig) -> Any:
  """Returns the dtype of activations and of weights while in use."""
  return jnp.dtype(config.activation_dtype)


def norm(config: ModelConfig, name: str) -> layers.RMSNorm:
  """Returns the model's RMSNorm under a name."""
  return layers.RMSNorm(
    epsilon=config.layer_norm_epsilon,
    use_scale=config.layer_norm_scale,
    name=name,
  )


def relpos_bias(config: ModelConfig, stack: str) -> RelativePositionBias:
  """Returns the position biases of 'encoder' or 'decoder', not yet applied."""
  return RelativePositionBias(
    num_heads=config.num_heads,
    num_buckets=config.relative_attention_num_buckets,
    max_distance=config.relative_attention_max_distance,
    bidirectional=stack == 'encoder',
    name='relpos_bias',
  )


class Block(nn.Module):
  """Self-attention, cross-attention in a decoder, and FFN or experts.

  `train` is a field, so that remat need not trace it.
  """

  config: ModelConfig
  stack: str  # 'encoder' or 'decoder'
  sparse: bool
  train: bool

  @nn.compact
  def __call__(
    self, x: jax.Array, inputs: StackInputs, cache: LayerCache | None
  ) -> tuple[jax.Array, BlockOutput]:
    """Maps x [batch, length, d_model]; with a cache, one decoding step."""
    decode = cache is not None
    x, attended = self._self_attention(x, inputs, cache)
    z_loss, caches = attended.z_loss, ()
    if self.stack == 'decoder':
      x, crossed = self._cross_attention(x, inputs, cache)
      z_loss += crossed.z_loss
      if decode:
        caches = (LayerCache(attended.key_value, crossed.key_value),)
    if not self.sparse:
      x = self._mlp('mlp', x)
      return x, BlockOutput((), z_loss, caches)
    extra_ffn = self._router().extra_ffn
    if extra_ffn == 'before':
      x = self._mlp('extra_mlp', x)
    x, stats = self._moe(x, inputs, decode)
    if extra_ffn == 'after':
      x = self._mlp('extra_mlp', x)
    return x, BlockOutput((stats,), z_loss, caches)

  def _router(self) -> RouterConfig:
    return getattr(self.config, f'{self.stack}_router')

  def _pre_norm(self, name: str, x: jax.Array) -> jax.Array:
    return norm(self.config, f'pre_{name}_layer_norm')(x)

  def _residual(self, x: jax.Array, y: jax.Array) -> jax.Array:
    return x + layers.Dropout(self.config.dropout_rate)(y, train=self.train)

  def _attention(self, name: str) -> Attention:
    return Attention(
      num_heads=self.config.num_heads,
      d_kv=self.config.d_kv,
      dropout_rate=self.config.dropout_rate,
      with_z_loss=self.config.attention_z_loss_weight > 0,
      dtype=activation_dtype(self.config),
      name=name,
    )

  def _self_attention(
    self, x: jax.Array, inputs: StackInputs, cache: LayerCache | None
  ) -> tuple[jax.Array, AttentionOutput]:
    is_decoder = self.stack == 'decoder'
    name = 'self_attention' if is_decoder else 'attention'
    h = self._pre_norm(name, x)
    bias = inputs.bias
    if bias is None:
      bias = relpos_bias(self.config, self.stack)(
        inputs.positions, inputs.key_positions
      )
    output = self._attention(name)(
      h,
      h,
      query_segments=inputs.segments,
      key_segments=inputs.key_segments,
      causal=is_decoder and cache is None,  # a cache holds no later position
      bias=bias,
      cache=None if cache is None else cache.self_attention,
      index=inputs.index,
      train=self.train,
    )
    return self._residual(x, output.y), output

  def _cross_attention(
    self, x: jax.Array, inputs: StackInputs, cache: LayerCache | None
  ) -> tuple[jax.Array, AttentionOutput]:
    output = self._attention('encoder_decoder_attention')(
      self._pre_norm('cross_attention', x),
      inputs.encoded if cache is None else None,
      query_segments=inputs.segments,
      key_segments=inputs.encoded_segments,
      cache=None if cache is None else cache.cross_attention,
      train=self.train,
    )
    return self._residual(x, output.y), output

  def _mlp(self, name: str, x: jax.Array) -> jax.Array:
    mlp = layers.Mlp(
      d_ff=self.config.d_ff,
      activations=self.config.mlp_activations,
      dropout_rate=self.config.dropout_rate,
      init_scale=self.config.init_scale,
      dtype=activation_dtype(self.config),
      name=name,
    )
    return self._residual(x, mlp(self._pre_norm(name, x), train=self.train))

  def _moe(
    self, x: jax.Array, inputs: StackInputs, decode: bool
  ) -> tuple[jax.Array, Any]:
    config, router = self.config, self._router()
    rate = router.expert_dropout_rate
    moe = MoeLayer(
      num_experts=config.num_experts,
      d_ff=config.expert_d_ff or config.d_ff,
      activations=config.expert_activations or config.mlp_activations,
      router=router,
      dispatch=config.dispatch,
      expert_dropout_rate=config.dropout_rate if rate is None else rate,
      init_scale=config.init_scale,
      dtype=activation_dtype(config),
      name='moe',
    )
    wants_words = router.word_embedding != 'none'
    y, stats = moe(
      self._pre_norm('mlp', x),
      inputs.segments > 0,
      train=self.train,
      decode=decode,
      token_embeddings=inputs.token_embeddings if wants_words else None,
      record=inputs.record,
    )
    return self._residual(x, y), stats
