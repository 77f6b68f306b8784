"""The leaves of the network: RMSNorm, dropout, embedding, FFN, output head.

T5.1.1's layers (ST-MoE section 2 and equations 3 and 4; T5X `layers.py`).
None has a bias. Each takes plain fields, so that it can be tested alone.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from st_moe import partitioning
from st_moe.initializers import variance_scaling

Initializer = Callable[..., jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': functools.partial(jax.nn.gelu, approximate=True),  # T5.1.1's tanh
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
  'linear': lambda x: x,
}


class Kernel(nn.Module):
  """Owns one weight, `<name>/kernel`, and returns it ready for use."""

  shape: Sequence[int]
  axes: Sequence[str]
  init: Initializer
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self) -> jax.Array:
    return partitioning.param(
      self, 'kernel', self.init, self.shape, self.axes, self.dtype
    )


class RMSNorm(nn.Module):
  """Equation 4: x / sqrt(mean(x^2) + epsilon) * scale, in float32."""

  epsilon: float = 1e-6
  use_scale: bool = True  # False: Table 2's model without learned scale

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(mean_square + self.epsilon)
    if self.use_scale:
      y = y * partitioning.param(
        self, 'scale', nn.initializers.ones, (x.shape[-1],), ('embed',)
      )
    return y.astype(x.dtype)


class Dropout(nn.Module):
  """Drops elements; one mask for all positions of a sequence.

  Mesh TensorFlow and T5X broadcast the mask over the length dimension.
  Flax's own Dropout does not work on meshes with Explicit axes.

  Attributes:
    rate: probability of dropping an element.
    axes: logical axes of the input; the mask is the same along 'length'.
  """

  rate: float
  axes: Sequence[str | None] = ('batch', 'length', 'embed')

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    if not train or self.rate == 0.0:
      return x
    shape = [
      1 if axis == 'length' else size
      for size, axis in zip(x.shape, self.axes, strict=True)
    ]
    keep_rate = 1.0 - self.rate
    draws = partitioning.uniform(self.make_rng('dropout'), shape, self.axes)
    return jnp.where(draws < keep_rate, x / keep_rate, jnp.zeros((), x.dtype))


class Embed(nn.Module):
  """Owns the embedding table [vocab, d_model] and returns it."""

  vocab_size: int
  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self) -> jax.Array:
    return partitioning.param(
      self,
      'embedding',
      nn.initializers.normal(stddev=1.0),
      (self.vocab_size, self.features),
      ('vocab', 'embed'),
      self.dtype,
    )


def embed(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Looks up ids [batch, length]; returns [batch, length, d_model]."""
  return partitioning.take_rows(table, ids, ('batch', 'length', 'embed'))


class Mlp(nn.Module):
  """FFN of T5.1.1 (equation 3): product of activated branches, then `wo`.

  One activation has the kernel `wi`, two have `wi_0` and `wi_1`. Dropout acts
  on the hidden units.
  """

  d_ff: int
  activations: Sequence[str] = ('gelu', 'linear')
  dropout_rate: float = 0.0
  init_scale: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    d_model = x.shape[-1]
    gated = len(self.activations) > 1
    branches = []
    for index, activation in enumerate(self.activations):
      kernel = Kernel(
        (d_model, self.d_ff),
        ('embed', 'mlp'),
        variance_scaling(self.init_scale, d_model),
        self.dtype,
        name=f'wi_{index}' if gated else 'wi',
      )()
      branch = partitioning.project(x, kernel, ('embed', 'mlp'))
      branches.append(ACTIVATIONS[activation](branch))
    hidden = functools.reduce(operator.mul, branches)  # [batch, length, d_ff]
    dropout = Dropout(self.dropout_rate, ('batch', 'length', 'mlp'))
    hidden = dropout(hidden, train=train)
    kernel = Kernel(
      (self.d_ff, d_model),
      ('mlp', 'embed'),
      variance_scaling(self.init_scale, self.d_ff),
      self.dtype,
      name='wo',
    )()
    # Adds partial sums over the model axis.
    return partitioning.project(hidden, kernel, ('mlp', 'embed'))


def untied_logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns float32 logits [batch, length, vocab] for kernel [d_model, vocab].

  Products of activation-dtype numbers, added up in float32.
  """
  return partitioning.project(
    x, kernel, ('embed', 'vocab'), preferred_element_type=jnp.float32
  )


def tied_logits(x: jax.Array, table: jax.Array) -> jax.Array:
  """Returns float32 logits of the embedding table [vocab, d_model].

  T5 1.0 and Switch: activations are scaled by d_model^-0.5, since the table
  has unit variance.
  """
  return partitioning.project(
    x * x.shape[-1] ** -0.5,
    table,
    ('embed', 'vocab'),
    transpose=True,
    preferred_element_type=jnp.float32,
  )
