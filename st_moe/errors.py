"""Errors that are the user's to fix: one clear line, exit status 2.

Raise `UserError` for a wrong configuration, missing or broken data, a
checkpoint that does not fit. The message names what is wrong, where, and what
to do. `main.py` prints it as `error: ...`; anything else is our bug.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """The user's input is wrong: what, where, and what to do, in one line."""


class RunStopped(Exception):
  """The run stopped itself (too many non-finite steps): exit status 3."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns '; did you mean X?' for the nearest known name, else ''.

  Capitals do not count: `steps` is near `STEPS`.
  """
  names = {k.lower(): k for k in known}
  near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
  return f'; did you mean {names[near[0]]}?' if near else ''
