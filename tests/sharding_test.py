# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: the gather, batches on the mesh, abstract states, and every param's layout."""

import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mm1_jax.batch import Batch
from mm1_jax.config import FSDP_AXES, MESH_AXES, ConfigError, MeshConfig, RunConfig
from mm1_jax.configs import mm1_3b, mm1_3b_moe, mm1_7b, mm1_7b_moe, mm1_30b, mm1_30b_moe, mm1_debug
from mm1_jax.models.mm1 import MM1
from mm1_jax.plan.topology import find_topology
from mm1_jax.sharding import (
  LAYOUT,
  abstract_state,
  device_batch,
  gather,
  make_mesh,
  make_params_mesh,
)
from mm1_jax.train.step import init_state

pytestmark = pytest.mark.compiles

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "shardings"


def load(kind: str, **mesh: int) -> RunConfig:
  values = mm1_debug.get_config(kind).to_dict()
  values["mesh"] = mesh
  return RunConfig.from_dict(values)


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(load("dense", fsdp=2, expert=2, tensor=2))


def test_mesh_has_every_axis_and_explicit_types(mesh):
  assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2, "sequence": 1}
  assert set(mesh.axis_types) == {AxisType.Explicit}


def test_mesh_that_does_not_fit_the_run_is_refused():
  with pytest.raises(ConfigError, match=r"num_heads 4 does not divide over .* tensor = 8"):
    make_mesh(load("dense", fsdp=1, tensor=8))
  with pytest.raises(ConfigError, match=r"needs 4 devices; there are 8"):
    make_mesh(load("dense", fsdp=4))


def test_a_mesh_for_params_alone_asks_nothing_of_the_rows():
  run = RunConfig.from_dict(load("dense", fsdp=8).to_dict() | {"data": {"batch_size": 3}})
  with pytest.raises(ConfigError, match=r"batch_size .* 3 does not divide"):
    make_mesh(run)
  devices = jax.devices()
  assert make_params_mesh(run.model, run.mesh, devices) == make_mesh(load("dense", fsdp=8))
  with pytest.raises(ConfigError, match=r"num_heads 4 does not divide over .* tensor = 8"):
    make_params_mesh(run.model, MeshConfig(tensor=8), devices)


@pytest.mark.parametrize(
  ("spec", "expected"),
  [
    (P(FSDP_AXES, "tensor"), P(None, "tensor")),
    (P("tensor", FSDP_AXES), P("tensor", None)),
    (P("expert", ("fsdp", "sequence"), "tensor"), P(None, None, "tensor")),
    (P(None, FSDP_AXES), P(None, None)),
    (P(), P()),
  ],
  ids=str,
)
def test_gather_drops_the_fsdp_axes_and_no_other(spec, expected, mesh):
  """Values stay; a weight that stayed split would be multiplied by a part of its input."""
  weight = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
  rows = jax.device_put(np.ones((4, 3)), NamedSharding(mesh, LAYOUT.act_bs))
  with jax.set_mesh(mesh):
    out = gather(jax.device_put(weight, NamedSharding(mesh, spec)), jnp.bfloat16, rows=rows)
  full = P(*expected, *[None] * (3 - len(expected)))
  assert out.sharding.is_equivalent_to(NamedSharding(mesh, full), 3)
  assert out.dtype == jnp.bfloat16
  assert np.array_equal(np.asarray(out, np.float32), weight)


def test_gradient_of_a_gather_is_stored_like_the_weight(mesh):
  """Reduce-scattered, and summed over rows once: not once for each chip."""
  weight = jax.device_put(np.ones((8, 4), np.float32), NamedSharding(mesh, LAYOUT.mlp_df))
  x = jax.device_put(np.ones((4, 3, 8), np.float32), NamedSharding(mesh, LAYOUT.act_b))

  def total(weight):
    return jnp.sum(jnp.einsum("bsd,df->bsf", x, gather(weight, x.dtype, rows=x)))

  with jax.set_mesh(mesh):
    grad = jax.jit(jax.grad(total))(weight)
  assert grad.sharding.is_equivalent_to(weight.sharding, 2)
  assert np.array_equal(np.asarray(grad), np.full((8, 4), 12.0))


