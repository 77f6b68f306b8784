"""The architecture: sizes, experts, numerics, and how it is computed."""

import dataclasses
from typing import Literal

from st_moe.checks import Checked
from st_moe.config.router import RouterConfig

Activation = Literal['gelu', 'relu', 'silu', 'linear']


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
  decoder_sparse_placement: str | int | None = None  # None: as above
  encoder_router: RouterConfig = RouterConfig()
  decoder_router: RouterConfig = RouterConfig()
  # How tokens travel to experts and back (experts/). 'ragged' has no capacity
  # and drops nothing; 'auto' takes the faster of the other two.
  dispatch: Literal['auto', 'einsum', 'gather', 'ragged'] = 'auto'

  layer_norm_epsilon: float = 1e-6
  layer_norm_scale: bool = True  # False: Table 2, no learned scale
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  # One table of position biases for a stack, or one for each of its layers
  # (scanned T5X models, umT5).
  relative_position_biases: Literal['shared', 'per_layer'] = 'shared'
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
  # Superblocks per iteration of the scan. On CPU without rematerialization one
  # costs up to 0.8 of a step more, all of them nothing (LOG.md, 2026-11-29).
  scan_unroll: int = 1
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
      buckets >= 4,
      f'relative_attention_num_buckets must be at least 4, got {buckets}',
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
    first = [
      self._check_placement('sparse_placement', self.num_encoder_layers),
      self._check_placement(
        'sparse_placement'
        if self.decoder_sparse_placement is None
        else 'decoder_sparse_placement',
        self.num_decoder_layers,
      ),
    ]
    self.require(
      not self.num_experts or any(first),
      f'num_experts is {self.num_experts}, but no FFN is sparse with '
      f'sparse_placement {self.sparse_placement!r} and sparse_every '
      f'{self.sparse_every} in stacks of {self.num_encoder_layers} and '
      f'{self.num_decoder_layers}; num_experts = 0 makes a dense model',
    )
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

  def _check_placement(self, name: str, depth: int) -> bool:
    """Checks a placement; returns whether any layer of the stack is sparse."""
    every, placement = self.sparse_every, getattr(self, name)
    if isinstance(placement, int):
      self.require(
        0 <= placement < every,
        f'{name} {placement} is no index below sparse_every {every}',
      )
      first = placement
    elif placement in ('t5x', 'hf'):
      first = every - 1 if placement == 't5x' else min(1, every - 1)
    else:
      self.require(
        bool(placement) and set(placement) <= set('ds'),
        f"{name} must be 't5x', 'hf', an index, or a pattern of 'd' "
        f"(dense) and 's' (sparse); got {placement!r}",
      )
      self.require(
        depth % len(placement) == 0,
        f'{name} {placement!r} of {len(placement)} layers does not divide a '
        f'stack of {depth}',
      )
      first = placement.find('s')
    return 0 <= first < depth
