"""GLUE as text to text: T5's formats (t5/data/preprocessors.py, glue_utils.py).

The files are those of gluebenchmark.com, tables with tabs. Training data of
MNLI belongs to `glue.mnli_matched`; `glue.mnli_mismatched` is its other
development set, as in T5. MRPC is read from the table that GLUE's script
makes, or from Microsoft's own files and the script's `mrpc_dev_ids.tsv`.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from st_moe.data.downstream import answers, metrics
from st_moe.data.downstream.example import AnswerTask, Example, Prepared
from st_moe.data.downstream.formats import (
  UNLABELLED,
  fields_and_label,
  joined,
)
from st_moe.data.downstream.published import Files, Rows, lines, table
from st_moe.data.downstream.rows import texts, wrong_row
from st_moe.errors import UserError

_NLI = ('entailment', 'neutral', 'contradiction')
_ENTAILMENT = ('entailment', 'not_entailment')
_TABLES = {
  'train': ('train.tsv',),
  'validation': ('dev.tsv',),
  'test': ('test.tsv',),
}
_STEPS = 5  # T5 writes STS-B's scores in fifths


def _cola_rows(path: Path, split: str) -> Rows:
  """Train and dev have no header; test has an index and the sentence."""
  columns = {'sentence': 'sentence', 'label': 'label'}
  names = None if split == 'test' else ('source', 'label', 'author', 'sentence')
  return table(path, split, columns=columns, header=names)


def _mrpc_rows(path: Path, split: str) -> Rows:
  """Of Microsoft's training file, dev rows are those with listed numbers."""
  columns = {
    'sentence1': '#1 String',
    'sentence2': '#2 String',
    'label': 'Quality',
    'first': '#1 ID',
    'second': '#2 ID',
  }
  if split == 'test':
    del columns['label']  # as in GLUE, whose server has the labels
  rows = table(path, split, columns=columns)
  if not path.name.startswith('msr_') or split == 'test':
    return rows
  ids = path.with_name('mrpc_dev_ids.tsv')
  if not ids.is_file():
    raise UserError(
      f"{ids} is not there: it says which rows of {path.name} are GLUE's "
      'development set'
    )
  held_out = {tuple(line.split('\t')[:2]) for _, line in lines(ids)}
  return (
    (where, row)
    for where, row in rows
    if ((row['first'], row['second']) in held_out) == (split == 'validation')
  )


def _stsb(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  """The target is the score, rounded to fifths in float32, as T5 rounds it.

  What is scored is the correlation with the scores as published; T5 takes the
  rounded ones.
  """
  first, second = texts(row, ('sentence1', 'sentence2'), where)
  inputs = joined('stsb', {'sentence1': first, 'sentence2': second})
  label = row.get('label')
  idx = row.get('idx')
  if label in (None, '', -1):
    if train:
      raise wrong_row(where, "'score', which training needs")
    return [Example(inputs, UNLABELLED, idx=idx)]
  try:
    score = np.float32(label)
  except (TypeError, ValueError):
    raise UserError(f'{where}: score {label!r} is no number') from None
  rounded = np.round(score * np.float32(_STEPS)) / np.float32(_STEPS)
  return [Example(inputs, f'{rounded:.1f}', answers=(str(score),), idx=idx)]


def _task(
  name: str,
  folder: str,
  fields: str,
  choices: tuple[str, ...],
  *,
  score: Callable[..., metrics.Scores] = metrics.accuracy,
  prefix: str | None = None,
  files: Files | None = None,
  label: str = 'label',
  skip_short: bool = False,
  **columns: str,
) -> AnswerTask:
  """Returns a task whose rows are texts and a label.

  Args:
    name: 'cola'.
    folder: of its files.
    fields: in the inputs, and tfds', in the order of the inputs.
    choices: in the order of the labels.
    score: its metrics.
    prefix: of its inputs; None: its name.
    files: None: train.tsv, dev.tsv and test.tsv in the folder.
    label: column of the label.
    skip_short: see `table`.
    **columns: of the fields that the tables call otherwise.
  """
  named = {field: columns.get(field, field) for field in fields.split()}
  rows = functools.partial(
    table, columns=named | {'label': label}, skip_short=skip_short
  )
  examples = functools.partial(
    fields_and_label,
    prefix=prefix or name,
    fields={field: field for field in named},
    choices=choices,
  )
  return AnswerTask(
    f'glue.{name}',
    files or Files((folder,), _TABLES, rows),
    Prepared(f'glue/{name}'),
    examples,
    answers.choice,
    score,
  )


def _mnli(kind: str, **train: tuple[str, ...]) -> AnswerTask:
  columns = {
    'premise': 'sentence1',
    'hypothesis': 'sentence2',
    'label': 'gold_label',
  }
  names = {
    'validation': (f'dev_{kind}.tsv',),
    'test': (f'test_{kind}.tsv',),
  }
  return AnswerTask(
    f'glue.mnli_{kind}',
    Files(('MNLI',), train | names, functools.partial(table, columns=columns)),
    Prepared(
      'glue/mnli', {'validation': f'validation_{kind}', 'test': f'test_{kind}'}
    ),
    functools.partial(
      fields_and_label,
      prefix='mnli',
      fields={'hypothesis': 'hypothesis', 'premise': 'premise'},
      choices=_NLI,
    ),
    answers.choice,
    metrics.accuracy,
  )


TASKS = (
  _task(
    'cola',
    'CoLA',
    'sentence',
    ('unacceptable', 'acceptable'),
    score=metrics.matthews,
    files=Files(('CoLA',), _TABLES, _cola_rows),
  ),
  _task('sst2', 'SST-2', 'sentence', ('negative', 'positive')),
  _task(
    'mrpc',
    'MRPC',
    'sentence1 sentence2',
    ('not_equivalent', 'equivalent'),
    score=metrics.f1_and_accuracy,
    files=Files(
      ('MRPC',),
      {
        'train': ('train.tsv', 'msr_paraphrase_train.txt'),
        'validation': ('dev.tsv', 'msr_paraphrase_train.txt'),
        'test': ('test.tsv', 'msr_paraphrase_test.txt'),
      },
      _mrpc_rows,
    ),
  ),
  AnswerTask(
    'glue.stsb',
    Files(
      ('STS-B',),
      _TABLES,
      functools.partial(
        table,
        columns={
          'sentence1': 'sentence1',
          'sentence2': 'sentence2',
          'label': 'score',
        },
      ),
    ),
    Prepared('glue/stsb'),
    _stsb,
    answers.free_text,
    metrics.pearson_spearman,
  ),
  _task(
    'qqp',
    'QQP',
    'question1 question2',
    ('not_duplicate', 'duplicate'),
    score=metrics.f1_and_accuracy,
    label='is_duplicate',
    skip_short=True,  # the published table has some, which tfds leaves out
  ),
  _mnli('matched', train=('train.tsv',)),
  _mnli('mismatched'),
  _task('qnli', 'QNLI', 'question sentence', _ENTAILMENT),
  _task('rte', 'RTE', 'sentence1 sentence2', _ENTAILMENT),
  _task('wnli', 'WNLI', 'sentence1 sentence2', _ENTAILMENT[::-1]),
)
