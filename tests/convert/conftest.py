# SPDX-License-Identifier: Apache-2.0
"""Folders of tiny open weights, as other libraries save them."""

import pathlib
import sys

import pytest

# Their tiny models.
sys.path += [str(pathlib.Path(__file__).parents[1] / name) for name in ("models", "inference")]

WEIGHTS = pathlib.Path(__file__).parent.parent / "goldens" / "convert"
TOKENIZER = (
  pathlib.Path(__file__).parent.parent.parent / "mm1_jax" / "data" / "sample" / "tokenizer.model"
)


@pytest.fixture(scope="session")
def weights() -> pathlib.Path:
  return WEIGHTS


@pytest.fixture(scope="session")
def sample_tokenizer() -> pathlib.Path:
  return TOKENIZER
