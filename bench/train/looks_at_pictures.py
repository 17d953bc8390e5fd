# SPDX-License-Identifier: Apache-2.0
"""Does the model look at the picture? Held-out caption loss with the right and with a wrong image.

  python -m bench.train.looks_at_pictures --kind=dense --workdir=runs/looks_dense
  python -m bench.train.looks_at_pictures --kind=moe --workdir=runs/looks_moe

Pre-trains mm1_debug on the shipped sample (about 30 minutes on two cores), keeping a checkpoint
every `--every` steps; then scores each held-out caption with its own picture, and with another
picture of the same source (a figure for a figure, a drawing for a drawing: telling the sources
apart does not help). Prints a table, and leaves `looks.json` and `looks.png` in the workdir. A run
that was interrupted continues where it was.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.sharding import reshard

from mm1_jax import cli
from mm1_jax.batch import Batch
from mm1_jax.checkpoint import STEPS, restore_params
from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_debug
from mm1_jax.data.examples import Example, make_encoder
from mm1_jax.data.image import decode_image
from mm1_jax.data.packing import Segment, assemble, stack
from mm1_jax.data.sources import Source
from mm1_jax.data.tokenizer import Tokenizer
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import LAYOUT, abstract_state, device_batch, make_mesh
from mm1_jax.train.loop import train

ROWS = 32  # captions scored at a time, each in a row of its own


def held_out_captions(run: RunConfig) -> tuple[list[Batch], np.ndarray]:
  """Returns batches of one caption and its picture a row, and the other picture for each row.

  The second is an index into all rows: a cyclic shift within the captions of the same source, so
  that no caption keeps its own.
  """
  data = run.data
  source = Source(next(s for s in data.eval_sources if s.name == "captions"))
  tokenizer = Tokenizer(data.tokenizer)
  encoder = make_encoder(
    run.data,
    tokenizer,
    run.input_spec,
  )
  rows, names = [], []
  for record in (source[i] for i in range(len(source))):
    example = encoder.encode_record(record)
    if len(example) <= data.seq_len and len(example.images) == 1:
      picture = decode_image(example.images[0], run.model.vision.image_size)
      rows.append(row_of(example, [picture], run, slots=1, pad_id=tokenizer.pad_id))
      names.append(record["source"])
  other = np.arange(len(rows))
  for name in set(names):
    order = np.random.default_rng(0).permutation(np.flatnonzero(np.array(names) == name))
    other[order] = np.roll(order, 1)
  rows += [row_of(None, [], run, slots=1, pad_id=tokenizer.pad_id)] * (-len(rows) % ROWS)
  batches = [stack(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
  assert np.all(other != np.arange(len(other)))
  return batches, other


def row_of(
  example: Example | None,
  pictures: Sequence[np.ndarray],
  run: RunConfig,
  *,
  slots: int,
  pad_id: int,
) -> Batch:
  """Returns a row of one example and its pictures, uint8[H, W, 3] each; or an empty row."""
  pixels = np.array(pictures, np.uint8).reshape(1, -1, *run.model.vision.image_size, 3)
  segments = [] if example is None else [Segment(0, example)]
  return assemble(segments, pixels, seq_len=run.data.seq_len, images_per_row=slots, pad_id=pad_id)


@jax.jit
def caption_scores(model: MM1, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Returns nats per target of each row, 0 for an empty one; and whether greedy answers are right.

  All targets being the likeliest after those before them is what greedy decoding would say.
  """
  decoder = model.decoder
  logits = reshard(decoder.logits(model(batch, dropless=True).hidden), LAYOUT.act_b)
  nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
  wrong = (jnp.argmax(logits, axis=-1) != batch.targets) & (batch.loss_mask > 0)
  num = jnp.maximum(jnp.sum(batch.loss_mask, axis=1), 1)
  return jnp.sum(nll * batch.loss_mask, axis=1) / num, ~jnp.any(wrong, axis=1)


def score(model: MM1, mesh, batches: list[Batch], other: np.ndarray) -> dict[str, float]:
  """Returns mean loss and share of exact captions with right and wrong pictures.

  The loss's margin, wrong above right, has its standard error beside it.
  """
  images = np.concatenate([b.images for b in batches])
  wrong = images.copy()
  wrong[: len(other)] = images[other]

  def scores(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [
      caption_scores(
        model, device_batch(b._replace(images=images[i * ROWS : (i + 1) * ROWS]), mesh)
      )
      for i, b in enumerate(batches)
    ]
    nll, exact = (np.concatenate(list(map(np.asarray, x))) for x in zip(*parts, strict=True))
    return nll[: len(other)], exact[: len(other)]

  (right, exact_right), (wrong, exact_wrong) = scores(images), scores(wrong)
  margin = wrong - right
  return {
    "captions": len(margin),
    "right": float(right.mean()),
    "wrong": float(wrong.mean()),
    "margin": float(margin.mean()),
    "standard_error": float(margin.std(ddof=1) / np.sqrt(len(margin))),
    "better_with_right": float((margin > 0).mean()),
    "exact_right": float(exact_right.mean()),
    "exact_wrong": float(exact_wrong.mean()),
  }


def draw(rows: list[dict], path: pathlib.Path, title: str) -> None:
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
  steps = [r["step"] for r in rows]
  left.plot(steps, [r["wrong"] for r in rows], "o-", label="another picture")
  left.plot(steps, [r["right"] for r in rows], "o-", label="its own picture")
  left.set(xlabel="step", ylabel="nats per token", title=f"{title}: held-out caption loss")
  left.legend()
  errors = [1.96 * r["standard_error"] for r in rows]
  right.errorbar(steps, [r["margin"] for r in rows], errors, fmt="o-", capsize=3)
  right.axhline(0, color="grey", linewidth=1)
  right.set(xlabel="step", ylabel="nats per token", title="margin, with 95% interval")
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--num-steps", type=int, default=900)
  parser.add_argument("--every", type=int, default=150, help="steps between points of the curve")
  args = parser.parse_args()
  config = mm1_debug.get_config(args.kind)
  config.train.update(num_steps=args.num_steps, eval_every=args.every)
  config.checkpoint.update(every=args.every, keep_period=args.every)
  run = RunConfig.from_dict(config.to_dict())
  train(run, args.workdir)
  mesh = make_mesh(run)
  batches, other = held_out_captions(run)
  rows = []
  with jax.set_mesh(mesh):
    like = abstract_state(lambda: MM1(jax.random.key(0), run.model), mesh)
    steps = sorted(int(p.name) for p in (args.workdir / STEPS).iterdir() if p.name.isdigit())
    for step in steps:
      model = restore_params(args.workdir / STEPS / str(step), like)
      rows.append({"step": step, **score(model, mesh, batches, other)})
      print(json.dumps(rows[-1]), flush=True)
  (args.workdir / "looks.json").write_text(
    json.dumps({"kind": args.kind, "rows": rows}, indent=2) + "\n"
  )
  draw(rows, args.workdir / "looks.png", f"mm1_debug, {args.kind}")


if __name__ == "__main__":
  cli.run(main)
