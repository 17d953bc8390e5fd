# SPDX-License-Identifier: Apache-2.0
"""The index holds the lengths of what `Encoder` makes, counts what it leaves out, and is kept."""

import dataclasses
import os
import pathlib
import pickle

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module

from mm1_jax.config import ConfigError, SourceConfig
from mm1_jax.data import index as index_module
from mm1_jax.data.examples import Encoder
from mm1_jax.data.index import EMPTY, TOO_LONG, TOO_MANY_IMAGES, UNREADABLE, Index, load_index
from mm1_jax.data.sources import DataError, Source, write_shards
from tests.helpers.records import conversation, document, sample_source


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


def test_documents_are_cut_between_items_and_texts_anywhere(write, load):
  """Before pictures and texts, but not right after a picture."""
  records = [
    ["text only", "more"],
    [b"1", "a", b"2", b"3", "b", "c"],
    conversation("c", [b"1", "a"], ["d"]),
  ]
  index = load(write("a", records), seq_len=200)
  assert index.cuts(0, 6) is None
  assert index.images(1).tolist() == [1, 8, 14]
  assert index.cuts(1, 6) == [8, 21]
  assert index.cuts(2, 6) == []


def test_lengths_are_those_of_the_encoded_sample(load, tokenizer):
  """Lengths are counted item by item: they must be what `encode_record` makes."""
  encoder = Encoder(tokenizer, 4)
  for part in ("captions", "interleaved", "text", "sft"):
    config = sample_source(part, "heldout")
    source, index = Source(config), load(config, seq_len=9999, max_images=99)
    assert len(index) == len(source)
    for e in range(0, len(index), 5):
      example = encoder.encode_record(source[int(index.records[e])])
      assert len(example) == index.num_positions[e]
      assert [span.start for span in example.spans] == index.images(e).tolist()


def test_empty_records_are_counted(write, load):
  records = [[""], ["a"], ["", ""], [b"1"]]
  index = load(write("a", records))
  assert index.records.tolist() == [1, 3]
  assert index.drops == {EMPTY: 2}


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
  real = index_module._index_shard
  calls = []
  monkeypatch.setattr(index_module, "_index_shard", lambda *args: calls.append(1) or real(*args))
  again = load(config)
  assert not calls
  assert_same(built, again)
  load(config, seq_len=65)  # the rows may change
  assert not calls
  load(config, tokens_per_image=5)
  assert len(calls) == 1
  (shard,) = Source(config).paths
  os.utime(shard, (1, 1))
  load(config)
  assert len(calls) == 2


def test_only_a_new_shard_is_indexed(write, load, monkeypatch, tmp_path):
  config = write("grows", [["a", b"1"], conversation("long", ["1" * 100], ["y"]), ["b"]], 2)
  load(config)
  real, made = index_module._index_shard, []
  monkeypatch.setattr(index_module, "_index_shard", lambda c, e: made.append(c.path) or real(c, e))
  write_shards([document("new", "c", b"2", "d", "e")], str(tmp_path / "grows-z"), 1)
  index = load(config)
  assert [pathlib.Path(path).name for path in made] == ["grows-z-00000-of-00001.arrayrecord"]
  assert index.records.tolist() == [0, 1, 3]  # shard by shard, without the long one
  assert [index.images(e).tolist() for e in range(3)] == [[2], [], [2]]
  assert index.cuts(2, 6) == [2, 9]
  assert index.drops == {TOO_LONG: 1}


def test_processes_index_the_same(write, load, monkeypatch, tmp_path):
  records = [["a" * i, b"1", "b"] for i in range(40)] + [conversation("c", [b"1"], ["d"])]
  config = write("many", records, num_shards=5)
  alone = load(config)
  monkeypatch.setenv("MM1_JAX_CACHE", str(tmp_path / "another"))
  monkeypatch.setattr(index_module, "MIN_BYTES_FOR_PROCESSES", 0)
  monkeypatch.setattr(index_module, "_index_shard", None)  # of this process
  assert_same(load(config), alone)


def assert_same(a: Index, b: Index) -> None:
  for field in dataclasses.fields(Index):
    np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), field.name)


def test_damaged_cache_is_made_again(write, load, cache):
  before = {*(cache / "index").glob("*.npz")}
  config = write("torn", [["a"]])
  load(config)
  (file,) = {*(cache / "index").glob("*.npz")} - before
  file.write_bytes(file.read_bytes()[:100])
  assert len(load(config)) == 1


def test_cache_that_cannot_be_written(write, load, monkeypatch, tmp_path):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("MM1_JAX_CACHE", str(tmp_path / "file"))
  assert len(load(write("a", [["a"]]))) == 1


def test_a_large_index_is_mapped_and_pickles_to_its_name(write, load, monkeypatch, cache):
  monkeypatch.setattr(index_module, "MIN_BYTES_TO_MAP", 0)
  records = [["a" * i, b"1", "b"] for i in range(40)] + [conversation("long", ["1" * 100], ["y"])]
  for config in (write("pictures", records), write("texts", [["a"], ["b"]])):
    alone = load(config)
    monkeypatch.setattr(index_module, "_load_shards", None)  # it is there: no shard is read
    again = load(config)
    monkeypatch.undo()
    monkeypatch.setenv("MM1_JAX_CACHE", str(cache))
    monkeypatch.setattr(index_module, "MIN_BYTES_TO_MAP", 0)
    sent = pickle.dumps(again)
    assert len(sent) < 500
    for index in (again, pickle.loads(sent)):
      assert_same(alone, index)
      assert isinstance(index.records.base, np.memmap)


def test_a_damaged_mapped_index_is_made_again(write, load, monkeypatch, cache):
  monkeypatch.setattr(index_module, "MIN_BYTES_TO_MAP", 0)
  before = {*(cache / "index").glob("*-mapped")}
  config = write("broken", [["a", b"1"], ["c"]])
  load(config)
  (folder,) = {*(cache / "index").glob("*-mapped")} - before
  file = folder / "records.npy"
  file.write_bytes(file.read_bytes()[:100])
  assert load(config).records.tolist() == [0, 1]
  assert len(np.load(file)) == 2  # whole again
  assert not [*(cache / "index").glob("*.tmp")]
