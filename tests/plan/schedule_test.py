# SPDX-License-Identifier: Apache-2.0
"""Prices and schedules of small programs, computed by hand.

On v5e a link carries 45 GB/s one way, HBM 810 GB/s, and a cycle is 2^17 / 197e12 s. The slices here
are 4 x 4 without rings: a collective over one dim runs at 1.5 x 45 GB/s, over both at twice that.
"""

import pytest

from mm1_jax.plan.hlo import Module
from mm1_jax.plan.schedule import Simulator
from mm1_jax.plan.topology import find_topology

CYCLE = 2**17 / 197e12
LINE = 1.5 * 4.5e10  # bytes/s of a collective over one dim of an open torus
LATENCY = 1e-6
MIB = 2**20

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=16\n\n"
SUM = """%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

"""
GROUPS = "replica_groups=[4,4]<=[16]"


def work(name: str, cycles: int, operands: str = "%x") -> str:
  return (
    f"  %{name} = f32[512,512]{{1,0}} fusion({operands}), kind=kLoop, calls=%empty, "
    f'backend_config={{"estimated_cycles":"{cycles}"}}\n'
  )


EMPTY = """%empty (q: f32[512,512]) -> f32[512,512] {
  ROOT %q = f32[512,512]{1,0} parameter(0)
}

"""


def entry(*lines: str) -> str:
  head = "ENTRY %main (x: f32[512,512]) -> f32[512,512] {\n"
  return (
    HEADER + EMPTY + SUM + head + "  %x = f32[512,512]{1,0} parameter(0)\n" + "".join(lines) + "}\n"
  )


def simulate(text: str, slice_name: str = "v5e-16", num_slices: int = 1) -> Simulator:
  return Simulator(Module(text), find_topology(slice_name, num_slices))


def seconds(text: str, **kwargs) -> float:
  return simulate(text, **kwargs).run("estimate").seconds


ALL_GATHER = f"all-gather(%x), dimensions={{0}}, {GROUPS}\n"
START = (
  "  %start = (f32[512,512]{1,0}, f32[2048,512]{1,0}) all-gather-start(%x), "
  f"dimensions={{0}}, {GROUPS}\n"
)
DONE = "  %done = f32[2048,512]{1,0} all-gather-done(%start)\n"
GATHERED = 3 * MIB / LINE + LATENCY  # each of four chips sends three times its 1 MiB


def test_cycles_add_up():
  assert seconds(entry(work("a", 1000), work("b", 500, "%a"))) == pytest.approx(1500 * CYCLE)


def test_a_blocking_collective_is_waited_for():
  text = entry(work("a", 1000), f"  %g = f32[2048,512]{{1,0}} {ALL_GATHER}")
  schedule = simulate(text).run("estimate")
  assert schedule.seconds == pytest.approx(1000 * CYCLE + GATHERED)
  total = schedule.ledger.collectives["all-gather"]
  assert (total.count, total.payload, total.wire) == (1, 4 * MIB, 3 * MIB)


@pytest.mark.parametrize("cycles", [1_000, 40_000, 1_000_000])
def test_an_asynchronous_one_is_hidden_by_work(cycles):
  """Only what is left of it when it is waited for costs anything."""
  text = entry(START, work("a", cycles), DONE)
  assert seconds(text) == pytest.approx(max(cycles * CYCLE, GATHERED))


def test_two_in_one_queue_run_one_after_another():
  second = START.replace("%start", "%start.2")
  text = entry(START, second, DONE, DONE.replace("%done", "%done.2").replace("%start", "%start.2"))
  assert seconds(text) == pytest.approx(2 * GATHERED)


