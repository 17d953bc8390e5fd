# SPDX-License-Identifier: Apache-2.0
"""Small data that is made on the spot, and the shipped sample.

Grain imports JAX, which the other conftest.py has to set up first: so imports wait in the fixtures.
"""

import io

import numpy as np
import PIL.Image
import pytest

from mm1_jax.config import DataConfig, SourceConfig


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  """Indexes of one test session are kept apart from the user's."""
  folder = tmp_path_factory.getbasetemp() / "cache"
  monkeypatch.setenv("MM1_JAX_CACHE", str(folder))
  return folder


@pytest.fixture(scope="session")
def tokenizer():
  from mm1_jax.data.tokenizer import Tokenizer
  from tests.helpers.records import SAMPLE

  return Tokenizer(str(SAMPLE / "tokenizer.model"))


@pytest.fixture(scope="session")
def jpeg():
  """Makes a picture of one grey level, which JPEG keeps to within one or two."""

  def make(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    data = io.BytesIO()
    PIL.Image.fromarray(np.full((*size, 3), level, np.uint8)).save(data, "JPEG", quality=95)
    return data.getvalue()

  return make


@pytest.fixture
def write(tmp_path):
  """Writes documents, given as lists of str and bytes, or whole records; returns the source."""
  from mm1_jax.data import sources
  from tests.helpers.records import document

  def make(name: str, records: list, num_shards: int = 1, weight: float = 1.0) -> SourceConfig:
    prefix = tmp_path / name
    full = [
      r if isinstance(r, dict) else document(f"{name}/{i}", *r) for i, r in enumerate(records)
    ]
    sources.write_shards(full, str(prefix), num_shards)
    return SourceConfig(name=name, path=f"{prefix}-*.arrayrecord", weight=weight)

  return make


@pytest.fixture
def sample_data():
  """Makes a config of the shipped sample, at MM1's mixture."""
  from tests.helpers.records import SAMPLE, sample_source

  def make(**changes) -> DataConfig:
    weights = {"captions": 0.45, "interleaved": 0.45, "text": 0.10}
    values = {
      "sources": tuple(sample_source(part, weight=w) for part, w in weights.items()),
      "tokenizer": str(SAMPLE / "tokenizer.model"),
      "seq_len": 512,
      "batch_size": 8,
      "images_per_row": 5,
      "window_rows": 32,
    }
    return DataConfig(**{**values, **changes})

  return make
