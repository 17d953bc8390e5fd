# SPDX-License-Identifier: Apache-2.0
"""Scores that are not means of right answers, groups, and answer files."""

import csv
import dataclasses
import json
import pathlib

import numpy as np
import pytest
from etils import epath

from mm1_jax.eval import tasks
from mm1_jax.eval.metrics import yes_no as metrics
from mm1_jax.eval.task import EvalError, Item, Task
from mm1_jax.eval.tasks import choices, yes_no


def score(task: Task, items, replies):
  assert task.score
  return task.score(items, replies)


def means(scores) -> dict[str, float]:
  return {name: value.mean for name, value in scores.values.items()}


def test_vqa_accuracy_by_type_and_normalisation(items):
  task, found = tasks.get_task("vqav2"), items("vqav2")
  scores = score(task, found, ["at table", "two"])
  # One person said "at table": 9 sets of nine have it once. Two and "2" are one answer in 'lmms'
  # alone: the official rules leave truths as they are.
  assert means(scores)["accuracy_lmms/other"] == pytest.approx(0.3)
  assert means(scores)["accuracy_lmms/number"] == pytest.approx(1.0)
  assert means(scores)["accuracy_official"] == pytest.approx((0.3 + 1.0) / 2, abs=0.1)
  np.testing.assert_array_equal(scores.right, [False, True])


def test_captions_by_domain_and_tokenizer(items):
  task, found = tasks.get_task("nocaps"), items("nocaps")
  scores = score(task, found, ["a baby is in a crib", "x", "A man plays a red harp."])
  names = ["cider_ptb", "cider_nlg_eval", "bleu4_ptb"]
  names += [f"cider_ptb/{domain}-domain" for domain in ("in", "near", "out")]
  assert list(scores.values) == names
  values = means(scores)
  assert values["cider_nlg_eval"] < values["cider_ptb"]  # which keeps case and the full stop
  assert np.isnan(scores.values["bleu4_ptb"].standard_error)
  assert scores.values["cider_ptb"].standard_error > 0
  assert scores.right is None


def test_mmbench_is_right_only_in_all_rotations(items):
  task, found = tasks.get_task("mmbench"), items("mmbench")
  assert [item.id for item in found] == ["241", "1000241", "2000241", "252", "1000252"]
  assert [choices.letter(item) for item in found] == ["C", "B", "A", "A", "B"]
  assert {item.answers[0] for item in found} == {"None", "yes"}
  scores = score(task, found, ["C", "B", "B", "A.", "(B)"])
  assert means(scores) == {
    "circular_accuracy": 0.5,
    "accuracy": 0.8,
    "circular_accuracy/coarse_perception": 0.5,
  }
  np.testing.assert_array_equal(scores.per_item, [0, np.nan, np.nan, 1, np.nan])
  assert scores.values["circular_accuracy"].n == 2
  assert scores.counts["questions without all rotations"] == 0
  assert score(task, found, ["what"] * 5).counts["no choice found"] == 5
  part = score(task, found[:4], ["C", "B", "A", "A"])
  assert part.counts["questions without all rotations"] == 1


def test_mmbench_is_rotated_where_the_file_is_not(items, tmp_path):
  whole = items("mmbench")
  path = tmp_path / "mmbench" / "MMBench_DEV_EN.tsv"
  rows = list(csv.DictReader(path.open(newline=""), delimiter="\t"))
  with path.open("w", newline="") as file:
    table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
    table.writeheader()
    table.writerows(row for row in rows if int(row["index"]) < 1_000_000)
  task = tasks.get_task("mmbench")
  rotated = tasks.read_items(task, path.parent)
  plain = lambda item: dataclasses.replace(item, details={})
  assert list(map(plain, rotated)) == list(map(plain, whole))
  assert task.submission
  (written,) = task.submission(rotated, list("CBAAB"), epath.Path(tmp_path))
  with pathlib.Path(written).open(newline="") as file:
    rows = list(csv.DictReader(file, delimiter="\t"))
  assert [row["answer"] for row in rows] == [row["prediction"] for row in rows]
  assert rows[1]["index"] == "1000241"
  assert rows[1]["A"] == "dog"


