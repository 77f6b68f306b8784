"""Simple lexical classes of tokens, after those of Tables 13 and 15.

The paper's authors read the tokens of each expert and named what they saw. To
count instead, every token gets the class of the whole word it is a piece of, by
English word lists and two rules of spelling:

- 'name': begins with a capital where no sentence begins. The first word of a
  sentence, and one right behind a sentinel, is no name, even if it is one.
- 'verb': an auxiliary, a common irregular form, or five letters or more that
  end in -ed or -ing and are not on a list of nouns and adjectives that do. The
  present tense of regular verbs ('walk', 'walks') is missed; 'a broken
  building' counts as two verbs.

These are rules of thumb, and other languages than English fall into 'other'
but for punctuation, digits, sentinels and names. Words are told apart by the
spaces of the pieces, so that all pieces of 'walk|ed' are verbs.
"""

from collections.abc import Sequence

SPACE = '\u2581'  # SentencePiece's mark of a space before a piece
CLASSES = (
  'sentinel', 'special', 'punctuation', 'number', 'conjunction or article',
  'preposition', 'pronoun', 'verb', 'visual', 'name', 'other',
)  # fmt: skip
SPECIAL = ('<pad>', '</s>', '<unk>')

_LISTS = {
  'number': """
    zero one two three four five six seven eight nine ten eleven twelve thirteen
    fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty
    fifty sixty seventy eighty ninety hundred hundreds thousand thousands
    million millions billion billions dozen half third thirds quarter first
    second fourth fifth sixth seventh eighth ninth tenth once twice thrice
    """,
  'conjunction or article': """
    a an the and or but nor so yet for if because although though while whereas
    unless until since when whenever where wherever whether than that as
    """,
  'preposition': """
    of in to with on at by from into onto upon about against between among
    through during before after toward towards within without across along
    around behind beside besides beyond despite except inside near off outside
    over past per throughout under underneath via amid
    """,
  'pronoun': """
    i me my mine myself you your yours yourself yourselves he him his himself
    she her hers herself it its itself we us our ours ourselves they them their
    theirs themselves this these those who whom whose which what someone
    somebody anyone anybody everyone everybody nobody none something anything
    everything nothing thou thee thy thine ye
    """,
  'verb': """
    be am is are was were been being have has had having do does did done doing
    will would shall should can could may might must cannot ought say says said
    go goes went gone come comes came get gets got make makes made take takes
    took taken give gives gave given know knows knew known think thinks thought
    see sees saw seen find finds found tell tells told become became leave left
    feel felt put bring brought begin began begun keep kept hold held write
    wrote written stand stood hear heard let mean meant meet met run ran sit sat
    speak spoke spoken lie lay read grow grew grown lose lost fall fell fallen
    send sent build built draw drew drawn break broke broken spend spent rise
    rose risen drive drove driven buy bought wear wore worn choose chose chosen
    eat ate eaten seek sought sleep slept win won catch caught teach taught
    """,
  'visual': """
    red blue green yellow white black brown grey gray pink purple orange golden
    silver pale dark bright light left right up down above below top bottom
    upper lower front back middle centre center round square large small big
    little tall short long wide narrow high low deep thick thin
    """,
}  # fmt: skip
_CLASS_OF = {
  word: name for name, words in _LISTS.items() for word in words.split()
}
# End in -ed or -ing and are seldom verbs.
_NO_VERBS = (
  'thing', 'morning', 'evening', 'string', 'spring', 'ceiling', 'feeling',
  'building', 'wedding', 'pudding', 'kindred', 'sacred', 'naked', 'wicked',
  'rugged', 'indeed', 'breed', 'creed', 'greed', 'speed', 'steed', 'bleed',
  'proceed', 'succeed', 'exceed',
)  # fmt: skip
_VERB_ENDINGS = ('ed', 'ing')
_VERB_LETTERS = 5
_SENTENCE_ENDS = frozenset('.!?:\n')
_QUOTES = frozenset('"\u201c\u2018')
_APOSTROPHES = frozenset("'\u2019")


def is_sentinel(piece: str) -> bool:
  return piece.lstrip(SPACE).startswith('<extra_id_')


def word_class(word: str, *, begins_sentence: bool) -> str:
  """Returns the class of a whole word, without the space before it."""
  bare = word.strip('\'"\u2018\u2019\u201c\u201d.,;:!?()[]-_')
  if not any(character.isalnum() for character in bare):
    return 'punctuation'
  low = bare.lower().replace('\u2019', "'")
  if low.endswith("n't"):
    return 'verb'
  low = low.partition("'")[0] or low  # he's, king's
  if any(character.isdigit() for character in low):
    return 'number'
  if low in _CLASS_OF:
    return _CLASS_OF[low]
  if bare[0].isupper() and not begins_sentence:
    return 'name'
  long = len(low) >= _VERB_LETTERS and low not in _NO_VERBS
  if long and low.endswith(_VERB_ENDINGS):
    return 'verb'
  return 'other'


def classify(pieces: Sequence[str]) -> list[str]:
  """Returns the class of every piece of a row, by the word it belongs to.

  Args:
    pieces: of a row in order, as `Vocabulary.piece` writes them.
  """
  classes: list[str] = []
  begins = True
  for word in words(pieces):
    text = ''.join(word).replace(SPACE, '')
    if word[0] in SPECIAL:
      kind, begins = 'special', True
    elif is_sentinel(word[0]):
      kind, begins = 'sentinel', True
    else:
      kind = word_class(text, begins_sentence=begins)
      if kind != 'punctuation':
        begins = False
      elif _SENTENCE_ENDS & set(text) or _QUOTES & set(text):
        begins = True
    classes += [kind] * len(word)
  return classes


def words(pieces: Sequence[str]) -> list[list[str]]:
  """Groups the pieces of a row into words; punctuation stands alone.

  An apostrophe between two pieces of a word belongs to it.
  """
  found: list[list[str]] = []
  open_word = False  # whether the last group takes more letters
  for i, piece in enumerate(pieces):
    lone = piece in SPECIAL or is_sentinel(piece)
    text = piece.replace(SPACE, '')
    letters = any(character.isalnum() for character in text)
    joins = open_word and not piece.startswith(SPACE) and not lone
    if joins and not letters:
      after = pieces[i + 1] if i + 1 < len(pieces) else SPACE
      joins = bool(text) and set(text) <= _APOSTROPHES and after[0].isalnum()
      letters = joins
    if joins:
      found[-1].append(piece)
    else:
      found.append([piece])
    # A lone mark of a space ('\u2581' then 'Word') opens a word, too.
    open_word = not lone and (letters or not text)
  return found
