"""Flags of `st_moe study`."""

from typing import Any

from st_moe.arguments.common import Parser, add_command


def add_study(subparsers: Any) -> Parser:
  command = add_command(
    subparsers,
    'study',
    'a table or figure of the paper as a grid of runs, and a report with its '
    'numbers beside the paper; `study list` names all, `study report DIR` '
    'writes the report of what is there',
    'cf_top_n --scale=tiny --seeds=3 --workdir=runs/cf_top_n',
  )
  add = command.add_argument
  add('name', metavar='NAME|list|report', help='a study, or what to do')
  add('directory', nargs='?', metavar='DIR', help='of `study report`')
  add('--scale', default='tiny', help='tiny, small, l, xl or 32b (tiny)')
  add('--seeds', type=int, default=3, metavar='N', help='0 to N - 1 (3)')
  add(
    '--checkpoint',
    metavar='DIR',
    help='what arms of a fine-tuning study begin with: a run, or a model that '
    '`st_moe convert` made; --gin.TASK and --gin.TASK_DIR say on what',
  )
  add('--dense_checkpoint', metavar='DIR', help='the same of its dense arms')
  add('--workdir', metavar='DIR', help='for runs, results and the report')
  add(
    '--arm',
    action='append',
    default=[],
    metavar='NAME',
    help='only this one; may be repeated',
  )
  add('--shard', metavar='I/N', help='every N-th run, from run I on; 0/N first')
  add('--dry_run', action='store_true', help='print the grid and what it costs')
  add(
    '--topology',
    metavar='NAME',
    help='of --dry_run: v5p:8x8x8, h100x8, ... (default: this machine)',
  )
  return command
