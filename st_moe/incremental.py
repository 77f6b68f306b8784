"""The decoder one position at a time, with its cache as a value.

The cache holds keys and values: of the encoded input, projected once, and of
the positions decoded so far. Nothing is hidden in Flax collections, so a cache
can be carried through a loop, reordered and copied like any tree of arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp

from st_moe import layers, partitioning
from st_moe.attention import KeyValue, project
from st_moe.blocks import DecodeCache, LayerCache, activation_dtype
from st_moe.config import ModelConfig
from st_moe.stacking import depth, superblock_size
from st_moe.transformer import (
  Decoder,
  embedding_table,
  encode,
  token_segments,
)


def _cross_key_value(
  config: ModelConfig, params: Any, encoded: jax.Array
) -> KeyValue:
  """Projects `encoded` to the keys and values of one decoder layer."""

  def one(name: str) -> jax.Array:
    kernel = params['encoder_decoder_attention'][name]['kernel']
    kernel = kernel.astype(activation_dtype(config))
    kernel = partitioning.shard(kernel, 'embed', 'joined_kv')
    return project(encoded, kernel, config.num_heads)

  return KeyValue(one('key'), one('value'))


def init_cache(
  config: ModelConfig,
  params: Any,
  encoder_input_tokens: jax.Array,
  max_length: int,
  rows: int = 1,
) -> DecodeCache:
  """Encodes the input and returns the cache of the first decoding step.

  Args:
    config: of the model.
    params: of `EncoderDecoder`.
    encoder_input_tokens: int [batch, input length]; 0 is padding.
    max_length: how many positions can be decoded.
    rows: sequences decoded for each input, one after another in the batch.
  """
  encoded = encode(config, params, encoder_input_tokens)
  empty = partitioning.shard(
    jnp.zeros(
      (len(encoded) * rows, max_length, config.num_heads, config.d_kv),
      encoded.dtype,
    ),
    *('batch', 'length', 'heads', 'kv'),
  )

  def one(layer_params: Any) -> LayerCache:
    return LayerCache(
      KeyValue(empty, empty), _cross_key_value(config, layer_params, encoded)
    )

  decoder, num_layers = params['decoder'], depth(config, 'decoder')
  if not config.scan_layers:
    caches = [one(decoder[f'layers_{i}']) for i in range(num_layers)]
  else:
    size = superblock_size(config, 'decoder')
    caches = []
    for j in range(size):
      stacked = decoder['superblocks'][f'layer_{j}']
      column = [
        one(jax.tree.map(lambda leaf, at=i: leaf[at], stacked))
        for i in range(num_layers // size)
      ]
      caches.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *column))
  return DecodeCache(
    index=jnp.zeros((), jnp.int32),
    encoded_segments=token_segments(encoder_input_tokens, None),
    layers=tuple(caches),
  )


def decode_step(
  config: ModelConfig,
  params: Any,
  cache: DecodeCache,
  tokens: jax.Array,
  active: jax.Array,
) -> tuple[jax.Array, DecodeCache]:
  """Decodes one position of every sequence.

  Args:
    config: of the model.
    params: of `EncoderDecoder`.
    cache: from `init_cache` or the step before.
    tokens: int [rows], decoder input at this position (0 at the first).
    active: bool [rows], sequences that have not ended. The others are padding
      to the routers.

  Returns:
    Logits float32 [rows, vocab] of this position, and the next step's cache.
  """
  table = embedding_table(config, params)
  output = Decoder(config).apply(
    {'params': params['decoder']},
    layers.embed(table, tokens[:, None]),
    active[:, None].astype(jnp.int32),
    table,
    cache=cache,
    train=False,
  )
  cache = cache.replace(index=cache.index + 1, layers=output.caches)
  return output.y[:, 0], cache