def test_mmmu_guesses_are_counted_and_repeatable(items):
  task, found = tasks.get_task("mmmu"), items("mmmu")
  scores = score(task, found, ["(B) it is", "The answer is 8", "in 1820"])
  assert means(scores) == {"accuracy": 1, "accuracy/Accounting": 1, "accuracy/Art_Theory": 1}
  assert scores.counts["random choices"] == 0
  many = [dataclasses.replace(found[0], id=f"validation_Art_{i}") for i in range(200)]
  scores = score(task, many, ["?"] * 200)
  assert scores.counts["random choices"] == 200
  assert 0.35 < means(scores)["accuracy"] < 0.65
  backwards = score(task, many[::-1], ["?"] * 200)
  np.testing.assert_array_equal(backwards.per_item[::-1], scores.per_item)


@pytest.mark.parametrize(
  ("number", "said", "right"),
  [
    (0, "1.19", 1),  # one decimal
    (0, "1.3", 0),
    (0, "about 1.2", 0),
    (1, "B", 1),
    (1, "(B) No", 1),
    (1, "no", 1),  # the nearest choice
    (1, "yes", 0),
    (1, "", 0),
    (2, "4.0", 1),
    (2, "four", 0),
    (3, "[1, 2]", 1),
    (3, "[1,2]", 0),
  ],
)
def test_math_vista_rules(number, said, right, items):
  item = items("mathvista")[number]
  assert choices.math_vista_accuracy(item, said) == right


@pytest.mark.parametrize(
  ("name", "said", "right"),
  [
    ("scienceqa_img", "a", 1),
    ("scienceqa_img", "A. West Virginia", 1),
    ("scienceqa_img", "West Virginia", 0),
    ("ai2d", "D", 1),
    ("ai2d", "d)", 1),
    ("ai2d", " D. fox", 1),
    ("ai2d", "fox", 0),
    ("seed", "C. Three", 1),
    ("seed", "the third", 0),
  ],
)
def test_letters_by_each_rule(name, said, right, items):
  task, found = tasks.get_task(name), items(name)[:1]
  assert score(task, found, [said]).per_item.tolist() == [right]


def test_pope_is_the_mean_f1_of_its_kinds(items):
  task, found = tasks.get_task("pope"), items("pope")
  # random: both right. popular: "yes" to both. adversarial: "no", and what is neither.
  replies = ["Yes", "no", "yes", "yes", "no", "there is"]
  scores = score(task, found, replies)
  values = means(scores)
  assert values["f1/random"] == 1
  assert values["f1/popular"] == pytest.approx(2 / 3)
  assert values["f1/adversarial"] == 0
  assert values["f1"] == pytest.approx((1 + 2 / 3) / 3)
  overall = metrics.pope(replies, [item.answers[0] for item in found])
  for name in ("accuracy", "precision", "recall", "yes_share"):
    assert values[name] == pytest.approx(overall[name])
  assert values["f1_of_all"] == pytest.approx(overall["f1"])
  assert scores.values["f1"].standard_error > 0
  assert scores.counts["neither yes nor no"] == 1
  np.testing.assert_array_equal(scores.right, [1, 1, 1, 0, 0, 0])


def test_f1_is_that_of_the_metric():
  random = np.random.default_rng(0)
  for _ in range(50):
    said, truths = (random.choice(["yes", "no"], 7) for _ in range(2))
    expected = metrics.pope(list(said), list(truths))["f1"]
    assert yes_no._f1(said == "yes", truths == "yes") == pytest.approx(expected)


def test_mme_adds_questions_and_pictures(items):
  task, found = tasks.get_task("mme"), items("mme")
  assert len(found) == 14 * 4
  replies = [item.answers[0] for item in found]
  of = [item.details["category"] for item in found]
  replies[of.index("color")] = "No"  # one of four questions, so one of two pictures
  replies[of.index("code_reasoning")] = "perhaps"
  scores = score(task, found, replies)
  values = means(scores)
  assert values["perception"] == 2000 - 25 - 50
  assert values["cognition"] == 800 - 25 - 50
  assert values["color"] == 75 + 50
  assert values["existence"] == 200
  assert scores.counts["neither yes nor no"] == 1
  # color: 200 and 50 for its two pictures.
  assert scores.values["perception"].standard_error == pytest.approx(75)
  with pytest.raises(EvalError, match=r"has 1 questions; MME's have 2. MME is scored over whole"):
    score(task, found[:1], ["Yes"])


