"""Tasks with answers: the model answers every example once, and is scored.

Two methods. 'generate' lets the model write and reads the answer from its
text, as T5 does (paper, section 4). 'rank' takes the choice with the highest
log-likelihood, summed over its tokens and its end-of-sequence; examples
without choices are generated. Both are deterministic, and dropless, so that an
answer depends neither on the batch size nor on what stands beside it.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from st_moe.config import DataConfig, RunConfig
from st_moe.data.downstream import catalog, sentinels
from st_moe.data.downstream.example import (
  INVALID,
  Answer,
  AnswerTask,
  Example,
)
from st_moe.data.downstream.majority import Majority, majority
from st_moe.data.vocabularies import Vocabulary
from st_moe.errors import UserError
from st_moe.predictor import Predictor

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0  # of progress


@dataclasses.dataclass(frozen=True)
class TaskResult:
  """What a model answered to the examples of one task, and its metrics.

  Attributes:
    task: that was scored.
    split: whose examples they are.
    examples: in the order of the file.
    texts: what the model wrote, or the choice that it took.
    answers: read from the texts.
    log_likelihoods: of each example's choices, in nats; () where it was
      generated.
    metrics: of all labelled examples, from 0 to 100; {} if there are none.
    majority: the best constant answer to the same examples, if there is one.
  """

  task: AnswerTask
  split: str
  examples: tuple[Example, ...]
  texts: tuple[str, ...]
  answers: tuple[Answer, ...]
  log_likelihoods: tuple[tuple[float, ...], ...]
  metrics: dict[str, float]
  majority: Majority | None

  @property
  def name(self) -> str:
    return self.task.name

  @property
  def score(self) -> float | None:
    """The mean of the task's main metrics; None without labels."""
    return self.task.score(self.metrics) if self.metrics else None

  @property
  def labelled(self) -> int:
    """How many examples have a label, and are scored."""
    return sum(example.labelled for example in self.examples)

  @property
  def no_answers(self) -> int:
    """How many texts are none of the answers that were asked for."""
    return sum(
      answer == INVALID or not text.strip()
      for answer, text in zip(self.answers, self.texts, strict=True)
    )

  def example_score(self, index: int) -> float | None:
    """Returns what one example scores, from 0 to 100; None without a label.

    A right label is 100; of a free answer it is the task's score of it alone.
    """
    answer, example = self.answers[index], self.examples[index]
    if example.label is not None:
      return 100.0 * (answer == example.label)
    if not example.answers:
      return None
    return self.task.score(self.task.metrics([answer], [example]))


@dataclasses.dataclass(frozen=True)
class TaskScores:
  """The results of several tasks.

  Attributes:
    results: by name of the task, in the order in which they were named.
    mixtures: names of their tasks, by name of the mixture.
  """

  results: dict[str, TaskResult]
  mixtures: dict[str, tuple[str, ...]]

  def mean(self, names: Sequence[str]) -> float | None:
    """Returns the mean score of tasks; None if one of them has none.

    By the rule of `catalog.mean_score`.
    """
    return _mean({name: self.results[name].score for name in names})

  def constant_mean(self, names: Sequence[str]) -> float | None:
    """Returns that of the best constant answers; None if one has none."""
    bars = {name: self.results[name].majority for name in names}
    return _mean({name: bar and bar.score for name, bar in bars.items()})

  def scalars(self) -> dict[str, float]:
    """Returns 'eval/TASK/METRIC', 'eval/TASK/score', 'eval/MIXTURE/score' and
    'eval/score', the mean over all tasks, from 0 to 100."""
    found: dict[str, float | None] = {}
    for name, result in self.results.items():
      for metric, value in result.metrics.items():
        found[f'eval/{name}/{metric}'] = value
      found[f'eval/{name}/score'] = result.score
    for name, tasks in self.mixtures.items():
      found[f'eval/{name}/score'] = self.mean(tasks)
    found['eval/score'] = self.mean(list(self.results))
    return {name: value for name, value in found.items() if value is not None}


def _mean(scores: dict[str, float | None]) -> float | None:
  if None in scores.values() or not scores:
    return None
  return catalog.mean_score(scores)


def named_tasks(config: RunConfig) -> tuple[str, ...]:
  """Returns the tasks with answers, and mixtures of them, to be scored.

  Those of `EvaluationConfig.tasks`, or those named in `DataConfig.task`; ()
  where that has none.
  """
  if config.evaluation.task_names:
    return config.evaluation.task_names
  names = catalog.split_names(config.data.task)
  return tuple(filter(catalog.is_answer_task, names))


