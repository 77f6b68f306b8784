"""Flags of `st_moe convert`."""

from typing import Any

from st_moe.arguments.common import Parser, add_command, add_step

# Kinds of `convert` whose gin flags change the model that is converted.
CHANGE_A_MODEL = ('upcycle', 'experts')


def add_convert(subparsers: Any) -> dict[str, Parser]:
  """Adds `convert` and its kinds; returns the parser of each by its words."""
  convert = subparsers.add_parser(
    'convert',
    help='bring weights in and out, or make a sparse model of a dense one',
    description='Weights in and out; `st_moe convert KIND --help`.',
    epilog='Example: st_moe convert from-hf t5-v1_1-base models/t5_base',
    allow_abbrev=False,
  )
  texts = {
    'from-hf': 'T5 v1.1, FLAN-T5, mT5, T5 or Switch Transformers of Hugging '
    'Face, from safetensors',
    'to-hf': 'a model of ours as safetensors, for transformers where it has '
    'the class',
    'from-t5x': 'a T5X checkpoint, dense T5 1.1 or a mixture of experts',
    'upcycle': 'a sparse model of a dense one: experts are copies of its FFNs',
    'experts': 'a sparse model with more experts, fewer, or merged ones',
  }
  kinds = convert.add_subparsers(metavar='|'.join(texts), required=True)
  commands = {}
  for kind, text in texts.items():
    command = add_command(kinds, kind, text, '')
    command.epilog = f'Example: st_moe convert {kind} DIR models/mine'
    command.set_defaults(command='convert', kind=kind)
    command.add_argument('source', metavar='DIR', help='to read')
    command.add_argument('output', metavar='OUT', help='to make')
    commands[f'convert {kind}'] = command
  _add_upcycle(commands['convert upcycle'])
  _add_experts(commands['convert experts'])
  _add_hugging_face(commands['convert from-hf'], commands['convert to-hf'])
  _add_from_t5x(commands['convert from-t5x'])
  return {'convert': convert} | commands


def _add_changes(command: Parser) -> None:
  """Adds the flags of the kinds that make a model of ours of another."""
  add = command.add_argument
  add_step(command)
  add(
    '--noise',
    type=float,
    default=0.0,
    metavar='STDDEV',
    help="normal noise on copied experts, in units of each kernel's RMS (0)",
  )
  add(
    '--no_check',
    action='store_true',
    help='do not run the fixed batch, for which both models are in memory',
  )


def _add_upcycle(command: Parser) -> None:
  command.epilog = (
    'Example: st_moe convert upcycle runs/dense models/sparse '
    '--gin.ModelConfig.num_experts=8 --gin.ModelConfig.sparse_every=2'
  )
  command.add_argument(
    '--optimizer',
    choices=('fresh', 'carried'),
    default='fresh',
    help="whether the state of the dense run's optimizer goes along (fresh)",
  )
  _add_changes(command)


def _add_experts(command: Parser) -> None:
  command.epilog = (
    'Example: st_moe convert experts runs/sparse models/merged '
    '--experts=0+1,2+3,4+5,6+7'
  )
  command.add_argument(
    '--experts',
    metavar='SPEC',
    help="the new experts by the old: '0,2,5' keeps three, '0+1,2+3' merges "
    "pairs, '0,0,1,1' copies; or a JSON file, {'encoder/1': SPEC, ...}",
  )
  command.add_argument(
    '--num_experts', type=int, metavar='N', help='all copied, or N kept'
  )
  command.add_argument(
    '--by',
    choices=('load',),
    help="load in the run's metrics.jsonl: which to keep, how to weigh merged",
  )
  _add_changes(command)


def _add_import(command: Parser) -> None:
  """Adds the flags of the kinds that bring a model in."""
  command.add_argument(
    '--mesh',
    metavar='AXIS=N,...',
    help='data=2,expert=4: read and write in parts, on these devices',
  )
  command.add_argument(
    '--no_check',
    action='store_true',
    help='do not run the fixed batch (a model larger than this machine)',
  )


def _add_hugging_face(importer: Parser, exporter: Parser) -> None:
  """Adds the flags of `convert from-hf` and `convert to-hf`."""
  importer.epilog = (
    'Example: st_moe convert from-hf flan-t5-small models/flan_t5_small'
  )
  _add_import(importer)
  exporter.epilog = (
    'Example: st_moe convert to-hf models/flan_t5_small flan-t5-small'
  )
  add_step(exporter)
  exporter.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16', 'float16'),
    help='of the tensors (default: as they were imported, else float32)',
  )
  exporter.add_argument(
    '--max_shard_size',
    default='5GB',
    metavar='SIZE',
    help='of one file, as transformers writes it: 500MB, 5GB (5GB)',
  )


def _add_from_t5x(command: Parser) -> None:
  command.epilog = (
    'Example: st_moe convert from-t5x t5x/checkpoint_1000000 st_moe_base '
    '--preset=st_moe_base'
  )
  add = command.add_argument
  add('--step', type=int, help='of several checkpoints (default: the newest)')
  add(
    '--preset',
    metavar='NAME',
    help='what tensors do not say: t5_1_1, t5_1_0, switch_base, switch_large, '
    'switch_xxl, switch_c, tokens_choose, experts_choose, st_moe_base, '
    'st_moe_xl, st_moe_32b, st_moe_paper (needed where there are experts)',
  )
  add('--vocabulary', metavar='FILE', help='SentencePiece model to copy')
  _add_import(command)
