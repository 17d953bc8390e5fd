# SPDX-License-Identifier: Apache-2.0
"""Each slow test is in one shard, whatever the order in which tests are found."""

import pathlib
import subprocess
import sys

import pytest

from tests.helpers import shards

ROOT = pathlib.Path(__file__).parents[1]
NAMES = [f"tests/a_test.py::test_{i}[{case}]" for i in range(50) for case in "xy"]


def collect(shard: str | None, monkeypatch) -> subprocess.CompletedProcess:
  monkeypatch.setenv("SLOW_SHARD", shard or "")
  monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
  command = [
    sys.executable,
    "-m",
    "pytest",
    "-m",
    "slow",
    "--collect-only",
    "-p",
    "no:cacheprovider",
  ]
  files = ["tests/install_test.py", "tests/data/build/docs_test.py"]
  return subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_each_test_is_in_one_shard_and_none_is_empty(count):
  held = [[n for n in NAMES if shards.holds(f"{k + 1}/{count}", n)] for k in range(count)]
  assert sorted(name for names in held for name in names) == sorted(NAMES)
  assert all(held)


@pytest.mark.parametrize("shard", ["", "0/4", "5/4", "2", "a/b", "1/0", "-1/4"])
def test_anything_else_is_refused(shard):
  with pytest.raises(pytest.UsageError, match="it must be K/N, such as 2/4"):
    shards.holds(shard, "any")


@pytest.mark.slow
def test_the_shards_of_a_collection(monkeypatch):
  def names(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode in (0, 5), done.stderr  # 5: there are none
    return [line for line in done.stdout.splitlines() if "::" in line]

  whole = names(collect(None, monkeypatch))
  parts = [names(collect(f"{k}/2", monkeypatch)) for k in (1, 2)]
  assert whole
  assert sorted(parts[0] + parts[1]) == sorted(whole)