def check_tasks(config: RunConfig) -> tuple[str, ...]:
  """Returns `named_tasks`, each of which there is; reads no data.

  Raises:
    UserError: with the nearest name.
  """
  names = named_tasks(config)
  for name in names:
    for task in catalog.expand(name):
      try:
        catalog.find_task(task)
      except UserError as e:
        raise UserError(f'EvaluationConfig.tasks: {e}') from e
  return names


@dataclasses.dataclass(frozen=True)
class _Prepared:
  """A task whose examples are tokenized.

  Attributes:
    task: by name.
    examples: to be answered.
    inputs: ids of each, with end-of-sequence, cut.
    choices: ids of each one's choices, without it; () to be generated.
    majority: the best constant answer.
  """

  task: AnswerTask
  examples: list[Example]
  inputs: list[list[int]]
  choices: list[list[list[int]]]
  majority: Majority | None


class TaskEvaluator:
  """Lets parameters answer the same examples every time.

  In a job all processes make one and call it alike; all get all results.
  """

  def __init__(self, config: RunConfig, vocabulary: Vocabulary, mesh: Mesh):
    """Reads and tokenizes the examples; compiles nothing yet.

    Args:
      config: the run; `evaluation` says what is scored and how, `data` where
        the files are and how long inputs and targets may be.
      vocabulary: of the model.
      mesh: to compute on.

    Raises:
      UserError: unknown tasks, missing or broken files.
    """
    names = named_tasks(config)
    if not names:
      raise UserError(
        f'DataConfig.task {config.data.task!r} has no answers to be scored; '
        'name tasks that have in EvaluationConfig.tasks'
      )
    self._config, self._vocabulary = config, vocabulary
    self._sentinels = sentinels.sentinel_ids(config.data, vocabulary)
    self._mixtures = {}
    self._prepared: dict[str, _Prepared] = {}
    for name in names:
      tasks = catalog.expand(name)
      if tasks != (name,):
        self._mixtures[name] = tasks
      for task in tasks:
        if task not in self._prepared:
          self._prepared[task] = self._prepare(task)
    self._predictor = Predictor(
      config.model,
      None,
      mesh,
      eos_id=vocabulary.eos_id,
      inputs_length=config.data.inputs_length,
      targets_length=config.data.targets_length,
      batch_size=config.evaluation.batch_size or config.batch_size,
      num_beams=config.evaluation.num_beams,
      length_penalty=config.evaluation.length_penalty,
      early_stopping=config.evaluation.early_stopping,
    )

  @property
  def batch_size(self) -> int:
    """Rows computed together."""
    return self._predictor.batch_size

  @property
  def examples(self) -> dict[str, list[Example]]:
    """What is answered, by task."""
    return {name: one.examples for name, one in self._prepared.items()}

  def score_names(self) -> tuple[str, ...]:
    """The names that `TaskScores.scalars` will have, without a model."""
    split = self._config.evaluation.split
    silent = {
      name: make_result(one.task, split, one.examples, [''] * len(one.examples))
      for name, one in self._prepared.items()
    }
    return tuple(TaskScores(silent, self._mixtures).scalars())

  @property
  def fingerprint(self) -> dict[str, str]:
    """SHA-256 of the examples of each task."""
    return {
      name: hashlib.sha256(repr(one.examples).encode()).hexdigest()
      for name, one in self._prepared.items()
    }

  def _prepare(self, name: str) -> _Prepared:
    task = catalog.find_task(name)
    settings, data = self._config.evaluation, self._config.data
    examples = catalog.load_examples(name, settings.split, data, train=False)
    examples = examples[: settings.max_examples]
    inputs = self._vocabulary.encode_batch([one.inputs for one in examples])
    choices: list[list[list[int]]] = [[] for _ in examples]
    if settings.method == 'rank':
      choices = [self._vocabulary.encode_batch(one.choices) for one in examples]
    _tell_lengths(
      f'{name}, {settings.split}', examples, inputs, choices, data,
      self._vocabulary,
    )  # fmt: skip
    most_in, most_out = data.inputs_length - 1, data.targets_length - 1
    eos, put_in = self._vocabulary.eos_id, self._sentinels
    return _Prepared(
      task=task,
      examples=examples,
      inputs=[[*sentinels.behind(ids, put_in, most_in), eos] for ids in inputs],
      choices=[
        [sentinels.before(ids, put_in, most_out) for ids in each]
        for each in choices
      ],
      majority=majority(task, examples),
    )

  def evaluate(self, params: Any) -> TaskScores:
    """Returns what these parameters score.

    Args:
      params: of `EncoderDecoder`, on the mesh.
    """
    results = {
      name: self._score(one, params) for name, one in self._prepared.items()
    }
    return TaskScores(results, self._mixtures)

  def _score(self, one: _Prepared, params: Any) -> TaskResult:
    ranked = [i for i, choices in enumerate(one.choices) if choices]
    others = [i for i, choices in enumerate(one.choices) if not choices]
    texts: dict[int, str] = {}
    likelihoods: dict[int, tuple[float, ...]] = {}
    name = one.task.name
    outputs = self._predictor.generate(
      [one.inputs[i] for i in others],
      params=params,
      progress=_Progress(f'{name}: generating', 'examples'),
    )
    for i, ids in zip(others, outputs, strict=True):
      answer = sentinels.without(ids, self._sentinels)
      texts[i] = self._vocabulary.decode(answer)
    pairs = [(one.inputs[i], ids) for i in ranked for ids in one.choices[i]]
    found = iter(
      self._predictor.log_likelihoods(
        pairs,
        params=params,
        progress=_Progress(f'{name}: ranking', 'choices'),
      ).tolist()
    )
    for i in ranked:
      likelihoods[i] = tuple(next(found) for _ in one.choices[i])
      best = int(np.argmax(likelihoods[i]))  # the first of equal ones
      texts[i] = one.examples[i].choices[best]
    return make_result(
      one.task,
      self._config.evaluation.split,
      one.examples,
      [texts[i] for i in range(len(one.examples))],
      log_likelihoods=[
        likelihoods.get(i, ()) for i in range(len(one.examples))
      ],
      majority=one.majority,
    )


