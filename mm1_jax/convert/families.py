# SPDX-License-Identifier: Apache-2.0
"""What each family of open weights calls its tensors, and which config of ours it needs.

`settings.py` has what becomes of each key of a config.json.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mm1_jax.config import DecoderConfig, MoEConfig, VisionConfig
from mm1_jax.convert import ConvertError, settings
from mm1_jax.convert.layouts import (
  FLAT,
  FROM_HEADS,
  LINEAR,
  PATCH,
  PER_EXPERT,
  SAME,
  ClassPosition,
  FusedThird,
  PositionsBehindClass,
  Rows,
  SiglipPatch,
  SiglipPositions,
  WeightLayout,
)
from mm1_jax.convert.tensors import Tensors


class WeightPiece(NamedTuple):
  """A part of one of our arrays, and the tensors of theirs that it is made of."""

  ours: str  # name of a param, as in `checkpoint.to_names`
  at: tuple[int, ...]  # index of its leading dims: the block of a stack, or nothing
  theirs: tuple[str, ...]
  layout: WeightLayout


# Our name in a block or layer: their name in it, and the layout.
Table = Mapping[str, tuple[str, WeightLayout]]

# Decoders: names as `transformers` saves them; a layer's are prefixed by `layers.I.`.
LLAMA: Table = {
  "attention_norm.scale": ("input_layernorm.weight", SAME),
  "attention.query": ("self_attn.q_proj.weight", LINEAR),
  "attention.key": ("self_attn.k_proj.weight", LINEAR),
  "attention.value": ("self_attn.v_proj.weight", LINEAR),
  "attention.out": ("self_attn.o_proj.weight", FROM_HEADS),
  "mlp_norm.scale": ("post_attention_layernorm.weight", SAME),
}
DENSE: Table = {
  "mlp.gate": ("mlp.gate_proj.weight", LINEAR),
  "mlp.up": ("mlp.up_proj.weight", LINEAR),
  "mlp.down": ("mlp.down_proj.weight", LINEAR),
}
QKV_BIAS: Table = {
  "attention.query_bias": ("self_attn.q_proj.bias", FLAT),
  "attention.key_bias": ("self_attn.k_proj.bias", FLAT),
  "attention.value_bias": ("self_attn.v_proj.bias", FLAT),
}
QK_NORM: Table = {
  "attention.query_norm.scale": ("self_attn.q_norm.weight", SAME),
  "attention.key_norm.scale": ("self_attn.k_norm.weight", SAME),
}
# Experts: {} is the expert's number.
MIXTRAL: Table = {
  "mlp.router": ("block_sparse_moe.gate.weight", LINEAR),
  "mlp.gate": ("block_sparse_moe.experts.{}.w1.weight", PER_EXPERT),
  "mlp.up": ("block_sparse_moe.experts.{}.w3.weight", PER_EXPERT),
  "mlp.down": ("block_sparse_moe.experts.{}.w2.weight", PER_EXPERT),
}
QWEN_MOE: Table = {
  "mlp.router": ("mlp.gate.weight", LINEAR),
  "mlp.gate": ("mlp.experts.{}.gate_proj.weight", PER_EXPERT),
  "mlp.up": ("mlp.experts.{}.up_proj.weight", PER_EXPERT),
  "mlp.down": ("mlp.experts.{}.down_proj.weight", PER_EXPERT),
}
DECODERS: dict[str, Table] = {
  "llama": LLAMA | DENSE,
  "mistral": LLAMA | DENSE,
  "qwen2": LLAMA | DENSE | QKV_BIAS,
  "qwen3": LLAMA | DENSE | QK_NORM,
  "mixtral": LLAMA | MIXTRAL,
  "qwen3_moe": LLAMA | QK_NORM | QWEN_MOE,
}

# Encoders: `transformers`' CLIP and SigLIP, whose blocks are equal, and open_clip's own ViT.
HF_BLOCK: Table = {
  "attention_norm.scale": ("layer_norm1.weight", SAME),
  "attention_norm.bias": ("layer_norm1.bias", SAME),
  "attention.query": ("self_attn.q_proj.weight", LINEAR),
  "attention.query_bias": ("self_attn.q_proj.bias", FLAT),
  "attention.key": ("self_attn.k_proj.weight", LINEAR),
  "attention.key_bias": ("self_attn.k_proj.bias", FLAT),
  "attention.value": ("self_attn.v_proj.weight", LINEAR),
  "attention.value_bias": ("self_attn.v_proj.bias", FLAT),
  "attention.out": ("self_attn.out_proj.weight", FROM_HEADS),
  "attention.out_bias": ("self_attn.out_proj.bias", SAME),
  "mlp_norm.scale": ("layer_norm2.weight", SAME),
  "mlp_norm.bias": ("layer_norm2.bias", SAME),
  "mlp.up": ("mlp.fc1.weight", LINEAR),
  "mlp.up_bias": ("mlp.fc1.bias", SAME),
  "mlp.down": ("mlp.fc2.weight", LINEAR),
  "mlp.down_bias": ("mlp.fc2.bias", SAME),
}
OPEN_CLIP_BLOCK: Table = {
  "attention_norm.scale": ("ln_1.weight", SAME),
  "attention_norm.bias": ("ln_1.bias", SAME),
  "attention.query": ("attn.in_proj_weight", FusedThird(0)),
  "attention.query_bias": ("attn.in_proj_bias", FusedThird(0)),
  "attention.key": ("attn.in_proj_weight", FusedThird(1)),
  "attention.key_bias": ("attn.in_proj_bias", FusedThird(1)),
  "attention.value": ("attn.in_proj_weight", FusedThird(2)),
  "attention.value_bias": ("attn.in_proj_bias", FusedThird(2)),
  "attention.out": ("attn.out_proj.weight", FROM_HEADS),
  "attention.out_bias": ("attn.out_proj.bias", SAME),
  "mlp_norm.scale": ("ln_2.weight", SAME),
  "mlp_norm.bias": ("ln_2.bias", SAME),
  "mlp.up": ("mlp.c_fc.weight", LINEAR),
  "mlp.up_bias": ("mlp.c_fc.bias", SAME),
  "mlp.down": ("mlp.c_proj.weight", LINEAR),
  "mlp.down_bias": ("mlp.c_proj.bias", SAME),
}
VISION_PATCH = "embeddings.patch_embedding.weight"
# Of an encoder: what comes after the blocks, and numbers that are computed.
AFTER_FEATURES = re.compile(r"(ln_post|proj|attn_pool|post_layernorm|head)(\.|$)|.*position_ids$")
ENCODERS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "open_clip")

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
ACTIVATIONS: dict[str, Any] = {
  "quick_gelu": "quick_gelu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
}
# Of a decoder: tables of angles, which are computed from theta, as in the first Llamas' files.
BUFFERS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|(cos|sin)_cached)$")


class Words(NamedTuple):
  """Which rows of an embedding have a meaning."""

  own: int  # the first so many are ids of the tokenizer
  new: tuple[int, ...]  # ids that were added to it: their rows were padding, or are not there


def vocab_size(tensors: Tensors) -> int:
  """Returns the rows of a decoder's embedding."""
  return _rows(tensors, f"{_root(tensors, EMBEDDING)}{EMBEDDING}")


