"""What devices could reach: FLOP/s in bfloat16, by JAX's name of the device."""

# bfloat16 products without sparsity, FLOP/s of one JAX device, by a part of
# its device_kind; the first that fits. TPU: cloud.google.com/tpu/docs/v4, v5e,
# v5p, v6e (a chip; on v4 and v5p JAX shows a chip as one device) and tpu7x (a
# chip is two devices). NVIDIA: data sheets of A100, H100, H200 and the DGX B200
# (their dense numbers); PCIe and NVL boards are slower than SXM ones.
PEAK_FLOPS = (
  ('tpu7x', 1153.5e12),
  ('tpu v6', 918e12),
  ('tpu v5p', 459e12),
  ('tpu v5 lite', 197e12),
  ('tpu v5e', 197e12),
  ('tpu v5', 459e12),
  ('tpu v4', 275e12),
  ('b200', 2250e12),
  ('h200 nvl', 835.5e12),
  ('h200', 989.5e12),
  ('h100 nvl', 835.5e12),
  ('h100 pcie', 756e12),
  ('h100', 989.5e12),
  ('a100', 312e12),
)


def peak_flops(device_kind: str) -> float | None:
  """Returns the FLOP/s a device could reach in bfloat16; None if not known."""
  kind = device_kind.lower()
  return next((peak for name, peak in PEAK_FLOPS if name in kind), None)
