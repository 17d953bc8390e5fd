# SPDX-License-Identifier: Apache-2.0
"""The fused kernels against attention written out in float32, and where `attend` chooses them.

Splash attention is interpreted. cuDNN's kernel is replaced by XLA, with the very same arguments on
each device; bench/gpu/kernels.py checks the kernel itself, where there is a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mm1_jax.config import BATCH_AXES, MESH_AXES
from mm1_jax.models import attention
from mm1_jax.models.attention import attend, filling, packed_causal_mask
from mm1_jax.models.cudnn import FORWARD_KERNEL, cudnn_attention, has_kernel
from mm1_jax.models.layers import run_blocks
from mm1_jax.models.splash import block_size, splash_attention
from mm1_jax.sharding import LAYOUT
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

LENGTHS = [(100, 28, 96), (256,), (1, 130), ()]  # examples of each row; the rest is padding


def packed(num_positions: int = 256) -> np.ndarray:
  segments = np.zeros((len(LENGTHS), num_positions), np.int32)
  for row, lengths in zip(segments, LENGTHS, strict=True):
    ends = np.cumsum(lengths, dtype=int)
    for i, (length, end) in enumerate(zip(lengths, ends, strict=True), start=1):
      row[end - length : end] = i
  return segments


def inputs(num_kv_heads: int, dtype: str = "float32"):
  """Returns queries of 4 heads, keys, values, and what the outputs are weighed with."""
  rng = np.random.default_rng(0)
  heads = (4, num_kv_heads, num_kv_heads, 4)
  return tuple(jnp.asarray(rng.standard_normal((4, 256, n, 32)), dtype) for n in heads)


def written_out(queries, keys, values, mask):
  """Attention by its formula, every head's logits at once."""
  groups = queries.shape[2] // keys.shape[2]
  keys, values = (jnp.repeat(x, groups, axis=2) for x in (keys, values))
  logits = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, precision="highest") / 32**0.5
  probs = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
  return jnp.einsum("bhqk,bkhd->bqhd", probs, values, precision="highest")


def with_gradients(function, *inputs):
  """Returns the output of queries, keys and values, and the gradients of its weighted sum."""
  *qkv, weights = inputs

  def total(*inputs):
    out = function(*inputs)
    return jnp.sum(out.astype(jnp.float32) * weights), out

  gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)
  return out, *gradients


@pytest.mark.parametrize("path", ["splash", "cudnn", "xla"])
@pytest.mark.parametrize(
  ("num_kv_heads", "sizes"),
  [
    pytest.param(4, (1,), id="one chip"),
    pytest.param(2, (1, 2, 1, 2), id="four, grouped"),
    pytest.param(2, (1, 1, 1, 2, 2), id="positions split", marks=pytest.mark.slow),
    pytest.param(1, (1, 2), id="one kv head", marks=pytest.mark.slow),
    pytest.param(1, (1, 1, 1, 1, 2), id="one kv head, split", marks=pytest.mark.slow),
  ],
)
def test_packed_rows_are_the_written_out_attention(path, num_kv_heads, sizes, monkeypatch):
  """Forward and backward; neither examples nor padding attend to another one."""
  if path == "cudnn":
    monkeypatch.setattr(attention, "has_kernel", lambda *_: True)
    monkeypatch.setattr(
      attention, "cudnn_attention", functools.partial(cudnn_attention, implementation="xla")
    )
  segments, (*qkv, weights) = packed(), inputs(num_kv_heads)
  mask = packed_causal_mask(jnp.asarray(segments), jnp.asarray(segments), 0)
  expected = with_gradients(functools.partial(written_out, mask=mask), *qkv, weights)
  mesh = tiny.mesh(*sizes)
  with jax.set_mesh(mesh):
    where = tiny.put((*qkv, weights, segments), mesh)

    @jax.jit
    def run(*args):
      *rest, segment_ids = args
      split = P(BATCH_AXES, "sequence", "tensor", None)
      rest = [jax.sharding.reshard(x, split) for x in rest]
      if path != "splash":
        segment_ids = jax.sharding.reshard(segment_ids, LAYOUT.act_bs)
        return with_gradients(functools.partial(attend, segment_ids=segment_ids), *rest)

      def kernel(queries, keys, values):
        return splash_attention(
          queries, keys, values, segment_ids, causal=True, block=128, interpret=True
        )

      return with_gradients(kernel, *rest)

    actual = run(*where)
  for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
    assert tiny.largest_difference(a, b) < 2e-5, name


def test_whole_rows_without_causality_and_odd_heads():
  """A picture's patches attend to all others, but not to padding; heads of 80, as in ViT-H."""
  rng = np.random.default_rng(0)
  qkv = [jnp.asarray(rng.standard_normal((2, 128, 2, 80)), jnp.float32) for _ in range(3)]
  valid = jnp.asarray(np.arange(128)[None] < [[100], [90]], jnp.int32)
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    kernel = functools.partial(splash_attention, causal=False, block=128, interpret=True)
    where = [jax.device_put(x, NamedSharding(mesh, LAYOUT.act_bshk)) for x in qkv]
    out = jax.jit(kernel)(*where, tiny.put(valid, mesh))
  for row, length in enumerate((100, 90)):
    q, k, v = (x[row : row + 1, :length] for x in qkv)
    expected = jax.nn.dot_product_attention(q, k, v)
    assert tiny.largest_difference(out[row : row + 1, :length], expected) < 2e-5


