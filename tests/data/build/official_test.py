# SPDX-License-Identifier: Apache-2.0
"""Each set's official form, literally, and what becomes of it."""

import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet
import pytest

from mm1_jax.config import SourceConfig, UserError
from mm1_jax.data.build import official
from mm1_jax.data.build.__main__ import main as build
from mm1_jax.data.build.official import SETS, uniform_frames
from mm1_jax.data.build.official_documents import READ, WRITE_PAGE
from mm1_jax.data.build.official_grounding import GROUNDED
from mm1_jax.data.build.official_rows import CAPTION, LETTER, OCR_CAPTION, SHORT, box
from mm1_jax.data.sources import DataError, Source
from tests.helpers import fuzz

COCO_QUESTIONS = {
  "data_subtype": "train2014",
  "questions": [
    {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 1},
  ],
}
TEN = [{"answer": a, "answer_id": i} for i, a in enumerate(["net"] * 4 + ["a net"] * 6)]
CASES = {  # set: its files; then (pictures, question, answer) of the first conversation
  "vqav2": (
    [
      COCO_QUESTIONS,
      {
        "data_subtype": "train2014",
        "annotations": [
          {"question_id": 1, "image_id": 458752, "multiple_choice_answer": "net", "answers": TEN}
        ],
      },
    ],
    ["COCO_train2014_000000458752.jpg"],
    f"What is this photo taken looking through?\n{SHORT}",
    "net",
  ),
  "okvqa": (
    [COCO_QUESTIONS, {"annotations": [{"question_id": 1, "image_id": 458752, "answers": TEN}]}],
    ["COCO_train2014_000000458752.jpg"],
    f"What is this photo taken looking through?\n{SHORT}",
    "a net",
  ),
  "gqa": (
    [{"02930152": {"imageId": "n578250", "question": "Is the sky dark?", "answer": "yes"}}],
    ["n578250.jpg"],
    f"Is the sky dark?\n{SHORT}",
    "yes",
  ),
  "aokvqa": (
    [
      [
        {
          "image_id": 299207,
          "question_id": "22Mex",
          "question": "What is the man by the bags awaiting?",
          "choices": ["skateboarder", "train", "delivery", "cab"],
          "correct_choice_idx": 3,
        }
      ]
    ],
    ["000000299207.jpg"],
    "What is the man by the bags awaiting?\nA. skateboarder\nB. train\nC. delivery\nD. cab\n"
    + LETTER,
    "D",
  ),
  "ocrvqa": (
    [
      {
        "0001": {"questions": ["Kept for a test?"], "answers": ["Yes"], "split": 3},
        "1421": {
          "imageURL": "http://x/1.jpg",
          "questions": ["Who wrote this book?", "Is this a comedy?"],
          "answers": ["Ann Lee", "No"],
          "split": 1,
        },
      }
    ],
    ["1421.jpg"],
    f"Who wrote this book?\n{SHORT}",
    "Ann Lee",
  ),
  "textvqa": (
    [
      {
        "data": [
          {
            "question": "what is the brand of this camera?",
            "image_id": "003a8ae2ef43b901",
            "question_id": 34602,
            "answers": ["nous les gosses", "dakota", "dakota"],
          }
        ]
      }
    ],
    ["003a8ae2ef43b901.jpg"],
    f"what is the brand of this camera?\n{SHORT}",
    "dakota",
  ),
  "screenqa": (
    [
      [
        {
          "image_id": 383,
          "question": "Which website are we using for booking?",
          "ground_truth": ["kiwi.com", "Kiwi", "Kiwi.com"],
        }
      ]
    ],
    ["383.jpg"],
    f"Which website are we using for booking?\n{SHORT}",
    "kiwi.com",
  ),
  "textcaps": (
    [{"data": [{"caption_id": 1, "image_id": "ab", "caption_str": "A sign reads STOP."}]}],
    ["ab.jpg"],
    OCR_CAPTION,
    "A sign reads STOP.",
  ),
  "coco_captions": (
    [
      {
        "images": [{"id": 5, "file_name": "000000000005.jpg"}],
        "annotations": [{"id": 9, "image_id": 5, "caption": "A cat.\n"}],
      }
    ],
    ["000000000005.jpg"],
    CAPTION,
    "A cat.",
  ),
  "docvqa": (
    [
      {
        "data": [
          {
            "questionId": 337,
            "question": "what is the date mentioned in this letter?",
            "image": "documents/xnbl0037_1.png",
            "answers": ["1/8/93", "January 8"],
          }
        ]
      }
    ],
    ["xnbl0037_1.png"],
    f"what is the date mentioned in this letter?\n{SHORT}",
    "1/8/93",
  ),
  "infovqa": (
    [
      {
        "data": [
          {
            "questionId": 1,
            "question": "Which year?",
            "image_local_name": "20471.jpeg",
            "answers": ["2012"],
          }
        ]
      }
    ],
    ["20471.jpeg"],
    f"Which year?\n{SHORT}",
    "2012",
  ),
  "chartqa": (
    [[{"imgname": "two_col_102.png", "query": "How many bars?", "label": "3"}]],
    ["two_col_102.png"],
    f"How many bars?\n{SHORT}",
    "3",
  ),
  "dvqa": (
    [
      [
        {
          "question_id": 3,
          "image": "bar_train_00000001.png",
          "question": "Are the values logarithmic?",
          "answer": "no",
        }
      ]
    ],
    ["bar_train_00000001.png"],
    f"Are the values logarithmic?\n{SHORT}",
    "no",
  ),
  "stvqa": (
    [
      {
        "version": 1.0,
        "task": 3,
        "data": [
          {
            "file_path": "coco-text/COCO_train2014_000000000257.jpg",
            "file_name": "COCO_train2014_000000000257.jpg",
            "dataset": "coco-text",
            "question": "What does the sign say?",
            "question_id": 4,
            "answers": ["stop", "STOP"],
          }
        ],
      }
    ],
    ["coco-text/COCO_train2014_000000000257.jpg"],
    f"What does the sign say?\n{SHORT}",
    "stop",
  ),
  "tabmwp": (
    [
      {
        "12": {
          "question": "How much is left?",
          "choices": None,
          "answer": "85.25",
          "unit": "$",
          "table_title": None,
          "table": "Jan | $90",
          "ques_type": "free_text",
          "split": "train",
        }
      }
    ],
    ["12.png"],
    f"How much is left? (Unit: $)\n{SHORT}",
    "85.25",
  ),
  "arxivqa": (
    [
      {
        "id": "physics-1049",
        "image": "images/1501.00713_1.jpg",
        "options": ["A) It rises.", "B) It falls.", "C) Neither."],
        "question": "What does the curve do?",
        "label": "B",
        "rationale": "...",
      }
    ],
    ["images/1501.00713_1.jpg"],
    f"What does the curve do?\nA. It rises.\nB. It falls.\nC. Neither.\n{LETTER}",
    "B",
  ),
  "synthdog": (
    [
      {
        "file_name": "image_0.jpg",
        "ground_truth": json.dumps({"gt_parse": {"text_sequence": "the first of these "}}),
      }
    ],
    ["image_0.jpg"],
    READ,
    "the first of these",
  ),
  "doc_downstream": (
    [
      {
        "image": ["./imgs/DUE_Benchmark/TabFact/pngs/2-1859269-1.html.csv.png"],
        "messages": [
          {"role": "user", "content": "<|image|>\nIs it true that the home team won?"},
          {"role": "assistant", "content": "Yes"},
        ],
        "task_name": "qa_sft",
        "dataset_name": "TabFact",
      }
    ],
    ["./imgs/DUE_Benchmark/TabFact/pngs/2-1859269-1.html.csv.png"],
    "Is it true that the home team won?",
    "Yes",
  ),
  "clevr": (
    [
      {
        "info": {"split": "train"},
        "questions": [
          {
            "question_index": 0,
            "image_filename": "CLEVR_train_000000.png",
            "question": "Are there more big green things than large purple shiny cubes?",
            "answer": "yes",
            "program": [],
          }
        ],
      }
    ],
    ["CLEVR_train_000000.png"],
    f"Are there more big green things than large purple shiny cubes?\n{SHORT}",
    "yes",
  ),
  "ai2d": (
    [
      {
        "imageName": "0.png",
        "questions": {
          "Which is the rhombus?": {
            "questionId": "0.png-0",
            "answerTexts": ["A", "B"],
            "correctAnswer": 1,
            "abcLabel": True,
          }
        },
      }
    ],
    ["0.png"],
    f"Which is the rhombus?\nA. A\nB. B\n{LETTER}",
    "B",
  ),
  "scienceqa": (
    [
      {
        "7": {
          "question": "Which state is north?",
          "choices": ["Maine", "Texas"],
          "answer": 0,
          "hint": "Look at the map.",
          "image": "image.png",
          "split": "train",
        },
        "8": {"question": "?", "choices": [], "answer": 0, "image": None, "split": "test"},
      }
    ],
    ["train/7/image.png"],
    f"Look at the map.\nWhich state is north?\nA. Maine\nB. Texas\n{LETTER}",
    "A",
  ),
  "nlvr2": (
    [{"identifier": "train-10171-0-0", "sentence": "Two dogs run.", "label": "False"}],
    ["train-10171-0-img0.png", "train-10171-0-img1.png"],
    f"Two dogs run.\nIs this true of the two images? {SHORT}",
    "False",
  ),
  "visual_genome": (
    [
      [
        {
          "id": 1,
          "regions": [
            {
              "region_id": 1382,
              "image_id": 1,
              "phrase": "the clock is green in colour",
              "x": 421,
              "y": 57,
              "width": 82,
              "height": 139,
            }
          ],
        }
      ],
      [{"image_id": 1, "width": 800, "height": 600}],
    ],
    ["1.jpg"],
    "Where is this in the image: the clock is green in colour",
    # 421 / 800 = 0.52625, 57 / 600 = 0.095, 503 / 800 = 0.62875, 196 / 600 = 0.3266...
    "<526,95,628,326>",
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_official_form(tmp_path, name):
  values, images, question, answer = CASES[name]
  paths = [tmp_path / f"{i}.json" for i in range(len(values))]
  for path, value in zip(paths, values, strict=True):
    path.write_text(json.dumps(value))
  output = tmp_path / "out.jsonl"
  official.main([name, *map(str, paths), f"--output={output}"])
  (row,) = map(json.loads, output.read_text().splitlines())
  human, gpt, *others = row["conversations"]
  assert row["image"] == images
  assert human == {"from": "human", "value": "<image>\n" * len(images) + question}
  assert gpt == {"from": "gpt", "value": answer}
  # Of the sets here, OCR-VQA asks several questions of a picture.
  assert [turn["value"] for turn in others] == (
    [f"Is this a comedy?\n{SHORT}", "No"] if name == "ocrvqa" else []
  )


OTHERS = {  # not JSON, or more than a file
  "video",
  "instructions",
  "refcoco",
  "flickr30k",
  "iconqa",
  "design2code",
  "cauldron",
  "mantis",
  "synthdog_parquet",
}


def test_every_set_is_tested():
  assert CASES.keys() | OTHERS == SETS.keys()


def convert(tmp_path, *arguments) -> list[dict]:
  output = tmp_path / "out.jsonl"
  official.main([*map(str, arguments), f"--output={output}"])
  return [json.loads(line) for line in output.read_text().splitlines()]


def texts(row: dict) -> list[str]:
  return [turn["value"] for turn in row["conversations"]]


def test_refcoco(tmp_path):
  ref = {
    "ref_id": 0,
    "ann_id": 1719310,
    "category_id": 1,
    "file_name": "COCO_train2014_000000581857_16.jpg",
    "image_id": 581857,
    "split": "train",
    "sent_ids": [0, 1],
    "sentences": [
      {"sent": "the lady with the blue shirt", "sent_id": 0, "raw": "", "tokens": []},
      {"sent": "lady with back to us", "sent_id": 1, "raw": "", "tokens": []},
    ],
  }
  instances = {
    "images": [
      {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 640, "height": 427}
    ],
    "annotations": [{"id": 1719310, "image_id": 581857, "bbox": [103.93, 299.99, 134.22, 127.01]}],
  }
  refs, file = tmp_path / "refs(unc).p", tmp_path / "instances.json"
  refs.write_bytes(pickle.dumps([ref, {**ref, "split": "testA"}], protocol=2))
  file.write_text(json.dumps(instances))
  (row,) = convert(tmp_path, "refcoco", refs, file)
  assert row["image"] == ["COCO_train2014_000000581857.jpg"]
  # 103.93 / 640 = 0.1623, 299.99 / 427 = 0.7025, 238.15 / 640 = 0.3721, 427 / 427 = 1
  where = "<162,702,372,999>"
  assert texts(row) == [
    "<image>\nWhere is this in the image: the lady with the blue shirt",
    where,
    "Where is this in the image: lady with back to us",
    where,
  ]


def test_a_pickle_runs_nothing(tmp_path):
  class Hostile:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "was run"),)

  refs, file = tmp_path / "refs(unc).p", tmp_path / "instances.json"
  refs.write_bytes(pickle.dumps([Hostile()]))
  file.write_text("{}")
  with pytest.raises(
    DataError, match=r"refs\(unc\)\.p' is no pickle of plain values .it asks for STACK_GLOBAL"
  ):
    convert(tmp_path, "refcoco", refs, file)
  assert not (tmp_path / "was run").exists()


