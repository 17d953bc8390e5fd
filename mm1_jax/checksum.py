# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays: the same for the same values, however these are split over devices.

An element's bits v at position i (row-major, in the whole array) count as `mix(v ^ (i + 1) m)`, and
a checksum is the sum of these modulo 2^32, for two multipliers m: 64 bits. `mix` is the finaliser
of MurmurHash3, which is one to one. So

- a sum does not depend on the order: each device sums its own shard where it lies, and no array is
  moved or copied;
- a single element that has changed is always found;
- several that have changed by accident are missed once in 2^64. Damage on purpose is not found.
"""

import collections
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mm1_jax.sharding import axes_of, fetch

MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)
HOST_BLOCK = 1 << 18  # words that the host mixes at once: they stay in its cache
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by the bytes of an element


class Disagreement(NamedTuple):
  """An array of which devices that should have equal copies do not."""

  name: str
  devices: list[Any]  # those whose copy differs from most others', or all where none are most


def checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
  """Returns the checksums of arrays by name, as 16 hexadecimal digits.

  Of arrays on several processes, all of these have to call it alike; they get the same.
  """
  on_devices = device_checksums({name: x for name, x in arrays.items() if not _on_host(x)})
  return {
    name: on_devices[name] if name in on_devices else to_hex(host_sum(np.asarray(x)))
    for name, x in arrays.items()
  }


def device_checksums(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
  """Returns the checksums of arrays on a mesh; devices compute them."""
  found = {}
  for name, (sums, shards) in _device_sums(arrays).items():
    _, firsts = np.unique(shards, return_index=True)
    found[name] = to_hex(sums[firsts].sum(axis=0, dtype=np.uint32))
  return found


def disagreements(arrays: Mapping[str, jax.Array]) -> list[Disagreement]:
  """Returns the arrays of which replicas differ; all processes have to call it alike."""
  found = []
  for name, (of_devices, shards) in _device_sums(arrays).items():
    _, firsts, members = np.unique(shards, return_index=True, return_inverse=True)
    if (of_devices == of_devices[firsts][members]).all():
      continue
    devices = _devices(arrays[name].sharding)
    found.append(Disagreement(name, [devices[i] for i in _odd_ones(of_devices, shards)]))
  return found


def _odd_ones(sums: np.ndarray, shards: np.ndarray) -> list[int]:
  """Returns the devices whose sums are not those of more than half of their shard's."""
  odd = []
  for shard in np.unique(shards):
    members = np.flatnonzero(shards == shard)
    values = [tuple(sums[i].tolist()) for i in members]
    ((most, count),) = collections.Counter(values).most_common(1)
    if count < len(values):
      several = 2 * count > len(values)
      odd += [int(i) for i, v in zip(members, values, strict=True) if v != most or not several]
  return odd


def host_sum(value: np.ndarray, start: int = 0) -> np.ndarray:
  """Returns the sums, uint32[2], of a block whose first element is at `start` in its array.

  Blocks follow each other in row-major order; the array's sums are those of its blocks.
  """
  value = np.ascontiguousarray(value).reshape(-1)
  if value.dtype.itemsize > 4:
    start, value = start * (value.dtype.itemsize // 4), value.view(np.uint32)
  words = value.view(WORDS[value.dtype.itemsize])
  total = np.zeros(2, np.uint32)
  for first in range(0, len(words), HOST_BLOCK):
    block = words[first : first + HOST_BLOCK].astype(np.uint32)
    begin = (start + first + 1) & 0xFFFFFFFF
    positions = np.arange(len(block), dtype=np.uint32) + np.uint32(begin)
    for i, multiplier in enumerate(MULTIPLIERS):
      total[i : i + 1] += _mix(block ^ (positions * np.uint32(multiplier))).sum(dtype=np.uint32)
  return total


def to_hex(sums: np.ndarray) -> str:
  """Returns uint32[2] as a checksum's 16 hexadecimal digits."""
  return "".join(f"{int(x):08x}" for x in sums)


def _mix(h: Any) -> Any:
  """Mixes the bits of uint32 words, of NumPy or JAX."""
  h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return h ^ (h >> np.uint32(16))


def _on_host(x: Any) -> bool:
  """Returns whether all of an array is in the host's memory, where nothing has to be compiled."""
  if not isinstance(x, jax.Array) or not isinstance(x.sharding, NamedSharding):
    return True
  return x.is_fully_addressable and jax.default_backend() == "cpu"


def _device_sums(arrays: Mapping[str, jax.Array]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns of the arrays on a mesh of D devices, by name, uint32[D, 2] and int[D]: sums, shards.

  Devices with the same part of an array have the same number of a shard.
  """
  sums, shards = {}, {}
  for name, x in arrays.items():
    assert isinstance(x.sharding, NamedSharding), name
    sums[name] = _sum_shards(x, x.sharding.mesh, x.sharding.spec)
    shards[name] = _shard_numbers(x.sharding, x.shape)
  return {name: (value, shards[name]) for name, value in fetch(sums).items()}


def _devices(sharding: jax.sharding.Sharding) -> list[Any]:
  """Returns the devices of a mesh in the order in which `_sum_shards` has their sums."""
  assert isinstance(sharding, NamedSharding)
  assert isinstance(sharding.mesh, Mesh)
  return list(sharding.mesh.devices.flat)


@functools.lru_cache(maxsize=4096)
def _shard_numbers(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
  indices = sharding.devices_indices_map(shape)
  numbers: dict[tuple, int] = {}
  keys = [tuple((s.start, s.stop) for s in indices[d]) for d in _devices(sharding)]
  return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


@functools.partial(jax.jit, static_argnames=("mesh", "spec"))
def _sum_shards(x: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
  """Returns uint32[D, 2], the sums of each device's shard, each on its device."""
  entries = (*spec, *[None] * (x.ndim - len(spec)))

  def sum_shard(part):
    positions = jnp.ones((), jnp.uint32)
    for dim, (size, entry) in enumerate(zip(part.shape, entries, strict=True)):
      stride = np.uint32(math.prod(x.shape[dim + 1 :]) & 0xFFFFFFFF)
      axes = axes_of(entry)
      first = jax.lax.axis_index(axes) * size if axes else jnp.zeros((), jnp.int32)
      at = jax.lax.broadcasted_iota(jnp.uint32, part.shape, dim) + first.astype(jnp.uint32)
      positions = positions + at * stride
    words = _words(part)
    sums = [
      jnp.sum(_mix(words ^ (positions * np.uint32(m))), dtype=jnp.uint32) for m in MULTIPLIERS
    ]
    return jnp.stack(sums)[None]

  everywhere = P(mesh.axis_names)
  return jax.shard_map(sum_shard, mesh=mesh, in_specs=spec, out_specs=everywhere, check_vma=False)(
    x
  )


def _words(x: jax.Array) -> jax.Array:
  """Returns the bits of an array's elements, as uint32 of the same shape."""
  x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
  return jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
