# SPDX-License-Identifier: Apache-2.0
"""Config files: found by path and by name from any folder, run once, and built into a run."""

import json
import pathlib

import pytest

from mm1_jax import config_files
from mm1_jax.config import ConfigError
from mm1_jax.config_files import ConfigFile
from mm1_jax.configs import mm1_30b_moe

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> pathlib.Path:
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize(
  "spec",
  ["mm1_30b_moe", "configs/mm1_30b_moe.py", str(ROOT / "configs/mm1_30b_moe.py")],
)
def test_the_shipped_ones_are_found_from_any_folder(elsewhere, spec):
  assert ConfigFile.find(spec).module is mm1_30b_moe
  run = ConfigFile.find(f"{spec}:v5p-512").build()
  assert (run.name, run.mesh.expert) == ("mm1_30b_moe", 8)


def test_the_shipped_ones_are_all_of_the_folder():
  files = {path.stem for path in (ROOT / "configs").glob("*.py")}
  assert {*config_files.shipped()} == files - {"__init__", "common"}


def test_a_file_of_ones_own_comes_first(elsewhere):
  (elsewhere / "configs").mkdir()
  file = elsewhere / "configs" / "mm1_30b_moe.py"
  file.write_text("def get_config(name='mine'):\n  return {'name': name}\n")
  assert ConfigFile.find("configs/mm1_30b_moe.py").build().name == "mine"
  assert ConfigFile.find("configs/mm1_30b_moe.py:yours").build().name == "yours"
  assert ConfigFile.find("configs/mm1_30b_moe.py:a:b").build().name == "a:b"
  assert ConfigFile.find("mm1_30b_moe").build().name == "mm1_30b_moe"


def test_a_copy_of_a_shipped_file_works_anywhere(elsewhere):
  (elsewhere / "my-model.py").write_text((ROOT / "configs/mm1_3b_moe.py").read_text())
  assert ConfigFile.find("my-model.py").build() == ConfigFile.find("mm1_3b_moe").build()
  assert ConfigFile.find("my-model.py").slices == ConfigFile.find("mm1_3b_moe").slices


def test_a_file_may_hold_dataclasses_and_be_run_again(elsewhere):
  text = "import dataclasses\n@dataclasses.dataclass\nclass A:\n  x: 'int' = {}\n"
  for x in (1, 22):  # of another length: else Python may take it for the same
    pathlib.Path("a.py").write_text(text.format(x) + "def get_config():\n  return vars(A())\n")
    with pytest.raises(ConfigError, match=f"unknown key 'x' = {x};"):
      ConfigFile.find("a.py").build()


def test_presets_are_taken_for_their_slice_only():
  file = ConfigFile.find("mm1_30b_moe")
  assert file.on_slice("v6e-256").build() == ConfigFile.find("mm1_30b_moe:v6e-256").build()
  assert file.on_slice("v5p-8") == file
  chosen = ConfigFile.find("mm1_30b_moe:v6e-256")
  assert chosen.on_slice("v5p-512") == chosen
  assert (file.planned_slice, chosen.planned_slice) == ("v5p-512", "v6e-256")
  assert ConfigFile.find("mm1_debug:moe").planned_slice == "v5p-128"


RAISES = """
def get_config():
  return 1 / 0
"""


@pytest.mark.parametrize(
  ("spec", "text", "says"),
  [
    ("mm1_30b_meo", None, r"no config has this name\. Did you mean 'mm1_30b_moe'\? Shipped are fr"),
    ("common", None, "no config has this name"),
    ("", None, "no config has this name"),
    ("configs/mm1_debgu.py", None, r"there is no such file\. Did you mean 'mm1_debug'\?"),
    ("elsewhere/mm1_3b.py", None, r"there is no such file\. Did you mean 'mm1_3b'\?"),
    ("file", "", r"there is no such file; did you mean 'file\.py'\?"),
    ("file.txt", "", r"a config is a Python file, NAME\.py"),
    ("file.py", "", "has no function get_config"),
    ("file.py", RAISES, r"ZeroDivisionError: division by zero \(.*file\.py, line 3\)"),
    ("file.py", "1 / 0", r"ZeroDivisionError: division by zero \(.*file\.py, line 1\)"),
    ("file.py", "def f(:", r"SyntaxError: .*\(file\.py, line 1\)"),
    ("file.py", "import no_such", r"ModuleNotFoundError: No module named 'no_such' \(.*line 1\)"),
    ("file.py", "def get_config():\n  return 3", r"returned int; it must return an ml_collections"),
    (
      "file.py:x",
      "def get_config():\n  return {}",
      r"what follows the colon is wrong: .*too many",
    ),
    ("from_weights", None, r"an argument after a colon is needed: .*'folder'"),
    ("from_weights:no/run", None, r"'no/run' has no config\.json"),
    ("mm1_debug:foo", None, r"mm1_debug is 'dense' or 'moe', not 'foo'"),
    ("mm1_3b:v5p-8", None, r"no preset for 'v5p-8', only for v5e-256"),
  ],
)
def test_a_mistake_is_said_with_the_config(elsewhere, spec, text, says):
  if text is not None:
    file = spec.partition(":")[0]
    pathlib.Path(file if "." in file else f"{file}.py").write_text(text)
  with pytest.raises(ConfigError, match=rf"(?s)--config={spec.partition(':')[0]}.*{says}"):
    ConfigFile.find(spec).build()


def test_a_config_may_start_from_imported_weights(elsewhere):
  (elsewhere / "open").mkdir()
  values = ConfigFile.find("mm1_debug").build().to_dict()
  (elsewhere / "open/config.json").write_text(json.dumps(values))
  run = ConfigFile.find("from_weights:open").build([("model.decoder.lora.rank", "4")])
  assert (run.train.init_from, run.model.decoder.width) == ("open", 128)
  assert run.model.decoder.lora is not None
