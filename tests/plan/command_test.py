# SPDX-License-Identifier: Apache-2.0
"""What is read off a compiled program, shown, compared and searched: no compiler needed."""

import dataclasses
import io
import json
from typing import get_args

import numpy as np
import PIL.Image
import pytest

from mm1_jax import cli
from mm1_jax.config import ConfigError, MeshConfig, RunConfig
from mm1_jax.configs import mm1_3b, mm1_debug
from mm1_jax.models.flops import image_slots, model_flops
from mm1_jax.plan import __main__ as command
from mm1_jax.plan.compare import compare_table, markdown_table, read_figures
from mm1_jax.plan.compile import Compiled, PlanError, Result, What
from mm1_jax.plan.estimate import Plan, read_plan, step_flops
from mm1_jax.plan.memory import GIB, Buffer
from mm1_jax.plan.picture import draw
from mm1_jax.plan.report import figures, table
from mm1_jax.plan.search import frontier, parse_mesh, search_table
from mm1_jax.plan.topology import find_topology

# One product of 4096^3 on each of 64 chips, and an all-reduce of its result.
HLO = """HloModule jit_f, is_scheduled=true, num_partitions=64

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[4096,4096]) -> bf16[4096,4096] {
  %x = bf16[4096,4096]{1,0} parameter(0)
  %y = bf16[4096,4096]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
backend_config={"estimated_cycles":"700000"}
  ROOT %z = bf16[4096,4096]{1,0} all-reduce(%y), replica_groups={}, to_apply=%sum
}
"""
KEPT = [Buffer(5 * GIB, "bfloat16[26,512]", "a block's input", "mm1_jax/models/decoder.py:1")]
SLICE = find_topology("v5p-128")


def run_3b(**model) -> RunConfig:
  run = RunConfig.from_dict(mm1_3b.get_config().to_dict())
  return dataclasses.replace(run, model=dataclasses.replace(run.model, **model))


def a_plan(
  temporaries: float = 10 * GIB, refusal: str = "", hlo: str = HLO, topology=SLICE, **model
) -> Plan:
  memory = {
    "arguments": int(3.5 * GIB),
    "outputs": int(3.2 * GIB),
    "aliased": 3 * GIB,
    "temporaries": int(1.5 * temporaries),
    "code": GIB // 2,
    "peak": int(3.5 * GIB + temporaries),
    "host": 0,
  }
  result = Result(
    key="0",
    arguments={"params": GIB, "optimizer": 2 * GIB},
    kept=KEPT,
    versions={"jax": "1", "jaxlib": "1", "libtpu": "2"},
    memory=None if refusal else memory,
    refusal=refusal,
    seconds=100.0,
    cpu_seconds=150.0,
    process_gib=3.0,
  )
  return read_plan(Compiled(result, "" if refusal else hlo), run_3b(**model), topology, "train")


def test_memory_counts_each_byte_once():
  plan = a_plan()
  assert plan.memory == {
    "params": GIB,
    "optimizer": 2 * GIB,
    "padding": GIB // 2,
    "temporaries": 10 * GIB,
    "code": GIB // 2,
  }
  assert plan.fits
  assert plan.memory_share == pytest.approx(14 / 95.74)


def test_a_program_too_large_that_the_compiler_let_pass():
  plan = a_plan(temporaries=100 * GIB)
  assert plan.shortage is not None
  assert plan.shortage.excess == pytest.approx((104 - 95.74) * GIB)
  assert plan.shortage.buffers == KEPT
  assert plan.step is not None
  assert "does NOT fit" in table(plan)


def test_a_program_that_the_compiler_refused():
  plan = a_plan(
    refusal="RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (120.00G) exceeds available HBM (95.74G)."
  )
  text = table(plan)
  assert "27.26 GiB too much" in text
  assert "5.00 GiB  bfloat16[26,512]  a block's input  mm1_jax/models/decoder.py:1" in text
  assert "--config.train.accumulation_steps=2 halves the 8 rows" in text
  values = figures(plan)
  assert values["shortage"]["excess"] == pytest.approx(27.26 * GIB)
  assert "step_seconds" not in values
  json.dumps(values)
  draw(plan)


