"""What is timed: the sizes of a sparse layer, from flags and gin.

Letters: G groups, S tokens per group, E experts, C capacity, K choices,
D d_model, F d_ff.
"""

import argparse
import dataclasses

from st_moe.config import Activation, ModelConfig, RouterConfig
from st_moe.errors import UserError
from st_moe.routing import expert_capacity

DEFAULT_TOKENS = 2048

# Flag --activation: two for a gated FFN.
_ACTIVATIONS: dict[str, tuple[Activation, ...]] = {
  'geglu': ('gelu', 'linear'),
  'reglu': ('relu', 'linear'),
  'swiglu': ('silu', 'linear'),
  'gelu': ('gelu',),
  'relu': ('relu',),
  'silu': ('silu',),
}


@dataclasses.dataclass(frozen=True)
class LayerSize:
  """One sparse layer and the tokens that go through it.

  Attributes:
    tokens: in the batch, all real.
    group_size: S.
    d_model: D.
    d_ff: F, of one expert.
    num_experts: E.
    activations: one, or two for a gated expert.
    dtype: of the experts' arithmetic.
    router: every other setting; its group_size is `group_size`.
    init_scale: variance of the kernels.
  """

  tokens: int
  group_size: int
  d_model: int
  d_ff: int
  num_experts: int
  activations: tuple[Activation, ...]
  dtype: str
  router: RouterConfig
  init_scale: float

  @property
  def groups(self) -> int:
    """G."""
    return self.tokens // self.group_size

  @property
  def capacity(self) -> int:
    """C in training."""
    return expert_capacity(
      self.router, self.group_size, self.num_experts, train=True
    )

  @property
  def slots(self) -> int:
    """Rows of all experts' buffers, E x G x C."""
    return self.num_experts * self.groups * self.capacity

  @property
  def choices(self) -> int:
    """K."""
    expert_choice = self.router.kind == 'expert_choice'
    return self.num_experts if expert_choice else self.router.num_choices

  def matmul_flops(self, rows: int, mode: str) -> float:
    """Returns the FLOPs of the experts' matrix products over `rows` rows.

    2 D F for each row and kernel; backward twice as much.

    Args:
      rows: of all experts together.
      mode: 'forward' or 'forward+backward'.
    """
    kernels = len(self.activations) + 1
    forward = 2.0 * rows * self.d_model * self.d_ff * kernels
    return forward if mode == 'forward' else 3 * forward

  def __str__(self) -> str:
    return (
      f'E {self.num_experts}, top-{self.choices}, {self.tokens} tokens in '
      f'groups of {self.group_size}, C {self.capacity}, d_model '
      f'{self.d_model}, d_ff {self.d_ff}, {"*".join(self.activations)}, '
      f'{self.dtype}'
    )


def layer_sizes(
  args: argparse.Namespace, model: ModelConfig
) -> list[LayerSize]:
  """Returns the layers that the flags ask for, experts first, then groups.

  Args:
    args: of `bench layer` or `bench peers`; None where not given.
    model: gives what the flags do not; its encoder's router is taken.

  Raises:
    UserError: for sizes that do not divide or make no layer.
  """
  tokens = DEFAULT_TOKENS if args.tokens is None else args.tokens
  for name in ('tokens', 'd_model', 'd_ff', 'n', 'rounds'):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise UserError(f'--{name} must be positive, got {value}')
  router = model.encoder_router
  groups = args.group_size or [min(router.group_size or tokens, tokens)]
  activations = model.expert_activations or model.mlp_activations
  if args.activation is not None:
    activations = _ACTIVATIONS[args.activation]
  changed = {
    'num_choices': args.n,
    'train_capacity_factor': args.capacity_factor,
  }
  changed = {k: v for k, v in changed.items() if v is not None}
  sizes = []
  for experts in args.experts or [model.num_experts]:
    for group in groups:
      sizes.append(
        LayerSize(
          tokens=tokens,
          group_size=group,
          d_model=args.d_model or model.d_model,
          d_ff=args.d_ff or model.expert_d_ff or model.d_ff,
          num_experts=experts,
          activations=activations,
          dtype=args.dtype or model.activation_dtype,
          router=dataclasses.replace(router, group_size=group, **changed),
          init_scale=model.init_scale,
        )
      )
  for size in sizes:
    _check(size)
  return sizes


def _check(size: LayerSize) -> None:
  if size.num_experts < 1:
    raise UserError(
      'bench needs a sparse layer, and ModelConfig.num_experts is 0; give '
      '--experts'
    )
  if size.tokens % size.group_size:
    raise UserError(
      f'{size.tokens} tokens are not divisible by groups of '
      f'{size.group_size}; change --tokens or --group_size'
    )
  if size.choices > size.num_experts:
    raise UserError(
      f'top-{size.choices} needs at least {size.choices} experts, got '
      f'{size.num_experts}; change --n or --experts'
    )
  if size.router.word_embedding != 'none':
    raise UserError(
      f'RouterConfig.word_embedding {size.router.word_embedding!r} needs a '
      "whole model; set it to 'none' here, or use `st_moe bench step`"
    )
