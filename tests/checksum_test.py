# SPDX-License-Identifier: Apache-2.0
"""Checksums: equal for equal values on any mesh, and different for any other values."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mm1_jax import checksum
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

SPECS = [P(), P("data"), P(None, "fsdp"), P(("fsdp", "data"), None, "expert"), P("expert", "data")]
DTYPES = ["float32", ml_dtypes.bfloat16, "int32", "uint8", "bool"]


def draw(dtype: str, shape: tuple[int, ...] = (8, 4, 6)) -> np.ndarray:
  return (100 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)


def put(value: np.ndarray, spec: P) -> jax.Array:
  return jax.device_put(value, NamedSharding(tiny.mesh(2, 2, 2), spec))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_devices_and_the_host_agree_however_an_array_is_split(dtype):
  value = draw(dtype)
  expected = checksum.to_hex(checksum.host_sum(value))
  arrays = {str(i): put(value, spec) for i, spec in enumerate(SPECS)}
  assert set(checksum.device_checksums(arrays).values()) == {expected}
  assert set(checksum.checksums({**arrays, "host": value}).values()) == {expected}


def test_scalars_and_empty_arrays():
  values = {"scalar": np.float32(3), "empty": np.zeros((0, 4), np.float32)}
  arrays = {name: put(np.asarray(x), P()) for name, x in values.items()}
  sums = checksum.device_checksums(arrays)
  assert sums == checksum.checksums(values)
  assert sums["empty"] == 16 * "0"
  assert sums["scalar"] != sums["empty"]


def test_blocks_add_up():
  value = draw("int64", (1000, 700))
  blocks = [checksum.host_sum(value[i : i + 100], i * 700) for i in range(0, 1000, 100)]
  assert (np.sum(blocks, axis=0, dtype=np.uint32) == checksum.host_sum(value)).all()


def test_every_bit_counts_and_so_does_the_place():
  value = draw("float32", (16, 8))
  seen = {checksum.to_hex(checksum.host_sum(value))}
  for bit in range(value.size * 32):
    changed = value.copy()
    changed.reshape(-1).view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
    seen.add(checksum.to_hex(checksum.host_sum(changed)))
  for other in (value[::-1], value.T, -value, np.roll(value, 1)):
    seen.add(checksum.to_hex(checksum.host_sum(other)))
  assert len(seen) == 1 + value.size * 32 + 4


def test_a_replica_that_differs_is_found_with_its_device():
  """One bit of one device's copy, of an array that is split over the other axes."""
  value, sharding = draw("float32"), NamedSharding(tiny.mesh(4, 2), P(None, "fsdp"))
  sound = jax.device_put(value, sharding)
  parts = [np.array(shard.data) for shard in sound.addressable_shards]
  parts[5].reshape(-1).view(np.uint32)[17] ^= np.uint32(1)
  devices = [shard.device for shard in sound.addressable_shards]
  placed = [jax.device_put(x, d) for x, d in zip(parts, devices, strict=True)]
  wrong = jax.make_array_from_single_device_arrays(value.shape, sharding, placed)
  arrays = {"sound": sound, "wrong": wrong}
  assert checksum.disagreements(arrays) == [("wrong", [devices[5]])]
  assert checksum.disagreements({"sound": sound}) == []


def test_of_two_replicas_neither_is_known_to_be_the_right_one():
  value, mesh = draw("float32"), tiny.mesh(2)
  sharding, devices = NamedSharding(mesh, P()), list(mesh.devices.flat)
  placed = [jax.device_put(value + i, d) for i, d in enumerate(devices)]
  wrong = jax.make_array_from_single_device_arrays(value.shape, sharding, placed)
  assert checksum.disagreements({"x": wrong}) == [("x", devices)]
