# SPDX-License-Identifier: Apache-2.0
"""Every measurement is a command that imports and tells how it is used."""

import pathlib
import re
import runpy
import sys

import pytest

BENCH = pathlib.Path(__file__).parent.parent / "bench"
MODULES = {
  ".".join(path.relative_to(BENCH.parent).with_suffix("").parts): path
  for path in sorted(BENCH.rglob("*.py"))
  if path.stem != "__init__"
}
COMMANDS = [name for name, path in MODULES.items() if "\nimport argparse\n" in path.read_text()]
# Of extras that tests go without.
PEERS = {"lm_eval", "tensorflow", "torch", "transformers", "webdataset"}


def test_the_readme_has_a_line_for_each_module():
  readme = (BENCH / "README.md").read_text()
  commands = re.findall(r"^\| `(bench\.\w+\.\w+)` \|", readme, re.MULTILINE)
  parts = re.findall(r"`(\w+)\.py`", readme)
  rest = [path.stem for name, path in MODULES.items() if name not in commands]
  assert set(commands) <= set(MODULES)
  assert sorted(parts) == sorted(rest)
  assert all("__main__" in MODULES[name].read_text() for name in commands)


def test_the_readme_has_a_line_for_each_folder():
  folders = re.findall(r"^\| `(\w+)/` \|", (BENCH / "README.md").read_text(), re.MULTILINE)
  assert sorted(folders) == sorted({path.parent.name for path in MODULES.values()})


@pytest.mark.parametrize("name", COMMANDS)
def test_tells_how_it_is_used(name, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [name, "--help"])
  try:
    sys.modules.pop(name, None)  # another command may have imported it
    with pytest.raises(SystemExit) as ended:
      runpy.run_module(name, run_name="__main__")
  except ModuleNotFoundError as e:
    if (e.name or "").partition(".")[0] not in PEERS:
      raise
    pytest.skip(f"needs {e.name}, which the tests go without")
  assert ended.value.code == 0
  assert "usage:" in capsys.readouterr().out