def test_flickr30k_entities(tmp_path):
  for folder in ("Sentences", "Annotations"):
    (tmp_path / folder).mkdir()
  (tmp_path / "train.txt").write_text("36979\n")
  (tmp_path / "Sentences" / "36979.txt").write_text(
    "[/EN#1/people A group of friends] playing [/EN#2/other cards] at [/EN#0/notvisual night] .\n"
  )
  thing = "<object>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
  (tmp_path / "Annotations" / "36979.xml").write_text(
    "<annotation><filename>36979.jpg</filename>"
    "<size><width>500</width><height>400</height><depth>3</depth></size>"
    + thing.format("<name>1</name>", 1, 1, 250, 400)
    + "</object>"
    + thing.format("<name>1</name><name>2</name>", 51, 101, 100, 200)
    + "</object><object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object>"
    "</annotation>"
  )
  (row,) = convert(tmp_path, "flickr30k", tmp_path / "train.txt")
  assert row["image"] == ["36979.jpg"]
  assert texts(row) == [
    f"<image>\n{GROUNDED}",
    "A group of friends <0,0,500,999> <100,250,200,500> playing cards <100,250,200,500> at night .",
  ]


def test_iconqa(tmp_path, jpeg):
  problems = {
    "choose_img/1": {"question": "Which is it?", "choices": ["choice_0.png", "choice_1.png"]},
    "choose_txt/2": {"question": "How likely?", "choices": ["certain", "unlikely"]},
    "fill_in_blank/3": {"question": "How many?"},
  }
  for name, problem in problems.items():
    folder = tmp_path / "train" / name
    folder.mkdir(parents=True)
    problem |= {"answer": 1, "ques_type": folder.parent.name, "grade": "grade1"}
    (folder / "data.json").write_text(json.dumps(problem))
    for picture in ("image.png", "choice_0.png", "choice_1.png"):
      (folder / picture).write_bytes(jpeg(0))
  folders = sorted((tmp_path / "train").iterdir())
  pictures, words, number = convert(tmp_path, "iconqa", *folders)
  assert pictures["image"] == [
    f"choose_img/1/{name}.png" for name in ("image", "choice_0", "choice_1")
  ]
  assert texts(pictures) == [
    f"<image>\nWhich is it?\nA. <image>\nB. <image>\n{LETTER}",
    "B",
  ]
  assert texts(words) == [f"<image>\nHow likely?\nA. certain\nB. unlikely\n{LETTER}", "B"]
  assert texts(number) == [f"<image>\nHow many?\n{SHORT}", "1"]
  rows, images = tmp_path / "out.jsonl", tmp_path / "train"
  build(["llava", f"--input={rows}", f"--images={images}", f"--output={tmp_path}/built"])
  assert len(Source(SourceConfig("iconqa", f"{tmp_path}/built-*.arrayrecord"))) == 3