def test_time_and_cost_follow_from_the_program():
  plan = a_plan()
  values = figures(plan, price=2.5)
  reduce = 2 * 63 / 64 * 4096**2 * 2 / (3 * 2 * 9e10) + 3e-6
  lower = 2 * 4096**3 / 459e12 + reduce
  upper = 700000 * 2**18 / 459e12 + reduce
  assert values["step_seconds"]["lower"] == pytest.approx(lower)
  assert values["step_seconds"]["upper"] == pytest.approx(upper)
  seconds = (lower * upper) ** 0.5
  assert values["step_seconds"]["expected"] == pytest.approx(seconds)
  assert values["tokens_a_second"] == pytest.approx(512 * 4096 / seconds)
  assert values["images_a_second"] == pytest.approx(plan.images / seconds)
  assert plan.images == 512 * 16
  assert values["run"]["days"] == pytest.approx(200_000 * seconds / 86400)
  assert values["run"]["cost"] == pytest.approx(2.5 * 64 * 200_000 * seconds / 3600)
  assert values["executed_flops"] == 64 * 2 * 4096**3
  total = model_flops(plan.run, image_slots(plan.run))["total"]
  assert values["mfu"]["expected"] == pytest.approx(total / seconds / 64 / 459e12)
  assert sum(values["seconds_by_kind"].values()) == pytest.approx(upper)
  assert values["collective_share"] == pytest.approx(reduce / upper)


def test_what_was_never_checked_is_marked():
  assert "predicted\n" in table(a_plan())
  uncalibrated = a_plan(topology=find_topology("v6e-64"))
  assert "predicted, UNCALIBRATED" in table(uncalibrated)
  assert any("do not quote" in note for note in uncalibrated.notes)


def test_flops_of_generation():
  """Forward only; a decode reads the whole cache, and a prefill makes one row of logits."""
  run = RunConfig.from_dict(mm1_debug.get_config("moe").to_dict())
  train, prefill, decode = (step_flops(run, what) for what in ("train", "prefill", "decode"))
  decoder, rows, positions = run.model.decoder, run.data.batch_size, run.data.seq_len
  assert prefill["vit"] * 3 == train["vit"]
  assert prefill["head"] == rows * 2 * decoder.width * decoder.vocab_size == decode["head"]
  width = decoder.num_heads * decoder.head_dim
  assert decode["decoder/attention"] == rows * decoder.depth * 4 * positions * width
  assert decode["decoder/dense"] * positions == prefill["decoder/dense"]
  assert decode["vit"] == decode["connector"] == 0
  frozen = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, frozen=("vit",)))
  assert step_flops(frozen, "prefill") == prefill


def test_the_picture():
  picture = np.asarray(PIL.Image.open(io.BytesIO(draw(a_plan()))).convert("RGB"))
  assert picture.shape[1] > 1000
  assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
  assert (draw(a_plan()) == draw(a_plan(temporaries=20 * GIB))) is False


def test_the_frontier_is_what_nothing_beats():
  slower = HLO.replace("700000", "900000")
  fast = a_plan(temporaries=60 * GIB)
  small = a_plan(temporaries=20 * GIB, hlo=slower)
  beaten = a_plan(temporaries=61 * GIB, hlo=slower)
  tight = a_plan(temporaries=88 * GIB, hlo=HLO.replace("700000", "500000"))
  plans = [small, beaten, tight, fast]
  assert frontier(plans) == [fast, small]
  lines = search_table(plans).splitlines()[1:]
  assert [line.startswith("*") for line in lines] == [False, True, True, False]


def test_quick_plans_count_only_among_themselves():
  """Their times are lower bounds, which the expected time of a whole one would always lose to."""
  whole, quick = a_plan(temporaries=60 * GIB), a_plan(temporaries=20 * GIB)
  quick.compiled.result.quick = True
  assert frontier([whole, quick]) == [whole]
  assert frontier([quick]) == [quick]
  assert ">" in search_table([quick]).splitlines()[1]


