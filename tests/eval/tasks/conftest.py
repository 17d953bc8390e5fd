# SPDX-License-Identifier: Apache-2.0
"""Each benchmark's official files with two or three items, in exactly the official form."""

import base64
import csv
import io
import json
import pathlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mm1_jax.eval import tasks


def picture_bytes(color: str = "red") -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (4, 4), color).save(file, "PNG")
  return file.getvalue()


def base64_of(color: str) -> str:
  return base64.b64encode(picture_bytes(color)).decode()


def write(path: pathlib.Path, text: str | bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text.encode() if isinstance(text, str) else text)


def write_json(path: pathlib.Path, value: Any) -> None:
  write(path, json.dumps(value))


def write_lines(path: pathlib.Path, rows: Sequence[Any]) -> None:
  write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_tsv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """As pandas writes them: quotes only where needed."""
  file = io.StringIO()
  table = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
  table.writeheader()
  table.writerows(rows)
  write(path, file.getvalue())


def write_parquet(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows), path)


def pictures(folder: pathlib.Path, *names: str) -> None:
  for name in names:
    write(folder / name, picture_bytes())


# --- Captions ---


def coco(folder: pathlib.Path) -> None:
  def image(split: str, id: int, *captions: str) -> dict[str, Any]:
    name = f"COCO_val2014_{id:012d}.jpg"
    pictures(folder, f"val2014/{name}")
    return {
      "filepath": "val2014",
      "filename": name,
      "split": split,
      "imgid": id,
      "cocoid": id,
      "sentids": [],
      "sentences": [{"raw": raw, "tokens": raw.lower().split()} for raw in captions],
    }

  images = [
    image("test", 391895, "A man on a red moped.", "A man rides a moped on a dirt road."),
    image("test", 60623, "A young girl holds a spoon.", "A girl with a spoon in her mouth."),
    image("restval", 318219, "A boy wears headphones."),
    image("train", 554625, "A boy at a computer."),
  ]
  write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def nocaps(folder: pathlib.Path) -> None:
  images = [
    {"id": i, "file_name": f"{i:016x}.jpg", "width": 4, "height": 4, "domain": domain}
    for i, domain in enumerate(("in-domain", "near-domain", "out-domain"))
  ]
  for image in images:
    image |= {"license": 0, "open_images_id": image["file_name"][:-4], "coco_url": ""}
    pictures(folder, f"val/{image['file_name']}")
  words = ("A baby is in a crib.", "Two rabbits eat lettuce.", "A man plays a red harp.")
  notes = [
    {"image_id": i, "id": 2 * i + j, "caption": f"{caption[:-1]}{end}"}
    for i, caption in enumerate(words)
    for j, end in enumerate((".", " today."))
  ]
  value = {"info": {}, "licenses": [], "images": images, "annotations": notes}
  write_json(folder / "nocaps_val_4500_captions.json", value)


def textcaps(folder: pathlib.Path) -> None:
  rows = []
  for id, words in (
    ("0054c91397f2fe05", "A bottle of ale"),
    ("01a7a5bb1cf2ad44", "The clock is at 3"),
  ):
    pictures(folder, f"train_images/{id}.jpg")
    captions = [f"{words}.", f"{words} here."]
    rows += [
      {
        "image_id": id,
        "image_name": id,
        "caption_id": 5 * len(rows) + i,
        "caption_str": caption,
        "reference_strs": captions,
        "set_name": "val",
        "image_path": f"train/{id}.jpg",
      }
      for i, caption in enumerate(captions)
    ]
  write_json(folder / "TextCaps_0.1_val.json", {"dataset_type": "val", "data": rows})


# --- Visual questions ---


def ten(*answers: str) -> list[dict[str, Any]]:
  said = [*answers, *[answers[0]] * 10][:10]
  return [
    {"answer": answer, "answer_confidence": "yes", "answer_id": i}
    for i, answer in enumerate(said, 1)
  ]


