# SPDX-License-Identifier: Apache-2.0
"""Frozen configuration: every default, every range, every cross-field rule, and nothing else.

`configs/*.py` write an `ml_collections.ConfigDict`; `RunConfig.from_dict` turns its plain dict into
the dataclasses below. No code past this point looks a key up by name or supplies a default. The
type of each number says in which range it must lie, see `ranges.py`.

  RunConfig > ModelConfig > VisionConfig, ConnectorConfig, DecoderConfig > MoEConfig, LoRAConfig
            > DataConfig > SourceConfig
            > OptimizerConfig, TrainConfig, CheckpointConfig, MeshConfig
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from mm1_jax import ranges
from mm1_jax.ranges import (
  Count,
  CountOrZero,
  Decay,
  Fraction,
  NormEps,
  Positive,
  PositiveOrZero,
  Range,
  Seed,
)

PARTS = ("vit", "connector", "decoder")
Axis = Annotated[int, Range(at_least=-1, below=2**31)]  # -1 takes what is left
MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp", "expert")  # that rows are split over
FSDP_AXES = ("fsdp", "expert", "sequence")  # that dense weights are split over, beside `tensor`
ADAMW_FIELDS = ("b1", "b2", "eps", "moment_dtype")
ADAFACTOR_FIELDS = ("clipping_threshold", "multiply_by_parameter_scale")
LORA_MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
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


class UserError(ValueError):
  """What a user can mend; the message says what is wrong and what to do."""


class ConfigError(UserError):
  """A mistake in a config; the message names the key, its value and what would fit."""


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def _divides(key: str, value: int, axes: str, size: int) -> None:
  """Checks that field `key` divides over mesh axes whose lengths multiply to `size`."""
  below = value - value % size
  fits = f"{below} or {below + size}" if below else f"{size}"
  _require(
    value % size == 0,
    f"{key} {value} does not divide over mesh axes {axes} = {size}; {fits} would fit.",
  )


class _Group:
  """Settings that belong together, checked however they are made: by number, then `_check`."""

  _where: str  # prefix of a field's name in messages; names fields in braces

  def __init_subclass__(cls, *, where: str):
    cls._where = where

  def __post_init__(self):
    for message in ranges.outside(self, self._where.format(**vars(self))):
      raise ConfigError(message)
    self._check()

  def _check(self) -> None:
    """Raises a ConfigError if fields do not fit together."""


@dataclasses.dataclass(frozen=True)
class VisionConfig(_Group, where="model.vision."):
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
      _require(
        side % self.patch_size == 0,
        f"model.vision.image_size {self.image_size} must be a multiple of patch_size "
        f"{self.patch_size} on both sides: {max(1, side // self.patch_size) * self.patch_size} "
        f"or {(side // self.patch_size + 1) * self.patch_size} would fit.",
      )
    _require(
      self.width % self.num_heads == 0,
      f"model.vision.width {self.width} must be a multiple of num_heads {self.num_heads}.",
    )
    _require(
      -self.depth <= self.feature_layer,
      f"model.vision.feature_layer {self.feature_layer} must lie in [-{self.depth}, -1].",
    )


@dataclasses.dataclass(frozen=True)
class ConnectorConfig(_Group, where="model.connector."):
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
    _require(
      self.kind != "attention_pool" or self.hidden % self.num_heads == 0,
      f"model.connector.hidden {self.hidden} must be a multiple of num_heads {self.num_heads}.",
    )


@dataclasses.dataclass(frozen=True)
class MoEConfig(_Group, where="model.decoder.moe."):
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
    _require(
      self.top_k <= self.num_experts,
      f"model.decoder.moe.top_k {self.top_k} must lie in [1, num_experts = {self.num_experts}].",
    )


@dataclasses.dataclass(frozen=True)
class RopeScaling(_Group, where="model.decoder.rope_scaling."):
  """Llama 3.1's stretch of RoPE's slow frequencies to longer contexts (arXiv 2407.21783, 3.4.1).

  Wavelengths above original_positions / low_freq_factor grow by `factor`, those below
  original_positions / high_freq_factor stay, and those between are interpolated.
  """

  factor: Annotated[float, Range(at_least=1)] = 8.0  # of the longest wavelengths
  low_freq_factor: Positive = 1.0  # sets from which wavelength on all is stretched
  high_freq_factor: Positive = 4.0  # sets up to which wavelength nothing is
  original_positions: Count = 8192  # that the model was first trained with

  def _check(self) -> None:
    _require(
      self.low_freq_factor < self.high_freq_factor,
      f"model.decoder.rope_scaling.low_freq_factor {self.low_freq_factor} must be below "
      f"high_freq_factor {self.high_freq_factor}.",
    )


@dataclasses.dataclass(frozen=True)
class LoRAConfig(_Group, where="model.decoder.lora."):
  """Adapters of the decoder's matrices, which are not trained themselves (arXiv 2106.09685)."""

  rank: Count = 16  # columns of A, rows of B
  alpha: Positive = 32.0  # the product of the adapters counts alpha / rank
  matrices: tuple[str, ...] = LORA_MATRICES  # that have adapters

  def _check(self) -> None:
    _require(bool(self.matrices), "model.decoder.lora.matrices is empty; name one, or no lora.")
    for name in self.matrices:
      _require(
        name in LORA_MATRICES and self.matrices.count(name) == 1,
        f"model.decoder.lora.matrices {self.matrices} must be some of {LORA_MATRICES}, each once.",
      )


