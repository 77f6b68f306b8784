"""Vocabularies without TensorFlow: SentencePiece models and bytes.

The ids are seqio's (and T5's): 0 pads, 1 ends a sequence, 2 is unknown, and
the extra ids, the sentinels of span corruption, come last: `<extra_id_0>` is
`vocab_size - 1`, `<extra_id_1>` the id below it, and so on. `as_seqio()` gives
the same vocabulary to seqio's tasks.
"""

import abc
import hashlib
import logging
import math
import re
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from st_moe.data.files import write_atomically
from st_moe.errors import UserError

log = logging.getLogger(__name__)

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
NUM_BYTES = 256
NUM_SPECIAL_IDS = 3  # pad, end of sequence, unknown
_SPECIAL_PIECES = {PAD_ID: '<pad>', EOS_ID: '</s>', UNK_ID: '<unk>'}

# Unigram training sums expectations per thread, so the model depends on this
# number: fixed, that the same text gives the same file on every machine.
_TRAINING_THREADS = 2
# SentencePiece drops longer sentences; longer lines are cut into pieces of
# fewer characters, each at most four bytes.
_MAX_SENTENCE_BYTES = 20_000
_LINE_CHARACTERS = _MAX_SENTENCE_BYTES // 4


class Vocabulary(abc.ABC):
  """Text to ids and back; ids as seqio numbers them.

  Attributes:
    extra_ids: number of sentinels, the last ids of the vocabulary.
    vocab_size: number of ids, sentinels included.
    spec: what `load_vocabulary` takes to build it again.
  """

  pad_id = PAD_ID
  eos_id = EOS_ID
  unk_id = UNK_ID

  def __init__(self, spec: str, base_size: int, extra_ids: int):
    self.spec = spec
    self.extra_ids = extra_ids
    self.vocab_size = base_size + extra_ids

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without an end of sequence."""

  def encode_prompt(self, text: str) -> list[int]:
    """Returns the ids of a text in which `<extra_id_k>` is a sentinel."""
    return self.encode(text)

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of many texts, on all cores where that helps."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text up to the first end of sequence.

    Padding vanishes, sentinels read `<extra_id_k>`. Ids of the model's padded
    embedding rows, beyond `vocab_size`, read as unknown.
    """

  @abc.abstractmethod
  def piece(self, i: int) -> str:
    """Returns one id as SentencePiece writes it: '\u2581' stands for a space.

    Sentinels read `<extra_id_k>`, what no text has `<pad>`, `</s>`, `<unk>`;
    a byte that is no ASCII character reads `<0xE2>`.
    """

  @property
  @abc.abstractmethod
  def model_sha256(self) -> str:
    """SHA-256 of the SentencePiece file; of the word 'byte' for bytes."""

  @abc.abstractmethod
  def as_seqio(self) -> Any:
    """Returns the same vocabulary as a seqio object (imports TensorFlow)."""

  @property
  def fingerprint(self) -> str:
    """SHA-256 over the model and the number of sentinels."""
    text = f'{self.model_sha256} extra_ids={self.extra_ids}'
    return hashlib.sha256(text.encode()).hexdigest()

  def sentinel_id(self, k: int) -> int:
    """Returns the id of `<extra_id_k>`."""
    if not 0 <= k < self.extra_ids:
      raise UserError(
        f'sentinel {k} does not exist: the vocabulary has {self.extra_ids} '
        'extra ids; raise DataConfig.extra_ids'
      )
    return self.vocab_size - 1 - k

  def is_sentinel(self, ids: Any) -> np.ndarray:
    """Returns a bool array of the shape of `ids`: which are sentinels."""
    ids = np.asarray(ids)
    return (ids >= self.vocab_size - self.extra_ids) & (ids < self.vocab_size)

  def _until_eos(self, ids: Iterable[int]) -> list[int]:
    ids = [int(i) if i < self.vocab_size else UNK_ID for i in ids]
    return ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids


