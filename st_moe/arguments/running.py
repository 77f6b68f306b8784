"""Flags of the commands that prepare text, train and score."""

from typing import Any

from st_moe.arguments.common import (
  Parser,
  add_command,
  add_connection,
  add_step,
)


def add_pretrain(subparsers: Any) -> Parser:
  command = add_command(
    subparsers,
    'pretrain',
    'train on a task; started again in its work directory, go on',
    '--gin_file=gin_configs/runs/quickstart.gin --workdir=runs/quickstart',
  )
  _add_run(command)
  return command


def _add_run(command: Parser) -> None:
  """Adds the flags of the commands that train."""
  command.add_argument(
    '--workdir',
    required=True,
    metavar='DIR',
    help='for checkpoints, metrics and the report',
  )
  command.add_argument(
    '--allow_config_change',
    action='store_true',
    help='go on in a work directory that was started otherwise',
  )
  add_connection(command)


def add_finetune(subparsers: Any) -> Parser:
  command = add_command(
    subparsers,
    'finetune',
    'train a model that is there on a task; its own gin file says what it is',
    '--checkpoint=runs/quickstart '
    '--gin_file=gin_configs/runs/finetune_sparse.gin --gin.TASK=text '
    '--gin.FILES=my_text --workdir=runs/tuned',
  )
  command.add_argument(
    '--checkpoint',
    metavar='DIR',
    help='a run, or a model that `st_moe convert` made; not needed to go on',
  )
  _add_run(command)
  return command


def add_evaluate(subparsers: Any) -> Parser:
  command = add_command(
    subparsers,
    'evaluate',
    'score a checkpoint: on held-out text, its own or other, or on tasks with '
    'answers, each by its metrics (with --gin.TASK macros are those of '
    'gin_configs/runs/evaluate.gin)',
    '--checkpoint=runs/cb --gin.TASK=superglue.cb --gin.TASK_DIR=superglue',
  )
  command.add_argument(
    '--workdir',
    '--checkpoint',
    required=True,
    metavar='DIR',
    help='a run, or a model that `st_moe convert` made',
  )
  add_step(command)
  command.add_argument(
    '--output',
    metavar='DIR',
    help='of tasks: for the answer to every example, and the scores (default: '
    'evaluations/ of the checkpoint)',
  )
  command.add_argument(
    '--submission',
    metavar='DIR',
    help="for SuperGLUE's submission files; answers the test split, unless "
    '--gin.SPLIT says otherwise',
  )
  add_connection(command)
  return command


def add_predict(subparsers: Any) -> Parser:
  command = add_command(
    subparsers,
    'predict',
    'answer text, a line for every line: of a pipe, a file or a prompt',
    "--checkpoint=runs/quickstart --prompt='The <extra_id_0> of a function.'",
  )
  add = command.add_argument
  add(
    '--checkpoint',
    required=True,
    metavar='DIR',
    help='a run, or a model that `st_moe convert` made',
  )
  add_step(command)
  add('--prompt', metavar='TEXT', help='the only input')
  add('--input', metavar='FILE', help='a line each (default: standard input)')
  add('--output', metavar='FILE', help='a line each (default: standard output)')
  add(
    '--max_new_tokens',
    type=int,
    metavar='N',
    help='of an answer at most (default: DataConfig.targets_length)',
  )
  add(
    '--temperature',
    type=float,
    metavar='T',
    help='draw tokens; 0 takes the likeliest (default: 0; with --top_k or '
    '--top_p 1)',
  )
  add('--top_k', type=int, metavar='K', help='draw among the K likeliest')
  add(
    '--top_p',
    type=float,
    metavar='P',
    help='draw among the likeliest that together have this probability',
  )
  add(
    '--num_beams',
    type=int,
    default=1,
    metavar='N',
    help='search with N beams, as transformers does (1)',
  )
  add(
    '--length_penalty',
    type=float,
    metavar='X',
    help='of beams: a text counts log-likelihood / tokens ** X (1.0)',
  )
  add(
    '--early_stopping',
    choices=('false', 'true', 'never'),
    help='of beams: end when no unfinished text is better, as soon as N are '
    'finished, or when none can become better (false)',
  )
  add(
    '--batch_size',
    type=int,
    default=32,
    metavar='N',
    help='lines computed together; changes no answer (32)',
  )
  add_connection(command)
  return command


def add_trace(subparsers: Any) -> Parser:
  command = add_command(
    subparsers,
    'trace',
    'see which tokens go to which expert, as numbers and as coloured text',
    '--checkpoint=runs/quickstart',
  )
  add = command.add_argument
  add(
    '--checkpoint',
    required=True,
    metavar='DIR',
    help='a run, or a model that `st_moe convert` made',
  )
  add_step(command)
  add(
    '--input',
    metavar='FILE',
    help='text, one row a line; spans are masked, but for lines '
    "INPUTS<tab>TARGETS (default: the run's held-out text)",
  )
  add(
    '--output',
    metavar='DIR',
    help='for trace.html, trace.md and trace.json (default: CHECKPOINT/trace)',
  )
  add(
    '--batches',
    type=int,
    metavar='N',
    help='at most (default: RunConfig.eval_batches)',
  )
  add(
    '--rows',
    type=int,
    default=24,
    metavar='N',
    help='shown word by word on the page (24)',
  )
  add(
    '--capacity',
    choices=('eval', 'train', 'none'),
    default='eval',
    help='of experts: as in evaluation (the default), as in training, or '
    'nothing is dropped',
  )
  add_connection(command)
  return command


def add_config(subparsers: Any) -> Parser:
  command = add_command(
    subparsers,
    'config',
    'list gin files, show FILEs resolved into one configuration, or diff two '
    '(an ablation is read on top of the first)',
    'show gin_configs/runs/quickstart.gin --gin.STEPS=60',
  )
  command.add_argument('action', nargs='?', metavar='list|show|diff')
  command.add_argument('files', nargs='*', metavar='FILE', help='gin files')
  return command


def add_vocab(subparsers: Any) -> Parser:
  command = add_command(
    subparsers,
    'vocab',
    'train a T5-compatible SentencePiece model on text',
    'texts/*.txt --size=2000 --output=my.model',
  )
  command.add_argument(
    'files', nargs='*', metavar='FILE', help="text (default: gin's task)"
  )
  command.add_argument(
    '--size', type=int, help='pieces (default: DataConfig.auto_vocabulary_size)'
  )
  command.add_argument('--output', required=True, metavar='FILE')
  return command


def add_cache(subparsers: Any) -> Parser:
  command = add_command(
    subparsers,
    'cache',
    'tokenize text once, for training without TensorFlow',
    'texts/*.txt --vocabulary=my.model --output=cache',
  )
  command.add_argument(
    'files', nargs='*', metavar='FILE', help="text (default: gin's task)"
  )
  command.add_argument(
    '--vocabulary',
    metavar='FILE',
    help="SentencePiece model, 'byte', or 'auto' to train one on the text "
    '(wins over DataConfig.vocabulary)',
  )
  command.add_argument('--output', required=True, metavar='DIR')
  command.add_argument(
    '--num_shards', type=int, help='files of the training text'
  )
  command.add_argument(
    '--shard',
    metavar='I/N',
    help='write every n-th file only, so that n processes share the work',
  )
  return command
