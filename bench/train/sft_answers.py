# SPDX-License-Identifier: Apache-2.0
"""Does fine-tuning teach answers, and do they come from the picture?

  python -m bench.train.looks_at_pictures --kind=dense --workdir=runs/looks_dense
  python -m bench.train.sft_answers --data=sft.jsonl --init_from=runs/looks_dense --workdir=runs/sft

`--data` is conversations in LLaVA's form, JSON lines with a `source`, pictures relative to it.
A tenth of the pictures of each source are held out, with all that is asked about them; descriptions
that the pre-trained run has read are not among them. After fine-tuning each held-out answer is
scored (nats per token) and said (greedily; exact match, case and punctuation ignored) with its own
picture, with none, and with that of another question of its source; beside them is the answer that
is most frequent in training. Prints tables, and leaves them in `answers.txt`.
"""

import argparse
import collections
import hashlib
import json
import pathlib
from typing import NamedTuple

from mm1_jax import checkpoint, cli
from mm1_jax.config import RunConfig
from mm1_jax.configs import common, mm1_debug_sft
from mm1_jax.data.build.conversations import llava_records
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.sources import Record, Source, write_shards
from mm1_jax.eval.evaluate import Result, Settings, evaluate
from mm1_jax.eval.report import table
from mm1_jax.inference.model import Model
from mm1_jax.train.loop import train

HELD_OUT = 0.1  # of the pictures


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


def write(by_source: dict[str, list[Question]], shards: pathlib.Path, side: str) -> None:
  shards.mkdir(parents=True, exist_ok=True)
  for name, questions in by_source.items():
    write_shards([q.record for q in questions], str(shards / f"{name}-{side}"), 1)


def fine_tune(by_source: dict[str, list[Question]], args: argparse.Namespace) -> None:
  """Trains `mm1_debug_sft`, each source by its positions."""
  config = mm1_debug_sft.get_config(args.kind)
  shards = args.workdir / "shards"
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


def measure(model: Model, name: str, shards: pathlib.Path) -> list[Result]:
  """Returns a source's held-out answers, scored and said, beside their controls."""
  task, pictures = (f"records:{name}",), ("own", "blind", "other")
  scored = Settings(task, form="sft_nats", controls=pictures)
  said = Settings(task, form="sft", controls=(*pictures, "frequent"), batch_size=32)
  return [*evaluate(model, scored, shards), *evaluate(model, said, shards)]


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
  shards = args.workdir / "shards"
  train_side = {name: train for name, (train, _) in sides.items()}
  write(train_side, shards, "train")
  write({name: held_out for name, (_, held_out) in sides.items()}, shards, "heldout")
  fine_tune(train_side, args)
  model = Model.load(args.workdir / "run")
  tables = [table(measure(model, name, shards)) for name in sides]
  (args.workdir / "answers.txt").write_text("\n\n".join(tables) + "\n")
  print(*tables, sep="\n\n")


if __name__ == "__main__":
  cli.run(main)
