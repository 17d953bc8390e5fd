# SPDX-License-Identifier: Apache-2.0
"""One tiny model: what harnesses ask for does not depend on its layers."""

import pytest


@pytest.fixture(scope="session")
def workdir(dense_workdir):
  return dense_workdir


@pytest.fixture(scope="session")
def model(dense_model):
  return dense_model
