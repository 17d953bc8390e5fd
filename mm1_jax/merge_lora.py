# SPDX-License-Identifier: Apache-2.0
"""Makes a run of a run with LoRA adapters: the same model, with the adapters in its matrices.

  python -m mm1_jax.merge_lora --checkpoint=runs/sft_lora --output=runs/sft_merged

A run with adapters answers as it is; merged it answers without making the sums anew for every
token, can be exported, and can start another stage.
"""

import argparse
import dataclasses

import jax
from etils import epath

from mm1_jax import checkpoint, cli
from mm1_jax.models import lora
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state, make_mesh


def merge(model: MM1) -> MM1:
  """Returns the model that is equal to one with adapters, without them."""
  model = jax.tree.map(lambda x: x, model)  # a copy
  units = model.decoder.units
  units.layers = type(units.layers)([jax.vmap(lora.merge)(layer) for layer in units.layers])
  return model


def merge_run(path: epath.PathLike, output: epath.PathLike) -> None:
  """Writes a run to `output` with the newest params of the run at `path`, merged.

  Raises:
    CheckpointError: there is none, it has no adapters, or there is a run at `output` already.
  """
  run = checkpoint.read_run(path)
  if run.model.decoder.lora is None:
    raise checkpoint.CheckpointError(f"'{path}' has no adapters: model.decoder.lora is None.")
  if (epath.Path(output) / checkpoint.CONFIG).exists():
    raise checkpoint.CheckpointError(f"'{output}' is a run already; name another --output.")
  mesh = make_mesh(run)
  with jax.set_mesh(mesh):
    like = abstract_state(lambda: MM1(jax.random.key(0), run.model), mesh)
    params = jax.jit(merge)(checkpoint.restore_params(path, like))
  step = int(checkpoint.find_step(path).name)
  checkpoint.save_params(output, step, checkpoint.to_names(params))
  decoder = dataclasses.replace(run.model.decoder, lora=None)
  model = dataclasses.replace(run.model, decoder=decoder)
  checkpoint.write_run_files(output, dataclasses.replace(run, model=model))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run with adapters")
  parser.add_argument(
    "--output", required=True, metavar="NEW_RUN", help="where the merged run goes"
  )
  args = parser.parse_args()
  merge_run(args.checkpoint, args.output)
  print(f"merged: {args.output}")


if __name__ == "__main__":
  cli.run(main)
