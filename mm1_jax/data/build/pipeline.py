# SPDX-License-Identifier: Apache-2.0
"""The build on Beam: units -> shards; before that, if asked for, a pass that counts pictures.

The units are listed once, up front, and each becomes one shard, on whatever worker: so the shards
do not depend on the runner. A shard with a sidecar that has the key it would get now is done.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from absl import logging
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from mm1_jax.data.build import files, images
from mm1_jax.data.build.filters import Refiner, image_marks
from mm1_jax.data.build.formats import Unit, list_units, read
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.progress import Progress
from mm1_jax.data.build.rows import Draft, Image
from mm1_jax.data.build.runner import beam_options
from mm1_jax.data.build.shards import (
  TEMPORARY,
  Job,
  build_shard,
  shard_fault,
  shard_path,
  sidecar_path,
  work_folder,
)
from mm1_jax.data.build.stats import content
from mm1_jax.data.image import ImageError
from mm1_jax.data.sources import DataError
from mm1_jax.data.tokenizer import Tokenizer

VERSION = 2  # raise it when the same input and options give other bytes
_TAR_NAMES = (".tar", ".tgz", ".tar.gz", ".tar.zst", ".zip")
_READERS = 16  # sidecars at once, where each is a request
_LIMITED_SHARDS = 8  # of a try: enough to see more than the first file


def build(options: BuildOptions, beam_args: list[str]) -> list[tuple[Job, dict[str, Any]]]:
  """Builds the shards that are not built yet; returns all with their sidecars.

  Raises:
    UserError: there is nothing to read, or something else is where we would write.
  """
  units = list_units(options)
  total_bytes = sum({part.path: part.size for unit in units for part in unit}.values())
  logging.info("%d shards, to be made of %.1f MB", len(units), total_bytes / 1e6)
  run_options = beam_options(beam_args, num_units=len(units), num_bytes=total_bytes)
  _prepare_folders(options)
  store = _index_store(options)
  repeats = _count_repeats(options, units, store, run_options)
  jobs = _jobs(options, units, store, repeats)
  done = _finished_jobs(options, jobs)
  if done:
    logging.info("%d of %d shards are there already", len(done), len(jobs))
  left = [job for job in jobs if job.name not in done]
  if left:
    with Progress(options, len(jobs), len(done)), beam.Pipeline(options=run_options) as pipeline:
      shards = pipeline | beam.Create(left) | beam.Reshuffle()
      _ = shards | "Build" >> beam.ParDo(_BuildShard(options))
  return list(zip(jobs, _read_sidecars(options, jobs), strict=True))


class _BuildShard(beam.DoFn):
  """Builds the shard of a job; yields nothing."""

  def __init__(self, options: BuildOptions):
    self._options = options

  def setup(self) -> None:
    self._refiner = Refiner(self._options, open_store(self._options), _read_repeats(self._options))
    self._tokenizer = Tokenizer(self._options.tokenizer) if self._options.tokenizer else None

  def process(self, job: Job) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
    sidecar = build_shard(job, self._options, self._refiner, self._tokenizer)
    for name in ("rows", "documents", "conversations", "images"):
      Metrics.counter("mm1_jax", name).inc(sidecar["stats"][name])


# --- jobs, and which of them are done


def _jobs(options: BuildOptions, units: list[Unit], store: str, repeats: str) -> list[Job]:
  """Returns the shards to make.

  Args:
    options: of the build.
    units: one for each shard; with a limit, only so many as can have a record.
    store: a hash of the image store.
    repeats: a hash of the pictures that are left out as repeated.
  """
  limits: list[int | None] = [None] * len(units)
  if options.limit is not None:
    num = min(len(units), options.limit, _LIMITED_SHARDS)
    limits = [options.limit // num + (i < options.limit % num) for i in range(num)]
  tokenizer = _hash(Tokenizer(options.tokenizer).model) if options.tokenizer else ""
  common = [VERSION, options.shard_key(), store, repeats, tokenizer]
  jobs = []
  for i, (unit, limit) in enumerate(zip(units, limits, strict=False)):
    parts = [dataclasses.asdict(part) for part in unit]
    key = _hash(json.dumps([*common, parts, limit]).encode())
    jobs.append(Job(f"{i:05d}-of-{len(limits):05d}", unit, key, limit))
  return jobs


def _finished_jobs(options: BuildOptions, jobs: list[Job]) -> set[str]:
  """Returns the names of the jobs whose shards exist; removes what a killed build left.

  Raises:
    DataError: there are shards of something else, and we may not overwrite them.
  """
  names = {job.name for job in jobs}
  listed = _list(f"{options.output}-*.arrayrecord")
  # Not those of PREFIX-more, whose names begin like ours.
  sizes = {path: size for path, size in listed.items() if _is_shard(path, options)}
  shards = {_name(path): path for path in sizes}
  strange = sorted(shards[name] for name in shards.keys() - names)
  if strange and not options.overwrite:
    raise DataError(
      f"{strange[0]} is none of the {len(jobs)} shards to be made: the input or --rows-per-shard "
      f"has changed since it was. Give --overwrite to remove it, or another --output."
    )
  work = _list(f"{work_folder(options)}/*")
  sidecars = {_name(path): path for path in work if path.endswith(".json")}
  FileSystems.delete(
    [
      *strange,
      *(path for path in work if os.path.basename(path).startswith(TEMPORARY)),
      *(sidecars[name] for name in sidecars.keys() - names - {""}),
    ]
  )
  there = [job for job in jobs if job.name in shards and job.name in sidecars]
  built = {}
  for job, sidecar in zip(there, _read_sidecars(options, there), strict=True):
    if sidecar["key"] == job.key:
      built[job.name] = shards[job.name], sidecar["shard"]
    elif not options.overwrite:
      raise DataError(
        f"{shards[job.name]} was built {_difference(options, job, sidecar)}. Give --overwrite to "
        f"build it again, or another --output."
      )
  done = _whole_shards(built)
  # A sidecar must not outlive its shard: shards are padded, so another may be of the same size.
  FileSystems.delete([sidecars[job.name] for job in there if job.name not in done])
  return done


def _whole_shards(built: dict[str, tuple[str, dict[str, Any]]]) -> set[str]:
  """Returns the names of the shards that are what was built; reads all of them.

  Args:
    built: path, size and hash of each, by name.
  """
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    faults = dict(zip(built, pool.map(lambda b: shard_fault(*b), built.values()), strict=True))
  for name, fault in faults.items():
    if fault:
      logging.warning("%s %s: it is built again", built[name][0], fault)
  return {name for name, fault in faults.items() if not fault}


def _difference(options: BuildOptions, job: Job, sidecar: dict[str, Any]) -> str:
  """Returns what has changed since a shard was built."""
  now = json.loads(options.shard_key())
  for name, value in sidecar["options"].items():
    if now.get(name) != value:
      return f"with --{name}={value}, and now it is {now.get(name)}"
  if sidecar["input"] != [dataclasses.asdict(part) for part in job.unit]:
    return f"from other input than {', '.join(sorted({part.path for part in job.unit}))} now is"
  return "with another --limit, tokenizer or image store, or other repeated pictures"


def _read_sidecars(options: BuildOptions, jobs: list[Job]) -> list[dict[str, Any]]:
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    return list(pool.map(lambda job: _read_json(sidecar_path(options, job.name)), jobs))


# --- the image store


def open_store(options: BuildOptions) -> images.Store | None:
  """Returns where pictures are found; None if they come with their rows."""
  max_bytes = int(options.max_image_mb * 1e6)
  if not options.images:
    return None
  if _is_tars(options):
    return images.Tars(_index_path(options), max_bytes)
  return images.Folder(options.images, max_bytes)


def _index_store(options: BuildOptions) -> str:
  """Indexes a store of tars, unless that is done; returns a hash of it.

  Raises:
    DataError: there is no such store.
  """
  if not options.images:
    return ""
  if not _is_tars(options):
    if not files.is_remote(options.images) and not os.path.isdir(options.images):
      raise DataError(
        f"--images={options.images} is no folder. Give the folder that the pictures' names start "
        f"from, or a quoted glob of .tar files."
      )
    return options.images
  tars = files.match(options.images, "--images")
  key = _hash(json.dumps([dataclasses.asdict(tar) for tar in tars]).encode())
  done = f"{_index_path(options)}.json"
  if not FileSystems.exists(done) or _read_json(done)["key"] != key:
    logging.info("indexing the pictures in %d tars", len(tars))
    broken = images.index_tars(tars, _index_path(options), options.bounds)
    _write_json(done, {"key": key, "broken": broken})
  return key


def _is_tars(options: BuildOptions) -> bool:
  """Returns whether the store is no folder: a glob, or a file by any name."""
  if files.is_remote(options.images):
    return options.images.endswith(_TAR_NAMES)
  return not os.path.isdir(options.images) and (
    os.path.isfile(options.images) or options.images.endswith(_TAR_NAMES)
  )


def _index_path(options: BuildOptions) -> str:
  return f"{work_folder(options)}/images.sqlite"


# --- repeated pictures


def _count_repeats(
  options: BuildOptions, units: list[Unit], store: str, run_options: PipelineOptions
) -> str:
  """Finds the URLs and pictures that too many records have, unless that is done.

  Returns:
    A hash of what was found; '' if it is not asked for.
  """
  if options.max_repeats is None:
    return ""
  parts = [[dataclasses.asdict(part) for part in unit] for unit in units]
  key = _hash(json.dumps([VERSION, options.shard_key(), store, parts]).encode())
  path = _repeats_path(options)
  if not FileSystems.exists(path) or _read_json(path)["key"] != key:
    logging.info("counting pictures, to find the repeated ones")
    with beam.Pipeline(options=run_options) as pipeline:
      marks = pipeline | beam.Create(units) | beam.Reshuffle() | beam.ParDo(_ImageMarks(options))
      counts = marks | beam.combiners.Count.PerElement()
      repeated = counts | beam.Filter(_is_above, options.max_repeats) | beam.Keys()
      found = repeated | beam.Map(bytes.hex) | beam.combiners.ToList()
      _ = found | beam.Map(_write_repeats, path, key)
  return _hash("".join(_read_json(path)["digests"]).encode())


class _ImageMarks(beam.DoFn):
  """Yields what identifies the pictures of a unit, once for each record that has them."""

  def __init__(self, options: BuildOptions):
    self._options = options

  def setup(self) -> None:
    self._refiner = Refiner(self._options, open_store(self._options), frozenset())

  def process(self, unit: Unit) -> Iterator[bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
    for draft in read(unit, self._options):
      if isinstance(draft, Draft):
        yield from self._marks(item["image"] for item in content(draft.record) if "image" in item)

  def _marks(self, pictures: Iterable[Image]) -> set[bytes]:
    marks = set()
    for picture in pictures:
      with contextlib.suppress(ImageError):  # the build itself counts what is lost
        marks |= image_marks(picture, self._refiner.fetch(picture))
    return marks


def _is_above(counted: tuple[bytes, int], bound: int) -> bool:
  return counted[1] > bound


def _write_repeats(digests: list[str], path: str, key: str) -> None:
  _write_json(path, {"key": key, "digests": sorted(digests)})


def _read_repeats(options: BuildOptions) -> frozenset[bytes]:
  if options.max_repeats is None:
    return frozenset()
  return frozenset(map(bytes.fromhex, _read_json(_repeats_path(options))["digests"]))


def _repeats_path(options: BuildOptions) -> str:
  return f"{work_folder(options)}/repeats.json"


# --- small helpers


def _prepare_folders(options: BuildOptions) -> None:
  for folder in (os.path.dirname(options.output) or ".", work_folder(options)):
    if not FileSystems.exists(folder):
      FileSystems.mkdirs(folder)


def _list(pattern: str) -> dict[str, int]:
  """Returns the sizes of files by path."""
  (result,) = FileSystems.match([pattern])
  return {file.path: file.size_in_bytes for file in result.metadata_list}


def _name(path: str) -> str:
  """Returns 00003-of-00012 of a file that is called so; '' of another."""
  match = re.search(r"(\d{5,}-of-\d{5,})\.(?:json|arrayrecord)$", path)
  return match[1] if match else ""


def _is_shard(path: str, options: BuildOptions) -> bool:
  return os.path.basename(path) == os.path.basename(shard_path(options, _name(path)))


def _hash(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:32]


def _read_json(path: str) -> dict[str, Any]:
  with files.open_raw(path) as file:
    return json.load(file)


def _write_json(path: str, value: dict[str, Any]) -> None:
  with files.create(path) as file:
    file.write(json.dumps(value).encode())
