# SPDX-License-Identifier: Apache-2.0
"""Compiler options of the train step, by chip, each with what it does to a predicted step.

They go to the compiler with the step itself, so that a plan compiles the very program that a run
does, and nobody has to export an environment variable. Measured with the TPU compiler (libtpu
0.0.42.1, jax 0.10.2) by predicted step time, see docs/notes/performance.md, which also has what
did not pay.
"""

from collections.abc import Mapping

OPTIONS: Mapping[str, Mapping[str, bool | int | float | str]] = {
  "cpu": {
    # Otherwise devices of one process may come to two independent all-gathers in different order,
    # and wait for each other for ever (jax 0.10.2): pictures and embeddings, with a `tensor` axis.
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
  },
  # Matrix products with larger tiles: two layers of a 7B decoder, 242 -> 225 ms. More is 1% faster,
  # and 64 MiB take minutes longer to compile.
  "TPU v5 lite": {"xla_tpu_scoped_vmem_limit_kib": 32768},
  # The same layers, 85.5 -> 76.8 ms; 96 MiB 75.7 ms.
  "TPU v6 lite": {"xla_tpu_scoped_vmem_limit_kib": 65536},
  # Attention's blocks of 2048 (`models.splash`) do not fit backward without it.
  "TPU7x": {"xla_tpu_scoped_vmem_limit_kib": 65536},
  # v5p.
  "TPU v5": {
    # As above: a SwiGLU block forward and backward 54.0 -> 47.7 ms.
    "xla_tpu_scoped_vmem_limit_kib": 65536,
    # Without it a reduce-scatter over all three axes of a torus becomes an all-reduce and a slice,
    # twice the bytes: a 30B step 4.94 -> 4.83 s. In spite of its name, none of them moves to the
    # SparseCores.
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
  },
}


def compiler_options(device_kind: str) -> dict[str, bool | int | float | str]:
  """Returns the options for a kind of device, `jax.Device.device_kind`; none for most."""
  return dict(OPTIONS.get(device_kind, {}))
