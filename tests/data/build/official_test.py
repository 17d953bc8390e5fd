# SPDX-License-Identifier: Apache-2.0
"""Each set's official form, literally, and what becomes of it."""

import json

import pytest

from mm1_jax.config import SourceConfig
from mm1_jax.data.build import official
from mm1_jax.data.build.__main__ import main as build
from mm1_jax.data.build.official import LETTER, SETS, SHORT, box, uniform_frames
from mm1_jax.data.sources import DataError, Source

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
  "textcaps": (
    [{"data": [{"caption_id": 1, "image_id": "ab", "caption_str": "A sign reads STOP."}]}],
    ["ab.jpg"],
    official.OCR_CAPTION,
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
    official.CAPTION,
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


def test_every_set_is_tested():
  assert CASES.keys() | {"video"} == SETS.keys()


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
  with pytest.raises(DataError, match=r"a\.json: not of the form of chartqa, behind 1 .*'label'"):
    official.main(["chartqa", str(path), f"--output={output}"])
  assert not output.exists()
  path.write_text("{")
  with pytest.raises(DataError, match="cannot be read as JSON"):
    official.main(["gqa", str(path), f"--output={output}"])
  with pytest.raises(DataError, match="--frames is for 'video'"):
    official.main(["video", str(path), f"--output={output}"])
