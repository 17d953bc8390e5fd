# SPDX-License-Identifier: Apache-2.0
"""Out of memory: the compiler's messages, what loops keep, and what is advised."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_3b
from mm1_jax.plan.memory import GIB, advice, kept_arrays, read_shortage
from mm1_jax.plan.topology import find_topology

# As libtpu 0.0.42.1 says it where far too much is asked for.
EARLY = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
  "(54.66G) exceeds available HBM (15.75G)."
)
# As it lists buffers where less is missing.
LATE = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. \
Used 17.20G of 15.75G hbm. Exceeded hbm capacity by 1.45G.

Total hbm usage >= 17.45G:
    reserved        258.00M
    program          14.20G
    arguments         3.00G

Program hbm requirement 14.20G:
    HLO temp         14.20G (99.0% utilization: Unpadded (14.06G) Padded (14.20G))

  Largest program allocations in hbm:

  1. Size: 9.75G
     Operator: op_name="jit(train_step)/jvp()/while/body/dot_general" \
source_file="/REPOSITORY/mm1_jax/models/decoder.py" source_line=62
     Shape: bf16[26,8,4096,6144]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 9.75G
     XLA label: fusion.12 = fusion(...)
     Allocation type: HLO temp
     ==========================

  2. Size: 768.00M
     Shape: f32[8,4096,6144]{2,1,0:T(8,128)}
     Unpadded size: 768.00M
     Allocation type: HLO temp
     ==========================
"""


def test_the_early_message():
  """It counts temporaries alone; what the program is called with is there too."""
  shortage = read_shortage(EARLY, arguments=GIB)
  assert shortage.needed == 55.66 * GIB
  assert shortage.excess == pytest.approx((55.66 - 15.75) * GIB)
  assert shortage.buffers == []


def test_the_late_message_names_buffers():
  shortage = read_shortage(LATE, arguments=GIB)
  assert shortage.excess == pytest.approx(1.45 * GIB)
  first, second = shortage.buffers
  assert first.bytes == 9.75 * GIB
  assert first.shape == "bf16[26,8,4096,6144]"
  assert first.operation == "jit(train_step)/jvp()/while/body/dot_general"
  assert first.source == "mm1_jax/models/decoder.py:62"
  assert (second.bytes, second.source) == (768 * 2**20, "")


def test_another_message_is_not_understood():
  with pytest.raises(ValueError, match="not an out-of-memory message"):
    read_shortage("INTERNAL: something else", arguments=0)


def test_what_a_loop_keeps():
  """Of five blocks tanh(x w): each one's input, and what the policy names."""

  @functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("product")
  )
  def body(x, w):
    return jnp.tanh(checkpoint_name(x @ w, "product")), None

  def loss(x, w):
    return jnp.sum(jax.lax.scan(body, x, w)[0])

  mesh = jax.make_mesh((8,), ("data",))
  rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
  x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
  with jax.set_mesh(mesh):
    traced = jax.jit(jax.grad(loss, argnums=1)).trace(x, jnp.ones((5, 16, 16)))
  kept = kept_arrays(traced.jaxpr.jaxpr)
  stacked = [buffer for buffer in kept if buffer.shape == "float32[5,64@data,16]"]
  assert {buffer.operation for buffer in stacked} == {"a block's input", "product"}
  assert {buffer.bytes for buffer in stacked} == {5 * 64 * 16 * 4 / 8}
  assert kept == sorted(kept, key=lambda buffer: -buffer.bytes)


def test_a_gradient_that_is_not_yet_summed_is_among_what_loops_keep():
  """As with `mesh.sequence`: its type says over which axes, and cannot be read as a plain spec."""
  mesh = jax.make_mesh((4, 2), ("data", "sequence"))

  def loss(w, x):
    w = jax.sharding.reshard(w, jax.P(None, None, None, reduced=frozenset({"data"})))
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), w), x, w)[0])

  x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data")))
  w = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
  with jax.set_mesh(mesh):
    traced = jax.jit(jax.grad(loss)).trace(w, x)
  kept = kept_arrays(traced.jaxpr.jaxpr)
  assert 3 * 16 * 16 * 4 in {buffer.bytes for buffer in kept}


def run_3b(**train) -> RunConfig:
  run = RunConfig.from_dict(mm1_3b.get_config().to_dict())
  return dataclasses.replace(run, train=dataclasses.replace(run.train, **train))


def test_advice_fits_the_run():
  lines = advice(run_3b(accumulation_steps=2), find_topology("v5p-128"))
  assert lines[0].startswith("--config.train.accumulation_steps=4 halves the 4 rows")
  assert lines[1].startswith("--topology=v5p-256")


def test_advice_where_each_device_has_one_row():
  lines = advice(run_3b(accumulation_steps=8), find_topology("v5p-128"))
  assert lines[0].startswith("--config.mesh.sequence=2")
