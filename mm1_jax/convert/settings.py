# SPDX-License-Identifier: Apache-2.0
"""What becomes of each setting in the config.json of open weights.

The tables have all keys of the config classes of `transformers`, with the values that these take
where a file leaves a key out. A key is expressed by a config of ours, without effect on what the
model computes, or bound to the values that our modules compute; another value is refused by name.
`tests/convert/config_keys_test.py` compares the tables with the classes.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mm1_jax import untrusted
from mm1_jax.config import RopeScaling
from mm1_jax.convert import ConvertError

Settings = Mapping[str, Any]


class Setting(NamedTuple):
  """What a key may hold, and what becomes of it."""

  default: Any  # of the class in `transformers`
  use: str  # for the reference page
  check: Callable[[Any], bool] | None = None  # None takes any value: it has no effect
  must_be: str = ""  # what `check` asks for


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
  return _is_number(value) and value == int(value)


def _whole(default: int | None, use: str) -> Setting:
  return Setting(default, use, lambda x: x is None or _is_whole(x), "a whole number")


def _number(default: float | None, use: str) -> Setting:
  return Setting(default, use, lambda x: x is None or _is_number(x), "a number")


def _bool(default: bool, use: str) -> Setting:
  return Setting(default, use, lambda x: x is None or isinstance(x, bool), "true or false")


def _object(use: str) -> Setting:
  return Setting(None, use, lambda x: x is None or isinstance(x, dict), "an object")


def _only(default: Any, *others: Any) -> Setting:
  allowed = (default, *others)
  shown = " or ".join(f"`{_json(value)}`" for value in allowed)
  return Setting(
    default,
    f"only {shown}; another value is refused",
    lambda x: x is None or any(x == value and type(x) is type(value) for value in allowed),
    " or ".join(map(_json, allowed)),
  )


def _free(default: Any = None, why: str = "without effect on what is computed") -> Setting:
  return Setting(default, why)


def _json(value: Any) -> str:
  return f"{value}".lower() if isinstance(value, bool) else f"{value}"


TRAINING = "without effect: of training alone"
OUTPUTS = "without effect: which outputs are returned"
SYMBOLS = "without effect: ids are the tokenizer's"
WINDOW = "not kept, and said: within the window nothing differs"
ROPE = "`rope_theta`, `rope_scaling` of the decoder"

# Of every class; the last four are of files, not of the classes.
_ANY = {
  "architectures": _free(None, "without effect: the class that was saved"),
  "chunk_size_feed_forward": _free(0),
  "dtype": _free(None, "without effect: `--dtype` says how params are kept"),
  "id2label": _free(),
  "is_encoder_decoder": _free(False),
  "label2id": _free(),
  "output_attentions": _free(None, OUTPUTS),
  "output_hidden_states": _free(False, OUTPUTS),
  "problem_type": _free(),
  "return_dict": _free(True, OUTPUTS),
  "transformers_version": _free(None, "without effect: which version wrote the file"),
  "model_type": Setting(None, "the family"),
  "_name_or_path": _free(),
  "torch_dtype": _free(None, "`dtype` of older files"),
  "quantization_config": Setting(None, "refused"),
}
_DECODER = {
  "vocab_size": _whole(32000, "must be the rows of the embedding, if the file has it"),
  "hidden_size": _whole(4096, "`width`"),
  "intermediate_size": _whole(11008, "`mlp_dim`"),
  "num_hidden_layers": _whole(32, "`depth`"),
  "num_attention_heads": _whole(32, "`num_heads`"),
  "num_key_value_heads": _whole(None, "`num_kv_heads`; null is `num_attention_heads`"),
  "head_dim": _whole(None, "`head_dim`; null is `hidden_size` by heads"),
  "hidden_act": _only("silu", "swish"),
  "max_position_embeddings": _whole(2048, "original positions of a scaled RoPE without its own"),
  "initializer_range": _free(0.02, TRAINING),
  "rms_norm_eps": _number(1e-6, "`norm_eps`"),
  "use_cache": _free(True, OUTPUTS),
  "pad_token_id": _free(None, SYMBOLS),
  "bos_token_id": _free(None, SYMBOLS),
  "eos_token_id": _free(None, SYMBOLS),
  "tie_word_embeddings": _bool(False, "`tie_embeddings`; a head that differs is refused"),
  "rope_parameters": _object(f"{ROPE}: default and llama3; refused: other types"),
  "attention_dropout": _free(0.0, TRAINING),
  # Of older files, or of one family: any file that has them means them.
  "attention_bias": _only(False),
  "mlp_bias": _only(False),
  "rope_theta": _number(None, f"{ROPE}: where the object says no theta"),
  "rope_scaling": _object(f"{ROPE}: before `rope_parameters`, as in transformers"),
  "partial_rotary_factor": _only(1.0, 1),
  "original_max_position_embeddings": _whole(None, f"{ROPE}: of llama3"),
}
_LLAMA = {
  "bos_token_id": _free(1, SYMBOLS),
  "eos_token_id": _free(2, SYMBOLS),
  "pretraining_tp": _free(1, TRAINING),
}
_MISTRAL = {
  "intermediate_size": _whole(14336, "`mlp_dim`"),
  "num_key_value_heads": _whole(8, "`num_kv_heads`; null is `num_attention_heads`"),
  "max_position_embeddings": _whole(4096 * 32, _DECODER["max_position_embeddings"].use),
  "bos_token_id": _free(1, SYMBOLS),
  "eos_token_id": _free(2, SYMBOLS),
  "sliding_window": _whole(4096, WINDOW),
}
_QWEN = {
  "vocab_size": _whole(151936, _DECODER["vocab_size"].use),
  "intermediate_size": _whole(22016, "`mlp_dim`"),
  "num_key_value_heads": _whole(32, "`num_kv_heads`; null is `num_attention_heads`"),
  "max_position_embeddings": _whole(32768, _DECODER["max_position_embeddings"].use),
  "use_sliding_window": _bool(False, WINDOW),
  "sliding_window": _whole(4096, WINDOW),
}
_QWEN_LAYERS = {
  "max_window_layers": _whole(28, WINDOW),
  "layer_types": Setting(
    None, WINDOW, lambda x: x is None or _are_layer_types(x), "a list of full_ or sliding_attention"
  ),
}
_EXPERTS = {
  "num_experts_per_tok": _whole(2, "`moe.top_k`; 1 is refused where weights are renormalised"),
  "num_local_experts": _whole(8, "`moe.num_experts`"),
  "output_router_logits": _free(False, OUTPUTS),
  "router_aux_loss_coef": _free(0.001, TRAINING),
}


def _are_layer_types(value: Any) -> bool:
  return isinstance(value, list) and all(
    x in ("full_attention", "sliding_attention") for x in value
  )


def _is_side(value: Any) -> bool:
  pair = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
  return value is None or _is_whole(value[0] if pair else value)


def _side(default: int, use: str) -> Setting:
  return Setting(default, use, _is_side, "a whole number, or two that are equal")


_VISION = {
  "hidden_size": _whole(768, "`width`"),
  "intermediate_size": _whole(3072, "`mlp_dim`"),
  "num_hidden_layers": _whole(12, "`depth`"),
  "num_attention_heads": _whole(12, "`num_heads`"),
  "num_channels": _only(3),
  "image_size": _side(224, "`image_size`, `position_grid`"),
  "attention_dropout": _free(0.0, TRAINING),
}
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")

# By model_type.
TABLES: dict[str, dict[str, Setting]] = {
  "llama": _ANY | _DECODER | _LLAMA,
  "mistral": _ANY | _DECODER | _MISTRAL,
  "qwen2": _ANY | _DECODER | _QWEN | _QWEN_LAYERS,
  "qwen3": _ANY | _DECODER | _QWEN | _QWEN_LAYERS | {"head_dim": _whole(128, "`head_dim`")},
  "mixtral": _ANY
  | _DECODER
  | _MISTRAL
  | _EXPERTS
  | {
    "sliding_window": _whole(None, WINDOW),
    "rms_norm_eps": _number(1e-5, "`norm_eps`"),
    "router_jitter_noise": _free(0.0, TRAINING),
  },
  "qwen3_moe": _ANY
  | _DECODER
  | _QWEN
  | _EXPERTS
  | {
    "hidden_size": _whole(2048, "`width`"),
    "intermediate_size": _free(6144, "without effect: of dense layers, and there are none"),
    "num_hidden_layers": _whole(24, "`depth`"),
    "num_key_value_heads": _whole(4, "`num_kv_heads`; null is `num_attention_heads`"),
    "moe_intermediate_size": _whole(768, "`mlp_dim`"),
    "num_experts_per_tok": _whole(8, _EXPERTS["num_experts_per_tok"].use),
    "num_experts": _whole(128, "`moe.num_experts`"),
    "num_local_experts": _whole(None, "the same as `num_experts`"),
    "norm_topk_prob": _bool(False, "refused where it is false and several experts are chosen"),
    "decoder_sparse_step": _only(1),
    "mlp_only_layers": Setting(None, "only an empty list", lambda x: x in (None, []), "[]"),
  },
  "clip_vision_model": _ANY
  | _VISION
  | {
    "patch_size": _side(32, "`patch_size`"),
    "hidden_act": _only("quick_gelu", *ACTIVATIONS[1:]),
    "layer_norm_eps": _number(1e-5, "`norm_eps`"),
    "projection_dim": _free(512, "without effect: after the features"),
    "initializer_range": _free(0.02, TRAINING),
    "initializer_factor": _free(1.0, TRAINING),
  },
  "siglip_vision_model": _ANY
  | _VISION
  | {
    "patch_size": _side(16, "`patch_size`"),
    "hidden_act": _only("gelu_pytorch_tanh", *ACTIVATIONS[:2]),
    "layer_norm_eps": _number(1e-6, "`norm_eps`"),
    "vision_use_head": _free(True, "without effect: after the features"),
  },
}
# Sizes that no model works without; `null` in a file is not the default.
_MAY_BE_NULL = {
  *("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "mlp_only_layers"),
  *("rope_parameters", "rope_theta", "rope_scaling", "original_max_position_embeddings"),
  *("num_local_experts",),
}


def read(kind: str, given: Settings) -> Settings:
  """Returns all settings of a family: those of a file, and what `transformers` has for the others.

  Raises:
    ConvertError: one is of another type, or cannot be expressed.
  """
  table = TABLES[kind]
  settings = {key: setting.default for key, setting in table.items()}
  for key, value in given.items():
    setting = table.get(key)
    if setting is None or setting.check is None:
      continue
    try:
      good = setting.check(value)
    except (OverflowError, ValueError):  # infinity, or NaN, as a whole number
      good = False
    if not good:
      raise ConvertError(
        f"{key} is {untrusted.shown(value)}; only {setting.must_be} can be imported."
      )
    if value is not None or key in _MAY_BE_NULL:
      settings[key] = int(value) if setting.must_be == "a whole number" and value else value
  return settings


def unread(kind: str, given: Settings) -> list[str]:
  """Returns the keys that the classes of `transformers` do not have."""
  return sorted(given.keys() - TABLES[kind].keys())


def of_vision(kind: str, given: Settings) -> tuple[str, Settings]:
  """Returns the kind and the settings of the encoder in a CLIP's or a SigLIP's config.

  A `vision_config_dict`, which the first CLIPs have, is a whole config: what it leaves out is at
  its default, whatever `vision_config` says.
  """
  if kind in TABLES:
    return kind, given
  inner = f"{kind}_vision_model"
  own = _inner(given, "vision_config")
  if kind == "clip" and given.get("vision_config_dict") is not None:
    defaults = {key: setting.default for key, setting in TABLES[inner].items()}
    own = {**own, **defaults, **_inner(given, "vision_config_dict")}
  return inner, own


def _inner(given: Settings, key: str) -> dict[str, Any]:
  value = given.get(key)
  if value is not None and not isinstance(value, dict):
    raise ConvertError(f"{key} is {untrusted.shown(value)}; it must be an object.")
  return dict(value or {})


class Rope(NamedTuple):
  """A decoder's rotary positions."""

  theta: float
  scaling: RopeScaling | None


