# SPDX-License-Identifier: Apache-2.0
"""Multiple choice about pictures: ScienceQA-IMG, AI2D, SEED, MMBench, MMMU, MathVista.

Each benchmark has a rule of its own for the choice that a reply names (`metrics/choices.py`).
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mm1_jax import untrusted
from mm1_jax.eval.metrics import choices as rules
from mm1_jax.eval.metrics.statistics import estimate
from mm1_jax.eval.metrics.strings import exact_match, math_vista_extract, math_vista_normalize
from mm1_jax.eval.task import EvalError, Item, Picture, Reply, Score, Scores, Task
from mm1_jax.eval.tasks import answer_files, files, prompts, scoring, vlmevalkit

SCIENCE_QA_SOURCE = "https://scienceqa.github.io (problems.json; images of train, val and test)"
AI2D_SOURCE = (
  "https://prior.allenai.org/projects/diagram-understanding (AI2D and its test ids), or "
  "AI2D_TEST.tsv of VLMEvalKit"
)
SEED_SOURCE = (
  "https://huggingface.co/datasets/AILab-CVC/SEED-Bench, or SEEDBench_IMG.tsv of VLMEvalKit"
)
MMBENCH_SOURCE = "https://github.com/open-compass/MMBench (TSV files)"
MMMU_SOURCE = "https://huggingface.co/datasets/MMMU/MMMU, or MMMU_DEV_VAL.tsv of VLMEvalKit"
MATH_VISTA_SOURCE = "https://huggingface.co/datasets/AI4Math/MathVista"
MMBENCH = {
  "dev": ("MMBench_DEV_EN.tsv", "mmbench_dev_en_20231003.tsv", "mmbench_dev_20230712.tsv"),
  "test": ("MMBench_TEST_EN.tsv", "mmbench_test_en_20231003.tsv", "mmbench_test_20230712.tsv"),
  "dev_cn": ("MMBench_DEV_CN.tsv", "mmbench_dev_cn_20231003.tsv"),
  "test_cn": ("MMBench_TEST_CN.tsv", "mmbench_test_cn_20231003.tsv"),
}
ROTATION = 1_000_000  # what MMBench's files add to a question's index for each rotation
PLACE = re.compile(r"<image (\d)>")  # MMMU's


def letter(item: Item) -> str:
  """Returns the letter of the right choice."""
  return chr(65 + item.right)


def letter_score(rule: Callable[[Item, str], str | None], group: str = "") -> Score:
  """Returns the share of replies of which a rule returns the right letter."""
  return scoring.mean_score(
    {"accuracy": lambda item, answer: float(rule(item, answer) == letter(item))}, group
  )


# --- ScienceQA ---


def read_science_qa(folder: epath.Path, split: str) -> list[Item]:
  """Questions with a picture: ScienceQA-IMG."""
  path = files.find(folder, ["problems.json", "data/scienceqa/problems.json"], SCIENCE_QA_SOURCE)
  pictures = files.below(folder, "images", "data/scienceqa/images")
  problems = files.read_json(path)
  if not isinstance(problems, dict):
    raise EvalError(f"'{path}' is not of the form of its benchmark: no object of problems.")

  def make(pair: tuple[str, Any]) -> Iterator[Item]:
    id, p = pair
    if p["split"] == split and p["image"]:
      yield Item(
        id,
        p["question"],
        (files.picture(pictures, f"{split}/{id}/{p['image']}"),),
        (p["choices"][p["answer"]],),
        tuple(p["choices"]),
        p["answer"],
        details={"hint": p.get("hint") or "", "subject": p.get("subject", "")},
      )

  return files.items(path, problems.items(), make)


def science_qa_text(item: Item) -> str:
  hint = item.details["hint"]
  context = f"Context: {hint}\n" if hint else ""
  return f"{context}{item.question}\n{prompts.lettered(item.choices)}\n{prompts.LETTER}"


# --- AI2D ---


def read_ai2d(folder: epath.Path, split: str) -> list[Item]:
  """Diagrams of the test ids, or the others; one file a diagram, in `questions/`."""
  path = files.find(folder, ["ai2d_test_ids.csv", "AI2D_TEST.tsv"], AI2D_SOURCE)
  if path.suffix == ".tsv":
    return vlmevalkit.read(path)
  test = set(files.read_text(path).split())
  pictures = files.below(folder, "images", "ai2d/images")
  paths = files.find_all(folder, ["questions/*.json", "ai2d/questions/*.json"], AI2D_SOURCE)
  chosen = [p for p in paths if (p.name.split(".")[0] in test) == (split == "test")]

  def rows(path: epath.Path) -> list[tuple[str, Any]]:
    diagram = files.read_json(path)
    try:
      return [(diagram["imageName"], pair) for pair in diagram["questions"].items()]
    except (KeyError, TypeError, AttributeError) as e:
      raise EvalError(f"'{path}' is not of the form of its benchmark ({e}).") from e

  def make(row: tuple[str, tuple[str, Any]]) -> Iterator[Item]:
    image, (question, q) = row
    right, texts = q["correctAnswer"], tuple(q["answerTexts"])
    picture = files.picture(pictures, image)
    yield Item(q["questionId"], question, (picture,), (texts[right],), texts, right)

  return files.items(paths[0].parent, (row for p in chosen for row in rows(p)), make)


def ai2d_rule(item: Item, answer: str) -> str | None:
  """Returns the upper-case letter before a full stop; else the right one if it is all there is."""
  if begins := re.match(r"\s*([A-Z])\.", answer):
    return begins[1]
  return letter(item) if exact_match(answer.strip(), [letter(item)]) else None


# --- SEED ---


def read_seed(folder: epath.Path, split: str) -> list[Item]:
  """Questions about a picture; those about videos are left out."""
  path = files.find(folder, ["SEED-Bench.json", "SEEDBench_IMG.tsv"], SEED_SOURCE)
  if path.suffix == ".tsv":
    return vlmevalkit.read(path)
  pictures = files.below(folder, "SEED-Bench-image")

  def make(q: Any) -> Iterator[Item]:
    if q["data_type"] == "image":
      texts = tuple(q[f"choice_{name}"] for name in "abcd")
      right = files.letter_index(q["answer"], texts)
      yield Item(
        str(q["question_id"]),
        q["question"],
        (files.picture(pictures, q["data_id"]),),
        (texts[right],),
        texts,
        right,
        details={"category": str(q["question_type_id"])},
      )

  return files.items(path, files.read_list(path, "questions"), make)


# --- MMBench ---


def read_mmbench(folder: epath.Path, split: str) -> list[Item]:
  """Each question in all rotations of its choices, one after the other.

  The files have them, `ROTATION` apart by index; where a file has none, they are made.
  """
  path = files.find(folder, files.choose(MMBENCH, split), MMBENCH_SOURCE)
  items = vlmevalkit.read(path)
  if wrong := [item.id for item in items if not item.id.isdigit() or not item.choices]:
    raise EvalError(f"'{path}', index '{wrong[0]}': it is no number, or has no choices.")
  if len({question_of(item) for item in items}) == len(items):
    items = [rotated for item in items for rotated in rotations(item)]
  return sorted(items, key=lambda item: (question_of(item), int(item.id)))


def question_of(item: Item) -> int:
  return int(item.id) % ROTATION


def rotations(item: Item) -> Iterator[Item]:
  """Yields a question with its choices moved by 0, 1, ... places."""
  n = len(item.choices)
  for k in range(n):
    moved = tuple(item.choices[(i + k) % n] for i in range(n))
    right = (item.right - k) % n if item.right >= 0 else -1
    id = str(int(item.id) + k * ROTATION)
    row = item.details["row"] | {chr(65 + i): text for i, text in enumerate(moved)} | {"index": id}
    if right >= 0:
      row["answer"] = chr(65 + right)
    details = {**item.details, "row": row, "group": str(question_of(item))}
    yield dataclasses.replace(item, id=id, choices=moved, right=right, details=details)


def mmbench_text(item: Item) -> str:
  hint = item.details.get("hint", "")
  asked = f"{hint} {item.question}" if hint else item.question
  options = f"There are several options:\n{prompts.lettered(item.choices)}"
  return f"{asked} {options}\n\n{prompts.LETTER}"


def mmbench_rule(item: Item, answer: str) -> str | None:
  by_letter = {chr(65 + i): text for i, text in enumerate(item.choices)}
  return rules.can_infer(answer, by_letter)


def circular_score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns the share of questions that are right in all rotations, in total and by category.

  A question's value is at its first item; the others have none.
  """
  answers = scoring.texts(items, replies)
  named = [mmbench_rule(item, answer) for item, answer in zip(items, answers, strict=True)]
  right = np.array([said == letter(item) for said, item in zip(named, items, strict=True)])
  of: dict[int, list[int]] = {}
  for i, item in enumerate(items):
    of.setdefault(question_of(item), []).append(i)
  values = rules.circular([[bool(right[i]) for i in rotated] for rotated in of.values()])
  first = [rotated[0] for rotated in of.values()]
  per_item = np.full(len(items), np.nan)
  per_item[first] = values
  asked = [items[i] for i in first]
  estimates = {
    "circular_accuracy": estimate(values),
    "accuracy": estimate(right.astype(float)),
    **scoring.by_group("circular_accuracy", values, asked, "l2-category"),
  }
  parts = [rotated for rotated in of.values() if len(rotated) < len(items[rotated[0]].choices)]
  counts = {
    "no choice found": sum(said is None for said in named),
    "questions without all rotations": len(parts),
  }
  return Scores(estimates, per_item, right, scoring.seen(answers) | counts)


