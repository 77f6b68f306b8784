"""SQuAD v2 and closed-book questions from published files; what is refused.

The rows are invented. SQuAD's texts were compared with t5 0.9.4's preprocessor.
"""

import json
from pathlib import Path

import pytest

from st_moe.config import DataConfig
from st_moe.data.downstream.catalog import find_task, load_examples
from st_moe.errors import UserError

REAL = Path(__file__).resolve().parents[2] / 'shared' / 'data'

SQUAD = {
  'version': 'v2.0',
  'data': [
    {
      'title': 'Tea',
      'paragraphs': [
        {
          'context': 'Tea (hot)  costs $1.50\nin U.S. shops.',
          'qas': [
            {'id': 'a', 'question': "What's tea's price?",
             'is_impossible': False, 'answers': [
               {'text': '$1.50', 'answer_start': 17},
               {'text': '$1.50', 'answer_start': 17},
               {'text': '1.50', 'answer_start': 18}]},
            {'id': 'b', 'question': 'Who?', 'is_impossible': True,
             'plausible_answers': [{'text': 'Tea', 'answer_start': 0}],
             'answers': []},
          ],
        }
      ],
    }
  ],
}  # fmt: skip
CONTEXT = 'Tea ( hot ) costs $ 1 . 50 in U . S . shops . '

WEB_QUESTIONS = [
  {'url': 'u1', 'utterance': 'where is rome?', 'targetValue':
   '(list (description Italy) (description "Lazio, Italy"))'},
]  # fmt: skip
TRIVIA_QA = {
  'Data': [
    {'Question': 'Who? ', 'QuestionId': 'tc_1', 'Answer': {
      'Value': 'Bob', 'Aliases': ['Bobby ', 'Bob'], 'Type': 'FreeForm'}},
  ],
}  # fmt: skip
NO_ANSWERS = {'Data': [{'Question': 'Who?', 'QuestionId': 'tc_2'}]}


def write(root, name, content):
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content if isinstance(content, str) else json.dumps(content))


def load(root, name, split='train'):
  return load_examples(name, split, DataConfig(task_dir=str(root)))


def texts(examples):
  return [(e.inputs, e.targets, e.answers, e.idx) for e in examples]


def test_squad_has_the_format_of_t5_and_questions_without_answer(tmp_path):
  for name in ('train-v2.0.json', 'dev-v2.0.json'):
    write(tmp_path, name, SQUAD)
  expected = [
    (
      f"question: What ' s tea ' s price ? context: {CONTEXT}",
      ' $ 1 . 50',
      (' $ 1 . 50', '1 . 50'),
      'a',
    ),
    (f'question: Who ? context: {CONTEXT}', 'unanswerable', ('',), 'b'),
  ]
  for split in ('train', 'validation'):
    found = load(tmp_path, 'squad_v2', split)
    assert texts(found) == expected
  task = find_task('squad_v2')
  given = [task.answer(text, e) for text, e in zip(
    ('$ 1 . 50', 'unanswerable'), found, strict=True)]  # fmt: skip
  assert task.score(task.metrics(given, found)) == 100


def test_natural_questions(tmp_path):
  rows = [{'question': 'who ran', 'answer': ['Bob', 'Bob Ray']}]
  write(tmp_path, 'nq_open/NQ-open.train.jsonl', rows[0])
  write(tmp_path, 'nq_open/dev.jsonl', rows[0])
  for split in ('train', 'validation'):
    assert texts(load(tmp_path, 'natural_questions', split)) == [
      ('nq question: who ran', 'Bob', ('Bob', 'Bob Ray'), None)
    ]


def test_web_questions_of_their_authors_and_as_rows(tmp_path):
  expected = ('Italy', 'Lazio, Italy')
  write(tmp_path, 'webquestions.examples.train.json', WEB_QUESTIONS)
  row = {'question': 'where is rome?', 'answers': expected, 'id': 'u1'}
  write(tmp_path, 'webquestions/test.jsonl', row)
  for split in ('train', 'test'):
    assert texts(load(tmp_path, 'web_questions', split)) == [
      ('wq question: where is rome?', 'Italy', expected, 'u1')
    ]


