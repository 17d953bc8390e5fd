# SPDX-License-Identifier: Apache-2.0
"""Tensors to safetensors: one file, or shards with an index, of which one is in memory."""

import json
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np
from absl import logging
from safetensors.numpy import save_file

from mm1_jax.convert.tensors import INDEX

SINGLE = "model.safetensors"


def write(
  tensors: Iterable[tuple[str, np.ndarray]],
  folder: pathlib.Path,
  max_shard_gb: float,
  metadata: Mapping[str, str],
) -> None:
  """Writes tensors as they come; a shard is larger than `max_shard_gb` only if one tensor is."""
  limit = max_shard_gb * 1e9
  shards: list[list[str]] = []
  held: dict[str, np.ndarray] = {}
  size = total = 0

  def flush() -> None:
    nonlocal held, size
    path = folder / _name(len(shards), None)
    save_file(held, path, metadata=dict(metadata))
    path.chmod(0o644)  # it is written for its owner alone
    shards.append(list(held))
    logging.info("wrote %.2f GB, %d tensors so far", total / 1e9, sum(map(len, shards)))
    held, size = {}, 0

  for name, value in tensors:
    if held and size + value.nbytes > limit:
      flush()
    held[name] = np.ascontiguousarray(value)
    size, total = size + value.nbytes, total + value.nbytes
  flush()
  # How many there are shows at the end.
  names = [SINGLE if len(shards) == 1 else _name(i, len(shards)) for i in range(len(shards))]
  for i, name in enumerate(names):
    (folder / _name(i, None)).rename(folder / name)
  if len(shards) > 1:
    places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _name(index: int, num: int | None) -> str:
  of = "unfinished" if num is None else f"{num:05d}"
  return f"model-{index + 1:05d}-of-{of}.safetensors"