def coco_vqa(folder: pathlib.Path, prefix: str) -> None:
  questions = [
    {"question_id": 262148000, "image_id": 262148, "question": "Where is he looking?"},
    {"question_id": 393225001, "image_id": 393225, "question": "How many cups?"},
  ]
  for question in questions:
    pictures(folder, f"val2014/COCO_val2014_{question['image_id']:012d}.jpg")
  notes = [
    {
      "question_id": question["question_id"],
      "image_id": question["image_id"],
      "question_type": "none of the above",
      "answer_type": kind,
      "multiple_choice_answer": answers[0],
      "answers": ten(*answers),
    }
    for question, kind, answers in zip(
      questions, ("other", "number"), (("down", "at table"), ("2", "two", "3")), strict=True
    )
  ]
  head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
  first = "v2_" if prefix else ""
  write_json(
    folder / f"{first}OpenEnded_mscoco_val2014_questions.json",
    {**head, "task_type": "Open-Ended", "questions": questions},
  )
  write_json(folder / f"{first}mscoco_val2014_annotations.json", {**head, "annotations": notes})


def vizwiz(folder: pathlib.Path) -> None:
  rows = [
    {
      "image": f"VizWiz_val_{i:08d}.jpg",
      "question": question,
      "answers": [{"answer": a, "answer_confidence": "yes"} for a in [answer] * 9 + ["unsuitable"]],
      "answer_type": kind,
      "answerable": int(kind == "other"),
    }
    for i, (question, answer, kind) in enumerate(
      [
        ("Ok. What color is this?", "green", "other"),
        ("what is it", "unanswerable", "unanswerable"),
      ]
    )
  ]
  pictures(folder, *(f"val/{row['image']}" for row in rows))
  write_json(folder / "Annotations/val.json", rows)


def textvqa(folder: pathlib.Path) -> None:
  rows = [
    {
      "question": question,
      "image_id": f"00{id}",
      "image_classes": ["Bottle"],
      "flickr_original_url": "",
      "image_width": 4,
      "image_height": 4,
      "answers": [answer] * 8 + ["answering does not require reading text in the image", "x"],
      "question_id": id,
      "set_name": "val",
    }
    for id, question, answer in [
      (34602, "what is the brand of this camera?", "nous les gosses"),
      (34603, "what Does the small white Text spell?", "copenhagen"),
    ]
  ]
  pictures(folder, *(f"train_images/{row['image_id']}.jpg" for row in rows))
  write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": rows})


def gqa(folder: pathlib.Path) -> None:
  def question(image: str, text: str, answer: str, kind: str) -> dict[str, Any]:
    pictures(folder, f"images/{image}.jpg")
    types = {"structural": kind, "semantic": "rel", "detailed": ""}
    return {
      "question": text,
      "imageId": image,
      "answer": answer,
      "fullAnswer": f"{answer}.",
      "isBalanced": True,
      "types": types,
    }

  questions = {
    "201307251": question("n161313", "Is it overcast?", "no", "verify"),
    "201640614": question("n235859", "Who is wearing the dress?", "women", "query"),
  }
  write_json(folder / "testdev_balanced_questions.json", questions)


# --- Choices ---


def science_qa(folder: pathlib.Path) -> None:
  def problem(split: str, image: str | None, hint: str = "") -> dict[str, Any]:
    return {
      "question": "Which state is farthest north?",
      "choices": ["West Virginia", "Louisiana", "Arizona"],
      "answer": 0,
      "hint": hint,
      "image": image,
      "task": "closed choice",
      "grade": "grade2",
      "subject": "social science",
      "split": split,
      "lecture": "",
      "solution": "",
    }

  problems = {
    "4": problem("test", "image.png", "Look at the map."),
    "5": problem("test", None),
    "6": problem("train", "image.png"),
    "7": problem("test", "image.png"),
  }
  pictures(folder, "images/test/4/image.png", "images/test/7/image.png")
  write_json(folder / "problems.json", problems)


def ai2d(folder: pathlib.Path) -> None:
  def diagram(number: int, questions: dict[str, list[str]]) -> None:
    name = f"{number}.png"
    pictures(folder, f"images/{name}")
    value = {
      "image": name,
      "imageName": name,
      "questions": {
        text: {
          "abcLabel": False,
          "answerTexts": texts,
          "correctAnswer": 3,
          "questionId": f"{name}-{i}",
        }
        for i, (text, texts) in enumerate(questions.items())
      },
    }
    write_json(folder / f"questions/{name}.json", value)

  diagram(0, {"What is a predator?": ["owl", "leaf", "grass", "fox"]})
  diagram(1, {"Which is first?": ["egg", "egg", "moth", "egg"]})  # so are some of its choices
  diagram(2, {})  # and some have no question
  diagram(3, {"What is round?": ["a", "b", "c", "d"]})
  write(folder / "ai2d_test_ids.csv", "0\n1\n2\n")


