"""T5's text formats: a prefix, fields by name, a label in words.

T5's rule for a task of sentences and a label (`glue` in
t5/data/preprocessors.py) is `PREFIX NAME: TEXT NAME: TEXT`, its fields sorted
by name unless the task lists them.
"""

from collections.abc import Mapping
from typing import Any

from st_moe.data.downstream.example import Example
from st_moe.data.downstream.rows import label_index, texts

UNLABELLED = '<unk>'  # T5's target of a row without a label
BOOLS = ('False', 'True')


def joined(prefix: str, fields: Mapping[str, str]) -> str:
  """Returns 'PREFIX NAME: TEXT NAME: TEXT'."""
  return ' '.join(
    [prefix, *(f'{name}: {text}' for name, text in fields.items())]
  )


def classified(
  inputs: str, choices: tuple[str, ...], label: int | None, **more: Any
) -> Example:
  """Returns an example whose target is one of its choices.

  Args:
    inputs: what the model reads.
    choices: in the order of the labels.
    label: index of the right one; None: not known.
    **more: further fields of the example.
  """
  targets = UNLABELLED if label is None else choices[label]
  return Example(inputs, targets, choices, label, **more)


def fields_and_label(
  row: Mapping[str, Any],
  where: str,
  train: bool,
  *,
  prefix: str,
  fields: Mapping[str, str],
  choices: tuple[str, ...],
) -> list[Example]:
  """Returns the example of a row whose fields are texts.

  Args:
    row: as published.
    where: it stands, for messages.
    train: whether it has to have a label.
    prefix: of the inputs.
    fields: {name in the inputs: name in the row}, in their order.
    choices: in the order of the labels.

  Raises:
    UserError: a field or a label is missing, or is another.
  """
  values = texts(row, fields.values(), where)
  named = dict(zip(fields, values, strict=True))
  label = label_index(row, choices, where, required=train)
  return [classified(joined(prefix, named), choices, label, idx=row.get('idx'))]
