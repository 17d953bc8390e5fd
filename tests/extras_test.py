# SPDX-License-Identifier: Apache-2.0
"""What is imported is declared; what a base install leaves out is asked for in one message."""

import ast
import functools
import importlib.metadata
import os
import pathlib
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping

import pytest
import yaml

from mm1_jax import extras
from mm1_jax.config import UserError

ROOT = pathlib.Path(__file__).parents[1]
OWN = {"mm1_jax", "configs", "launch"}
# Prefix -> the extra that its imports may be of, beside the base; the longest that fits decides.
EXTRA_OF = {
  "mm1_jax.convert": "convert",
  "mm1_jax.convert.export.huggingface": "goldens",  # copied into exports, and run by transformers
  "mm1_jax.convert.export.llava": "convert",
  "mm1_jax.data.build": "data",
  "mm1_jax.data.inspect": "draw",
  "mm1_jax.data.tokenizer": "convert",
  "mm1_jax.drawing": "draw",
  "mm1_jax.eval.adapters.lm_eval": "lm-eval",
  "mm1_jax.eval.adapters.lmms_eval": "lmms-eval",
  "mm1_jax.eval.tasks.files": "eval",
  "mm1_jax.inference.app": "serve",
  "mm1_jax.inference.page": "serve",
  "mm1_jax.inference.quantize": "quant",
  "mm1_jax.parquet": "eval",
  "mm1_jax.plan.picture": "draw",
  "mm1_jax.report": "draw",
}
# Extras that are too large for the environment of the tests.
NOT_IN_DEV = {"lmms-eval"}
# Declared, and imported by a library that declares it nowhere, or as a plug-in of one.
NOT_IMPORTED = {"flatbuffers"}
CARD = {
  "clu",
  "flax",
  "grain",
  "jax",
  "ml-collections",
  "optax",
  "orbax-checkpoint",
  "sentencepiece",
  "tensorflow-datasets",
}
SOURCES = sorted(path for part in OWN for path in (ROOT / part).rglob("*.py"))
OPTIONAL = sorted({package for _, packages in extras.EXTRAS.values() for package in packages})


def normal(name: str) -> str:
  """Returns a requirement's distribution, as the packaging rules spell it."""
  return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()  # pyright: ignore


@pytest.fixture
def declared(monkeypatch) -> dict[str, set[str]]:
  """Returns distributions by extra of setup.py; "" is the base."""
  monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
  monkeypatch.chdir(ROOT)
  setup = runpy.run_path("setup.py")
  lists = {"": setup["REQUIRES"], **setup["EXTRAS"]}
  return {extra: {normal(name) for name in names} for extra, names in lists.items()}


def imported(source: str) -> set[str]:
  """Returns the top-level packages that `source` imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      names.add(node.module)
  return {name.split(".")[0] for name in names} - sys.stdlib_module_names - OWN


def module_name(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def extra_of(module: str) -> str:
  prefixes = [p for p in EXTRA_OF if module == p or module.startswith(f"{p}.")]
  return EXTRA_OF[max(prefixes, key=len)] if prefixes else ""


@functools.cache
def installed() -> Mapping[str, list[str]]:
  """Returns distributions by the packages they install; it reads the files of all of them."""
  return importlib.metadata.packages_distributions()


def distributions(package: str) -> set[str]:
  return {normal(name) for name in (package, *installed().get(package, ()))}


def undeclared(module: str, source: str, declared: dict[str, set[str]]) -> list[str]:
  """Returns one line for each package that a module imports and setup.py does not ask for."""
  allowed = declared[""] | declared[extra_of(module)]
  return [
    f"{module} imports {package}: neither the base nor '{extra_of(module)}' has it"
    for package in sorted(imported(source))
    if not distributions(package) & allowed
  ]


def test_every_import_is_declared(declared):
  found = [undeclared(module_name(path), path.read_text(), declared) for path in SOURCES]
  assert [line for lines in found for line in lines] == []


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("mm1_jax.train.loop", "def f():\n  import matplotlib.figure"),
    ("mm1_jax.data.sources", "import pyarrow as pa"),
    ("mm1_jax.data.build.files", "from gradio import themes"),
    ("mm1_jax.models.vit", "import torch"),
  ],
)
def test_an_undeclared_import_is_found(module: str, source: str, declared):
  assert len(undeclared(module, source, declared)) == 1


def test_what_is_declared_is_imported(declared):
  found = {d for path in SOURCES for p in imported(path.read_text()) for d in distributions(p)}
  assert declared[""] - found == NOT_IMPORTED
  for extra, (_, packages) in extras.EXTRAS.items():
    assert declared[extra] == {normal(package) for package in packages}
    # So the tests use it.
    assert (declared[extra] <= declared["dev"]) == (extra not in NOT_IN_DEV)


def test_the_libraries_of_the_design_are_in_the_base(declared):
  assert declared[""] >= CARD


def test_ci_runs_on_the_oldest_and_the_newest_python():
  pythons = re.findall(
    r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "setup.py").read_text()
  )
  workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
  (job,) = workflow["jobs"].values()
  assert job["strategy"]["matrix"]["python"] == [pythons[0], pythons[-1]]
  assert job["steps"][-1]["run"] == ".ci/run"


def test_what_lacks_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "safetensors", None)
  with pytest.raises(UserError, match=r"needs safetensors: pip install 'mm1_jax\[convert\]'\.$"):
    extras.require("convert")
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(UserError, match="needs safetensors and tokenizers: pip install"):
    extras.require("convert")


def base(code: str, *args: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
  """Runs code where the packages of all extras cannot be imported, as after a base install."""
  hide = f"import sys\nfor name in {OPTIONAL}:\n  sys.modules[name] = None\n"
  return subprocess.run(
    [sys.executable, "-c", hide + code, *args],
    **{"cwd": cwd, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True},
    capture_output=True,
    check=False,
  )


def test_the_base_imports_without_extras(tmp_path):
  """All modules that no extra is for, each as the first to be asked for what it imports."""
  modules = [module_name(path) for path in SOURCES if path.is_relative_to(ROOT / "mm1_jax")]
  plain = [module for module in modules if extra_of(module) in ("", "quant")]
  plain += ["mm1_jax.data.tokenizer"]
  names = [name for name in plain if "__main__" not in name]
  done = base(f"import importlib\nfor name in {names}: importlib.import_module(name)", cwd=tmp_path)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  ("command", "extra", "packages"),
  [
    (
      "data text --input=x --output=y",
      "data",
      "apache_beam and pyarrow and zstandard",
    ),
    ("inspect --config=mm1_debug", "draw", "matplotlib"),
    ("plan --config=mm1_debug --topology=v5e-4 --picture=plan.png", "draw", "matplotlib"),
    ("convert import --vit=x --out=y", "convert", "jinja2 and safetensors and tokenizers"),
    ("serve --checkpoint=x", "serve", "gradio and starlette"),
    ("ask --checkpoint=x --image=y --prompt=z --quantize=int8", "quant", "qwix"),
  ],
)
def test_commands_name_the_extra_they_need(command, extra, packages, tmp_path):
  door = "sys.argv[0] = 'mm1'\nfrom mm1_jax.__main__ import door\ndoor()"
  done = base(door, *command.split(), cwd=tmp_path)
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1].startswith("error: ")
  assert f" needs {packages}: pip install 'mm1_jax[{extra}]'." in done.stderr
  assert "Traceback" not in done.stderr
