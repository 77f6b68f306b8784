"""SQuAD v2, and closed-book Natural Questions, WebQuestions and TriviaQA.

SQuAD has T5's format of SQuAD v1 (`squad` in t5/data/preprocessors.py); for
its questions without an answer, which T5 does not have, the target is
'unanswerable'. Closed-book questions have the formats of Roberts et al. 2020
(preprocessors.py of google-research/t5_closed_book_qa): a prefix and the
question; the target is the first answer, and all of them count as right.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from st_moe.data.downstream import answers, metrics
from st_moe.data.downstream.example import AnswerTask, Example, Prepared
from st_moe.data.downstream.formats import UNLABELLED
from st_moe.data.downstream.published import (
  Files,
  Rows,
  document,
  json_lines,
)
from st_moe.data.downstream.rows import texts, wrong_row

# What RE2 takes for punctuation and for space, which are ASCII there.
_PUNCTUATION = re.compile(r'([!-/:-@\[-`{-~])')
_SPACE = re.compile(r'[\t\n\f\r ]+')
# An answer of WebQuestions: `(description Rome)`, `(description "New York")`.
_DESCRIPTION = re.compile(r'\(description (?:"([^"]+)"|([^)]+))\)')


def _padded(text: str) -> str:
  """Returns a text with spaces around its punctuation."""
  return _SPACE.sub(' ', _PUNCTUATION.sub(r' \1 ', text))


def _texts_of(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
  """Returns a list of texts, each once; () where it is missing.

  Raises:
    UserError: it is something else.
  """
  found = row.get(name, ())
  if not isinstance(found, (list, tuple)) or not all(
    isinstance(text, str) for text in found
  ):
    raise wrong_row(where, f'list of texts {name!r}')
  return tuple(dict.fromkeys(found))


# SQuAD v2


def _squad_rows(path: Path, split: str) -> Rows:
  """Yields the questions of a SQuAD document, with their paragraphs."""
  del split
  content, shown = document(path), str(path)
  where = shown
  try:
    for a, article in enumerate(content['data']):
      for p, paragraph in enumerate(article['paragraphs']):
        for q, question in enumerate(paragraph['qas']):
          where = f'{shown}: data[{a}].paragraphs[{p}].qas[{q}]'
          yield (
            where,
            {
              'context': paragraph['context'],
              'question': question['question'],
              'id': question['id'],
              'is_impossible': question.get('is_impossible', False),
              'answers': [answer['text'] for answer in question['answers']],
            },
          )
  except (AttributeError, KeyError, TypeError):
    raise wrong_row(
      where,
      'data[].paragraphs[].context and qas[].question, id, answers[].text',
    ) from None


def _squad(row: Mapping[str, Any], where: str, train: bool) -> list[Example]:
  """Punctuation stands between spaces, in the answers too, as in T5."""
  question, context = texts(row, ('question', 'context'), where)
  inputs = f'question: {_padded(question)} context: {_padded(context)}'
  inputs = _SPACE.sub(' ', inputs)
  right = tuple(_padded(text) for text in _texts_of(row, 'answers', where))
  idx = row.get('id')
  if row.get('is_impossible'):
    return [Example(inputs, answers.NO_ANSWER, answers=('',), idx=idx)]
  if train and not right:
    raise wrong_row(where, "'answers', which training needs")
  return [Example(inputs, (*right, UNLABELLED)[0], answers=right, idx=idx)]


def _squad_from_tfds(row: Mapping[str, Any]) -> dict[str, Any]:
  return {**row, 'answers': row['answers']['text']}


# Closed-book questions


def _closed_book(
  row: Mapping[str, Any],
  where: str,
  train: bool,
  *,
  prefix: str,
  field: str,
) -> list[Example]:
  (question,) = texts(row, ('question',), where)
  right = _texts_of(row, field, where)
  if train and not right:
    raise wrong_row(where, f'{field!r}, which training needs')
  return [
    Example(
      f'{prefix} question: {question}',
      (*right, UNLABELLED)[0],
      answers=right,
      idx=row.get('id'),
    )
  ]


def _web_questions_rows(path: Path, split: str) -> Rows:
  """Reads the authors' JSON list, or rows of `question` and `answers`."""
  if path.suffix == '.jsonl':
    yield from json_lines(path, split)
    return
  content, shown = document(path), str(path)
  if not isinstance(content, list):
    raise wrong_row(shown, 'list of questions')
  for number, row in enumerate(content):
    where = f'{shown}: [{number}]'
    try:
      found = _DESCRIPTION.findall(row['targetValue'])
      question, url = row['utterance'], row.get('url')
    except (AttributeError, KeyError, TypeError):
      raise wrong_row(where, "text 'utterance' and 'targetValue'") from None
    right = [quoted or plain for quoted, plain in found]
    yield where, {'question': question, 'answers': right, 'id': url}


