# SPDX-License-Identifier: Apache-2.0
"""The axes of the device mesh, and what must divide over them."""

import dataclasses
import math
from typing import Annotated

from mm1_jax.config.group import Group, require
from mm1_jax.ranges import Range

Axis = Annotated[int, Range(at_least=-1, below=2**31)]  # -1 takes what is left
MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp", "expert")  # that rows are split over
FSDP_AXES = ("fsdp", "expert", "sequence")  # that dense weights are split over, beside `tensor`


@dataclasses.dataclass(frozen=True)
class MeshConfig(Group, where="mesh."):
  """Devices along each axis; at most one axis is -1 and takes what is left."""

  data: Axis = 1  # rows; each device along it has all params
  fsdp: Axis = -1  # rows and params
  expert: Axis = 1  # rows, params, and experts
  tensor: Axis = 1  # heads, mlp and vocabulary
  sequence: Axis = 1  # positions of a row, for rows that are too long for one device

  def resolve(self, num_devices: int) -> tuple[int, ...]:
    """Returns the axis lengths for `num_devices`, in the order of `MESH_AXES`."""
    sizes = [getattr(self, axis) for axis in MESH_AXES]
    asked = "x".join(map(str, sizes))
    require(sizes.count(-1) <= 1, f"mesh {asked} has more than one -1; name the other lengths.")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
      require(
        num_devices % known == 0,
        f"mesh {asked} ({' x '.join(MESH_AXES)}): its lengths multiply to {known}, which does not "
        f"divide the {num_devices} devices here.",
      )
      sizes[sizes.index(-1)] = num_devices // known
    require(
      math.prod(sizes) == num_devices,
      f"mesh {asked} ({' x '.join(MESH_AXES)}) needs {math.prod(sizes)} devices; "
      f"there are {num_devices}. Set one axis to -1 to take what is left.",
    )
    return tuple(sizes)

  def _check(self) -> None:
    for axis in MESH_AXES:
      size = getattr(self, axis)
      require(size != 0, f"mesh.{axis} {size} must be at least 1, or -1.")


def divides(key: str, value: int, axes: str, size: int) -> None:
  """Checks that field `key` divides over mesh axes whose lengths multiply to `size`."""
  below = value - value % size
  fits = f"{below} or {below + size}" if below else f"{size}"
  require(
    value % size == 0,
    f"{key} {value} does not divide over mesh axes {axes} = {size}; {fits} would fit.",
  )
