"""Rows of published files: what is in them, or one line about what is not."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from st_moe.errors import UserError


def wrong_row(where: str, wanted: str) -> UserError:
  """Returns the error of a row that has not what it should have."""
  return UserError(f'{where}: the row has no {wanted}; is it the right file?')


def texts(
  row: Mapping[str, Any], names: Iterable[str], where: str
) -> list[str]:
  """Returns the texts of some fields.

  Raises:
    UserError: one is missing, or is no text.
  """
  found = []
  for name in names:
    if not isinstance(row.get(name), str):
      raise wrong_row(where, f'text {name!r}')
    found.append(row[name])
  return found


def label_index(
  row: Mapping[str, Any], choices: Sequence[str], where: str, *, required: bool
) -> int | None:
  """Returns which choice a row's 'label' is; None: it has none.

  None are an empty text too, and -1, tfds' own.

  Args:
    row: its label is one of `choices`, an index, or a bool.
    choices: in the order of the labels.
    where: the row stands, for messages.
    required: whether it is an error to have none.

  Raises:
    UserError: no label, or one that is none of `choices`.
  """
  label = row.get('label')
  if label is None or label == '' or label == -1:
    if required:
      raise wrong_row(where, "'label', which training needs")
    return None
  if isinstance(label, str) and label in choices:
    return choices.index(label)
  if isinstance(label, int) and 0 <= label < len(choices):
    return int(label)
  raise UserError(f'{where}: label {label!r} is none of {", ".join(choices)}')
