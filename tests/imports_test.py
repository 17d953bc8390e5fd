# SPDX-License-Identifier: Apache-2.0
"""Imports point inward: the tree's rules, read off the source with `ast`.

Each package names which of our modules it may import and which libraries it must not; the same
checker then proves on made-up sources that every rule can fail.
"""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CONTRACTS = {
  "mm1_jax.config",
  "mm1_jax.batch",
  "mm1_jax.extras",
  "mm1_jax.untrusted",
  "mm1_jax.parquet",
}
TRAINING = {"jax", "flax", "optax", "orbax", "torch", "transformers", "tensorflow"}

# Prefix -> ours it may import (itself aside); the longest prefix that fits a module decides.
MAY_IMPORT: dict[str, set[str]] = {
  "mm1_jax.config": {"mm1_jax.ranges"},
  "mm1_jax.ranges": set(),
  "mm1_jax.chips": set(),
  "mm1_jax.batch": set(),
  "mm1_jax.extras": {"mm1_jax.config"},
  "mm1_jax.untrusted": {"mm1_jax.config"},
  "mm1_jax.parquet": set(),
  "mm1_jax.sharding": CONTRACTS,
  "mm1_jax.overrides": {"mm1_jax.config"},
  "mm1_jax.config_files": {"mm1_jax.config", "mm1_jax.overrides"},
  "mm1_jax.configs": set(),
  "mm1_jax.interrupts": set(),
  "mm1_jax.cli": CONTRACTS | {"mm1_jax.config_files", "mm1_jax.interrupts", "mm1_jax.overrides"},
  "mm1_jax.inputs": CONTRACTS | {"mm1_jax.checkpoint", "mm1_jax.data"},
  "mm1_jax.legend": set(),
  "mm1_jax.metrics": {"mm1_jax.chips"},
  "mm1_jax.goodput": {"mm1_jax.metrics"},
  "mm1_jax.drawing": set(),
  "mm1_jax.report": CONTRACTS
  | {"mm1_jax.legend", "mm1_jax.drawing", "mm1_jax.goodput", "mm1_jax.metrics"},
  "mm1_jax.distributed": CONTRACTS | {"mm1_jax.sharding"},
  "mm1_jax.checksum": {"mm1_jax.sharding"},
  "mm1_jax.checkpoint": CONTRACTS
  | {
    "mm1_jax.checksum",
    "mm1_jax.distributed",
    "mm1_jax.sharding",
    "mm1_jax.models.layers",
  },
  "mm1_jax.models": CONTRACTS | {"mm1_jax.chips", "mm1_jax.sharding"},
  "mm1_jax.data": CONTRACTS,
  "mm1_jax.data.build": CONTRACTS | {"mm1_jax.cli", "mm1_jax.data"},
  "mm1_jax.data.inspect": CONTRACTS | {"mm1_jax.cli", "mm1_jax.data", "mm1_jax.drawing"},
  "mm1_jax.train": CONTRACTS
  | {
    "mm1_jax.chips",
    "mm1_jax.sharding",
    "mm1_jax.distributed",
    "mm1_jax.models",
    "mm1_jax.data",
    "mm1_jax.checkpoint",
    "mm1_jax.checksum",
    "mm1_jax.metrics",
    "mm1_jax.goodput",
    "mm1_jax.legend",
    "mm1_jax.report",
  },
  "mm1_jax.inference": CONTRACTS
  | {"mm1_jax.cli", "mm1_jax.sharding", "mm1_jax.models", "mm1_jax.data", "mm1_jax.checkpoint"},
  "mm1_jax.eval": CONTRACTS
  | {
    "mm1_jax.sharding",
    "mm1_jax.models",
    "mm1_jax.data",
    "mm1_jax.drawing",
    "mm1_jax.inference",
    "mm1_jax.checkpoint",
    "mm1_jax.metrics",
    "mm1_jax.cli",
    "mm1_jax.distributed",
    "mm1_jax.legend",
    "mm1_jax.__version__",
  },
  "mm1_jax.eval.metrics": set(),
  "mm1_jax.eval.tasks": {
    "mm1_jax.config",
    "mm1_jax.extras",
    "mm1_jax.untrusted",
    "mm1_jax.parquet",
    "mm1_jax.data.sources",
    "mm1_jax.eval.task",
    "mm1_jax.eval.metrics",
  },
  "mm1_jax.eval.task": {"mm1_jax.config", "mm1_jax.eval.metrics"},
  "mm1_jax.convert": CONTRACTS
  | {
    "mm1_jax.cli",
    "mm1_jax.sharding",
    "mm1_jax.models",
    "mm1_jax.data",
    "mm1_jax.checkpoint",
    "mm1_jax.checksum",
    "mm1_jax.inference",
    "mm1_jax.metrics",
  },
  "mm1_jax.plan": CONTRACTS
  | {
    "mm1_jax.chips",
    "mm1_jax.cli",
    "mm1_jax.drawing",
    "mm1_jax.sharding",
    "mm1_jax.models",
    "mm1_jax.train",
    "mm1_jax.inference",
    "mm1_jax.metrics",
  },
  "mm1_jax.main": {"mm1_jax"},
  "mm1_jax.__main__": {"mm1_jax"},
}
# Prefix -> libraries it must not import, under the general ban below.
MAY_NOT_IMPORT: dict[str, set[str]] = {
  "mm1_jax.config": TRAINING | {"grain"},
  "mm1_jax.batch": TRAINING | {"grain"},
  "mm1_jax.chips": TRAINING | {"grain"},
  "mm1_jax.models": {"grain", "orbax", "optax", "torch", "transformers", "tensorflow"},
  "mm1_jax.data": TRAINING,
  "mm1_jax.eval.metrics": TRAINING | {"grain"},
  "mm1_jax.eval.task": TRAINING | {"grain"},
  "mm1_jax.eval.tasks": TRAINING | {"grain"},
  "mm1_jax.metrics": {"tensorflow"},
}
NOBODY = ("configs", "mm1_jax.configs", "launch", "tests", "bench", "lab", "mm1_jax.main")


