# SPDX-License-Identifier: Apache-2.0
"""How far are bfloat16's gradients from float32's, param by param?

  python -m bench.train.gradients --kind=dense --rows=32 --positions=1024

A model computes in bfloat16, its params are float32, and a param's gradient is a sum over all
positions. Products round each term by 0.4%, which averages out; a *sum* in bfloat16 loses each
term that is below 0.4% of what is summed already, which does not. For each kind of model this
takes one batch's gradient in both dtypes, and prints |bfloat16 - float32| / |float32| of every
param, the largest first. Exit code 1 if any is over `--limit`.

Left out is what theory makes zero, so that only rounding is there to compare: a key's bias without
rotary positions adds the same to all logits of a query (the encoder's), which a softmax cancels.
"""

import argparse
import dataclasses
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mm1_jax import cli
from mm1_jax.batch import Batch
from mm1_jax.checkpoint import from_names, to_names
from mm1_jax.config import (
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  LoRAConfig,
  ModelConfig,
  MoEConfig,
  RunConfig,
  VisionConfig,
)
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import device_batch, make_mesh
from mm1_jax.train.loss import loss_fn
from mm1_jax.train.optimizer import join_frozen, split_frozen

KINDS = ("dense", "moe", "lora")
EXAMPLE = 64  # positions of an example
GRID = (4, 4)  # tokens of a picture
IMAGE_ID, VOCAB = 4, 512
ZERO = ("vit.blocks.attention.key_bias",)


def run_of(kind: str, dtype: str, *, rows: int, positions: int, pictures: int) -> RunConfig:
  """Returns a small run of a kind, which has every sort of param."""
  # As many choices as experts: a choice that falls on another expert for a rounded logit is a
  # jump of the function, and no error of a sum.
  moe = MoEConfig(num_experts=4, every=2, top_k=4, capacity_factor=None)
  decoder = DecoderConfig(
    vocab_size=VOCAB,
    width=128,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=256,
    qkv_bias=True,
    qk_norm=True,
    tie_embeddings=kind == "dense",
    moe=moe if kind == "moe" else None,
    lora=LoRAConfig(rank=8, alpha=16.0) if kind == "lora" else None,
  )
  vision = VisionConfig(
    image_size=(112, 112),
    patch_size=8,
    width=128,
    depth=2,
    num_heads=4,
    mlp_dim=256,
    position_grid=(14, 14),
  )
  connector = ConnectorConfig(token_grid=GRID, hidden=128, depth=1)
  return RunConfig(
    model=ModelConfig(vision, connector, decoder, dtype=dtype, remat="none"),
    data=DataConfig(seq_len=positions, batch_size=rows, images_per_row=pictures),
  )


def make_batch(run: RunConfig) -> Batch:
  """Returns rows full of examples of 64 positions, ids by Zipf's law, the first with a picture."""
  rng = np.random.default_rng(0)
  rows, positions, pictures = run.data.batch_size, run.data.seq_len, run.data.images_per_row
  chance = 1 / np.arange(1, VOCAB - 7)
  tokens = 8 + rng.choice(VOCAB - 8, (rows, positions), p=chance / chance.sum())
  place = np.arange(positions)
  in_picture = (place % EXAMPLE >= 1) & (place % EXAMPLE <= GRID[0] * GRID[1])
  tokens[:, in_picture & (place // EXAMPLE < pictures)] = IMAGE_ID
  targets = np.roll(tokens, -1, axis=1)
  size = run.model.vision.image_size
  coarse = rng.integers(0, 256, (rows, pictures, 8, 8, 3), np.uint8)
  images = coarse.repeat(size[0] // 8, axis=2).repeat(size[1] // 8, axis=3)

  def whole(row) -> np.ndarray:
    return np.broadcast_to(row, (rows, positions)).astype(np.int32)

  return Batch(
    tokens=tokens.astype(np.int32),
    targets=targets.astype(np.int32),
    loss_mask=(targets != IMAGE_ID).astype(np.float32),
    positions=whole(place % EXAMPLE),
    segment_ids=whole(place // EXAMPLE + 1),
    source_ids=whole(0),
    images=images,
    image_mask=np.ones((rows, pictures), bool),
  )


def make_model(run: RunConfig) -> MM1:
  """Returns a model none of whose params is at 0, where another's gradient would vanish."""
  model = jax.jit(lambda: MM1(jax.random.key(0), run.model))()

  def moved(name: str, x: jax.Array) -> jax.Array:
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(x.shape)
    return x + jax.device_put(jnp.asarray(0.02 * noise, x.dtype), x.sharding)

  return from_names(model, {name: moved(name, x) for name, x in to_names(model).items()})


def gradients(run: RunConfig) -> dict[str, np.ndarray]:
  """Returns the gradient of one batch's loss, in float64, by the name of the param."""
  mesh = make_mesh(run, jax.devices()[:1])
  with jax.set_mesh(mesh):
    trainable, frozen = split_frozen(make_model(run), ())
    batch = device_batch(make_batch(run), mesh)

    @jax.jit
    def compute(trainable, frozen, batch):
      def total(trainable):
        model = join_frozen(trainable, frozen)
        return loss_fn(model, batch, run, num_targets=jnp.sum(batch.loss_mask)).total

      return jax.grad(total)(trainable)

    return {
      k: np.asarray(g, np.float64) for k, g in to_names(compute(trainable, frozen, batch)).items()
    }


def compare(run: RunConfig) -> dict[str, float]:
  """Returns |bfloat16 - float32| / |float32| by the name of the param, the largest first."""
  exact, rounded = (
    gradients(dataclasses.replace(run, model=dataclasses.replace(run.model, dtype=dtype)))
    for dtype in ("float32", "bfloat16")
  )
  errors = {k: np.linalg.norm(rounded[k] - g) / np.linalg.norm(g) for k, g in exact.items()}
  kept = {name: float(error) for name, error in errors.items() if name not in ZERO}
  return dict(sorted(kept.items(), key=lambda item: -item[1]))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kind", choices=KINDS, nargs="*", default=KINDS)
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--positions", type=int, default=1024, help="of a row")
  parser.add_argument("--pictures", type=int, default=8, help="of a row")
  parser.add_argument("--limit", type=float, default=0.05)
  parser.add_argument("--top", type=int, default=12, help="params shown of each kind")
  args = parser.parse_args()
  worst = 0.0
  for kind in args.kind:
    shape = {"rows": args.rows, "positions": args.positions, "pictures": args.pictures}
    errors = compare(run_of(kind, "float32", **shape))
    print(
      f"\n{kind}, {args.rows} x {args.positions} positions, {args.rows * args.pictures} pictures"
    )
    print(f"| error | param |  (median of {len(errors)}: {np.median(list(errors.values())):.2%})")
    for name, error in list(errors.items())[: args.top]:
      print(f"| {error:.2%} | {name} |", flush=True)
    worst = max(worst, next(iter(errors.values())))
  print(f"\nworst {worst:.2%}, limit {args.limit:.0%}")
  if worst > args.limit:
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main)
