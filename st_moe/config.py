"""Every setting of a run, as frozen dataclasses.

One class per concern. Defaults are the paper's (ST-MoE, arXiv 2202.08906) or,
where the paper is silent, T5.1.1's. Building one checks the type and the range
of every field; nothing here knows of gin, JAX or TensorFlow.

Letters used in comments: G groups, S tokens per group, E experts, C capacity
(slots per expert and group), K choices per token, B sequences per batch.
"""

import dataclasses
from typing import Any, Literal

from st_moe.checks import Checked

Activation = Literal['gelu', 'relu', 'silu', 'linear']
ChoicePolicy = Literal['all', 'none', 'threshold', 'random']


@dataclasses.dataclass(frozen=True)
class RouterConfig(Checked):
  """How tokens choose experts, and what surrounds the experts.

  Names every choice in which implementations differ. The defaults are the
  paper's; `ROUTER_PRESETS` holds those of T5X and of Hugging Face.
  """

  # Who chooses: tokens their experts, or experts their tokens.
  kind: Literal['token_choice', 'expert_choice'] = 'token_choice'
  num_choices: int = 2  # K, n of the paper's top-n

  # Slots per expert and group. 'tokens': S * CF / E, whatever K (Mesh
  # TensorFlow, the paper). 'assignments': S * K * CF / E (V-MoE and most
  # others). 'fixed': `fixed_capacity` (Hugging Face).
  train_capacity_factor: float = 1.25
  eval_capacity_factor: float = 2.0
  capacity_formula: Literal['tokens', 'assignments', 'fixed'] = 'tokens'
  capacity_rounding: Literal['floor', 'round', 'ceil'] = 'floor'
  min_expert_capacity: int = 4  # Mesh TensorFlow moe.py
  fixed_capacity: int | None = None

  # Evaluate without a capacity: every choice that the policy keeps is computed,
  # and an example's output does not depend on its neighbours. Decoding always
  # does so. The paper evaluates with eval_capacity_factor.
  eval_dropless: bool = False

  # Tokens per group, before rounding to whole groups; None: one sequence.
  group_size: int | None = 2048

  # Gates over the K choices: renormalised before any drop (the paper), after
  # the drops, or raw probabilities. One choice is never renormalised before.
  gate_normalization: Literal['before_drop', 'after_drop', 'none'] = (
    'before_drop'
  )

  # Choices 2..K: kept always, never, above a threshold, or with probability
  # min(1, gate / threshold) (appendix G). Evaluation is deterministic here:
  # the paper's code draws at evaluation too.
  train_choice_policy: ChoicePolicy = 'random'
  eval_choice_policy: ChoicePolicy = 'threshold'
  train_choice_threshold: float = 0.2
  eval_choice_threshold: float = 0.2

  # Who gets a slot first: by position in the group, or by probability
  # (batch-prioritised routing, appendix D; encoders only).
  priority: Literal['position', 'probability'] = 'position'

  jitter: float = 0.0  # router input times U[1 - jitter, 1 + jitter], training

  # 'first_choice': equations 7-9 over first choices of real tokens.
  # 'switch': the released Switch code, whose hard counts include padding.
  # 'all_choices': T5X, every selected expert counts (uniform routing gives K).
  balance_loss: Literal['first_choice', 'switch', 'all_choices'] = (
    'first_choice'
  )
  balance_loss_weight: float = 0.01
  # Appendix J. Mesh TensorFlow: 0.5 times its loss_coef of 0.01.
  second_choice_loss_weight: float = 0.0
  z_loss_weight: float = 0.001  # equations 5 and 6
  loss_reduction: Literal['sum', 'mean'] = 'sum'  # over sparse layers

  # Whether padding is kept out of routing, capacity and losses.
  mask_padding: bool = True
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  # Word embeddings given to the router (appendix C).
  word_embedding: Literal[
    'none', 'concat', 'concat_stop_grad', 'add', 'add_stop_grad', 'embed_only'
  ] = 'none'

  # The ordinary FFN beside each sparse layer (Table 16), the learned bias
  # inside the experts (Table 17), dropout on expert hidden units (Figure 4).
  extra_ffn: Literal['after', 'before', 'none'] = 'after'
  expert_bias: Literal['none', 'additive', 'multiplicative'] = 'none'
  expert_dropout_rate: float | None = None  # None: the model's dropout_rate

  def check(self) -> None:
    self.require_positive(
      'num_choices train_capacity_factor eval_capacity_factor group_size '
      'fixed_capacity'
    )
    self.require_nonnegative(
      'min_expert_capacity balance_loss_weight '
      'second_choice_loss_weight z_loss_weight train_choice_threshold '
      'eval_choice_threshold'
    )
    self.require(
      (self.capacity_formula == 'fixed') == (self.fixed_capacity is not None),
      "fixed_capacity is given if and only if capacity_formula = 'fixed'",
    )
    self.require(
      self.second_choice_loss_weight == 0 or self.num_choices > 1,
      'second_choice_loss_weight needs num_choices >= 2',
    )
    self.require_rate('jitter expert_dropout_rate')
    self.require(
      not self.eval_dropless or self.kind != 'expert_choice',
      "eval_dropless needs kind = 'token_choice': experts that choose take as "
      'many tokens as they have slots; group_size = None keeps sequences apart',
    )
    for mode in ('train', 'eval'):
      self.require(
        getattr(self, f'{mode}_choice_policy') != 'random'
        or getattr(self, f'{mode}_choice_threshold') > 0,
        f"{mode}_choice_policy 'random' needs {mode}_choice_threshold > 0",
      )


