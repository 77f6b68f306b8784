"""A run: its optimizer, data and mesh, and its rhythm."""

import dataclasses
from typing import Any, Literal

from st_moe.checks import Checked
from st_moe.config.evaluation import EvaluationConfig
from st_moe.config.health import HealthConfig
from st_moe.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
  """Adafactor as the paper used it, or AdamW, and a schedule."""

  name: Literal['adafactor', 'adamw'] = 'adafactor'
  # Which parameters are trained: 'all', 'non_moe', 'moe', 'attention', 'ffn'
  # (Figure 5), or regular expressions of their names. The others stay as they
  # are and have no optimizer state.
  trainable: tuple[str, ...] | str = 'all'
  # 'rsqrt': learning_rate / sqrt(max(step, warmup_steps)), T5's; flat, then
  # decaying. 'constant'. 'linear' and 'cosine': a linear ramp over
  # warmup_steps, then down to end_learning_rate at the last step.
  schedule: Literal['rsqrt', 'constant', 'linear', 'cosine'] = 'rsqrt'
  learning_rate: float = 1.0
  end_learning_rate: float = 0.0
  warmup_steps: int = 10000
  # Added to the step that the schedule sees: a run that starts from weights of
  # step N goes on with their schedule, not with its beginning.
  schedule_offset: int = 0
  # The step at which 'linear' and 'cosine' end; None: the run's last.
  decay_steps: int | None = None
  max_grad_norm: float | None = None  # global norm; None: no clipping
  weight_decay: float = 0.0

  # Adafactor. `clipping_threshold` clips updates, not gradients (Table 4).
  clipping_threshold: float | None = 1.0
  decay_rate: float = 0.8
  epsilon1: float = 1e-30
  epsilon2: float = 1e-3
  factored: bool = True
  min_dim_size_to_factor: int = 128
  multiply_by_parameter_scale: bool = True
  # False: one clip and one scale over all experts of a layer (Mesh
  # TensorFlow). True: one for each expert (T5X).
  experts_as_batch_axis: bool = False

  # Momentum. None: none in Adafactor, as in the paper; 0.9 in AdamW.
  beta1: float | None = None
  beta2: float = 0.999
  epsilon: float = 1e-8

  def check(self) -> None:
    self.require_positive(
      'learning_rate decay_steps max_grad_norm clipping_threshold '
      'decay_rate epsilon1 epsilon min_dim_size_to_factor'
    )
    self.require_nonnegative(
      'end_learning_rate warmup_steps schedule_offset weight_decay epsilon2'
    )
    self.require_rate('beta1 beta2')
    self.require(
      self.schedule not in ('linear', 'cosine')
      or self.decay_steps is None
      or self.decay_steps > self.warmup_steps,
      f'decay_steps {self.decay_steps} must exceed warmup_steps '
      f'{self.warmup_steps}',
    )

  def check_length(self, steps: int) -> None:
    """Raises UserError when the schedule does not fit a run of `steps`."""
    self.require(
      self.schedule not in ('linear', 'cosine')
      or self.decay_steps is not None
      or self.warmup_steps < steps + self.schedule_offset,
      f"warmup_steps {self.warmup_steps} of the '{self.schedule}' schedule "
      f'must be below the {steps} steps of the run; lower '
      'OptimizerConfig.warmup_steps, or train longer',
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
  """What to read, how to tokenize it, and how long the features are."""

  # A registered seqio task or mixture, or one of ours: 'docstrings' (the
  # offline corpus), 'text' and 'c4_json' (need `files`), 'c4' and 'mc4'
  # (tfds), 'cache' (needs `cache_dir`).
  task: str = 'docstrings'
  files: tuple[str, ...] | str = ()  # files, globs or directories
  # Held-out files; () holds out every `holdout_every`-th document instead.
  eval_files: tuple[str, ...] | str = ()
  holdout_every: int = 50
  document: Literal['line', 'paragraph'] = 'line'  # of a text file
  max_line_bytes: int = 10_000_000
  tfds_data_dir: str | None = None
  cache_dir: str | None = None  # made by `st_moe cache`
  # Folders in which `seqio_cache_tasks` left the caches of registered tasks;
  # where given, these are read in the place of the tasks' sources.
  seqio_cache_dirs: tuple[str, ...] | str = ()
  # Tasks with answers ('superglue.cb'): the folder with the files that their
  # authors publish; None: `tfds_data_dir` has what tfds prepared.
  task_dir: str | None = None
  # A mixture of them takes each in proportion to its examples, counted up to
  # this many (paper, section 6.1); None: all of them (T5).
  max_examples_per_task: int | None = 65536
  # Sentinels behind their inputs and before their targets (section 4.7).
  insert_sentinels: int = 0
  train_split: str = 'train'
  eval_split: str = 'validation'

  # 'byte', the path of a SentencePiece model, or 'auto': a model of
  # `auto_vocabulary_size` pieces trained on the training text, then kept.
  vocabulary: str = 'auto'
  auto_vocabulary_size: int = 2048
  extra_ids: int = 100  # sentinels

  objective: Literal['span_corruption', 'prefix_lm', 'none'] = 'span_corruption'
  noise_density: float = 0.15
  mean_noise_span_length: float = 3.0
  inputs_length: int = 512
  targets_length: int = 114
  pack: bool = False
  shuffle: bool = True

  @property
  def lengths(self) -> dict[str, int]:
    """Tokens of a row in each stack."""
    return {'encoder': self.inputs_length, 'decoder': self.targets_length}

  def check(self) -> None:
    self.require_positive(
      'inputs_length targets_length mean_noise_span_length max_line_bytes '
      'auto_vocabulary_size max_examples_per_task'
    )
    self.require_nonnegative('extra_ids insert_sentinels')
    self.require(
      self.insert_sentinels <= self.extra_ids,
      f'insert_sentinels is {self.insert_sentinels}, and there are '
      f'{self.extra_ids} extra_ids',
    )
    self.require(
      self.holdout_every >= 2,
      f'holdout_every must be >= 2, got {self.holdout_every}',
    )
    self.require(
      0 < self.noise_density < 1,
      f'noise_density must be in (0, 1), got {self.noise_density}',
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
  """Devices as a (slice, data, expert, model) mesh; -1 means "the rest".

  A slice is what a fast network joins: a TPU slice, a node of GPUs. Across
  slices go only gradients, once a step, unless `fsdp_slices` says otherwise.
  """

  slice: int = 0  # 0: as many as the TPU job has, otherwise 1
  data: int = -1
  expert: int = 1
  model: int = 1
  axis_types: Literal['auto', 'explicit'] = 'auto'
  # FSDP: parameters and optimizer state are stored in parts, also over these
  # axes, and gathered where they are used.
  fsdp_dense: bool = False
  # None: the larger of the two. XLA adds up whole gradients over both.
  fsdp_dense_axes: tuple[Literal['data', 'expert'], ...] | None = None
  fsdp_experts: bool = False  # over 'data'
  # Those over 'slice' too: a fraction of the memory, half as much again to send
  # between slices, some of it at every layer.
  fsdp_slices: bool = False

  def check(self) -> None:
    self.require_nonnegative('slice')
    sizes = (self.data, self.expert, self.model)
    self.require(
      all(n == -1 or n > 0 for n in sizes) and sizes.count(-1) <= 1,
      f'axes must be positive, at most one of them -1; got {sizes}',
    )
    self.require(
      self.fsdp_experts or not self.fsdp_slices,
      'fsdp_slices stores experts in parts between slices too; set '
      'fsdp_experts = True with it',
    )
    axes = self.fsdp_dense_axes
    self.require(
      axes is None or 0 < len(axes) == len(set(axes)),
      f'fsdp_dense_axes names no axis, or one twice: {axes}',
    )


@dataclasses.dataclass(frozen=True)
class RunConfig(Checked):
  """One training run: its parts and its rhythm."""

  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  health: HealthConfig = HealthConfig()

  steps: int = 1000
  batch_size: int = 128  # sequences, over all devices
  microbatches: int = 1  # gradient accumulation: parts of a batch
  seed: int = 0

  # A run may start from given weights: the path of a model directory, of
  # another run, or of a directory of checkpoints, read while the run has no
  # checkpoint of its own.
  initial_checkpoint: str | None = None
  # Which of its steps; None: the newest.
  initial_step: int | Literal['best'] | None = None
  # 'fresh': a new optimizer and step 0. 'slots': its statistics go on, with
  # their own count of updates, in a run and a schedule that begin at step 0
  # (Table 20). 'carried': they and the step of those weights go on, as in T5X.
  initial_optimizer: Literal['fresh', 'slots', 'carried'] = 'fresh'

  log_every: int = 10  # steps
  eval_every: int = 1000
  # Held-out batches for losses, at most. Those of a mixture are drawn at its
  # rates, and end where one task has no more; metrics count all examples.
  eval_batches: int = 20
  checkpoint_every: int = 1000
  keep_last: int = 2
  keep_best: int = 1  # by `best_metric`
  # The score that says which step is the best, as metrics.jsonl names it: of a
  # loss the lowest, of any other the highest, of equals the earliest. 'auto':
  # 'eval/score', the mean over tasks with answers, where there are any, else
  # 'eval/loss'. '': none. The best is saved when it is found.
  best_metric: str = 'auto'
  # The run ends after this many evaluations without a better one; None: never.
  early_stopping: int | None = None
  # Evaluations before this step do not count as such (Keras' start_from_epoch):
  # at first a model learns the form of answers, and scores stand still.
  early_stopping_from: int = 0
  # A step whose loss or gradients are not finite changes nothing; after this
  # many in a row the run stops itself (exit status 3).
  max_nonfinite_steps: int = 10
  tensorboard: bool = True

  # What a run shows at its end.
  num_samples: int = 5  # masked sentences, filled
  unigram_batches: int = 200  # training batches counted for the baseline

  def check(self) -> None:
    self.require_positive(
      'steps batch_size microbatches log_every eval_every eval_batches '
      'checkpoint_every keep_last max_nonfinite_steps unigram_batches '
      'early_stopping'
    )
    self.require_nonnegative('seed keep_best num_samples early_stopping_from')
    if self.initial_step != 'best':
      self.require_nonnegative('initial_step')
    self.require(
      self.early_stopping is None or self.best_metric != '',
      f'early_stopping {self.early_stopping} needs a best_metric to wait for',
    )
    self.require(
      self.early_stopping is not None or not self.early_stopping_from,
      f'early_stopping_from {self.early_stopping_from} needs early_stopping',
    )
    self.require(
      self.initial_checkpoint is not None
      or (self.initial_step is None and self.initial_optimizer == 'fresh'),
      'initial_step and initial_optimizer need initial_checkpoint',
    )
    self.require(
      self.batch_size % self.microbatches == 0,
      f'batch_size {self.batch_size} is not divisible by microbatches '
      f'{self.microbatches}',
    )
    self.optimizer.check_length(self.steps)


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a configuration as nested plain values, ready for JSON."""
  return dataclasses.asdict(config)