def test_screenqa_in_whole_sentences(tmp_path):
  element = {"text": "128-bit", "bounds": [84, 1201, 1356, 1300], "vh_index": 7}
  said = ["It has 128 bits.", "128 bits.", "128 bits."]
  truth = [{"full_answer": answer, "ui_elements": [element]} for answer in said]
  question = {"image_id": 31, "question": "How many bits?", "ground_truth": truth}
  (tmp_path / "train.json").write_text(json.dumps([question]))
  (row,) = convert(tmp_path, "screenqa", tmp_path / "train.json")
  assert row["image"] == ["31.jpg"]
  assert texts(row) == ["<image>\nHow many bits?", "128 bits."]


def test_design2code(tmp_path):
  pages = tmp_path / "pages"
  pages.mkdir()
  for name in ("2.html", "2.png", "10.html", "10.png", "rick.jpg"):
    (pages / name).write_text(f"<html>{name}</html>\n")
  rows = convert(tmp_path, "design2code", pages)
  assert [(row["id"], row["image"]) for row in rows] == [("10", ["10.png"]), ("2", ["2.png"])]
  assert texts(rows[1]) == [f"<image>\n{WRITE_PAGE}", "<html>2.html</html>"]
  (tmp_path / "empty").mkdir()
  with pytest.raises(DataError, match=r"empty: not of the form of design2code.*has no \*\.html"):
    convert(tmp_path, "design2code", tmp_path / "empty")


