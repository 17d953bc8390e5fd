# SPDX-License-Identifier: Apache-2.0
"""The collectives of mm1_debug's step, compiled for eight devices: a change shows as a diff."""

import collections
import os
import pathlib
import re

import jax
import pytest

from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_debug
from mm1_jax.models.mm1 import MM1
from mm1_jax.plan.collectives import KINDS
from mm1_jax.sharding import abstract_batch, abstract_state, make_mesh
from mm1_jax.train.step import init_state, train_step_on

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "collectives"
MESHES = {
  "fsdp 2 x expert 2 x tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
  "fsdp 4 x sequence 2": {"fsdp": 4, "sequence": 2},
}


def count(run: RunConfig) -> str:
  """Returns how often each kind is in the program; what is in a loop counts once."""
  mesh = make_mesh(run)
  state = abstract_state(lambda: init_state(MM1(jax.random.key(0), run.model), run), mesh)
  with jax.set_mesh(mesh):
    lowered = train_step_on(mesh).trace(state, abstract_batch(run, mesh), run=run).lower()
  program = lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
  found = re.findall(rf" ({'|'.join(KINDS)})(?:-start)?\(", program)
  return ", ".join(f"{kind} {num}" for kind, num in sorted(collections.Counter(found).items()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_collectives_are_those_of_the_golden_file(kind):
  """A gather outside of its loop, or a gradient reduced twice, costs a pod more than any bug.

  Its blocks are in a loop here and all pictures encoded at once, as in the large models.
  """
  values = mm1_debug.get_config(kind).to_dict()
  values["model"].update(scan=True, image_group=None)
  lines = [
    f"{name}: {count(RunConfig.from_dict(values | {'mesh': mesh}))}"
    for name, mesh in MESHES.items()
  ]
  text, golden = "\n".join(lines) + "\n", GOLDENS / f"mm1_debug_{kind}.txt"
  if os.environ.get("UPDATE_GOLDENS"):
    golden.parent.mkdir(parents=True, exist_ok=True)
    golden.write_text(text)
  assert text == golden.read_text(), (
    "The collectives changed. If you meant it: "
    "UPDATE_GOLDENS=1 pytest -m slow tests/train/collectives_test.py"
  )