@pytest.mark.parametrize(
  ("line", "kind", "wire", "expected"),
  [
    # Twice around a ring of 4: reduce, then gather.
    (
      f"all-reduce(%x), {GROUPS}, to_apply=%sum",
      "all-reduce",
      1.5 * MIB,
      1.5 * MIB / LINE + LATENCY,
    ),
    # All 16 chips: both dims of the torus at once.
    (
      "all-reduce(%x), replica_groups={}, to_apply=%sum",
      "all-reduce",
      2 * 15 / 16 * MIB,
      2 * 15 / 16 * MIB / (2 * LINE) + 2 * LATENCY,
    ),
    (
      f"reduce-scatter(%x), dimensions={{0}}, {GROUPS}, to_apply=%sum",
      "reduce-scatter",
      0.75 * MIB,
      0.75 * MIB / LINE + LATENCY,
    ),
    (
      "all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum",
      "all-reduce",
      MIB,
      MIB / LINE + LATENCY,
    ),
    (
      "all-reduce(%x), replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)2}, to_apply=%sum",
      "all-reduce",
      1.5 * MIB,
      1.5 * MIB / LINE + LATENCY,
    ),
    # To one neighbour over one link.
    (
      "collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
      "collective-permute",
      MIB,
      MIB / 4.5e10 + LATENCY,
    ),
    # A chip with itself.
    ("all-reduce(%x), replica_groups={{0},{1}}, to_apply=%sum", "all-reduce", 0, 0),
  ],
)
def test_collectives_by_hand(line, kind, wire, expected):
  schedule = simulate(entry(f"  %c = f32[512,512]{{1,0}} {line}\n")).run("estimate")
  assert schedule.ledger.collectives[kind].wire == pytest.approx(wire)
  assert schedule.seconds == pytest.approx(expected)


def test_rings_carry_more_than_lines():
  text = entry("  %c = f32[512,512]{1,0} all-reduce(%x), replica_groups={}, to_apply=%sum\n")
  # 2 dims x both ways x 45 GB/s.
  expected = 2 * 255 / 256 * MIB / (2 * 2 * 4.5e10) + 2 * LATENCY
  assert seconds(text, slice_name="v5e-256") == pytest.approx(expected)


def test_an_all_reduce_that_keeps_a_part_is_a_reduce_scatter():
  fused = (
    "%all-reduce-scatter.1 (r: f32[512,512]) -> f32[128,512] {\n"
    "  %r = f32[512,512]{1,0} parameter(0)\n"
    f"  %inner = f32[512,512]{{1,0}} all-reduce(%r), {GROUPS}, to_apply=%sum\n"
    "  %zero = s32[] constant(0)\n"
    "  ROOT %own = f32[128,512]{1,0} dynamic-slice(%inner, %zero, %zero)\n"
    "}\n\n"
  )
  call = "  %c = f32[128,512]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1\n"
  schedule = simulate(entry(call).replace("ENTRY", fused + "ENTRY")).run("estimate")
  assert schedule.ledger.collectives["reduce-scatter"].wire == pytest.approx(0.75 * MIB)
  assert "all-reduce" not in schedule.ledger.collectives
  assert schedule.seconds == pytest.approx((1.5 * MIB / LINE + LATENCY) / 2)


LOOP = """%body (s: (s32[], f32[512,512])) -> (s32[], f32[512,512]) {{
  %s = (s32[], f32[512,512]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x.1 = f32[512,512]{{1,0}} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one), backend_config={{"estimated_cycles":"1"}}
{lines}  ROOT %out = (s32[], f32[512,512]) tuple(%next, %y)
}}

%condition (s.1: (s32[], f32[512,512])) -> pred[] {{
  %s.1 = (s32[], f32[512,512]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n = s32[] constant(26)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}}

ENTRY"""
CALL = (
  "  %zero = s32[] constant(0)\n"
  "  %init = (s32[], f32[512,512]) tuple(%zero, %x)\n"
  "  %loop = (s32[], f32[512,512]) while(%init), condition=%condition, body=%body, "
  'metadata={op_name="jit(f)/transpose(jvp())/while"}\n'
)


def loop(*lines: str, before: str = "", after: str = "") -> str:
  body = LOOP.format(lines="".join(lines).replace("(%x", "(%x.1"))
  return entry(before, CALL, after).replace("ENTRY", body)


