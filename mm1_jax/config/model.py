# SPDX-License-Identifier: Apache-2.0
"""The model: image encoder, connector, decoder, and how they are computed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Literal

from mm1_jax.config.group import Group, require
from mm1_jax.config.mesh import FSDP_AXES, divides
from mm1_jax.ranges import Count, CountOrZero, NormEps, Positive, PositiveOrZero, Range

LORA_MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
MOST_PARAMS = 10**13  # 20 times those of MM1's largest; a mistyped size would be compiled for hours
REMAT_NAMES = (
  "qkv",  # queries, keys and values, rotated
  "attention",  # its heads' outputs, with the softmax's normaliser
  "residual",  # the stream between attention and feed-forward network
  "mlp_gate",
  "mlp_up",
  "vit_mlp_up",  # the encoder's; the names before the MLP's are shared
  "expert_gate",
  "expert_up",
)


@dataclasses.dataclass(frozen=True)
class VisionConfig(Group, where="model.vision."):
  """ViT image encoder, CLIP-compatible (MM1 section 3.1: ViT-H/14 at 378 pixels)."""

  image_size: tuple[Count, Count] = (378, 378)  # height, width in pixels
  patch_size: Count = 14  # pixels of a side
  width: Count = 1280  # of the stream between blocks (D)
  depth: Count = 32  # blocks
  num_heads: Count = 16  # each of width / num_heads
  mlp_dim: Count = 5120  # hidden width of a block's MLP (F)
  activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"  # of the MLP
  class_token: bool = True  # one more position, which the connector does not read
  pre_norm: bool = True  # CLIP's ln_pre, before the first block
  norm_eps: NormEps = 1e-5  # of layer norms
  # Grid the learned positions are stored at; bicubically resized to the image's own grid.
  position_grid: tuple[Count, Count] = (27, 27)
  # Block whose output is the feature: -1 the last block, -2 the one before it, ...
  feature_layer: Annotated[int, Range(at_least=-(2**31), at_most=-1)] = -1

  @property
  def grid(self) -> tuple[int, int]:
    """Patches down and across an image."""
    return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

  @property
  def num_patches(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def num_blocks(self) -> int:
    """Blocks that are built and run: none past the feature layer."""
    return self.depth + 1 + self.feature_layer

  def _check(self) -> None:
    for side in self.image_size:
      require(
        side % self.patch_size == 0,
        f"model.vision.image_size {self.image_size} must be a multiple of patch_size "
        f"{self.patch_size} on both sides: {max(1, side // self.patch_size) * self.patch_size} "
        f"or {(side // self.patch_size + 1) * self.patch_size} would fit.",
      )
    require(
      self.width % self.num_heads == 0,
      f"model.vision.width {self.width} must be a multiple of num_heads {self.num_heads}.",
    )
    require(
      -self.depth <= self.feature_layer,
      f"model.vision.feature_layer {self.feature_layer} must lie in [-{self.depth}, -1].",
    )


@dataclasses.dataclass(frozen=True)
class ConnectorConfig(Group, where="model.connector."):
  """Vision-language connector (MM1 section 3.2; C-Abstractor of Honeybee, arXiv 2312.06742)."""

  # How patch features become tokens; `linear` and `mlp` make one token of each patch.
  kind: Literal["c_abstractor", "average_pool", "attention_pool", "linear", "mlp"] = "c_abstractor"
  # Tokens down and across; 8x8, 12x12 and 16x16 in the papers.
  token_grid: tuple[Count, Count] = (12, 12)
  hidden: Count = 1024  # C-Abstractor's convolution width, attention pool's query width
  depth: Count = 3  # RegNet blocks in each of the C-Abstractor's two stages
  mlp_depth: Count = 2  # layers of the read-out
  num_heads: Count = 16  # attention pool only

  @property
  def num_tokens(self) -> int:
    """Decoder positions an image takes (T), without its delimiters."""
    return self.token_grid[0] * self.token_grid[1]

  def _check(self) -> None:
    require(
      self.kind != "attention_pool" or self.hidden % self.num_heads == 0,
      f"model.connector.hidden {self.hidden} must be a multiple of num_heads {self.num_heads}.",
    )


@dataclasses.dataclass(frozen=True)
class MoEConfig(Group, where="model.decoder.moe."):
  """Sparse feed-forward layers (MM1 section 3.4: top-2 gating, GShard and ST-MoE losses)."""

  num_experts: Count = 64  # of each sparse layer (E)
  every: Count = 2  # the last layer of every group of this many is sparse
  top_k: Count = 2  # experts of a token
  # Slots per expert and row = capacity_factor * top_k * S / num_experts.
  capacity_factor: Annotated[float, Range(above=0, none="drops no token")] | None = 2.0
  # Dropless over an `expert` axis: rows that a chip has room for, relative to an even load. Where
  # one chip gets more, that layer takes its tokens in rounds: slower, but nothing is dropped.
  exchange_factor: Annotated[float, Range(at_least=1)] = 1.5
  balance_loss: PositiveOrZero = 0.01  # weight of the load-balance loss
  router_z_loss: PositiveOrZero = 0.001  # weight of the router's z-loss

  def _check(self) -> None:
    require(
      self.top_k <= self.num_experts,
      f"model.decoder.moe.top_k {self.top_k} must lie in [1, num_experts = {self.num_experts}].",
    )


@dataclasses.dataclass(frozen=True)
class RopeScaling(Group, where="model.decoder.rope_scaling."):
  """Llama 3.1's stretch of RoPE's slow frequencies to longer contexts (arXiv 2407.21783, 3.4.1).

  Wavelengths above original_positions / low_freq_factor grow by `factor`, those below
  original_positions / high_freq_factor stay, and those between are interpolated.
  """

  factor: Annotated[float, Range(at_least=1)] = 8.0  # of the longest wavelengths
  low_freq_factor: Positive = 1.0  # sets from which wavelength on all is stretched
  high_freq_factor: Positive = 4.0  # sets up to which wavelength nothing is
  original_positions: Count = 8192  # that the model was first trained with

  def _check(self) -> None:
    require(
      self.low_freq_factor < self.high_freq_factor,
      f"model.decoder.rope_scaling.low_freq_factor {self.low_freq_factor} must be below "
      f"high_freq_factor {self.high_freq_factor}.",
    )


@dataclasses.dataclass(frozen=True)
class LoRAConfig(Group, where="model.decoder.lora."):
  """Adapters of the decoder's matrices, which are not trained themselves (arXiv 2106.09685)."""

  rank: Count = 16  # columns of A, rows of B
  alpha: Positive = 32.0  # the product of the adapters counts alpha / rank
  matrices: tuple[str, ...] = LORA_MATRICES  # that have adapters

  def _check(self) -> None:
    require(bool(self.matrices), "model.decoder.lora.matrices is empty; name one, or no lora.")
    for name in self.matrices:
      require(
        name in LORA_MATRICES and self.matrices.count(name) == 1,
        f"model.decoder.lora.matrices {self.matrices} must be some of {LORA_MATRICES}, each once.",
      )


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Group, where="model.decoder."):
  """Decoder-only LLM: pre-RMSNorm, RoPE, GQA, SwiGLU, no biases but Qwen 2's."""

  vocab_size: Count = 49152  # rows of the embedding (V); at least the tokenizer's ids
  width: Count = 3072  # of the stream between layers (D)
  depth: Count = 26  # layers
  num_heads: Count = 24  # of queries (H)
  num_kv_heads: Count = 8  # of keys and values (K); fewer than num_heads is GQA
  head_dim: Count = 128  # even, for RoPE
  mlp_dim: Count = 8064  # hidden width of SwiGLU, and of each expert (F)
  rope_theta: Annotated[float, Range(above=1)] = 1e4  # base of RoPE's wavelengths
  rope_scaling: RopeScaling | None = None  # None leaves the wavelengths as they are
  norm_eps: NormEps = 1e-5  # of RMS norms
  qk_norm: bool = False  # RMS norm of queries and keys, as in Qwen 3
  qkv_bias: bool = False  # biases of queries, keys and values, as in Qwen 2
  tie_embeddings: bool = True  # the head is the embedding, transposed
  moe: MoEConfig | None = None  # None is a dense decoder
  lora: LoRAConfig | None = None  # trains these adapters instead of the decoder's own params

  @property
  def layers_per_unit(self) -> int:
    """Layers in the repeating unit that the decoder scans over."""
    return self.moe.every if self.moe else 1

  def _check(self) -> None:
    require(
      self.num_heads % self.num_kv_heads == 0,
      f"model.decoder.num_heads {self.num_heads} must be a multiple of num_kv_heads "
      f"{self.num_kv_heads}.",
    )
    require(self.head_dim % 2 == 0, f"model.decoder.head_dim {self.head_dim} must be even (RoPE).")
    require(
      self.depth % self.layers_per_unit == 0,
      f"model.decoder.depth {self.depth} must be a multiple of moe.every {self.layers_per_unit}: "
      f"{self.depth - self.depth % self.layers_per_unit} or "
      f"{self.depth + -self.depth % self.layers_per_unit} would fit.",
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Group, where="model."):
  """The three parts, and how they are computed."""

  vision: VisionConfig = VisionConfig()
  connector: ConnectorConfig = ConnectorConfig()
  decoder: DecoderConfig = DecoderConfig()
  image_token_id: CountOrZero = 4  # the tokenizer's `<image>` id; checked when that is loaded
  dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the computation; params are float32
  # What the backward pass keeps of a block: all ("none"), matmul outputs ("dots"), its input alone
  # ("full"), or its input and what is named, such as "qkv+attention+host:mlp_up"; see REMAT_NAMES.
  # What is kept on the host crosses PCIe twice.
  remat: str = "full"
  scan: bool = True  # False unrolls blocks and groups: slower to compile, easier to debug
  # Slots whose pictures a chip encodes at a time; of such groups, those without any picture on any
  # chip are left out. None encodes all slots at once: best where most are filled, as on a pod, for
  # each group gathers the encoder's weights.
  image_group: Count | None = None

  def check_mesh(self, sizes: Mapping[str, int]) -> None:
    """Checks that the params divide over a mesh with axes of these lengths.

    Raises:
      ConfigError: naming the number that does not divide, and by what it must.
    """
    decoder, vision, tensor = self.decoder, self.vision, sizes["tensor"]
    weights, fsdp = math.prod(sizes[a] for a in FSDP_AXES), " x ".join(FSDP_AXES)
    divides("model.decoder.width", decoder.width, fsdp, weights)
    divides("model.vision.width", vision.width, fsdp, weights)
    divides("model.connector.hidden", self.connector.hidden, fsdp, weights)
    for name in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size"):
      divides(f"model.decoder.{name}", getattr(decoder, name), "tensor", tensor)
    for name in ("num_heads", "mlp_dim"):
      divides(f"model.vision.{name}", getattr(vision, name), "tensor", tensor)
    if decoder.moe:
      experts = decoder.moe.num_experts
      divides("model.decoder.moe.num_experts", experts, "expert", sizes["expert"])
      split = tensor * sizes["fsdp"] * sizes["sequence"]
      divides("model.decoder.mlp_dim", decoder.mlp_dim, "tensor x fsdp x sequence", split)

  def _check(self) -> None:
    self._check_size()
    whole = self.remat in ("none", "dots", "full")
    for name in () if whole else self.remat.split("+"):
      require(
        name.removeprefix("host:") in REMAT_NAMES,
        f"model.remat '{self.remat}' names '{name}'; it must be none, dots, full, or some of these "
        f"joined by +, with host: before those to keep on the host: {', '.join(REMAT_NAMES)}.",
      )
    patches, tokens = self.vision.grid, self.connector.token_grid
    pooled = self.connector.kind not in ("linear", "mlp")
    require(
      pooled or patches == tokens,
      f"model.connector.kind '{self.connector.kind}' keeps one token per patch, so token_grid "
      f"{tokens} must equal the patch grid {patches}.",
    )
    require(
      all(t <= p for t, p in zip(tokens, patches, strict=True)),
      f"model.connector.token_grid {tokens} is finer than the encoder's patch grid {patches}; "
      f"use at most {patches}, or a larger model.vision.image_size.",
    )
    require(
      self.image_token_id < self.decoder.vocab_size,
      f"model.image_token_id {self.image_token_id} must lie in [0, vocab_size = "
      f"{self.decoder.vocab_size}).",
    )

  def _check_size(self) -> None:
    """Refuses what nothing has room for, by the largest matrices of each part."""
    decoder, vision = self.decoder, self.vision
    experts = decoder.moe.num_experts if decoder.moe else 1
    sizes = {
      "model.vision depth, width and mlp_dim": vision.depth * vision.width * vision.mlp_dim,
      "model.connector hidden": self.connector.hidden**2,
      "model.decoder depth, width, mlp_dim and experts": (
        decoder.depth * decoder.width * decoder.mlp_dim * experts
      ),
      "model.decoder depth, width, num_heads and head_dim": (
        decoder.depth * decoder.width * decoder.num_heads * decoder.head_dim
      ),
      "model.decoder vocab_size and width": decoder.vocab_size * decoder.width,
    }
    for names, num in sizes.items():
      require(num <= MOST_PARAMS, f"{names} would make over {MOST_PARAMS:.0e} params ({num:.1e}).")
