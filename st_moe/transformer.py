"""The T5.1.1 encoder-decoder in which every n-th FFN is sparse.

ST-MoE section 2, with T5X's parameter names. A stack begins with dropout on
its embeddings and ends with RMSNorm and dropout. Router statistics come back
as values, one per sparse layer, in depth order.

`EncoderDecoder` is the whole model; `encode` runs its encoder alone, and
incremental.py its decoder one position at a time, on the same parameters.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from st_moe import layers, losses
from st_moe.blocks import (
  BlockOutput,
  DecodeCache,
  LayerCache,
  StackInputs,
  activation_dtype,
  norm,
  relpos_bias,
)
from st_moe.config import ModelConfig, RouterConfig
from st_moe.initializers import variance_scaling
from st_moe.losses import ModelOutput
from st_moe.routing import RouterStats
from st_moe.stacking import in_depth_order, run_layers

# Features of a batch that the model takes, as seqio names them.
MODEL_INPUTS = (
  'encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens',
  'encoder_segment_ids', 'decoder_segment_ids',
  'encoder_positions', 'decoder_positions',
)  # fmt: skip


@flax.struct.dataclass
class StackOutput:
  """Result of a stack.

  Attributes:
    y: encoded input [batch, length, d_model], or logits float32 [batch,
      length, vocab].
    stats: RouterStats with a leading axis of sparse layers, or None.
    attention_z_loss: [] sum over real queries, heads and attention layers.
    caches: of the next decoding step.
  """

  y: jax.Array
  stats: RouterStats | None
  attention_z_loss: jax.Array
  caches: tuple[LayerCache, ...]


def _shared_bias(
  config: ModelConfig,
  stack: str,
  positions: jax.Array,
  key_positions: jax.Array,
) -> jax.Array | None:
  """Returns the position biases of all layers, if they share them."""
  if config.relative_position_biases == 'per_layer':
    return None
  return relpos_bias(config, stack)(positions, key_positions)


def _run_stack(
  config: ModelConfig,
  stack: str,
  train: bool,
  embedded: jax.Array,
  inputs: StackInputs,
  caches: tuple[LayerCache, ...] = (),
) -> tuple[jax.Array, BlockOutput]:
  """Dropout, layers, RMSNorm, dropout, inside the calling module."""
  rate = config.dropout_rate
  x = layers.Dropout(rate)(embedded, train=train)
  x, output = run_layers(config, stack, train, x, inputs, caches)
  x = norm(config, f'{stack}_norm')(x)
  return layers.Dropout(rate)(x, train=train), output


class Encoder(nn.Module):
  """The encoder stack."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    embedded: jax.Array,
    segments: jax.Array,
    *,
    train: bool,
    record: bool = False,
  ) -> StackOutput:
    """Encodes embedded [batch, length, d_model], segments [batch, length].

    With `record` the stats hold the decisions of routers, token by token.
    """
    positions = jnp.arange(embedded.shape[1])
    inputs = StackInputs(
      segments=segments,
      key_segments=segments,
      positions=positions,
      key_positions=positions,
      bias=_shared_bias(self.config, 'encoder', positions, positions),
      token_embeddings=embedded,
      record=record,
    )
    x, output = _run_stack(self.config, 'encoder', train, embedded, inputs)
    stats = in_depth_order(self.config, output.stats)
    return StackOutput(x, stats, output.attention_z_loss, ())


