# SPDX-License-Identifier: Apache-2.0
"""Pieces that the configs share: the stages, the encoder, the shipped sample, mesh presets."""

import pathlib
from collections.abc import Mapping

from ml_collections import ConfigDict

import mm1_jax
from mm1_jax.config import RunConfig

SAMPLE = pathlib.Path(mm1_jax.__file__).parent / "data" / "sample"


def base(name: str) -> ConfigDict:
  """Returns every setting at its default."""
  values = RunConfig(name=name).to_dict()
  values["data"].update(sources={}, eval_sources={})  # by name, see `mixture`
  values["eval_tasks"] = {}  # by name, too
  return ConfigDict(values)


# Shares of positions; see `mixture`, and `data.weight_by`.
MM1 = {"captions": 0.45, "interleaved": 0.45, "text": 0.10}
# 7% of the captions are synthetic (VeCap).
MM1_VECAP = {**MM1, "captions": (0.45, {"web": 0.93, "vecap": 0.07})}
MM1_5 = {"captions": 0.50, "interleaved": 0.10, "text": 0.40}
# Conversations of MM1 (appendix A.3), in thousands. The papers draw examples at random from all of
# them, so these weights are shares of examples, as `sft` sets it.
MM1_SFT = {
  "text": 13,  # Apple's own
  "llava_conversation": 57,
  "llava_complex": 77,
  "sharegpt4v": 102,
  "vqav2": 83,
  "gqa": 72,
  "okvqa": 9,
  "ocrvqa": 80,
  "aokvqa": 66,
  "coco_captions": 83,
  "textcaps": 22,
  "synthdog_en": 500,
  "dvqa": 200,
  "chartqa": 18,
  "docvqa": 39,
  "ai2d": 15,
  "infovqa": 24,
}
# MM1.5's (arXiv 2409.20566, Fig. 4): shares of the groups, and in them thousands of conversations;
# of examples again.
# Which sets of "knowledge" are mathematics, science or code is our reading.
MM1_5_SFT = {
  "single": (
    0.8,
    {
      "general": (
        11.3,
        {
          "llava_conversation": 56.7,
          "vqav2_okvqa": 91.8,
          "gqa": 72.1,
          "aokvqa": 66.2,
          "coco_captions": 82.8,
          "llava_complex": 76.6,
          "sharegpt4v": 96.1,
        },
      ),
      "text_rich": (
        37.2,
        {
          "synthdog_en": 500,
          "dvqa": 200,
          "docvqa": 128.5,
          "arxivqa": 100,
          "tabfact": 91.6,
          "screenqa": 80.8,
          "ocrvqa": 80,
          "wikisql": 75,
          "chartqa": 66.7,
          "infovqa": 52.3,
          "wikitq": 38.2,
          "wikitable": 35.8,
          "textvqa": 34.6,
          "kleister_charity": 27.7,
          "chart2text": 27,
          "visualmrc": 24.5,
          "tabmwp": 22.7,
          "textcaps": 22,
          "stvqa": 17.2,
          "vistext": 10,
          "renderedtext": 10,
          "deepform": 7,
          "finqa": 5.3,
          "hitab": 2.5,
          "tatqa": 2.2,
        },
      ),
      "refer_ground": (
        22.5,
        {
          "visual_genome": 267.6,
          "spatial_negative": 213.6,
          "refcoco": 210,
          "flickr30k": 200.8,
          "region_reasoning": 76.6,
        },
      ),
      "math": (5.6, {"clevr": 70, "raven": 42, "iconqa": 27.3, "geomverse": 9.3, "intergps": 1.3}),
      "code": (2.3, {"datikz": 48, "websight": 10, "design2code": 0.5}),
      "science": (1.1, {"scienceqa": 5, "ai2d": 3.2}),
    },
  ),
  "multi": (
    0.1,
    {
      "coinstruct": 132.3,
      "nlvr2": 86.4,
      "iconqa": 64.5,
      "dreamsim": 15.9,
      "spot_the_diff": 8,
      "multivqa": 5,
      "nextqa": 3.9,
      "star": 3,
      "birds_to_words": 2.6,
      "coco_interleaved": 2.1,
      "icl_instruct": 0.4,
    },
  ),
  "text": (
    0.1,
    {
      "openorca": 994,
      "mathinstruct": 262,
      "orcamath": 200,
      "opencodeinterpreter": 66,
      "wizardcoder": 43,
      "dolly": 11,
    },
  ),
}


def pretrain(name: str, *, data: str = "data") -> ConfigDict:
  """Returns MM1's pre-training (section 3.3): 200k steps of 512 x 4096, 45:45:10, AdamW.

  `data` is the folder of the ArrayRecord shards and of the tokenizer; set it to your own, or set
  `--config.data.sources.captions.path` and its like. For another mixture:
  `config.data.sources = common.mixture(data, common.MM1_5)`.
  """
  config = base(name)
  config.data.tokenizer = f"{data}/tokenizer.model"
  config.data.sources = mixture(data, MM1)
  config.data.eval_sources = mixture(data, dict.fromkeys(MM1, 1.0), part="heldout")
  # MM1's batch has as many image tokens as text (section 3.3): about 14 pictures a row, so 16 slots
  # suit web data. Textbooks need 10: the log says how many suit yours, and unused ones cost time.
  config.data.images_per_row = 16
  config.train.eval_batches = 8
  config.checkpoint.keep_period = 20_000
  return config