def make_result(
  task: AnswerTask,
  split: str,
  examples: Sequence[Example],
  texts: Sequence[str],
  *,
  log_likelihoods: Sequence[tuple[float, ...]] | None = None,
  majority: Majority | None = None,
) -> TaskResult:
  """Reads the answers from texts and scores them.

  Args:
    task: of the examples.
    split: whose examples they are.
    examples: those without a label are answered and not scored.
    texts: one for each.
    log_likelihoods: of choices, where they were ranked.
    majority: what they are held against.
  """
  answers = tuple(
    task.answer(text, example)
    for text, example in zip(texts, examples, strict=True)
  )
  labelled = any(example.labelled for example in examples)
  return TaskResult(
    task=task,
    split=split,
    examples=tuple(examples),
    texts=tuple(texts),
    answers=answers,
    log_likelihoods=tuple(log_likelihoods or [()] * len(examples)),
    metrics=task.metrics(answers, examples) if labelled else {},
    majority=majority,
  )


def _tell_lengths(
  where: str,
  examples: Sequence[Example],
  inputs: Sequence[Sequence[int]],
  choices: Sequence[Sequence[Sequence[int]]],
  data: DataConfig,
  vocabulary: Vocabulary,
) -> None:
  """Says how many examples there are, and what does not fit the lengths."""
  log.info('%s: %s examples', where, f'{len(examples):,}')
  most_in = data.inputs_length - 1 - data.insert_sentinels  # and the end
  most_out = data.targets_length - 1 - data.insert_sentinels
  cut = sum(len(ids) > most_in for ids in inputs)
  if cut:
    log.info(
      '%s: %s of the inputs are cut to %d tokens (DataConfig.inputs_length)',
      where,
      f'{cut:,}',
      data.inputs_length,
    )
  unlabelled = sum(not example.labelled for example in examples)
  if unlabelled:
    log.info('%s: %s have no label to score', where, f'{unlabelled:,}')
  targets = vocabulary.encode_batch([one.targets for one in examples])
  long = sum(
    any(len(ids) > most_out for ids in each or [target])
    for each, target in zip(choices, targets, strict=True)
  )
  if long:
    log.warning(
      '%s: %s examples have targets or choices of more than %d tokens, which '
      'are cut; raise DataConfig.targets_length',
      where,
      f'{long:,}',
      data.targets_length,
    )


class _Progress:
  """Says how far it is, at most every ten seconds."""

  def __init__(self, what: str, unit: str):
    self._what, self._unit = what, unit
    self._begin = self._last = time.monotonic()

  def __call__(self, done: int, count: int) -> None:
    now = time.monotonic()
    soon = now - self._last < _SECONDS_BETWEEN_LINES
    # The end is told of what took long enough to be told of.
    if soon and (done < count or self._last == self._begin):
      return
    self._last = now
    log.info(
      '%s: %s of %s %s, %.3g/s',
      self._what,
      f'{done:,}',
      f'{count:,}',
      self._unit,
      done / max(now - self._begin, 1e-9),
    )
