"""What transformers makes of the fixed batch, in a process of its own.

`python -m st_moe.convert.hf_reference DIR BATCH OUT [CAPACITY]` reads a model
of transformers, runs it in float32 and writes its outputs. torch and the model
are then in that process's memory and not in the converter's.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

# The first version whose Switch Transformers drop tokens as they should.
OLDEST = (5, 18)
_OF_TORCH = 500 << 20  # bytes that it takes beside the model


def why_absent(num_bytes: int) -> str | None:
  """Returns why there is no reference here; None: there is one.

  Args:
    num_bytes: of the model in float32, which transformers holds as a whole.
  """
  if importlib.util.find_spec('torch') is None:
    return 'torch is not installed'
  try:
    version = importlib.metadata.version('transformers')
  except importlib.metadata.PackageNotFoundError:
    return 'transformers is not installed'
  if tuple(int(part) for part in version.split('.')[:2]) < OLDEST:
    return f'transformers {version} is older than {OLDEST[0]}.{OLDEST[1]}'
  needed, free = num_bytes + _OF_TORCH, _available()
  if free is not None and needed > free:
    return (
      f'transformers needs {needed / 1e9:.3g} GB of memory, and '
      f'{free / 1e9:.3g} GB are free'
    )
  return None


def _available() -> int | None:
  """Returns the bytes that Linux can give to a new process; None elsewhere."""
  try:
    lines = Path('/proc/meminfo').read_text().splitlines()
  except OSError:
    return None
  found = [line.split() for line in lines if line.startswith('MemAvailable:')]
  return int(found[0][1]) * 1024 if found else None


def run_in_child(
  folder: Path, batch: dict[str, np.ndarray], capacity: int | None
) -> dict[str, np.ndarray] | str:
  """Returns 'encoded' and 'logits' of a model of transformers, or an error.

  Args:
    folder: of the model.
    batch: as `fixed_batch.make_batch` returns it.
    capacity: slots per expert, of a Switch Transformer; None: its own.
  """
  with tempfile.TemporaryDirectory() as scratch:
    inputs, outputs = Path(scratch) / 'batch.npz', Path(scratch) / 'out.npz'
    np.savez(inputs, **batch)
    command = [sys.executable, '-m', __name__, folder, inputs, outputs]
    if capacity is not None:
      command.append(str(capacity))
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
      lines = child.stderr.strip().splitlines() or ['no message']
      return f'exit status {child.returncode}: {lines[-1]}'
    return dict(np.load(outputs))


def _main(folder: str, inputs: str, outputs: str, *capacity: str) -> None:
  import torch
  import transformers

  torch.set_num_threads(2)
  settings = {'expert_capacity': int(capacity[0])} if capacity else {}
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
    folder, dtype=torch.float32, **settings
  ).eval()
  batch = {name: torch.tensor(x) for name, x in np.load(inputs).items()}
  tokens = batch['encoder_input_tokens'].long()
  targets = batch['decoder_target_tokens']
  with torch.no_grad():
    found = model(
      input_ids=tokens,
      attention_mask=(tokens > 0).long(),
      decoder_input_ids=batch['decoder_input_tokens'].long(),
      decoder_attention_mask=(targets > 0).long(),
    )
  np.savez(
    outputs,
    encoded=found.encoder_last_hidden_state.numpy(),
    logits=found.logits.numpy(),
  )


if __name__ == '__main__':
  _main(*sys.argv[1:])
