# SPDX-License-Identifier: Apache-2.0
"""What is known of the hardware, by chip: speeds, memory, compiler options, slices, their names.

A *device* is what JAX calls one: a whole chip, except on TPU7x, where two devices share a chip. All
numbers are a device's share of what its chip has. `device_kind` is what `jax.Device` calls it.
"""

import dataclasses
from collections.abc import Mapping

Options = Mapping[str, bool | int | float | str]


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of a TPU generation.

  Bandwidths are the makers' data sheets' and the JAX scaling book's (jax-ml.github.io/scaling-book,
  "TPU specs"). `hbm_gib` is what the compiler lets a program use, as its own out-of-memory message
  says: a little less than the chip has.

  `compiler_options` are those of the train step, each with what it does to a predicted step. They
  go to the compiler with the step itself, so that a plan compiles the very program that a run does,
  and no environment variable has to be exported. Measured with the TPU compiler (libtpu 0.0.42.1,
  jax 0.10.2) by predicted step time, see docs/notes/performance.md; what did not pay is not here.
  """

  name: str  # as Google Cloud's names of slices begin
  device_kind: str
  peak_flops: float  # dense bf16 FLOP/s
  flops_per_cycle: int  # of all matrix units, bf16
  hbm_gib: float
  hbm_bandwidth: float  # bytes/s
  link_bandwidth: float  # bytes/s of one link between chips (ICI), one way
  torus_dims: int  # a 2-D or a 3-D torus
  host_bandwidth: float  # bytes/s to host memory (PCIe)
  dcn_bandwidth: float  # bytes/s between slices, a device's share of its host's network
  calibrated: bool  # whether predicted times have been held against published step times
  gke_name: str  # GKE's: `cloud.google.com/gke-tpu-accelerator`
  compiler_options: Options = dataclasses.field(default_factory=dict)
  attention_block: int = 512  # positions in a block of splash attention, see `models.splash`
  devices_per_chip: int = 1
  slices_count: str = "chips"  # what the number in a slice's name counts
  has_megacore: bool = False  # whether two cores make one device
  libtpu_name: str | None = None  # the compiler's name for it, where that is not `name`

  @property
  def units_per_chip(self) -> int:
    """What a slice's name counts, to a chip: cores and devices come in pairs."""
    return 1 if self.slices_count == "chips" else 2

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
      peak_flops=275e12,
      flops_per_cycle=2**18,
      hbm_gib=30.75,
      hbm_bandwidth=1.2e12,
      link_bandwidth=4.5e10,
      torus_dims=3,
      host_bandwidth=1.5e10,
      dcn_bandwidth=6.25e9,
      calibrated=False,
      gke_name="tpu-v4-podslice",
      slices_count="cores",
      has_megacore=True,
    ),
    Chip(
      name="v5e",
      device_kind="TPU v5 lite",
      peak_flops=197e12,
      flops_per_cycle=2**17,
      hbm_gib=15.75,
      hbm_bandwidth=8.1e11,
      link_bandwidth=4.5e10,
      torus_dims=2,
      host_bandwidth=1.5e10,
      dcn_bandwidth=3.125e9,
      calibrated=True,
      gke_name="tpu-v5-lite-podslice",
      # Matrix products with larger tiles: two layers of a 7B decoder, 242 -> 225 ms. More is 1%
      # faster, and 64 MiB take minutes longer to compile.
      compiler_options={"xla_tpu_scoped_vmem_limit_kib": 32768},
    ),
    Chip(
      name="v5p",
      device_kind="TPU v5",
      peak_flops=459e12,
      flops_per_cycle=2**18,
      hbm_gib=95.74,
      hbm_bandwidth=2.765e12,
      link_bandwidth=9e10,
      torus_dims=3,
      host_bandwidth=1.5e10,
      dcn_bandwidth=6.25e9,
      calibrated=True,
      gke_name="tpu-v5p-slice",
      compiler_options={
        # Larger tiles, as on v5e: a SwiGLU block forward and backward 54.0 -> 47.7 ms.
        "xla_tpu_scoped_vmem_limit_kib": 65536,
        # Without it a reduce-scatter over all three axes of a torus becomes an all-reduce and a
        # slice, twice the bytes: a 30B step 4.94 -> 4.83 s. In spite of its name, none of them
        # moves to the SparseCores.
        "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
      },
      slices_count="cores",
      has_megacore=True,
      libtpu_name="v5",
    ),
    Chip(
      name="v6e",
      device_kind="TPU v6 lite",
      peak_flops=918e12,
      flops_per_cycle=2**19,
      hbm_gib=31.25,
      hbm_bandwidth=1.64e12,
      link_bandwidth=9e10,
      torus_dims=2,
      host_bandwidth=3.2e10,
      dcn_bandwidth=1.25e10,
      calibrated=False,
      gke_name="tpu-v6e-slice",
      # Larger tiles: the two layers that v5e was measured with, 85.5 -> 76.8 ms; 96 MiB 75.7 ms.
      compiler_options={"xla_tpu_scoped_vmem_limit_kib": 65536},
      attention_block=1024,
    ),
    Chip(
      name="tpu7x",
      device_kind="TPU7x",
      peak_flops=1153.5e12,  # half of a chip's 2307 TFLOP/s
      flops_per_cycle=2**19,
      hbm_gib=94.75,
      hbm_bandwidth=3.69e12,
      link_bandwidth=4.5e10,  # half of a chip's 9e10, which its two devices share
      torus_dims=3,
      host_bandwidth=1.6e10,
      dcn_bandwidth=6.25e9,
      calibrated=False,
      gke_name="tpu7x",
      # Attention's blocks of 2048 positions do not fit backward without it.
      compiler_options={"xla_tpu_scoped_vmem_limit_kib": 65536},
      attention_block=2048,
      devices_per_chip=2,
      slices_count="devices",
    ),
  )
}

