"""The child process of `bench peers` that runs a torch layer. No JAX here.

Started as `python -m st_moe.bench.torch_peers SETTINGS`, SETTINGS in JSON. The
first line it prints is {"ready": versions} or {"error": why}; after that it
reads {"mode": ..., "calls": n} lines and answers {"wall": s, "cpu": s}, seconds
of one call. It ends when its input does.

Layers are built with our widths and slots, in training mode, on random
inputs, and are differentiated like ours: sum(y * w) plus, where the layer
returns them, its router losses, with respect to the input and all weights.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def st_moe_pytorch_layer(settings: dict[str, Any]) -> torch.nn.Module:
  """Returns lucidrains' MoE, whose widths are given as a multiple of d_model.

  It has what ours has not: biases in the experts, a multiplicative one too.
  """
  from st_moe_pytorch import MoE

  d_model, d_ff = settings['d_model'], settings['d_ff']
  layer = MoE(
    dim=d_model,
    num_experts=settings['num_experts'],
    # Its hidden width is int(d_model * multiple * 2 / 3), rounded down.
    expert_hidden_mult=(d_ff + 0.25) * 1.5 / d_model,
    gating_top_n=settings['num_choices'],
    capacity_factor_train=settings['capacity_factor'],
    threshold_train=settings['threshold'],
    balance_loss_coef=settings['balance_loss_weight'],
    router_z_loss_coef=settings['z_loss_weight'],
  )
  first = next(p for p in layer.experts.parameters() if p.ndim == 2)
  if tuple(first.shape) != (2 * d_ff, d_model):
    raise ValueError(f'its experts are {tuple(first.shape)} wide')
  return layer


def hf_switch_layer(settings: dict[str, Any]) -> torch.nn.Module:
  """Returns transformers' Switch layer; it computes no losses itself."""
  from transformers import SwitchTransformersConfig
  from transformers.models.switch_transformers import (
    modeling_switch_transformers as switch,
  )

  return switch.SwitchTransformersSparseMLP(
    SwitchTransformersConfig(
      d_model=settings['d_model'],
      d_ff=settings['d_ff'],
      num_experts=settings['num_experts'],
      expert_capacity=settings['capacity'],
      router_jitter_noise=settings['jitter'],
      dropout_rate=0.0,
      # gelu_new is the tanh form, as ours.
      dense_act_fn={'gelu': 'gelu_new'}.get(
        settings['activation'], settings['activation']
      ),
    )
  )


class BareMatmuls(torch.nn.Module):
  """The experts' matrix products alone, on ready buffers [E, rows, D].

  Attributes:
    input_shape: of the buffers.
  """

  def __init__(self, settings: dict[str, Any]):
    super().__init__()
    experts, d_model, d_ff = (
      settings[name] for name in ('num_experts', 'd_model', 'd_ff')
    )
    rows = settings['groups'] * settings['capacity']
    self.input_shape = experts, rows, d_model

    def kernel(inputs, outputs):
      values = torch.randn(experts, inputs, outputs) * inputs**-0.5
      return torch.nn.Parameter(values)

    self._gated = settings['gated']
    self._activation = _ACTIVATIONS[settings['activation']]
    self.wi = torch.nn.ParameterList(
      kernel(d_model, d_ff) for _ in range(1 + self._gated)
    )
    self.wo = kernel(d_ff, d_model)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps [E, rows, D]."""
    hidden = self._activation(torch.bmm(x, self.wi[0]))
    if self._gated:
      hidden = hidden * torch.bmm(x, self.wi[1])
    return torch.bmm(hidden, self.wo)


_ACTIVATIONS = {
  'gelu': functools.partial(torch.nn.functional.gelu, approximate='tanh'),
  'relu': torch.nn.functional.relu,
  'silu': torch.nn.functional.silu,
}

LAYERS: dict[str, Callable[[dict[str, Any]], torch.nn.Module]] = {
  'bare matmuls, torch': BareMatmuls,
  'st-moe-pytorch': st_moe_pytorch_layer,
  'hf-switch': hf_switch_layer,
}


class Timer:
  """A torch layer, its input, and the two modes in which it is called."""

  def __init__(self, settings: dict[str, Any]):
    """Builds the layer and calls it once in each mode."""
    torch.set_num_threads(settings['threads'])
    torch.manual_seed(settings['seed'])
    self._layer = LAYERS[settings['peer']](settings).train()
    dtype = getattr(torch, settings['dtype'])
    self._layer.to(dtype)
    shape = getattr(
      self._layer,
      'input_shape',
      (settings['groups'], settings['group_size'], settings['d_model']),
    )
    self._x = torch.randn(shape, dtype=dtype, requires_grad=True)
    self._weights = torch.randn(shape)
    self._calls = {
      'forward': self._forward,
      'forward+backward': self._backward,
    }
    for call in self._calls.values():
      call()

  def _apply(self) -> tuple[torch.Tensor, Any]:
    output = self._layer(self._x)
    if isinstance(output, torch.Tensor):
      return output, 0.0
    return output.outputs, output.total_aux_loss

  def _forward(self) -> Any:
    with torch.no_grad():
      return self._apply()

  def _backward(self) -> torch.Tensor:
    self._x.grad = None
    self._layer.zero_grad(set_to_none=True)
    y, losses = self._apply()
    loss = (y.float() * self._weights).sum() + losses
    loss.sum().backward()
    return self._x.grad

  def measure(self, mode: str, calls: int) -> dict[str, float]:
    """Returns the seconds of one call, by the clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
      self._calls[mode]()
    return {
      'wall': (time.perf_counter() - wall) / calls,
      'cpu': (time.process_time() - cpu) / calls,
    }


def _answer(value: dict[str, Any]) -> None:
  print(json.dumps(value), flush=True)


def main() -> None:
  """Answers requests until there are no more."""
  try:
    timer = Timer(json.loads(sys.argv[1]))
  # Whatever a foreign layer dislikes is its reason not to be compared.
  except Exception as e:
    _answer({'error': f'{type(e).__name__}: {e}'})
    return
  _answer({'ready': {'torch': torch.__version__}})
  for line in sys.stdin:
    request = json.loads(line)
    _answer(timer.measure(request['mode'], request['calls']))


if __name__ == '__main__':
  main()