def seed(folder: pathlib.Path) -> None:
  def question(id: str, kind: str) -> dict[str, Any]:
    return {
      "answer": "C",
      "choice_a": "One",
      "choice_b": "Two",
      "choice_c": "Three",
      "choice_d": "Four",
      "data_id": f"{id}_1",
      "data_type": kind,
      "question": "How many towels are there?",
      "question_id": id,
      "question_type_id": 5,
    }

  rows = [question("101669", "image"), question("35", "video"), question("101670", "image")]
  pictures(folder, "SEED-Bench-image/101669_1", "SEED-Bench-image/101670_1")
  value = {"question_type": {"Instances Counting": 5}, "questions": rows}
  write_json(folder / "SEED-Bench.json", value)


def mmbench(folder: pathlib.Path) -> None:
  shared = {"category": "image_topic", "l2-category": "coarse_perception", "split": "dev"}
  base = {"source": "wiki", "comment": ""}
  rows = [
    {
      "index": i + 1_000_000 * k,
      "question": question,
      "hint": hint,
      **dict(zip("ABC", [*choices[k:], *choices[:k], *[""] * 3][:3], strict=True)),
      "answer": "ABC"[(right - k) % len(choices)],
      **shared,
      # A rotated row has the first one's picture by its index.
      "image": base64_of("green") if k == 0 else str(i),
      **base,
    }
    for i, question, hint, choices, right in [
      (241, "What is it?", "Think\tof\nanimals.", ["cat", "dog", "None"], 2),
      (252, 'Is it "red"?', "", ["yes", "no"], 0),
    ]
    for k in range(len(choices))
  ]
  write_tsv(folder / "MMBench_DEV_EN.tsv", rows)


def mmmu(folder: pathlib.Path) -> None:
  def row(id: str, kind: str, question: str, options: list[str], answer: str, n: int):
    images = {
      f"image_{i}": {"bytes": picture_bytes(), "path": f"{id}_{i}.png"} if i <= n else None
      for i in range(1, 8)
    }
    return {
      "id": id,
      "question": question,
      "options": str(options),
      "explanation": "",
      **images,
      "img_type": "['Tables']",
      "answer": answer,
      "topic_difficulty": "Medium",
      "question_type": kind,
      "subfield": "Managerial Accounting",
    }

  several = "Compare <image 2> with <image 1>: which is it?"
  write_parquet(
    folder / "Accounting/validation-00000-of-00001.parquet",
    [
      row("validation_Accounting_1", "multiple-choice", several, ["$6", "it's <image 1>"], "B", 2),
      row("validation_Accounting_2", "open", "How much? <image 1>", [], "['$8', '8']", 1),
    ],
  )
  write_parquet(
    folder / "Art_Theory/validation-00000-of-00001.parquet",
    [row("validation_Art_Theory_1", "open", "<image 1> What year?", [], "1820", 1)],
  )


def math_vista(folder: pathlib.Path) -> None:
  def row(pid: str, question: str, kind: str, answer: str, **more: Any) -> dict[str, Any]:
    empty = {"choices": None, "unit": None, "precision": None}
    return {
      "pid": pid,
      "question": question,
      "image": f"images/{pid}.jpg",
      "decoded_image": {"bytes": picture_bytes(), "path": f"{pid}.jpg"},
      "question_type": "multi_choice" if "choices" in more else "free_form",
      "answer_type": kind,
      "answer": answer,
      "metadata": {"split": "testmini"},
      "query": "",
      **empty,
      **more,
    }

  rows = [
    row("1", "Find x.", "float", "1.2", precision=1.0, unit="cm"),
    row("2", "Is it equal?", "text", "No", choices=["Yes", "No"]),
    row("3", "How many?", "integer", "4"),
    row("4", "Which ones?", "list", "[1, 2]"),
  ]
  write_parquet(folder / "data/testmini-00000-of-00001-725687bf7a18d64b.parquet", rows)


# --- Yes or no ---


