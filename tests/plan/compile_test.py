# SPDX-License-Identifier: Apache-2.0
"""The real TPU compiler, on a machine without a TPU: `make test` brings libtpu."""

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

from mm1_jax.config import ConfigError, RunConfig
from mm1_jax.configs import mm1_3b, mm1_3b_moe, mm1_7b, mm1_7b_moe, mm1_30b, mm1_30b_moe, mm1_debug
from mm1_jax.plan import compile as plan_compile
from mm1_jax.plan.compile import PlanError, compile_program, find_libtpu
from mm1_jax.plan.estimate import ROOM, make_plan
from mm1_jax.plan.report import figures
from mm1_jax.plan.topology import find_topology

pytestmark = pytest.mark.compiles

try:
  find_libtpu()
  MISSING = ""
except PlanError as e:
  MISSING = str(e)
FAMILY = (mm1_3b, mm1_7b, mm1_30b, mm1_3b_moe, mm1_7b_moe, mm1_30b_moe)
needs_libtpu = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def debug_run(kind: str = "dense", **data) -> RunConfig:
  run = RunConfig.from_dict(mm1_debug.get_config(kind).to_dict())
  return dataclasses.replace(run, data=dataclasses.replace(run.data, **data))


@needs_libtpu
@pytest.mark.slow
def test_the_command_plans_decode(tmp_path):
  cache = tmp_path / "cache"
  arguments = ["--config=configs/mm1_debug.py", "--topology=v5e-4", "--what=decode"]
  files = [f"--cache={cache}", f"--json={tmp_path}/a.json", f"--picture={tmp_path}/a.png"]
  done = command(*arguments, *files)
  assert done.returncode == 0, done.stderr
  assert "mm1_debug: decode on v5e-4 (2x2, 4 chips, 1 hosts)" in done.stdout
  assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

  before = entries(cache)
  plan = make_plan(debug_run(), find_topology("v5e-4"), "decode", cache=cache)
  assert len(before) == 1
  assert entries(cache) == before, "what was compiled once is found again"
  assert figures(plan) == json.loads((tmp_path / "a.json").read_text())
  assert plan.fits
  assert plan.step is not None
  # Nothing is recomputed, so the program does what the model asks for, product for product.
  assert plan.step.flops * 4 == pytest.approx(plan.model_flops["total"], rel=1e-3)
  # Keys and values: 4 layers x 16 rows x 256 slots x 2 heads x 32, float32, over 4 devices.
  assert plan.memory["cache"] == pytest.approx(2 * 4 * 16 * 256 * 2 * 32 * 4 / 4, rel=0.01)
  assert plan.step.collectives["all-gather"].wire > 0
  assert 0 < plan.step.lower < plan.step.upper < 1e-2


@needs_libtpu
@pytest.mark.long
def test_other_programs_are_other_entries(tmp_path):
  topology = find_topology("v5e-4")
  compile_program(debug_run(), topology, "decode", cache=tmp_path)
  compile_program(debug_run(batch_size=32), topology, "decode", cache=tmp_path)
  compile_program(debug_run(), find_topology("v6e-4"), "decode", cache=tmp_path)
  options: dict[str, str | bool] = {"xla_tpu_scoped_vmem_limit_kib": "8192"}
  compile_program(debug_run(), topology, "decode", options=options, cache=tmp_path)
  assert len(entries(tmp_path)) == 4


def entries(cache: pathlib.Path) -> dict[str, float]:
  return {path.name: path.stat().st_mtime for path in cache.iterdir()}


