# SPDX-License-Identifier: Apache-2.0
"""Files of an evaluation: every item is in them, as valid JSON, whole or not at all."""

import json
import math

import numpy as np
import pytest
from etils import epath

from mm1_jax.eval import results
from mm1_jax.eval.metrics.statistics import Estimate
from mm1_jax.eval.replies import Answered
from mm1_jax.eval.task import EvalError, Item, Likelihood, Scores
from tests.helpers.evaluations import make_result, make_task, png, said, values_of


def strict(text: str):
  """Reads JSON as other programs do: without NaN and infinity."""

  def refuse(name: str):
    raise ValueError(f"{name} is not JSON")

  return json.loads(text, parse_constant=refuse)


class TestItemRows:
  def test_scores_belong_to_the_items_that_were_asked(self):
    rows = [*results.item_rows(make_result(said(["red", None, "blue", None, "red"])))]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row.get("score") for row in rows] == [1, None, 0, None, 1]
    assert [row.get("right") for row in rows] == [True, None, False, None, True]
    assert [row.get("problem") for row in rows] == [None, "why", None, "why", None]
    assert "reply" not in rows[1]

  def test_what_was_asked_is_in_it(self):
    shown = (Item("d1"), Item("d2"))
    item = Item("a", "q?", (epath.Path("x/1.jpg"), png()), ("yes",), ("yes", "no"), right=0)
    (row,) = results.item_rows(make_result([Answered(item, shown, "yes")]))
    assert row["demonstrations"] == ["d1", "d2"]
    assert row["choices"] == ["yes", "no"]
    assert row["answers"] == ["yes"]
    assert row["pictures"][0] == "x/1.jpg"
    assert row["pictures"][1].startswith("bytes ")
    assert len(row["pictures"][1]) < 30

  def test_an_unscored_benchmark_has_replies_alone(self):
    (row,) = results.item_rows(make_result(said(["red"]), task=make_task(score=None)))
    assert row["reply"] == "red"
    assert "score" not in row

  def test_what_is_no_number_is_null(self):
    reply = (Likelihood(-math.inf, False, 2), Likelihood(-1.5, True, 1))
    scores = Scores({"m": Estimate(1.0, math.nan, 1)}, np.array([math.nan]))
    result = make_result([Answered(Item("a"), (), reply)], scores=scores)
    (row,) = results.item_rows(result)
    assert strict(json.dumps(row)) == row
    assert row["reply"] == [[None, False, 2], [-1.5, True, 1]]
    assert row["score"] is None
    assert row["right"] is None


class TestWriteItems:
  def test_a_line_an_item(self, tmp_path):
    result = make_result(said(["red", None, "two\nlines\u2028"]), shots=4, trial=1, control="blind")
    results.write_items(epath.Path(tmp_path), result)
    path = tmp_path / "items" / "colors-val-mm1-4shot-blind-trial1.jsonl"
    rows = [strict(line) for line in path.read_bytes().splitlines()]
    assert rows == [*results.item_rows(result)]

  def test_half_of_a_surrogate_pair_is_kept(self, tmp_path):
    """JSON files can hold it, and UTF-8 cannot."""
    item = Item("a", json.loads(r'"cut \ud83d"'), answers=("red",))
    results.write_items(epath.Path(tmp_path), make_result([Answered(item, (), "red")]))
    (path,) = (tmp_path / "items").iterdir()
    assert json.loads(path.read_text("utf-8"))["question"] == "cut \ud83d"

  def test_the_official_file_is_of_scored_items_and_own_pictures(self, tmp_path):
    def submission(items, replies, place):
      (place / "answers.txt").write_text(f"{[i.id for i in items]} {list(replies)}")
      return [place / "answers.txt"]

    task = make_task(submission=submission)
    for control in ("own", "blind"):
      result = make_result(said(["red", None]), task=task, control=control)
      results.write_items(epath.Path(tmp_path), result)
    (written,) = (tmp_path / "submissions").rglob("*.txt")
    assert written.parent.name == "colors-val-mm1-0shot"
    assert written.read_text() == "['0'] ['red']"


