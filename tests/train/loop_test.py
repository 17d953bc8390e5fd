# SPDX-License-Identifier: Apache-2.0
"""How a run starts: what is compiled when, and where programs are kept."""

import jax
import numpy as np
import pytest

from mm1_jax.config import TrainConfig
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_batch, abstract_state
from mm1_jax.train import loop
from mm1_jax.train.step import init_state
from tests.helpers import tiny, tiny_step

pytestmark = pytest.mark.compiles


def cache_dir() -> str | None:
  return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]


def test_the_step_is_compiled_while_the_state_is_made(monkeypatch):
  """And not a second time when it is called."""
  run = tiny_step.run_config(train=TrainConfig(num_steps=11))  # a program of no other test
  mesh, compiled = tiny.mesh(*tiny_step.ONE), []

  def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    if "backend_compile" in event:
      compiled.append(event)

  monkeypatch.setattr(loop, "train_step_on", lambda mesh: tiny_step._step)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    state, batch = tiny_step.make_state(run), abstract_batch(run, mesh)
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), batch)
    compiled.clear()
    seconds = loop.start_compiling(
      run, mesh, abstract_state(lambda: init_state(MM1(jax.random.key(0), run.model), run), mesh)
    ).result()
    assert seconds > 0
    assert len(compiled) == 1
    with jax.set_mesh(mesh):
      tiny_step._step(state, zeros, run=run)
    assert len(compiled) == 1
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
  ("backend", "given", "expected"),
  [("tpu", None, "{}/programs"), ("tpu", "/elsewhere", "/elsewhere"), ("cpu", None, None)],
)
def test_where_compiled_programs_are_kept(tmp_path, monkeypatch, backend, given, expected):
  before = cache_dir()
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  try:
    jax.config.update("jax_compilation_cache_dir", given)
    loop.keep_programs(tmp_path)
    assert cache_dir() == (expected and expected.format(tmp_path))
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