def decoder_config(given: settings.Settings, tensors: Tensors, num_rows: int) -> DecoderConfig:
  """Returns the decoder that a config.json describes, with a vocabulary of `num_rows` rows.

  Raises:
    ConvertError: it is of another family, or has what our decoder has not.
  """
  kind = given["model_type"]
  if kind not in DECODERS:
    raise ConvertError(f"model_type '{kind}' is no decoder that can be imported: {list(DECODERS)}.")
  said = settings.read(kind, given)
  if given.get("vocab_size") is not None and said["vocab_size"] != vocab_size(tensors):
    raise ConvertError(
      f"vocab_size is {said['vocab_size']}, but the embedding has {vocab_size(tensors)} rows."
    )
  heads, width = said["num_attention_heads"], said["hidden_size"]
  theta, scaling = settings.rope(kind, said)
  moe = None
  if kind in ("mixtral", "qwen3_moe"):
    # Nothing was dropped when they were trained.
    moe = MoEConfig(_num_experts(given, said), 1, said["num_experts_per_tok"], capacity_factor=None)
    _check_router(said, kind, moe.top_k)
  return DecoderConfig(
    vocab_size=num_rows,
    width=width,
    depth=said["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=said["num_key_value_heads"] or heads,
    head_dim=said["head_dim"] or width // heads,
    mlp_dim=said["moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"],
    rope_theta=theta,
    rope_scaling=scaling,
    norm_eps=said["rms_norm_eps"],
    qk_norm=kind in ("qwen3", "qwen3_moe"),
    qkv_bias=kind == "qwen2",
    tie_embeddings=_is_tied(said, tensors),
    moe=moe,
  )


def _num_experts(given: settings.Settings, said: settings.Settings) -> int:
  """Returns the experts: a key of two names, the older one in files of Qwen's."""
  names = [name for name in ("num_experts", "num_local_experts") if given.get(name) is not None]
  numbers = {given[name] for name in names}
  if len(numbers) > 1:
    raise ConvertError(
      f"num_experts is {given['num_experts']}, and num_local_experts {given['num_local_experts']}; "
      "they are one setting: make them equal."
    )
  return said[names[0]] if names else said.get("num_experts") or said["num_local_experts"]


def _is_tied(said: settings.Settings, tensors: Tensors) -> bool:
  """Returns whether the head is the embedding.

  Raises:
    ConvertError: the config and the tensors do not agree about it.
  """
  heads = _find(tensors, HEAD)
  if not said["tie_word_embeddings"]:
    if not heads:
      raise ConvertError(
        f"tie_word_embeddings is not true, but '{tensors.path}' has no '{HEAD}'. Where the head is "
        "the embedding, set tie_word_embeddings to true; a model without a head makes no text."
      )
    return False
  embedding = f"{_root(tensors, EMBEDDING)}{EMBEDDING}"
  for head in heads:
    if not np.array_equal(tensors.read(head), tensors.read(embedding)):
      raise ConvertError(
        f"tie_word_embeddings is true, but '{head}' differs from '{embedding}'. Where the head was "
        "trained by itself, set tie_word_embeddings to false, as transformers 5 reads it; else "
        "remove the tensor."
      )
  return True


def _check_router(said: settings.Settings, kind: str, top_k: int) -> None:
  """Refuses experts that are weighted otherwise than by our router, see `models.moe`.

  Mixtral renormalises the weights of any `top_k`, Qwen 3 MoE as `norm_topk_prob` says.
  """
  sums_to_1 = kind == "mixtral" or said["norm_topk_prob"]
  if sums_to_1 and top_k == 1:
    raise ConvertError(
      f"num_experts_per_tok 1 of a {kind} whose weights are renormalised: its one expert counts in "
      "full, where our router weighs a single expert with its probability. Nothing here computes "
      "that; take a model of two or more experts a token."
    )
  if not sums_to_1 and top_k > 1:
    raise ConvertError(
      f"norm_topk_prob False with num_experts_per_tok {top_k}: the weights of our experts are "
      "renormalised to sum to 1."
    )


def decoder_pieces(
  kind: str, cfg: DecoderConfig, tensors: Tensors, words: Words | None = None
) -> Iterator[WeightPiece]:
  """Yields the pieces of a decoder of a family; without `words`, all rows have a meaning."""
  root = _root(tensors, EMBEDDING)
  num = vocab_size(tensors)
  own, new = words or Words(num, ())
  layout = Rows(num, min(own, num), tuple(index for index in new if index < num))
  yield WeightPiece("decoder.embedding", (), (f"{root}{EMBEDDING}",), layout)
  if not cfg.tie_embeddings:
    yield WeightPiece("decoder.head", (), (_find(tensors, HEAD)[0],), layout)
  yield WeightPiece("decoder.norm.scale", (), (f"{root}norm.weight",), SAME)
  num_experts = cfg.moe.num_experts if cfg.moe else 0
  for layer in range(cfg.depth):
    for ours, (theirs, layout) in DECODERS[kind].items():
      name = f"{root}layers.{layer}.{theirs}"
      names = [name.format(e) for e in range(num_experts)] if layout == PER_EXPERT else [name]
      yield WeightPiece(f"decoder.units.layers.0.{ours}", (layer,), tuple(names), layout)


def without_effect(
  kind: str, cfg: DecoderConfig | VisionConfig, tensors: Tensors, name: str
) -> bool:
  """Returns whether our features or logits are right without a tensor that nothing is made of."""
  if isinstance(cfg, DecoderConfig):
    return BUFFERS.search(name) is not None or (cfg.tie_embeddings and name in _find(tensors, HEAD))
  root = _root(tensors, "conv1.weight" if kind == "open_clip" else VISION_PATCH)
  inner = name.removeprefix(root)
  if not name.startswith(root):
    return True  # of the model of texts, or between the two
  if block := re.match(r"(?:transformer\.resblocks|encoder\.layers)\.(\d+)\.", inner):
    return cfg.num_blocks <= int(block[1]) < cfg.depth
  if kind == "open_clip" and not root:
    return True
  return AFTER_FEATURES.match(inner) is not None


def vision_config(given: settings.Settings, tensors: Tensors, feature_layer: int) -> VisionConfig:
  """Returns the encoder that a config.json or an open_clip_config.json describes.

  Raises:
    ConvertError: it is of another family, or has what our ViT has not.
  """
  kind = given["model_type"]
  if kind not in ENCODERS:
    raise ConvertError(f"model_type '{kind}' is no encoder that can be imported: {ENCODERS}.")
  if kind == "open_clip":
    return _open_clip_config(given, feature_layer)
  said = settings.read(*settings.of_vision(kind, given))
  class_token = not kind.startswith("siglip")
  patch = _side(said["patch_size"])
  grid = _side(said["image_size"]) // patch  # a convolution leaves out the rest, too
  return VisionConfig(
    image_size=(grid * patch, grid * patch),
    patch_size=patch,
    width=said["hidden_size"],
    depth=said["num_hidden_layers"],
    num_heads=said["num_attention_heads"],
    mlp_dim=said["intermediate_size"],
    activation=ACTIVATIONS[said["hidden_act"]],
    class_token=class_token,
    pre_norm=class_token,
    norm_eps=said["layer_norm_eps"],
    position_grid=(grid, grid),
    feature_layer=feature_layer,
  )


def _side(value: int | list[int]) -> int:
  return value[0] if isinstance(value, list) else int(value)


def _open_clip_config(given: settings.Settings, feature_layer: int) -> VisionConfig:
  model = _get(given, "model_cfg")
  vision = dict(_get(model, "vision_cfg"))
  known = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
  strange = sorted(vision.keys() - known - {"output_tokens", "patch_dropout"})
  if strange:
    raise ConvertError(
      f"open_clip's vision_cfg sets {strange}, which our ViT cannot express; of a timm model, take "
      "the weights that `transformers` reads."
    )
  side, patch, width = (_get(vision, key) for key in ("image_size", "patch_size", "width"))
  return VisionConfig(
    image_size=(side // patch * patch,) * 2,
    patch_size=patch,
    width=width,
    depth=_get(vision, "layers"),
    num_heads=width // vision.get("head_width", 64),
    mlp_dim=int(width * vision.get("mlp_ratio", 4.0)),
    activation="quick_gelu" if model.get("quick_gelu") else "gelu",
    position_grid=(side // patch,) * 2,
    feature_layer=feature_layer,
  )


def vision_pieces(kind: str, cfg: VisionConfig, tensors: Tensors) -> Iterator[WeightPiece]:
  """Yields the pieces of an encoder of a family, up to the feature layer."""
  if kind == "open_clip":
    root = _root(tensors, "conv1.weight")
    patch, table = f"{root}conv1.weight", f"{root}positional_embedding"
    norm, token = f"{root}ln_pre", f"{root}class_embedding"
    block_root, blocks = f"{root}transformer.resblocks", OPEN_CLIP_BLOCK
  else:
    root = _root(tensors, VISION_PATCH)
    patch = f"{root}{VISION_PATCH}"
    table = f"{root}embeddings.position_embedding.weight"
    norm, token = f"{root}pre_layrnorm", f"{root}embeddings.class_embedding"
    block_root, blocks = f"{root}encoder.layers", HF_BLOCK
  if cfg.class_token:
    yield WeightPiece("vit.patch", (), (patch,), PATCH)
    yield WeightPiece("vit.positions", (), (table,), PositionsBehindClass())
    yield WeightPiece(
      "vit.class_position", (), (table,), ClassPosition(math.prod(cfg.position_grid))
    )
    yield WeightPiece("vit.class_token", (), (token,), SAME)
    yield WeightPiece("vit.pre_norm.scale", (), (f"{norm}.weight",), SAME)
    yield WeightPiece("vit.pre_norm.bias", (), (f"{norm}.bias",), SAME)
  else:
    bias = patch.removesuffix("weight") + "bias"
    yield WeightPiece("vit.patch", (), (patch,), SiglipPatch())
    yield WeightPiece("vit.positions", (), (table, patch, bias), SiglipPositions(cfg.patch_size))
  for block in range(cfg.num_blocks):
    for ours, (theirs, layout) in blocks.items():
      yield WeightPiece(f"vit.blocks.{ours}", (block,), (f"{block_root}.{block}.{theirs}",), layout)


def _get(given: settings.Settings, key: str) -> Any:
  if given.get(key) is None:
    raise ConvertError(f"the weights' config has no '{key}'.")
  return given[key]


def _find(tensors: Tensors, suffix: str) -> list[str]:
  return [name for name in tensors if name == suffix or name.endswith(f".{suffix}")]


def _root(tensors: Tensors, suffix: str) -> str:
  """Returns the prefix before `suffix` in the one name that ends in it."""
  found = _find(tensors, suffix)
  if len(found) != 1:
    raise ConvertError(
      f"'{tensors.path}' has {len(found) or 'no'} tensors that end in '{suffix}'; one was expected."
    )
  return found[0].removesuffix(suffix)


def _rows(tensors: Tensors, name: str) -> int:
  shape = tensors.shapes[name]
  if len(shape) != 2:
    raise ConvertError(f"tensor '{name}' has shape {shape}; it must be a table.")
  return shape[0]
