# SPDX-License-Identifier: Apache-2.0
"""MM1's figures: of benchmarks that there are, and only beside what corresponds."""

import pytest

from mm1_jax.eval import published
from mm1_jax.eval.tasks import TASKS


def differs(figures, **changes):
  ours = {"metric": "m", "form": "mm1", "shots": 4, "split": "val", "limit": None}
  return published.differs(figures, **(ours | changes))


def test_every_benchmark_is_one_of_ours():
  assert published.tasks() <= set(TASKS)


def test_every_split_is_one_of_the_benchmarks():
  for name in published.tasks():
    for form, shots in (("mm1", 0), ("sft", 0)):
      for split in TASKS[name].splits:
        for figures in published.beside(name, form, shots, split):
          # A phase of the server's test split, where the benchmark has no files for it.
          assert figures.split in (None, "", "test-dev", *TASKS[name].splits)


def test_rows_of_the_table():
  (coco,) = published.beside("coco", "mm1", 8, "test")
  assert coco.figures == {"MM1-3B": 114.6, "MM1-7B": 116.3, "MM1-30B": 123.1}
  (okvqa,) = published.beside("okvqa", "openflamingo", 0, "val")
  assert okvqa.figures == {"MM1-3B": 26.1, "MM1-7B": 22.6, "MM1-30B": 24.1}
  (vqav2,) = published.beside("vqav2", "sft", 0, "val")
  assert vqav2.figures == {"MM1-3B": 82.0, "MM1-7B": 82.8, "MM1-30B": 83.7}


def test_what_was_not_seen_is_left_out():
  (four,) = published.beside("coco", "mm1", 4, "test")
  assert list(four.figures) == ["MM1-3B"]
  (sixteen,) = published.beside("coco", "mm1", 16, "test")
  assert list(sixteen.figures) == ["MM1-30B"]


@pytest.mark.parametrize(
  ("task", "form", "shots"),
  [
    ("coco", "mm1", 5),
    ("coco", "text", 0),
    ("vqav2", "sft", 4),
    ("pope", "mm1", 0),
    ("x", "sft", 0),
  ],
)
def test_nothing_corresponds(task, form, shots):
  assert published.beside(task, form, shots, "val") == []


def test_the_split_that_is_ours_if_there_is_one():
  assert [f.split for f in published.beside("mmmu", "sft", 0, "test")] == ["test"]
  assert [f.split for f in published.beside("mmmu", "sft", 0, "dev")] == ["validation", "test"]


def test_what_differs():
  (vqav2,) = published.beside("vqav2", "mm1", 4, "val")
  assert differs(vqav2) == ["split: ours val, MM1's test-dev"]
  assert differs(vqav2, split="test-dev") == []
  assert "ours: at most 1,000 items of the split" in differs(vqav2, limit=1000)
  assert len(differs(vqav2, split="test-dev", form="openflamingo")) == 1
  assert len(differs(vqav2, split="test-dev", form="openflamingo", shots=0)) == 2
  (pope,) = published.beside("pope", "sft", 0, "test")
  assert not [line for line in differs(pope, split="test") if line.startswith("split")]
  (sqa,) = published.beside("scienceqa_img", "sft", 0, "test")
  assert differs(sqa, split="test") == ["split: ours test, MM1's is not known"]


def test_each_cider_names_its_tokenizer():
  (coco,) = published.beside("coco", "mm1", 4, "test")
  ptb, nlg_eval = (differs(coco, metric=f"cider_{t}", split="test") for t in ("ptb", "nlg_eval"))
  assert ptb != nlg_eval
  assert [line.startswith("tokenizer") for line in ptb + nlg_eval] == [True, True]


@pytest.mark.parametrize(
  ("params", "model"),
  [(1e6, "MM1-3B"), (4.5e9, "MM1-3B"), (4.7e9, "MM1-7B"), (14e9, "MM1-7B"), (1e12, "MM1-30B")],
)
def test_the_nearest_size_is_by_ratio(params, model):
  assert published.nearest(params) == model
