# SPDX-License-Identifier: Apache-2.0
"""HBM traffic of fusions and costs of Pallas kernels, computed by hand."""

import pytest

from mm1_jax.plan.hlo import Module
from mm1_jax.plan.kernels import kernel_cost
from mm1_jax.plan.traffic import hbm_bytes

FUSED = """HloModule jit_f

%slices (w: f32[26,64,64], i: s32[], y: f32[8,64,64], u: f32[1,64,64]) -> f32[8,64,64] {
  %w = f32[26,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %flat = f32[26,4096]{1,0} bitcast(%w)
  %own = f32[1,4096]{1,0} dynamic-slice(%flat, %i, %i)
  %y = f32[8,64,64]{2,1,0} parameter(2)
  %u = f32[1,64,64]{2,1,0} parameter(3)
  %zero = s32[] constant(0)
  ROOT %updated = f32[8,64,64]{2,1,0} dynamic-update-slice(%y, %u, %i, %zero, %zero)
}

ENTRY %main (w.1: f32[26,64,64], i.1: s32[], y.1: f32[8,64,64], u.1: f32[1,64,64]) -> f32[8,64,64] {
  %w.1 = f32[26,64,64]{2,1,0} parameter(0)
  %i.1 = s32[]{S(1)} parameter(1)
  %y.1 = f32[8,64,64]{2,1,0} parameter(2)
  %u.1 = f32[1,64,64]{2,1,0UPDATE} parameter(3)
  ROOT %f = f32[8,64,64]{2,1,0} fusion(%w.1, %i.1, %y.1, %u.1), kind=kLoop, calls=%slices
}
"""
LAYER = 64 * 64 * 4


# Read: a layer of w, and the update where it is in HBM. Written: the update's place in y.
@pytest.mark.parametrize(("space", "layers"), [("", 3), (":S(1)", 2)])
def test_a_fusion_moves_what_it_slices(space, layers):
  module = Module(FUSED.replace("UPDATE", space))
  entry = module.computations["main"]
  assert hbm_bytes(entry.by_name["f"], entry, module) == layers * LAYER


def test_a_fusion_that_reads_all_moves_all():
  module = Module(FUSED.replace("dynamic-slice(%flat, %i, %i)", "negate(%flat)"))
  entry = module.computations["main"]
  assert hbm_bytes(entry.by_name["f"], entry, module) == (26 + 2) * LAYER


def test_what_stays_in_vmem_is_free():
  text = FUSED.replace("ROOT %f = f32[8,64,64]{2,1,0}", "ROOT %f = f32[8,64,64]{2,1,0:S(1)}")
  module = Module(text.replace("UPDATE", ":S(1)"))
  entry = module.computations["main"]
  assert hbm_bytes(entry.by_name["f"], entry, module) == LAYER


def kernel(op_name: str, result: str, *operands: str, config: str = "", **kwargs):
  params = "".join(f"  %p{i} = {shape} parameter({i})\n" for i, shape in enumerate(operands))
  names = ", ".join(f"%p{i}" for i in range(len(operands)))
  text = (
    "HloModule jit_f\n\nENTRY %main (p: f32[]) -> f32[] {\n" + params + f"  ROOT %k = {result} "
    f'custom-call({names}), custom_call_target="tpu_custom_call", metadata={{op_name="{op_name}"}}'
    f", backend_config={{{config}}}\n}}\n"
  )
  entry = Module(text).computations["main"]
  return kernel_cost(entry.by_name["k"], entry, **kwargs)


def test_causal_attention():
  heads = "bf16[2,8,4096,128]{3,2,1,0}"
  cost = kernel("jit(f)/splash_mha_fwd", heads, heads, "bf16[2,2,4096,128]{3,2,1,0}", heads)
  # Two products over half of the square, and the other half of 8 diagonal blocks of 512.
  assert cost.flops == 2 * 2 * (2 * 8 * 4096) * 4096 * 128 * (0.5 + 512 / 4096 / 2)
  assert cost.source == "attention"


def test_a_fused_gradient_has_five_products():
  heads = "bf16[2,8,4096,128]{3,2,1,0}"
  forward = kernel("jit(f)/splash_mha_fwd", heads, heads, heads, heads)
  backward = kernel("jit(f)/fused_splash/splash_mha_dkv", heads, heads, heads, heads)
  assert backward.flops / forward.flops == 5 / 2


def test_grouped_products():
  rows, weights = "bf16[8192,512]{1,0}", "bf16[16,512,1024]{2,1,0}"
  cost = kernel("jit(f)/gmm", "bf16[8192,1024]{1,0}", rows, weights)
  # 15 borders between groups, each in a tile of 512 rows that is computed twice.
  assert cost.flops == 2 * (8192 + 15 * 512) * 512 * 1024
  gradient = kernel(
    "jit(f)/tgmm", "f32[16,512,1024]{2,1,0}", "bf16[512,8192]{1,0}", "bf16[8192,1024]{1,0}"
  )
  assert gradient.flops == cost.flops


def test_rows_of_no_group_cost_nothing():
  """Of the product and of its gradient; and more rows than there are, are not."""
  weights = "bf16[16,512,1024]{2,1,0}"
  product = "jit(f)/gmm", "bf16[8192,1024]{1,0}", "bf16[8192,512]{1,0}", weights
  outer = "jit(f)/tgmm", weights, "bf16[512,8192]{1,0}", "bf16[8192,1024]{1,0}"
  for call in (product, outer):
    filled = kernel(*call, grouped_rows=6000)
    assert filled.flops == pytest.approx(2 * (6000 + 15 * 512) * 512 * 1024)
    assert kernel(*call, grouped_rows=9000) == kernel(*call)


def test_any_other_kernel_says_itself():
  estimate = '"cost_estimate":{"flops":"1000","bytes_accessed":"9000"}'
  cost = kernel("jit(f)/other", "f32[4]{0}", "f32[4]{0}", config=estimate)
  assert (cost.flops, cost.bytes, cost.source) == (1000, 9000, "its own estimate")
  assert kernel("jit(f)/other", "f32[4]{0}", "f32[4]{0}").bytes == 32