@dataclasses.dataclass(frozen=True)
class DecoderConfig(_Group, where="model.decoder."):
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
    _require(
      self.num_heads % self.num_kv_heads == 0,
      f"model.decoder.num_heads {self.num_heads} must be a multiple of num_kv_heads "
      f"{self.num_kv_heads}.",
    )
    _require(self.head_dim % 2 == 0, f"model.decoder.head_dim {self.head_dim} must be even (RoPE).")
    _require(
      self.depth % self.layers_per_unit == 0,
      f"model.decoder.depth {self.depth} must be a multiple of moe.every {self.layers_per_unit}: "
      f"{self.depth - self.depth % self.layers_per_unit} or "
      f"{self.depth + -self.depth % self.layers_per_unit} would fit.",
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Group, where="model."):
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
    _divides("model.decoder.width", decoder.width, fsdp, weights)
    _divides("model.vision.width", vision.width, fsdp, weights)
    _divides("model.connector.hidden", self.connector.hidden, fsdp, weights)
    for name in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size"):
      _divides(f"model.decoder.{name}", getattr(decoder, name), "tensor", tensor)
    for name in ("num_heads", "mlp_dim"):
      _divides(f"model.vision.{name}", getattr(vision, name), "tensor", tensor)
    if decoder.moe:
      experts = decoder.moe.num_experts
      _divides("model.decoder.moe.num_experts", experts, "expert", sizes["expert"])
      split = tensor * sizes["fsdp"] * sizes["sequence"]
      _divides("model.decoder.mlp_dim", decoder.mlp_dim, "tensor x fsdp x sequence", split)

  def _check(self) -> None:
    whole = self.remat in ("none", "dots", "full")
    for name in () if whole else self.remat.split("+"):
      _require(
        name.removeprefix("host:") in REMAT_NAMES,
        f"model.remat '{self.remat}' names '{name}'; it must be none, dots, full, or some of these "
        f"joined by +, with host: before those to keep on the host: {', '.join(REMAT_NAMES)}.",
      )
    patches, tokens = self.vision.grid, self.connector.token_grid
    pooled = self.connector.kind not in ("linear", "mlp")
    _require(
      pooled or patches == tokens,
      f"model.connector.kind '{self.connector.kind}' keeps one token per patch, so token_grid "
      f"{tokens} must equal the patch grid {patches}.",
    )
    _require(
      all(t <= p for t, p in zip(tokens, patches, strict=True)),
      f"model.connector.token_grid {tokens} is finer than the encoder's patch grid {patches}; "
      f"use at most {patches}, or a larger model.vision.image_size.",
    )
    _require(
      self.image_token_id < self.decoder.vocab_size,
      f"model.image_token_id {self.image_token_id} must lie in [0, vocab_size = "
      f"{self.decoder.vocab_size}).",
    )


