# SPDX-License-Identifier: Apache-2.0
"""Results as text: nothing is left out in silence, and nothing is shown as what it is not."""

import json
import math

import numpy as np
import pytest
from etils import epath

from mm1_jax.eval import report, results
from mm1_jax.eval.metrics.statistics import Estimate
from mm1_jax.eval.replies import Answered
from mm1_jax.eval.task import EvalError, Item, Scores
from tests.helpers.evaluations import make_result, make_task, said, values_of


def with_values(task="coco", per_item=(0.0,), control="own", form="mm1", split="test", **values):
  """Returns a result with metrics (mean, error)."""
  task = make_task(task, splits=(split,), split=split)
  estimates = {k: Estimate(m, e, len(per_item)) for k, (m, e) in values.items()}
  scores = Scores(estimates, np.array(per_item, float))
  answered = said(["x"] * len(per_item))
  return make_result(answered, scores=scores, task=task, control=control, form=form)


class TestTable:
  def test_shares_are_in_per_cent_with_their_error(self):
    text = report.table([make_result(said(["red", "red", "red", "blue", None]))])
    header, line, note = text.splitlines()
    assert header.split()[:5] == ["task", "split", "form", "shots", "control"]
    assert line.split() == [
      *("colors", "val", "mm1", "0", "own", "4", "(1)"),
      *("accuracy", "75.00", "±", "25.00", "%"),
    ]
    assert "standard error" in note

  def test_other_units_are_as_they_are(self):
    result = with_values(cider_ptb=(0.5, 0.1), perplexity=(1.0, 0.1), perception=(1500.25, 12))
    text = report.table([result])
    for shown in ("0.50 ± 0.10", "1.00 ± 0.10", "1500.25 ± 12.00"):
      assert shown in text
    assert "%" not in text.splitlines()[1]

  def test_a_metric_without_error(self):
    text = report.table([with_values(bleu4_ptb=(0.25, math.nan), m=(math.nan, 0.1))])
    assert "25.00 %" in text
    assert "not a number" in text

  def test_trials_are_averaged(self):
    trials = [
      make_result(said(replies), shots=4, trial=i)
      for i, replies in enumerate([["red", "red"], ["red", "blue"]])
    ]
    _, line, note = report.table(trials).splitlines()
    assert "4 x2" in line
    assert "75.00" in line
    assert "x: draws" in note

  def test_a_control_is_followed_by_the_paired_difference(self):
    own = make_result(said(["red", "red", "red"]))
    blind = make_result(said(["no", "no", "red"]), control="blind")
    lines = report.table([own, blind]).splitlines()
    assert lines[2].split()[:5] == ["colors", "val", "mm1", "0", "blind"]
    assert lines[3].split() == ["own", "-", "blind", "+66.67", "±", "33.33", "%"]

  def test_no_score(self):
    text = report.table([make_result(said(["red"]), task=make_task(score=None))])
    assert "not scored here" in text

  def test_many_groups_are_counted(self):
    groups = {f"accuracy/{i}": (0.5, 0.1) for i in range(30)}
    lines = report.table([with_values(accuracy=(0.5, 0.1), **groups)]).splitlines()
    assert len(lines) == 1 + 1 + 12 + 1 + 1
    assert "and 18 more groups" in lines[-2]

  def test_it_fits_a_terminal_whatever_the_names_are(self):
    long = make_task(
      "a_file\n\x1b[31m_of_my_own_with_a_long_name.jsonl", splits=("s" * 90,), split="s" * 90
    )
    of = [
      make_result(said(["red"] * 3), task=long, control=c, form="sft") for c in ("own", "frequent")
    ]
    text = report.table([*of, with_values(**{"m" * 200: (123456.0, 1234.0)})])
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text


