# SPDX-License-Identifier: Apache-2.0
"""Runs of a tiny model, as `tests/inference` has them."""

import io
import pathlib

import numpy as np
import PIL.Image
import pytest


@pytest.fixture(scope="session", params=["dense", "moe"])
def workdir(request, tmp_path_factory):
  return _save(tmp_path_factory, request.param)


@pytest.fixture(scope="session")
def dense_workdir(tmp_path_factory):
  return _save(tmp_path_factory, "dense")


@pytest.fixture(scope="session")
def dense_model(dense_workdir):
  from mm1_jax.inference.model import Model

  return Model.load(dense_workdir)


def _save(tmp_path_factory, kind: str) -> pathlib.Path:
  from tests.helpers.runs import make_params, run_config, save_run

  run = run_config(moe=kind == "moe")
  path = tmp_path_factory.mktemp("runs") / kind
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
