# SPDX-License-Identifier: Apache-2.0
"""The package installed, from a wheel and editable, and used far from the repository's folder."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import mm1_jax

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


def run(*command: str | os.PathLike, cwd: pathlib.Path) -> subprocess.CompletedProcess:
  """Runs a command without the repository in Python's path."""
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  return subprocess.run(
    [*map(str, command)],
    **{"cwd": cwd, "env": env, "capture_output": True, "text": True, "timeout": 600},
    check=False,
  )


def ok(*command: str | os.PathLike, cwd: pathlib.Path) -> str:
  done = run(*command, cwd=cwd)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout + done.stderr


def make_environment(folder: pathlib.Path) -> pathlib.Path:
  """Makes a virtual environment that has the libraries of this one, but not this package.

  Returns:
    Its folder of programs.
  """
  ok(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
  (site,) = folder.glob("lib/python*/site-packages")
  # .pth files in *these* folders, such as that of our own editable install, are not read.
  libraries = [path for path in sys.path if path.endswith("site-packages")]
  (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
  return folder / "bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
  """What git has, in a folder of its own: building writes beside the sources."""
  folder = tmp_path_factory.mktemp("source")
  names = ok("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\n")
  for name in names:
    if (ROOT / name).is_file():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, folder / name)
  return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("wheel")
  ok(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
  (wheel,) = folder.glob("*.whl")
  return wheel


def test_the_wheel_has_what_is_needed_and_says_what_it_is(wheel):
  with zipfile.ZipFile(wheel) as files:
    names = files.namelist()
    info = f"mm1_jax-{mm1_jax.__version__}.dist-info"
    metadata = files.read(f"{info}/METADATA").decode()
    entry = files.read(f"{info}/entry_points.txt").decode()
  shipped = {p.name for p in (ROOT / "configs").glob("*.py")}
  assert {n.split("/")[-1] for n in names if n.startswith("mm1_jax/configs/")} == shipped
  assert not [n for n in names if not n.startswith(("mm1_jax/", info))]
  assert "mm1_jax/data/sample/tokenizer.model" in names
  assert f"Version: {mm1_jax.__version__}\n" in metadata
  assert (ROOT / "README.md").read_text() in metadata
  assert re.search(r"\nRequires-Python: (>=3\.11,<3\.14|<3\.14,>=3\.11)\n", metadata)
  assert "Provides-Extra: draw\n" in metadata
  assert f"\n## {mm1_jax.__version__} " in (ROOT / "CHANGELOG.md").read_text()
  assert "mm1 = mm1_jax.__main__:door" in entry


@pytest.fixture(scope="module", params=["wheel", "editable"])
def programs(request, source, tmp_path_factory) -> pathlib.Path:
  """Returns the folder of programs of an environment where the package is installed."""
  programs = make_environment(tmp_path_factory.mktemp(request.param) / "venv")
  what = [request.getfixturevalue("wheel")]
  if request.param == "editable":
    what = ["--no-build-isolation", "-e", source]
  install = (*PIP, "--python", programs / "python", "install", "--no-deps", "--no-index", *what)
  ok(*install, cwd=source)
  return programs


def test_it_trains_in_an_empty_folder(programs, tmp_path):
  """With the console command, by name; the run goes to a folder of the config's name."""
  steps = ("--config.train.num_steps=2", "--config.train.eval_batches", "1")
  ok(programs / "mm1", "train", "--config=mm1_debug", *steps, cwd=tmp_path)
  assert (tmp_path / "runs/mm1_debug/checkpoints/2/params").is_dir()
  assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_configs_are_found_and_imported_there(programs, tmp_path):
  copy = tmp_path / "mine.py"
  copy.write_text(
    "from mm1_jax.configs import common, mm1_debug\n\n\ndef get_config():\n"
    "  config = mm1_debug.get_config()\n  config.name = 'mine'\n"
    "  config.data.tokenizer = 'none'\n  return config\n"
  )
  for config, name in (("mine.py", "mine"), ("configs/mm1_30b_moe.py", "mm1_30b_moe")):
    done = run(programs / "mm1", "train", f"--config={config}", cwd=tmp_path)
    assert done.returncode == 1
    assert f"error: {name} reads what is not there:" in done.stderr
    assert f"mm1 train --config={config} --sample\n" in done.stderr
  where = ok(programs / "python", "-c", "import mm1_jax; print(mm1_jax.__file__)", cwd=tmp_path)
  assert str(ROOT) not in where