@dataclasses.dataclass(frozen=True)
class SourceConfig(_Group, where="data source '{name}': "):
  """One stream of records, or a group of them that shares its weight out."""

  name: str  # in metrics and overrides; of a group's source "GROUP/NAME"
  path: str = ""  # glob of ArrayRecord shards; a group has none
  # Share (see `data.weight_by`), relative to the others of its group; 0 waits for `data.reweight`.
  weight: PositiveOrZero = 1.0
  sources: tuple["SourceConfig", ...] = ()  # of a group
  epochs: Positive | None = None  # after so many the source leaves the mixture; None is endless
  limit: Count | None = None  # use so many of its examples, picked at random
  seed: Seed = 0  # another one gives another order, and another pick

  def _check(self) -> None:
    where = f"data source '{self.name}'"
    _require(
      bool(self.path) != bool(self.sources),
      f"{where} has {'both' if self.path else 'neither'} 'path' {'and' if self.path else 'nor'} "
      f"'sources'; a source has a path, a group has sources.",
    )
    used = [k for k in ("epochs", "limit") if getattr(self, k) is not None]
    _require(
      not (self.sources and used),
      f"{where} is a group and has no {' and '.join(used)} of its own; set them for its sources.",
    )


@dataclasses.dataclass(frozen=True)
class ReweightConfig(_Group, where="data.reweight at step {step}: "):
  """New weights for sources and groups, from a step on; those not named keep theirs."""

  step: Count  # before the first of these, the sources' own weights hold
  # By name, such as "captions", or "captions/web" in it.
  weights: tuple[tuple[str, PositiveOrZero], ...]


