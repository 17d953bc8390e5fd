# SPDX-License-Identifier: Apache-2.0
"""Our blocks against code that we did not write: CLIP, Honeybee's timm stages, Llama, Mixtral.

The files come from `tests/goldens/make_parity.py`, which says how. Pre-trained weights only work in
our modules if these agree.
"""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax.config import (
  ConnectorConfig,
  DecoderConfig,
  ModelConfig,
  MoEConfig,
  VisionConfig,
)
from mm1_jax.models.connector import Connector
from mm1_jax.models.decoder import Decoder
from mm1_jax.models.vit import ViT
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

FOLDER = pathlib.Path(__file__).parent.parent / "goldens" / "parity"
TOLERANCE = 1e-5  # of the largest value; measured: 1e-6


class Reference:
  """One fixture: its sizes, arrays, and weights by the reference's names."""

  def __init__(self, name: str):
    with np.load(FOLDER / f"{name}.npz") as file:
      self.arrays = dict(file)
    self.config = json.loads(str(self.arrays["config"]))

  def __call__(self, name: str) -> np.ndarray:
    return self.arrays[f"weights/{name}"].astype(np.float32)


def load(make, weights: dict[str, np.ndarray], mesh):
  """Returns the module with exactly these weights; a name too many or too few is a mistake."""
  module = tiny.place(make, mesh, lambda name, shape: weights[name])
  assert set(tiny.names(module)) == set(weights)
  return module


@pytest.fixture(scope="module")
def mesh():
  return tiny.mesh()


def stacked(depth: int, weights) -> dict[str, np.ndarray]:
  """Returns the weights of `depth` equal blocks, each stacked along a leading dim."""
  blocks = [weights(i) for i in range(depth)]
  return {name: np.stack([block[name] for block in blocks]) for name in blocks[0]}


# The vision tower of `transformers`' CLIP.


def clip_weights(ref: Reference, num_blocks: int) -> dict[str, np.ndarray]:
  cfg = ref.config
  heads, head_dim = cfg["num_heads"], cfg["width"] // cfg["num_heads"]
  positions = ref("embeddings.position_embedding.weight")
  side = cfg["side"] // cfg["patch_size"]

  def block(i: int) -> dict[str, np.ndarray]:
    at = f"encoder.layers.{i}."
    weights = {}
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
      weight = ref(f"{at}self_attn.{theirs}_proj.weight")
      weights[f"blocks.attention.{ours}"] = weight.T.reshape(-1, heads, head_dim)
      bias = ref(f"{at}self_attn.{theirs}_proj.bias")
      weights[f"blocks.attention.{ours}_bias"] = bias.reshape(heads, head_dim)
    out = ref(f"{at}self_attn.out_proj.weight")
    return weights | {
      "blocks.attention.out": out.T.reshape(heads, head_dim, -1),
      "blocks.attention.out_bias": ref(f"{at}self_attn.out_proj.bias"),
      "blocks.attention_norm.scale": ref(f"{at}layer_norm1.weight"),
      "blocks.attention_norm.bias": ref(f"{at}layer_norm1.bias"),
      "blocks.mlp_norm.scale": ref(f"{at}layer_norm2.weight"),
      "blocks.mlp_norm.bias": ref(f"{at}layer_norm2.bias"),
      "blocks.mlp.up": ref(f"{at}mlp.fc1.weight").T,
      "blocks.mlp.up_bias": ref(f"{at}mlp.fc1.bias"),
      "blocks.mlp.down": ref(f"{at}mlp.fc2.weight").T,
      "blocks.mlp.down_bias": ref(f"{at}mlp.fc2.bias"),
    }

  return {
    # [out, channel, row, column] -> [(row, column, channel), out]
    "patch": ref("embeddings.patch_embedding.weight").transpose(2, 3, 1, 0).reshape(-1, 32),
    "positions": positions[1:].reshape(side, side, -1),
    "class_token": ref("embeddings.class_embedding"),
    "class_position": positions[0],
    "pre_norm.scale": ref("pre_layrnorm.weight"),
    "pre_norm.bias": ref("pre_layrnorm.bias"),
  } | stacked(num_blocks, block)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_vit_equals_clip(activation, layer, mesh):
  """Fails for GELU in QuickGELU's place, a missing ln_pre, another patch order, pixel scale."""
  ref = Reference(f"clip_{activation}")
  cfg = ref.config
  side = cfg["side"]
  vision = VisionConfig(
    image_size=(side, side),
    patch_size=cfg["patch_size"],
    width=cfg["width"],
    depth=cfg["depth"],
    num_heads=cfg["num_heads"],
    mlp_dim=cfg["mlp_dim"],
    activation=cfg["activation"],
    position_grid=(4, 4),
    feature_layer=layer,
  )
  model = ModelConfig(
    vision=vision, connector=ConnectorConfig(token_grid=(2, 2)), dtype="float32", remat="none"
  )
  with jax.set_mesh(mesh):
    weights = clip_weights(ref, vision.num_blocks)
    vit = load(lambda: ViT(jax.random.key(0), model), weights, mesh)
    features = tiny.jit(lambda vit, x: vit(x))(vit, ref.arrays["images"])
  difference = tiny.largest_difference(features, ref.arrays[f"features{layer}"])
  print(f"parity: ViT {activation} layer {layer}: {difference:.1e}")
  assert difference < TOLERANCE


