# SPDX-License-Identifier: Apache-2.0
"""The index holds the lengths of what `Encoder` makes, counts what it leaves out, and is kept."""

import os
import pathlib

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module
from small_data import conversation, document

from mm1_jax.config import ConfigError, SourceConfig
from mm1_jax.data import index as index_module
from mm1_jax.data.examples import Encoder
from mm1_jax.data.index import TOO_LONG, TOO_MANY_IMAGES, UNREADABLE, load_index
from mm1_jax.data.sources import DataError, Source


@pytest.fixture
def load(tokenizer):
  def make(config, seq_len=64, max_images=2, max_drop_fraction=0.05, tokens_per_image=4):
    return load_index(
      Source(config),
      Encoder(tokenizer, tokens_per_image),
      seq_len=seq_len,
      max_images=max_images,
      max_drop_fraction=max_drop_fraction,
    )

  return make


def test_lengths_and_pictures(write, load):
  index = load(write("a", [["a"], ["a", b"1", "b", b"2"], conversation("c", [b"3"], ["d"])]))
  assert index.records.tolist() == [0, 1, 2]
  assert index.num_positions[:2].tolist() == [2, 1 + 1 + 6 + 1 + 6]
  assert index.splittable.tolist() == [True, True, False]
  assert [index.images(e).tolist() for e in (0, 1)] == [[], [2, 9]]
  assert len(index.images(2)) == 1
  assert not index.drops


def test_conversations_that_do_not_fit_are_counted(write, load):
  records = [
    conversation("long", ["1" * 100], ["y"]),
    conversation("pictures", [b"1", b"2", b"3"], ["y"]),
    conversation("fits", [b"1", b"2"], ["y"]),
    document("long document", "1" * 100),
  ]
  index = load(write("a", records))
  assert index.records.tolist() == [2, 3]
  assert index.drops == {TOO_LONG: 1, TOO_MANY_IMAGES: 1}


def test_nothing_usable(write, load):
  with pytest.raises(DataError, match=f"none of its 1 records can be used.*{TOO_LONG}"):
    load(write("a", [conversation("long", ["1" * 100], ["y"])]))


def test_pictures_without_slots(write, load):
  with pytest.raises(ConfigError, match=r"images_per_row is 0, but record 'a/1' of source 'a'"):
    load(write("a", [["text"], [b"1"]]), max_images=0)


def damaged(path: pathlib.Path, num_records: int, num_bad: int) -> SourceConfig:
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for i in range(num_records):
    data = msgpack.packb(document(str(i), "text"))
    writer.write(data[:-2] if i < num_bad else data)
  writer.close()
  return SourceConfig(name="damaged", path=str(path))


def test_unreadable_records_are_counted(tmp_path, load):
  index = load(damaged(tmp_path / "some", 100, 3))
  assert len(index) == 97
  assert index.drops == {UNREADABLE: 3}


def test_too_many_unreadable_records(tmp_path, load):
  with pytest.raises(DataError, match=r"6 of 100 records are unreadable.*max_drop_fraction 0.05"):
    load(damaged(tmp_path / "many", 100, 6))


def test_is_kept_until_something_changes(write, load, monkeypatch, cache):
  config = write("kept", [["a", b"1"], conversation("long", ["1" * 100], ["y"])])
  built = load(config)
  real = index_module._build
  calls = []
  monkeypatch.setattr(index_module, "_build", lambda *args: calls.append(1) or real(*args))
  again = load(config)
  assert not calls
  for field in ("records", "num_positions", "splittable", "image_starts", "image_offsets"):
    np.testing.assert_array_equal(getattr(built, field), getattr(again, field))
  assert built.drops == again.drops
  load(config, tokens_per_image=5)
  load(config, seq_len=65)
  assert len(calls) == 2
  (shard,) = Source(config).paths
  os.utime(shard, (1, 1))
  load(config)
  assert len(calls) == 3


def test_damaged_cache_is_made_again(write, load, cache):
  config = write("torn", [["a"]])
  load(config)
  (file,) = (cache / "index").glob("torn-*.npz")
  file.write_bytes(file.read_bytes()[:100])
  assert len(load(config)) == 1


def test_cache_that_cannot_be_written(write, load, monkeypatch, tmp_path):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("MM1_JAX_CACHE", str(tmp_path / "file"))
  assert len(load(write("a", [["a"]]))) == 1
