# SPDX-License-Identifier: Apache-2.0
"""Every chip's compiler takes its options, and with them attention forward and backward."""

import os
import subprocess
import sys

import pytest

from mm1_jax.chips import COMPILER_OPTIONS, compiler_options
from mm1_jax.plan.compile import PlanError, find_libtpu

# A slice of two by two chips of each kind that configs have presets for, with options or without.
TOPOLOGIES = {
  "TPU v5 lite": "v5e:2x2",
  "TPU v5": "v5p:2x2x1",
  "TPU v6 lite": "v6e:2x2",
  "TPU7x": "tpu7x:2x2x1",
}

# A process of its own: the TPU compiler wants its environment set before JAX is imported.
COMPILE = """
import sys
import jax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from mm1_jax.chips import compiler_options
from mm1_jax.config import MESH_AXES
from mm1_jax.models.attention import attend
from mm1_jax.sharding import LAYOUT

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
kind = devices[0].device_kind
print("kind", kind)
axes = (1, len(devices), 1, 1, 1)
mesh = jax.make_mesh(axes, MESH_AXES, (AxisType.Explicit,) * 5, devices=devices)
with jax.set_mesh(mesh):
  def abstract(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  x = abstract((2 * len(devices), 4096, 32, 128), "bfloat16", LAYOUT.act_bshk)
  rows = abstract((2 * len(devices), 4096), "int32", LAYOUT.act_b)
  total = lambda x, rows: attend(x, x, x, segment_ids=rows).astype("float32").sum()
  lowered = jax.jit(jax.grad(total)).lower(x, rows)
assert "splash" in lowered.as_text()
lowered.compile(compiler_options=compiler_options(kind) | dict(o.split("=") for o in sys.argv[2:]))
"""


def compile_with(library: str, topology: str, *options: str) -> subprocess.CompletedProcess:
  environment = {
    "TPU_LIBRARY_PATH": library,
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  return subprocess.run(
    [sys.executable, "-c", COMPILE, topology, *options],
    capture_output=True,
    text=True,
    env=os.environ | environment,
    check=False,
  )


def test_every_kind_with_options_is_tried():
  assert {kind for kind in COMPILER_OPTIONS if kind.startswith("TPU")} <= TOPOLOGIES.keys()
  assert compiler_options("TPU v4") == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_the_compiler_takes_the_options(kind):
  """A new libtpu may drop an option, and would then refuse to compile a run's first step.

  Attention's largest blocks are of what its chip's options let it have.
  """
  try:
    library = find_libtpu().library
  except PlanError as e:
    pytest.skip(str(e))
  done = compile_with(library, TOPOLOGIES[kind])
  assert done.returncode == 0, done.stderr[-2000:]
  assert f"kind {kind}" in done.stdout
  refused = compile_with(library, TOPOLOGIES[kind], "xla_tpu_no_such_option=1")
  assert "xla_tpu_no_such_option" in refused.stderr
