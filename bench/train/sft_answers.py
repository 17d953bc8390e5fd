# SPDX-License-Identifier: Apache-2.0
"""Does fine-tuning teach answers, and do they come from the picture?

  python -m bench.train.looks_at_pictures --kind=dense --workdir=runs/looks_dense
  python -m bench.train.sft_answers --data=sft.jsonl --init_from=runs/looks_dense --workdir=runs/sft

`--data` is conversations in LLaVA's form, JSON lines with a `source`, pictures relative to it.
A tenth of the pictures of each source are held out, with all that is asked about them; descriptions
that the pre-trained run has read are not among them. After fine-tuning each held-out answer is
scored (nats per token) and said (greedily; exact match, but for case, space around it and a last
full stop) with its own picture, with none, and with that of another question of its source; beside
them is the answer that is most frequent in training. Prints a table, leaves `answers.json`.
"""

import argparse
import collections
import hashlib
import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from bench.train.looks_at_pictures import ROWS, caption_scores, row_of
from mm1_jax import checkpoint, cli
from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig
from mm1_jax.configs import common, mm1_debug_sft
from mm1_jax.data.build.conversations import llava_records
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.examples import Example
from mm1_jax.data.packing import stack
from mm1_jax.data.sources import Record, Source, write_shards
from mm1_jax.data.tiling import decode_pictures
from mm1_jax.inference.model import Model
from mm1_jax.sharding import device_batch
from mm1_jax.train.loop import train

HELD_OUT = 0.1  # of the pictures
PICTURES = ("own", "none", "another")
NEW_TOKENS = 64  # a longer answer is no exact match


class Question(NamedTuple):
  """One conversation, its pictures' bytes in place."""

  record: Record
  pictures: tuple[str, ...]  # their names

  @property
  def answer(self) -> str:
    return self.record["turns"][-1]["content"][0]["text"]


def read(path: pathlib.Path) -> dict[str, list[Question]]:
  """Returns the questions of a file by source."""
  by_source = collections.defaultdict(list)
  options = BuildOptions(format="llava", input=str(path), output="")
  for number, line in enumerate(path.read_text().splitlines()):
    (record,) = llava_records(json.loads(line), f"{path.name}/{number}", options)
    names = []
    for item in (item for turn in record["turns"] for item in turn["content"]):
      if "image" in item:
        names.append(item["image"].name)
        item["image"] = (path.parent / names[-1]).read_bytes()
    by_source[record["source"]].append(Question(record, tuple(names)))
  return dict(sorted(by_source.items()))


def split(questions: list[Question], seen: set[str]) -> tuple[list[Question], list[Question]]:
  """Returns what is trained on and what is held out; no picture is on both sides."""
  chosen = {
    name
    for name in {name for question in questions for name in question.pictures}
    if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < HELD_OUT * 2**32
  }
  train = [q for q in questions if not chosen & set(q.pictures)]
  held_out = [q for q in questions if set(q.pictures) <= chosen and q.answer not in seen]
  return train, held_out


def texts_of(workdir: str) -> set[str]:
  """Returns all longer texts that a run was trained on."""
  texts = set()
  for config in checkpoint.read_run(workdir).data.leaves:
    source = Source(config)
    for record in (source[i] for i in range(len(source))):
      contents = [t["content"] for t in record.get("turns", ())] or [record["content"]]
      texts |= {i["text"].strip() for items in contents for i in items if "text" in i}
  return {text for text in texts if len(text) > 30}


def fine_tune(by_source: dict[str, list[Question]], args: argparse.Namespace) -> None:
  """Trains `mm1_debug_sft`, each source by its positions."""
  config = mm1_debug_sft.get_config(args.kind)
  shards = args.workdir / "shards"
  shards.mkdir(parents=True, exist_ok=True)
  for name, questions in by_source.items():
    write_shards([q.record for q in questions], str(shards / f"{name}-train"), 1)
  lengths = {
    name: sum(len(json.dumps(q.record, default=lambda _: "")) for q in questions)
    for name, questions in by_source.items()
  }
  config.data.sources = common.mixture(str(shards), lengths)
  config.data.eval_sources = {}
  config.data.images_per_row = 4
  config.train.update(num_steps=args.num_steps, init_from=str(args.init_from))
  config.checkpoint.every = args.num_steps
  train(RunConfig.from_dict(config.to_dict()), args.workdir / "run")