def rope(kind: str, settings: Settings) -> Rope:
  """Returns theta and the scaling, in the order of `transformers` where they are said twice.

  `rope_scaling`, if it holds anything, is taken for `rope_parameters`; a theta in the object for
  one beside it (`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`).

  Raises:
    ConvertError: it is scaled in another way than Llama 3's, or differs from layer to layer.
  """
  where = "rope_scaling" if settings["rope_scaling"] else "rope_parameters"
  said = settings[where] or {}
  for key, value in said.items():
    if isinstance(value, dict):
      raise ConvertError(
        f"{where} has an object under '{key}': RoPE that differs from layer to layer cannot be "
        "imported."
      )
  if _number_of(said, where, "partial_rotary_factor", 1) != 1:
    part = said["partial_rotary_factor"]
    raise ConvertError(f"partial_rotary_factor in {where} is {part}; only 1 can be imported.")
  default = 1e6 if kind == "mixtral" else 1e4
  beside = settings["rope_theta"]
  theta = _number_of(said, where, "rope_theta", default if beside is None else beside)
  how = said.get("rope_type") or said.get("type") or "default"
  if how == "default" or (how == "linear" and _number_of(said, where, "factor") == 1):
    return Rope(float(theta), None)
  if how != "llama3":
    raise ConvertError(
      f"{where}: RoPE of type {untrusted.shown(how)} is not supported; 'default' and 'llama3' are."
    )
  positions = _number_of(
    said,
    where,
    "original_max_position_embeddings",
    settings["original_max_position_embeddings"] or settings["max_position_embeddings"],
  )
  beside = settings["original_max_position_embeddings"]
  if beside is not None and beside != positions:
    raise ConvertError(
      f"original_max_position_embeddings is {beside}, and {positions} in {where}; make them equal."
    )
  scaling = RopeScaling(
    float(_number_of(said, where, "factor")),
    float(_number_of(said, where, "low_freq_factor")),
    float(_number_of(said, where, "high_freq_factor")),
    int(positions),
  )
  return Rope(float(theta), scaling)


