# SPDX-License-Identifier: Apache-2.0
"""Shards of the slow tests: `SLOW_SHARD=2/4 make test-slow` runs the second of four."""

import re
import zlib

import pytest


def holds(shard: str, nodeid: str) -> bool:
  """Returns whether shard `K/N` has a test; the cases of one function are dealt out, too.

  Raises:
    UsageError: `shard` is not K/N with 1 <= K <= N.
  """
  found = re.fullmatch(r"(\d+)/(\d+)", shard)
  number, count = map(int, found.groups()) if found else (0, 0)
  if not 1 <= number <= count:
    raise pytest.UsageError(f"SLOW_SHARD is '{shard}'; it must be K/N, such as 2/4.")
  return zlib.crc32(nodeid.encode()) % count == number - 1