def test_trivia_qa(tmp_path):
  folder = 'triviaqa-unfiltered/unfiltered-web'
  write(tmp_path, f'{folder}-train.json', TRIVIA_QA)
  write(tmp_path, f'{folder}-test-without-answers.json', NO_ANSWERS)
  assert texts(load(tmp_path, 'trivia_qa')) == [
    ('trivia_qa question: Who?', 'Bob', ('Bob', 'Bobby'), 'tc_1')
  ]
  assert texts(load(tmp_path, 'trivia_qa', 'test')) == [
    ('trivia_qa question: Who?', '<unk>', (), 'tc_2')
  ]
  write(tmp_path, f'{folder}-train.json', NO_ANSWERS)
  with pytest.raises(
    UserError, match=r"Data\[0\]: the row has no 'answers', w"
  ):
    load(tmp_path, 'trivia_qa')


@pytest.mark.parametrize(
  ('name', 'file', 'content', 'message'),
  [
    ('squad_v2', 'train-v2.0.json', '{"data":\n [}', 'v2.0.json:2: not JSON'),
    ('squad_v2', 'train-v2.0.json', '[]', 'the row has no data[].paragraphs'),
    ('squad_v2', 'train-v2.0.json',
     {'data': [{'paragraphs': [{'context': 'c', 'qas': [{'id': 'x'}]}]}]},
     'train-v2.0.json: data[0].paragraphs[0].qas[0]: the row has no data[]'),
    ('natural_questions', 'NQ-open.train.jsonl', '{"question": "a"}\n',
     "NQ-open.train.jsonl:1: the row has no 'answer', which training needs"),
    ('natural_questions', 'NQ-open.train.jsonl',
     '\n{"question": "a", "answer": "b"}\n',
     "NQ-open.train.jsonl:2: the row has no list of texts 'answer'"),
    ('natural_questions', 'NQ-open.train.jsonl',
     '{"question": "a", "answer": 4}\n', "list of texts 'answer'"),
    ('natural_questions', 'NQ-open.train.jsonl', '{"answer": ["b"]}\n',
     "no text 'question'"),
    ('web_questions', 'webquestions.examples.train.json', [{'url': 'a'}],
     "train.json: [0]: the row has no text 'utterance' and 'targetValue'"),
    ('web_questions', 'webquestions.examples.train.json', '{}',
     'has no list of questions'),
    ('trivia_qa', 'unfiltered-web-train.json', {'Data': [{'Question': 'a'}]},
     'unfiltered-web-train.json: Data[0]: the row has no Data[].Question'),
    ('trivia_qa', 'unfiltered-web-dev.json', TRIVIA_QA,
     'there is no triviaqa-unfiltered/unfiltered-web-train.json in'),
  ],
)  # fmt: skip
def test_what_is_broken_or_missing_is_named(
  tmp_path, name, file, content, message
):
  write(tmp_path, file, content)
  with pytest.raises(UserError) as error:
    load(tmp_path, name)
  assert message in str(error.value)


@pytest.mark.skipif(not REAL.is_dir(), reason='no ../shared/data')
def test_the_real_questions(tmp_path):
  (dev, *more) = load(REAL, 'natural_questions', 'validation')
  assert (len(more), dev.inputs, dev.targets) == (
    3609,
    'nq question: when was the last time anyone was on the moon',
    '14 December 1972 UTC',
  )
  assert len(load(REAL, 'natural_questions', 'test')) == 1769
  (first, *more) = load(REAL, 'web_questions')
  assert (len(more), first.inputs, first.answers) == (
    3777,
    'wq question: what is the name of justin bieber brother?',
    ('Jazmyn Bieber', 'Jaxon Bieber'),
  )
