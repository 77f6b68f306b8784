"""Flags of `st_moe plan` and `st_moe bench`."""

from typing import Any

from st_moe.arguments.common import Parser, add_command


def add_plan(subparsers: Any) -> Parser:
  command = add_command(
    subparsers,
    'plan',
    'parameters, FLOPs, memory and collectives of a run on devices that need '
    'not be there, and whether it fits',
    '--gin_file=models/st_moe_32b.gin --gin_file=runs/pretrain.gin '
    '--topology=v5p:8x8x8',
  )
  command.add_argument(
    '--topology',
    required=True,
    metavar='NAME',
    help='v5p:8x8x8, v5p-1024 or another Cloud name, h100x16, cpu:8',
  )
  command.add_argument(
    '--slices', type=int, default=1, help='TPU slices of that shape (1)'
  )
  command.add_argument(
    '--mesh',
    metavar='AXIS=N,...',
    help='data=8,expert=64,model=1 (wins over MeshConfig)',
  )
  command.add_argument(
    '--no_compile', action='store_true', help='from shapes alone, in seconds'
  )
  command.add_argument(
    '--search',
    nargs='?',
    type=int,
    const=6,
    metavar='N',
    help='compile up to N remat policies and meshes and compare them (6)',
  )
  command.add_argument('--json', metavar='FILE', help='every number')
  return command


def _sizes(text: str) -> list[int]:
  """Reads '8,16,64'."""
  sizes = [int(word) for word in text.split(',')]
  if min(sizes) < 1:
    raise ValueError
  return sizes


def _words(text: str) -> list[str]:
  """Reads 'einsum,gather'."""
  return text.split(',')


# argparse names the type in its errors.
_sizes.__name__ = 'list of positive integers'


def _add_layer_sizes(command: Parser) -> None:
  """Adds the flags of the layer that `bench layer` and `bench peers` time."""
  add = command.add_argument
  sizes = {'type': _sizes, 'action': 'extend', 'metavar': 'N[,N...]'}
  add('--tokens', type=int, help='in the batch (default: 2048)')
  add('--d_model', type=int, help='(this and those below: default from gin)')
  add('--d_ff', type=int, help='of one expert')
  add('--experts', **sizes, help='one table for each')
  add('--n', type=int, help='experts per token, the n of top-n')
  add('--capacity_factor', type=float, help='slots: S x factor / experts')
  add('--group_size', **sizes, help='tokens per group (S); one table for each')
  add('--dtype', choices=('float32', 'bfloat16'), help='of the arithmetic')
  add(
    '--activation',
    choices=('geglu', 'reglu', 'swiglu', 'gelu', 'relu', 'silu'),
    help='of the experts; the first three are gated',
  )
  add(
    '--rounds', type=int, default=10, help='in which each form runs once (10)'
  )


def add_bench(subparsers: Any) -> dict[str, Parser]:
  """Adds `bench` and its kinds; returns the parser of each by its words."""
  bench = subparsers.add_parser(
    'bench',
    help='measure the sparse layer, the whole step, generation, or other '
    'implementations',
    description='Time against floors, in turns; `st_moe bench KIND --help`.',
    epilog='Example: st_moe bench layer --experts=8,64',
    allow_abbrev=False,
  )
  kinds = bench.add_subparsers(
    metavar='layer|step|generate|peers', required=True
  )
  layer = add_command(
    kinds,
    'layer',
    'the sparse layer with each backend, against a dense FFN and bare matmuls',
    '',
  )
  layer.epilog = 'Example: st_moe bench layer --experts=8,64 --group_size=1024'
  layer.add_argument(
    '--backends',
    type=_words,
    action='extend',
    metavar='NAME[,NAME...]',
    help='ways to dispatch (default: all)',
  )
  step = add_command(kinds, 'step', 'the training step of a configuration', '')
  step.epilog = 'Example: st_moe bench step --gin_file=runs/quickstart.gin'
  step.add_argument('--rounds', type=int, default=10, help='steps timed (10)')
  step.add_argument(
    '--compare',
    nargs='+',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help='time it with these settings too, in turns with the step as given; '
    'may be repeated, one more step each',
  )
  generate = add_command(
    kinds, 'generate', 'generation with the model of a configuration', ''
  )
  generate.epilog = (
    'Example: st_moe bench generate --gin_file=runs/quickstart.gin '
    '--batch_size=1,32'
  )
  numbers = {'type': _sizes, 'action': 'extend', 'metavar': 'N[,N...]'}
  generate.add_argument(
    '--batch_size', **numbers, help='inputs at a time (default: 1,8,32)'
  )
  generate.add_argument(
    '--num_beams', **numbers, help='1 is greedy (default: 1,4)'
  )
  generate.add_argument(
    '--rounds', type=int, default=5, help='in which each runs once (5)'
  )
  peers = add_command(
    kinds, 'peers', 'other implementations of the layer, in turns with ours', ''
  )
  peers.epilog = 'Example: st_moe bench peers --experts=16 --group_size=1024'
  for command in (layer, peers):
    _add_layer_sizes(command)
  by_kind = {
    'layer': layer,
    'step': step,
    'generate': generate,
    'peers': peers,
  }
  for kind, command in by_kind.items():
    command.set_defaults(command='bench', kind=kind)
    command.add_argument(
      '--output', metavar='DIR', help=f'(default: runs/bench/{kind})'
    )
  return {'bench': bench} | {f'bench {k}': c for k, c in by_kind.items()}
