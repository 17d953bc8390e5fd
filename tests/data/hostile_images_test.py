# SPDX-License-Identifier: Apache-2.0
"""300 pictures that are none, among good ones, through the whole pipeline: all are counted."""

import collections
import dataclasses
import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from mm1_jax.batch import Batch
from mm1_jax.config import DataConfig, InputSpec
from mm1_jax.data.image import EMPTY, TOO_LARGE, TRUNCATED, UNREADABLE
from mm1_jax.data.pipeline import BatchStats, make_pipeline
from mm1_jax.data.sources import DataError
from tests.helpers.records import SAMPLE, document

INPUTS = InputSpec(image_size=(16, 16), tokens_per_image=16, image_token_id=4)
NUM_GOOD = 300


def noise(seed: int, format: str) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
  data = io.BytesIO()
  PIL.Image.fromarray(pixels).save(data, format)
  return data.getvalue()


def claims(seed: int, format: str) -> bytes:
  """A whole picture, but for a header that says it has 100 million pixels or more."""
  rng = np.random.default_rng(seed)
  width, height = (int(n) for n in rng.integers(10_000, 65_000, 2))
  data = bytearray(noise(seed, format))
  match format:
    case "PNG":
      data[16:24] = struct.pack(">II", width, height)
      data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    case "JPEG":
      at = data.index(b"\xff\xc0") + 5
      data[at : at + 4] = struct.pack(">HH", height, width)
    case "GIF":
      data[6:10] = struct.pack("<HH", width, height)
  return bytes(data)


def hostile() -> list[tuple[bytes, str]]:
  """Returns 300 payloads, and why each is dropped."""
  rng = np.random.default_rng(0)
  payloads = [(b"", EMPTY)] * 20
  for format in ("JPEG", "PNG", "BMP"):
    for seed in range(40):
      data = noise(seed, format)
      payloads.append((data[: int(rng.uniform(0.4, 0.95) * len(data))], TRUNCATED))
  for format in ("PNG", "JPEG", "GIF"):
    payloads += [(claims(seed, format), TOO_LARGE) for seed in range(20)]
  payloads += [(rng.bytes(int(n)), UNREADABLE) for n in rng.integers(1, 5000, 30)]
  starts = [
    b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n",
    b"%PDF-1.7\n",
    b"PK\x03\x04",
    b"\0\0\0\x18ftypmp42",
    b"\xff\xd8\xff\xe0\0\x10JFIF\0" + b"\0" * 40,
    b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    b"GIF89a",
    b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    b"II*\0\x08\0\0\0",
    b"a plain text that is called photo.jpg",
    b"\0" * 100,
  ]
  payloads += [(starts[i % len(starts)] + b"\n" * i, UNREADABLE) for i in range(70)]
  assert len(payloads) == 300
  return payloads


@pytest.fixture(scope="module")
def records() -> list[dict]:
  good = [(noise(1000 + i, "JPEG"), None) for i in range(NUM_GOOD)]
  both = good + hostile()
  return [document(str(i), data, f"number {i}") for i, (data, _) in enumerate(both)]


def config(source, **changes) -> DataConfig:
  return DataConfig(
    sources=(source,),
    tokenizer=str(SAMPLE / "tokenizer.model"),
    seq_len=64,
    batch_size=4,
    images_per_row=2,
    window_rows=32,
    **changes,
  )


def check(batch: Batch, stats: BatchStats) -> int:
  """Returns the pictures in a batch, where each example has the one that belongs to it."""
  assert batch.image_mask.sum() == stats.num_images == stats.num_examples
  assert (batch.tokens == 4).sum() == 16 * stats.num_images
  return stats.num_images


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_all_are_counted_by_reason(write, records, num_workers: int):
  source = dataclasses.replace(write("s", records), epochs=1)
  data = config(source, max_drop_fraction=1.0, num_workers=num_workers)
  pipeline = make_pipeline(data, INPUTS)
  num_images = []
  with pytest.raises(DataError, match="the data ends"):
    num_images.extend(check(batch, stats) for batch, stats in pipeline)
  pipeline.close()
  assert pipeline.drops == collections.Counter(f"s: {reason}" for _, reason in hostile())
  assert sum(num_images) == NUM_GOOD


def test_the_run_stops_with_the_reasons(write, records):
  pipeline = make_pipeline(config(write("s", records)), INPUTS)
  with pytest.raises(DataError, match=r"examples were dropped \(.*truncated image.*more than"):
    list(pipeline)
  pipeline.close()