class Decoder(nn.Module):
  """The decoder stack and the output projection."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    embedded: jax.Array,
    segments: jax.Array,
    table: jax.Array,
    encoded: jax.Array | None = None,
    encoded_segments: jax.Array | None = None,
    cache: DecodeCache | None = None,
    *,
    train: bool,
    record: bool = False,
  ) -> StackOutput:
    """Returns logits.

    Args:
      embedded: [batch, length, d_model]; with a cache, length is 1.
      segments: int [batch, length]; 0 is padding.
      table: embedding table [vocab, d_model], for tied embeddings.
      encoded: [batch, input length, d_model]; None with a cache.
      encoded_segments: int [batch, input length]; None with a cache.
      cache: of the earlier decoding steps.
      train: whether dropout and router noise act.
      record: whether the stats hold the decisions of routers.
    """
    config = self.config
    positions = key_positions = jnp.arange(embedded.shape[1])
    key_segments, index = segments, None
    if cache is not None:
      index, encoded_segments = cache.index, cache.encoded_segments
      positions = index[None]
      max_length = cache.layers[0].self_attention.key.shape[-3]
      key_positions = jnp.arange(max_length)
      # Positions up to this one are filled and in the same segment.
      key_segments = jnp.where(key_positions <= index, segments, -1)
    inputs = StackInputs(
      segments=segments,
      key_segments=key_segments,
      positions=positions,
      key_positions=key_positions,
      bias=_shared_bias(config, 'decoder', positions, key_positions),
      token_embeddings=embedded,
      encoded=encoded,
      encoded_segments=encoded_segments,
      index=index,
      record=record,
    )
    caches = () if cache is None else cache.layers
    x, output = _run_stack(config, 'decoder', train, embedded, inputs, caches)
    return StackOutput(
      self._logits(x, table),
      in_depth_order(config, output.stats),
      output.attention_z_loss,
      output.caches,
    )

  def _logits(self, x: jax.Array, table: jax.Array) -> jax.Array:
    config = self.config
    if config.tie_embeddings:
      return layers.tied_logits(x, table)
    kernel = layers.Kernel(
      (config.d_model, config.vocab_size),
      ('embed', 'vocab'),
      variance_scaling(1.0, config.d_model),
      activation_dtype(config),
      name='logits_dense',
    )()
    return layers.untied_logits(x, kernel)


def token_segments(
  tokens: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
  """Returns segment ids [batch, length], 0 exactly at padding (id 0)."""
  real = (tokens > 0).astype(jnp.int32)
  return real if segment_ids is None else real * segment_ids


def _embedder(config: ModelConfig, name: str | None = None) -> layers.Embed:
  return layers.Embed(
    config.vocab_size, config.d_model, activation_dtype(config), name=name
  )


class EncoderDecoder(nn.Module):
  """The whole model, on seqio's encoder-decoder features."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    encoder_positions: jax.Array | None = None,
    decoder_positions: jax.Array | None = None,
    *,
    train: bool,
    record: bool = False,
  ) -> ModelOutput:
    """Returns logits and what the objective needs beside them.

    Args:
      encoder_input_tokens: int [batch, input length]; 0 is padding.
      decoder_input_tokens: int [batch, target length]; targets shifted right.
      decoder_target_tokens: int [batch, target length]; 0 is padding.
      encoder_segment_ids: int [batch, input length] of packed examples.
      decoder_segment_ids: int [batch, target length] of packed examples.
      encoder_positions: taken because packed batches have it, and not used:
        position biases are relative, and inside a segment a difference of
        positions is a difference of indices.
      decoder_positions: as `encoder_positions`.
      train: whether dropout and router noise act; they draw from the streams
        'dropout' and 'router'.
      record: whether RouterStats hold the decisions, [sparse layers, batch,
        length, choices].

    Raises:
      UserError: when a dimension does not divide over the mesh.
    """
    del encoder_positions, decoder_positions
    config = self.config
    encoder_segments = token_segments(encoder_input_tokens, encoder_segment_ids)
    decoder_segments = token_segments(
      decoder_target_tokens, decoder_segment_ids
    )
    table = _embedder(config, 'token_embedder')()
    encoder = Encoder(config, name='encoder')(
      layers.embed(table, encoder_input_tokens),
      encoder_segments,
      train=train,
      record=record,
    )
    decoder = Decoder(config, name='decoder')(
      layers.embed(table, decoder_input_tokens),
      decoder_segments,
      table,
      encoder.y,
      encoder_segments,
      train=train,
      record=record,
    )
    encoder_tokens = jnp.sum(encoder_segments > 0).astype(jnp.float32)
    decoder_tokens = jnp.sum(decoder_segments > 0).astype(jnp.float32)
    queries = losses.attention_queries(config, encoder_tokens, decoder_tokens)
    z_loss = encoder.attention_z_loss + decoder.attention_z_loss
    return ModelOutput(
      logits=decoder.y,
      encoder=encoder.stats,
      decoder=decoder.stats,
      attention_z_loss=z_loss / jnp.maximum(config.num_heads * queries, 1.0),
      encoder_tokens=encoder_tokens,
      decoder_tokens=decoder_tokens,
    )


def apply_model(
  config: ModelConfig,
  params: Any,
  batch: dict[str, jax.Array],
  *,
  train: bool,
  rngs: dict[str, jax.Array] | None = None,
  record: bool = False,
) -> ModelOutput:
  """Runs `EncoderDecoder` on a batch with seqio's feature names."""
  inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
  return EncoderDecoder(config).apply(
    {'params': params}, **inputs, train=train, rngs=rngs, record=record
  )


def embedding_table(config: ModelConfig, params: Any) -> jax.Array:
  """Returns the embedding table [vocab, d_model], ready for use."""
  return _embedder(config).apply({'params': params['token_embedder']})


def generation_config(config: ModelConfig) -> ModelConfig:
  """Returns a model whose evaluation drops what its generation drops.

  That is nothing, unless the encoder's experts choose their tokens or
  `RouterConfig.generation_dropless` is off, which both keep its capacity.
  """

  def dropless(router: RouterConfig, wanted: bool) -> RouterConfig:
    wanted = wanted and router.kind == 'token_choice'
    return dataclasses.replace(router, eval_dropless=True) if wanted else router

  return dataclasses.replace(
    config,
    encoder_router=dropless(
      config.encoder_router, config.encoder_router.generation_dropless
    ),
    decoder_router=dropless(config.decoder_router, True),
  )


def encode(
  config: ModelConfig, params: Any, encoder_input_tokens: jax.Array
) -> jax.Array:
  """Returns the encoded input [batch, input length, d_model], for decoding.

  Tokens that choose their experts get all of them: nothing is dropped, and a
  sequence does not depend on its neighbours. Experts that choose take the
  likeliest tokens of a group, so that there it does, as without
  `RouterConfig.generation_dropless` in groups of several sequences.

  Args:
    config: of the model.
    params: of `EncoderDecoder`.
    encoder_input_tokens: int [batch, input length]; 0 is padding.
  """
  config = generation_config(config)
  embedded = layers.embed(embedding_table(config, params), encoder_input_tokens)
  segments = token_segments(encoder_input_tokens, None)
  return (
    Encoder(config)
    .apply({'params': params['encoder']}, embedded, segments, train=False)
    .y
  )
