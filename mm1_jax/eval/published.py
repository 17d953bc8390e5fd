# SPDX-License-Identifier: Apache-2.0
"""MM1's own figures, and what differs between them and ours.

Few-shot: Table 3 of MM1 (arXiv 2403.09611). Rows that were not seen in the table itself are left
out: 4 shots of the 7B and 30B models, 16 shots of the 3B and 7B models. After fine-tuning: the
first version of the paper, as reviews of it give the figures; later versions differ, such as 75.9
instead of 67.8 on MMBench for the 3B model.

MM1's splits are those that users of its figures state, not the paper itself. Its prompts, and how
many draws of demonstrations it takes, were not published.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

MODELS = {"MM1-3B": 3e9, "MM1-7B": 7e9, "MM1-30B": 30e9}  # params of the decoder
FEW_SHOT_SOURCE = "MM1, Table 3 (arXiv 2403.09611)"
SFT_SOURCE = "MM1 after fine-tuning (arXiv 2403.09611, version 1, as reviews of it give them)"

# The mean over benchmarks of text alone, of an ablation with a 1.2B decoder and the mixture that
# was chosen (45% captions, 45% interleaved, 10% text; figure 5).
TEXT_CORE = 54.0
TEXT_CORE_TASKS = (
  "arc_easy",
  "arc_challenge",
  "piqa",
  "lambada",
  "winogrande",
  "hellaswag",
  "sciq",
  "triviaqa",
  "webqs",
)


class Published(NamedTuple):
  """What MM1 reports of one benchmark.

  Attributes:
    figures: in per cent, CIDEr x 100 or points, by `MODELS`; what was not seen is not in it.
    split: MM1's; "" where it is not known, None where the benchmark has one.
    metric: which of ours it is set beside: a name, the beginning of names ("cider_"), or "" for the
      headline.
    differs: in how it is measured, whatever our run was.
    source: where the figures are from.
  """

  figures: Mapping[str, float]
  split: str | None
  metric: str
  differs: tuple[str, ...]
  source: str


class _Benchmark(NamedTuple):
  task: str
  split: str | None
  metric: str = ""
  differs: tuple[str, ...] = ()


# --- Few-shot ---

_COLUMNS = (
  _Benchmark("coco", "test", "cider_"),
  _Benchmark("nocaps", "val", "cider_"),
  _Benchmark("textcaps", "val", "cider_"),
  _Benchmark("vqav2", "test-dev"),
  _Benchmark("textvqa", "val"),
  _Benchmark("vizwiz", "test-dev"),
  _Benchmark("okvqa", "val"),
)
_FEW_SHOT = {
  ("MM1-3B", 0): (73.5, 55.6, 63.3, 46.2, 29.4, 15.6, 26.1),
  ("MM1-3B", 4): (112.3, 99.7, 84.1, 57.9, 45.3, 38.0, 48.6),
  ("MM1-3B", 8): (114.6, 104.7, 88.8, 63.6, 44.6, 46.4, 48.4),
  ("MM1-7B", 0): (76.3, 61.0, 64.2, 47.8, 28.8, 15.6, 22.6),
  ("MM1-7B", 8): (116.3, 106.6, 88.2, 63.6, 46.3, 45.3, 51.4),
  ("MM1-30B", 0): (70.3, 54.6, 64.9, 48.9, 28.2, 14.5, 24.1),
  ("MM1-30B", 8): (123.1, 111.6, 92.9, 70.9, 49.4, 49.9, 58.3),
  ("MM1-30B", 16): (125.3, 116.0, 97.6, 71.9, 50.6, 57.9, 59.3),
}
# In the name of the metric. MM1 is said to count words with nlg-eval, which only splits at spaces.
_TOKENIZERS = {
  "cider_nlg_eval": "tokenizer: ours splits at spaces, as MM1's is said to",
  "": "tokenizer: MM1's is said to split at spaces, which gives lower CIDEr",
}
_OPENFLAMINGO = "protocol: ours is OpenFlamingo's, with beams of 3; MM1 is greedy"
_TEXT_DEMONSTRATIONS = "two demonstrations without pictures in ours; none in MM1's"

# --- After fine-tuning ---

_RULES = "answers: by rules in ours; by GPT in published figures"
_JUDGE = "judged by GPT; ours only writes the answer file"
_SFT = {
  _Benchmark("vqav2", ""): (82.0, 82.8, 83.7),
  _Benchmark("textvqa", ""): (71.9, 72.8, 73.5),
  _Benchmark("scienceqa_img", ""): (69.4, 72.6, 81.0),
  _Benchmark("mmmu", "validation"): (33.9, 37.0, 44.7),
  _Benchmark("mmmu", "test"): (33.7, 35.6, 40.3),
  _Benchmark("mathvista", "", "", (_RULES,)): (32.0, 35.9, 39.4),
  _Benchmark("mme", None, "perception"): (1482.5, 1529.3, 1637.6),
  _Benchmark("mme", None, "cognition"): (279.3, 328.9, 431.4),
  _Benchmark("mmbench", "dev", "", (_RULES,)): (67.8, 72.3, 75.1),
  _Benchmark("seed", None, "", ("questions about pictures, not videos",)): (68.8, 69.9, 72.1),
  _Benchmark("pope", None, "", ("metric: MM1's may be F1 or accuracy",)): (87.4, 86.6, 87.6),
  _Benchmark("llava_bench", None, "", (_JUDGE,)): (72.1, 81.5, 89.3),
  _Benchmark("mm_vet", None, "", (_JUDGE,)): (43.7, 42.1, 48.7),
}


def tasks() -> set[str]:
  """Returns the names of all benchmarks that have a figure."""
  return {column.task for column in (*_COLUMNS, *_SFT)} | set(TEXT_CORE_TASKS)


def beside(task: str, form: str, shots: int, split: str) -> list[Published]:
  """Returns what MM1 reports of a benchmark in a form and with as many shots.

  Where it has figures of several splits and one of them is ours, only that one.
  """
  if form == "sft" and shots == 0:
    found = [
      Published(
        dict(zip(MODELS, figures, strict=True)), of.split, of.metric, of.differs, SFT_SOURCE
      )
      for of, figures in _SFT.items()
      if of.task == task
    ]
    return [one for one in found if one.split == split] or found
  column = {of.task: number for number, of in enumerate(_COLUMNS)}.get(task)
  if form not in ("mm1", "openflamingo") or column is None:
    return []
  of = _COLUMNS[column]
  figures = {model: row[column] for (model, num), row in _FEW_SHOT.items() if num == shots}
  return [Published(figures, of.split, of.metric, of.differs, FEW_SHOT_SOURCE)] if figures else []


def differs(
  published: Published, *, metric: str, form: str, shots: int, split: str, limit: int | None
) -> list[str]:
  """Returns what differs between a published figure and ours, in words.

  Args:
    published: the figure.
    metric: ours that it is set beside.
    form: of ours.
    shots: of ours.
    split: of ours.
    limit: of items that were evaluated; None is all.
  """
  found = []
  if published.split == "":
    found.append(f"split: ours {split}, MM1's is not known")
  elif published.split not in (split, None):
    found.append(f"split: ours {split}, MM1's {published.split}")
  if limit is not None:
    found.append(f"ours: at most {limit:,} items of the split")
  if form == "openflamingo":
    found.append(_OPENFLAMINGO)
    found += [_TEXT_DEMONSTRATIONS] * (shots == 0)
  if published.metric == "cider_":
    found.append(_TOKENIZERS.get(metric, _TOKENIZERS[""]))
  return found + list(published.differs)


def nearest(params: float) -> str:
  """Returns the MM1 model whose size is nearest, by ratio."""
  return min(MODELS, key=lambda model: abs(math.log(MODELS[model] / params)))
