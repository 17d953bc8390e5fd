# SPDX-License-Identifier: Apache-2.0
"""Every command of docs/guides/your_data.md runs, from the first to the last."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from mm1_jax.data.build import __main__, raw_sample
from mm1_jax.data.build.options import FORMATS, MM1_FILTERS, URL_WORDS

ROOT = pathlib.Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "guides" / "your_data.md").read_text()
FORMS = (ROOT / "docs" / "reference" / "formats.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
  """Returns the commands in blocks without a language; blocks with one are shown only."""
  text = "".join(body for language, body in BLOCKS if not language)
  return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def test_every_command_runs(tmp_path, monkeypatch, capfd):
  (tmp_path / "mm1_jax").symlink_to(ROOT / "mm1_jax")
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)
  run, built = commands(), []
  assert run[0][:3] == ["python", "-m", "mm1_jax.data.build.raw_sample"]
  raw_sample.main(run[0][3:])
  for command in run[1:-1]:
    assert command[:2] == ["mm1", "data"]
    __main__.main(command[2:])
    built.append(command[2])
  assert built == list(FORMATS)
  summaries = capfd.readouterr().out
  (shown,) = (body for _, body in BLOCKS if body.startswith("rows read"))
  assert shown in summaries
  for name in ("web", "coco", "llava", "obelics", "mmc4", "books", "tfds"):
    assert json.loads((tmp_path / f"data/{name}-manifest.json").read_text())["records"] > 20


@pytest.mark.slow
def test_inspect_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run = commands()
  raw_sample.main(run[0][3:])
  __main__.main(next(command[2:] for command in run if "obelics" in command))
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  subprocess.run([sys.executable, "-m", "mm1_jax", *run[-1][1:]], check=True, env=env)
  assert (tmp_path / "look").is_dir()


def test_filters_are_as_documented():
  rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", FORMS, re.MULTILINE)
  values = {}
  for flags, shown in rows:
    names = [name.replace("-", "_") for name in re.findall(r"--([\w-]+)", flags)]
    values |= dict(zip(names, shown.split(", "), strict=False))
  as_written = {2.0: "2", URL_WORDS: ",".join(URL_WORDS)}
  assert {name: values[name] for name in MM1_FILTERS} == {
    name: "yes" if value is True else as_written.get(value, str(value))
    for name, value in MM1_FILTERS.items()
  }
