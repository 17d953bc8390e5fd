# SPDX-License-Identifier: Apache-2.0
"""FLOPs counted by hand, by the formula and by the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mm1_jax.config import (
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  RunConfig,
  VisionConfig,
)
from mm1_jax.models import flops, mm1
from mm1_jax.sharding import LAYOUT, abstract_state, make_mesh

pytestmark = pytest.mark.compiles

TINY = RunConfig(
  model=ModelConfig(
    vision=VisionConfig(
      image_size=(4, 4), patch_size=2, width=8, depth=3, num_heads=2, mlp_dim=16, feature_layer=-2
    ),
    connector=ConnectorConfig(token_grid=(1, 2), hidden=4, depth=1, mlp_depth=2),
    decoder=DecoderConfig(
      vocab_size=32,
      width=8,
      depth=4,
      num_heads=4,
      num_kv_heads=2,
      head_dim=4,
      mlp_dim=10,
      moe=MoEConfig(num_experts=6, every=2, top_k=2),
    ),
  ),
  data=DataConfig(seq_len=16, batch_size=3, images_per_row=2),
)


def test_tiny_model_by_hand():
  # ViT: 4 patches and the class token, 2 of 3 blocks run, 6 slots.
  vit = 2 * 4 * 12 * 8 + 2 * (8 * 5 * 64 + 4 * 25 * 8 + 4 * 5 * 8 * 16)
  # C-Abstractor: 8 -> 4 channels on 4 positions with a shortcut, 4 -> 4 on 2, 4 -> 8 -> 8.
  first = 4 * 2 * (8 * 4 + 9 * 4 + 4 * 4 + 8 * 4) + 2 * 2 * (4 * 2)
  second = 2 * 2 * (4 * 4 + 9 * 4 + 4 * 4) + 2 * 2 * (4 * 1)
  connector = first + second + 2 * 2 * (4 * 8 + 8 * 8)
  # Decoder: 2 dense and 2 sparse layers, 48 positions.
  projections = 2 * (8 * 16 + 2 * 8 * 8 + 16 * 8)
  swiglu = 3 * 2 * 8 * 10
  assert flops.model_flops(TINY, 6) == {
    "vit": 3 * 6 * vit,
    "connector": 3 * 6 * connector,
    "decoder/dense": 3 * 48 * (4 * projections + 2 * swiglu),
    "decoder/attention": 3 * 3 * 4 * (2 * 2 * 16 * 16 * 16) // 2,
    "decoder/experts": 3 * 48 * 2 * (2 * 8 * 6 + 2 * swiglu),
    "head": 3 * 48 * 2 * 8 * 32,
    "total": sum(v for k, v in flops.model_flops(TINY, 6).items() if k != "total"),
  }


def test_pictures_count_and_empty_slots_do_not():
  assert flops.image_slots(TINY) == 6
  full, some, none = (flops.model_flops(TINY, num) for num in (6, 1.5, 0))
  for part in ("vit", "connector"):
    assert some[part] == full[part] / 4
    assert none[part] == 0
  assert some["decoder/dense"] == none["decoder/dense"] == full["decoder/dense"] > 0
  assert none["total"] == full["total"] - full["vit"] - full["connector"]


@pytest.mark.parametrize(
  ("frozen", "factors"),
  [
    ((), (3, 3, 3)),
    (("vit",), (1, 3, 3)),
    (("vit", "connector"), (1, 1, 3)),
    (("vit", "decoder"), (1, 3, 2)),  # gradients pass through the decoder to the connector
    (("connector", "decoder"), (3, 2, 2)),
  ],
)
def test_frozen_parts(frozen, factors):
  trained = flops.model_flops(TINY, 6)
  optimizer = OptimizerConfig(frozen=frozen)
  some = flops.model_flops(dataclasses.replace(TINY, optimizer=optimizer), 6)
  names = ("vit", "connector", "head")
  assert tuple(3 * some[name] // trained[name] for name in names) == factors
  assert 3 * some["decoder/experts"] == factors[2] * trained["decoder/experts"]


def test_dense_decoder_is_6_flops_a_parameter_and_position():
  run = RunConfig()  # mm1_3b: 2.7e9 parameters, of them 49152 * 3072 in the tied embedding
  parts = flops.model_flops(run, 0)
  positions = run.data.batch_size * run.data.seq_len
  counted = parts["decoder/dense"] + parts["head"]
  assert counted == pytest.approx(6 * 2.7e9 * positions, rel=0.03)
  assert parts["decoder/experts"] == 0


@pytest.mark.parametrize("kind", ["c_abstractor", "average_pool", "attention_pool", "mlp"])
def test_images_agree_with_the_compilers_count(kind):
  tokens = (9, 9) if kind == "mlp" else (4, 4)
  run = RunConfig(
    model=ModelConfig(
      vision=VisionConfig(
        image_size=(126, 126), width=512, depth=2, num_heads=8, mlp_dim=2048, patch_size=14
      ),
      connector=ConnectorConfig(kind=kind, token_grid=tokens, hidden=768, depth=2),
      decoder=DecoderConfig(width=512, depth=1, num_heads=4, num_kv_heads=2, vocab_size=64),
      dtype="float32",
      scan=False,
      remat="none",
    ),
    data=DataConfig(batch_size=8, images_per_row=1, seq_len=128),
  )
  with jax.set_mesh(make_mesh(run)):
    model = jax.eval_shape(lambda key: mm1.MM1(key, run.model), jax.random.key(0))
    images = jax.ShapeDtypeStruct((8, 1, 126, 126, 3), jnp.uint8)
    lowered = jax.jit(mm1.MM1.embed_image).lower(model, images)
  forward = flops.model_flops(run, 8)
  ours = (forward["vit"] + forward["connector"]) / 3
  assert ours == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


def test_training_the_decoder_agrees_with_the_compilers_count():
  run = RunConfig(
    model=ModelConfig(
      connector=ConnectorConfig(token_grid=(4, 4)),
      decoder=DecoderConfig(width=512, depth=2, num_heads=8, num_kv_heads=2, vocab_size=2048),
      dtype="float32",
      scan=False,
      remat="none",
    ),
    # No whole parts of rows, see `models.blocked`: they leave out what this counts.
    data=DataConfig(batch_size=8, images_per_row=0, seq_len=510),
  )

  def loss(model, x, ids):
    hidden = model.decoder(x, ids, ids).hidden
    return jnp.sum(model.decoder.logits(hidden))

  # Compiled: before that, XLA counts nothing within a `shard_map`.
  mesh = make_mesh(run, jax.devices()[:1])
  with jax.set_mesh(mesh):
    model = abstract_state(lambda: mm1.MM1(jax.random.key(0), run.model), mesh)
    x = jax.ShapeDtypeStruct((8, 510, 512), jnp.float32, sharding=LAYOUT.act_b)
    ids = jax.ShapeDtypeStruct((8, 510), jnp.int32, sharding=LAYOUT.act_b)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(model, x, ids)
    options = {"xla_backend_optimization_level": 0}  # quick to compile
    counted = lowered.compile(compiler_options=options).cost_analysis()["flops"]
  ours = flops.model_flops(run, 0)
  whole_square = ours["total"] + ours["decoder/attention"]  # it does not see the causal half
  assert whole_square == pytest.approx(counted, rel=0.05)


def test_linear_connector_is_one_matmul():
  connector = ConnectorConfig(kind="linear", token_grid=(2, 2))
  model = dataclasses.replace(TINY.model, connector=connector)
  counted = flops.model_flops(dataclasses.replace(TINY, model=model), 6)
  assert counted["connector"] == 3 * 6 * (2 * 4 * 8 * 8)