ROUTER_PRESETS: dict[str, RouterConfig] = {
  # Mesh TensorFlow 0.1.21 moe.py and the paper's equations.
  'paper': RouterConfig(),
  # flaxformer/T5X st_moe_*.gin: raw gates, every second choice, rounding to
  # nearest, padding routed, losses averaged over layers.
  't5x': RouterConfig(
    capacity_rounding='round',
    gate_normalization='none',
    train_choice_policy='all',
    eval_choice_policy='all',
    balance_loss='all_choices',
    loss_reduction='mean',
    mask_padding=False,
    group_size=4096,
  ),
  # transformers >= 5.18 SwitchTransformers: one choice, a fixed number of
  # slots per sequence, jitter, both loss weights 0.001.
  'hf_switch': RouterConfig(
    num_choices=1,
    capacity_formula='fixed',
    fixed_capacity=64,
    min_expert_capacity=0,
    group_size=None,
    gate_normalization='none',
    train_choice_policy='all',
    eval_choice_policy='all',
    jitter=0.01,
    balance_loss_weight=0.001,
    mask_padding=False,
    extra_ffn='none',
  ),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
  """A T5.1.1 encoder-decoder in which every n-th FFN is sparse."""

  vocab_size: int = 32128  # rows of the embedding; >= the vocabulary's ids
  d_model: int = 512
  d_ff: int = 1024
  d_kv: int = 64  # per head
  num_heads: int = 6
  num_encoder_layers: int = 8
  num_decoder_layers: int = 8
  mlp_activations: tuple[Activation, ...] = ('gelu', 'linear')  # GEGLU

  # Experts. `num_experts = 0` makes a dense model.
  num_experts: int = 32
  expert_d_ff: int | None = None  # None: d_ff
  expert_activations: tuple[Activation, ...] | None = None  # None: as the MLP
  # Which FFNs are sparse, in each run of `sparse_every` blocks: 't5x' the
  # last (3, 7, 11, ...), 'hf' the second (1, 5, 9, ...), an index inside the
  # run, or a pattern of 'd' and 's' repeated over the stack ('ddds').
  sparse_every: int = 4
  sparse_placement: str | int = 't5x'
  encoder_router: RouterConfig = RouterConfig()
  decoder_router: RouterConfig = RouterConfig()
  # How tokens travel to experts and back (experts/). 'ragged' has no capacity
  # and drops nothing; 'auto' takes the faster of the other two.
  dispatch: Literal['auto', 'einsum', 'gather', 'ragged'] = 'auto'

  layer_norm_epsilon: float = 1e-6
  layer_norm_scale: bool = True  # False: Table 2, no learned scale
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  tie_embeddings: bool = False  # T5.1.1 unties; T5 1.0 and Switch tie
  dropout_rate: float = 0.0
  init_scale: float = 1.0  # variance of FFN, expert and router kernels

  output_z_loss_weight: float = 1e-4
  attention_z_loss_weight: float = 0.0  # footnote 4
  # Cross entropy is divided by the real target tokens (T5X) or by all target
  # positions, padding too (Mesh TensorFlow).
  loss_normalization: Literal['real_tokens', 'all_tokens'] = 'real_tokens'

  activation_dtype: Literal['float32', 'bfloat16'] = 'float32'
  scan_layers: bool = False
  scan_unroll: int = 1  # superblocks per iteration of the scan
  # What a block keeps for its backward pass: everything, matrix products
  # only, or nothing.
  remat_policy: Literal['none', 'dots_saveable', 'full'] = 'none'

  def check(self) -> None:
    self.require_positive(
      'vocab_size d_model d_ff d_kv num_heads num_encoder_layers '
      'num_decoder_layers expert_d_ff sparse_every '
      'relative_attention_num_buckets relative_attention_max_distance '
      'layer_norm_epsilon scan_unroll init_scale'
    )
    self.require_nonnegative(
      'num_experts output_z_loss_weight attention_z_loss_weight'
    )
    self.require_rate('dropout_rate')
    buckets = self.relative_attention_num_buckets
    self.require(
      buckets >= 4 and buckets % 2 == 0,
      f'relative_attention_num_buckets must be even and >= 4, got {buckets}',
    )
    self.require(
      self.relative_attention_max_distance > buckets // 2,
      f'relative_attention_max_distance '
      f'{self.relative_attention_max_distance} must exceed half of '
      f'relative_attention_num_buckets {buckets}',
    )
    for name in ('mlp_activations', 'expert_activations'):
      value = getattr(self, name)
      self.require(
        value is None or len(value) in (1, 2),
        f'{name} holds one activation, or two for a gated FFN; got {value}',
      )
    self._check_placement()
    if not self.num_experts:
      return
    for stack in ('encoder', 'decoder'):
      router = getattr(self, f'{stack}_router')
      self.require(
        router.num_choices <= self.num_experts,
        f'{stack}/RouterConfig.num_choices {router.num_choices} exceeds '
        f'num_experts {self.num_experts}',
      )
    self.require(
      self.dispatch != 'ragged' or self.encoder_router.kind != 'expert_choice',
      "dispatch = 'ragged' needs encoder/RouterConfig.kind = 'token_choice': "
      "experts that choose take as many tokens as they have slots; use 'auto'",
    )
    # A causal decoder must not look at later tokens (appendix D).
    self.require(
      self.decoder_router.kind != 'expert_choice',
      "decoder/RouterConfig.kind = 'expert_choice' lets a token's route "
      "depend on later tokens; use 'token_choice' in the decoder",
    )
    self.require(
      self.decoder_router.priority != 'probability',
      "decoder/RouterConfig.priority = 'probability' lets a token's route "
      "depend on later tokens; use 'position' in the decoder",
    )

  def _check_placement(self) -> None:
    every, placement = self.sparse_every, self.sparse_placement
    depths = (self.num_encoder_layers, self.num_decoder_layers)
    if isinstance(placement, int):
      self.require(
        0 <= placement < every,
        f'sparse_placement {placement} is no index below sparse_every {every}',
      )
      first = placement
    elif placement in ('t5x', 'hf'):
      first = every - 1 if placement == 't5x' else min(1, every - 1)
    else:
      self.require(
        bool(placement) and set(placement) <= set('ds'),
        "sparse_placement must be 't5x', 'hf', an index, or a pattern of 'd' "
        f"(dense) and 's' (sparse); got {placement!r}",
      )
      for depth in depths:
        self.require(
          depth % len(placement) == 0,
          f'sparse_placement {placement!r} of {len(placement)} layers does not '
          f'divide a stack of {depth}',
        )
      first = placement.find('s')
    self.require(
      not self.num_experts or 0 <= first < max(depths),
      f'num_experts is {self.num_experts}, but no FFN is sparse with '
      f'sparse_placement {placement!r} and sparse_every {every} in stacks of '
      f'{depths[0]} and {depths[1]}; num_experts = 0 makes a dense model',
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
  """Adafactor as the paper used it, or AdamW, and a schedule."""

  name: Literal['adafactor', 'adamw'] = 'adafactor'
  # 'rsqrt': learning_rate / sqrt(max(step, warmup_steps)), T5's; flat, then
  # decaying. 'constant'. 'linear' and 'cosine': a linear ramp over
  # warmup_steps, then down to end_learning_rate at the last step.
  schedule: Literal['rsqrt', 'constant', 'linear', 'cosine'] = 'rsqrt'
  learning_rate: float = 1.0
  end_learning_rate: float = 0.0
  warmup_steps: int = 10000
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
      'end_learning_rate warmup_steps weight_decay epsilon2'
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
      or self.warmup_steps < steps,
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
      'auto_vocabulary_size'
    )
    self.require_nonnegative('extra_ids')
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
  slices go only gradients, once a step.
  """

  slice: int = 0  # 0: as many as the TPU job has, otherwise 1
  data: int = -1
  expert: int = 1
  model: int = 1
  axis_types: Literal['auto', 'explicit'] = 'auto'
  # FSDP: parameters and optimizer state are stored in parts, also over these
  # axes, and gathered where they are used.
  fsdp_dense: bool = False
  fsdp_dense_axes: tuple[Literal['data', 'expert'], ...] = ('data', 'expert')
  fsdp_experts: bool = False  # over 'data'

  def check(self) -> None:
    self.require_nonnegative('slice')
    sizes = (self.data, self.expert, self.model)
    self.require(
      all(n == -1 or n > 0 for n in sizes) and sizes.count(-1) <= 1,
      f'axes must be positive, at most one of them -1; got {sizes}',
    )
    axes = self.fsdp_dense_axes
    self.require(
      0 < len(axes) == len(set(axes)),
      f'fsdp_dense_axes names no axis, or one twice: {axes}',
    )


@dataclasses.dataclass(frozen=True)
class RunConfig(Checked):
  """One training run: its parts and its rhythm."""

  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()

  steps: int = 1000
  batch_size: int = 128  # sequences, over all devices
  microbatches: int = 1  # gradient accumulation: parts of a batch
  seed: int = 0

  log_every: int = 10  # steps
  eval_every: int = 1000
  eval_batches: int = 20
  checkpoint_every: int = 1000
  keep_last: int = 2
  keep_best: int = 1  # by held-out loss
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
      'checkpoint_every keep_last max_nonfinite_steps unigram_batches'
    )
    self.require_nonnegative('seed keep_best num_samples')
    self.require(
      self.batch_size % self.microbatches == 0,
      f'batch_size {self.batch_size} is not divisible by microbatches '
      f'{self.microbatches}',
    )
    self.optimizer.check_length(self.steps)


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a configuration as nested plain values, ready for JSON."""
  return dataclasses.asdict(config)
