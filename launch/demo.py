# SPDX-License-Identifier: Apache-2.0
"""Everything once, small: pre-train, fine-tune, answer about pictures not seen, and draw it all.

  python -m launch.demo --workdir=runs/demo

The main job with `configs/mm1_demo.py` and its SFT on the shipped sample, sized for minutes on two
CPU cores. At the end the workdir has `report.json`, the accuracy of each kind of question beside
two controls, `answers.png`, held-out pictures with what the model says, `report.png` and
`report.html`. Run it again to continue where it was stopped.
"""

import argparse
import io
import json
import pathlib
import time
import types

import PIL.Image

from launch import questions
from mm1_jax import cli
from mm1_jax.checkpoint import STEPS
from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_demo, mm1_demo_sft
from mm1_jax.data.build.world import ASKS
from mm1_jax.eval.task import Item, source
from mm1_jax.inference.model import Model
from mm1_jax.metrics import format_seconds
from mm1_jax.report import Answer, draw_grid, write_report
from mm1_jax.train.loop import train

CAPTIONED = ("number", "colour", "kind")  # questions that a caption answers, unasked
POINTS = 5  # of a curve of accuracy, in each stage
IN_A_POINT = 60  # questions of each kind
SHOWN = 4  # answers of each kind in the picture


def main() -> None:
  args = parse()
  story = Story()
  pretrained, tuned = args.workdir / "pretrain", args.workdir / "sft"

  story.tell(f"1/4 pre-training a small MoE model on captions, documents and text -> {pretrained}")
  train(make_run(mm1_demo, args.pretrain_steps, args.seed), pretrained)

  story.tell(f"2/4 fine-tuning it on questions about pictures -> {tuned}")
  sft = make_run(mm1_demo_sft, args.sft_steps, args.seed, init_from=str(pretrained))
  train(sft, tuned)

  story.tell("3/4 asking about pictures that no stage has seen")
  items = questions.held_out()
  curves = {"pretrain": caption_curve(pretrained, items), "sft": answer_curve(tuned, items)}
  results = questions.measure(Model.load(tuned))
  figures = questions.figures(results)
  print(table(figures), flush=True)

  story.tell("4/4 drawing the report")
  own, *_ = results
  shown = questions.few(items, SHOWN)
  said = {answered.item.id: str(answered.reply) for answered in own.scored}
  answers = [Answer(questions.pixels(i), i.question, said[i.id], i.answers[0]) for i in shown]
  (args.workdir / "answers.png").write_bytes(draw_grid(answers))
  report = {"questions": figures, "curves": curves, "seed": args.seed}
  (args.workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  write_pictures(args.workdir / "pictures", items)
  write_report(args.workdir, {"pretrain": pretrained, "sft": tuned}, answers, curves)
  story.tell(f"done: look at {args.workdir / 'answers.png'} and {args.workdir / 'report.html'}")


def parse() -> argparse.Namespace:
  parser = cli.make_parser("launch.demo", __doc__)
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/demo"))
  parser.add_argument("--pretrain-steps", type=int, default=2300)
  parser.add_argument("--sft-steps", type=int, default=3000)
  parser.add_argument("--seed", type=int, default=0, help="of the params and the order of the data")
  return parser.parse_args()


def make_run(
  config_file: types.ModuleType, num_steps: int, seed: int, *, init_from: str | None = None
) -> RunConfig:
  """Returns the run of a config file with so many steps, a checkpoint for each point of a curve."""
  config = config_file.get_config()
  config.train.update(num_steps=num_steps, init_from=init_from, eval_every=num_steps, seed=seed)
  config.data.seed = seed
  every = max(1, num_steps // POINTS)
  config.checkpoint.update(every=every, keep_period=every)
  return RunConfig.from_dict(config.to_dict())


def checkpoints(workdir: pathlib.Path) -> list[tuple[int, Model]]:
  """Returns the steps and models of a run's checkpoints."""
  steps = sorted(int(path.name) for path in (workdir / STEPS).iterdir() if path.name.isdigit())
  return [(step, Model.load(workdir / STEPS / str(step))) for step in steps]


def caption_curve(workdir: pathlib.Path, items: list[Item]) -> questions.Curves:
  """Returns how often a model in pre-training names what is asked for, by kind and step."""
  asked = [item for item in questions.few(items, IN_A_POINT) if source(item) in CAPTIONED]
  points = {step: questions.caption_names(model, asked) for step, model in checkpoints(workdir)}
  return questions.curves(asked, points)


def answer_curve(workdir: pathlib.Path, items: list[Item]) -> questions.Curves:
  """Returns how often a model in fine-tuning answers right, by kind of question and step."""
  asked = questions.few(items, IN_A_POINT)
  points = {step: questions.answer_right(model, asked) for step, model in checkpoints(workdir)}
  return questions.curves(asked, points)


def table(figures: dict[str, dict[str, float]]) -> str:
  """Returns the figures as lines of text."""
  lines = [f"{'question':10}{'right':>14}{'other picture':>16}{'most frequent':>16}{'n':>6}"]
  for asks, row in figures.items():
    right = f"{row['accuracy']:.1%} ± {100 * row['standard_error']:.1f}"
    other, frequent = f"{row['other_picture']:.1%}", f"{row['most_frequent']:.1%}"
    lines.append(f"{asks:10}{right:>14}{other:>16}{frequent:>16}{row['n']:>6}")
  return "\n".join(lines)


def write_pictures(folder: pathlib.Path, items: list[Item]) -> None:
  """Writes the held-out pictures of the first question of each kind, to ask about them."""
  folder.mkdir(exist_ok=True)
  for asks in ASKS:
    item = questions.of_kind(items, asks)[0]
    for number, image in enumerate(item.pictures, 1):
      PIL.Image.open(io.BytesIO(image)).save(folder / f"{asks}{number}.png")


class Story:
  """Says what happens, and how long the demo has been at it."""

  def __init__(self):
    self._start = time.perf_counter()

  def tell(self, line: str) -> None:
    print(f"[{format_seconds(time.perf_counter() - self._start)}] {line}", flush=True)


if __name__ == "__main__":
  cli.run(main)