class ByteVocabulary(Vocabulary):
  """UTF-8 bytes: id = byte + 3. Every text can be written, none is unknown."""

  def __init__(self, extra_ids: int):
    super().__init__('byte', NUM_SPECIAL_IDS + NUM_BYTES, extra_ids)

  def piece(self, i: int) -> str:
    if self.is_sentinel(i):
      return f'<extra_id_{self.vocab_size - 1 - i}>'
    if i < NUM_SPECIAL_IDS or i >= self.vocab_size:
      return _SPECIAL_PIECES.get(i, '<unk>')
    byte = i - NUM_SPECIAL_IDS
    if byte == ord(' '):
      return '\u2581'
    return chr(byte) if byte < 128 else f'<0x{byte:02X}>'

  @property
  def model_sha256(self) -> str:
    return hashlib.sha256(b'byte').hexdigest()

  def encode(self, text: str) -> list[int]:
    return [byte + NUM_SPECIAL_IDS for byte in _utf8(text)]

  def encode_prompt(self, text: str) -> list[int]:
    ids: list[int] = []
    for part in re.split(r'(<extra_id_\d+>)', text):
      found = re.fullmatch(r'<extra_id_(\d+)>', part)
      known = found is not None and int(found[1]) < self.extra_ids
      ids += [self.sentinel_id(int(found[1]))] if known else self.encode(part)
    return ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    content = bytearray()
    for i in self._until_eos(ids):
      if self.is_sentinel(i):
        content += f'<extra_id_{self.vocab_size - 1 - i}>'.encode()
      elif i >= NUM_SPECIAL_IDS:
        content.append(i - NUM_SPECIAL_IDS)
    return content.decode(errors='ignore')

  def as_seqio(self) -> Any:
    import seqio

    return seqio.ByteVocabulary(extra_ids=self.extra_ids)


class SentencePieceVocabulary(Vocabulary):
  """A SentencePiece model with the sentinels appended as pieces."""

  def __init__(self, path: str, model: bytes, extra_ids: int):
    """Builds it from the bytes of a model.

    Args:
      path: the model's file, for messages and for seqio.
      model: its content.
      extra_ids: number of sentinels to append.

    Raises:
      UserError: the model is broken or its special ids are not T5's.
    """
    base = _load_processor(model, path)
    special = (base.pad_id(), base.eos_id(), base.unk_id())
    if special != (PAD_ID, EOS_ID, UNK_ID):
      raise UserError(
        f'{path}: pad, eos and unk ids are {special}, T5 models have '
        f'{(PAD_ID, EOS_ID, UNK_ID)}; train one with `st_moe vocab`'
      )
    super().__init__(path, base.get_piece_size(), extra_ids)
    self._model_sha256 = hashlib.sha256(model).hexdigest()
    self._processor = _load_processor(model + _sentinels(extra_ids), path)

  def piece(self, i: int) -> str:
    if self.is_sentinel(i):
      return f'<extra_id_{self.vocab_size - 1 - i}>'
    if i in _SPECIAL_PIECES or i >= self.vocab_size:
      return _SPECIAL_PIECES.get(i, '<unk>')
    return self._processor.id_to_piece(int(i))

  @property
  def model_sha256(self) -> str:
    return self._model_sha256

  def encode(self, text: str) -> list[int]:
    return self._processor.encode(_utf8(text))

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return self._processor.encode(list(map(_utf8, texts)), num_threads=-1)

  def decode(self, ids: Iterable[int]) -> str:
    return self._processor.decode(self._until_eos(ids))

  def as_seqio(self) -> Any:
    import seqio

    return seqio.SentencePieceVocabulary(self.spec, extra_ids=self.extra_ids)


def _utf8(text: str) -> bytes:
  """Returns UTF-8; a lone surrogate (from JSON escapes) becomes '?'."""
  return text.encode(errors='replace')


def _load_processor(
  model: bytes, path: str
) -> sentencepiece.SentencePieceProcessor:
  try:
    if not model:
      raise OSError('empty file')
    return sentencepiece.SentencePieceProcessor(model_proto=model)
  except (RuntimeError, OSError) as error:
    raise UserError(
      f'{path} is not a SentencePiece model; give the .model file itself, '
      "'byte', or train one with `st_moe vocab`"
    ) from error


def _sentinels(extra_ids: int) -> bytes:
  """Returns the pieces <extra_id_{n-1}> ... <extra_id_0> as protobuf bytes.

  A model is a protobuf message whose field 1 repeats the pieces; bytes of
  more pieces behind it append them. The same pieces as seqio's: user defined,
  score 0, so that `<extra_id_k>` in a text becomes its sentinel.
  """
  content = bytearray()
  for k in reversed(range(extra_ids)):
    text = f'\u2581<extra_id_{k}>'.encode()
    # piece (field 1, bytes), score (field 2, float32), type (field 3) = 4.
    piece = b'\x0a' + bytes([len(text)]) + text + b'\x15\0\0\0\0\x18\x04'
    content += b'\x0a' + bytes([len(piece)]) + piece
  return bytes(content)


