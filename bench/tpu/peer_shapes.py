# SPDX-License-Identifier: Apache-2.0
"""Text-only train steps in the shapes that MaxText was measured in, and what it took for them.

MaxText e591f30c (2026-08-22), unpatched and lightly tuned: jax 0.10.2, float32 weights, AdamW, rows
of 4096, the optimized program priced by the same cost model as ours (libtpu 0.0.52; 0.0.42.1 gives
the same within 0.5%).
"""

import dataclasses

from mm1_jax.configs.common import KEEP_DECODER

from mm1_jax.config import (
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
  VisionConfig,
)
from mm1_jax.plan.topology import Topology, find_topology

ALL = KEEP_DECODER  # no matrix product of a dense block twice


@dataclasses.dataclass(frozen=True)
class Step:
  """Predicted seconds: every operation at its roofline, the figure to quote, the compiler's own."""

  lower: float
  seconds: float
  upper: float


def text_only(
  decoder: DecoderConfig,
  topology: Topology,
  tokens: int,
  *,
  remat: str,
  accumulation_steps: int = 1,
  data: int = 1,
  expert: int = 1,
  depth: int | None = None,
) -> RunConfig:
  """Returns a run of `tokens` a chip; its encoder is small, frozen, and has no pictures to read."""
  chips = topology.num_devices
  decoder = dataclasses.replace(decoder, depth=depth or decoder.depth)
  return RunConfig(
    model=ModelConfig(
      vision=VisionConfig(width=chips, depth=1, num_heads=1, mlp_dim=chips),
      connector=ConnectorConfig(hidden=chips, depth=1),
      decoder=decoder,
      remat=remat,
    ),
    data=DataConfig(seq_len=4096, batch_size=tokens * chips // 4096, images_per_row=0),
    optimizer=OptimizerConfig(learning_rate=1e-4, frozen=("vit", "connector")),
    train=TrainConfig(accumulation_steps=accumulation_steps),
    mesh=MeshConfig(data=data, expert=expert),
  )


@dataclasses.dataclass(frozen=True)
class Shape:
  """A decoder on a slice, how we run it there, and MaxText's step."""

  decoder: DecoderConfig
  slice: str
  tokens: int  # a chip, in a step
  maxtext: Step
  maxtext_mfu: float
  remat: str = ALL
  accumulation_steps: int = 1
  data: int = 1  # groups of chips with params of their own
  expert: int = 1  # chips along the expert axis

  def run(self) -> RunConfig:
    return text_only(
      self.decoder,
      find_topology(self.slice),
      self.tokens,
      remat=self.remat,
      accumulation_steps=self.accumulation_steps,
      data=self.data,
      expert=self.expert,
    )


D30 = DecoderConfig(
  vocab_size=100352,
  width=7168,
  depth=48,
  num_heads=56,
  num_kv_heads=56,
  mlp_dim=19456,
  tie_embeddings=False,
)
L7B = DecoderConfig(
  vocab_size=32000,
  width=4096,
  depth=32,
  num_heads=32,
  num_kv_heads=32,
  mlp_dim=11008,
  tie_embeddings=False,
)
MIXTRAL = dataclasses.replace(
  L7B,
  num_kv_heads=8,
  mlp_dim=14336,
  moe=MoEConfig(num_experts=8, every=1, capacity_factor=None),
)
MOE64 = DecoderConfig(
  vocab_size=100352,
  width=2560,
  depth=24,
  num_heads=20,
  num_kv_heads=20,
  mlp_dim=10240,
  tie_embeddings=False,
  moe=MoEConfig(num_experts=64, every=2, capacity_factor=None),
)

SHAPES = {
  # Two micro-batches: what one keeps for its backward pass fits whole, and nothing is done twice.
  "d30_16k": Shape(D30, "v5p-128", 16384, Step(9.46, 10.51, 11.67), 0.654, accumulation_steps=2),
  "d30_8k": Shape(D30, "v5p-128", 8192, Step(4.97, 5.52, 6.14), 0.622),
  # 7168 / 256 rows of a gradient would be no whole tiles, and it would leave as an all-reduce.
  "d30_8k_256": Shape(D30, "v5p-512", 8192, Step(4.99, 5.91, 7.01), 0.581, data=2),
  "l7b": Shape(L7B, "v5p-128", 16384, Step(2.01, 2.36, 2.76), 0.649),
  "mixtral": Shape(
    MIXTRAL,
    "v5p-128",
    49152,
    Step(16.5, 17.7, 19.1),
    0.482,
    remat="qkv+attention+residual",
  ),
  "moe64": Shape(
    MOE64,
    "v5p-128",
    32768,
    Step(4.70, 5.04, 5.41),
    0.338,
    remat=f"{ALL}+expert_gate",
    expert=8,
  ),
}