# --- MMMU ---


def read_mmmu(folder: epath.Path, split: str) -> list[Item]:
  """Parquet files of the 30 subjects, or VLMEvalKit's TSV, with pictures inside."""
  names = [f"*/{split}-*.parquet", f"{split}-*.parquet", "MMMU_DEV_VAL.tsv"]
  paths = files.find_all(folder, names, MMMU_SOURCE)
  if paths[0].suffix == ".parquet":
    return files.all_items(paths, files.read_rows, _of_mmmu)
  rows = [item for item in vlmevalkit.read(paths[0]) if item.details.get("split") == split]
  if not rows:
    raise EvalError(f"'{paths[0]}' has no item of split '{split}'.")
  return [_placed(item, dict(enumerate(item.pictures, 1))) for item in rows]


def _of_mmmu(row: Mapping[str, Any]) -> Iterator[Item]:
  options = tuple(map(str, untrusted.parse_literal(row["options"])))
  pictures = {
    n: files.embedded(row[f"image_{n}"]) for n in range(1, 8) if row.get(f"image_{n}") is not None
  }
  answer, right = row["answer"], -1
  if row["question_type"] == "multiple-choice":
    # The test split has a question mark for an answer.
    right = -1 if answer == "?" else files.letter_index(answer, options)
    answers = () if right < 0 else (options[right],)
  else:
    options = ()
    answers = tuple(map(str, untrusted.parse_literal(answer))) if answer[:1] == "[" else (answer,)
    answers = () if answers == ("?",) else answers
  item = Item(row["id"], row["question"], (), answers, options, right)
  yield _placed(item, pictures)


