# SPDX-License-Identifier: Apache-2.0
"""Runs of a tiny model, as `tests/inference` has them."""

import io
import pathlib
import sys

import numpy as np
import PIL.Image
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "inference"))


@pytest.fixture(scope="session", params=["dense", "moe"])
def workdir(request, tmp_path_factory):
  from tiny_model import make_params, run_config, save_run

  run = run_config(moe=request.param == "moe")
  path = tmp_path_factory.mktemp("runs") / request.param
  save_run(path, run, make_params(run), steps=(1,))
  return path


@pytest.fixture(scope="session")
def model(workdir):
  from mm1_jax.inference.model import Model

  return Model.load(workdir)


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
  """Two different PNG files."""
  rng, found = np.random.default_rng(0), []
  for _ in range(2):
    data = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(data, "PNG")
    found.append(data.getvalue())
  return found
