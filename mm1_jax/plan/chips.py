# SPDX-License-Identifier: Apache-2.0
"""What one TPU device can do: the numbers that turn a compiled program into seconds.

A device is what JAX calls one: a whole chip, except on TPU7x, where two devices share a chip.
"""

import dataclasses

from mm1_jax.metrics import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of a TPU generation, and its share of what the chip has.

  Bandwidths are the makers' data sheets' and the JAX scaling book's (jax-ml.github.io/scaling-book,
  "TPU specs"). `hbm_gib` is what the compiler lets a program use, as its own out-of-memory message
  says: a little less than is soldered on.
  """

  name: str
  device_kind: str  # as `jax.Device.device_kind` and `metrics.PEAK_FLOPS` say it
  flops_per_cycle: int  # of all matrix units, bf16
  hbm_gib: float
  hbm_bandwidth: float  # bytes/s
  link_bandwidth: float  # bytes/s of one link between chips (ICI), one way
  torus_dims: int  # a 2-D or a 3-D torus
  host_bandwidth: float  # bytes/s to host memory (PCIe)
  dcn_bandwidth: float  # bytes/s between slices, a device's share of its host's network
  calibrated: bool  # whether predicted times have been held against published step times
  devices_per_chip: int = 1

  @property
  def peak_flops(self) -> float:
    """bf16 FLOP/s."""
    return PEAK_FLOPS[self.device_kind]

  @property
  def clock(self) -> float:
    """Cycles per second of the compiler's `estimated_cycles`."""
    return self.peak_flops / self.flops_per_cycle


CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      device_kind="TPU v4",
      flops_per_cycle=2**18,
      hbm_gib=30.75,
      hbm_bandwidth=1.2e12,
      link_bandwidth=4.5e10,
      torus_dims=3,
      host_bandwidth=1.5e10,
      dcn_bandwidth=6.25e9,
      calibrated=False,
    ),
    Chip(
      name="v5e",
      device_kind="TPU v5 lite",
      flops_per_cycle=2**17,
      hbm_gib=15.75,
      hbm_bandwidth=8.1e11,
      link_bandwidth=4.5e10,
      torus_dims=2,
      host_bandwidth=1.5e10,
      dcn_bandwidth=3.125e9,
      calibrated=True,
    ),
    Chip(
      name="v5p",
      device_kind="TPU v5",
      flops_per_cycle=2**18,
      hbm_gib=95.74,
      hbm_bandwidth=2.765e12,
      link_bandwidth=9e10,
      torus_dims=3,
      host_bandwidth=1.5e10,
      dcn_bandwidth=6.25e9,
      calibrated=True,
    ),
    Chip(
      name="v6e",
      device_kind="TPU v6 lite",
      flops_per_cycle=2**19,
      hbm_gib=31.25,
      hbm_bandwidth=1.64e12,
      link_bandwidth=9e10,
      torus_dims=2,
      host_bandwidth=3.2e10,
      dcn_bandwidth=1.25e10,
      calibrated=False,
    ),
    Chip(
      name="tpu7x",
      device_kind="TPU7x",
      flops_per_cycle=2**19,
      hbm_gib=94.75,
      hbm_bandwidth=3.69e12,
      link_bandwidth=4.5e10,  # half of a chip's 9e10, which its two devices share
      torus_dims=3,
      host_bandwidth=1.6e10,
      dcn_bandwidth=6.25e9,
      calibrated=False,
      devices_per_chip=2,
    ),
  )
}