@pytest.mark.parametrize("space", ["=", " "])
def test_the_preset_of_the_slice_is_taken(space):
  """However flags and values are put together; an argument of the user's own is left alone."""

  def planned(config: str, topology: str) -> RunConfig:
    words = f"--config{space}{config} --topology{space}{topology}".split()
    args = command._parse(words)
    return cli.load_config(args, topology=args.topology)

  preset = RunConfig.from_dict(mm1_3b.get_config("v5p-128").to_dict())
  assert planned("configs/mm1_3b.py", "v5p-128") == planned("mm1_3b", "v5p-128") == preset
  bare = RunConfig.from_dict(mm1_3b.get_config().to_dict())
  assert planned("configs/mm1_3b.py", "v5p-8") == bare  # has none
  other = RunConfig.from_dict(mm1_3b.get_config("v5e-256").to_dict())
  assert planned("configs/mm1_3b.py:v5e-256", "v5p-128") == other
  assert planned("configs/mm1_debug.py", "v5p-128").name == "mm1_debug"


def test_the_flags_name_all_programs():
  assert get_args(What) == command.WHAT


@pytest.mark.parametrize(
  ("text", "mesh"),
  [
    ("fsdp=-1", MeshConfig(fsdp=-1)),
    ("fsdp=16, tensor=4", MeshConfig(fsdp=16, tensor=4)),
    ("data=2,fsdp=-1,expert=8", MeshConfig(data=2, fsdp=-1, expert=8)),
  ],
)
def test_meshes_of_a_search(text, mesh):
  assert parse_mesh(text) == mesh


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=x", "pipeline=2"])
def test_what_is_no_mesh(text):
  with pytest.raises(ConfigError, match="is no mesh"):
    parse_mesh(text)


def test_two_plans_side_by_side(tmp_path):
  for name, plan in (("a", a_plan()), ("b", a_plan(temporaries=20 * GIB, remat="dots"))):
    (tmp_path / f"{name}.json").write_text(json.dumps(figures(plan)))
  first, second = (read_figures(str(tmp_path / f"{name}.json")) for name in "ab")
  lines = compare_table(first, second).splitlines()
  assert [line.split()[0] for line in lines] == [
    "remat",
    "memory.temporaries",
    "memory.total",
    "memory.share",
  ]
  assert lines[0].split()[1:] == ["full", "dots"]
  assert lines[1].endswith("2.000 x")
  assert compare_table(first, first) == "the two plans are equal."


def test_the_table_quotes_no_time_that_was_never_checked():
  plans = [a_plan(), a_plan(topology=find_topology("v6e-64")), a_plan(temporaries=100 * GIB)]
  rows = [line.split(" | ") for line in markdown_table([figures(p) for p in plans]).splitlines()]
  assert {len(row) for row in (rows[0], *rows[2:])} == {17}
  assert rows[2][5:7] == ["14.0", "15%"]
  assert rows[2][7] != "-"
  assert rows[3][7:14] == rows[4][7:14] == ["-"] * 7
  assert rows[4][6] == "109%, does not fit"


def test_the_table_marks_the_bounds_of_a_quick_plan():
  plan = a_plan()
  whole = markdown_table([figures(plan, 2.5)]).splitlines()[2].split(" | ")
  plan.compiled.result.quick = True
  quick = markdown_table([figures(plan, 2.5)]).splitlines()[2].split(" | ")
  for column, bound in ((8, "most"), (9, "most"), (11, "least"), (12, "least"), (13, "least")):
    assert quick[column] == f"at {bound} {whole[column]}"
  assert quick[10] == quick[15] == "-" != whole[10]


def test_a_file_that_is_no_plan(tmp_path):
  with pytest.raises(PlanError, match="cannot be read"):
    read_figures(str(tmp_path / "missing.json"))
  (tmp_path / "other.json").write_text("{}")
  with pytest.raises(PlanError, match="is no plan"):
    read_figures(str(tmp_path / "other.json"))
