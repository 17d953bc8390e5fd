# SPDX-License-Identifier: Apache-2.0
"""The official files of question-answering sets -> conversations in LLaVA's form.

  python -m mm1_jax.data.build.official vqav2 --output=vqav2.jsonl \\
      v2_OpenEnded_mscoco_train2014_questions.json v2_mscoco_train2014_annotations.json
  python -m mm1_jax.data.build llava --input=vqav2.jsonl --images=train2014 --output=data/vqav2

Questions that want a short answer, a letter or a caption get LLaVA-1.5's line that says so (arXiv
2310.03744). Boxes are text, `<x1,y1,x2,y2>`, as in MM1.5 (arXiv 2409.20566): here from 0 to 999
across and down the picture, whatever its size. A video is 24 frames, evenly spaced.
"""

import argparse
import collections
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from mm1_jax import cli
from mm1_jax.data.sources import DataError
from mm1_jax.data.tokenizer import IMAGE

Row = dict[str, Any]
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
OCR_CAPTION = "Provide a one-sentence caption for the provided image, with the text that it shows."
BINS = 1000  # of a coordinate
FRAMES = 24  # of a video


def row(id: Any, images: str | list[str], *turns: tuple[str, str]) -> Row:
  """Returns a conversation whose pictures stand in front of the first question."""
  images = [images] if isinstance(images, str) else images
  first = f"{IMAGE}\n" * len(images)
  said = [text for turn in turns for text in turn]
  said[0] = first + said[0]
  conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
  return {"id": str(id), "image": images, "conversations": conversations}


def short(question: str) -> str:
  return f"{question.strip()}\n{SHORT}"


def choice(question: str, choices: list[str], answer: int) -> tuple[str, str]:
  """Returns a question with lettered choices, and the letter that is right."""
  lines = [f"{chr(65 + i)}. {text}" for i, text in enumerate(choices)]
  return "\n".join([question.strip(), *lines, LETTER]), chr(65 + answer)


def box(x1: float, y1: float, x2: float, y2: float, width: float, height: float) -> str:
  """Returns a box of pixels as text."""

  def scale(value: float, size: float) -> int:
    return min(max(int(value / size * BINS), 0), BINS - 1)

  return f"<{scale(x1, width)},{scale(y1, height)},{scale(x2, width)},{scale(y2, height)}>"


def most_frequent(answers: list[Any]) -> str:
  """Returns what most annotators said, the first of equals."""
  said = [a["answer"] if isinstance(a, dict) else a for a in answers]
  return collections.Counter(said).most_common(1)[0][0]


def vqa(questions: Any, annotations: Any) -> Iterator[Row]:
  """VQAv2 and OK-VQA: questions and annotations by `question_id`, pictures of COCO 2014."""
  answers = {a["question_id"]: a for a in annotations["annotations"]}
  split = annotations.get("data_subtype", "train2014")
  for q in questions["questions"]:
    answer = answers[q["question_id"]]
    said = answer.get("multiple_choice_answer") or most_frequent(answer["answers"])
    image = f"COCO_{split}_{q['image_id']:012d}.jpg"
    yield row(q["question_id"], image, (short(q["question"]), said))


def gqa(questions: Any) -> Iterator[Row]:
  for id, q in questions.items():
    yield row(id, f"{q['imageId']}.jpg", (short(q["question"]), q["answer"]))


def aokvqa(questions: Any) -> Iterator[Row]:
  for q in questions:
    turn = choice(q["question"], q["choices"], q["correct_choice_idx"])
    yield row(q["question_id"], f"{q['image_id']:012d}.jpg", turn)


def ocrvqa(books: Any) -> Iterator[Row]:
  """One conversation a book cover; split 1 is training."""
  for id, book in books.items():
    if book["split"] == 1:
      pairs = zip(book["questions"], book["answers"], strict=True)
      yield row(id, f"{id}.jpg", *((short(q), a) for q, a in pairs))


def textvqa(data: Any) -> Iterator[Row]:
  for q in data["data"]:
    turn = short(q["question"]), most_frequent(q["answers"])
    yield row(q["question_id"], f"{q['image_id']}.jpg", turn)


def textcaps(data: Any) -> Iterator[Row]:
  for c in data["data"]:
    yield row(c["caption_id"], f"{c['image_id']}.jpg", (OCR_CAPTION, c["caption_str"]))


def coco_captions(data: Any) -> Iterator[Row]:
  names = {image["id"]: image["file_name"] for image in data["images"]}
  for c in data["annotations"]:
    yield row(c["id"], names[c["image_id"]], (CAPTION, c["caption"].strip()))


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


def ai2d(*diagrams: Any) -> Iterator[Row]:
  """One file a diagram, as in `questions/`."""
  for diagram in diagrams:
    for question, q in diagram["questions"].items():
      turn = choice(question, q["answerTexts"], q["correctAnswer"])
      yield row(q["questionId"], diagram["imageName"], turn)


def scienceqa(problems: Any) -> Iterator[Row]:
  for id, p in problems.items():
    if p["split"] == "train":
      question = "\n".join(text for text in (p.get("hint"), p["question"]) if text)
      images = [f"train/{id}/{p['image']}"] if p["image"] else []
      yield row(id, images, choice(question, p["choices"], p["answer"]))


