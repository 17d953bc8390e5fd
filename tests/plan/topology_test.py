# SPDX-License-Identifier: Apache-2.0
"""Slices by name: sizes, wiring, and mistakes."""

import pytest

from mm1_jax.config import ConfigError
from mm1_jax.plan.topology import find_topology, slice_names


# Google Cloud's tables: torus, chips, JAX devices, hosts of four chips.
@pytest.mark.parametrize(
  ("name", "libtpu_name", "chips", "devices", "hosts", "wrap"),
  [
    ("v4-128", "v4:4x4x4", 64, 64, 16, (True, True, True)),
    ("v5e-4", "v5e:2x2", 4, 4, 1, (False, False, False)),
    ("v5e-16", "v5e:4x4", 16, 16, 4, (False, False, False)),
    ("v5e-128", "v5e:8x16", 128, 128, 32, (False, True, False)),
    ("v5e-256", "v5e:16x16", 256, 256, 64, (True, True, False)),
    ("v5p-8", "v5:2x2x1", 4, 4, 1, (False, False, False)),
    ("v5p-128", "v5:4x4x4", 64, 64, 16, (True, True, True)),
    ("v5p-256", "v5:4x4x8", 128, 128, 32, (True, True, True)),
    ("v5p-1024", "v5:8x8x8", 512, 512, 128, (True, True, True)),
    ("v5p-4096", "v5:8x16x16", 2048, 2048, 512, (True, True, True)),
    ("v6e-256", "v6e:16x16", 256, 256, 64, (True, True, False)),
    ("tpu7x-2", "tpu7x:1x1x1", 1, 2, 1, (False, False, False)),
    ("tpu7x-16", "tpu7x:2x2x2", 8, 16, 2, (False, False, False)),
    ("tpu7x-512", "tpu7x:4x8x8", 256, 512, 64, (True, True, True)),
  ],
)
def test_slice(name, libtpu_name, chips, devices, hosts, wrap):
  topology = find_topology(name)
  assert topology.describe()["topology_name"] == libtpu_name
  assert topology.num_chips == chips
  assert topology.num_devices == devices
  assert topology.num_hosts == hosts
  assert topology.wrap == wrap


def test_several_slices_count_together():
  topology = find_topology("v5e-16", num_slices=3)
  assert topology.num_devices == 48
  assert topology.num_hosts == 12
  assert topology.describe()["num_slices"] == 3


def test_megacore_where_two_cores_are_one_device():
  configs = {kind: find_topology(f"{kind}-8").describe()["chip_config_name"] for kind in KINDS}
  assert configs == {
    "v4": "megacore",
    "v5p": "megacore",
    "v5e": "default",
    "v6e": "default",
    "tpu7x": "default",
  }


KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


def test_every_name_is_found():
  assert {find_topology(name).chip.name for name in slice_names()} == set(KINDS)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5p-100", r"v5p counts cores, and its slices are v5p-8, .*v5p-128"),
    ("v5e-512", r"v5e counts chips"),
    ("tpu7x-3", r"tpu7x counts devices"),
    ("v5p128", r"did you mean v5p-128"),
    ("v5p_256", r"did you mean v5p-256"),
    ("a3", r"names look like v5p-128"),
  ],
)
def test_wrong_name(name, message):
  with pytest.raises(ConfigError, match=message):
    find_topology(name)


def test_no_slice():
  with pytest.raises(ConfigError, match="--num-slices is 0"):
    find_topology("v5p-128", num_slices=0)