def pope(folder: pathlib.Path) -> None:
  for kind in ("random", "popular", "adversarial"):
    rows = [
      {"question_id": i, "image": f"COCO_val2014_{i:012d}.jpg", "text": text, "label": label}
      for i, (text, label) in enumerate(
        [("Is there a snowboard in the image?", "yes"), (f"Is there a {kind} cup?", "no")], 1
      )
    ]
    pictures(folder, *(f"val2014/{row['image']}" for row in rows))
    write_lines(folder / f"coco_pope_{kind}.json", rows)


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def mme(folder: pathlib.Path) -> None:
  ask = "Please answer yes or no."
  for category in PERCEPTION + COGNITION:
    apart = category in ("posters", "celebrity", "scene", "landmark", "artwork")
    for name in ("0001", "0002"):
      texts = f"Is it A? {ask}\tYes\nIs it B? {ask}\tNo\n"
      inside = folder / "MME_Benchmark_release_version" / category
      suffix = ".png" if category in COGNITION else ".jpg"
      write(inside / ("questions_answers_YN" if apart else "") / f"{name}.txt", texts)
      pictures(inside / ("images" if apart else ""), f"{name}{suffix}")


# --- Documents, pairs, grounding, judged ---


def documents(folder: pathlib.Path, name: str, place: str, local: bool) -> None:
  rows = [
    {
      "questionId": id,
      "question": question,
      "image": f"documents/{id}.png",
      "docId": 14465,
      "ucsf_document_id": "pybv0228",
      "answers": answers,
      "data_split": "val",
    }
    for id, question, answers in [
      (49153, "What is the actual value per 1000?", ["0.28"]),
      (24580, "Who signed?", ["university of california", "UC"]),
    ]
  ]
  for row in rows:
    pictures(folder, f"{place}/{row['questionId']}.png")
    if local:
      row["image_local_name"] = f"{row['questionId']}.png"
  head = {"dataset_name": "Q", "dataset_version": "1.0", "dataset_split": "val"}
  write_json(folder / name, {**head, "data": rows})


def chartqa(folder: pathlib.Path) -> None:
  human = [
    {"imgname": "41699051005347.png", "query": "How many food items?", "label": "14"},
    {"imgname": "41699051005347.png", "query": "Is it above 50%?", "label": "Yes"},
  ]
  made = [{"imgname": "multi_col_1.png", "query": "What was it in 2018?", "label": "3.5"}]
  pictures(folder, "test/png/41699051005347.png", "test/png/multi_col_1.png")
  write_json(folder / "test/test_human.json", human)
  write_json(folder / "test/test_augmented.json", made)


def nlvr2(folder: pathlib.Path) -> None:
  rows = [
    {
      "identifier": f"test1-0-{i}-0",
      "sentence": sentence,
      "label": label,
      "left_url": "",
      "right_url": "",
      "writer": 7,
      "validation": {},
      "synset": "acorn",
      "query": "acorns0",
    }
    for i, (sentence, label) in enumerate(
      [("There is an empty glass.", "False"), ("A dog.", "True")]
    )
  ]
  pictures(folder, *(f"test1/test1-0-{i}-img{side}.png" for i in (0, 1) for side in (0, 1)))
  write_lines(folder / "test1.json", rows)


def refcoco(folder: pathlib.Path, name: str, refs: str) -> None:
  sentence = lambda text: {"tokens": text.split(), "raw": text, "sent_id": 0, "sent": text}
  ref = lambda id, split, ann, *said: {
    "sent_ids": [],
    "file_name": f"COCO_train2014_000000581857_{id}.jpg",
    "ann_id": ann,
    "ref_id": id,
    "image_id": 581857,
    "split": split,
    "sentences": [sentence(text) for text in said],
    "category_id": 1,
  }
  rows = [ref(0, "val", 7, "lady on the right ", "woman"), ref(1, "train", 8, "man")]
  image = {
    "id": 581857,
    "file_name": "COCO_train2014_000000581857.jpg",
    "width": 640,
    "height": 480,
  }
  boxes = [(7, [320.0, 120.0, 160.0, 240.0]), (8, [0.0, 0.0, 64.0, 48.0])]
  notes = [{"id": id, "image_id": 581857, "bbox": box, "category_id": 1} for id, box in boxes]
  pictures(folder, f"train2014/{image['file_name']}")
  write(folder / name / refs, pickle.dumps(rows, protocol=2))
  write_json(folder / name / "instances.json", {"images": [image], "annotations": notes})