def _trivia_qa_rows(path: Path, split: str) -> Rows:
  """Yields the questions of a TriviaQA document, without their evidence."""
  del split
  shown = where = str(path)
  try:
    for number, row in enumerate(document(path)['Data']):
      where = f'{shown}: Data[{number}]'
      answer = row.get('Answer')
      aliases = []
      if answer is not None:
        aliases = [answer['Value'], *answer['Aliases']]
      yield (
        where,
        {
          'question': row['Question'].strip(),
          'answers': [text.strip() for text in aliases],
          'id': row['QuestionId'],
        },
      )
  except (AttributeError, KeyError, TypeError):
    raise wrong_row(
      where, 'Data[].Question, QuestionId and Answer.Value, Aliases'
    ) from None


def _trivia_qa_from_tfds(row: Mapping[str, Any]) -> dict[str, Any]:
  answer = row['answer']
  found = [answer['value'], *answer['aliases']]
  return {
    'question': row['question'],
    'answers': [] if found == [UNLABELLED] else found,
    'id': row['question_id'],
  }


def _web_questions_from_tfds(row: Mapping[str, Any]) -> dict[str, Any]:
  return {**row, 'id': row['url']}


SQUAD_V2 = AnswerTask(
  'squad_v2',
  Files(
    ('squad', 'squad_v2'),
    {'train': ('train-v2.0.json',), 'validation': ('dev-v2.0.json',)},
    _squad_rows,
  ),
  Prepared('squad/v2.0', row=_squad_from_tfds),
  _squad,
  answers.no_answer_or_text,
  metrics.squad_v2,
  ('exact_match', 'f1'),
)

# The test split is that of EfficientQA, in the same folder and form; what is
# usually reported for Natural Questions is the development set.
NATURAL_QUESTIONS = AnswerTask(
  'natural_questions',
  Files(
    ('nq_open',),
    {
      'train': ('NQ-open.train.jsonl', 'train.jsonl'),
      'validation': ('NQ-open.dev.jsonl', 'dev.jsonl'),
      'test': (
        'NQ-open.efficientqa.test.1.1.jsonl',
        'efficientqa_test.jsonl',
        'test.jsonl',
      ),
    },
  ),
  Prepared('natural_questions_open'),
  functools.partial(_closed_book, prefix='nq', field='answer'),
  answers.free_text,
  metrics.exact_match,
)

# There is no published development set.
WEB_QUESTIONS = AnswerTask(
  'web_questions',
  Files(
    ('webquestions', 'web_questions'),
    {
      'train': ('webquestions.examples.train.json', 'train.jsonl'),
      'validation': ('dev.jsonl', 'validation.jsonl'),
      'test': ('webquestions.examples.test.json', 'test.jsonl'),
    },
    _web_questions_rows,
  ),
  Prepared('web_questions', row=_web_questions_from_tfds),
  functools.partial(_closed_book, prefix='wq', field='answers'),
  answers.free_text,
  metrics.exact_match,
)

TRIVIA_QA = AnswerTask(
  'trivia_qa',
  Files(
    ('triviaqa-unfiltered', 'triviaqa', 'trivia_qa'),
    {
      'train': ('unfiltered-web-train.json',),
      'validation': ('unfiltered-web-dev.json',),
      'test': ('unfiltered-web-test-without-answers.json',),
    },
    _trivia_qa_rows,
  ),
  Prepared('trivia_qa/unfiltered.nocontext', row=_trivia_qa_from_tfds),
  functools.partial(_closed_book, prefix='trivia_qa', field='answers'),
  answers.free_text,
  metrics.trivia_qa,
  ('exact_match',),
)
