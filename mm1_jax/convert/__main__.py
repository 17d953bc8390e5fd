# SPDX-License-Identifier: Apache-2.0
r"""Open weights in, trained params out.

python -m mm1_jax.convert import --vit=CLIP_FOLDER --decoder=LLM_FOLDER --out=runs/open
python -m mm1_jax.convert upcycle --checkpoint=runs/dense --config=configs/mm1_debug.py:moe \
    --out=runs/upcycled
python -m mm1_jax.convert merge_lora --checkpoint=runs/lora --out=runs/merged
python -m mm1_jax.convert export --checkpoint=runs/sft --format=huggingface --out=exports/sft
python -m mm1_jax.convert verify runs/sft exports/sft data/captions
"""

import argparse
import pathlib

from mm1_jax import cli, extras
from mm1_jax.convert import FORMATS, ConvertError


def main(argv: list[str] | None = None) -> None:
  args = _parse(argv)
  if args.extra:
    extras.require(args.extra)
  args.run(args)  # which imports what it needs: --help needs nothing


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.make_parser("mm1_jax.convert", __doc__)
  verbs = parser.add_subparsers(required=True, metavar="VERB")
  _add_import(verbs)
  _add_upcycle(verbs)
  _add_merge_lora(verbs)
  _add_export(verbs)
  _add_verify(verbs)
  parser.set_defaults(extra="convert")
  return parser.parse_args(argv)


def _add_import(verbs) -> None:
  verb = verbs.add_parser("import", help="open weights to a checkpoint for train.init_from")
  add = verb.add_argument
  add("--vit", type=pathlib.Path, metavar="FOLDER", help="CLIP, open_clip or SigLIP weights")
  add("--decoder", type=pathlib.Path, metavar="FOLDER", help="weights of a Llama-like LLM")
  add("--export", type=pathlib.Path, metavar="FOLDER", help="instead: an export of ours, whole")
  add("--tokenizer", type=pathlib.Path, metavar="FILE", help="if not in the decoder's folder")
  add("--out", type=pathlib.Path, required=True, metavar="FOLDER", help="where the checkpoint goes")
  add("--feature-layer", type=int, default=-1, metavar="N", help="-2: the last but one block (-1)")
  add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is written")
  _add_fsdp(verb)
  add("--fill", action="store_true", help="random params for what is not imported: a whole model")
  verb.set_defaults(run=_import)


def _import(args) -> None:
  from mm1_jax.convert import importer

  if args.export is not None:
    if args.vit or args.decoder or args.tokenizer or args.fill:
      raise ConvertError("--export is a whole model; leave --vit, --decoder and the like out.")
    imported = importer.import_export(args.export, dtype=args.dtype, fsdp=args.fsdp)
    importer.write(imported, args.out)
    ask = cli.spelled(f"python -m mm1_jax.inference.generate --checkpoint={args.out} ...")
    print(f"wrote '{args.out}': {ask}")
    return
  imported = importer.import_weights(
    vit=args.vit,
    decoder=args.decoder,
    tokenizer=args.tokenizer,
    feature_layer=args.feature_layer,
    dtype=args.dtype,
    fsdp=args.fsdp,
    fill=args.fill,
  )
  importer.write(imported, args.out)
  train = f"python -m mm1_jax.main --config=configs/from_weights.py:{args.out} --workdir=..."
  print(f"wrote '{args.out}'. Train from it:\n  {cli.spelled(train)}")


def _add_upcycle(verbs) -> None:
  verb = verbs.add_parser("upcycle", help="a dense run to the start of one with experts")
  add = verb.add_argument
  add("--checkpoint", required=True, metavar="RUN", help="a dense run, or imported weights")
  verb.add_config(required=True)  # of the same model with experts
  add("--out", type=pathlib.Path, required=True, metavar="FOLDER", help="where the checkpoint goes")
  _add_fsdp(verb)
  verb.set_defaults(run=_upcycle)


def _upcycle(args) -> None:
  from mm1_jax.convert import upcycle

  upcycle.upcycle_run(args.checkpoint, cli.load_config(args), args.out, fsdp=args.fsdp)
  train = f"python -m mm1_jax.main --config={args.config} --config.train.init_from={args.out} ..."
  print(f"wrote '{args.out}'. Train from it:\n  {cli.spelled(train)}")


def _add_merge_lora(verbs) -> None:
  verb = verbs.add_parser("merge_lora", help="a run with adapters to one without")
  add = verb.add_argument
  add("--checkpoint", required=True, metavar="RUN", help="a run with adapters")
  add(
    "--out", type=pathlib.Path, required=True, metavar="NEW_RUN", help="where the merged run goes"
  )
  _add_fsdp(verb)
  verb.set_defaults(run=_merge_lora)


def _merge_lora(args) -> None:
  from mm1_jax.convert import merge_lora

  merge_lora.merge_run(args.checkpoint, args.out, fsdp=args.fsdp)
  print(f"wrote '{args.out}'")


def _add_fsdp(verb) -> None:
  verb.add_argument(
    "--fsdp", type=int, default=-1, metavar="N", help="devices to split over (all there are)"
  )


def _add_export(verbs) -> None:
  verb = verbs.add_parser("export", help="a trained run to files that others can run")
  add = verb.add_argument
  add("--checkpoint", required=True, metavar="RUN", help="a run, or one of its checkpoints/STEP")
  add("--out", type=pathlib.Path, required=True, metavar="FOLDER", help="where the files go")
  add("--format", choices=FORMATS, required=True, help="see docs/guides/convert.md")
  add("--dtype", choices=("float32", "bfloat16", "int8"), default="bfloat16", help="of weights")
  add("--max-shard-gb", type=float, default=5.0, metavar="GB", help="of a file of weights (5)")
  verb.set_defaults(run=_export)


def _export(args) -> None:
  from mm1_jax.convert.export import exporter
  from mm1_jax.convert.export.format import ExportOptions

  options = ExportOptions(dtype=args.dtype, max_shard_gb=args.max_shard_gb)
  compared = exporter.export(args.checkpoint, args.out, args.format, options)
  print(f"exported '{args.out}': {compared}.")


def _add_verify(verbs) -> None:
  verb = verbs.add_parser("verify", help="whether runs, data and exports are what was written")
  verb.add_argument(
    "path", nargs="+", metavar="PATH", help="a run or a step of it, data's folder, an export"
  )
  verb.set_defaults(run=_verify, extra=None)


def _verify(args) -> None:
  from mm1_jax.convert.verify import verify

  num_faults = 0
  for path in args.path:
    for checked in verify(path):
      print(f"{checked.what}: {'FAULTS' if checked.faults else 'as written'}", flush=True)
      num_faults += len(checked.faults)
      for fault in checked.faults:
        print(f"  {fault}", flush=True)
  if num_faults:
    raise ConvertError(f"{num_faults} {'fault' if num_faults == 1 else 'faults'}, see above.")


if __name__ == "__main__":
  cli.run(main)
