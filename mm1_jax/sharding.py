# SPDX-License-Identifier: Apache-2.0
"""How every array is split: the mesh, the `Layout` table, and moving arrays onto it.

The mesh always has the axes data, fsdp, expert, tensor, sequence, of length 1 where unused, and
explicit axis types: an array's type says how it is sharded, and a collective happens only where a
line asks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mm1_jax.batch import Batch
from mm1_jax.config import (
  BATCH_AXES,
  FSDP_AXES,
  MESH_AXES,
  ConfigError,
  MeshConfig,
  ModelConfig,
  RunConfig,
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """PartitionSpecs by kind of array and its dimensions; the whole parallelism plan is this table.

  Weights: stored split over FSDP, gathered in the compute dtype where they are used (`gather`), so
  In[B, S, D] . W[D_fsdp, F_tensor] -> AllGather_fsdp(W), Out[B, S, F_tensor], and the gradient of
  the gather is a reduce-scatter. Letters: B rows, S positions, D width, F mlp, H heads, E experts,
  C capacity, V vocabulary, T tokens of an image.
  """

  replicated: P = P()
  # Weights.
  embed_vd: P = P("tensor", FSDP_AXES)
  attention_dhk: P = P(FSDP_AXES, "tensor", None)
  attention_hkd: P = P("tensor", None, FSDP_AXES)
  mlp_df: P = P(FSDP_AXES, "tensor")
  mlp_fd: P = P("tensor", FSDP_AXES)
  dense_io: P = P(None, FSDP_AXES)  # patch and connector projections, of any input width
  router_de: P = P()
  expert_edf: P = P("expert", ("fsdp", "sequence"), "tensor")
  expert_efd: P = P("expert", ("tensor", "fsdp", "sequence"), None)  # no last dim in slivers
  # Activations.
  act_b: P = P(BATCH_AXES)  # rows split, everything else whole: [B, S], [B, S, D], [B, N, H, W, 3]
  act_bs: P = P(BATCH_AXES, "sequence")  # rows and their positions: the decoder in training
  act_i: P = P((*BATCH_AXES, "tensor", "sequence"))  # pictures, over all chips: [I, h, w, D]
  act_bshk: P = P(BATCH_AXES, None, "tensor", None)
  cache_ubkch: P = P(None, BATCH_AXES, "tensor", None, None)


LAYOUT = Layout()


def make_mesh(run: RunConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns the mesh over `devices` (all if not given), laid out along their network.

  `data`, the axis that needs the fewest bytes, is the one between slices.

  Raises:
    ConfigError: the run does not divide over the mesh, or `data` not over the slices.
  """
  devices = jax.devices() if devices is None else devices
  return _mesh(run.check_mesh(len(devices)), devices)


def make_params_mesh(model: ModelConfig, mesh: MeshConfig, devices: Sequence[Any]) -> Mesh:
  """Returns the mesh over `devices` for a model's params alone, where no given batch has to fit.

  Raises:
    ConfigError: the params do not divide over the mesh.
  """
  sizes = mesh.resolve(len(devices))
  model.check_mesh(dict(zip(MESH_AXES, sizes, strict=True)))
  return _mesh(sizes, devices)


