"""Inference and choices beyond GLUE: ANLI, WinoGrande, ARC (paper, Table 10).

T5 has no formats for them, and the paper prints none. These follow T5's rule
for tasks of sentences and a label, in the words of its closest task: ANLI in
those of MNLI (hypothesis, premise), WinoGrande and ARC in those of COPA, whose
answers are names of fields (`choice1`). The prefix of ARC is the same for both
of its sets.
"""

from collections.abc import Mapping
from typing import Any

from st_moe.data.downstream import answers, metrics
from st_moe.data.downstream.example import AnswerTask, Example, Prepared
from st_moe.data.downstream.formats import (
  classified,
  fields_and_label,
  joined,
)
from st_moe.data.downstream.published import Files
from st_moe.data.downstream.rows import label_index, wrong_row

_NLI = ('entailment', 'neutral', 'contradiction')
_LETTERS = {'e': 0, 'n': 1, 'c': 2}  # ANLI's labels
_KEYS = 'ABCDE'  # of ARC's choices


def _anli(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  label = row.get('label')
  if isinstance(label, str):
    label = _LETTERS.get(label, label)
  return fields_and_label(
    {**row, 'label': label, 'idx': row.get('uid')},
    where,
    train,
    prefix='anli',
    fields={'hypothesis': 'hypothesis', 'premise': 'context'},
    choices=_NLI,
  )


def _winogrande(
  row: Mapping[str, Any], where: str, train: bool
) -> list[Example]:
  """Which option stands for the `_` of the sentence."""
  answer = row.get('answer')
  label = label_index(
    {'label': None if answer is None else str(answer)},
    ('1', '2'),
    where,
    required=train,
  )
  return fields_and_label(
    {**row, 'label': label, 'idx': row.get('qID')},
    where,
    train,
    prefix='winogrande',
    fields={name: name for name in ('option1', 'option2', 'sentence')},
    choices=('option1', 'option2'),
  )


def _arc(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  """Three to five choices; the published keys are letters, or digits."""
  try:
    stem, found = row['question']['stem'], row['question']['choices']
    options = [choice['text'] for choice in found]
    keys = [choice['label'] for choice in found]
    if not (isinstance(stem, str) and all(isinstance(o, str) for o in options)):
      raise TypeError
  except (KeyError, TypeError):
    raise wrong_row(where, 'question.stem and choices[].text, label') from None
  label = label_index(
    {'label': row.get('answerKey')}, keys, where, required=train
  )
  choices = tuple(f'choice{i}' for i, _ in enumerate(options, 1))
  fields = dict(zip(choices, options, strict=True)) | {'question': stem}
  return [classified(joined('arc', fields), choices, label, idx=row.get('id'))]


def _arc_from_tfds(row: Mapping[str, Any]) -> dict[str, Any]:
  choices = [
    {'text': text, 'label': _KEYS[key]}
    for text, key in zip(
      row['choices']['text'], row['choices']['label'], strict=True
    )
  ]
  return {
    'id': row['id'],
    'question': {'stem': row['question'], 'choices': choices},
    'answerKey': _KEYS[row['answerKey']],
  }


def _winogrande_from_tfds(row: Mapping[str, Any]) -> dict[str, Any]:
  label = row['label']
  return {**row, 'answer': '' if label == -1 else str(label + 1)}


def _arc_task(name: str, folder: str) -> AnswerTask:
  names = {
    split: (f'{folder}-{published}.jsonl', f'{other}.jsonl')
    for split, published, other in (
      ('train', 'Train', 'train'),
      ('validation', 'Dev', 'dev'),
      ('test', 'Test', 'test'),
    )
  }
  folders = (f'ARC-V1-Feb2018-2/{folder}', folder)
  return AnswerTask(
    f'arc.{name}',
    Files(folders, names),
    Prepared(f'ai2_arc/{folder}', row=_arc_from_tfds),
    _arc,
    answers.choice,
    metrics.accuracy,
  )


ANLI = tuple(
  AnswerTask(
    f'anli.r{number}',
    Files((f'anli_v1.0/R{number}', f'R{number}')),
    Prepared(f'anli/r{number}'),
    _anli,
    answers.choice,
    metrics.accuracy,
  )
  for number in (1, 2, 3)
)

ARC = (_arc_task('easy', 'ARC-Easy'), _arc_task('challenge', 'ARC-Challenge'))

WINOGRANDE = AnswerTask(
  'winogrande_xl',
  Files(
    ('winogrande_1.1', 'winogrande'),
    {
      'train': ('train_xl.jsonl',),
      'validation': ('dev.jsonl',),
      'test': ('test.jsonl',),
    },
  ),
  Prepared('winogrande', {'train': 'train_xl'}, _winogrande_from_tfds),
  _winogrande,
  answers.choice,
  metrics.accuracy,
)