@pytest.mark.parametrize("tensor", [1, 2])
def test_gradient_of_a_gather_crosses_data_in_parts_only(tensor):
  """Between the copies of `data` goes what is left on a chip, never a whole weight.

  A weight used by four turns of a loop: its gradient leaves the loop before it leaves the chip.
  """
  mesh = make_mesh(load("dense", data=2, fsdp=4 // tensor, tensor=tensor))
  weight = jax.ShapeDtypeStruct((64, 32), np.float32, sharding=NamedSharding(mesh, LAYOUT.mlp_df))
  x = jax.ShapeDtypeStruct((4, 8, 3, 64), np.float32, sharding=NamedSharding(mesh, P(None, "data")))
  rows = P(None, LAYOUT.act_b[0])

  def total(weight, x):
    x = jax.sharding.reshard(x, rows)
    gathered = gather(weight, x.dtype, rows=x)

    def body(sum, x):
      return sum + jnp.sum(jnp.einsum("bsd,df->bsf", x, gathered) ** 2), None

    return jax.lax.scan(body, jnp.zeros(()), x)[0]

  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(total)).trace(weight, x).lower().compile().as_text()
  assert text is not None
  part = math.prod(weight.sharding.shard_shape(weight.shape))
  entry = text[text.index("ENTRY ") :]
  assert len(list(all_reduces(text))) == len(list(all_reduces(entry)))  # none in the loop
  for size, groups in all_reduces(text):
    # The first half of the devices is one copy, the second half the other.
    crosses = any(min(group) < 4 <= max(group) for group in groups)
    assert size <= part if crosses else size <= part * 4 // tensor
  assert (part, [[i, i + 4] for i in range(4)]) in list(all_reduces(text))


def all_reduces(hlo: str) -> Iterator[tuple[int, list[list[int]]]]:
  """Yields the number of elements, and the groups of devices, of every all-reduce."""
  for dims, groups in re.findall(
    r"= f32\[([\d,]*)\]\S* all-reduce\(.*replica_groups=\{\{([\d,{}]*)\}\}", hlo
  ):
    size = math.prod(int(dim) for dim in dims.split(",") if dim)
    yield size, [[int(i) for i in group.split(",")] for group in groups.split("},{")]


def test_batch_is_split_by_rows_and_keeps_its_values(mesh):
  rng = np.random.default_rng(0)
  rows = rng.integers(0, 9, (8, 6)).astype(np.int32)
  images = rng.integers(0, 256, (8, 2, 4, 4, 3)).astype(np.uint8)
  host = Batch(rows, rows, rows.astype(np.float32), rows, rows, rows, images, np.ones((8, 2), bool))
  batch = device_batch(host, mesh)
  for ours, theirs in zip(batch, host, strict=True):
    assert ours.dtype == theirs.dtype
    assert np.array_equal(np.asarray(ours), theirs)
    # data x fsdp x expert is 4: two rows a chip, the same ones along `tensor`.
    assert {shard.data.shape for shard in ours.addressable_shards} == {(2, *theirs.shape[1:])}


@pytest.fixture(scope="module", params=["dense", "moe"])
def abstract(request, mesh):
  """Returns the abstract state of mm1_debug, its kind, and how to make it."""
  run = load(request.param, fsdp=2, expert=2, tensor=2)

  def make():
    return init_state(MM1(jax.random.key(0), run.model), run)

  return request.param, make, abstract_state(make, mesh)


def name(path) -> str:
  parts = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
  return ".".join(parts[:-1] if parts[-1] == "value" else parts)


def test_params_are_split_as_the_golden_file_says(abstract):
  """One line a param. A weight that is suddenly replicated costs a pod its memory."""
  kind, _, state = abstract
  lines = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.model):
    shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    with jax.set_mesh(leaf.sharding.mesh):
      lines.append(f"{name(path)}: {jax.typeof(jax.eval_shape(lambda x: x, shape))}")
  text = "\n".join(sorted(lines)) + "\n"
  golden = GOLDENS / f"mm1_debug_{kind}_1x2x2x2.txt"
  check_golden(golden, text)


def check_golden(golden: pathlib.Path, text: str) -> None:
  if os.environ.get("UPDATE_GOLDENS"):
    golden.parent.mkdir(parents=True, exist_ok=True)
    golden.write_text(text)
  assert text == golden.read_text(), (
    "The layout of params changed. If you meant it: UPDATE_GOLDENS=1 pytest tests/sharding_test.py"
  )


# The family, each on its preset for this slice; nothing is made but shapes.
FAMILY = {
  mm1_3b: "v5p-128",
  mm1_7b: "v5p-256",
  mm1_30b: "v5p-512",
  mm1_3b_moe: "v5p-256",
  mm1_7b_moe: "v5p-256",
  mm1_30b_moe: "v5p-512",
}
LARGE = 64 * 10**6  # bytes


