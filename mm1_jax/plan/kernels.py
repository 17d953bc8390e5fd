# SPDX-License-Identifier: Apache-2.0
"""What a Pallas kernel costs: the compiler does not estimate its time, so it is modelled here.

Attention kernels and grouped matrix products are known by name, and their FLOPs follow from their
operands; of any other kernel, the cost estimate that it was given counts, else its bytes.
"""

import dataclasses
import re

from mm1_jax.plan.hlo import Computation, Instruction, Shape

ATTENTION_EFFICIENCY = 0.55  # of the bf16 peak: splash attention on v5p and v5e
GROUPED_EFFICIENCY = 0.85  # megablox with 512-row tiles on v5p
_TILE = 512  # rows of a grouped product's tile, unless the kernel says
_FLOATS = ("bf16", "f32")


@dataclasses.dataclass(frozen=True)
class KernelCost:
  flops: float  # that the kernel has to do, diagonal blocks and partly filled tiles included
  bytes: float  # operands and results
  efficiency: float  # of the peak
  source: str  # where the FLOPs come from


def kernel_cost(
  instruction: Instruction, computation: Computation, grouped_rows: int | None = None
) -> KernelCost:
  """Returns the cost of a `tpu_custom_call`.

  A grouped product works on all rows of its operands, or on the first `grouped_rows` of them:
  tiles that belong to no group are skipped, but a program does not say how many there are.
  """
  name = f"{instruction.op_name} {instruction.name}"
  operands = [x.shapes[0] for x in computation.operands(instruction) if len(x.shapes) == 1]
  estimate = _estimate(instruction.attributes)
  num_bytes = max(
    estimate.get("bytes_accessed", 0.0),
    instruction.bytes + sum(x.bytes for x in computation.operands(instruction)),
  )
  if re.search(r"splash|flash|attention.*mha|mqa", name):
    flops = _attention_flops(name, instruction.attributes, operands)
    if flops:
      return KernelCost(flops, num_bytes, ATTENTION_EFFICIENCY, "attention")
  elif re.search(r"gmm|megablox|ragged_dot|grouped_matmul", name):
    flops = _grouped_flops(instruction.shapes, operands, grouped_rows)
    if flops:
      return KernelCost(flops, num_bytes, GROUPED_EFFICIENCY, "grouped matmul")
  flops = estimate.get("flops", 0.0)
  source = "its own estimate" if flops else "bytes only"
  return KernelCost(flops, num_bytes, ATTENTION_EFFICIENCY, source)


def _estimate(attributes: str) -> dict[str, float]:
  match = re.search(r'"cost_estimate":\s*\{([^}]*)\}', attributes)
  pairs = re.findall(r'"(\w+)":\s*"?(-?[0-9.eE+]+)"?', match[1]) if match else []
  return {key: max(0.0, float(value)) for key, value in pairs}


def _attention_flops(name: str, attributes: str, operands: list[Shape]) -> float:
  """Returns the FLOPs of causal attention over q, k, v of [..., heads, positions, head dim].

  Matrix products: forward 2 (q k, p v); gradient of q 3 (q k, do v, ds k); of k and v 4, or 5 where
  one kernel makes all three. Half of the square, and the other half of the diagonal's blocks.
  """
  heads = [
    x for x in operands if x.dtype in _FLOATS and len(x.dims) in (3, 4) and min(x.dims[-2:]) >= 32
  ]
  if len(heads) < 3:
    return 0.0
  q, k, v = heads[:3]
  if "dkv" in name:
    products, suffix = 5 if "fused" in name else 4, "_dkv"
  elif re.search(r"(?<![a-z])_?dq", name):
    products, suffix = 3, "_dq"
  else:
    products, suffix = 2, ""
  blocks = re.findall(rf'\\?"block_(?:q|kv){suffix}\\?": (\d+)', attributes)
  positions = k.dims[-2]
  visited = min(1.0, 0.5 + 0.5 * max(map(int, blocks), default=_TILE) / positions)
  mean_dim = (q.dims[-1] + v.dims[-1]) / 2
  return 2.0 * products * (q.size / q.dims[-1]) * positions * mean_dim * visited


def _grouped_flops(results: list[Shape], operands: list[Shape], filled: int | None) -> float:
  """Returns the FLOPs of [m, k] x [e, k, n] -> [m, n], or of its gradient [k, m] x [m, n].

  A tile at the border of two groups is computed for both.
  """
  arrays = [x for x in operands if len(x.dims) >= 2 and x.dtype in _FLOATS]
  result = max(results, key=lambda x: x.size)
  flat = [x for x in arrays if len(x.dims) == 2]
  if len(result.dims) == 3 and len(flat) >= 2:
    groups = result
    rows = max(set(flat[0].dims) & set(flat[1].dims), default=0)
  elif len(result.dims) == 2:
    groups = next((x for x in arrays if len(x.dims) == 3), None)
    rows = result.dims[0]
  else:
    return 0.0
  if groups is None or not rows:
    return 0.0
  rows = min(rows, filled or rows)
  borders = (groups.dims[0] - 1) * _TILE / rows
  return 2.0 * rows * groups.dims[1] * groups.dims[2] * (1 + borders)
