"""The initialiser of Mesh TensorFlow: cut at two deviations, not rescaled."""

import jax
import jax.numpy as jnp
import numpy as np

from st_moe.initializers import variance_scaling


def test_deviation_is_that_of_a_cut_normal_without_correction():
  init = variance_scaling(scale=0.5, fan_in=50)
  kernel = np.asarray(init(jax.random.key(0), (500, 200), jnp.float32))
  before_cut = np.sqrt(0.5 / 50)
  assert np.abs(kernel).max() <= 2 * before_cut
  # A normal cut at two deviations has 0.8796 of its deviation.
  np.testing.assert_allclose(kernel.std(), 0.8796 * before_cut, rtol=0.01)
  np.testing.assert_allclose(kernel.mean(), 0.0, atol=0.01 * before_cut)
