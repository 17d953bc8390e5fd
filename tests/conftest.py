# SPDX-License-Identifier: Apache-2.0
"""The machine every test sees: eight CPU devices, strict shapes, compiled programs kept.

Everything is set through the environment before JAX is imported, so subprocesses see it too.
"""

import os
import sys

import pytest
from absl import flags

from tests.helpers import shapes, shards

NUM_DEVICES = 8


def pytest_configure(config: pytest.Config) -> None:
  """Sets the environment; runs before any test module is imported."""
  assert "jax" not in sys.modules, "a pytest plugin imported jax before tests/conftest.py"
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={NUM_DEVICES} "
    # As in mm1_jax/chips.py, for what tests compile themselves.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_cpu_use_fusion_emitters=false"  # compiles faster
  )
  os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
  # `pytest -n` runs one process a core: more BLAS threads would only get in each other's way.
  for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
  # Same programs, same tests: compile once, then read from .pytest_cache.
  if config.pluginmanager.hasplugin("cacheprovider") and config.cache is not None:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax-programs")))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
  os.environ.setdefault("MPLBACKEND", "Agg")
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
  shapes.check_annotations()
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags


@pytest.fixture(scope="session", autouse=True)
def quick_to_compile() -> None:
  """Programs of this process are tiny, and compile for longer than they run.

  Those that tests start as processes run as they do for users.
  """
  import jax

  jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  """Keeps one shard of the tests, where $SLOW_SHARD asks for it."""
  shard = os.environ.get("SLOW_SHARD")
  if not shard:
    return
  left_out = [item for item in items if not shards.holds(shard, item.nodeid)]
  config.hook.pytest_deselected(items=left_out)
  items[:] = [item for item in items if shards.holds(shard, item.nodeid)]