def command(*arguments: str) -> subprocess.CompletedProcess:
  program = [sys.executable, "-m", "mm1_jax.plan", *arguments]
  return subprocess.run(program, capture_output=True, text=True)


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize(("kind", "slice_name"), [("dense", "v5p-8"), ("moe", "v5e-4")])
def test_a_plan_of_the_train_step(kind, slice_name, tmp_path):
  run, topology = debug_run(kind), find_topology(slice_name)
  plan = make_plan(run, topology, cache=tmp_path)
  assert plan.fits
  assert plan.step is not None
  executed = plan.step.flops * topology.num_devices
  # At least the model's, but for the half of the attention that it does not count; the dropless
  # and capacity paths of experts multiply some empty slots.
  assert 0.95 < executed / plan.model_flops["total"] < 1.7
  # AdamW keeps two moments of every param.
  assert plan.memory["optimizer"] == pytest.approx(2 * plan.memory["params"], rel=0.01)
  vision, decoder = run.model.vision.depth, run.model.decoder
  loops = set(plan.step.trip_counts.values())
  assert {vision, decoder.depth // decoder.layers_per_unit} <= loops
  assert any(kind in plan.step.collectives for kind in ("reduce-scatter", "all-reduce"))


@needs_libtpu
@pytest.mark.long
def test_a_quick_plan_is_the_whole_one_but_for_the_time(tmp_path):
  run, topology = debug_run(batch_size=256), find_topology("v5p-8")
  whole, quick = (make_plan(run, topology, cache=tmp_path, quick=q) for q in (False, True))
  assert whole.step
  assert quick.step
  assert quick.step.flops == pytest.approx(whole.step.flops, rel=1e-6)
  assert quick.step.lower == pytest.approx(whole.step.lower, rel=0.05)
  assert quick.memory["params"] == whole.memory["params"]
  assert quick.memory["temporaries"] == pytest.approx(whole.memory["temporaries"], rel=0.1)
  assert quick.compiled.result.seconds < whole.compiled.result.seconds
  assert len(entries(tmp_path)) == 2


# An array goes from one way of being split to another that has nothing in common with it.
INVOLUNTARY = """
import os, sys
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = Mesh(np.array(devices).reshape(4, 2), ("x", "y"))
before, after = NamedSharding(mesh, P("y", None, "x")), NamedSharding(mesh, P(None, ("x", "y")))
x = jax.ShapeDtypeStruct((16, 16, 16), "float32", sharding=before)
jax.jit(lambda x: jax.lax.with_sharding_constraint(x + x, after)).lower(x).compile()
"""


@needs_libtpu
def test_rematerializations_are_in_what_the_compiler_says(monkeypatch, tmp_path):
  """It warns of them in a log of its own, and nowhere else."""
  monkeypatch.setattr(plan_compile, "_COMMAND", ("-c", INVOLUNTARY))
  said = plan_compile._run_worker(tmp_path, find_libtpu(), quick=False)
  assert plan_compile.count_rematerializations(said) == 1
  assert plan_compile.count_rematerializations("nothing of the kind") == 0


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("module", FAMILY, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_family_fits_its_v5p_presets_and_moves_no_array_twice(module, tmp_path):
  """An array that is put together whole, to be split another way, can cost more than a layer.

  So can one with tiles of less than 8 rows: it is transposed before its next use.
  """
  slice_name = next(name for name in module.SLICES if name.startswith("v5p"))
  run = RunConfig.from_dict(module.get_config(slice_name).to_dict())
  plan = make_plan(run, find_topology(slice_name), cache=tmp_path, quick=True)
  assert (run.data.batch_size, run.data.seq_len) == (512, 4096)
  assert plan.memory_share <= ROOM
  assert plan.compiled.result.rematerializations == 0
  narrow = re.findall(r" = bf16\[([\d,]+)\]\{[\d,]+:T\([124],128\)", plan.compiled.hlo)
  sizes = [2 * math.prod(map(int, dims.split(","))) for dims in narrow]
  assert max(sizes, default=0) < 32 * 2**20


@needs_libtpu
@pytest.mark.long
def test_out_of_memory_is_an_answer(tmp_path):
  run = debug_run(batch_size=65536)
  plan = make_plan(run, find_topology("v5e-4"), cache=tmp_path)
  assert plan.shortage is not None
  assert plan.shortage.available == pytest.approx(15.75 * 2**30)
  assert plan.shortage.buffers
  assert plan.advice


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=configs/mm1_debug.py", "--topology=v5p-3"], "there is no TPU slice 'v5p-3'"),
    (["--compare=a.json"], "--compare takes two files"),
  ],
)
def test_a_mistake_is_one_line(arguments, message):
  done = command(*arguments)
  assert done.returncode == 1
  assert done.stderr.startswith("error: ")
  assert message in done.stderr
  assert done.stderr.count("\n") == 1


def test_a_mesh_that_does_not_divide(tmp_path):
  with pytest.raises(ConfigError, match="256 would fit"):
    compile_program(debug_run(), find_topology("v5e-256"), "train", cache=tmp_path)


def test_without_the_compiler(monkeypatch, tmp_path):
  monkeypatch.setattr(sys, "prefix", str(tmp_path))
  monkeypatch.setattr(sys, "path", [p for p in sys.path if "libtpu" not in p])
  if list(importlib.metadata.distributions(name="libtpu")):
    pytest.skip("libtpu is installed among the other packages")
  with pytest.raises(PlanError, match=r"`make libtpu` \(or pip install 'libtpu==0\.0\."):
    find_libtpu()


def test_a_compiler_of_another_version(monkeypatch, tmp_path):
  info = tmp_path / "libtpu" / "libtpu-9.9.dist-info"
  info.mkdir(parents=True)
  (info / "METADATA").write_text("Metadata-Version: 2.1\nName: libtpu\nVersion: 9.9\n")
  monkeypatch.setattr(sys, "prefix", str(tmp_path))
  with pytest.raises(PlanError, match=r"libtpu 9\.9 does not fit jax"):
    find_libtpu()


def test_a_compiler_that_fails_is_shown(monkeypatch, tmp_path):
  monkeypatch.setattr(plan_compile, "find_libtpu", lambda: plan_compile.Libtpu("1", "/no/such.so"))
  with pytest.raises(PlanError, match="compiling failed with exit code 1; the last lines were"):
    compile_program(debug_run(), find_topology("v5e-4"), "decode", cache=tmp_path)
  assert list(tmp_path.iterdir()) == []
