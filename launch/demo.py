# SPDX-License-Identifier: Apache-2.0
"""Everything once, small: pre-train, fine-tune, answer about pictures not seen, and draw it all.

  python -m launch.demo --workdir=runs/demo

The main job with `configs/mm1_debug.py:moe` and its SFT on the shipped sample, sized for minutes on
two CPU cores; at the end `report.png` and `report.html` are in the workdir. Run it again to
continue where it was stopped.
"""

import io
import pathlib
import time
import types

import numpy as np
import PIL.Image

from mm1_jax import cli
from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_debug, mm1_debug_sft
from mm1_jax.data.sources import Source
from mm1_jax.inference.model import Model
from mm1_jax.metrics import format_seconds
from mm1_jax.report import Answer, write_report
from mm1_jax.train.loop import train

NUM_PICTURES = 12


def main() -> None:
  parser = cli.make_parser("launch.demo", __doc__)
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/demo"))
  parser.add_argument("--pretrain-steps", type=int, default=360)
  parser.add_argument("--sft-steps", type=int, default=80)
  args = parser.parse_args()
  story = Story()
  pretrained, tuned = args.workdir / "pretrain", args.workdir / "sft"

  story.tell(f"1/4 pre-training a small MoE model on captions, documents and text -> {pretrained}")
  run = make_run(mm1_debug, num_steps=args.pretrain_steps)
  train(run, pretrained)

  story.tell(f"2/4 fine-tuning it on conversations about pictures -> {tuned}")
  sft = make_run(mm1_debug_sft, num_steps=args.sft_steps, init_from=str(pretrained))
  train(sft, tuned)

  story.tell("3/4 describing held-out pictures, with both models")
  captioned = describe(Model.load(pretrained), run, prompt=None)
  described = describe(Model.load(tuned), run, prompt="Describe the image.")
  answers = [a for pair in zip(captioned, described, strict=True) for a in pair]

  story.tell("4/4 drawing the report")
  picture, page = write_report(args.workdir, {"pretrain": pretrained, "sft": tuned}, answers)
  story.tell(f"done: look at {picture} and {page}")


def make_run(
  config_file: types.ModuleType, *, num_steps: int, init_from: str | None = None
) -> RunConfig:
  """Returns the MoE variant of a config file, with as many steps, evaluated twice."""
  config = config_file.get_config("moe")
  config.train.update(num_steps=num_steps, init_from=init_from, eval_every=num_steps // 2)
  config.checkpoint.every = num_steps
  config.data.batch_size = 8  # in so few steps, more of them teach more than larger ones
  config.optimizer.warmup_steps = num_steps // 10
  return RunConfig.from_dict(config.to_dict())


def describe(model: Model, run: RunConfig, *, prompt: str | None) -> list[Answer]:
  """Returns what a model says about held-out pictures, beside their true captions.

  Without a `prompt` the picture alone is continued, as in a caption of pre-training.
  """
  source = Source(next(s for s in run.data.eval_sources if s.name == "captions"))
  stride = len(source) // NUM_PICTURES
  records = [source[i * stride] for i in range(NUM_PICTURES)]
  images = [next(i["image"] for i in r["content"] if "image" in i) for r in records]
  truths = [" ".join(i["text"] for i in r["content"] if "text" in i) for r in records]
  said = model.generate(
    [[image, prompt] if prompt else [image] for image in images],
    max_new_tokens=48,
    chat=prompt is not None,
    batch_size=NUM_PICTURES,
  )
  return [
    Answer(
      np.asarray(PIL.Image.open(io.BytesIO(i)).convert("RGB")),
      prompt or "(nothing: it captions)",
      s,
      t,
    )
    for i, s, t in zip(images, said, truths, strict=True)
  ]


class Story:
  """Says what happens, and how long the demo has been at it."""

  def __init__(self):
    self._start = time.perf_counter()

  def tell(self, line: str) -> None:
    print(f"[{format_seconds(time.perf_counter() - self._start)}] {line}", flush=True)


if __name__ == "__main__":
  cli.run(main)
