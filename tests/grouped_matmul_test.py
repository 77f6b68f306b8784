"""Products of rows sorted by expert, against one product per expert."""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.experts import grouped_matmul as module
from st_moe.experts.grouped_matmul import (
  BLOCK_ROWS,
  PIECE_ROWS,
  count_blocks,
  grouped_matmul,
)

LOADS = {
  'uneven': [3, 0, 150, 1, 0, 40, 128, 8],
  'all to one': [0, 0, 0, 330, 0, 0, 0, 0],
  'all to the last': [0, 0, 0, 0, 0, 0, 0, 330],
  'nothing': [0] * 8,
  'one row': [0, 1, 0, 0, 0, 0, 0, 0],
}


def arrays(rows, inputs, outputs, num_experts, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (rows, inputs), (num_experts, inputs, outputs), (rows, outputs)
  return [
    jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)
  ]


def reference(x, kernel, sizes, d_y):
  """Returns y, d_x, d_kernel in float64, one expert after another."""
  x, kernel, d_y = (np.asarray(a, np.float64) for a in (x, kernel, d_y))
  y, d_x = np.zeros_like(d_y), np.zeros_like(x)
  d_kernel, start = np.zeros_like(kernel), 0
  for expert, size in enumerate(sizes):
    rows = slice(start, start + size)
    y[rows] = x[rows] @ kernel[expert]
    d_x[rows] = d_y[rows] @ kernel[expert].T
    d_kernel[expert] = x[rows].T @ d_y[rows]
    start += size
  return y, d_x, d_kernel


def compute(x, kernel, sizes, d_y, form):
  def run(x, kernel, sizes, d_y):
    y, pull = jax.vjp(
      lambda x, kernel: grouped_matmul(x, kernel, sizes, form), x, kernel
    )
    return y, *pull(d_y)

  return jax.jit(run)(x, kernel, jnp.asarray(sizes, jnp.int32), d_y)


def assert_equal_to_reference(x, kernel, sizes, d_y, form):
  used = sum(sizes)
  got = compute(x, kernel, sizes, d_y, form)
  expected = reference(x, kernel, sizes, d_y)
  for name, a, b in zip(['y', 'd_x', 'd_kernel'], got, expected, strict=True):
    if name != 'd_kernel':  # rows of no expert are unspecified
      a, b = a[:used], b[:used]
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize('name', LOADS)
def test_blocks_equal_one_product_per_expert(name):
  x, kernel, d_y = arrays(345, 24, 40, 8)
  assert_equal_to_reference(x, kernel, LOADS[name], d_y, 'blocks')


@pytest.mark.parametrize('name', LOADS)
def test_megablox_equals_one_product_per_expert(name, monkeypatch):
  """The TPU's kernels, interpreted."""
  importlib.import_module('jax.experimental.pallas.ops.tpu.megablox.gmm')
  # The package shows a function by the name of its module.
  kernels = sys.modules['jax.experimental.pallas.ops.tpu.megablox.gmm']
  for function in ('gmm', 'tgmm'):
    interpreted = functools.partial(getattr(kernels, function), interpret=True)
    monkeypatch.setattr(kernels, function, interpreted)
  monkeypatch.setattr(module, 'TILE', (128, 128, 128))
  x, kernel, d_y = arrays(345, 128, 256, 8)
  assert_equal_to_reference(x, kernel, LOADS[name], d_y, 'megablox')


def test_bfloat16_adds_up_a_weight_gradient_in_float32():
  """256 blocks of ones: a bfloat16 sum of blocks would stop growing."""
  rows = 300 * BLOCK_ROWS + 1
  x, d_y = jnp.ones((rows, 1), jnp.bfloat16), jnp.ones((rows, 1), jnp.bfloat16)
  kernel = jnp.ones((1, 1, 1), jnp.bfloat16)
  _, _, d_kernel = compute(x, kernel, [rows], d_y, 'blocks')
  assert d_kernel.dtype == jnp.bfloat16
  np.testing.assert_allclose(float(d_kernel[0, 0, 0]), rows, rtol=2**-8)


def compiled_flops(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()['flops']


@pytest.mark.parametrize('num_experts', [8, 64])
def test_a_compiled_loop_body_multiplies_no_more_than_its_rows(num_experts):
  """`cost_analysis` counts each loop's body once: one block and one piece.

  So the FLOPs of a run are those of one block times the blocks, and of one
  piece times the pieces, that `count_blocks` gives; see the next test. Neither
  body knows the number of experts.
  """
  inputs, outputs = 64, 96
  x, kernel, d_y = arrays(4096, inputs, outputs, num_experts)
  sizes = jnp.full(num_experts, 4096 // num_experts, jnp.int32)
  per_row = 2 * inputs * outputs

  def product(x, kernel, sizes):
    return grouped_matmul(x, kernel, sizes, 'blocks')

  def pull(x, kernel, sizes, d_y):
    return jax.vjp(lambda x, k: product(x, k, sizes), x, kernel)[1](d_y)

  forward = compiled_flops(product, x, kernel, sizes)
  assert forward <= 1.02 * per_row * (BLOCK_ROWS + PIECE_ROWS)
  assert forward >= per_row * (BLOCK_ROWS + PIECE_ROWS)
  # Of the weight gradient: one block, and the branches of the pieces.
  branches = sum(range(PIECE_ROWS, BLOCK_ROWS + 1, PIECE_ROWS))
  backward = compiled_flops(pull, x, kernel, sizes, d_y) - forward
  most = per_row * (BLOCK_ROWS + branches)
  bookkeeping = 2 * inputs * outputs * (len(range(8, 129, 8)) + 2)
  assert backward <= 1.02 * most + bookkeeping


@pytest.mark.parametrize(
  'num_experts, rows', [(8, 4096), (16, 4096), (64, 8192), (64, 4096)]
)
def test_rows_multiplied_are_within_a_tenth_of_the_rows(num_experts, rows):
  rng = np.random.default_rng(num_experts)
  uneven = rng.multinomial(rows, rng.dirichlet(np.full(num_experts, 2.0)))
  one = np.eye(num_experts, dtype=int)[0] * rows
  for sizes in (uneven, one, np.full(num_experts, rows // num_experts)):
    blocks, pieces = count_blocks(sizes)
    multiplied = (blocks * BLOCK_ROWS + pieces * PIECE_ROWS).sum()
    assert rows <= multiplied <= 1.1 * rows


@pytest.mark.parametrize('num_experts', [8, 64])
def test_flops_of_the_tpu_program(num_experts, monkeypatch):
  """Compiled ahead of time; a Pallas kernel states its own FLOPs."""
  pytest.importorskip('libtpu')
  from jax.experimental import topologies

  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name='v5p:2x2x1'
  )
  chip = jax.sharding.SingleDeviceSharding(topology.devices[0])
  rows, inputs, outputs = 16384, 1024, 2816

  def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=chip)

  x, d_y = shape(rows, inputs), shape(rows, outputs)
  kernel = shape(num_experts, inputs, outputs)
  sizes = shape(num_experts, dtype=jnp.int32)

  def forward(x, kernel, sizes):
    return grouped_matmul(x, kernel, sizes, 'megablox')

  def backward(x, kernel, sizes, d_y):
    return jax.vjp(lambda x, k: forward(x, k, sizes), x, kernel)[1](d_y)

  ideal = 2 * rows * inputs * outputs
  assert ideal <= compiled_flops(forward, x, kernel, sizes) <= 1.1 * ideal
  both = compiled_flops(backward, x, kernel, sizes, d_y)
  assert 2 * ideal <= both <= 1.1 * 2 * ideal