@dataclasses.dataclass(frozen=True)
class TilingConfig(_Group, where="data.tiling."):
  """Pictures cut into sub-images of the encoder's size (MM1 section 4.1, MM1.5 section 4.5)."""

  # Rows and columns of every picture: MM1 has (2, 2). None chooses for each picture a grid of
  # `min_tiles` to `max_tiles` sub-images, as MM1.5 does.
  grid: tuple[Count, Count] | None = None
  min_tiles: Count = 4  # fewest sub-images, where `grid` is None
  max_tiles: Count = 9  # MM1.5 trains with 9 and answers with up to 16
  overview: Literal["last", "first", "none"] = "last"  # place of the whole picture, made small
  # Text before the sub-images: (image, row, column), or separators of columns and rows.
  marks: Literal["none", "index", "separators"] = "none"
  max_images: Count = 2  # pictures of an example with more are not cut
  last: CountOrZero | None = None  # cut just so many pictures, the last, however many there are

  @property
  def max_slots(self) -> int:
    """Image slots that a picture takes at most."""
    num = self.grid[0] * self.grid[1] if self.grid else self.max_tiles
    return num + (self.overview != "none" and num > 1)

  def _check(self) -> None:
    _require(
      self.min_tiles <= self.max_tiles,
      f"data.tiling.min_tiles {self.min_tiles} is above max_tiles {self.max_tiles}.",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(_Group, where="data."):
  """What is trained on, and how rows are filled."""

  sources: tuple[SourceConfig, ...] = ()  # the mixture, as a tree; `leaves` has it flat
  # What weights are shares of. The papers' fine-tuning draws examples; from the mean lengths of
  # each source's examples follow its shares of positions.
  weight_by: Literal["positions", "examples"] = "positions"
  reweight: tuple[ReweightConfig, ...] = ()  # by ascending step
  eval_sources: tuple[SourceConfig, ...] = ()  # held out; each is evaluated whole, on its own
  tokenizer: str = ""  # SentencePiece model file
  seq_len: Count = 4096  # positions in a row (S)
  batch_size: Count = 512  # rows in a global batch (B)
  images_per_row: CountOrZero = 16  # image slots of a row (N)
  # How a picture gets the encoder's size: out of shape, or whole, with a border.
  image_fit: Literal["squash", "pad"] = "squash"
  tiling: TilingConfig | None = None  # of high-resolution pictures; None leaves them whole
  max_image_pixels: Count = 64_000_000  # a picture of more is dropped before it is decoded
  image_delimiters: bool = True  # <image_start>, <image_end> around an image's run
  # Rows of all sources, or each row of one source, as MM1 has it.
  packing: Literal["joint", "per_source"] = "joint"
  chat: bool = False  # conversations: generation then puts a prompt in the chat template
  chat_template: str = "default"  # or vicuna, llama3, chatml, or a file; see `data/template.py`
  window_rows: Count = 128  # rows that are packed together; more fill better and shuffle further
  # Processes that decode images; 0 decodes in the training process.
  num_workers: Annotated[int, Range(at_least=0, at_most=4096)] = 0
  prefetch_batches: Count = 2  # made ahead, whatever the number of workers; all are in host memory
  max_drop_fraction: Fraction = 0.05  # of examples lost to unreadable images before the run stops
  seed: Seed = 0  # of the order of examples

  @functools.cached_property
  def leaves(self) -> tuple[SourceConfig, ...]:
    """The sources of all groups, named like "captions/web"; weights are shares at step 0."""
    return tuple(
      dataclasses.replace(source, name=path, weight=share)
      for (path, source), share in zip(_leaves(self.sources), self.shares(0), strict=True)
    )

  def shares(self, step: int) -> tuple[float, ...]:
    """Returns what share each of the leaves has at a step, of what `weight_by` says; 1 in all.

    A group whose sources all have weight 0 leaves its share to the others.
    """
    weights = {path: source.weight for path, source in _nodes(self.sources)}
    for change in self.reweight:
      if change.step <= step:
        weights |= dict(change.weights)
    shares = tuple(_shares(self.sources, weights, 1.0))
    return tuple(share / (sum(shares) or 1.0) for share in shares)

  def _check(self) -> None:
    for kind in ("sources", "eval_sources"):
      _check_names(getattr(self, kind), f"data.{kind}")
    for source in self.eval_sources:
      where = f"data.eval_sources.{source.name}"
      _require(not source.sources, f"{where} is a group; name its sources there instead.")
      _require(
        source.epochs is None and source.limit is None,
        f"{where} has epochs or a limit, but is evaluated whole, up to train.eval_batches.",
      )
    _require(
      self.tiling is None or self.tiling.marks == "none" or self.chat,
      "data.tiling.marks needs data.chat: documents are cut at texts, which would part a picture.",
    )
    self._check_reweight()

  def _check_reweight(self) -> None:
    names = [path for path, _ in _nodes(self.sources)]
    steps = [change.step for change in self.reweight]
    _require(
      steps == sorted(set(steps)), f"data.reweight has steps {steps}; they must ascend, each once."
    )
    for change in self.reweight:
      for name, _ in change.weights:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        _require(
          name in names,
          f"data.reweight at step {change.step} names '{name}'; {hint}The sources are {names}.",
        )
    for step in (0, *steps) if self.sources else ():
      _require(
        sum(self.shares(step)) > 0,
        f"all of data.sources have weight 0 at step {step}; one must be positive.",
      )


def _nodes(sources: Sequence[SourceConfig], prefix: str = "") -> Iterator[tuple[str, SourceConfig]]:
  """Yields all groups and sources with their names from the root, such as "captions/web"."""
  for source in sources:
    path = prefix + source.name
    yield path, source
    yield from _nodes(source.sources, f"{path}/")


def _leaves(sources: Sequence[SourceConfig]) -> Iterator[tuple[str, SourceConfig]]:
  return ((path, source) for path, source in _nodes(sources) if not source.sources)


def _shares(
  sources: Sequence[SourceConfig], weights: Mapping[str, float], share: float, prefix: str = ""
) -> Iterator[float]:
  """Yields the leaves' shares of `share`."""
  total = sum(weights[prefix + source.name] for source in sources)
  for source in sources:
    path = prefix + source.name
    own = share * weights[path] / total if total else 0.0
    if source.sources:
      yield from _shares(source.sources, weights, own, f"{path}/")
    else:
      yield own


def _check_names(sources: Sequence[SourceConfig], where: str) -> None:
  names = [source.name for source in sources]
  twice = sorted({n for n in names if names.count(n) > 1})
  _require(not twice, f"{where} names {twice} more than once; names must differ.")
  for source in sources:
    _require(
      "/" not in source.name and bool(source.name),
      f"{where} has the name '{source.name}'; a name has no '/', which separates groups, and is "
      f"not empty.",
    )
    _check_names(source.sources, f"{where}.{source.name}.sources")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Group, where="optimizer."):
  """AdamW for pre-training, Adafactor for SFT; warm-up, then cosine to `final_fraction`."""

  name: Literal["adamw", "adafactor"] = "adamw"  # leave settings of the other at their defaults
  # Peak of the decoder's rate, and of parts without one of their own. MM1's law is in
  # `train.optimizer`; 0 computes gradients and trains nothing.
  learning_rate: Annotated[float, Range(at_least=0, none="takes MM1's law")] | None = None
  vit_learning_rate: PositiveOrZero | None = None  # peak; None takes learning_rate
  connector_learning_rate: PositiveOrZero | None = None  # peak; None takes learning_rate
  warmup_steps: CountOrZero = 2000  # from 0 up to the peak
  final_fraction: Fraction = 0.1  # of the peak, at the last step
  # Of Adafactor: what the RMS of a direction is clipped at, layer by layer.
  clipping_threshold: Annotated[float, Range(above=0, none="clips nothing")] | None = 1.0
  # Of Adafactor: multiplies a direction by the RMS of the param, which makes the rate relative.
  multiply_by_parameter_scale: bool = False
  # Times the current learning rate; never on norms and biases.
  weight_decay: Annotated[float, Range(at_least=0, at_most=1000)] = 0.1
  b1: Decay = 0.9  # of AdamW: decay of the first moment
  b2: Decay = 0.95  # of AdamW: decay of the second moment
  eps: Annotated[float, Range(at_least=1e-30, at_most=1)] = 1e-8  # of AdamW: beside the divisor
  # Of AdamW's first moment; the second, and the params, are always float32.
  moment_dtype: Literal["float32", "bfloat16"] = "float32"
  # Gradients whose norm over all trained params is larger are scaled down to it.
  clip_norm: Annotated[float, Range(above=0, none="clips nothing")] | None = 1.0
  frozen: tuple[str, ...] = ()  # parts with no gradient, no optimizer state and no decay

  def _check(self) -> None:
    for part in self.frozen:
      _require(part in PARTS, f"optimizer.frozen names '{part}'; the parts are {PARTS}.")
    _require(len(set(self.frozen)) < len(PARTS), "optimizer.frozen leaves nothing to train.")
    own = {"adamw": ADAMW_FIELDS, "adafactor": ADAFACTOR_FIELDS}
    for name, fields in own.items():
      defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name in fields}
      for field, default in defaults.items() if name != self.name else ():
        value = getattr(self, field)
        _require(
          value == default,
          f"optimizer.{field} {value} is a setting of {name}, but optimizer.name is {self.name}, "
          f"which has no use for it; leave it at {default}.",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Group, where="train."):
  """One run of the loop; a stage is a config, not a trainer."""

  num_steps: Count = 200_000  # of the whole run, resumed or not
  accumulation_steps: Count = 1  # micro-batches per step
  z_loss: PositiveOrZero = 1e-4  # on the softmax normaliser
  init_from: str | None = None  # workdir (or checkpoint) whose params start this run
  # What may differ from `init_from` though it changes what its params compute: a setting, such as
  # "model.decoder.rope_theta", or a part, such as "connector", which then starts fresh.
  init_changes: tuple[str, ...] = ()
  seed: Seed = 0  # of fresh params
  log_every: Count = 10  # steps
  eval_every: Count = 1000  # steps; the last one is evaluated, too
  eval_batches: Count | None = None  # per source; None evaluates all of it
  # A step is skipped when its loss or gradient norm is not finite, or its norm exceeds spike_factor
  # times the usual (see `train/guard.py`).
  spike_factor: Annotated[float, Range(above=1)] = 20.0
  max_skipped: Count = 10  # refused steps in a row that end a run


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Group, where="checkpoint."):
  """When to save, and what to keep."""

  every: Count = 1000  # steps
  keep: Count = 3  # newest checkpoints kept; 2 at least, for the newest is not known to be good
  keep_period: Count | None = None  # steps that are kept for good


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Group, where="mesh."):
  """Devices along each axis; at most one axis is -1 and takes what is left."""

  data: Axis = 1  # rows; each device along it has all params
  fsdp: Axis = -1  # rows and params
  expert: Axis = 1  # rows, params, and experts
  tensor: Axis = 1  # heads, mlp and vocabulary
  sequence: Axis = 1  # positions of a row, for rows that are too long for one device

  def resolve(self, num_devices: int) -> tuple[int, ...]:
    """Returns the axis lengths for `num_devices`, in the order of `MESH_AXES`."""
    sizes = [getattr(self, axis) for axis in MESH_AXES]
    asked = "x".join(map(str, sizes))
    _require(sizes.count(-1) <= 1, f"mesh {asked} has more than one -1; name the other lengths.")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
      _require(
        num_devices % known == 0,
        f"mesh {asked} ({' x '.join(MESH_AXES)}): its lengths multiply to {known}, which does not "
        f"divide the {num_devices} devices here.",
      )
      sizes[sizes.index(-1)] = num_devices // known
    _require(
      math.prod(sizes) == num_devices,
      f"mesh {asked} ({' x '.join(MESH_AXES)}) needs {math.prod(sizes)} devices; "
      f"there are {num_devices}. Set one axis to -1 to take what is left.",
    )
    return tuple(sizes)

  def _check(self) -> None:
    for axis in MESH_AXES:
      size = getattr(self, axis)
      _require(size != 0, f"mesh.{axis} {size} must be at least 1, or -1.")


