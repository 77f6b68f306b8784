"""Sentinels in fine-tuning (paper, section 4.7; Table 7).

`What is the capital of Illinois ? <extra_id_0>` is answered by `<extra_id_0>
Springfield`, as in span corruption. Sentinels are put in after tokenization,
as in seqio's `add_task_with_sentinels`: inputs that are cut keep theirs, and a
vocabulary of bytes, which has no text for them, has them too. They are taken
off again before an answer is read.
"""

from collections.abc import Sequence

from st_moe.config import DataConfig
from st_moe.data.vocabularies import Vocabulary
from st_moe.errors import UserError


def check(config: DataConfig, *, answers: bool) -> None:
  """Refuses sentinels where there is nothing to put them before.

  Args:
    config: may ask for sentinels.
    answers: whether any of its tasks has answers.

  Raises:
    UserError: none has.
  """
  if config.insert_sentinels and not answers:
    raise UserError(
      'DataConfig.insert_sentinels is for tasks with answers; task '
      f'{config.task!r} has none'
    )


def sentinel_ids(config: DataConfig, vocabulary: Vocabulary) -> list[int]:
  """Returns the ids that are put in: <extra_id_0> first; [] for none."""
  return [vocabulary.sentinel_id(k) for k in range(config.insert_sentinels)]


def behind(
  inputs: Sequence[int], sentinels: Sequence[int], most: int
) -> list[int]:
  """Returns inputs and sentinels behind them, at most `most` ids."""
  return [*inputs[: max(most - len(sentinels), 0)], *sentinels][:most]


def before(
  targets: Sequence[int], sentinels: Sequence[int], most: int
) -> list[int]:
  """Returns sentinels and targets behind them, at most `most` ids."""
  return [*sentinels, *targets][:most]


def without(output: Sequence[int], sentinels: Sequence[int]) -> list[int]:
  """Returns what a model wrote, without the sentinels it begins with."""
  count = len(sentinels)
  begins = list(output[:count]) == list(sentinels)
  return list(output[count:] if begins else output)