def _mesh(sizes: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
  axis_types = (AxisType.Explicit,) * len(MESH_AXES)
  return Mesh(arrange(sizes, devices), MESH_AXES, axis_types=axis_types)


def arrange(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """Returns devices in the order of a mesh of `sizes`, which multiply to their number.

  Raises:
    ConfigError: the first axis is not a multiple of the slices.
  """
  num = len({getattr(device, "slice_index", 0) for device in devices})
  if sizes[0] % num:
    raise ConfigError(
      f"mesh.data {sizes[0]} must be a multiple of the {num} slices, which it runs between; "
      f"--config.mesh.data={num} would fit."
    )

  def lay_out(split: bool) -> np.ndarray:
    if num == 1:
      return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
    inside, between = (sizes[0] // num, *sizes[1:]), (num, *(1 for _ in sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh(
      inside, between, devices, allow_split_physical_axes=split
    )

  try:
    return lay_out(split=False)
  except NotImplementedError:  # no axis of the mesh is made of whole axes of the torus
    return lay_out(split=True)


def gather(weight: jax.Array, dtype: jax.typing.DTypeLike, *, rows: jax.Array) -> jax.Array:
  """Casts a stored weight for computing, then all-gathers it over the FSDP axes.

  Casting first halves the bytes on the wire. The result is of the type that JAX calls *reduced*
  over the axes of `rows`: each chip sums its own part of the gradient until all loops have ended;
  then follow a reduce-scatter over FSDP and, of the part that is left on a chip, an all-reduce over
  `data` (which `train.step` defers until all micro-batches are summed). If its type were whole, it
  would be all-reduced whole, each time it is used.

  Args:
    weight: as it is stored.
    dtype: to compute in.
    rows: the activations it is multiplied with, or the ids that select its rows; split along any
      dims but width. Where these are split over `tensor` too, as pictures are, the weight is
      gathered over that as well.
  """
  split, done = spec_of(weight).partitions, spec_of(weight).reduced
  over = set(axes_of(*spec_of(rows)))
  stored = set(axes_of(*split))
  kept = [None if (over | set(FSDP_AXES)) & set(axes_of(entry)) else entry for entry in split]
  # Without the barrier XLA gathers a block's slice of a stack, [1, F, D], as it is, and where D is
  # split the one dim of length 1 ends up in its tiles: making a matrix of it took as long as 20
  # passes over it (MM1-30B on v5p-512).
  weight = jax.lax.optimization_barrier(weight.astype(dtype))
  weight = jax.sharding.reshard(weight, P(*split, reduced=done | (over - stored)))
  return jax.sharding.reshard(weight, P(*kept, reduced=done | over))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def on_each_chip(
  f: Callable[..., jax.Array], split: tuple, weights: tuple[jax.Array, ...]
) -> jax.Array:
  """Returns `f(*weights)`, which each chip computes from its own parts of stored weights.

  For results of weights alone, such as adapters' products: the result is *reduced* as they are (see
  `gather`), where JAX's own rule for a product would sum the gradient over `data` first.

  Args:
    f: needs no data of other chips.
    split: mesh axes that the result is split over, dim by dim.
    weights: all reduced over the same axes.
  """
  specs = tuple(map(spec_of, weights))
  out = P(*split, reduced=specs[0].reduced)
  run = jax.shard_map(lambda ws: f(*ws), in_specs=(specs,), out_specs=out, check_vma=False)
  return run(weights)


def _on_each_chip_forward(f, split, weights):
  return on_each_chip(f, split, weights), weights


def _on_each_chip_backward(f, split, weights, grad):
  specs = tuple(map(spec_of, weights))

  def transpose(weights, grad):
    def over_others(x, spec):  # parts of the result that were made of the same part of a weight
      others = [axis for axis in axes_of(*split) if axis not in axes_of(*spec.partitions)]
      return jax.lax.psum(x, others) if others else x

    return tuple(map(over_others, jax.vjp(f, *weights)[1](grad), specs))

  out = tuple(P(*spec.partitions, unreduced=spec.reduced) for spec in specs)
  run = jax.shard_map(transpose, in_specs=(specs, spec_of(grad)), out_specs=out, check_vma=False)
  return (run(weights, grad),)


on_each_chip.defvjp(_on_each_chip_forward, _on_each_chip_backward)


def spec_of(x: jax.Array) -> P:
  """Returns how an array is split, as its type says."""
  return jax.typeof(x).sharding.spec


def axes_of(*entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes in entries of a PartitionSpec, in their order."""
  return tuple(axis for e in entries if e for axis in ((e,) if isinstance(e, str) else e))


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
  """Returns into how many parts a mesh splits the rows of a batch."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def fetch(tree: Any) -> Any:
  """Returns arrays as numpy; those of which this process has a part only are gathered first.

  All processes of the mesh have to call it alike.
  """
  whole = [x for x in jax.tree.leaves(tree) if not x.is_fully_addressable]
  if whole:
    place = NamedSharding(whole[0].sharding.mesh, LAYOUT.replicated)
    tree = jax.jit(lambda x: x, out_shardings=place)(tree)
  return jax.device_get(tree)


def device_batch(batch: Batch, mesh: Mesh) -> Batch:
  """Puts a process's rows on the mesh as one global batch, split by rows."""
  sharding = NamedSharding(mesh, LAYOUT.act_b)
  return Batch(*(jax.make_array_from_process_local_data(sharding, np.asarray(x)) for x in batch))


def abstract_batch(run: RunConfig, mesh: Mesh) -> Batch:
  """Returns the shapes of a global batch, and how it is split: what `device_batch` makes."""
  rows = functools.partial(abstract_rows, mesh)
  data = run.data
  num_rows, positions, slots = data.batch_size, data.seq_len, data.images_per_row
  ids = rows(jnp.int32, num_rows, positions)
  return Batch(
    tokens=ids,
    targets=ids,
    loss_mask=rows(jnp.float32, num_rows, positions),
    positions=ids,
    segment_ids=ids,
    source_ids=ids,
    images=rows(jnp.uint8, num_rows, slots, *run.model.vision.image_size, 3),
    image_mask=rows(jnp.bool_, num_rows, slots),
  )


def abstract_rows(mesh: Mesh, dtype: jax.typing.DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
  """Returns the type of an array that is split by rows."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, LAYOUT.act_b))


def abstract_state(make, mesh: Mesh):
  """Returns the shapes, dtypes and shardings of what `make()` would return; computes nothing.

  The result is what Orbax restores onto and what an ahead-of-time compile takes.
  """
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(make)

  def attach(x):
    # Scalars have no sharding, and the specs of the others are on an abstract mesh.
    spec = P() if x.sharding is None else x.sharding.spec
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(attach, shapes)
