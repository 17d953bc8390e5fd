# SPDX-License-Identifier: Apache-2.0
"""A line every few seconds of a local build: what the workers have written so far."""

import glob
import json
import os
import threading
import time

from absl import logging

from mm1_jax.data.build import files
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.shards import TEMPORARY, work_folder

SECONDS = 5.0


class Progress:
  """Watches a local work folder inside the block; remote runners report progress themselves."""

  def __init__(self, options: BuildOptions, num_shards: int, num_done: int):
    self._folder = glob.escape(work_folder(options))
    self._num_shards = num_shards
    self._num_done = num_done
    self._watch = not files.is_remote(self._folder)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self) -> "Progress":
    if self._watch:
      self._thread.start()
    return self

  def __exit__(self, *_error) -> None:
    self._stop.set()
    if self._watch:
      self._thread.join()

  def _run(self) -> None:
    start = time.time()
    records: dict[str, int] = {}
    before = set(self._sidecars())
    while not self._stop.wait(SECONDS):
      for path in set(self._sidecars()) - before - records.keys():
        with open(path) as file:
          stats = json.load(file)["stats"]
        records[path] = stats["documents"] + stats["conversations"]
      writing = glob.glob(f"{self._folder}/{TEMPORARY}*")
      megabytes = sum(map(_size, writing)) / 1e6
      total, rate = sum(records.values()), sum(records.values()) / (time.time() - start)
      done = self._num_done + len(records)
      logging.info(
        "%d of %d shards; %d records, %.0f a second; %.1f MB in shards that are being written",
        *(done, self._num_shards, total, rate, megabytes),
      )

  def _sidecars(self) -> list[str]:
    return glob.glob(f"{self._folder}/*-of-*.json")


def _size(path: str) -> int:
  try:
    return os.path.getsize(path)
  except OSError:  # it was renamed meanwhile
    return 0
