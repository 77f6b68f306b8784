"""The command line: `st_moe COMMAND`, and how errors end.

Progress goes to standard output, warnings and errors to standard error.

Exit status: 0 done; 2 the user's input is wrong; 3 the run stopped itself;
130 interrupted; anything else is our bug.
"""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence

from st_moe import arguments, processes
from st_moe.commands import COMMANDS
from st_moe.commands.starting import program
from st_moe.errors import RunStopped, UserError
from st_moe.gin_files import parse_flag

# What is not in the core installation, and the extra of setup.py that has it.
_EXTRAS = {
  'seqio': 'data',
  'tensorflow': 'data',
  'tensorflow_datasets': 'data',
  'tensorflow_text': 'data',
}


def _print_error(error: UserError) -> int:
  """Prints the one line of an error, on every process of a job."""
  text = processes.end_together(error)
  print(f'error: {" ".join(text.split())}', file=sys.stderr)
  return 2


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  args = None
  try:
    args = arguments.parse(argv)
    args.argv, args.resolver = argv, None
    args.gin_bindings = [parse_flag(text) for text in args.gin_bindings]
    COMMANDS[args.command](args)
    sys.stdout.flush()
    return 0
  except UserError as e:
    if '--debug' in argv:
      traceback.print_exc()
    agreed = isinstance(e, processes.AgreedError)
    if args is not None and args.resolver is not None and not agreed:
      e = args.resolver.located(e)
    return _print_error(e)
  except ModuleNotFoundError as e:
    if e.name not in _EXTRAS:
      raise
    return _print_error(
      UserError(
        f"{e.name} is not installed; pip install -e '.[{_EXTRAS[e.name]}]' -c "
        'constraints.txt in the checkout, or train from a cache made elsewhere'
      )
    )
  except RunStopped as e:
    print(f'stopped: {e}', file=sys.stderr)
    return 3
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    processes.abandon()
    return 130
  except BrokenPipeError:  # `st_moe config show ... | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    processes.abandon()
    return 0


# glibc returns every block above 32 MiB to the kernel and pays for fresh pages
# at the next step. Keeping them makes an MoE step on CPU about a fifth faster;
# huge pages a little more. glibc reads these when a process starts.
_HEAP = {
  'MALLOC_MMAP_THRESHOLD_': str(4 << 30),
  'MALLOC_TRIM_THRESHOLD_': str(16 << 30),
  'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
}

# A conversion handles arrays one at a time: each goes back to the kernel when
# it is done with, so that the largest is the measure of its memory.
_LEAN_HEAP = {'MALLOC_MMAP_THRESHOLD_': str(1 << 20), 'MALLOC_ARENA_MAX': '2'}


def _stop_at_once(number, frame) -> None:
  """On SIGTERM outside the training loop, where nothing is to be saved.

  The loop has its own handler. An exception would not do: it may be raised
  inside a library's callback, and is lost there.
  """
  print('SIGTERM: nothing had to be saved; start it again with:')
  print(f'  {shlex.join([*program(), *sys.argv[1:]])}', flush=True)
  os._exit(0)


def run() -> None:
  """The console script: sets the process up for computing, then `main`."""
  command, helps = sys.argv[1:2], '--help' in sys.argv
  trains = command in (['pretrain'], ['finetune'], ['study'])
  if trains and not helps:
    signal.signal(signal.SIGTERM, _stop_at_once)
  computes = trains or command == ['bench']
  on_cpu = os.environ.get('JAX_PLATFORMS', 'cpu') == 'cpu'
  heap = _LEAN_HEAP if command == ['convert'] else {}
  heap = _HEAP if computes and on_cpu else heap
  if sys.platform == 'linux' and heap and not helps:
    unset = {k: v for k, v in heap.items() if k not in os.environ}
    if 'MALLOC_MMAP_THRESHOLD_' in unset:
      # The same process again: same id, same arguments.
      os.execve(sys.executable, sys.orig_argv, os.environ | unset)
  processes.run_and_leave(main)
