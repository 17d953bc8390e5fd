# SPDX-License-Identifier: Apache-2.0
"""Plans a run before it is paid for: `python -m mm1_jax.plan --config=... --topology=v5p-512`.

Compiles the train step that `main` runs with the real TPU compiler, on a machine without a TPU, and
tells memory, FLOPs, collectives, the expected time of a step, and what the run costs. Where the
config has a preset for the slice (`configs/mm1_30b.py:v5p-512`), it is planned with that.

  python -m mm1_jax.plan --config=configs/mm1_30b_moe.py --topology=v5p-512 --price=2.10 \
      --json=plan.json --picture=plan.png
  python -m mm1_jax.plan --config=configs/mm1_3b.py --topology=v5e-256 --search \
      --meshes='fsdp=-1; fsdp=-1,tensor=2' --remats=full,dots --accumulation=1,2,4
  python -m mm1_jax.plan --compare=a.json,b.json

Any value of the config can be overridden, such as `--config.data.batch_size=64`. See docs/plans.md
for what is predicted and how well.
"""

import json
import pathlib
from typing import cast, get_args

from absl import app, flags

from mm1_jax import cli
from mm1_jax.config import ConfigError
from mm1_jax.plan.compare import compare_table, markdown_table, read_figures
from mm1_jax.plan.compile import What, default_cache, parse_option
from mm1_jax.plan.estimate import make_plan
from mm1_jax.plan.preset import with_preset
from mm1_jax.plan.report import draw, figures, table
from mm1_jax.plan.search import parse_mesh, search, search_table
from mm1_jax.plan.topology import find_topology

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice, such as v5p-128 or v5e-256.")
_SLICES = flags.DEFINE_integer("num_slices", 1, "Equal slices; mesh.data runs between them.")
_WHAT = flags.DEFINE_enum("what", "train", get_args(What), "Program to plan.")
_PRICE = flags.DEFINE_float("price", None, "Of a chip for an hour, for the cost of the run.")
_JSON = flags.DEFINE_string("json", None, "File to write all figures to.")
_PICTURE = flags.DEFINE_string("picture", None, "PNG file to draw memory and time to.")
_CACHE = flags.DEFINE_string("cache", None, "Folder of compiled programs; ~/.cache/mm1_jax/plans.")
_OPTIONS = flags.DEFINE_list("compiler_options", [], "XLA options, such as xla_tpu_x=true,...")
_QUICK = flags.DEFINE_bool(
  "quick", False, "Stop before code is generated: seconds, not minutes; times are lower bounds."
)
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes x remat policies x rows at a time.")
_MESHES = flags.DEFINE_string("meshes", None, "For --search: 'fsdp=-1; fsdp=-1,tensor=2'.")
_REMATS = flags.DEFINE_list("remats", None, "For --search: values of model.remat.")
_ACCUMULATION = flags.DEFINE_list(
  "accumulation", ["1", "2", "4"], "For --search: values of train.accumulation_steps."
)
_MARKDOWN = flags.DEFINE_list("markdown", None, "JSON files of plans, for one Markdown table.")
_COMPARE = flags.DEFINE_list("compare", None, "Two JSON files of plans, to set side by side.")


def main(argv: list[str]) -> None:
  cli.refuse_arguments(argv)
  if _COMPARE.value is not None:
    if len(_COMPARE.value) != 2:
      raise ConfigError("--compare takes two files: --compare=a.json,b.json.")
    print(compare_table(*map(read_figures, _COMPARE.value)))
    return
  if _MARKDOWN.value is not None:
    print(markdown_table([read_figures(path) for path in _MARKDOWN.value]))
    return
  if _TOPOLOGY.value is None:
    raise ConfigError("--topology=SLICE is needed, such as v5p-128 or v5e-256.")
  run = cli.load_config(_CONFIG)
  topology = find_topology(_TOPOLOGY.value, _SLICES.value)
  cache = pathlib.Path(_CACHE.value) if _CACHE.value else default_cache()
  if _SEARCH.value:
    plans = search(
      run,
      topology,
      meshes=[parse_mesh(m) for m in _MESHES.value.split(";")] if _MESHES.value else [run.mesh],
      remats=_REMATS.value or [run.model.remat],
      accumulations=_counts("accumulation", _ACCUMULATION.value),
      cache=cache,
      quick=_QUICK.value,
    )
    print(search_table(plans))
    _write([figures(plan, _PRICE.value) for plan in plans])
    return
  options = dict(map(parse_option, _OPTIONS.value))
  what, quick = cast(What, _WHAT.value), _QUICK.value
  plan = make_plan(run, topology, what, options=options, cache=cache, quick=quick)
  print(table(plan, _PRICE.value))
  _write(figures(plan, _PRICE.value))
  if _PICTURE.value:
    pathlib.Path(_PICTURE.value).write_bytes(draw(plan))


def _parse(argv: list[str]) -> list[str]:
  return cli.parse(with_preset(argv))


def _write(values) -> None:
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(values, indent=1) + "\n")


def _counts(flag: str, texts: list[str]) -> list[int]:
  if not all(text.isdigit() and int(text) for text in texts):
    raise ConfigError(f"--{flag}={','.join(texts)} must be counts, such as 1,2,4.")
  return [int(text) for text in texts]


if __name__ == "__main__":
  cli.run(app.run, main, flags_parser=_parse)