def _placed(item: Item, pictures: Mapping[int, Picture]) -> Item:
  """Returns an item whose pictures are those that its text names, in order.

  Raises:
    EvalError: it names one that is not there.
  """
  texts = [item.question, *item.choices]
  numbers = [int(n) for text in texts for n in PLACE.findall(text)]
  if missing := [n for n in numbers if n not in pictures]:
    raise EvalError(f"item '{item.id}' has <image {missing[0]}>, and no such picture")
  subject = re.sub(r"^[a-z]+_|_\d+$", "", item.id)
  question, *choices = (PLACE.sub(prompts.IMAGE, text) for text in texts)
  return dataclasses.replace(
    item,
    question=question,
    choices=tuple(choices),
    answers=(choices[item.right],) if item.right >= 0 else item.answers,
    pictures=tuple(pictures[n] for n in numbers) or tuple(pictures.values()),
    details={**item.details, "subject": item.details.get("category", subject)},
  )


def mmmu_text(item: Item) -> str:
  if item.choices:
    return f"{item.question}\n{prompts.lettered(item.choices)}\n\n{prompts.LETTER}"
  return f"{item.question}\n\n{prompts.SHORT}"


def mmmu_score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns MMMU's accuracy; where no choice is found a random one counts, by the item's id."""
  answers, guessed, values = scoring.texts(items, replies), 0, []
  for item, answer in zip(items, answers, strict=True):
    if item.choices:
      rng = np.random.default_rng(zlib.crc32(item.id.encode()))
      before = rng.bit_generator.state
      values.append(float(rules.mmmu_choice(answer, item.choices, rng) == letter(item)))
      guessed += rng.bit_generator.state != before
    else:
      values.append(rules.mmmu_open_accuracy(answer, item.answers))
  per_item = np.array(values)
  estimates = {"accuracy": estimate(per_item)}
  estimates |= scoring.by_group("accuracy", per_item, items, "subject")
  counts = scoring.seen(answers) | {"random choices": guessed}
  return Scores(estimates, per_item, per_item == 1, counts)


# --- MathVista ---


def read_math_vista(folder: epath.Path, split: str) -> list[Item]:
  paths = files.find_all(
    folder, [f"data/{split}-*.parquet", f"{split}-*.parquet"], MATH_VISTA_SOURCE
  )
  return files.all_items(paths, files.read_rows, _of_math_vista)


def _of_math_vista(row: Mapping[str, Any]) -> Iterator[Item]:
  texts, answer = tuple(row["choices"] or ()), row["answer"]
  yield Item(
    row["pid"],
    row["question"],
    (files.embedded(row["decoded_image"]),),
    (answer,) if answer else (),
    texts,
    texts.index(answer) if texts and answer else -1,
    details={
      name: row[name] for name in ("question_type", "answer_type", "precision", "unit") if row[name]
    },
  )


def math_vista_text(item: Item) -> str:
  """Returns lmms-eval's `format` prompt."""
  unit = item.details.get("unit")
  asked = f"{item.question} (Unit: {unit})" if unit else item.question
  if item.choices:
    return f"{asked}\n{prompts.lettered(item.choices)}\n{prompts.LETTER}"
  return f"{asked}\n{_math_vista_hint(item)}"


