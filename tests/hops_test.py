# SPDX-License-Identifier: Apache-2.0
"""The call path from the command line to the loss is short, each function in its named file."""

import pathlib
import traceback

import pytest

from mm1_jax import main
from mm1_jax.train import loop, loss

PACKAGE = pathlib.Path(main.__file__).parent


class Reached(Exception):
  """The loss was about to be computed."""


@pytest.mark.slow
def test_from_main_to_the_loss_in_at_most_nine_hops(tmp_path, monkeypatch):
  hops = []

  def record(*_):
    frames = [f for f in traceback.extract_stack() if PACKAGE in pathlib.Path(f.filename).parents]
    hops.extend((pathlib.Path(f.filename).stem, f.name) for f in frames)
    raise Reached

  monkeypatch.setattr(loop, "start_compiling", lambda *_: None)  # a thread of its own traces first
  monkeypatch.setattr(loss, "cross_entropy", record)
  with pytest.raises(Reached):
    main.main(["--config=configs/mm1_debug.py", f"--workdir={tmp_path}"])
  hops.append(("loss", "cross_entropy"))
  names = [f"{file}.{function}" for file, function in hops]
  assert names[:4] == ["main.main", "loop.train", "loop._run_steps", "step.train_step"]
  assert names[-2:] == ["loss.loss_fn", "loss.cross_entropy"]
  assert len(names) <= 9, names