def within(module: str, prefix: str) -> bool:
  return module == prefix or module.startswith(f"{prefix}.")


def imported(source: str, module: str, is_package: bool = False) -> list[str]:
  """Returns the full names that `source` imports, anywhere in it, relative ones resolved."""
  names = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        keep = module.split(".")[: None if is_package and node.level == 1 else -node.level]
        base = ".".join([*keep, base]) if base else ".".join(keep)
      names += [f"{base}.{alias.name}" for alias in node.names]
  return names


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
  """Returns one line for each import of `module` that breaks a rule."""
  prefix = max((p for p in MAY_IMPORT if within(module, p)), key=len, default=None)
  banned = {lib for p, libs in MAY_NOT_IMPORT.items() if within(module, p) for lib in libs}
  found = []
  for name in imported(source, module, is_package):
    ours = within(name, "mm1_jax")
    if any(within(name, p) for p in NOBODY) and not within(name, module):
      found.append(f"{module} imports {name}: no module may import that")
    elif within(name, "ml_collections"):
      found.append(f"{module} imports {name}: ml_collections is for configs/")
    elif any(within(name, lib) for lib in banned):
      found.append(f"{module} imports {name}: not a library for it")
    elif ours and prefix and not within(name, prefix):
      allowed = MAY_IMPORT[prefix]
      if not any(within(name, p) for p in allowed):
        found.append(f"{module} imports {name}: it may import {sorted(allowed)} of ours")
    elif ours and not prefix and module != "mm1_jax":
      found.append(f"{module} has no rule in MAY_IMPORT")
  return found


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = sorted((ROOT / "mm1_jax").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_inward(path: pathlib.Path):
  package = path.name == "__init__.py"
  assert violations(module_name(path), path.read_text(), package) == []


@pytest.mark.parametrize("folder", ["configs", "bench", "lab", "launch", "tests"])
def test_configs_have_one_name_and_tests_import_no_bench(folder):
  """Also that nothing edits the path that modules are found on."""
  banned = ("configs", "bench") if folder == "tests" else ("configs",)
  for path in sorted((ROOT / folder).rglob("*.py")):
    names = imported(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not [n for n in names if any(within(n, b) for b in banned)], path
    edits = re.findall(r"sys\.path(?:\.append|\.insert| \+=|\[.*\] =)", path.read_text())
    assert not edits or folder == "bench", path  # an export is a folder of modules


def test_no_module_is_called_utils():
  assert [str(p) for p in SOURCES if p.stem in ("utils", "util", "helpers", "common")] == []


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("mm1_jax.models.vit", "import mm1_jax.data.pipeline"),
    ("mm1_jax.models.vit", "from mm1_jax import data"),
    ("mm1_jax.models.vit", "from ..train import step"),
    ("mm1_jax.models.vit", "from mm1_jax import checkpoint"),
    ("mm1_jax.models.vit", "import grain"),
    ("mm1_jax.models.vit", "import orbax.checkpoint as ocp"),
    ("mm1_jax.models.vit", "def f():\n  from ml_collections import ConfigDict"),
    ("mm1_jax.data.packing", "import jax"),
    ("mm1_jax.data.packing", "from flax import nnx"),
    ("mm1_jax.data.build.captions", "from jax import numpy"),
    ("mm1_jax.data.packing", "from mm1_jax import sharding"),
    ("mm1_jax.data.packing", "from mm1_jax.models import mm1"),
    ("mm1_jax.train.loop", "from mm1_jax.eval import tasks"),
    ("mm1_jax.train.loop", "from mm1_jax.inference import sampler"),
    ("mm1_jax.train.loop", "import ml_collections"),
    ("mm1_jax.main", "from ml_collections import config_flags"),
    ("mm1_jax.data.pipeline", "from mm1_jax import drawing"),
    ("mm1_jax.data.inspect.stream", "import jax"),
    ("mm1_jax.drawing", "from mm1_jax import metrics"),
    ("mm1_jax.inference.sampler", "from mm1_jax.eval import tasks"),
    ("mm1_jax.inference.sampler", "from mm1_jax.train import step"),
    ("mm1_jax.eval.fewshot", "from mm1_jax.train import loop"),
    ("mm1_jax.eval.task", "import jax"),
    ("mm1_jax.eval.tasks.vqa", "import jax"),
    ("mm1_jax.eval.tasks.vqa", "from mm1_jax.inference import model"),
    ("mm1_jax.eval.tasks.vqa", "from mm1_jax.data.build import official_rows"),
    ("mm1_jax.eval.metrics.vqa", "from mm1_jax.config import UserError"),
    ("mm1_jax.eval.metrics.vqa", "from mm1_jax.eval import task"),
    ("mm1_jax.eval.metrics.likelihood", "from jax import numpy"),
    ("mm1_jax.convert.hf", "from mm1_jax.train import loop"),
    ("mm1_jax.plan.compile", "from mm1_jax.eval import tasks"),
    ("mm1_jax.checkpoint", "from mm1_jax.train import step"),
    ("mm1_jax.metrics", "from mm1_jax.train import step"),
    ("mm1_jax.metrics", "from mm1_jax import config"),
    ("mm1_jax.metrics", "import tensorflow as tf"),
    ("mm1_jax.report", "from mm1_jax.train import step"),
    ("mm1_jax.sharding", "from mm1_jax.models import mm1"),
    ("mm1_jax.config", "from mm1_jax import batch"),
    ("mm1_jax.config", "import jax"),
    ("mm1_jax.config.model", "from mm1_jax import batch"),
    ("mm1_jax.batch", "import jax"),
    ("mm1_jax.chips", "from mm1_jax import config"),
    ("mm1_jax.chips", "import jax"),
    ("mm1_jax.data.packing", "from mm1_jax import chips"),
    ("mm1_jax.train.loop", "from mm1_jax import main"),
    ("mm1_jax.main", "from configs import mm1_debug"),
    ("mm1_jax.cli", "import configs.mm1_debug"),
    ("mm1_jax.config_files", "from mm1_jax.configs import mm1_debug"),
    ("mm1_jax.cli", "from ml_collections import config_flags"),
    ("mm1_jax.overrides", "from mm1_jax import cli"),
    ("mm1_jax.main", "import launch.gke"),
    ("mm1_jax.unheard_of", "from mm1_jax import config"),
  ],
)
def test_every_rule_can_fail(module: str, source: str):
  assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("mm1_jax.models.vit", "from mm1_jax import config, sharding\nfrom mm1_jax.batch import Batch"),
    ("mm1_jax.models.mm1", "from mm1_jax.models import vit\nimport jax\nfrom flax import nnx"),
    ("mm1_jax.data.pipeline", "import grain\nfrom mm1_jax.data import packing"),
    (
      "mm1_jax.train.loop",
      "from mm1_jax import checkpoint, metrics\nfrom mm1_jax.train import step",
    ),
    ("mm1_jax.eval.fewshot", "from mm1_jax.inference import sampler"),
    ("mm1_jax.main", "from mm1_jax import cli\nfrom mm1_jax.train import loop"),
    ("mm1_jax.data.build.options", "from mm1_jax import cli"),
    ("mm1_jax.data.inspect.stream", "from mm1_jax.data import mixing\nfrom mm1_jax import drawing"),
  ],
)
def test_allowed_imports_pass(module: str, source: str):
  assert violations(module, source) == []
