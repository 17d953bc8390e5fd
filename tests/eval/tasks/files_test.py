# SPDX-License-Identifier: Apache-2.0
"""Damage in files: one clear error that names the file and the place."""

import json
import pickle

import pytest
from etils import epath

from mm1_jax.eval import tasks
from mm1_jax.eval.task import EvalError, Item
from mm1_jax.eval.tasks import files


def put(tmp_path, name: str, content: str | bytes) -> epath.Path:
  path = epath.Path(tmp_path) / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.json", '[{"a": 1}, {"a"', r"a.json' is not JSON .*cut off: download it again"),
    ("a.json", '[{"a": "cut he', r"a.json' is not JSON .*cut off: download it again"),
    ("a.json", "[1, }]", r"a.json' is not JSON \(Expecting value: line 1 column 5"),
    ("a.json", b"[\xff]", r"a.json' is not UTF-8 \(byte 1\)"),
    ("a.json", "[" * 100_000, r"a.json' is JSON nested too deeply"),
    ("a.json", '[{"a": 1, "b": 2, "a": 3}]', r"a.json' has the key 'a' twice in one object"),
    ("a.jsonl", '{"a": 1}\n\n{"a": ', r"a.jsonl', line 3, is not JSON .*cut off"),
    ("a.tsv", "a\tb\n1\t2\n3\n", r"a.tsv', row 2 has 1 fields; the header, 2"),
    ("a.tsv", 'a\tb\n1\t"2', r"a.tsv', line 2: unexpected end of data"),
    ("a.parquet", b"PAR1" + b"\0" * 20, r"a.parquet' cannot be read as Parquet"),
  ],
)
def test_damage_is_told(name, content, message, tmp_path):
  with pytest.raises(EvalError, match=message):
    files.read_rows(put(tmp_path, name, content))


def test_rows_of_all_kinds(tmp_path):
  rows = [{"a": "1", "b": "x\ty\nz"}, {"a": "2", "b": "é\u2028"}]
  lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
  assert files.read_rows(put(tmp_path, "a.jsonl", lines)) == rows
  assert files.read_rows(put(tmp_path, "b.json", "\ufeff" + lines)) == rows  # POPE's, NLVR2's
  assert files.read_rows(put(tmp_path, "c.json", json.dumps(rows))) == rows
  table = 'a\tb\n1\t"x\ty\nz"\n2\té\u2028\n'
  assert files.read_rows(put(tmp_path, "d.tsv", table)) == rows


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "MAX_FILE_BYTES", 3)
  with pytest.raises(EvalError, match="has more than the 3 bytes"):
    files.read_json(put(tmp_path, "a.json", "1234"))


def test_a_pickle_runs_nothing(tmp_path):
  class Evil:
    def __reduce__(self):
      return (print, ("run",))

  with pytest.raises(EvalError, match=r"refs.p' is no pickle of plain values \(it asks for"):
    files.read_pickle(put(tmp_path, "refs.p", pickle.dumps(Evil())))


def make(row):
  yield Item(row["id"], row["question"], (), tuple(row["answers"]))


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([], r"q.json' has no item of this split"),
    ([{"id": "1", "question": "?"}], r"entry 1 is not of the form of .* \(it has no 'answers'\)"),
    ([7], r"entry 1 is not of the form of its benchmark \(TypeError"),
    ([{"id": "1", "question": None, "answers": []}], "entry 1: id, question, .* is not: None"),
    ([{"id": "1", "question": "?", "answers": [3]}], "entry 1: id, question, .* is not: 3"),
    ([{"id": "", "question": "?", "answers": []}], "entry 1: it has no id"),
    ([{"id": "1", "question": "?", "answers": []}] * 2, "entry 2: the id '1' is there twice"),
    ([{"id": "1", "question": "a" * 1_000_001, "answers": []}], "entry 1: a text is longer than"),
  ],
)
def test_items_are_checked(rows, message, tmp_path):
  with pytest.raises(EvalError, match=message):
    files.items(epath.Path(tmp_path) / "q.json", rows, make)


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "a/../../b.jpg", "", "gs://b/a.jpg"])
def test_pictures_stay_in_their_folder(name, tmp_path):
  with pytest.raises(EvalError, match=r"the picture '.*' is not in the folder"):
    files.picture(epath.Path(tmp_path), name)


def test_a_picture_is_looked_for_when_it_is_read(official, tmp_path):
  folder = official("vizwiz")
  (folder / "val/VizWiz_val_00000001.jpg").unlink()
  first, second = tasks.read_items(tasks.get_task("vizwiz"), folder)
  assert files.read_picture(first.pictures[0], first).startswith(b"\x89PNG")
  assert files.read_picture(b"abc", first) == b"abc"
  with pytest.raises(
    EvalError, match=r"VizWiz_val_00000001.jpg' of item '.*' is missing: download"
  ):
    files.read_picture(second.pictures[0], second)


def test_coco_pictures_may_be_shared(official, tmp_path):
  folder = official("vqav2")
  (folder / "val2014").rename(tmp_path / "val2014")
  items = tasks.read_items(tasks.get_task("vqav2"), folder)
  assert all(picture.is_file() for item in items for picture in item.pictures)  # pyright: ignore


@pytest.mark.parametrize(
  ("name", "file", "change", "message"),
  [
    ("vqav2", "v2_mscoco_val2014_annotations.json", ("262148000", "7"), "262148000 is not in v2_"),
    (
      "vqav2",
      "v2_mscoco_val2014_annotations.json",
      ("393225001", "262148000"),
      "more than one annotation of question 262148000",
    ),
    (
      "vqav2",
      "v2_OpenEnded_mscoco_val2014_questions.json",
      ("393225001", "262148000"),
      "entry 2: the id '262148000' is there twice",
    ),
    (
      "gqa",
      "testdev_balanced_questions.json",
      ("201640614", "201307251"),
      "the key '201307251' twi",
    ),
    ("docvqa", "val_v1.0_withQT.json", ('"data"', '"rows"'), "it has no list 'data'"),
    ("docvqa", "val_v1.0_withQT.json", ("documents/", "../"), "picture '../49153.png' is not in"),
    ("seed", "SEED-Bench.json", ('"C"', '"E"'), "the answer 'E' is none of the letters of 4"),
    (
      "scienceqa_img",
      "problems.json",
      ('"answer": 0', '"answer": 3'),
      "entry 1 is not of the form",
    ),
    (
      "mme",
      "MME_Benchmark_release_version/count/0001.txt",
      ("\tYes", " Yes"),
      "0001.txt', entry 1",
    ),
    ("flickr30k", "Annotations/36979.xml", ("<width>100", "<width>"), "36979.xml' is not of the"),
  ],
)
def test_damage_in_a_benchmark(name, file, change, message, official):
  path = official(name) / file
  path.write_text(path.read_text().replace(*change))
  with pytest.raises(EvalError, match=message):
    tasks.read_items(tasks.get_task(name), path.parents[len(file.split("/")) - 1])
