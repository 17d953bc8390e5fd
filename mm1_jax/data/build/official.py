# SPDX-License-Identifier: Apache-2.0
"""The official files of question-answering sets -> conversations in LLaVA's form.

  python -m mm1_jax.data.build.official vqav2 --output=vqav2.jsonl \\
      v2_OpenEnded_mscoco_train2014_questions.json v2_mscoco_train2014_annotations.json
  python -m mm1_jax.data.build llava --input=vqav2.jsonl --images=train2014 --output=data/vqav2

Questions that want a short answer, a letter or a caption get LLaVA-1.5's line that says so (arXiv
2310.03744). Boxes are text, `<x1,y1,x2,y2>`, as in MM1.5 (arXiv 2409.20566): here from 0 to 999
across and down the picture, whatever its size. A video is 24 frames, evenly spaced.
"""

import codecs
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from mm1_jax import cli, untrusted
from mm1_jax.data.build import official_documents, official_grounding, official_parquet
from mm1_jax.data.build.official_rows import (
  CAPTION,
  OCR_CAPTION,
  ROLES,
  SHORT,
  Row,
  choice,
  most_frequent,
  row,
  short,
)
from mm1_jax.data.sources import DataError
from mm1_jax.data.tokenizer import IMAGE

FRAMES = 24  # of a video
MAX_FILE_BYTES = 8 << 30  # of an official file, which is read whole


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


def clevr(data: Any) -> Iterator[Row]:
  for q in data["questions"]:
    yield row(q["question_index"], q["image_filename"], (short(q["question"]), q["answer"]))


def iconqa(*folders: pathlib.Path) -> Iterator[Row]:
  """Folders such as `iconqa/train/choose_img`, with a folder of `data.json` and pictures for each
  problem; give all at once, and `--images` of the build is the folder that they are in."""
  for folder in folders:
    for path in sorted(folder.glob("*/data.json")):
      p, place = untrusted.read_object(path, DataError), f"{folder.name}/{path.parent.name}"
      images = [f"{place}/image.png"]
      if p["ques_type"] == "fill_in_blank":
        turn = short(p["question"]), str(p["answer"])
      elif p["ques_type"] == "choose_img":
        images += [f"{place}/{name}" for name in p["choices"]]
        turn = choice(p["question"], [IMAGE] * len(p["choices"]), p["answer"])
      else:
        turn = choice(p["question"], p["choices"], p["answer"])
      one = row(place, images[:1], turn)
      yield one | {"image": images}


def nlvr2(*statements: Any) -> Iterator[Row]:
  """Statements about two pictures, one JSON object a line."""
  for s in statements:
    pair = s["identifier"].rsplit("-", 1)[0]
    images = [f"{pair}-img{i}.png" for i in (0, 1)]
    question = f"{s['sentence']}\nIs this true of the two images? {SHORT}"
    yield row(s["identifier"], images, (question, s["label"]))


def instructions(*samples: Any) -> Iterator[Row]:
  """Text alone, JSON lines, a list or Parquet: a question, what it is about, and an answer.

  OpenOrca, OrcaMath, MathInstruct, Dolly and WizardCoder name these differently; Code-Feedback has
  `messages`.
  """

  def first(sample: Any, *names: str) -> str:
    if not (there := [name for name in names if name in sample]):
      raise KeyError(" or ".join(names))
    return sample[there[0]]

  for i, s in enumerate(samples):
    id = str(s.get("id", i))
    if "messages" in s:
      said = [{"from": ROLES[m["role"]], "value": m["content"]} for m in s["messages"]]
    else:
      about = s.get("context") or s.get("input")
      question = first(s, "instruction", "question", "query")
      turn = (
        f"{about}\n\n{question}" if about else question,
        first(s, "response", "output", "answer"),
      )
      said = row(id, [], turn)["conversations"]
      if s.get("system_prompt"):
        said.insert(0, {"from": "system", "value": s["system_prompt"]})
    yield {"id": id, "image": [], "conversations": said}


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
  "docvqa": official_documents.docvqa,
  "infovqa": official_documents.docvqa,
  "chartqa": official_documents.chartqa,
  "dvqa": official_documents.dvqa,
  "stvqa": official_documents.stvqa,
  "screenqa": official_documents.screenqa,
  "design2code": official_documents.design2code,
  "tabmwp": official_documents.tabmwp,
  "arxivqa": official_documents.arxivqa,
  "synthdog": official_documents.synthdog,
  "synthdog_parquet": official_parquet.synthdog_parquet,
  "doc_downstream": official_documents.doc_downstream,
  "cauldron": official_parquet.cauldron,
  "mantis": official_parquet.mantis,
  "ai2d": ai2d,
  "scienceqa": scienceqa,
  "clevr": clevr,
  "iconqa": iconqa,
  "nlvr2": nlvr2,
  "visual_genome": official_grounding.visual_genome,
  "refcoco": official_grounding.refcoco,
  "flickr30k": official_grounding.flickr30k,
  "video": video,
  "instructions": instructions,
}
# Read object by object: JSON lines, or a list.
OF_ROWS = ("nlvr2", "video", "arxivqa", "synthdog", "doc_downstream", "instructions")
# These read what they are given themselves.
OF_PATHS = ("iconqa", "flickr30k", "design2code", "cauldron", "mantis", "synthdog_parquet")
# A folder that a set needs besides, by the name of its flag.
FOLDERS = {"video": "frames", "cauldron": "pictures", "synthdog_parquet": "pictures"}


