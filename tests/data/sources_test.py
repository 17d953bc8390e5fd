# SPDX-License-Identifier: Apache-2.0
"""Records are read back as written; every mistake names its file or record."""

import pathlib
import pickle

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module

from mm1_jax.config import SourceConfig
from mm1_jax.data import sources
from mm1_jax.data.sources import DataError, RecordError, Source, write_shards
from tests.helpers.records import conversation, document


def write_raw(path: pathlib.Path, *records: bytes) -> SourceConfig:
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return SourceConfig(name="raw", path=str(path))


def test_round_trip(write):
  records = [document(f"d/{i}", f"text {i}", bytes([i])) for i in range(5)]
  records.append(conversation("c", ["hello", b"jpeg"], ["yes"]))
  config = write("a", records, num_shards=2)
  source = Source(config)
  assert [pathlib.Path(p).name for p in source.paths] == [
    "a-00000-of-00002.arrayrecord",
    "a-00001-of-00002.arrayrecord",
  ]
  found = [source[i] for i in range(len(source))]
  assert sorted(found, key=lambda r: r["id"]) == sorted(records, key=lambda r: r["id"])
  assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_no_file_matches(tmp_path):
  with pytest.raises(DataError, match=r"source 'a': no file matches .*/none-\*"):
    Source(SourceConfig(name="a", path=str(tmp_path / "none-*")))


def test_empty_source(tmp_path):
  write_shards([], str(tmp_path / "e"), 1)
  with pytest.raises(DataError, match="source 'e': no record in 1 shards"):
    Source(SourceConfig(name="e", path=str(tmp_path / "e-*")))


def test_truncated_shard_is_named(write):
  config = write("t", [["x" * 1000]] * 200, num_shards=2)
  shard = pathlib.Path(config.path.replace("*", "00001-of-00002"))
  shard.write_bytes(shard.read_bytes()[:70_000])
  with pytest.raises(DataError, match=r"t-00001-of-00002\.arrayrecord is not a whole"):
    Source(config)


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ([1, 2], "a list; a record is a dict"),
    ({"content": []}, "'id' is None"),
    ({"id": "x"}, r"id 'x'.*either 'content' or 'turns'"),
    ({"id": "x", "content": [], "turns": []}, "either 'content' or 'turns'"),
    ({"id": "x", "content": []}, "content must be a list with at least one item"),
    ({"id": "x", "content": [{"text": b"x"}]}, r"content\[0\] must be"),
    ({"id": "x", "content": [{"text": "x", "image": b"x"}]}, r"content\[0\] must be"),
    ({"id": "x", "turns": []}, "at least one turn"),
    ({"id": "x", "turns": [{"role": "human", "content": []}]}, r"turns\[0\].*'role'"),
    (
      {"id": "x", "turns": [{"role": r, "content": [{"text": "a"}]} for r in ("user", "system")]},
      r"turns\[1\] is a system turn; only the first may be one",
    ),
    ({"id": "x", "turns": [{"role": "user"}]}, r"turns\[0\]\.content must be a list"),
  ],
)
def test_record_of_another_schema(tmp_path, record, message):
  source = Source(write_raw(tmp_path / "raw", msgpack.packb(record)))
  with pytest.raises(RecordError, match=f"source 'raw', record 0.*{message}"):
    source[0]


def test_record_that_is_not_msgpack(tmp_path):
  whole = msgpack.packb(document("x", "text"))
  source = Source(write_raw(tmp_path / "raw", whole, whole[:-3], b"\xc1"))
  assert source[0]["id"] == "x"
  for i in (1, 2):
    with pytest.raises(RecordError, match=f"source 'raw', record {i}: not msgpack"):
      source[i]


def test_hashes_of_shards_tell_replaced_records(tmp_path):
  """Of a shard of many blocks of 64 kB: any record of another length, wherever it is."""
  rng = np.random.default_rng(0)
  texts = [rng.bytes(500).hex() for _ in range(3000)]

  def hashed(texts: list[str]) -> str:
    records = [document(str(i), text) for i, text in enumerate(texts)]
    paths = sources.write_shards(records, str(tmp_path / "x"), 2)
    assert min(pathlib.Path(path).stat().st_size for path in paths) > 10 * sources.SAMPLE
    return sources.sample_hashes(paths)

  first = hashed(texts)
  assert len(first) == 24
  assert hashed(texts) == first
  for i in (0, 801, 1500, 2999):
    other = hashed([*texts[:i], texts[i] + rng.bytes(3).hex(), *texts[i + 1 :]])
    assert [other[:12] != first[:12], other[12:] != first[12:]] == [i % 2 == 0, i % 2 == 1]


def test_a_shard_that_is_gone_is_named(tmp_path):
  with pytest.raises(DataError, match=r"the shard .*gone\.arrayrecord cannot be read"):
    sources.sample_hashes([str(tmp_path / "gone.arrayrecord")])