class TestWriteWhole:
  def test_makes_folders_and_replaces(self, tmp_path):
    path = epath.Path(tmp_path) / "a" / "b.txt"
    results.write_whole(path, "one")
    results.write_whole(path, "zwei ü")
    assert path.read_bytes() == "zwei ü".encode()
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]

  def test_a_failure_leaves_the_old_file(self, tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "b.txt"
    results.write_whole(path, "old")
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
      results.write_whole(path, "new")
    assert path.read_text() == "old"


class TestEntries:
  def test_trials_are_one_entry(self):
    trials = [
      make_result(said(replies), shots=4, trial=i)
      for i, replies in enumerate([["red", "red"], ["red", "blue"]])
    ]
    (entry,) = results.entries([*trials])
    assert entry["values"]["accuracy"]["mean"] == 0.75
    assert [t["accuracy"]["mean"] for t in entry["trials"]] == [1.0, 0.5]
    assert entry["files"] == [
      "items/colors-val-mm1-4shot.jsonl",
      "items/colors-val-mm1-4shot-trial1.jsonl",
    ]
    assert entry["own_minus_this"] is None

  def test_a_control_has_its_paired_difference(self):
    own, blind = (
      make_result(said(["red"] * 3)),
      make_result(said(["red", "no", "no"]), control="blind"),
    )
    entry = results.entries([own, blind])[1]
    assert entry["own_minus_this"]["metric"] == "accuracy"
    assert entry["own_minus_this"]["mean"] == pytest.approx(2 / 3)
    assert entry["own_minus_this"]["standard_error"] == pytest.approx(1 / 3)
    assert results.entries([blind])[0]["own_minus_this"] is None

  def test_only_the_same_shots_and_split_are_paired(self):
    own = make_result(said(["red"]), shots=4)
    assert (
      results.entries([own, make_result(said(["no"]), control="blind")])[1]["own_minus_this"]
      is None
    )

  def test_a_control_without_trials_is_paired_with_each(self):
    own = [
      make_result(said(replies), trial=i) for i, replies in enumerate([["red"] * 2, ["red", "no"]])
    ]
    entry = results.entries([*own, make_result(said(["no", "no"]), control="frequent")])[1]
    assert entry["own_minus_this"]["mean"] == 0.75

  def test_a_headline_that_is_no_mean_of_items_does_not_name_the_difference(self):
    """As POPE's F1, whose items count for the accuracy beside it; or MME's points."""

    def result(control, right, **values):
      scores = Scores({k: Estimate(v, 0.1, 4) for k, v in values.items()}, np.array(right, float))
      return make_result(said(["x"] * 4), scores=scores, control=control)

    own, blind = result("own", [1, 1, 1, 0], f1=0.8, accuracy=0.75), result("blind", [0] * 4, f1=0)
    assert results.entries([own, blind])[1]["own_minus_this"]["metric"] == "accuracy"
    own = result("own", [1, 1, 1, 0], perception=1500)
    assert results.entries([own, blind])[1]["own_minus_this"]["metric"] == results.PER_ITEM

  def test_dropped_items_have_their_reasons(self):
    (entry,) = results.entries([make_result(said(["red", None]))])
    assert entry["items"] == 2
    assert entry["dropped"] == [{"id": "1", "problem": "why"}]


class TestRead:
  def test_what_was_written(self, tmp_path):
    values = values_of([make_result(said(["red", "no"]))])
    results.write_whole(epath.Path(tmp_path) / results.RESULTS, json.dumps(values))
    assert results.read(tmp_path) == json.loads(json.dumps(values))

  @pytest.mark.parametrize("text", ["", "[]", '{"format": 0}', '{"form'])
  def test_damaged(self, tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(EvalError, match=r"results\.json"):
      results.read(tmp_path)

  def test_missing(self, tmp_path):
    with pytest.raises(EvalError, match="cannot be read"):
      results.read(tmp_path / "nowhere")