# Shapes of slices in chips, by dims of the torus and number of chips. 3-D slices are made of cubes
# of 4 x 4 x 4 from 64 chips on.
SLICE_SHAPES: Mapping[int, Mapping[int, tuple[int, ...]]] = {
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
CHIPS_PER_HOST = 4

_BY_KIND = {chip.device_kind: chip for chip in CHIPS.values()}

# Peak dense bf16 FLOP/s of one device, by `device_kind` (makers' data sheets).
PEAK_FLOPS: Mapping[str, float] = {
  **{kind: chip.peak_flops for kind, chip in _BY_KIND.items()},
  "TPU v5e": CHIPS["v5e"].peak_flops,  # some versions of the TPU's software have these names
  "TPU v5p": CHIPS["v5p"].peak_flops,
  "TPU v6e": CHIPS["v6e"].peak_flops,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA L4": 121e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
}

# Of the train step, by `device_kind`.
COMPILER_OPTIONS: Mapping[str, Options] = {
  "cpu": {
    # Otherwise devices of one process may come to two independent all-gathers in different order,
    # and wait for each other for ever (jax 0.10.2): pictures and embeddings, with a `tensor` axis.
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
  },
  **{kind: chip.compiler_options for kind, chip in _BY_KIND.items() if chip.compiler_options},
}

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # in the kinds of its devices


def compiler_options(device_kind: str) -> dict[str, bool | int | float | str]:
  """Returns the train step's compiler options for a kind of device; none for most."""
  return dict(COMPILER_OPTIONS.get(device_kind, {}))


def attention_block(device_kind: str) -> int:
  """Returns how many positions a block of causal splash attention has, at most."""
  chip = _BY_KIND.get(device_kind)
  return chip.attention_block if chip else Chip.attention_block


def is_hopper(device_kind: str) -> bool:
  """Returns whether a kind of device is an NVIDIA GPU of the Hopper generation."""
  return any(name in device_kind for name in _HOPPER)