FLICKR_XML = """<annotation><filename>36979.jpg</filename>
<size><width>100</width><height>200</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>50</xmax><ymax>100</ymax></bndbox></object>
<object><name>1</name><bndbox><xmin>51</xmin><ymin>1</ymin><xmax>100</xmax><ymax>100</ymax></bndbox></object>
<object><name>2</name><scene>1</scene><nobndbox>0</nobndbox></object>
<object><name>3</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>
</annotation>"""


def flickr30k(folder: pathlib.Path) -> None:
  write(folder / "test.txt", "36979\n")
  sentences = (
    "[/EN#1/people Two men] stand in [/EN#2/scene a park] .\n[/EN#3/clothing A hat] on a head .\n"
  )
  write(folder / "Sentences/36979.txt", sentences)
  write(folder / "Annotations/36979.xml", FLICKR_XML)
  pictures(folder, "flickr30k-images/36979.jpg")


def llava_bench(folder: pathlib.Path) -> None:
  rows = [
    {"question_id": i, "image": "001.jpg", "text": text, "category": category}
    for i, (text, category) in enumerate(
      [("What is the name of this famous sight?", "conv"), ("Describe it.", "detail")]
    )
  ]
  pictures(folder, "images/001.jpg")
  write_lines(folder / "questions.jsonl", rows)


def mm_vet(folder: pathlib.Path) -> None:
  value = {
    f"v1_{i}": {
      "imagename": f"v1_{i}.png",
      "imagesource": "",
      "question": "What is x in the equation?",
      "answer": "-1<AND>-5",
      "capability": ["ocr", "math"],
    }
    for i in range(2)
  }
  pictures(folder, "images/v1_0.png", "images/v1_1.png")
  write_json(folder / "mm-vet.json", value)


# --- Text ---


def arc(folder: pathlib.Path, name: str) -> None:
  def question(id: str, answer: str, labels: str) -> dict[str, Any]:
    texts = ["heavy", "fast", "red", "old"]
    choices = [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)]
    return {
      "id": id,
      "question": {"stem": "What is a car?", "choices": choices},
      "answerKey": answer,
    }

  rows = [question("Mercury_1", "B", "ABCD"), question("NYSEDREGENTS_2", "3", "1234")]
  write_lines(folder / name, rows)


def piqa(folder: pathlib.Path) -> None:
  rows = [
    {"goal": "How do I boil eggs?", "sol1": "In water.", "sol2": "In sand."},
    {"goal": "Dry a shoe", "sol1": "in the fridge", "sol2": "in the sun"},
  ]
  write_lines(folder / "valid.jsonl", rows)
  write(folder / "valid-labels.lst", "0\n1\n")


def social_iqa(folder: pathlib.Path) -> None:
  row = {
    "context": "Tracy didn't go home.",
    "question": "What does Tracy need to do before this?",
    "answerA": "make a plan",
    "answerB": "Go home",
    "answerC": "Find somewhere",
  }
  write_lines(folder / "dev.jsonl", [row, {**row, "context": "Tracy slept."}])
  write(folder / "dev-labels.lst", "3\n1\n")


def hellaswag(folder: pathlib.Path) -> None:
  row = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "[header] How to [title] A man is  on a roof.",
    "ctx_b": "he",
    "ctx": "A man is on a roof. he",
    "split": "val",
    "split_type": "indomain",
    "label": 3,
    "endings": [
      "sleeps [substeps] now.",
      "is ripping.",
      "is rappelling.",
      "starts [title] pulling.",
    ],
    "source_id": "activitynet~v_-JhWjGDPHMY",
  }
  write_lines(folder / "hellaswag_val.jsonl", [row, {**row, "label": 0}])


def winogrande(folder: pathlib.Path) -> None:
  sentence = "Sarah was better than Maria so _ always got the easier cases."
  rows = [
    {"qID": f"3FCO4VKOZ4BJQ6-{i}", "sentence": sentence, "option1": "Sarah", "option2": "Maria"}
    | {"answer": str(i)}
    for i in (1, 2)
  ]
  write_lines(folder / "dev.jsonl", rows)


def boolq(folder: pathlib.Path) -> None:
  rows = [
    {"question": "is it red", "title": "Ethanol", "answer": answer, "passage": "It is green."}
    for answer in (False, True)
  ]
  write_lines(folder / "dev.jsonl", rows)