def nlvr2(*statements: Any) -> Iterator[Row]:
  """Statements about two pictures, one JSON object a line."""
  for s in statements:
    pair = s["identifier"].rsplit("-", 1)[0]
    images = [f"{pair}-img{i}.png" for i in (0, 1)]
    question = f"{s['sentence']}\nIs this true of the two images? {SHORT}"
    yield row(s["identifier"], images, (question, s["label"]))


def visual_genome(regions: Any, images: Any) -> Iterator[Row]:
  """`region_descriptions.json` and `image_data.json`: phrase to box, or box to phrase,
  by turns of `region_id`."""
  sizes = {image["image_id"]: (image["width"], image["height"]) for image in images}
  for regions_of_image in regions:
    for r in regions_of_image["regions"]:
      corners = r["x"], r["y"], r["x"] + r["width"], r["y"] + r["height"]
      where, phrase = box(*corners, *sizes[r["image_id"]]), r["phrase"].strip()
      turns = (f"Where is this in the image: {phrase}", where), (f"What is at {where}?", phrase)
      yield row(r["region_id"], f"{r['image_id']}.jpg", turns[r["region_id"] % 2])


def uniform_frames(names: list[str], num: int = FRAMES) -> list[str]:
  """Returns `num` of a video's frames, the middles of as many equal parts; all if they are few."""
  if len(names) <= num:
    return names
  return [names[int((i + 0.5) * len(names) / num)] for i in range(num)]


def video(*conversations: Any, frames: str) -> Iterator[Row]:
  """LLaVA's form with `video`, and `<video>` in the text; its frames are FRAMES/NAME/*, sorted."""
  for c in conversations:
    folder = pathlib.Path(frames) / os.path.splitext(c["video"])[0]
    names = uniform_frames(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else []
    if not names:
      raise DataError(f"'{folder}' has no frame of the video '{c['video']}'; correct --frames.")
    said = [dict(turn) for turn in c["conversations"]]
    for turn in said:
      turn["value"] = turn["value"].replace("<video>", IMAGE * len(names))
    images = [f"{folder.name}/{name}" for name in names]
    yield {"id": str(c["id"]), "image": images, "conversations": said}


SETS: dict[str, Callable[..., Iterator[Row]]] = {
  "vqav2": vqa,
  "okvqa": vqa,
  "gqa": gqa,
  "aokvqa": aokvqa,
  "ocrvqa": ocrvqa,
  "textvqa": textvqa,
  "textcaps": textcaps,
  "coco_captions": coco_captions,
  "docvqa": docvqa,
  "infovqa": docvqa,
  "chartqa": chartqa,
  "dvqa": dvqa,
  "ai2d": ai2d,
  "scienceqa": scienceqa,
  "nlvr2": nlvr2,
  "visual_genome": visual_genome,
  "video": video,
}
OF_ROWS = ("nlvr2", "video")  # read object by object: JSON lines, or a list


def read_file(path: pathlib.Path, name: str) -> list[Any]:
  """Returns the arguments that a file is to its set's function.

  Raises:
    DataError: it cannot be read, or is not JSON.
  """
  try:
    text = path.read_text()
    if name in OF_ROWS and not text.lstrip().startswith("["):
      return [json.loads(line) for line in text.splitlines() if line.strip()]
    value = json.loads(text)
  except (OSError, ValueError) as e:
    raise DataError(f"'{path}' cannot be read as JSON: {type(e).__name__}: {e}.") from e
  return value if name in OF_ROWS else [value]


def convert(name: str, paths: list[pathlib.Path], **options: str) -> Iterator[Row]:
  """Yields the conversations of a set.

  Raises:
    DataError: a file cannot be read, or is not of the set; nothing is skipped.
  """
  count, values = 0, [value for path in paths for value in read_file(path, name)]
  try:
    for one in SETS[name](*values, **options):
      yield one
      count += 1
  except (KeyError, TypeError, AttributeError, IndexError) as e:
    files = ", ".join(map(str, paths))
    raise DataError(
      f"{files}: not of the form of {name}, behind {count} conversations "
      f"({type(e).__name__}: {e}). "
      f"What it takes: {(SETS[name].__doc__ or 'its one file').strip()}"
    ) from e


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m mm1_jax.data.build.official",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("set", choices=SETS)
  parser.add_argument("files", nargs="+", type=pathlib.Path, help="in the order of the example")
  parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON lines")
  parser.add_argument("--frames", help="of a video: the folder of folders of frames")
  args = parser.parse_args(argv)
  if (args.set == "video") != bool(args.frames):
    raise DataError("--frames is for 'video', which needs it.")
  count, part = 0, args.output.with_name(f"{args.output.name}.part")
  with part.open("w") as file:
    for one in convert(args.set, args.files, **({"frames": args.frames} if args.frames else {})):
      file.write(json.dumps(one, ensure_ascii=False) + "\n")
      count += 1
  part.replace(args.output)
  print(f"{count:,} conversations in {args.output}")


if __name__ == "__main__":
  cli.run(main)
