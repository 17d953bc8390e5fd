# SPDX-License-Identifier: Apache-2.0
"""VLMEvalKit's TSVs are read as it reads them, and its answer files written."""

import base64
import csv

import pytest
from etils import epath

from mm1_jax.eval import tasks
from mm1_jax.eval.task import EvalError
from mm1_jax.eval.tasks import vlmevalkit

LONG = base64.b64encode(b"p" * 60).decode()  # longer than an index may be
OTHER = base64.b64encode(b"q" * 60).decode()


def table(tmp_path, name: str, *rows: dict[str, str]) -> epath.Path:
  path = tmp_path / name
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
  return epath.Path(path)


def row(index: str, image: str, **more: str) -> dict[str, str]:
  return {"index": index, "image": image, "question": "What?", **more}


def test_a_picture_may_be_another_rows(tmp_path):
  path = table(tmp_path, "a.tsv", row("0", LONG), row("1", "0"), row("2", f"['{LONG}', '{OTHER}']"))
  pictures = [item.pictures for item in vlmevalkit.read(path)]
  assert pictures == [(b"p" * 60,), (b"p" * 60,), (b"p" * 60, b"q" * 60)]


def test_a_picture_may_be_a_path(tmp_path):
  path = table(tmp_path, "a.tsv", row("0", "", image_path="b/c.jpg"))
  assert vlmevalkit.read(path)[0].pictures == (epath.Path(tmp_path) / "b/c.jpg",)


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([row("0", "1"), row("1", "0")], "entry 1: its picture is that of row '1', which has none"),
    ([row("0", "*" * 80)], "entry 1: its picture is not base64"),
    ([row("0", f"['{LONG}'")], "entry 1 is not of the form"),
    ([row("0", LONG, A="a", B="", C="c", answer="A")], "has the choices A, C, and not those betw"),
    ([row("0", LONG, A="a", B="b", answer="C")], "the answer 'C' is none of the letters of 2"),
    ([row("0", "", image_path="../c.jpg")], "the picture '../c.jpg' is not in the folder"),
    ([row("0", LONG), row("0", LONG)], "entry 2: the id '0' is there twice"),
  ],
)
def test_damage_is_told(rows, message, tmp_path):
  with pytest.raises(EvalError, match=message):
    vlmevalkit.read(table(tmp_path, "a.tsv", *rows))


def test_choices_that_pandas_takes_for_missing_are_kept(tmp_path):
  path = table(tmp_path, "a.tsv", row("0", LONG, A="None", B="NA", C="nan", D="", answer="B"))
  (item,) = vlmevalkit.read(path)
  assert (item.choices, item.right, item.answers) == (("None", "NA"), 1, ("NA",))


@pytest.mark.parametrize(
  ("name", "file", "rows"),
  [
    ("ai2d", "AI2D_TEST.tsv", [row("0", LONG, A="a", B="b", C="c", D="d", answer="D")]),
    (
      "seed",
      "SEEDBench_IMG.tsv",
      [row("0", LONG, A="a", B="b", C="c", D="d", answer="D", category="Scene")],
    ),
    ("pope", "POPE.tsv", [row("0", LONG, answer="Yes", category="random", image_source="a")]),
    ("mm_vet", "MMVet.tsv", [row("0", LONG, answer="-1<AND>-5", category="ocr,math")]),
    (
      "mme",
      "MME.tsv",
      [
        row(str(i), LONG, answer=answer, category="OCR", image_path="OCR/1.jpg")
        for i, answer in enumerate(("Yes", "No"))
      ],
    ),
    (
      "mmmu",
      "MMMU_DEV_VAL.tsv",
      [
        row("validation_Art_1", LONG, A="a", B="<image 1>", answer="B", split="validation"),
        row("dev_Art_1", LONG, A="a", B="b", answer="B", split="dev"),
      ],
    ),
  ],
)
def test_benchmarks_are_read_from_their_tsv(name, file, rows, tmp_path):
  table(tmp_path, file, *rows)
  task = tasks.get_task(name)
  items = tasks.read_items(task, tmp_path)
  assert len(items) == (1 if name == "mmmu" else len(rows))
  for item in items:
    assert set(item.pictures) == {b"p" * 60}
    assert task.forms["sft"].prompt(item)
  if task.score:
    best = ["D" if item.choices and name != "mmmu" else item.answers[0] for item in items]
    best = ["B"] if name == "mmmu" else best
    best = [answer.lower() if name == "pope" else answer for answer in best]
    values = task.score(items, best).values
    assert next(iter(values.values())).mean == (200 if name == "mme" else 1)


def test_answer_files_have_what_vlmevalkit_scores(tmp_path):
  import pandas as pd

  rows = [row(str(i), LONG, A='say "a"\tb', B="b\nc", answer="A", split="dev") for i in range(2)]
  table(tmp_path, "AI2D_TEST.tsv", *rows)
  task = tasks.get_task("ai2d")
  items = tasks.read_items(task, tmp_path)
  assert task.submission
  (path,) = task.submission(items, ['A. say "a"\tb', ""], epath.Path(tmp_path))
  assert path.name == "mm1_jax_AI2D_TEST.tsv"
  # As VLMEvalKit loads it.
  data = pd.read_csv(path, sep="\t")
  assert list(data) == ["index", "question", "A", "B", "answer", "split", "prediction"]
  assert list(data["index"]) == [0, 1]
  assert data["A"][0] == 'say "a"\tb'
  assert data["prediction"][0] == 'A. say "a"\tb'


def test_answers_to_other_files_have_the_same_columns(items, tmp_path):
  task, found = tasks.get_task("seed"), items("seed")
  assert task.submission
  (path,) = task.submission(found, ["C", "A"], epath.Path(tmp_path))
  header, first = list(csv.reader(path.read_text().splitlines(), delimiter="\t"))[:2]
  assert header == ["index", "question", "A", "B", "C", "D", "answer", "prediction"]
  assert first == ["101669", "How many towels are there?", "One", "Two", "Three", "Four", "C", "C"]


def test_a_tsv_of_ones_own(tmp_path):
  path = table(tmp_path, "Own.tsv", row("0", LONG, A="a", B="b", answer="B"))
  task = tasks.get_task(str(path))
  items = tasks.read_items(task, tmp_path)
  assert task.score
  assert task.score(items, ["B."]).values["accuracy"].mean == 1
  assert task.submission
  (written,) = task.submission(items, ["B."], epath.Path(tmp_path))
  assert written.name == "mm1_jax_Own.tsv"
