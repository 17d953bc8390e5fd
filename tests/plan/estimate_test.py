# SPDX-License-Identifier: Apache-2.0
"""The usual step of a dropless layer over an `expert` axis, on a program of one grouped product."""

import dataclasses
import types

import pytest

from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_debug
from mm1_jax.plan.estimate import usual_step
from mm1_jax.plan.topology import find_topology

ROWS = 65536  # choices of a chip
BUFFER = 98304  # rows of its buffer
PRODUCT = (
  "HloModule jit_f\n\nENTRY %main (p: f32[]) -> f32[] {\n"
  f"  %rows = bf16[{BUFFER},2560]{{1,0}} parameter(0)\n"
  "  %weights = bf16[8,2560,10240]{2,1,0} parameter(1)\n"
  f"  ROOT %k = bf16[{BUFFER},10240]{{1,0}} custom-call(%rows, %weights), "
  'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/gmm"}, backend_config={}\n}\n'
)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("tensor", [1, 4])
def test_an_even_load_fills_a_part_of_the_buffers(steps, tensor):
  """Each token has a row for each of its choices; chips of a `tensor` axis share their tokens."""
  run = RunConfig.from_dict(mm1_debug.get_config("moe").to_dict())
  run = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulation_steps=steps))
  topology = find_topology("v5p-128")
  plan = types.SimpleNamespace(
    run=run,
    topology=topology,
    mesh={"tensor": tensor},
    tokens=ROWS // 2 * steps * topology.num_devices // tensor,
    compiled=types.SimpleNamespace(hlo=PRODUCT),
  )
  assert run.model.decoder.moe.top_k == 2

  def seconds(rows: int) -> float:
    flops = 2 * (rows + 7 * 512) * 2560 * 10240
    return flops / topology.chip.peak_flops / 0.85

  assert usual_step(plan) == pytest.approx((seconds(BUFFER),) * 2)
  assert usual_step(plan, even_load=True) == pytest.approx((seconds(ROWS),) * 2)