class TestMarkdown:
  def rows(self, text: str, heading: str) -> list[list[str]]:
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]

  def test_all_is_told(self):
    own = make_result(said(["red", "blue", None]))
    blind = make_result(said(["blue", "blue", None]), control="blind")
    text = report.markdown(values_of([own, blind], seed=5))
    assert text.startswith("# Evaluation of mm1_3b, step 7\n")
    assert "| settings.seed | 5 |" in text
    assert "| run.digest | abc |" in text
    first, second, third = self.rows(text, "Results")
    assert first[5:] == ["2 (1)", "accuracy", "50.00 ± 50.00 %"]
    assert second[4:] == ["blind", "2 (1)", "accuracy", "0.00 ± 0.00 %"]
    assert third[6:] == ["own - blind", "+50.00 ± 50.00 %"]
    assert ["colors", "Colors", "exact match"] in self.rows(text, "What is measured")
    assert "Beside MM1" not in text

  def test_the_nearest_size_is_bold_and_all_are_there(self):
    text = report.markdown(
      values_of([with_values("vqav2", split="test-dev", accuracy_lmms=(0.4, 0.01))])
    )
    (row,) = self.rows(text, "Beside MM1")
    assert row[:7] == ["vqav2", "0", "accuracy_lmms", "40.00 ± 1.00 %", "**46.2**", "47.8", "48.9"]
    assert row[7].strip(" |") == ""

  def test_an_unknown_size_marks_none(self):
    result = with_values("vqav2", accuracy_lmms=(0.4, 0.01))
    text = report.markdown(values_of([result], run={"params": None}))
    assert "**" not in text

  def test_what_differs_is_said_in_the_row(self):
    result = with_values("vqav2", split="val", form="openflamingo", accuracy_lmms=(0.4, 0.01))
    (row,) = self.rows(report.markdown(values_of([result], limit=100)), "Beside MM1")
    for what in ("test-dev", "at most 100 items", "beams of 3", "without pictures"):
      assert what in row[7]

  def test_captions_are_beside_both_tokenizers(self):
    result = with_values(cider_ptb=(70, 1), cider_nlg_eval=(60, 1), bleu4_ptb=(0.2, math.nan))
    rows = self.rows(report.markdown(values_of([result])), "Beside MM1")
    assert [row[2] for row in rows] == ["cider_ptb", "cider_nlg_eval"]
    assert all("tokenizer" in row[7] for row in rows)

  def test_a_control_and_another_form_have_no_published_figure(self):
    blind = with_values("vqav2", control="blind", accuracy_lmms=(0.4, 0.01))
    text = with_values("vqav2", form="sft", accuracy=(0.4, 0.1))
    text = text._replace(job=text.job._replace(shots=4))
    assert "Beside MM1" not in report.markdown(values_of([blind, text]))

  def test_text_core_needs_all_of_its_parts(self):
    names = report.published.TEXT_CORE_TASKS
    parts = [with_values(name, form="text", acc=(0.5, 0.01)) for name in names]
    assert "TextCore: ours 50.0" in report.markdown(values_of(parts))
    assert "TextCore" not in report.markdown(values_of(parts[1:]))

  def test_names_are_neither_markdown_nor_html(self):
    task = make_task("a|b`<script>", metric="x | y\n# heading <img src=x>")
    text = report.markdown(values_of([make_result(said(["red"]), task=task)]))
    assert "<script>" not in text
    assert "<img" not in text
    assert not any(line.startswith("# heading") for line in text.splitlines())
    assert r"a\|b\`&lt;script>" in text


def write(folder, of, **run):
  folder = epath.Path(folder)
  for result in of:
    results.write_items(folder, result)
  results.write_whole(folder / "results.json", json.dumps(values_of(of, **run)))
  return folder


