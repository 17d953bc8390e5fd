# SPDX-License-Identifier: Apache-2.0
"""Official sets of documents, tables and charts, and text to be read off."""

import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from mm1_jax import untrusted
from mm1_jax.data.build.official_rows import LETTER, ROLES, Row, choice, most_frequent, row, short
from mm1_jax.data.tokenizer import IMAGE

READ = "Read all the text in the image."
WRITE_PAGE = "Write the HTML code of this web page."


def docvqa(data: Any) -> Iterator[Row]:
  """DocVQA and InfographicVQA; of several right answers the first."""
  for q in data["data"]:
    name = q.get("image_local_name") or os.path.basename(q["image"])
    yield row(q["questionId"], name, (short(q["question"]), q["answers"][0]))


def chartqa(questions: Any) -> Iterator[Row]:
  for i, q in enumerate(questions):
    yield row(f"{q['imgname']}/{i}", q["imgname"], (short(q["query"]), q["label"]))


def dvqa(questions: Any) -> Iterator[Row]:
  for q in questions:
    yield row(q["question_id"], q["image"], (short(q["question"]), q["answer"]))


def stvqa(data: Any) -> Iterator[Row]:
  """`train_task_3.json`; of several right answers the first."""
  for q in data["data"]:
    yield row(q["question_id"], q["file_path"], (short(q["question"]), q["answers"][0]))


def screenqa(questions: Any) -> Iterator[Row]:
  """A file of `answers_and_bboxes` or `short_answers`; pictures are Rico's `combined/ID.jpg`.

  The first has whole sentences, of which the most frequent is the answer; the second has short ones
  that are all right, of which it is the first (github.com/google-research-datasets/screen_qa).
  """
  for i, q in enumerate(questions):
    id, truth = q["image_id"], q["ground_truth"]
    if isinstance(truth[0], str):
      turn = short(q["question"]), truth[0]
    else:
      turn = q["question"].strip(), most_frequent([said["full_answer"] for said in truth])
    yield row(f"{id}/{i}", f"{id}.jpg", turn)


def design2code(*folders: pathlib.Path) -> Iterator[Row]:
  """Folders with `ID.html` and its screenshot `ID.png`, as published (SALT-NLP/Design2Code).

  The set was made to test models, and its pages are of C4's validation part.
  """
  for folder in folders:
    pages = sorted(folder.glob("*.html"))
    if not pages:
      raise FileNotFoundError(f"'{folder}' has no *.html")
    for page in pages:
      yield row(page.stem, f"{page.stem}.png", (WRITE_PAGE, page.read_text().strip()))


def tabmwp(problems: Any) -> Iterator[Row]:
  """`problems_train.json`; a problem's table is the picture ID.png."""
  for id, p in problems.items():
    question = f"{p['question']} (Unit: {p['unit']})" if p["unit"] else p["question"]
    if p["choices"]:
      turn = choice(question, p["choices"], p["choices"].index(p["answer"]))
    else:
      turn = short(question), p["answer"]
    yield row(id, f"{id}.png", turn)


def arxivqa(*questions: Any) -> Iterator[Row]:
  """JSON lines; an answer that names none of the options by its letter is unchanged."""
  for q in questions:
    # Options come with letters of their own, most of them as "A) ...".
    options = [re.sub(r"^\s*[A-Z]\s*[).:]\s*", "", option) for option in q["options"]]
    letters = [chr(65 + i) for i in range(len(options))]
    label = q["label"].strip()
    match = re.match(r"([A-Z])(?![A-Za-z])", label)
    known = match is not None and match[1] in letters
    lines = [f"{letter}. {text}" for letter, text in zip(letters, options, strict=True)]
    question = "\n".join([q["question"].strip(), *lines, *([LETTER] if known else [])])
    yield row(q["id"], q["image"], (question, match[1] if match and known else label))


def synthdog(*documents: Any) -> Iterator[Row]:
  """`metadata.jsonl` as SynthDoG writes it; the text in reading order is the answer."""
  for d in documents:
    text = untrusted.loads(d["ground_truth"])["gt_parse"]["text_sequence"]
    yield row(os.path.splitext(d["file_name"])[0], d["file_name"], (READ, text.strip()))


def doc_downstream(*samples: Any) -> Iterator[Row]:
  """mPLUG's DocDownstream: JSON lines with `messages` and `<|image|>`.

  They hold DocVQA, InfographicsVQA, DeepForm, Kleister Charity, WikiTableQuestions, TabFact,
  ChartQA, TextVQA, TextCaps and VisualMRC, forms and tables drawn as pictures.
  """
  for i, s in enumerate(samples):
    said = [
      {"from": ROLES[m["role"]], "value": m["content"].replace("<|image|>", IMAGE)}
      for m in s["messages"]
    ]
    id = f"{s['dataset_name']}/{i}" if "dataset_name" in s else str(i)
    yield {"id": id, "image": s["image"], "conversations": said}
