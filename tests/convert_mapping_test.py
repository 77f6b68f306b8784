"""Tables of views: what they read, and what `check` refuses."""

import types

import numpy as np
import pytest

from st_moe.convert.mapping import View, check, one, read_leaf, side_by_side
from st_moe.errors import UserError


class Arrays:
  """A source in memory."""

  where = 'here'

  def __init__(self, **tensors):
    self.tensors = tensors

  def read(self, name, index=None):
    return self.tensors[name] if index is None else self.tensors[name][index]


STACKED = np.arange(24.0).reshape(2, 3, 4)  # [d_model, layers, heads]
SOURCE = Arrays(plain=np.arange(6.0).reshape(2, 3), stacked=STACKED)
TURNED = one('a', (3, 2), View('plain', transpose=True))
LAYERS = side_by_side(
  [one('', (2, 4), View('stacked', at=(None, i))) for i in range(3)], 'b'
)
SHAPES = {'a': (3, 2), 'b': (3, 2, 4)}


def never(name: str) -> str | None:
  return None


def test_views_turn_take_and_stand_side_by_side():
  np.testing.assert_array_equal(
    read_leaf(SOURCE, TURNED), [[0, 3], [1, 4], [2, 5]]
  )
  np.testing.assert_array_equal(
    read_leaf(SOURCE, LAYERS), STACKED.swapaxes(0, 1)
  )


def test_a_part_of_a_parameter_is_that_part_of_the_whole():
  index = (slice(1, 3), slice(1, 2))
  np.testing.assert_array_equal(
    read_leaf(SOURCE, TURNED, index), read_leaf(SOURCE, TURNED)[index]
  )
  index = (slice(1, 3), slice(0, 1), slice(2, 4))
  np.testing.assert_array_equal(
    read_leaf(SOURCE, LAYERS, index), read_leaf(SOURCE, LAYERS)[index]
  )


def test_merged_axes_are_written_as_one():
  source = Arrays(kernel=np.arange(24.0).reshape(2, 3, 4))
  leaf = one('a', (2, 12), View('kernel', merge=1))
  np.testing.assert_array_equal(
    read_leaf(source, leaf), np.arange(24).reshape(2, 12)
  )


def test_what_is_whole_is_counted():
  source = Arrays(**SOURCE.tensors, spare=np.zeros(1))
  coverage = check(
    [TURNED, LAYERS], SHAPES, source, {'spare': 'not needed'}.get
  )
  assert (coverage.used, coverage.filled) == (2, 2)
  assert coverage.ignored == {'spare': 'not needed'}


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'plain': None}, 'here lacks plain'),
    (
      {'more': np.zeros(1)},
      'holds more, for which the model that it describes has no',
    ),
    ({'plain': np.zeros((3, 2))}, 'it seems to be transposed'),
    ({'plain': np.zeros((5, 2))}, 'one of them is not of this model'),
    ({'stacked': np.zeros((2, 4, 4))}, 'takes 3 of 4 parts'),
  ],
)
def test_what_does_not_fit_is_one_line(changes, message):
  tensors = SOURCE.tensors | changes
  source = Arrays(**{n: x for n, x in tensors.items() if x is not None})
  with pytest.raises(UserError, match=message):
    check([TURNED, LAYERS], SHAPES, source, never)


def test_a_table_that_leaves_a_parameter_out_is_our_bug():
  with pytest.raises(ValueError, match='leaves and parameters differ'):
    check([TURNED], SHAPES, types.SimpleNamespace(tensors={}), never)