def _number_of(said: Settings, where: str, key: str, default: float | None = None) -> float:
  value = said.get(key)
  if value is None:
    value = default
  if value is None:
    raise ConvertError(f"{where} has no '{key}'.")
  if not _is_number(value):
    raise ConvertError(f"{key} in {where} is {untrusted.shown(value)}; it must be a number.")
  return value


def window(settings: Settings) -> int | None:
  """Returns the positions that a layer sees back; None if all see everything before them."""
  size = settings.get("sliding_window")
  if size is None or not settings.get("use_sliding_window", True):
    return None
  layers = settings.get("layer_types")
  if layers is None and settings.get("max_window_layers", 0) >= settings["num_hidden_layers"]:
    return None
  return size if layers is None or "sliding_attention" in layers else None


# Files beside a config.json that say that weights are quantised.
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def refuse_quantised(folder: pathlib.Path, settings: Settings) -> None:
  """Raises ConvertError if a config, or a file beside it, says that weights are quantised."""
  keys = ("quantization_config", "compression_config")
  inner = [settings, *(x for x in settings.values() if isinstance(x, dict))]
  found = next(((key, c[key]) for key in keys for c in inner if c.get(key)), None)
  name, says = f"config.json's {found[0]}" if found else "", found[1] if found else {}
  if not found:
    name = next((name for name in QUANTISED if (folder / name).exists()), "")
    says = untrusted.read_object(folder / name, ConvertError) if name else {}
  if not name:
    return
  says = says if isinstance(says, dict) else {}
  says = says.get("quantization", says) or says  # NVIDIA's files
  how = next((says[key] for key in _METHODS if isinstance(says.get(key), str)), "some method")
  raise ConvertError(
    f"'{folder}': {name} says that the weights are quantised ({untrusted.shown(how)[1:-1]}). Take "
    "the model's weights in float32, float16 or bfloat16, or dequantise them with transformers and "
    "save them anew."
  )


_METHODS = ("quant_method", "quant_algo", "quant_type", "format")