def test_a_loop_counts_as_often_as_it_runs():
  schedule = simulate(loop(work("y", 999), f"  %g = f32[2048,512]{{1,0}} {ALL_GATHER}")).run(
    "estimate"
  )
  assert schedule.seconds == pytest.approx(26 * (1000 * CYCLE + GATHERED))
  assert schedule.ledger.collectives["all-gather"].wire == 26 * 3 * MIB
  assert schedule.ledger.collectives["all-gather"].count == 26
  assert schedule.trip_counts == {"loop": 26}
  assert [region.name for region in schedule.regions] == ["backward x 26"]
  assert schedule.ledger.seconds["collective"] == pytest.approx(26 * GATHERED)
  assert schedule.ledger.seconds["elementwise"] == pytest.approx(26 * 1000 * CYCLE)


def test_transfers_that_pile_up_over_a_loop():
  """Work of a turn hides half of its gather: the rest is waited for in every turn."""
  half = int(GATHERED / CYCLE / 2)
  text = loop(START, work("y", half), DONE)
  # The body's count of turns takes its one cycle before the gather starts.
  assert seconds(text) == pytest.approx(26 * (GATHERED + CYCLE))


def test_a_transfer_across_a_loop_is_hidden_by_all_of_it():
  turn = 20_000 * CYCLE
  assert 2 * turn < GATHERED < 26 * turn
  text = loop(work("y", 19_999), before=START, after=DONE)
  assert seconds(text) == pytest.approx(26 * turn)


@pytest.mark.parametrize("true_cycles", [90, 900])
def test_the_slower_branch_is_counted_or_the_usual_one(true_cycles):
  branches = "".join(
    f"%branch{n} (q{n}: f32[512,512]) -> f32[512,512] {{\n"
    f"  %q{n} = f32[512,512]{{1,0}} parameter(0)\n" + work(f"b{n}", cycles, f"%q{n}") + "}\n\n"
    for n, cycles in ((0, 700), (1, true_cycles))
  )
  call = (
    "  %p = pred[] constant(true)\n  %c = f32[512,512]{1,0} conditional(%p, %x, %x), "
    "branch_computations={%branch0, %branch1}\n"
  )
  text = entry(call).replace("ENTRY", branches + "ENTRY")
  assert seconds(text) == pytest.approx(max(700, true_cycles) * CYCLE)
  usual = Simulator(Module(text), find_topology("v5e-16"), usual=True).run("estimate")
  assert usual.seconds == pytest.approx(true_cycles * CYCLE)


def test_the_roofline_of_a_product():
  """2 x 512^3 FLOPs against 3 MiB of HBM traffic: the traffic takes longer on v5e."""
  dot = "  %d = f32[512,512]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
  schedule = simulate(entry(dot)).run("roofline")
  assert schedule.ledger.sums["flops"] == 2 * 512**3
  assert schedule.ledger.sums["hbm_bytes"] == 3 * MIB
  assert schedule.seconds == pytest.approx(3 * MIB / 8.1e11)


def test_between_slices():
  """Two slices add 1 MiB up: each sends it over its 3.125 GB/s of the data-centre network."""
  rendezvous = '_xla_host_transfer_rendezvous="all-reduce.1_0"'
  lines = (
    "  %after = token[] after-all()\n"
    "  %send = (f32[512,512]{1,0}, u32[], token[]) send(%x, %after), is_host_transfer=true, "
    f"frontend_attributes={{{rendezvous}}}\n"
    "  %recv = (f32[512,512]{1,0}, u32[], token[]) recv(%after), is_host_transfer=true, "
    f"frontend_attributes={{{rendezvous}}}\n"
    "  %sent = token[] send-done(%send), is_host_transfer=true\n" + work("a", 1000) + ""
    "  %received = (f32[512,512]{1,0}, token[]) recv-done(%recv), is_host_transfer=true\n"
  )
  schedule = simulate(entry(lines), num_slices=2).run("estimate")
  assert schedule.ledger.collectives["between slices"].wire == MIB
  assert schedule.seconds == pytest.approx(MIB / 3.125e9)


def test_copies_to_the_host_take_its_own_link():
  copy = (
    "  %off = (f32[512,512]{1,0:S(5)}, f32[512,512]{1,0}, u32[]) copy-start(%x)\n"
    "  %there = f32[512,512]{1,0:S(5)} copy-done(%off)\n"
  )
  simulator = simulate(entry(copy))
  assert simulator.run("estimate").seconds == pytest.approx(MIB / 1.5e10)
  assert simulator.uses_host