@dataclasses.dataclass(frozen=True)
class InputSpec:
  """A model's inputs: all that the data code needs of it."""

  image_size: tuple[int, int]  # pixels, height and width
  tokens_per_image: int  # positions of a picture, or of a sub-image, without delimiters (T)
  image_token_id: int  # the id at those positions


@dataclasses.dataclass(frozen=True)
class RunConfig(_Group, where=""):
  """Everything that defines a run, apart from where it writes."""

  name: str = "mm1"  # of the workdir, runs/NAME, where none is given
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()

  @property
  def input_spec(self) -> InputSpec:
    """The model's inputs."""
    model = self.model
    return InputSpec(model.vision.image_size, model.connector.num_tokens, model.image_token_id)

  @property
  def image_positions(self) -> int:
    """Positions of a row that one image takes, delimiters included."""
    return self.model.connector.num_tokens + 2 * self.data.image_delimiters

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
    """Builds a run from nested plain values.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or fields that do not fit together.
    """
    return _build(cls, values, "")

  def to_dict(self) -> dict[str, Any]:
    """Returns plain JSON-compatible values; `from_dict` reads them back."""
    return dataclasses.asdict(self)

  def check_mesh(self, num_devices: int) -> tuple[int, ...]:
    """Returns the mesh's axis lengths after checking that the run divides over them.

    Raises:
      ConfigError: naming the number that does not divide, and by what it must.
    """
    sizes: dict[str, int] = dict(zip(MESH_AXES, self.mesh.resolve(num_devices), strict=True))
    rows = self.data.batch_size // self.train.accumulation_steps
    batch = math.prod(sizes[a] for a in BATCH_AXES)
    _divides("data.batch_size / train.accumulation_steps", rows, " x ".join(BATCH_AXES), batch)
    _divides("data.seq_len", self.data.seq_len, "sequence", sizes["sequence"])
    self.model.check_mesh(sizes)
    return tuple(sizes.values())

  def _check(self) -> None:
    data, train = self.data, self.train
    _require(
      self.image_positions <= data.seq_len,
      f"data.seq_len {data.seq_len} cannot hold one image of {self.image_positions} positions "
      f"(connector tokens and delimiters).",
    )
    fit = data.seq_len // self.image_positions
    _require(
      data.images_per_row <= fit,
      f"data.images_per_row {data.images_per_row}: a row of {data.seq_len} positions holds at "
      f"most {fit} images of {self.image_positions} positions.",
    )
    if data.tiling is not None:
      slots = data.tiling.max_slots
      _require(
        slots <= data.images_per_row and slots * self.image_positions <= data.seq_len,
        f"data.tiling makes up to {slots} sub-images of {self.image_positions} positions of a "
        f"picture, but a row has {data.images_per_row} slots (data.images_per_row) and "
        f"{data.seq_len} positions (data.seq_len).",
      )
    _require(
      self.model.decoder.lora is None or "decoder" not in self.optimizer.frozen,
      "optimizer.frozen names the decoder, whose adapters model.decoder.lora asks to train; leave "
      "it out: with lora the decoder's own params are not trained anyway.",
    )
    _require(
      data.batch_size % train.accumulation_steps == 0,
      f"data.batch_size {data.batch_size} must be a multiple of train.accumulation_steps "
      f"{train.accumulation_steps}.",
    )


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  """Builds dataclass `cls`, refusing keys it does not have."""
  if not isinstance(values, Mapping):
    raise ConfigError(f"{path or 'config'} is {values!r}; it must be a group of settings.")
  hints = field_types(cls)
  for key in values:
    if key not in hints:
      raise ConfigError(unknown_key(cls, f"{path}{key}", values[key]))
  return cls(**{k: _convert(hints[k], v, f"{path}{k}") for k, v in values.items()})