# Honeybee's C-Abstractor on timm's RegNet stages.


def regnet_weights(ref: Reference, ours: str, theirs: str) -> dict[str, np.ndarray]:
  weights = {
    f"{ours}.conv2": ref(f"{theirs}.conv2.conv.weight")[:, 0].transpose(1, 2, 0),
    f"{ours}.squeeze_excite.down.weight": ref(f"{theirs}.se.fc1.weight")[:, :, 0, 0].T,
    f"{ours}.squeeze_excite.down.bias": ref(f"{theirs}.se.fc1.bias"),
    f"{ours}.squeeze_excite.up.weight": ref(f"{theirs}.se.fc2.weight")[:, :, 0, 0].T,
    f"{ours}.squeeze_excite.up.bias": ref(f"{theirs}.se.fc2.bias"),
    f"{ours}.conv1.weight": ref(f"{theirs}.conv1.conv.weight")[:, :, 0, 0].T,
    f"{ours}.conv3.weight": ref(f"{theirs}.conv3.conv.weight")[:, :, 0, 0].T,
  }
  for i in (1, 2, 3):
    weights[f"{ours}.norm{i}.scale"] = ref(f"{theirs}.conv{i}.bn.weight")
    weights[f"{ours}.norm{i}.bias"] = ref(f"{theirs}.conv{i}.bn.bias")
  if f"weights/{theirs}.downsample.conv.weight" in ref.arrays:
    weights |= {
      f"{ours}.shortcut.weight": ref(f"{theirs}.downsample.conv.weight")[:, :, 0, 0].T,
      f"{ours}.shortcut_norm.scale": ref(f"{theirs}.downsample.bn.weight"),
      f"{ours}.shortcut_norm.bias": ref(f"{theirs}.downsample.bn.bias"),
    }
  return weights


@pytest.mark.parametrize("name", ["c_abstractor", "c_abstractor_equal_width"])
def test_c_abstractor_equals_honeybee(name, mesh):
  """Fails for another bin rule, SE width, norm epsilon, shortcut, activation or flattening."""
  ref = Reference(name)
  cfg = ref.config
  rows, columns = cfg["grid"]
  model = ModelConfig(
    vision=VisionConfig(
      image_size=(14 * rows, 14 * columns),
      width=cfg["in_dim"],
      num_heads=2,
      position_grid=(rows, columns),
    ),
    connector=ConnectorConfig(
      token_grid=tuple(cfg["tokens"]), hidden=cfg["hidden"], depth=cfg["depth"]
    ),
    decoder=DecoderConfig(width=cfg["out_dim"]),
    dtype="float32",
  )
  weights = {"positions": ref("pos_emb").reshape(rows, columns, -1)}
  for ours, theirs in (("stage1", "net.0"), ("stage2", "net.2")):
    for i in range(cfg["depth"]):
      weights |= regnet_weights(ref, f"body.{ours}.{i}", f"{theirs}.b{i + 1}")
  for ours, theirs in ((0, 0), (1, 2)):
    weights[f"readout.layers.{ours}.weight"] = ref(f"readout.{theirs}.weight").T
    weights[f"readout.layers.{ours}.bias"] = ref(f"readout.{theirs}.bias")
  patches = ref.arrays["patches"].reshape(2, rows, columns, -1)
  with jax.set_mesh(mesh):
    connector = load(lambda: Connector(jax.random.key(0), model), weights, mesh)
    tokens = tiny.jit(lambda connector, x: connector(x))(connector, patches)
  difference = tiny.largest_difference(tokens, ref.arrays["tokens_out"])
  print(f"parity: {name}: {difference:.1e}")
  assert difference < TOLERANCE


# Decoders of `transformers`.


