# SPDX-License-Identifier: Apache-2.0
"""Folders of tiny open weights, as other libraries save them.

Tests' helpers import JAX, which the other conftest.py has to set up first: so that waits.
"""

import pathlib

import pytest

WEIGHTS = pathlib.Path(__file__).parent.parent / "goldens" / "convert"


@pytest.fixture(scope="session")
def weights() -> pathlib.Path:
  return WEIGHTS


@pytest.fixture(scope="session")
def sample_tokenizer() -> pathlib.Path:
  from tests.helpers.records import TOKENIZER

  return TOKENIZER