def parquet(path, rows: list[dict]):
  pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
  return path


def test_the_cauldron(tmp_path, jpeg):
  talk = [
    {"user": "What differs?", "assistant": "A car left.", "source": "spot_the_diff"},
    {"user": "Where?", "assistant": "On the left.", "source": "spot_the_diff"},
  ]
  images = [{"bytes": jpeg(i), "path": None} for i in range(2)]
  file = parquet(tmp_path / "0000.parquet", [{"images": images, "texts": talk}])
  folder = tmp_path / "pictures"
  (row,) = convert(tmp_path, "cauldron", file, f"--pictures={folder}")
  assert [(folder / name).read_bytes() for name in row["image"]] == [jpeg(0), jpeg(1)]
  assert row["image"][0].endswith(".jpeg")
  assert texts(row) == [
    "<image>\n<image>\nWhat differs?",
    "A car left.",
    "Where?",
    "On the left.",
  ]
  with pytest.raises(DataError, match=r"'.*pictures' is not empty; give --pictures a new folder"):
    convert(tmp_path, "cauldron", file, f"--pictures={folder}")
  with pytest.raises(DataError, match="--pictures is for 'cauldron' and 'synthdog_parquet'"):
    convert(tmp_path, "mantis", file, f"--pictures={folder}")


