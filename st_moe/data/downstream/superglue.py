"""SuperGLUE as text to text: T5's formats (t5/data/preprocessors.py).

Fields stand in the order of T5's tasks: sorted by name, unless the task lists
them (WiC and MultiRC do). Labels are in the order of tfds. The diagnostic sets
AX-b and AX-g have RTE's format (t5/data/glue_utils.py), so that a model of RTE
answers them; they are not trained on. WSC is in pronouns.py.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from st_moe.data.downstream import answers, metrics, pronouns
from st_moe.data.downstream.example import AnswerTask, Example, Prepared
from st_moe.data.downstream.formats import (
  BOOLS,
  UNLABELLED,
  classified,
  fields_and_label,
  joined,
)
from st_moe.data.downstream.published import Files
from st_moe.data.downstream.rows import label_index, wrong_row

_ENTAILMENT = ('entailment', 'not_entailment')


def _multirc(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  """One example for each answer to each question of a passage."""
  examples = []
  try:
    passage, index = row['passage'], row.get('idx')
    paragraph = _without_markup(passage['text'])
    for number, question in enumerate(passage['questions']):
      group = _group(where, index, question.get('idx'), number)
      for answer in question['answers']:
        inputs = {
          'question': _without_markup(question['question']),
          'answer': _without_markup(answer['text']),
          'paragraph': paragraph,
        }
        label = label_index(answer, BOOLS, where, required=train)
        idx = {
          'paragraph': index,
          'question': question.get('idx'),
          'answer': answer.get('idx'),
        }
        examples.append(
          classified(
            joined('multirc', inputs),
            BOOLS,
            label,
            idx=idx,
            group=group,
          )
        )
  except (AttributeError, KeyError, TypeError):
    raise wrong_row(
      where, 'passage.text, questions[].question and answers[].text'
    ) from None
  return examples


def _without_markup(text: str) -> str:
  return text.replace('<br>', ' ').replace('<b>', '').replace('</b>', '')


def _record(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  """One example for each query; in training one for each of its answers."""
  examples = []
  try:
    text = row['passage']['text']
    spans = row['passage']['entities']
    entities = tuple(sorted({_entity(text, span) for span in spans}))
    passage = re.sub(r'(\.|\?|\!|\"|\')\n@highlight\n', r'\1 ', text)
    passage = re.sub(r'\n@highlight\n', '. ', passage)
    for number, question in enumerate(row['qas']):
      found = question.get('answers', ())
      right = tuple(sorted({answer['text'] for answer in found}))
      if train and not right:
        raise wrong_row(where, "'answers', which training needs")
      inputs = joined(
        'record',
        {
          'query': question['query'],
          'entities': ', '.join(entities),
          'passage': passage,
        },
      )
      for target in (right if train else right[:1]) or (UNLABELLED,):
        idx = {'passage': row.get('idx'), 'query': question.get('idx')}
        examples.append(
          Example(
            inputs,
            target,
            entities,
            answers=right,
            idx=idx,
            group=_group(where, row.get('idx'), question.get('idx'), number),
          )
        )
  except (AttributeError, KeyError, TypeError):
    raise wrong_row(
      where, 'passage.text and entities, qas[].query and answers'
    ) from None
  return examples


def _entity(text: str, span: Mapping[str, Any] | str) -> str:
  """Returns what a span, its end included, covers; tfds has the text."""
  if isinstance(span, str):
    return span
  return text[span['start'] : span['end'] + 1]


def _group(where: str, passage: Any, question: Any, number: int) -> str:
  """Names a question or query: by its published numbers, or its place."""
  if passage is None or question is None:
    return f'{_place(where)}#{number}'
  return f'{passage}-{question}'


def _place(where: str) -> str:
  """Returns file and line, which are the same in any folder."""
  return where.rpartition('/')[2]


def _multirc_from_tfds(row: Mapping[str, Any]) -> dict[str, Any]:
  """One row for each answer there."""
  answer = {
    'text': row['answer'],
    'label': row['label'],
    'idx': row['idx']['answer'],
  }
  question = {
    'question': row['question'],
    'idx': row['idx']['question'],
    'answers': [answer],
  }
  passage = {'text': row['paragraph'], 'questions': [question]}
  return {'idx': row['idx']['paragraph'], 'passage': passage}


def _record_from_tfds(row: Mapping[str, Any]) -> dict[str, Any]:
  """One row for each query there, with the texts of its entities."""
  query = {
    'query': row['query'],
    'idx': row['idx']['query'],
    'answers': [{'text': text} for text in row['answers']],
  }
  passage = {'text': row['passage'], 'entities': row['entities']}
  return {'idx': row['idx']['passage'], 'passage': passage, 'qas': [query]}


def _winogender(
  row: Mapping[str, Any], where: str, train: bool
) -> list[Example]:
  """RTE's format; two rows of a pair differ in the gender of a pronoun."""
  (example,) = _entailment(row, where, train)
  pair = str(row.get('pair_id', _place(where)))
  return [dataclasses.replace(example, group=pair)]


