"""From a model's text to an answer: what T5 calls postprocessors.

Every function takes the text and the example it answers, and returns the index
of a choice, -1 for a text that is none, or the text itself where an answer is
free.
"""

from st_moe.data.downstream.example import INVALID, Answer, Example

# What T5's rule for WSC leaves out of a referent (t5/data/postprocessors.py).
_DETERMINERS = (
  'a', 'an', 'few', 'her', 'his', 'each', 'every', 'many', 'much', 'my', 'our',
  'some', 'that', 'the', 'their', 'these', 'this', 'those', 'which', 'whose',
  'your',
)  # fmt: skip

# What a model writes where a passage does not answer the question (SQuAD v2).
NO_ANSWER = 'unanswerable'


def choice(text: str, example: Example) -> Answer:
  """Returns the index of the choice that the text is, exactly; else -1."""
  text = text.strip()
  return example.choices.index(text) if text in example.choices else INVALID


def free_text(text: str, example: Example) -> Answer:
  """Returns the text, stripped."""
  del example
  return text.strip()


def no_answer_or_text(text: str, example: Example) -> Answer:
  """Returns the text, '' where it says that there is no answer (SQuAD v2)."""
  del example
  text = text.strip()
  return '' if text == NO_ANSWER else text


def wsc(text: str, example: Example) -> Answer:
  """Returns whether the text names the referent: 1 yes, 0 no, -1 no text.

  T5's rule (`wsc_simple`): capitals and determiners do not count, and the
  words of one are among the words of the other. "Bob" is not "Bob's hat".

  Args:
    text: the model's.
    example: its targets are the candidate, whether it is right or not.
  """
  found = _plain(text)
  if not found:
    return INVALID
  referent = _plain(example.targets)
  if ("'" in found) != ("'" in referent):
    return 0
  found, referent = set(found.split(' ')), set(referent.split(' '))
  return int(found <= referent or referent <= found)


def _plain(text: str) -> str:
  words = text.strip().lower().split(' ')
  return ' '.join(word for word in words if word not in _DETERMINERS)