def read_file(path: pathlib.Path, name: str) -> list[Any]:
  """Returns the arguments that a file is to its set's function.

  Raises:
    DataError: it cannot be read, or is neither JSON nor, as `.p`, a pickle of plain values.
  """
  if name in OF_PATHS:
    return [path]
  if name in OF_ROWS and path.suffix == ".parquet":
    return [value for _, value in official_parquet.rows_of((path,))]
  data = untrusted.read_bytes(path, DataError, most=MAX_FILE_BYTES)
  if path.suffix == ".p":
    return [untrusted.load_pickle(data, f"'{path}'", DataError)]
  if name in OF_ROWS and not data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
    lines = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    return [untrusted.parse_json(line, f"'{path}', line {n},", DataError) for n, line in lines]
  value = untrusted.parse_json(data, f"'{path}'", DataError)
  return value if name in OF_ROWS else [value]


def convert(name: str, paths: list[pathlib.Path], **options: str) -> Iterator[Row]:
  """Yields the conversations of a set.

  Raises:
    DataError: a file cannot be read, or is not of the set; nothing is skipped.
  """
  count, values = 0, [value for path in paths for value in read_file(path, name)]
  try:
    for one in SETS[name](*values, **options):
      texts = [one["id"], *one["image"], *(turn["value"] for turn in one["conversations"])]
      if wrong := [text for text in texts if not untrusted.is_text(text)]:
        raise TypeError(f"{untrusted.shown(wrong[0])} is no text")
      yield one
      count += 1
  except DataError:
    raise
  except (*untrusted.STRAY, OSError) as e:
    files = ", ".join(map(str, paths))
    raise DataError(
      f"{files}: not of the form of {name}, after {count} conversations ({untrusted.why(e)}). "
      f"What it takes: {(SETS[name].__doc__ or 'its one file').strip()}"
    ) from e


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser("mm1_jax.data.build.official", __doc__)
  parser.add_argument("set", choices=SETS)
  parser.add_argument("files", nargs="+", type=pathlib.Path, help="in the order of the example")
  parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON lines")
  parser.add_argument("--frames", help="of a video: the folder of folders of frames")
  parser.add_argument("--pictures", help="of Parquet files: a new folder for their pictures")
  args = parser.parse_args(argv)
  for flag in ("frames", "pictures"):
    if (FOLDERS.get(args.set) == flag) != bool(getattr(args, flag)):
      sets = " and ".join(f"'{name}'" for name, needed in FOLDERS.items() if needed == flag)
      raise DataError(
        f"--{flag} is for {sets}, which {'needs' if flag == 'frames' else 'need'} it."
      )
  folder = {flag: getattr(args, flag) for flag in FOLDERS.values() if getattr(args, flag)}
  count, part = 0, args.output.with_name(f"{args.output.name}.part")
  with part.open("w") as file:
    for one in convert(args.set, args.files, **folder):
      file.write(json.dumps(one, ensure_ascii=False) + "\n")
      count += 1
  part.replace(args.output)
  print(f"{count:,} conversations in {args.output}")


if __name__ == "__main__":
  cli.run(main)