class TestCompare:
  def test_by_hand(self, tmp_path):
    a = write(tmp_path / "a", [make_result(said(["red", "red", "red", "no", None]))])
    b = write(tmp_path / "b", [make_result(said(["red", "no", "no", "red", "red"]))])
    text = report.compare(a, b)
    (line,) = [line for line in text.splitlines() if line.startswith("colors-val-mm1-0shot ")]
    # Over items 0 to 3: differences 0, 1, 1, -1.
    error = 100 * np.std([0, 1, 1, -1], ddof=1) / 2
    assert line.split() == [
      *("colors-val-mm1-0shot", "accuracy", "4", "75.00", "%", "50.00", "%"),
      *("+25.00", "±", f"{error:.2f}", "%", "2", "1"),
    ]
    assert "colors-val-mm1-0shot: 1 item scored only in B" in text
    assert "Run, versions and settings are the same." in text

  def test_what_differs_comes_first(self, tmp_path):
    a = write(tmp_path / "a", [make_result(said(["red"] * 3))], run={"step": 10}, seed=1)
    b = write(tmp_path / "b", [make_result(said(["red"] * 3))], run={"step": 20}, seed=1)
    lines = report.compare(a, b).splitlines()
    assert lines[:4] == [f"A: {a}", f"B: {b}", "They differ in:", "  run.step: A 10, B 20"]
    assert lines[4] == ""

  def test_a_metric_that_is_another_is_told(self, tmp_path):
    a = write(tmp_path / "a", [make_result(said(["red"] * 3))])
    b = write(
      tmp_path / "b", [make_result(said(["red"] * 3), task=make_task(metric="begins with"))]
    )
    assert "metric of colors: A exact match, B begins with" in report.compare(a, b)

  def test_trials_and_jobs_of_one_alone(self, tmp_path):
    a = [make_result(said(["red"] * 3), shots=4, trial=i) for i in range(2)]
    b = [a[1], make_result(said(["red"] * 3), control="blind")]
    text = report.compare(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert "only in A: colors-val-mm1-4shot" in text.splitlines()
    assert "only in B: colors-val-mm1-0shot-blind" in text.splitlines()
    assert "colors-val-mm1-4shot-trial1  accuracy" in text

  def test_an_id_with_another_truth_is_another_item(self, tmp_path):
    a = write(tmp_path / "a", [make_result(said(["red", "red", "red"]))])
    other = [*said(["red", "red"]), Answered(Item("2", "?", answers=("red",)), (), "red")]
    b = write(tmp_path / "b", [make_result(other)])
    text = report.compare(a, b)
    assert "1 item with another question or truth under the same id: left out" in text
    assert "accuracy  2 " in text

  def test_right_is_unknown_where_the_benchmark_does_not_say(self, tmp_path):
    a, b = (
      write(tmp_path / name, [with_values(per_item=(1.0, 3.0), cider_ptb=(mean, 1.0))])
      for name, mean in (("a", 2.0), ("b", 2.0))
    )
    (line,) = [x for x in report.compare(a, b).splitlines() if x.startswith("coco-")]
    assert line.split()[-2:] == ["-", "-"]
    assert "2.00" in line

  @pytest.mark.parametrize("b", [
    [make_result(said(["red"]), control="blind")],
    [make_result(said([None, "red"]))],
    [make_result(said(["red"], truth="blue"))],
  ])  # fmt: skip
  def test_nothing_in_common(self, tmp_path, b):
    a = write(tmp_path / "a", [make_result(said(["red", None]))])
    with pytest.raises(EvalError, match="no scored item in common"):
      report.compare(a, write(tmp_path / "b", b))

  def test_a_benchmark_that_is_not_scored(self, tmp_path):
    result = make_result(said(["red"]), task=make_task(score=None))
    with pytest.raises(EvalError, match="no scored item in common"):
      report.compare(write(tmp_path / "a", [result]), write(tmp_path / "b", [result]))

  @pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"score": 1}', '{"id": "0", "score": "x"}', '{"id": [], "score": 1}', "\xff"],
  )
  def test_a_damaged_file(self, tmp_path, line):
    a = write(tmp_path / "a", [make_result(said(["red"] * 2))])
    path = a / "items" / "colors-val-mm1-0shot.jsonl"
    path.write_bytes(path.read_bytes() + line.encode("latin-1"))
    with pytest.raises(EvalError, match=r"colors-val-mm1-0shot\.jsonl' line 3 is damaged"):
      report.compare(a, a)

  def test_a_missing_file(self, tmp_path):
    a = write(tmp_path / "a", [make_result(said(["red"]))])
    (a / "items" / "colors-val-mm1-0shot.jsonl").unlink()
    with pytest.raises(EvalError, match="cannot be read"):
      report.compare(a, a)


@pytest.mark.parametrize(
  ("metric", "share"),
  [
    ("accuracy", True),
    ("exact_match/nlvr", True),
    ("nats_per_token", False),
    ("nats_per_token/nlvr", False),
    ("cider_ptb", False),
    ("bits_per_byte", False),
  ],
)
def test_what_is_shown_in_per_cent(metric, share):
  assert report.is_share(metric, 0.39) == share