def test_mantis(tmp_path):
  talk = [
    {"role": "user", "content": "<image><image> Which is more like <image>?"},
    {"role": "assistant", "content": "The first."},
  ]
  images = [{"bytes": None, "path": f"{i}.jpg"} for i in range(3)]
  row = {"id": "dreamsim_1", "images": images, "conversation": talk, "source": "dreamsim"}
  (found,) = convert(tmp_path, "mantis", parquet(tmp_path / "a.parquet", [row]))
  assert (found["id"], found["image"]) == ("dreamsim_1", ["0.jpg", "1.jpg", "2.jpg"])
  assert texts(found) == ["<image><image> Which is more like <image>?", "The first."]
  with pytest.raises(DataError, match=r"a.parquet: not of the form of cauldron, after 0"):
    convert(tmp_path, "cauldron", tmp_path / "a.parquet", f"--pictures={tmp_path}/new")
  (tmp_path / "b.parquet").write_text("no parquet")
  with pytest.raises(DataError, match=r"b.parquet' cannot be read as Parquet after 0 rows"):
    convert(tmp_path, "mantis", tmp_path / "b.parquet")


def test_synthdog_as_published(tmp_path, jpeg):
  truth = json.dumps({"gt_parse": {"text_sequence": "of the year "}})
  row = {"image": {"bytes": jpeg(0), "path": "0.jpg"}, "ground_truth": truth}
  file = parquet(tmp_path / "a.parquet", [row])
  (found,) = convert(tmp_path, "synthdog_parquet", file, f"--pictures={tmp_path}/p")
  assert (tmp_path / "p" / found["image"][0]).read_bytes() == jpeg(0)
  assert texts(found) == [f"<image>\n{READ}", "of the year"]


