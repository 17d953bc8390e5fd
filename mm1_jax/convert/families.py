# SPDX-License-Identifier: Apache-2.0
"""What each family of open weights calls its tensors, and which config of ours it needs.

A config.json is read strictly: a setting that our modules cannot express is refused by its name.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mm1_jax import untrusted
from mm1_jax.config import DecoderConfig, MoEConfig, RopeScaling, VisionConfig
from mm1_jax.convert import ConvertError
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


Settings = Mapping[str, Any]
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
ENCODERS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "open_clip")

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
ACTIVATIONS: dict[str, Any] = {
  "quick_gelu": "quick_gelu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
}


def vocab_size(tensors: Tensors) -> int:
  """Returns the rows of a decoder's embedding."""
  return _rows(tensors, f"{_root(tensors, EMBEDDING)}{EMBEDDING}")


def decoder_config(settings: Settings, tensors: Tensors, vocab_size: int) -> DecoderConfig:
  """Returns the decoder that a config.json describes, with a vocabulary of `vocab_size` rows.

  Raises:
    ConvertError: it is of another family, or has what our decoder has not.
  """
  kind = settings["model_type"]
  if kind not in DECODERS:
    raise ConvertError(f"model_type '{kind}' is no decoder that can be imported: {list(DECODERS)}.")
  heads = _get(settings, "num_attention_heads")
  width = _get(settings, "hidden_size")
  _refuse(
    settings,
    hidden_act=("silu",),
    attention_bias=(False,),
    mlp_bias=(False,),
    partial_rotary_factor=(1, 1.0),
    use_sliding_window=(False,),
    decoder_sparse_step=(1,),
    mlp_only_layers=([],),
  )
  theta, scaling = _rope(settings, kind)
  moe = None
  if kind in ("mixtral", "qwen3_moe"):
    # `transformers` calls it num_local_experts in all families since its version 5.
    old = settings.get("num_experts")
    experts = old if old is not None else _get(settings, "num_local_experts")
    top_k = _get(settings, "num_experts_per_tok")
    _check_router(settings, kind, top_k)
    # Nothing was dropped when they were trained.
    moe = MoEConfig(experts, 1, top_k, capacity_factor=None)
  return DecoderConfig(
    vocab_size=vocab_size,
    width=width,
    depth=_get(settings, "num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=settings.get("num_key_value_heads") or heads,
    head_dim=settings.get("head_dim") or width // heads,
    mlp_dim=_get(settings, "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
    rope_theta=theta,
    rope_scaling=scaling,
    norm_eps=_get(settings, "rms_norm_eps"),
    qk_norm=kind in ("qwen3", "qwen3_moe"),
    qkv_bias=kind == "qwen2",
    tie_embeddings=bool(settings.get("tie_word_embeddings")) or not _find(tensors, HEAD),
    moe=moe,
  )


def _check_router(settings: Settings, kind: str, top_k: int) -> None:
  """Refuses experts that are weighted otherwise than by our router, see `models.moe`.

  Mixtral renormalises the weights of any `top_k`, Qwen 3 MoE as `norm_topk_prob` says.
  """
  # Its absence means False.
  sums_to_1 = kind == "mixtral" or _get(settings, "norm_topk_prob")
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


def decoder_pieces(kind: str, cfg: DecoderConfig, tensors: Tensors) -> Iterator[WeightPiece]:
  """Yields the pieces of a decoder of a family."""
  root = _root(tensors, EMBEDDING)
  yield WeightPiece("decoder.embedding", (), (f"{root}{EMBEDDING}",), Rows(vocab_size(tensors)))
  if not cfg.tie_embeddings:
    head = _find(tensors, HEAD)[0]
    yield WeightPiece("decoder.head", (), (head,), Rows(_rows(tensors, head)))
  yield WeightPiece("decoder.norm.scale", (), (f"{root}norm.weight",), SAME)
  num_experts = cfg.moe.num_experts if cfg.moe else 0
  for layer in range(cfg.depth):
    for ours, (theirs, layout) in DECODERS[kind].items():
      name = f"{root}layers.{layer}.{theirs}"
      names = [name.format(e) for e in range(num_experts)] if layout == PER_EXPERT else [name]
      yield WeightPiece(f"decoder.units.layers.0.{ours}", (layer,), tuple(names), layout)


def vision_config(settings: Settings, tensors: Tensors, feature_layer: int) -> VisionConfig:
  """Returns the encoder that a config.json or an open_clip_config.json describes.

  Raises:
    ConvertError: it is of another family, or has what our ViT has not.
  """
  kind = settings["model_type"]
  if kind not in ENCODERS:
    raise ConvertError(f"model_type '{kind}' is no encoder that can be imported: {ENCODERS}.")
  if kind == "open_clip":
    return _open_clip_config(settings, feature_layer)
  settings = settings.get("vision_config", settings)
  siglip = kind.startswith("siglip")
  # Sizes that a config.json may leave out, as `transformers` has them.
  settings = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16 if siglip else 32,
    "hidden_act": "gelu_pytorch_tanh" if siglip else "quick_gelu",
    "layer_norm_eps": 1e-6 if siglip else 1e-5,
  } | dict(settings)
  _refuse(settings, hidden_act=tuple(ACTIVATIONS), num_channels=(3,))
  side, patch = settings["image_size"], settings["patch_size"]
  return VisionConfig(
    image_size=(side // patch * patch,) * 2,  # a convolution leaves out the rest, too
    patch_size=patch,
    width=settings["hidden_size"],
    depth=settings["num_hidden_layers"],
    num_heads=settings["num_attention_heads"],
    mlp_dim=settings["intermediate_size"],
    activation=ACTIVATIONS[settings["hidden_act"]],
    class_token=not siglip,
    pre_norm=not siglip,
    norm_eps=settings["layer_norm_eps"],
    position_grid=(side // patch,) * 2,
    feature_layer=feature_layer,
  )


def _open_clip_config(settings: Settings, feature_layer: int) -> VisionConfig:
  model = _get(settings, "model_cfg")
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
    root = _root(tensors, "embeddings.patch_embedding.weight")
    patch = f"{root}embeddings.patch_embedding.weight"
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


def _rope(settings: Settings, kind: str) -> tuple[float, RopeScaling | None]:
  """Returns theta and the scaling, from either place where `transformers` writes them."""
  rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
  theta = rope.get("rope_theta") or settings.get("rope_theta")
  if theta is None:
    if kind != "llama":
      raise ConvertError("config.json has no 'rope_theta'.")
    theta = 1e4  # the first Llamas' configs do not say it
  how = rope.get("rope_type", rope.get("type", "default"))
  if how == "default":
    return float(theta), None
  if how != "llama3":
    raise ConvertError(f"RoPE of type '{how}' is not supported; 'default' and 'llama3' are.")
  scaling = RopeScaling(
    float(_get(rope, "factor")),
    float(_get(rope, "low_freq_factor")),
    float(_get(rope, "high_freq_factor")),
    _get(rope, "original_max_position_embeddings"),
  )
  return float(theta), scaling


def _get(settings: Settings, key: str) -> Any:
  if settings.get(key) is None:
    raise ConvertError(f"the weights' config has no '{key}'.")
  return settings[key]


def _refuse(settings: Settings, **allowed: tuple) -> None:
  """Raises ConvertError for the first setting that has another than its allowed values."""
  for key, values in allowed.items():
    if settings.get(key) is not None and settings[key] not in values:
      given = untrusted.shown(settings[key])
      raise ConvertError(
        f"{key} is {given}; only {' or '.join(map(repr, values))} can be imported."
      )


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