def field_types(cls: type) -> dict[str, Any]:
  """Returns the types of a dataclass's fields, without their ranges."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def unknown_key(cls: type, path: str, value: Any, near: str | None = None) -> str:
  """Returns the message on a key that dataclass `cls` does not have, with the keys it has.

  Args:
    path: of the key, from the config's root.
    near: what was probably meant; None looks for it among the keys of `cls`.
  """
  names, name = sorted(field_types(cls)), path.rpartition(".")[2]
  near = next(iter(difflib.get_close_matches(name, names, n=1)), near)
  keys = f"did you mean '{near}'? The" if near else "the"
  return f"unknown key '{path}' = {value!r}; {keys} keys here are {names}."


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Returns `value` as the type `hint` asks for, or raises a ConfigError that says so."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None:
      return None
    return _convert(next(a for a in args if a is not type(None)), value, path)
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    return _build(hint, value, f"{path}.")
  if origin is tuple:
    if isinstance(value, Mapping):
      # Named entries, so that one of them can be overridden: sources.captions.weight.
      value = [_named(args[0], name, entry, path) for name, entry in value.items()]
    if not isinstance(value, list | tuple):
      raise ConfigError(f"{path} is {value!r}; it must be a list.")
    if args[-1] is Ellipsis:
      args = (args[0],) * len(value)
    if len(args) != len(value):
      raise ConfigError(f"{path} is {value!r}; it must have {len(args)} entries.")
    return tuple(
      _convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
    )
  if origin is Literal:
    if value not in args:
      raise ConfigError(f"{path} is {value!r}; it must be one of {list(args)}.")
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value) if abs(value) < 2**1023 else math.inf  # which no range holds
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ConfigError(f"{path} is {value!r}; it must be of type {hint.__name__}.")
  return value


def _named(hint: Any, name: str, entry: Any, path: str) -> Any:
  if not dataclasses.is_dataclass(hint):
    return name, entry
  if not isinstance(entry, Mapping):
    raise ConfigError(f"{path}.{name} is {entry!r}; it must be a group of settings.")
  return {"name": name, **entry}