def test_instructions_of_text_alone(tmp_path):
  dolly = {"instruction": "When did it begin?", "context": "It began in 2000.", "response": "2000"}
  maths = {"instruction": "1 + 1?", "output": "2", "source": "CoT"}
  messages = [
    {"role": "user", "content": "Sort it."},
    {"role": "assistant", "content": "sorted(x)"},
  ]
  lines = tmp_path / "a.jsonl"
  lines.write_text("\n".join(map(json.dumps, [dolly, maths, {"id": 7, "messages": messages}])))
  orca = {"id": "niv.1", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello"}
  rows = convert(tmp_path, "instructions", lines, parquet(tmp_path / "orca.parquet", [orca]))
  assert [texts(row) for row in rows] == [
    ["It began in 2000.\n\nWhen did it begin?", "2000"],
    ["1 + 1?", "2"],
    ["Sort it.", "sorted(x)"],
    ["Be brief.", "Hi", "Hello"],
  ]
  assert [row["id"] for row in rows] == ["0", "1", "7", "niv.1"]
  build(["llava", f"--input={tmp_path}/out.jsonl", f"--output={tmp_path}/built"])
  assert len(Source(SourceConfig("text", f"{tmp_path}/built-*.arrayrecord"))) == 4
  lines.write_text(json.dumps({"instruction": "1 + 1?"}))
  with pytest.raises(DataError, match="'response or output or answer'"):
    convert(tmp_path, "instructions", lines)


def test_choices_of_tables_and_labels_that_are_no_letters(tmp_path):
  table = tmp_path / "problems.json"
  problem = {"question": "Who won?", "choices": ["Ann", "Bo"], "answer": "Bo", "unit": None}
  table.write_text(json.dumps({"7": problem}))
  (row,) = convert(tmp_path, "tabmwp", table)
  assert texts(row) == [f"<image>\nWho won?\nA. Ann\nB. Bo\n{LETTER}", "B"]
  papers = tmp_path / "arxivqa.jsonl"
  labels = {"B) Two": "B", "C": "C", "Both": "Both"}  # there is no C
  rows = [
    {"id": str(i), "image": "a.jpg", "options": ["One", "Two"], "question": "?", "label": label}
    for i, label in enumerate(labels)
  ]
  papers.write_text("\n".join(map(json.dumps, rows)))
  found = convert(tmp_path, "arxivqa", papers)
  assert [texts(row)[1] for row in found] == [*labels.values()]
  assert [LETTER in texts(row)[0] for row in found] == [True, False, False]


def test_boxes_are_parts_of_a_thousand():
  assert box(0, 0, 640, 480, 640, 480) == "<0,0,999,999>"
  assert box(-3, 120, 320, 500, 640, 480) == "<0,250,500,999>"


def test_frames_are_evenly_spaced():
  names = [f"{i:03d}.jpg" for i in range(240)]
  assert uniform_frames(names) == [f"{5 + 10 * i:03d}.jpg" for i in range(24)]
  assert uniform_frames(names[:7]) == names[:7]


def test_a_video_is_frames_that_a_build_reads(tmp_path, jpeg):
  frames = tmp_path / "frames" / "v_1"
  frames.mkdir(parents=True)
  for i in range(48):
    (frames / f"{i:02d}.jpg").write_bytes(jpeg(i))
  talk = [
    {"from": "human", "value": "<video>\nWhat happens?"},
    {"from": "gpt", "value": "A dog runs."},
  ]
  path, rows = tmp_path / "video.json", tmp_path / "video.jsonl"
  path.write_text(json.dumps([{"id": "v1", "video": "v_1.mp4", "conversations": talk}]))
  official.main(["video", str(path), f"--frames={frames.parent}", f"--output={rows}"])
  build(["llava", f"--input={rows}", f"--images={frames.parent}", f"--output={tmp_path}/out"])
  source = Source(SourceConfig("video", f"{tmp_path}/out-*.arrayrecord"))
  (question, answer) = source[0]["turns"]
  pictures = [item["image"] for item in question["content"] if "image" in item]
  assert pictures == [jpeg(1 + 2 * i) for i in range(24)]
  assert question["content"][-1] == {"text": "What happens?"}
  assert answer["content"] == [{"text": "A dog runs."}]


def test_what_is_not_of_the_form_is_named_and_nothing_is_left(tmp_path):
  path, output = tmp_path / "a.json", tmp_path / "out.jsonl"
  good = {"imgname": "a.png", "query": "?", "label": "1"}
  path.write_text(json.dumps([good, {"imgname": "b.png", "query": "?"}]))
  with pytest.raises(DataError, match=r"a\.json: not of the form of chartqa, after 1 .*'label'"):
    official.main(["chartqa", str(path), f"--output={output}"])
  assert not output.exists()
  path.write_text("{")
  with pytest.raises(DataError, match="is not JSON"):
    official.main(["gqa", str(path), f"--output={output}"])
  with pytest.raises(DataError, match="--frames is for 'video'"):
    official.main(["video", str(path), f"--output={output}"])


@pytest.mark.parametrize("name", CASES)
def test_changed_files_by_seed(tmp_path, name):
  values = CASES[name][0]
  paths = [tmp_path / f"{i}.json" for i in range(len(values))]
  for path, value in zip(paths, values, strict=True):
    rows = name in official.OF_ROWS and isinstance(value, list)
    path.write_text("\n".join(map(json.dumps, value)) if rows else json.dumps(value))
  for path in paths:
    good = path.read_bytes()

    def read(data: bytes, path=path) -> None:
      path.write_bytes(data)
      convert(tmp_path, name, *paths)

    assert fuzz.strays(fuzz.mutations(good, 60, seed=1), read, UserError) == []
    path.write_bytes(good)
