"""SuperGLUE as text to text: T5's formats (t5/data/preprocessors.py).

Fields stand in the order of T5's tasks: sorted by name, unless the task lists
them (WiC and MultiRC do). Labels are in the order of tfds.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from st_moe.data.downstream import answers, metrics
from st_moe.data.downstream.example import AnswerTask, Example
from st_moe.data.downstream.rows import label_index, texts, wrong_row

UNLABELLED = '<unk>'  # T5's target of a row without a label
_BOOLS = ('False', 'True')


def _join(prefix: str, fields: Mapping[str, str]) -> str:
  return ' '.join(
    [prefix, *(f'{name}: {text}' for name, text in fields.items())]
  )


def _classified(
  inputs: str, choices: tuple[str, ...], label: int | None, **more: Any
) -> Example:
  targets = UNLABELLED if label is None else choices[label]
  return Example(inputs, targets, choices, label, **more)


def _plain(
  row: Mapping[str, Any],
  where: str,
  train: bool,
  *,
  prefix: str,
  fields: Mapping[str, str],
  choices: tuple[str, ...],
) -> list[Example]:
  """One example of a row whose fields are texts.

  Args:
    row: as published.
    where: it stands, for messages.
    train: whether it has to have a label.
    prefix: of the inputs.
    fields: {name in the inputs: name in the row}, in their order.
    choices: in the order of the labels.
  """
  values = texts(row, fields.values(), where)
  named = dict(zip(fields, values, strict=True))
  label = label_index(row, choices, where, required=train)
  return [_classified(_join(prefix, named), choices, label, idx=row.get('idx'))]


def _multirc(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  """One example for each answer to each question of a passage."""
  examples = []
  try:
    passage, index = row['passage'], row.get('idx')
    paragraph = _without_markup(passage['text'])
    for number, question in enumerate(passage['questions']):
      for answer in question['answers']:
        inputs = {
          'question': _without_markup(question['question']),
          'answer': _without_markup(answer['text']),
          'paragraph': paragraph,
        }
        label = label_index(answer, _BOOLS, where, required=train)
        idx = {
          'paragraph': index,
          'question': question.get('idx'),
          'answer': answer.get('idx'),
        }
        examples.append(
          _classified(
            _join('multirc', inputs),
            _BOOLS,
            label,
            idx=idx,
            group=f'{where}#{number}',
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
    entities = tuple(
      sorted({text[span['start'] : span['end'] + 1] for span in spans})
    )
    passage = re.sub(r'(\.|\?|\!|\"|\')\n@highlight\n', r'\1 ', text)
    passage = re.sub(r'\n@highlight\n', '. ', passage)
    for number, question in enumerate(row['qas']):
      found = question.get('answers', ())
      right = tuple(sorted({answer['text'] for answer in found}))
      if train and not right:
        raise wrong_row(where, "'answers', which training needs")
      inputs = _join(
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
            group=f'{where}#{number}',
          )
        )
  except (AttributeError, KeyError, TypeError):
    raise wrong_row(
      where, 'passage.text and entities, qas[].query and answers'
    ) from None
  return examples


def _wsc(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  """The pronoun stands between stars; the target is what it may refer to.

  Whether it does is the label: those that do not are not trained on. The
  position of the pronoun counts words; in four published texts it is another
  word, and the nearest place of the pronoun is taken.
  """
  try:
    words = row['text'].rstrip().split(' ')
    referent, pronoun = texts(
      row['target'], ('span1_text', 'span2_text'), where
    )
    at = int(row['target']['span2_index'])
  except (AttributeError, KeyError, TypeError, ValueError):
    raise wrong_row(
      where, 'text, target.span1_text, span2_text and span2_index'
    ) from None
  places = [i for i, word in enumerate(words) if _bare(word) == _bare(pronoun)]
  if not places:
    raise wrong_row(where, f'pronoun {pronoun!r} in its text')
  label = label_index(row, _BOOLS, where, required=train)
  if train and not label:
    return []
  place = min(places, key=lambda i: abs(i - at))
  rest = words[place][len(pronoun) :]
  words[place] = f'*{pronoun}* {rest}'.rstrip()
  inputs = ' '.join(['wsc:', *words])
  return [Example(inputs, referent, label=label, idx=row.get('idx'))]


def _bare(word: str) -> str:
  return re.sub(r'^\W+|\W+$', '', word).lower()


def _task(
  name: str,
  folder: str,
  fields: str,
  choices: Sequence[str],
  score: Callable[..., metrics.Scores] = metrics.accuracy,
  **names: str,
) -> AnswerTask:
  """Returns a task whose rows are texts.

  Args:
    name: 'cb', also the prefix of its inputs.
    folder: of its files.
    fields: in the inputs, in their order.
    choices: in the order of the labels.
    score: its metrics.
    **names: fields that the file calls otherwise.
  """
  examples = functools.partial(
    _plain,
    prefix=name,
    fields={field: names.get(field, field) for field in fields.split()},
    choices=tuple(choices),
  )
  return AnswerTask(
    f'superglue.{name}', folder, examples, answers.choice, score
  )


TASKS = (
  _task('boolq', 'BoolQ', 'passage question', _BOOLS),
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
    'superglue.multirc', 'MultiRC', _multirc, answers.choice, metrics.multirc
  ),
  AnswerTask(
    'superglue.record', 'ReCoRD', _record, answers.free_text, metrics.record
  ),
  _task('rte', 'RTE', 'hypothesis premise', ('entailment', 'not_entailment')),
  _task('wic', 'WiC', 'sentence1 sentence2 word', _BOOLS),
  AnswerTask('superglue.wsc', 'WSC', _wsc, answers.wsc, metrics.accuracy),
)
