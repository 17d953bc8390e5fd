# SPDX-License-Identifier: Apache-2.0
"""Named TPU slices: `v5p-128`, `v5e-256`, `tpu7x-16`, as Google Cloud calls them.

The number in a name counts cores on v4 and v5p (two to a chip), chips on v5e and v6e, and devices
on tpu7x (two to a chip). The wiring belongs to the description: without its wrap-around links the
compiler chooses other collectives, with twice the bytes.
"""

import dataclasses
import difflib
import math

from mm1_jax.config import ConfigError
from mm1_jax.plan.chips import CHIPS, Chip

# Shapes by number of chips. 3-D slices are made of cubes of 4 x 4 x 4 from 64 chips on.
_SHAPES = {
  2: {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
  },
  3: {
    1: (1, 1, 1),
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    192: (4, 4, 12),
    256: (4, 8, 8),
    384: (4, 8, 12),
    512: (8, 8, 8),
    768: (8, 8, 12),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
    4096: (16, 16, 16),
    6144: (16, 16, 24),
  },
}
_UNITS_PER_CHIP = {"v4": 2, "v5p": 2, "tpu7x": 2}  # what a name counts
_LIBTPU_NAMES = {"v5p": "v5"}
_CHIPS_PER_HOST = 4


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
    return max(1, math.prod(self.shape) // _CHIPS_PER_HOST) * self.num_slices

  @property
  def wrap(self) -> tuple[bool, bool, bool]:
    """Which dims are rings: all of a 3-D slice made of cubes, and a 2-D slice's full 16."""
    if self.chip.torus_dims == 3:
      whole = all(length % 4 == 0 for length in self.shape)
      return whole, whole, whole
    return self.shape[0] == 16, self.shape[1] == 16, False

  def describe(self) -> dict:
    """Returns the arguments of `jax.experimental.topologies.get_topology_desc`."""
    chip = self.chip.name
    single = math.prod(self.shape) == 1
    return {
      "platform": "tpu",
      "topology_name": f"{_LIBTPU_NAMES.get(chip, chip)}:{'x'.join(map(str, self.shape))}",
      "chip_config_name": "megacore" if chip in ("v4", "v5p") else "default",
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
    f"{chip.name}-{num * _UNITS_PER_CHIP.get(chip.name, 1)}"
    for chip in CHIPS.values()
    for num in _SHAPES[chip.torus_dims]
    if num > 1 or chip.name not in ("v4", "v5p")  # these come by the host
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
  num_chips = int(count) // _UNITS_PER_CHIP.get(kind, 1)
  return Topology(name, chip, _SHAPES[chip.torus_dims][num_chips], num_slices)


def _suggest(name: str, kind: str) -> str:
  if kind in CHIPS:
    names = [n for n in slice_names() if n.startswith(f"{kind}-")]
    unit = {"v4": "cores", "v5p": "cores", "tpu7x": "devices"}.get(kind, "chips")
    return f"{kind} counts {unit}, and its slices are {', '.join(names)}."
  near = difflib.get_close_matches(name, slice_names(), n=2)
  hint = f"did you mean {' or '.join(near)}?" if near else "names look like v5p-128 or v5e-256."
  return f"{hint} The kinds are {', '.join(CHIPS)}."
