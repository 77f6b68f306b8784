"""Tables in the terminal and in a pipe: rich does the work."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_WIDTH = 130  # columns, where the output is no terminal


def print_table(
  console: Console,
  title: str,
  columns: Sequence[str],
  rows: Sequence[Sequence[str]],
) -> None:
  """Prints a table; the first column is text, the others are numbers.

  Args:
    console: of the command.
    title: above the table.
    columns: their names.
    rows: as many texts as columns, each.
  """
  # A pipe has no lines of 80 columns; brackets are text.
  console.print(title, markup=False, soft_wrap=True)
  table = Table(box=None, pad_edge=False)
  for index, column in enumerate(columns):
    table.add_column(column, justify='right' if index else 'left', no_wrap=True)
  for row in rows:
    table.add_row(*row)
  wide = Console(
    file=console.file,
    highlight=False,
    width=None if console.is_terminal else _WIDTH,
  )
  wide.print(table)
  console.print('')