def encoder_from_random(config: ConfigDict) -> ConfigDict:
  """Sets the rates of an encoder and a connector that start from random weights.

  MM1's law is for decoders beside a trained encoder. At the 1.9e-3 that it gives `mm1_debug` an
  encoder learns a third of what it does at 4e-4, or collapses; the sweep is
  `python -m bench.train.encoder_rates`. Larger ones were not swept here; CLIP's were trained at
  4e-4 to 5e-4 (arXiv 2103.00020, table 20).
  """
  config.optimizer.vit_learning_rate = config.optimizer.connector_learning_rate = 4e-4
  return config


def sft(config: ConfigDict, *, data: str = "data") -> ConfigDict:
  """Returns MM1's supervised fine-tuning (section 4) of a pre-trained `config`.

  10k steps of 256 x 2048, Adafactor at 1e-5 to 0, everything trained, loss on answers only.
  Examples are drawn at random from all sets: weights are shares of examples. Set
  `--config.train.init_from` to the pre-training run.
  """
  config.name += "_sft"
  config.data.sources = mixture(data, {"sft": 1.0})
  config.data.eval_sources = mixture(data, {"sft": 1.0}, part="heldout")
  config.data.reweight = ()
  config.data.weight_by = "examples"
  config.data.chat = True
  config.data.seq_len, config.data.batch_size = 2048, 256
  config.data.images_per_row = 6
  config.train.num_steps = 10_000
  adafactor(config, learning_rate=1e-5)
  return config


def adafactor(config: ConfigDict, *, learning_rate: float) -> None:
  """Sets the optimizer of the stages after pre-training: one rate, to 0 along a cosine."""
  config.optimizer.update(
    name="adafactor",
    learning_rate=learning_rate,
    warmup_steps=300,
    final_fraction=0.0,
    weight_decay=0.0,
  )
  config.optimizer.vit_learning_rate = None
  config.optimizer.connector_learning_rate = None


def lora(config: ConfigDict, *, rank: int = 128, alpha: float = 256.0) -> ConfigDict:
  """Returns fine-tuning for small machines: adapters of the decoder, and the connector.

  Rank and rates are those of LLaVA-1.5's LoRA script; the optimizer is AdamW, the encoder frozen.
  """
  config.name += "_lora"
  config.model.decoder.lora = ConfigDict({"rank": rank, "alpha": alpha})
  config.optimizer.update(name="adamw", learning_rate=2e-4, connector_learning_rate=2e-5)
  config.optimizer.frozen = ("vit",)
  return config


def high_resolution(config: ConfigDict, **tiling) -> ConfigDict:
  """Returns `config` with an encoder of 672 pixels, and pictures cut as `TilingConfig` says."""
  config.name += "_high_res"
  config.model.vision.image_size = (672, 672)
  config.data.tiling = ConfigDict(tiling)
  return config


Weights = Mapping[str, "float | tuple[float, Weights]"]


def mixture(folder: str, weights: Weights, *, part: str = "train", prefix: str = "") -> ConfigDict:
  """Returns sources that read `FOLDER/NAME-PART-*.arrayrecord`, with their weights.

  A group has a weight and, for its sources, weights in it: `{"captions": (0.45, {"web": 0.93,
  "vecap": 0.07}), "text": 0.55}` has 45% captions and reads `captions_web-train-*.arrayrecord`.
  """
  config = ConfigDict()
  for name, weight in weights.items():
    if isinstance(weight, tuple):
      weight, inside = weight
      group = mixture(folder, inside, part=part, prefix=f"{prefix}{name}_")
      config[name] = ConfigDict({"weight": weight, "sources": group})
    else:
      path = f"{folder}/{prefix}{name}-{part}-*.arrayrecord"
      config[name] = ConfigDict({"path": path, "weight": weight})
  return config


def decoder(
  config: ConfigDict, *, depth: int, width: int, heads: int, kv_heads: int, mlp_dim: int
) -> None:
  """Sets the decoder's shape; heads split the width evenly."""
  config.model.decoder.update(
    depth=depth,
    width=width,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=width // heads,
    mlp_dim=mlp_dim,
  )


# What keeps the matrix products of a block, see `model.remat`: all but one of the encoder's, all,
# the experts' too, or those of attention alone.
KEEP_DECODER = "qkv+attention+residual+mlp_gate+mlp_up"
KEEP_PRODUCTS = f"{KEEP_DECODER}+vit_mlp_up"
KEEP_EXPERTS = f"{KEEP_PRODUCTS}+expert_gate+expert_up"
KEEP_ATTENTION = "qkv+attention"

Presets = Mapping[str, Mapping[str, "int | str"]]


def preset(*, steps: int = 1, remat: str = "full", **mesh: int) -> Mapping[str, int | str]:
  """Returns overrides for a slice: micro-batches, what is kept, and the mesh's axes."""
  axes = {f"mesh.{axis}": length for axis, length in ({"fsdp": 1} | mesh).items()}
  return {**axes, "train.accumulation_steps": steps, "model.remat": remat}


def on_slice(config: ConfigDict, presets: Presets, name: str) -> ConfigDict:
  """Returns `config` set up for a TPU slice, such as "v5p-512"; as it is where `name` is "".

  The presets of v5p were found by quick plans, see docs/notes/plans.md.
  """
  if not name:
    return config
  if name not in presets:
    raise ValueError(
      f"{config.name} has no preset for '{name}', only for {', '.join(presets)}. For another slice "
      f"name none, and set --config.mesh.fsdp=... and --config.train.accumulation_steps=..."
    )
  config.update_from_flattened_dict(presets[name])
  return config


def moe(config: ConfigDict, *, num_experts: int, every: int) -> ConfigDict:
  """Returns `config` with every `every`-th layer sparse; the rate stays the dense backbone's."""
  config.name += "_moe"
  config.model.decoder.moe = ConfigDict({"num_experts": num_experts, "every": every})
  return config