_entailment = functools.partial(
  fields_and_label,
  prefix='rte',
  fields={'hypothesis': 'hypothesis', 'premise': 'premise'},
  choices=_ENTAILMENT,
)


def _task(
  name: str,
  folder: str,
  fields: str,
  choices: tuple[str, ...],
  score: Callable[..., metrics.Scores] = metrics.accuracy,
) -> AnswerTask:
  """Returns a task whose rows are texts.

  Args:
    name: 'cb', also the prefix of its inputs.
    folder: of its files.
    fields: in the inputs and in its rows, in the order of the inputs.
    choices: in the order of the labels.
    score: its metrics.
  """
  examples = functools.partial(
    fields_and_label,
    prefix=name,
    fields={field: field for field in fields.split()},
    choices=choices,
  )
  return AnswerTask(
    f'superglue.{name}',
    Files((folder,)),
    Prepared(f'super_glue/{name}'),
    examples,
    answers.choice,
    score,
  )


def _diagnostic(name: str) -> Files:
  """The one file of a diagnostic set: no part of it is trained on."""
  file = (f'{name}.jsonl', 'test.jsonl')
  return Files((name,), {'validation': file, 'test': file})


TASKS = (
  _task('boolq', 'BoolQ', 'passage question', BOOLS),
  _task(
    'cb',
    'CB',
    'hypothesis premise',
    ('entailment', 'contradiction', 'neutral'),
    metrics.cb,
  ),
  _task(
    'copa',
    'COPA',
    'choice1 choice2 premise question',
    ('choice1', 'choice2'),
  ),
  AnswerTask(
    'superglue.multirc',
    Files(('MultiRC',)),
    Prepared('super_glue/multirc', row=_multirc_from_tfds),
    _multirc,
    answers.choice,
    metrics.multirc,
  ),
  AnswerTask(
    'superglue.record',
    Files(('ReCoRD',)),
    Prepared('super_glue/record', row=_record_from_tfds),
    _record,
    answers.free_text,
    metrics.record,
  ),
  _task('rte', 'RTE', 'hypothesis premise', _ENTAILMENT),
  _task('wic', 'WiC', 'sentence1 sentence2 word', BOOLS),
  pronouns.WSC,
)

DIAGNOSTICS = (
  AnswerTask(
    'superglue.axb',
    _diagnostic('AX-b'),
    Prepared('super_glue/axb', {'validation': 'test'}),
    functools.partial(
      fields_and_label,
      prefix='rte',
      fields={'hypothesis': 'sentence2', 'premise': 'sentence1'},
      choices=_ENTAILMENT,
    ),
    answers.choice,
    metrics.matthews,
  ),
  AnswerTask(
    'superglue.axg',
    _diagnostic('AX-g'),
    Prepared('super_glue/axg', {'validation': 'test'}),
    _winogender,
    answers.choice,
    metrics.gender_parity,
    ('accuracy',),  # one answer to everything has a parity of 100
  ),
)