def test_grounding(items):
  task, found = tasks.get_task("refcoco"), items("refcoco")
  assert [item.question for item in found] == ["lady on the right", "woman"]
  assert found[0].answers == ("<500,250,750,750>",)
  scores = score(task, found, ["[0.5, 0.25, 0.75, 0.75]", "on the right"])
  assert means(scores) == {"accuracy": 0.5, "has_a_box": 0.5}
  task, found = tasks.get_task("flickr30k"), items("flickr30k")
  assert [item.question for item in found] == ["Two men", "A hat"]
  assert found[0].answers == ("<0,0,500,500>", "<500,0,1000,500>".replace("1000", "999"))
  scores = score(task, found, ["<0,0,500,500>", "<0,0,200,100>"])
  assert means(scores) == {"recall_any": 1, "recall_merged": 1, "has_a_box": 1}
  scores = score(task, found, ["<0,0,400,400>", "<0,0,200,100>"])
  assert means(scores)["recall_merged"] == 0.5


def test_charts_and_documents(items):
  scores = score(tasks.get_task("chartqa"), items("chartqa"), ["14.5", "yes", "3"])
  assert means(scores) == {
    "relaxed_accuracy": pytest.approx(2 / 3),
    "relaxed_accuracy/augmented": 0,
    "relaxed_accuracy/human": 1,
  }
  scores = score(tasks.get_task("docvqa"), items("docvqa"), ["0.28", "University of  California,"])
  assert means(scores)["anls"] == pytest.approx((1 + 1 - 1 / 25) / 2)


@pytest.mark.parametrize(
  ("name", "written", "content"),
  [
    (
      "vqav2",
      "vqav2_answers.json",
      [{"question_id": 262148000, "answer": "a"}, {"question_id": 393225001, "answer": "b"}],
    ),
    (
      "textvqa",
      "textvqa_answers.json",
      [{"question_id": 34602, "answer": "a"}, {"question_id": 34603, "answer": "b"}],
    ),
    (
      "vizwiz",
      "vizwiz_answers.json",
      [
        {"image": "VizWiz_val_00000000.jpg", "answer": "a"},
        {"image": "VizWiz_val_00000001.jpg", "answer": "b"},
      ],
    ),
    (
      "gqa",
      "gqa_answers.json",
      [
        {"questionId": "201307251", "prediction": "a"},
        {"questionId": "201640614", "prediction": "b"},
      ],
    ),
    (
      "coco",
      "captions_test2014_mm1_jax_results.json",
      [{"image_id": 391895, "caption": "a"}, {"image_id": 60623, "caption": "b"}],
    ),
    (
      "docvqa",
      "docvqa_answers.json",
      [{"questionId": 49153, "answer": "a"}, {"questionId": 24580, "answer": "b"}],
    ),
    ("mm_vet", "mm_vet_answers.json", {"v1_0": "a", "v1_1": "b"}),
  ],
)
def test_answer_files(name, written, content, items, tmp_path):
  task = tasks.get_task(name)
  assert task.submission
  (path,) = task.submission(items(name)[:2], ["a", "b"], epath.Path(tmp_path))
  assert path.name == written
  assert json.loads(path.read_text()) == content


def test_llava_bench_answers(items, tmp_path):
  task = tasks.get_task("llava_bench")
  assert task.score is None
  assert task.submission
  (path,) = task.submission(items("llava_bench"), ["a\nb", "c"], epath.Path(tmp_path))
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line["question_id"] for line in lines] == [0, 1]
  assert lines[0]["text"] == "a\nb"
  assert set(lines[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}


def test_a_split_without_answers_is_read_and_written(tmp_path):
  questions = [{"question_id": 1, "image_id": 2, "question": "What?"}]
  name = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
  (tmp_path / name).write_text(json.dumps({"questions": questions}))
  task = tasks.get_task("vqav2")
  (item,) = tasks.read_items(task, tmp_path, "test-dev")
  assert item.answers == ()
  assert item.pictures == (epath.Path(tmp_path) / "COCO_test2015_000000000002.jpg",)
  with pytest.raises(EvalError, match="no published answer, first '1'"):
    score(task, [item], ["a"])


def test_likelihoods_and_texts_are_not_mixed(items):
  task, found = tasks.get_task("gqa"), items("gqa")
  with pytest.raises(EvalError, match="2 items have 1 generated answers"):
    score(task, found, ["a", ()])
  task = tasks.get_task("piqa")
  with pytest.raises(EvalError, match="1 items have 0 sets of likelihoods"):
    score(task, [Item("1", "?", answers=("a",))], ["a"])
