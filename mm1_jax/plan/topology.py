# SPDX-License-Identifier: Apache-2.0
"""Named TPU slices: `v5p-128`, `v5e-256`, `tpu7x-16`, as Google Cloud calls them.

The number in a name counts cores on v4 and v5p (two to a chip), chips on v5e and v6e, and devices
on tpu7x (two to a chip). The wiring belongs to the description: without its wrap-around links the
compiler chooses other collectives, with twice the bytes.
"""

import dataclasses
import difflib
import math

from mm1_jax.chips import CHIPS, CHIPS_PER_HOST, SLICE_SHAPES, Chip
from mm1_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice, or several equal ones joined by the data-centre network."""

  name: str
  chip: Chip
  shape: tuple[int, ...]  # chips along each dim of the torus
  num_slices: int = 1

  @property
  def num_chips(self) -> int:
    """Chips of all slices."""
    return math.prod(self.shape) * self.num_slices

  @property
  def num_devices(self) -> int:
    """JAX devices of all slices."""
    return self.num_chips * self.chip.devices_per_chip

  @property
  def num_hosts(self) -> int:
    return max(1, math.prod(self.shape) // CHIPS_PER_HOST) * self.num_slices

  @property
  def wrap(self) -> tuple[bool, bool, bool]:
    """Which dims are rings: all of a 3-D slice made of cubes, and a 2-D slice's full 16."""
    if self.chip.torus_dims == 3:
      whole = all(length % 4 == 0 for length in self.shape)
      return whole, whole, whole
    return self.shape[0] == 16, self.shape[1] == 16, False

  def describe(self) -> dict:
    """Returns the arguments of `jax.experimental.topologies.get_topology_desc`."""
    libtpu_name = self.chip.libtpu_name or self.chip.name
    single = math.prod(self.shape) == 1
    return {
      "platform": "tpu",
      "topology_name": f"{libtpu_name}:{'x'.join(map(str, self.shape))}",
      "chip_config_name": "megacore" if self.chip.has_megacore else "default",
      "chips_per_host_bounds": (1, 1, 1) if single else (2, 2, 1),
      "num_slices": self.num_slices,
      "wrap": self.wrap,
    }

  def __str__(self) -> str:
    count = f"{self.num_slices} x " if self.num_slices > 1 else ""
    torus = "x".join(map(str, self.shape))
    return f"{count}{self.name} ({torus}, {self.num_chips} chips, {self.num_hosts} hosts)"


def slice_names() -> list[str]:
  """Returns the name of every slice there is."""
  return [
    f"{chip.name}-{num * chip.units_per_chip}"
    for chip in CHIPS.values()
    for num in SLICE_SHAPES[chip.torus_dims]
    if num > 1 or not chip.has_megacore  # these come by the host
  ]


def find_topology(name: str, num_slices: int = 1) -> Topology:
  """Returns the slice of that name, `num_slices` times.

  Raises:
    ConfigError: there is no such slice; the message has the nearest names.
  """
  if num_slices < 1:
    raise ConfigError(f"--num-slices is {num_slices}; it must be at least 1.")
  kind, _, count = name.partition("-")
  if name not in slice_names():
    raise ConfigError(f"there is no TPU slice '{name}'; {_suggest(name, kind)}")
  chip = CHIPS[kind]
  num_chips = int(count) // chip.units_per_chip
  return Topology(name, chip, SLICE_SHAPES[chip.torus_dims][num_chips], num_slices)


def _suggest(name: str, kind: str) -> str:
  if kind in CHIPS:
    names = [n for n in slice_names() if n.startswith(f"{kind}-")]
    return f"{kind} counts {CHIPS[kind].slices_count}, and its slices are {', '.join(names)}."
  near = difflib.get_close_matches(name, slice_names(), n=2)
  hint = f"did you mean {' or '.join(near)}?" if near else "names look like v5p-128 or v5e-256."
  return f"{hint} The kinds are {', '.join(CHIPS)}."