@pytest.mark.parametrize(
  ("platform", "num_positions", "packed_rows", "kernel"),
  [
    ("tpu", 256, True, "splash"),
    ("tpu", 200, True, None),  # no whole block
    ("tpu", 256, False, None),
    ("gpu", 256, True, "cudnn"),
    ("gpu", 256, False, "cudnn"),
    ("gpu", 255, True, None),  # odd
    ("cpu", 256, True, None),
  ],
)
def test_attend_chooses_by_the_devices_of_the_mesh(
  platform, num_positions, packed_rows, kernel, monkeypatch
):
  """Not by the host's: a program for a TPU is compiled on machines that have none."""
  calls = []

  def stand_in(*args, causal):
    calls.append(causal)
    return cudnn_attention(*args, causal=causal, implementation="xla")

  monkeypatch.setattr(attention, "cudnn_attention", stand_in)
  mesh = mesh_of(platform)
  with jax.sharding.use_abstract_mesh(mesh):

    def abstract(shape, dtype, spec):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    x = abstract((2, num_positions, 4, 32), jnp.bfloat16, LAYOUT.act_bshk)
    rows = abstract((2, num_positions), jnp.int32, LAYOUT.act_b) if packed_rows else None
    jaxpr = jax.make_jaxpr(lambda x, rows: attend(x, x, x, segment_ids=rows))(x, rows)
  assert ("splash_mha_fwd_segmented" in str(jaxpr)) == (kernel == "splash")
  # Only where rows are packed is there an order of positions to keep to.
  assert calls == ([packed_rows] if kernel == "cudnn" else [])


@pytest.mark.parametrize(("remat", "runs"), [("qkv", 2), ("qkv+attention", 1)])
def test_cudnn_runs_once_where_attention_is_kept(remat, runs, monkeypatch):
  """Its softmax's normaliser has no name, and a backward pass without it runs the kernel again."""
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  mesh = mesh_of("gpu")
  x = jax.ShapeDtypeStruct(
    (2, 256, 4, 64), jnp.bfloat16, sharding=NamedSharding(mesh, LAYOUT.act_bshk)
  )

  def total(x):
    block = lambda x, _: (attend(x, x, x), None)
    x, _ = run_blocks(block, x, jnp.zeros(3), remat=remat, scan=True)
    return jnp.sum(x.astype(jnp.float32))

  with jax.sharding.use_abstract_mesh(mesh):
    jaxpr = jax.make_jaxpr(jax.grad(total))(x)
  assert str(jaxpr).count(f"= {FORWARD_KERNEL}[") == runs


def mesh_of(platform: str) -> AbstractMesh:
  device = AbstractDevice(device_kind="TPU v5", num_cores=1, platform=platform)
  types = (AxisType.Explicit,) * len(MESH_AXES)
  return AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, axis_types=types, abstract_device=device)


@pytest.mark.parametrize(
  ("dtype", "head_dim", "served"),
  [
    ("bfloat16", 80, True),
    ("float32", 64, False),
    ("bfloat16", 20, False),
    ("bfloat16", 160, False),
  ],
)
def test_cudnn_serves_16_bits_and_usual_heads(dtype, head_dim, served):
  x, token = (jnp.zeros((1, length, 2, head_dim), dtype) for length in (4, 1))
  with jax.sharding.use_abstract_mesh(mesh_of("gpu")):
    assert has_kernel(x, x) == served
    assert not has_kernel(token, x)  # as in decoding


@pytest.mark.parametrize(("platform", "more"), [("tpu", 640 - 577), ("gpu", 1), ("cpu", 0)])
def test_pictures_are_filled_up_for_the_kernel(platform, more):
  with jax.sharding.use_abstract_mesh(mesh_of(platform)):
    assert filling(577) == more


@pytest.mark.parametrize(
  ("num_positions", "kind", "expected"),
  [
    (4096, "TPU v5", 512),
    (4096, "TPU v6 lite", 1024),
    (2048, "TPU7x", 2048),
    (128, "TPU v5", 128),
    (768, "TPU v5", 384),
    (1152, "TPU v6 lite", 384),
  ],
)
def test_blocks_divide_the_row(num_positions, kind, expected):
  assert block_size(num_positions, kind) == expected


def test_a_picture_is_one_block():
  assert block_size(768, "TPU v5", causal=False) == 768


@pytest.mark.slow
def test_pictures_filled_up_to_whole_blocks_have_the_same_features(monkeypatch):
  """As on a TPU: 7 positions become 128; the real ones must not attend to those added.

  Features and gradients; the kernel is interpreted.
  """
  cfg = tiny.model_config()
  monkeypatch.setattr(
    attention, "splash_attention", functools.partial(splash_attention, interpret=True)
  )
  images = jnp.asarray(np.random.default_rng(2).integers(0, 255, (4, 8, 12, 3)), jnp.uint8)
  mesh = tiny.mesh(1, 2, 1, 2)
  outs = []
  with jax.set_mesh(mesh):
    encoder = tiny.make_model(cfg, mesh).vit
    images = jax.device_put(images, NamedSharding(mesh, LAYOUT.act_i))

    def total(encoder):
      features = encoder(images)
      return jnp.sum(jnp.sin(7 * features)), features

    for kind in (None, "TPU v5"):
      monkeypatch.setattr(attention, "tpu_kind", lambda kind=kind: kind)
      gradient = jax.jit(jax.grad(lambda encoder: total(encoder), has_aux=True))
      outs.append(gradient(encoder))
  (expected, features), (actual, filled) = outs
  assert tiny.largest_difference(filled, features) < 2e-5
  for name, grad in tiny.names(expected).items():
    if not name.endswith("key_bias"):
      assert tiny.largest_difference(tiny.names(actual)[name], grad) < 1e-4, name
