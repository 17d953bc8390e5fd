# SPDX-License-Identifier: Apache-2.0
"""Our params' names in modeling_mm1.py, their layout in its tensors, and its config.json."""

from typing import Any, NamedTuple

from mm1_jax.config import ModelConfig, RunConfig
from mm1_jax.convert import families
from mm1_jax.convert.export.run_reader import ParamPart
from mm1_jax.convert.layouts import DEPTHWISE, LINEAR, PATCH, PER_EXPERT, SAME, Reversible

TESTED = "5.24.0"  # of transformers
VISION, TEXT, CONNECTOR = "model.vision_tower", "model.language_model", "model.connector"
SPARSE: families.Table = {
  "mlp.router": ("mlp.router.weight", LINEAR),
  "mlp.gate": ("mlp.experts.{}.gate_proj.weight", PER_EXPERT),
  "mlp.up": ("mlp.experts.{}.up_proj.weight", PER_EXPERT),
  "mlp.down": ("mlp.experts.{}.down_proj.weight", PER_EXPERT),
}
DENSE: families.Table = {
  **families.LLAMA,
  **families.QKV_BIAS,
  **families.QK_NORM,
  **families.DENSE,
}
WHOLE: families.Table = {
  "vit.patch": (f"{VISION}.embeddings.patch_embedding.weight", PATCH),
  "vit.positions": (f"{VISION}.embeddings.position_embedding", SAME),
  "vit.class_token": (f"{VISION}.embeddings.class_embedding", SAME),
  "vit.class_position": (f"{VISION}.embeddings.class_position", SAME),
  "vit.pre_norm.scale": (f"{VISION}.pre_layrnorm.weight", SAME),
  "vit.pre_norm.bias": (f"{VISION}.pre_layrnorm.bias", SAME),
  "decoder.embedding": (f"{TEXT}.embed_tokens.weight", SAME),
  "decoder.norm.scale": (f"{TEXT}.norm.weight", SAME),
  "decoder.head": ("lm_head.weight", SAME),
}


class TorchTensors(NamedTuple):
  """What a part of ours is in PyTorch: one tensor, or one for each expert."""

  names: list[str]
  layout: Reversible


def tensors(part: ParamPart, model: ModelConfig) -> TorchTensors:
  """Returns where a part of a model goes."""
  if part.name in WHOLE:
    name, layout = WHOLE[part.name]
  elif part.name.startswith("connector."):
    name, layout = _connector(part.name)
  elif part.name.startswith("vit.blocks."):
    name, layout = families.HF_BLOCK[part.name.removeprefix("vit.blocks.")]
    name = f"{VISION}.encoder.layers.{part.block}.{name}"
  else:
    assert part.block is not None
    in_unit, ours = part.name.removeprefix("decoder.units.layers.").split(".", 1)
    moe, number = model.decoder.moe, int(in_unit)
    sparse = moe is not None and number == moe.every - 1 and ours in SPARSE
    name, layout = (SPARSE if sparse else DENSE)[ours]
    layer = part.block * model.decoder.layers_per_unit + number
    name = f"{TEXT}.layers.{layer}.{name}"
  names = [name.format(i) for i in range(part.shape[0])] if layout == PER_EXPERT else [name]
  return TorchTensors(names, layout)  # pyright: ignore[reportArgumentType]  # those in the tables are


def _connector(name: str) -> tuple[str, Reversible]:
  name = name.replace("connector.", f"{CONNECTOR}.", 1).replace(".readout.layers.", ".readout.")
  stem, last = name.rsplit(".", 1)
  if last == "conv2":
    return f"{name}.weight", DEPTHWISE
  if last == "weight":
    return name, LINEAR
  return (f"{stem}.weight" if last == "scale" else name), SAME


def config(run: RunConfig, dtype: str) -> dict[str, Any]:
  """Returns config.json of a run's model."""
  model = run.model
  vision, connector, decoder = model.vision, model.connector, model.decoder
  scaling = decoder.rope_scaling
  return {
    "architectures": ["MM1ForConditionalGeneration"],
    "auto_map": {
      "AutoConfig": "configuration_mm1.MM1Config",
      "AutoModelForImageTextToText": "modeling_mm1.MM1ForConditionalGeneration",
    },
    "model_type": "mm1",
    "transformers_version": TESTED,
    "dtype": dtype,
    "image_token_id": model.image_token_id,
    "tie_word_embeddings": decoder.tie_embeddings,
    "connector_kind": connector.kind,
    "token_grid": list(connector.token_grid),
    "connector_hidden": connector.hidden,
    "connector_depth": connector.depth,
    "connector_mlp_depth": connector.mlp_depth,
    "connector_num_heads": connector.num_heads,
    "vision_config": {
      "model_type": "mm1_vision",
      "image_size": list(vision.image_size),
      "patch_size": vision.patch_size,
      "hidden_size": vision.width,
      "num_hidden_layers": vision.num_blocks,
      "num_attention_heads": vision.num_heads,
      "intermediate_size": vision.mlp_dim,
      "hidden_act": vision.activation,
      "class_token": vision.class_token,
      "pre_norm": vision.pre_norm,
      "layer_norm_eps": vision.norm_eps,
      "position_grid": list(vision.position_grid),
    },
    "text_config": {
      "model_type": "mm1_text",
      "vocab_size": decoder.vocab_size,
      "hidden_size": decoder.width,
      "num_hidden_layers": decoder.depth,
      "num_attention_heads": decoder.num_heads,
      "num_key_value_heads": decoder.num_kv_heads,
      "head_dim": decoder.head_dim,
      "intermediate_size": decoder.mlp_dim,
      "rope_theta": decoder.rope_theta,
      "rope_stretch": vars(scaling) if scaling else None,
      "rms_norm_eps": decoder.norm_eps,
      "qk_norm": decoder.qk_norm,
      "qkv_bias": decoder.qkv_bias,
      "num_experts": decoder.moe.num_experts if decoder.moe else 0,
      "num_experts_per_tok": decoder.moe.top_k if decoder.moe else 0,
      "moe_every": decoder.layers_per_unit,
      "max_position_embeddings": run.data.seq_len,
      "tie_word_embeddings": decoder.tie_embeddings,
    },
  }
