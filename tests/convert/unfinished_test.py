# SPDX-License-Identifier: Apache-2.0
"""Folders that have their name only when they are whole."""

import signal
import subprocess
import sys

import pytest

from mm1_jax.convert import ConvertError, unfinished

PROGRAM = """
import pathlib, signal, sys, time
# Tests that run in the background ignore these, and so would the program.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from mm1_jax.convert import unfinished
with unfinished.folder(pathlib.Path(sys.argv[1])) as working:
  (working / "a").write_text("a")
  print("begun", flush=True)
  time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_end_leaves_nothing(number, tmp_path):
  out = tmp_path / "out"
  command = [sys.executable, "-c", PROGRAM, str(out)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    assert (tmp_path / "out.unfinished" / "a").exists()
    process.send_signal(number)
    process.wait()
  assert list(tmp_path.iterdir()) == []
  assert process.returncode == (-number if number == signal.SIGINT else 128 + number)


def test_an_error_leaves_nothing_and_handlers_are_as_before(tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  during = []

  def fail() -> None:
    with unfinished.folder(tmp_path / "out"):
      during.append(signal.getsignal(signal.SIGTERM))
      raise ValueError("no")

  with pytest.raises(ValueError, match="no"):
    fail()
  assert during != [before]
  assert signal.getsignal(signal.SIGTERM) == before
  assert list(tmp_path.iterdir()) == []


def test_what_is_whole_has_its_name(tmp_path):
  (tmp_path / "out").mkdir()
  with unfinished.folder(tmp_path / "out") as working:
    (working / "a").write_text("a")
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  with pytest.raises(ConvertError, match="is there already"):
    unfinished.refuse(tmp_path / "out")
