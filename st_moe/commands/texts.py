"""Commands on text: `st_moe vocab` and `st_moe cache`."""

import argparse
from pathlib import Path

from st_moe.bindings import Binding
from st_moe.commands import starting
from st_moe.config import DataConfig


def _data_config(args: argparse.Namespace) -> DataConfig:
  """Returns what to read: text files named on the command line, or gin's."""
  flags = []
  if args.files:
    flags.append(Binding('DataConfig.task', 'text', 'FILE'))
    flags.append(Binding('DataConfig.files', tuple(args.files), 'FILE'))
  if getattr(args, 'vocabulary', None) is not None:
    flags.append(
      Binding('DataConfig.vocabulary', args.vocabulary, '--vocabulary')
    )
  config = starting.configure(args, args.gin_file, flags).data
  starting.prepare(args)
  return config


def vocab(args: argparse.Namespace) -> None:
  """Trains a vocabulary."""
  config = _data_config(args)
  size = config.auto_vocabulary_size if args.size is None else args.size
  from st_moe.data.commands import vocab_command

  vocab_command(config, Path(args.output), size)


def cache(args: argparse.Namespace) -> None:
  """Tokenizes text once for all runs."""
  config = _data_config(args)
  from st_moe.data.commands import cache_command

  shards = {} if args.num_shards is None else {'num_shards': args.num_shards}
  cache_command(config, Path(args.output), shard=args.shard, **shards)
