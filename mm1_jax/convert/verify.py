# SPDX-License-Identifier: Apache-2.0
"""Whether files on disk are still what was written: of runs, of built data, and of exports.

Everything is read: arrays of checkpoints are compared with the checksums beside them, shards and
exported files with the hashes in their manifests. Little is in memory at once.
"""

import concurrent.futures
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mm1_jax import checkpoint, untrusted
from mm1_jax.checkpoint import CheckpointError
from mm1_jax.checksum import host_sum, to_hex
from mm1_jax.convert import ConvertError
from mm1_jax.convert.export.manifest import MANIFEST

BUILT = "-manifest.json"  # end of the name of a build's manifest
BLOCK_BYTES = 1 << 28  # of an array that are read at once
CHUNK_BYTES = 1 << 20
READERS = 8  # files that are read at once


class Checked(NamedTuple):
  """What was read of one thing."""

  what: str
  faults: list[str]


def verify(path: epath.PathLike) -> Iterator[Checked]:
  """Yields what was checked, one thing after another.

  Args:
    path: a run's workdir or one of its steps; an export; a folder of built data, or a PREFIX or
      manifest of it.

  Raises:
    ConvertError: it is none of these.
  """
  path = checkpoint.absolute(path)
  found = False
  if (path / checkpoint.PARAMS).exists():
    found = True
    yield _check_step(path)
  elif (path / checkpoint.STEPS).exists():
    steps = [p for p in (path / checkpoint.STEPS).iterdir() if p.name.isdigit()]
    for step in sorted(steps, key=lambda p: int(p.name)):
      found = True
      yield _check_step(step)
  if (path / MANIFEST).exists():
    found = True
    yield _check_export(path)
  for manifest in _built_manifests(path):
    found = True
    yield _check_built(manifest)
  if not found:
    raise ConvertError(
      f"'{path}' is neither a run with checkpoints, nor one of these, nor an export with a "
      f"{MANIFEST}, nor data with a PREFIX{BUILT}: there is nothing to compare it with."
    )


# --- checkpoints


def _check_step(step: epath.Path) -> Checked:
  faults: list[str] = []
  try:
    recorded = checkpoint.read_checksums(step)
  except CheckpointError as e:
    return Checked(f"step {step.name}", [str(e)])
  num_arrays = num_bytes = 0
  for item in (checkpoint.PARAMS, checkpoint.TRAIN):
    saved = recorded[checkpoint.ARRAYS].get(item, {}) if recorded else {}
    if not (step / item).exists():
      faults += [f"'{step / item}' is missing"] if saved else []
      continue
    try:
      names = checkpoint.saved_shapes(step / item)
    except CheckpointError as e:
      faults.append(str(e))
      continue
    faults += [f"'{step / item}' lacks {name}" for name in saved if name not in names]
    for name in names:
      num_arrays += 1
      fault, size = _check_array(step / item, name, saved.get(name))
      num_bytes += size
      faults += [fault] if fault else []
  if recorded is not None:
    faults += [*checkpoint.changed_data(step, recorded), *checkpoint.changed_files(step, recorded)]
  how = "" if recorded is not None else ", without checksums: that they can be read is all"
  return Checked(f"step {step.name}: {num_arrays} arrays, {num_bytes / 1e9:.3g} GB{how}", faults)


def _check_array(item: epath.Path, name: str, saved: Any) -> tuple[str, int]:
  """Returns what is wrong with an array, '' if nothing, and the bytes that were read of it."""
  sums, start = np.zeros(2, np.uint32), 0
  try:
    array = checkpoint.open_array(item, name)
    dtype = array.dtype.numpy_dtype
    rows = array.shape[0] if array.rank else 1
    size = max(1, int(np.prod(array.shape)) // max(1, rows) * dtype.itemsize)
    at_once = max(1, BLOCK_BYTES // size)
    for first in range(0, rows, at_once):
      end = min(rows, first + at_once)
      block = (array[first:end] if array.rank else array).read().result()
      sums += host_sum(block, start)
      start += block.size
  except Exception as e:
    return str(checkpoint.damaged(f"{item}: {name}", e)), 0
  if saved is not None and to_hex(sums) != saved.checksum:
    return f"'{item}': {name} is not what was saved: its checksum differs", start * dtype.itemsize
  return "", start * dtype.itemsize


# --- files with hashes


def _check_export(folder: epath.Path) -> Checked:
  listed = _read_manifest(folder / MANIFEST, "files")
  faults = _check_files({folder / name: about for name, about in listed.items()})
  here = {str(p.relative_to(folder)) for p in _files(folder)} - {MANIFEST}
  faults += [f"'{folder / name}' is not in its {MANIFEST}" for name in sorted(here - {*listed})]
  return Checked(f"export '{folder}': {len(listed)} files", faults)


def _check_built(manifest: epath.Path) -> Checked:
  shards = _read_manifest(manifest, "shards")
  faults = _check_files({manifest.parent / shard["file"]: shard for shard in shards})
  return Checked(f"data '{manifest}': {len(shards)} shards", faults)


def _built_manifests(path: epath.Path) -> list[epath.Path]:
  if path.name.endswith(BUILT) and path.exists():
    return [path]
  prefix = path.with_name(path.name + BUILT)
  if prefix.exists():
    return [prefix]
  return sorted(path.glob(f"*{BUILT}")) if path.is_dir() else []


def _read_manifest(path: epath.Path, key: str) -> Any:
  with untrusted.of_form(f"'{path}' is damaged", ConvertError):
    return untrusted.read_object(path, ConvertError)[key]


def _check_files(files: Mapping[epath.Path, Mapping[str, Any]]) -> list[str]:
  with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
    return [fault for fault in pool.map(_file_fault, files, files.values()) if fault]


def _file_fault(path: epath.Path, about: Mapping[str, Any]) -> str:
  hasher, size = hashlib.sha256(), 0
  try:
    with path.open("rb") as file:
      while block := file.read(CHUNK_BYTES):
        hasher.update(block)
        size += len(block)
  except OSError as e:
    return f"'{path}' cannot be read: {e}"
  if size != about["bytes"]:
    return f"'{path}' has {size} bytes, not {about['bytes']}"
  return "" if hasher.hexdigest() == about["sha256"] else f"'{path}' is damaged: its sha256 differs"


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    yield from _files(path) if path.is_dir() else (path,)
