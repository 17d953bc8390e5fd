# SPDX-License-Identifier: Apache-2.0
"""Params and runs that are made once for all tests of inference.

JAX has to be set up by the other conftest.py first, so imports of it wait in the fixtures.
"""

import io

import numpy as np
import PIL.Image
import pytest


@pytest.fixture(scope="session")
def dense():
  from tests.helpers.runs import make_params, run_config

  return make_params(run_config())


@pytest.fixture(scope="session")
def moe():
  from tests.helpers.runs import make_params, run_config

  return make_params(run_config(moe=True))


@pytest.fixture(scope="session")
def workdir(dense, tmp_path_factory):
  """A run of steps 1 and 2, as pre-training leaves it."""
  from tests.helpers.runs import run_config, save_run

  path = tmp_path_factory.mktemp("runs") / "tiny"
  save_run(path, run_config(), dense, steps=(1, 2))
  return path


@pytest.fixture(scope="session")
def model(workdir):
  from mm1_jax.inference.model import Model

  return Model.load(workdir)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
  """Two different PNG files."""
  folder = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  paths = []
  for name in ("a.png", "b.png"):
    data = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(data, "PNG")
    paths.append(folder / name)
    paths[-1].write_bytes(data.getvalue())
  return paths