def _math_vista_hint(item: Item) -> str:
  number = "Answer the question using a single "
  places = {1: "one decimal place", 2: "two decimal places"}
  match item.details.get("answer_type"):
    case "integer":
      return f"{number}integer number."
    case "float":
      exactness = places.get(int(item.details.get("precision", 0)))
      return f"{number}floating-point number" + (f" with {exactness}." if exactness else ".")
    case "list":
      return "Answer the question using a Python list."
  return prompts.SHORT


def math_vista_accuracy(item: Item, answer: str) -> float:
  kind, precision = item.details.get("answer_type", "text"), item.details.get("precision")
  said = math_vista_extract(answer.strip(), item.choices, kind)
  if not said:  # MathVista's program would take the shortest choice
    return 0.0
  normal = math_vista_normalize(said, item.choices, kind, precision)
  return float(normal is not None and normal.strip() == item.answers[0].strip())


# --- Tasks ---

TASKS = (
  Task(
    name="scienceqa_img",
    title="ScienceQA-IMG",
    read=read_science_qa,
    splits=("train", "val", "test"),
    split="test",
    forms={"sft": prompts.chat(science_qa_text)},
    score=letter_score(lambda item, answer: rules.science_qa(answer), "subject"),
    metric="accuracy; the letter alone, or first and with a full stop (LLaVA's rule)",
    source=SCIENCE_QA_SOURCE,
    files=("problems.json",),
  ),
  Task(
    name="ai2d",
    title="AI2D",
    read=read_ai2d,
    splits=("train", "test"),
    split="test",
    forms={"sft": prompts.letter()},
    score=letter_score(ai2d_rule),
    metric="accuracy; the letter alone, or first and with a full stop",
    submission=answer_files.vlmevalkit("AI2D_TEST"),
    source=AI2D_SOURCE,
    files=("ai2d_test_ids.csv", "questions/*.json"),
  ),
  Task(
    name="seed",
    title="SEED-Bench (image)",
    read=read_seed,
    splits=("test",),
    split="test",
    forms={"sft": prompts.letter()},
    score=letter_score(lambda item, answer: rules.first_letter(answer), "category"),
    metric="accuracy; the first character",
    submission=answer_files.vlmevalkit("SEEDBench_IMG"),
    source=SEED_SOURCE,
    files=("SEED-Bench.json",),
  ),
  Task(
    name="mmbench",
    title="MMBench",
    read=read_mmbench,
    splits=tuple(MMBENCH),
    split="dev",
    forms={"sft": prompts.chat(mmbench_text, 64)},
    score=circular_score,
    metric="circular accuracy: right in all rotations of the choices; MMBench's rules, without GPT",
    submission=answer_files.vlmevalkit("MMBench_DEV_EN"),
    source=MMBENCH_SOURCE,
    files=MMBENCH["dev"][:1],
  ),
  Task(
    name="mmmu",
    title="MMMU",
    read=read_mmmu,
    splits=("dev", "validation", "test"),
    split="validation",
    forms={"sft": prompts.chat(mmmu_text, 128)},
    score=mmmu_score,
    metric="accuracy by MMMU's parser; a random choice where it finds none, by the item's id",
    submission=answer_files.vlmevalkit("MMMU_DEV_VAL"),
    source=MMMU_SOURCE,
    files=("SUBJECT/validation-*.parquet",),
  ),
  Task(
    name="mathvista",
    title="MathVista",
    read=read_math_vista,
    splits=("testmini", "test"),
    split="testmini",
    forms={"sft": prompts.chat(math_vista_text, 128)},
    score=scoring.mean_score({"accuracy": math_vista_accuracy}, "question_type"),
    metric="accuracy by MathVista's rules; for published figures GPT extracts the answers",
    source=MATH_VISTA_SOURCE,
    files=("data/testmini-*.parquet",),
  ),
)
