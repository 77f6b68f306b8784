"""From text to answers: exact choices, free text, T5's rule for WSC."""

import pytest

from st_moe.data.downstream import answers
from st_moe.data.downstream.example import Example

CB = Example(
  inputs='cb hypothesis: H premise: P',
  targets='neutral',
  choices=('entailment', 'contradiction', 'neutral'),
  label=2,
)


@pytest.mark.parametrize(
  ('text', 'answer'),
  [
    ('entailment', 0),
    ('contradiction', 1),
    (' neutral ', 2),
    ('Neutral', -1),
    ('neutral.', -1),
    ('neutral neutral', -1),
    ('', -1),
    ('<extra_id_0> neutral', -1),
  ],
)
def test_a_choice_is_the_text_exactly(text, answer):
  assert answers.choice(text, CB) == answer


def test_free_text_is_stripped():
  question = Example(inputs='', targets='Paris', answers=('Paris',))
  assert answers.free_text('  the  City ', question) == 'the  City'
  assert answers.free_text('<extra_id_0> x', question) == '<extra_id_0> x'


def test_no_answer_reads_as_the_empty_text():
  question = Example(inputs='', targets='unanswerable', answers=('',))
  assert answers.no_answer_or_text(' unanswerable', question) == ''
  assert answers.no_answer_or_text('Unanswerable', question) == 'Unanswerable'


@pytest.mark.parametrize(
  ('referent', 'text', 'answer'),
  [
    ('Mark', 'Mark', 1),
    ('Mark', 'mark', 1),
    ('The city councilmen', 'city councilmen', 1),
    ('The city councilmen', 'councilmen', 1),
    ('councilmen', 'The angry city councilmen', 1),
    ('The city councilmen', 'The demonstrators', 0),
    ('The city councilmen', 'city demonstrators', 0),
    ("Bob's hat", 'Bob', 0),
    ('Bob', "Bob's hat", 0),
    ("Bob's hat", "Bob's", 1),
    ('Mark', '', -1),
    ('Mark', ' the ', -1),  # nothing is left of it
    ('my two  sons', 'sons two', 1),
  ],
)
def test_wsc_compares_words(referent, text, answer):
  example = Example('wsc: ... *it* ...', referent, label=1)
  assert answers.wsc(text, example) == answer