def lambada(folder: pathlib.Path) -> None:
  rows = [{"text": "He took out his gun and aimed at  Megan"}, {"text": "She said\nyes, Will"}]
  write_lines(folder / "lambada_test.jsonl", rows)


def sciq(folder: pathlib.Path) -> None:
  row = {
    "question": "What is fast?",
    "distractor3": "stone",
    "distractor1": "tree",
    "distractor2": "sand",
    "correct_answer": "light",
    "support": " Light is fast.",
  }
  write_json(folder / "test.json", [row, {**row, "support": ""}])


def triviaqa(folder: pathlib.Path) -> None:
  def question(id: str, text: str, aliases: list[str]) -> dict[str, Any]:
    answer = {
      "Aliases": aliases,
      "NormalizedAliases": [alias.lower() for alias in aliases],
      "Value": aliases[0],
      "Type": "WikipediaEntity",
    }
    return {"Question": text, "QuestionId": id, "QuestionSource": "", "Answer": answer}

  rows = [
    question("tc_2", "Who won in 1930?", ["Sinclair Lewis", "Harry Sinclair Lewis"]),
    question("tc_33", "Which city?", ["New York"]),
  ]
  value = {"Data": rows, "Domain": "Web", "Split": "dev", "Version": 1.0, "VerifiedEval": False}
  write_json(folder / "qa/web-dev.json", value)


def webqs(folder: pathlib.Path) -> None:
  def question(text: str, target: str) -> dict[str, Any]:
    return {"url": "http://www.freebase.com/view/en/x", "targetValue": target, "utterance": text}

  rows = [
    question(
      "what does jamaica speak?",
      '(list (description "Jamaican English Language") (description "Jamaican English"))',
    ),
    question("who is it?", '(list (description "Mc \\"Q\\"") (description 1972))'),
  ]
  write_json(folder / "webquestions.examples.test.json", rows)


BUILDERS: dict[str, Callable[[pathlib.Path], None]] = {
  "coco": coco,
  "nocaps": nocaps,
  "textcaps": textcaps,
  "vqav2": lambda folder: coco_vqa(folder, "v2_"),
  "okvqa": lambda folder: coco_vqa(folder, ""),
  "vizwiz": vizwiz,
  "textvqa": textvqa,
  "gqa": gqa,
  "scienceqa_img": science_qa,
  "ai2d": ai2d,
  "seed": seed,
  "mmbench": mmbench,
  "mmmu": mmmu,
  "mathvista": math_vista,
  "pope": pope,
  "mme": mme,
  "docvqa": lambda f: documents(f, "val_v1.0_withQT.json", "spdocvqa_images", False),
  "infovqa": lambda f: documents(
    f, "infographicsVQA_val_v1.0_withQT.json", "infographicsvqa_images", True
  ),
  "chartqa": chartqa,
  "nlvr2": nlvr2,
  "refcoco": lambda folder: refcoco(folder, "refcoco", "refs(unc).p"),
  "refcoco_plus": lambda folder: refcoco(folder, "refcoco+", "refs(unc).p"),
  "refcocog": lambda folder: refcoco(folder, "refcocog", "refs(umd).p"),
  "flickr30k": flickr30k,
  "llava_bench": llava_bench,
  "mm_vet": mm_vet,
  "arc_easy": lambda folder: arc(folder, "ARC-Easy/ARC-Easy-Test.jsonl"),
  "arc_challenge": lambda folder: arc(folder, "ARC-Challenge/ARC-Challenge-Test.jsonl"),
  "piqa": piqa,
  "social_iqa": social_iqa,
  "hellaswag": hellaswag,
  "winogrande": winogrande,
  "boolq": boolq,
  "lambada": lambada,
  "sciq": sciq,
  "openbookqa": lambda folder: arc(folder, "Data/Main/test.jsonl"),
  "triviaqa": triviaqa,
  "webqs": webqs,
}


@pytest.fixture
def official(tmp_path) -> Callable[[str], pathlib.Path]:
  """Returns a function that writes a task's official files into a folder."""

  def build(name: str) -> pathlib.Path:
    folder = tmp_path / name
    folder.mkdir()
    BUILDERS[name](folder)
    return folder

  return build


@pytest.fixture
def items(official) -> Callable[[str], list]:
  """Returns a function that reads a task's official files."""
  return lambda name: tasks.read_items(tasks.get_task(name), official(name))