def decoder_weights(ref: Reference) -> dict[str, np.ndarray]:
  cfg = ref.config
  head_dim = cfg["head_dim"]

  def layer(i: int) -> dict[str, np.ndarray]:
    at, us = f"model.layers.{i}.", "units.layers.0."
    weights = {}
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
      weight = ref(f"{at}self_attn.{theirs}_proj.weight").T
      weights[f"{us}attention.{ours}"] = weight.reshape(weight.shape[0], -1, head_dim)
    out = ref(f"{at}self_attn.o_proj.weight").T
    weights[f"{us}attention.out"] = out.reshape(-1, head_dim, out.shape[-1])
    if f"weights/{at}self_attn.q_norm.weight" in ref.arrays:
      weights[f"{us}attention.query_norm.scale"] = ref(f"{at}self_attn.q_norm.weight")
      weights[f"{us}attention.key_norm.scale"] = ref(f"{at}self_attn.k_norm.weight")
    weights[f"{us}attention_norm.scale"] = ref(f"{at}input_layernorm.weight")
    weights[f"{us}mlp_norm.scale"] = ref(f"{at}post_attention_layernorm.weight")
    if "num_local_experts" in cfg:
      both = ref(f"{at}mlp.experts.gate_up_proj").transpose(0, 2, 1)
      weights[f"{us}mlp.router"] = ref(f"{at}mlp.gate.weight").T
      weights[f"{us}mlp.gate"], weights[f"{us}mlp.up"] = np.split(both, 2, axis=-1)
      weights[f"{us}mlp.down"] = ref(f"{at}mlp.experts.down_proj").transpose(0, 2, 1)
    else:
      for ours in ("gate", "up", "down"):
        weights[f"{us}mlp.{ours}"] = ref(f"{at}mlp.{ours}_proj.weight").T
    return weights

  weights = {
    "embedding": ref("model.embed_tokens.weight"),
    "norm.scale": ref("model.norm.weight"),
  } | stacked(cfg["num_hidden_layers"], layer)
  return weights if cfg["tie_word_embeddings"] else weights | {"head": ref("lm_head.weight")}


@pytest.fixture(scope="module", params=["llama", "llama_one_kv_head", "qwen3", "mixtral"])
def decoder(request, mesh):
  """Returns our decoder with the reference's weights, and the reference."""
  ref = Reference(request.param)
  cfg = ref.config
  experts = cfg.get("num_local_experts")
  model = tiny.model_config(
    decoder=DecoderConfig(
      vocab_size=cfg["vocab_size"],
      width=cfg["hidden_size"],
      depth=cfg["num_hidden_layers"],
      num_heads=cfg["num_attention_heads"],
      num_kv_heads=cfg["num_key_value_heads"],
      head_dim=cfg["head_dim"],
      mlp_dim=cfg["intermediate_size"],
      rope_theta=cfg["rope_theta"],
      norm_eps=cfg["rms_norm_eps"],
      qk_norm=request.param == "qwen3",
      tie_embeddings=cfg["tie_word_embeddings"],
      moe=MoEConfig(experts, 1, cfg["num_experts_per_tok"], None) if experts else None,
    )
  )
  weights = decoder_weights(ref)
  return load(lambda: Decoder(jax.random.key(0), model), weights, mesh), ref


@tiny.jit
def logits(decoder: Decoder, tokens, positions, segment_ids):
  hidden = decoder(decoder.embed(tokens), positions, segment_ids).hidden
  return decoder.logits(hidden)


def test_decoder_equals_the_reference(decoder, mesh):
  """Fails for another RoPE pairing or theta, head grouping, norm epsilon, gate order, router."""
  decoder, ref = decoder
  tokens = ref.arrays["tokens"]
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  with jax.set_mesh(mesh):
    ours = logits(decoder, tokens, positions, np.ones_like(tokens))
  difference = tiny.largest_difference(ours, ref.arrays["logits"])
  print(f"parity: {ref.config}: {difference:.1e}")
  assert difference < TOLERANCE


def test_packed_prompts_equal_the_reference_on_each_alone(decoder, mesh):
  """Two prompts in one row, padding after them: the reference reads each prompt alone."""
  decoder, ref = decoder
  tokens = ref.arrays["tokens"]
  length = tokens.shape[1]
  packed = np.concatenate([tokens.reshape(1, -1), np.zeros((1, 8), np.int32)], axis=1)
  positions = np.concatenate([np.arange(length), np.arange(length), np.arange(8)])[None]
  segments = np.repeat([[1, 2, 0]], [length, length, 8], axis=1)
  with jax.set_mesh(mesh):
    ours = logits(decoder, packed, positions.astype(np.int32), segments.astype(np.int32))
  ours = np.asarray(ours)[:, : 2 * length].reshape(ref.arrays["logits"].shape)
  assert tiny.largest_difference(ours, ref.arrays["logits"]) < TOLERANCE


def test_cached_decoding_equals_the_reference(decoder, mesh):
  """A prompt is read into the cache, and then a token at a time."""
  decoder, ref = decoder
  tokens, prompt = ref.arrays["tokens"], 5
  rows, length = tokens.shape
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)

  @tiny.jit
  def step(decoder, tokens, positions, cache):
    out = decoder(decoder.embed(tokens), positions, jnp.ones_like(tokens), cache)
    return decoder.logits(out.hidden), out.cache

  with jax.set_mesh(mesh):
    cache, pieces = decoder.init_cache(rows, length), []
    for begin, end in itertools.pairwise((0, *range(prompt, length + 1))):
      part = tiny.put((tokens[:, begin:end], positions[:, begin:end]), mesh)
      logits, cache = step(decoder, *part, cache)
      pieces.append(np.asarray(logits))
  assert tiny.largest_difference(np.concatenate(pieces, axis=1), ref.arrays["logits"]) < TOLERANCE
