# SPDX-License-Identifier: Apache-2.0
"""Every measurement is a command that imports and tells how it is used."""

import pathlib
import re
import runpy
import sys

import pytest

BENCH = pathlib.Path(__file__).parent.parent / "bench"
COMMANDS = sorted(
  path.stem for path in BENCH.glob("*.py") if "\nimport argparse\n" in path.read_text()
)
PEERS = {"tensorflow", "torch", "transformers", "webdataset"}  # of extras that tests go without


def test_the_readme_has_a_line_for_each_module():
  readme = (BENCH / "README.md").read_text()
  commands = re.findall(r"^\| `bench\.(\w+)` \|", readme, re.MULTILINE)
  parts = re.findall(r"`(\w+)\.py`", readme)
  modules = [path.stem for path in BENCH.glob("*.py") if path.stem != "__init__"]
  assert sorted(commands + parts) == sorted(modules)
  assert all("__main__" in (BENCH / f"{name}.py").read_text() for name in commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_tells_how_it_is_used(name, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [name, "--help"])
  try:
    sys.modules.pop(f"bench.{name}", None)  # another command may have imported it
    with pytest.raises(SystemExit) as ended:
      runpy.run_module(f"bench.{name}", run_name="__main__")
  except ModuleNotFoundError as e:
    if (e.name or "").partition(".")[0] not in PEERS:
      raise
    pytest.skip(f"needs {e.name}, which the tests go without")
  assert ended.value.code == 0
  assert "usage:" in capsys.readouterr().out
