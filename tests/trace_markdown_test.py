"""trace.md and the table in the terminal: pieces, marks, what has room."""

import pytest

from st_moe.trace import writing


@pytest.mark.parametrize(
  ('piece', 'expected'),
  [
    ('▁or', '`or`'),
    ('or', '`…or`'),
    (',', '`,`'),
    ('▁(', '`␣(`'),
    ('▁', '`␣`'),
    ('▁12', '`12`'),
    ('é', '`…é`'),
    ('<extra_id_0>', '`<extra_id_0>`'),
    ('▁<extra_id_0>', '`<extra_id_0>`'),
    ('`', '`` ` ``'),
    ('▁``', '``` ␣`` ```'),
    ('|', '`|`'),
  ],
)
def test_pieces_in_markdown_are_marked_and_printed_truly(piece, expected):
  assert writing._code(piece) == expected


def test_a_bar_does_not_end_its_cell():
  table = writing._table(('a', 'b'), [('`|`', '1')])
  assert table.splitlines()[-1] == '| `\\|` | 1 |'


@pytest.mark.parametrize(
  ('room', 'expected'),
  [
    (40, '0: name, 1: verb, 3: sentinel'),
    (28, '0: name, 1: verb and 1 more'),
    (20, '0: name and 2 more'),
    (10, '3 experts'),
  ],
)
def test_what_has_no_room_is_counted(room, expected):
  names = ['0: name', '1: verb', '3: sentinel']
  assert writing._as_many_as_fit(names, room) == expected
  assert writing._as_many_as_fit([], room) == 'none'