def shown(questions: list[Question], pictures: str) -> list[Record]:
  """Returns the records with their own pictures, with none, or with another question's."""
  # In order of pictures, shifted by half: no question gets a picture of its own.
  order = sorted(range(len(questions)), key=lambda i: questions[i].pictures)
  other = dict(zip(order, np.roll(order, len(order) // 2), strict=True))
  records = []
  for i, question in enumerate(questions):
    images = [
      item["image"]
      for turn in questions[other[i]].record["turns"]
      for item in turn["content"]
      if "image" in item
    ]
    assert not set(questions[other[i]].pictures) & set(question.pictures)
    turns, number = [], 0
    for turn in question.record["turns"]:
      content = []
      for item in turn["content"]:
        if "image" not in item or pictures == "own":
          content.append(item)
        elif pictures == "another":
          content.append({"image": images[number % len(images)]})
          number += 1
      turns.append({"role": turn["role"], "content": content})
    records.append({**question.record, "turns": turns})
  return records


def answer_nll(model: Model, records: list[Record]) -> np.ndarray:
  """Returns nats per token of each record's answers, the end included; NaN if it does not fit."""
  data, size = model.run.data, model.run.model.vision.image_size
  examples = [model.encoder.encode_record(record) for record in records]
  fits = [i for i, e in enumerate(examples) if len(e) <= data.seq_len]
  slots = max(len(examples[i].images) for i in fits)
  nll = np.full(len(records), np.nan)

  def row(example: Example | None) -> Batch:
    images = () if example is None else example.images
    pictures = decode_pictures(images, size, fit=data.image_fit, max_pixels=data.max_image_pixels)
    return row_of(example, list(pictures), model.run, slots=slots, pad_id=model.tokenizer.pad_id)

  for start in range(0, len(fits), ROWS):
    rows = fits[start : start + ROWS]
    batch = [row(examples[i]) for i in rows] + [row(None)] * (ROWS - len(rows))
    with jax.set_mesh(model.mesh):
      losses, _ = caption_scores(model.params, device_batch(stack(batch), model.mesh))
    nll[rows] = np.asarray(losses)[: len(rows)]
  return nll


def says(model: Model, records: list[Record]) -> list[str]:
  """Returns what the model answers to the first turn of each record."""
  prompts = [[next(iter(item.values())) for item in r["turns"][0]["content"]] for r in records]
  return model.generate(prompts, max_new_tokens=NEW_TOKENS, batch_size=ROWS)


def plain(answer: str) -> str:
  return answer.strip().removesuffix(".").strip().lower()


def with_error(values: np.ndarray) -> str:
  """Returns a mean and its standard error."""
  return f"{values.mean():.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def measure(model: Model, train: list[Question], held_out: list[Question]) -> dict[str, str]:
  """Returns one line of the table."""
  losses = {p: answer_nll(model, shown(held_out, p)) for p in PICTURES}
  # The same questions for all three.
  kept = np.flatnonzero(~np.isnan(sum(losses.values())))
  questions = [held_out[i] for i in kept]
  truths = [plain(q.answer) for q in questions]
  losses = {p: losses[p][kept] for p in PICTURES}
  match = {
    p: np.array(
      [plain(a) == t for a, t in zip(says(model, shown(questions, p)), truths, strict=True)]
    )
    for p in PICTURES
  }
  frequent = collections.Counter(plain(q.answer) for q in train).most_common(1)[0][0]
  majority = np.array([frequent == t for t in truths])
  own = losses["own"], match["own"].astype(float)
  return {
    "train": f"{len(train)}",
    "held out": f"{len(questions)}",
    "too long": f"{len(held_out) - len(questions)}",
    "loss, own picture": with_error(own[0]),
    "none - own": with_error(losses["none"] - own[0]),
    "another - own": with_error(losses["another"] - own[0]),
    "match, own picture": with_error(own[1]),
    "match, none": with_error(match["none"]),
    "match, another": with_error(match["another"]),
    "match, majority": with_error(majority),
    "own - majority": with_error(own[1] - majority),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", type=pathlib.Path, required=True, help="conversations, JSON lines")
  parser.add_argument("--init_from", type=pathlib.Path, required=True, help="a pre-trained run")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
  parser.add_argument("--num_steps", type=int, default=400)
  args = parser.parse_args()
  seen = texts_of(str(args.init_from))
  sides = {name: split(questions, seen) for name, questions in read(args.data).items()}
  fine_tune({name: train for name, (train, _) in sides.items()}, args)
  model = Model.load(args.workdir / "run")
  table = {name: measure(model, *side) for name, side in sides.items()}
  (args.workdir / "answers.json").write_text(json.dumps(table, indent=2) + "\n")
  print("| | " + " | ".join(table) + " |")
  print("|---|" + "---|" * len(table))
  for key in next(iter(table.values())):
    print(f"| {key} | " + " | ".join(line[key] for line in table.values()) + " |")


if __name__ == "__main__":
  cli.run(main)