@pytest.fixture(
  scope="module", params=FAMILY, ids=lambda module: module.__name__.rpartition(".")[2]
)
def family(request):
  """Returns a family config's name, mesh, and abstract state on it."""
  slice_name = FAMILY[request.param]
  run = RunConfig.from_dict(request.param.get_config(slice_name).to_dict())
  sizes = run.check_mesh(find_topology(slice_name).num_devices)
  mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(sizes))
  with jax.sharding.use_abstract_mesh(mesh):
    state = jax.eval_shape(lambda: init_state(MM1(jax.random.key(0), run.model), run))
  return run.name, mesh, state


def num_parts(leaf, mesh: Mapping[str, int]) -> int:
  """Returns how many different parts of an array the devices hold."""
  axes = [axis for entry in leaf.sharding.spec for axis in (np.atleast_1d(entry) if entry else ())]
  return math.prod(mesh[axis] for axis in axes)


def num_bytes(leaf) -> int:
  return leaf.size * leaf.dtype.itemsize


def test_no_large_array_of_the_family_is_replicated(family):
  """Params and moments are split over all axes but `data`, on every slice that has a preset."""
  run_name, _, state = family
  module = next(m for m in FAMILY if m.__name__ == f"mm1_jax.configs.{run_name}")
  leaves = jax.tree_util.tree_leaves_with_path((state.model, state.opt_state))
  large = [(path, leaf) for path, leaf in leaves if num_bytes(leaf) > LARGE]
  assert len(large) > 3 * 10
  for slice_name in module.SLICES:
    run = RunConfig.from_dict(module.get_config(slice_name).to_dict())
    sizes = run.check_mesh(find_topology(slice_name).num_devices)
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    for path, leaf in large:
      wanted = math.prod(sizes) // mesh["data"]
      assert num_parts(leaf, mesh) == wanted, f"{slice_name}: {name(path)}"


def test_the_family_is_split_as_the_golden_files_say(family):
  """One line a large param; the small ones together."""
  run_name, mesh, state = family
  lines, small, whole, here = [], [], 0, 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.model):
    whole += num_bytes(leaf)
    here += num_bytes(leaf) // num_parts(leaf, mesh.shape)
    if num_bytes(leaf) > LARGE:
      with jax.sharding.use_abstract_mesh(mesh):
        lines.append(f"{name(path)}: {jax.typeof(leaf)}")
    else:
      small.append(num_bytes(leaf))
  sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  text = "\n".join(
    [
      f"mesh {sizes}: {whole / 2**30:.2f} GiB of params, {here / 2**30:.3f} GiB a device",
      *sorted(lines),
      f"{len(small)} others: {sum(small) / 2**20:.1f} MiB",
    ]
  )
  check_golden(GOLDENS / f"{run_name}.txt", text + "\n")


def test_moments_live_where_their_params_do(abstract):
  _, _, state = abstract
  params = {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.model)}
  moments = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
    owners = [param for key, param in params.items() if name(path).endswith(f".{key}")]
    if owners:
      moments += 1
      assert any(
        (p.shape, p.dtype, p.sharding) == (leaf.shape, leaf.dtype, leaf.sharding) for p in owners
      ), name(path)
  assert moments == 2 * len(params)


def test_abstract_state_is_the_real_one(mesh):
  """What Orbax restores onto: the same tree, shapes, dtypes and shardings as the real state."""
  run = load("dense", fsdp=2, expert=2, tensor=2)

  def make():
    weight = jnp.ones((4, 8), out_sharding=LAYOUT.mlp_df)
    return {"step": jnp.zeros((), jnp.int32), "weight": weight, "vector": jnp.ones(3)}

  assert run.model.dtype == "float32"
  abstract = abstract_state(make, mesh)
  with jax.set_mesh(mesh):
    real = jax.jit(make)()
  assert jax.tree.structure(abstract) == jax.tree.structure(real)
  for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.mesh == mesh
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.slow
def test_abstract_state_of_a_model_is_the_real_one(abstract, mesh):
  _, make, state = abstract
  with jax.set_mesh(mesh):
    real = jax.jit(make, compiler_options={"xla_backend_optimization_level": 0})()
  assert jax.tree.structure(state) == jax.tree.structure(real)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(real), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
