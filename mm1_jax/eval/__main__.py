# SPDX-License-Identifier: Apache-2.0
r"""Evaluates a model on benchmarks.

  python -m mm1_jax.eval --checkpoint=runs/mm1_3b --tasks=coco,vqav2 --shots=0,4,8 --data=FOLDER
  python -m mm1_jax.eval --checkpoint=runs/sft --tasks=pope --data=FOLDER --controls=own,blind
  python -m mm1_jax.eval --checkpoint=runs/sft --tasks=my_questions.jsonl
  python -m mm1_jax.eval --checkpoint=runs/sft --sample
  python -m mm1_jax.eval --compare runs/a/eval runs/b/eval
  python -m mm1_jax.eval --list
  python -m mm1_jax.eval lm_eval --checkpoint=runs/mm1_3b --tasks=piqa,arc_easy

FOLDER holds the benchmarks' official files, see --list. Results go to --out: a table, results.json,
every answer, and a page. The same command continues where it was stopped. On several hosts, run it
on each with an --out that all of them see.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mm1_jax import cli, extras
from mm1_jax.config import UserError

if TYPE_CHECKING:  # importing them takes seconds
  from etils import epath

  from mm1_jax.eval.evaluate import Result, Settings

OUT = "eval"  # in the run's workdir
SAMPLE = pathlib.Path(__file__).parents[1] / "data" / "sample"


def main(argv: list[str] | None = None) -> None:
  argv = sys.argv[1:] if argv is None else argv
  if argv[:1] == ["lm_eval"]:
    extras.require("lm-eval")
    from mm1_jax.eval.adapters import lm_eval

    lm_eval.main(argv[1:])
    return
  args = _parse(argv)
  if args.list:
    _list()
  elif args.compare:
    _compare(*args.compare)
  else:
    _evaluate(args)


def _evaluate(args: argparse.Namespace) -> None:
  # Only now: --help needs none of these.
  import jax
  from etils import epath

  from mm1_jax import checkpoint, distributed
  from mm1_jax.eval.evaluate import evaluate, plan
  from mm1_jax.inference import generate

  if args.checkpoint is None:
    raise UserError("--checkpoint=RUN is needed, and --tasks=NAME,NAME; --list names the tasks.")
  with distributed.joined(distributed.find_cluster()):
    step = checkpoint.find_step(args.checkpoint)
    chat = checkpoint.read_run(step.parent.parent).data.chat
    settings, data = _settings(args, chat)
    plan(settings, chat=chat)  # mistakes are told before the model is loaded
    out = epath.Path(args.out) if args.out else step.parent.parent / OUT / step.name
    share = jax.process_index(), jax.process_count()
    if share[1] > 1:
      distributed.check_shared(out)
    model = generate.load(args)
    run = {"name": model.run.name, "step": int(step.name), "digest": checkpoint.digest(step)}
    run |= {"params": sum(x.size for x in jax.tree.leaves(model.params))}
    run |= {key: getattr(args, key) for key in ("quantize", "max_tiles", "cut_last")}
    asked = evaluate(
      model,
      settings,
      data,
      kept=out / "replies",
      digest=json.dumps(run),
      share=share,
      tell=generate.tell,
    )
    _write(out, asked, settings, run)


def _settings(args: argparse.Namespace, chat: bool) -> "tuple[Settings, str]":
  """Returns what is evaluated, and the folder of its files."""
  from mm1_jax.eval.evaluate import Settings

  tasks, data, controls = args.tasks, args.data, args.controls
  if args.sample:
    if tasks is not None:
      raise UserError("--sample names its own task; leave out --tasks.")
    tasks, data = (("records:sft",) if chat else ("records:captions",)), str(SAMPLE)
    controls = controls or ("own", "other", "blind")
  if not tasks:
    raise UserError("--tasks=NAME,NAME is needed; --list names the tasks, --sample is a first one.")
  settings = Settings(
    tasks=tasks,
    shots=args.shots,
    form=args.form,
    split=args.split,
    limit=args.limit,
    trials=args.trials,
    seed=args.seed,
    controls=controls or ("own",),
    batch_size=args.batch_size,
    bos=args.bos,
  )
  return settings, data


def _write(out: "epath.Path", asked: "Iterable[Result]", settings: "Settings", run: dict) -> None:
  """Writes results as they come; only the first process has any."""
  from mm1_jax.eval import results
  from mm1_jax.eval.page import write_page
  from mm1_jax.eval.report import markdown, table
  from mm1_jax.inference.generate import tell

  done = []
  for result in asked:
    done.append(result)
    results.write_items(out, result)
    tell(table([result]))
  if not done:
    return
  values = results.to_json(done, settings, run)
  results.write_whole(out / results.RESULTS, json.dumps(values, indent=1) + "\n")
  results.write_whole(out / "results.md", markdown(values))
  write_page(out / "results.html", done, values)
  print(table(done))
  tell(f"results in '{out}': results.json, results.md, results.html, items/")


def _list() -> None:
  from mm1_jax.eval.tasks import TASKS

  for task in TASKS.values():
    print(
      f"{task.name:<18} {task.title:<28} {','.join(task.forms):<22} {task.split:<14} {task.metric}"
    )


def _compare(a: str, b: str) -> None:
  from mm1_jax.eval.report import compare

  print(compare(a, b))


def _parse(argv: list[str]) -> argparse.Namespace:
  from mm1_jax.inference.generate import add_model_flags

  parser = cli.make_parser("mm1_jax.eval", __doc__)
  add_model_flags(parser, required=False)
  add = parser.add_argument
  add("--tasks", type=_names, metavar="NAME,NAME", help="benchmarks, or files of your own")
  add("--data", default=".", metavar="FOLDER", help="of the benchmarks' official files (.)")
  add("--shots", type=_numbers, default=(0,), metavar="N,N", help="demonstrations (0)")
  add("--form", help="protocol: mm1, openflamingo, sft, text (the first that fits the model)")
  add("--split", help="instead of each task's default")
  add("--limit", type=cli.at_least(1), metavar="N", help="items of each task, drawn by --seed")
  add("--trials", type=cli.at_least(1), default=1, metavar="N", help="draws of demonstrations (1)")
  add("--seed", type=int, default=0, help="of draws (0)")
  add(
    "--controls",
    type=_names,
    metavar="NAME,NAME",
    help="own, blind (no pictures), other (another item's), frequent (the most frequent answer)",
  )
  add("--batch-size", type=cli.at_least(1), default=8, metavar="N", help="prompts at once (8)")
  add(
    "--no-bos",
    dest="bos",
    action="store_false",
    help="documents without <s> in front, as imported models without one were trained",
  )
  add("--out", metavar="FOLDER", help="of results (eval/STEP in the run's workdir)")
  add("--sample", action="store_true", help="the shipped sample's held-out captions or questions")
  add("--list", action="store_true", help="what tasks there are, and ends")
  add("--compare", nargs=2, metavar="FOLDER", help="paired differences of two --out, and ends")
  return parser.parse_args(argv)


def _names(text: str) -> tuple[str, ...]:
  return tuple(filter(None, text.split(",")))


def _numbers(text: str) -> tuple[int, ...]:
  numbers = tuple(int(part) for part in _names(text))
  if not numbers or min(numbers) < 0:
    raise argparse.ArgumentTypeError(f"{text!r} must be numbers from 0 on, such as 0,4,8")
  return numbers


if __name__ == "__main__":
  cli.run(main)