def load_vocabulary(spec: str, extra_ids: int) -> Vocabulary:
  """Loads a vocabulary.

  Args:
    spec: 'byte', or the path of a SentencePiece model.
    extra_ids: number of sentinels.

  Raises:
    UserError: no such file, a folder, or not a T5-compatible model.
  """
  if spec == 'byte':
    return ByteVocabulary(extra_ids)
  path = Path(spec).expanduser()
  if path.is_dir():
    raise UserError(
      f'vocabulary {spec} is a folder; give the .model file inside it'
    )
  if not path.is_file():
    raise UserError(
      f"vocabulary {spec} does not exist; give a SentencePiece model, 'byte', "
      'or train one with `st_moe vocab`'
    )
  return SentencePieceVocabulary(str(path), path.read_bytes(), extra_ids)


def train_vocabulary(
  texts: Iterable[str], size: int, path: Path, characters: int = 10_000_000
) -> None:
  """Trains a T5-compatible SentencePiece unigram model and writes its file.

  The same texts, size and sentencepiece version give the same bytes.

  Args:
    texts: documents; their lines are the training sentences.
    size: number of pieces, without the extra ids.
    path: where the model goes; appears whole or not at all.
    characters: how much of the text is used: evenly spread documents of a
      sequence, the beginning of a stream. Training takes a second for each
      million; more than ten million gain little even for 32,000 pieces.

  Raises:
    UserError: no text, or too little for so many pieces.
  """
  lines = _training_lines(texts, characters)
  if not lines:
    raise UserError('the training text is empty: no vocabulary can be made')
  log.info(
    'training a vocabulary of %s pieces on %s characters',
    f'{size:,}',
    f'{sum(map(len, lines)):,}',
  )
  model = BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=map(_utf8, lines),
      model_writer=model,
      vocab_size=size,
      model_type='unigram',
      pad_id=PAD_ID,
      eos_id=EOS_ID,
      unk_id=UNK_ID,
      bos_id=-1,
      pad_piece='<pad>',
      eos_piece='</s>',
      unk_piece='<unk>',
      character_coverage=0.9995,
      normalization_rule_name='nmt_nfkc',
      max_sentence_length=_MAX_SENTENCE_BYTES,
      num_threads=_TRAINING_THREADS,
      minloglevel=2,
    )
  except (RuntimeError, OSError) as error:
    raise UserError(_training_message(str(error), size)) from error
  write_atomically(Path(path), model.getvalue())


def _training_lines(texts: Iterable[str], characters: int) -> list[str]:
  """Returns the lines of about `characters` characters of `texts`."""
  lines: list[str] = []
  for text in _spread(texts):
    for line in text.splitlines():
      line = line.strip()
      for start in range(0, len(line), _LINE_CHARACTERS):
        lines.append(line[start : start + _LINE_CHARACTERS])
        characters -= len(lines[-1])
    if characters <= 0:
      break
  return lines


def _spread(texts: Iterable[str]) -> Iterable[str]:
  """Orders a sequence so that any beginning of it covers the whole evenly.

  Steps of the golden ratio of its length. A stream stays as it is.
  """
  if not isinstance(texts, Sequence) or len(texts) < 3:
    return texts
  count = len(texts)
  step = round(count * 0.618)
  while math.gcd(step, count) > 1:
    step += 1
  return (texts[i * step % count] for i in range(count))


def _training_message(error: str, size: int) -> str:
  """Puts SentencePiece's two size errors into one line for the user."""
  if found := re.search(r'a value <= (\d+)', error):
    return (
      f'the text is too small for a vocabulary of {size} pieces; the largest '
      f"possible size is {found[1]}, or use vocabulary 'byte'"
    )
  if found := re.search(r'smaller than required_chars\D+\d+\D+(\d+)', error):
    return (
      f'a vocabulary of {size} pieces cannot hold the characters of the text; '
      f'the smallest possible size is {found[1]}'
    )
  return f'SentencePiece cannot train on this text: {" ".join(error.split())}'
