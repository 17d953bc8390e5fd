# SPDX-License-Identifier: Apache-2.0
"""Reading HLO: by hand on small texts, and against XLA's own counts on compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from mm1_jax.plan.hlo import HOST, VMEM, Module

TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=4

%body (state: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %state = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[8,8]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,8]) tuple(%next, %y)
}

%condition (state.1: (s32[], f32[8,8])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[] constant(13)
  ROOT %less = pred[] compare(%i.1, %bound), direction=DIRECTION
}

ENTRY %main_spmd (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0:T(8,128)} parameter(0)
  %start = s32[] constant(3)
  %start_copy = s32[] copy(%start)
  %far = (bf16[4,2]{1,0:T(8,128)(2,1)S(5)}, /*index=1*/u32[]{:S(2)}) copy-start(%p)
  %init = (s32[], f32[8,8]) tuple(%start_copy, %p)
  %loop = (s32[], f32[8,8]) while(%init), condition=%condition, body=%body,
    metadata={op_name="a(b)"}
  ROOT %result = f32[8,8] get-tuple-element(%loop), index=1
}
"""


def parse(direction: str = "LT") -> Module:
  return Module(TEXT.replace("DIRECTION", direction))


def test_structure():
  module = parse()
  assert module.num_partitions == 4
  assert module.entry == "main_spmd"
  assert [i.opcode for i in module.computations["body"]] == [
    "parameter",
    "get-tuple-element",
    "get-tuple-element",
    "constant",
    "add",
    "dot",
    "tuple",
  ]
  assert module.computations["body"].root.name == "out"
  loop = module.computations["main_spmd"].by_name["loop"]
  assert loop.operands == ["init"]
  assert loop.op_name == "a(b)"


def test_shapes_and_memory_spaces():
  module = parse()
  x = module.computations["body"].by_name["x"].shapes[0]
  assert (x.dtype, x.dims, x.memory_space, x.bytes) == ("f32", (8, 8), VMEM, 256)
  far = module.computations["main_spmd"].by_name["far"]
  assert [s.memory_space for s in far.shapes] == [HOST, 2]
  assert far.bytes == 4 * 2 * 2 + 4


# i = 3, 5, 7, 9, 11 while i < 13; also 13 while i <= 13.
@pytest.mark.parametrize(("direction", "turns"), [("LT", 5), ("LE", 6)])
def test_trip_count_of_a_condition(direction, turns):
  module = parse(direction)
  assert module.trip_count(*loop_of(module)) == turns


def test_trip_count_that_the_compiler_knows():
  known = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
  module = Module(TEXT.replace("body=%body", known))
  assert module.trip_count(*loop_of(module)) == 7


def test_trip_count_that_is_unknown():
  module = Module(TEXT.replace("%bound = s32[] constant(13)", "%bound = s32[] parameter(1)"))
  assert module.trip_count(*loop_of(module)) is None


def test_flops_of_a_dot():
  module = parse()
  body = module.computations["body"]
  assert module.flops(body.by_name["y"], body) == 2 * 8 * 8 * 8


def test_a_computation_of_another_core_ends_too():
  text = TEXT.replace("\n}\n", '\n}, execution_thread="sparsecore"\n', 1)
  assert text != TEXT
  assert Module(text).computations.keys() == Module(TEXT).computations.keys()


def test_a_kernel_spans_lines_that_look_like_ends():
  kernel = (
    "  %k = f32[8,8]{1,0} custom-call(%x), frontend_attributes={kernel_metadata={\n"
    '"xprof_metadata":"{\\"block_q\\": 512}"\n'
    '}}, metadata={op_name="jit(f)/kernel"}\n'
  )
  two = "  %two = s32[] constant(2)\n"
  module = Module(TEXT.replace("DIRECTION", "LT").replace(two, kernel + two))
  body = module.computations["body"]
  assert body.by_name["k"].op_name == "jit(f)/kernel"
  assert "block_q" in body.by_name["k"].attributes
  assert body.root.name == "out"
  assert module.trip_count(*loop_of(module)) == 5


def loop_of(module: Module):
  main = module.computations["main_spmd"]
  return main.by_name["loop"], main


def entry_flops(module: Module) -> float:
  entry = module.computations[module.entry]
  return sum(module.flops(instruction, entry) for instruction in entry)


@pytest.mark.parametrize(
  ("padding", "stride", "dilation"),
  [("VALID", 1, 1), ("SAME", 1, 1), ("SAME", 2, 1), ("SAME", 1, 2), ("VALID", 3, 2)],
)
def test_convolutions_against_xla(padding, stride, dilation):
  def f(x, w):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (stride, stride),
      padding,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  x, w = jnp.ones((2, 11, 13, 8)), jnp.ones((3, 3, 8, 16))
  # Forward, and the gradients of both: dilated inputs, swapped dims, negative padding.
  program = jax.jit(lambda x, w, dy: (f(x, w), *jax.vjp(f, x, w)[1](dy)))
  compiled = program.lower(x, w, f(x, w)).compile()
  assert entry_flops(Module(compiled.as_text())) == pytest.approx(
    compiled.cost_analysis()["flops"], rel=0.01
  )


def test_a_compiled_scan():
  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  x, w = jnp.ones((16, 32)), jnp.ones((6, 32, 32))
  module = Module(jax.jit(f).lower(x, w).compile().as_text())
  loops = [(i, c) for c in module.computations.values() for i in c if i.opcode == "while"]
  assert [module.trip_count(*loop) for loop in loops] == [6]
  body = module.computations[loops[0][0].called("body")]
  assert sum(module.flops(i, body) for i in body) == 2 * 16 * 32 * 32
