# SPDX-License-Identifier: Apache-2.0
"""MM1's findings, tried with small models in a small world.

  python -m lab --list
  python -m lab resolution connectors --seeds=3
  python -m lab all --quick              about 40 minutes on two cores
  python -m lab mine.py                  a contrast of your own, see docs/guides/lab.md

Trains what a finding needs, says reproduced, not reproduced or undecided by a rule that was written
before, and draws it: `NAME.json`, `NAME.png` and `index.html` in the workdir's `results/`. Runs are
kept by a hash of their config and seed: stop it at any time, and run it again to continue.
"""

import importlib
import importlib.util
import json
import pathlib
import pkgutil
import time

import jax
import numpy as np

from lab import findings, results
from lab.finding import Finding
from lab.rules import Table
from lab.runs import Lab
from mm1_jax import cli
from mm1_jax.config import ConfigError
from mm1_jax.metrics import format_seconds

QUICK = ("resolution", "connectors", "interleaved", "captions")
QUICK_SHORT, QUICK_SEEDS = 2, 2


def main() -> None:
  args = parse()
  if args.list:
    for name in names():
      print(f"{name:14}{load(name).title}")
    return
  chosen = args.findings
  if chosen == ["all"]:
    chosen = list(QUICK) if args.quick else names()
  loaded = {pathlib.Path(name).stem: load(name) for name in chosen}
  short = QUICK_SHORT if args.quick else 1
  folder = args.workdir / ("quick" if args.quick else "results")
  if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", str((args.workdir / "programs").absolute()))
  lab = Lab(args.workdir, short=short)
  begin = time.monotonic()
  for name, finding in loaded.items():
    seeds = args.seeds or (QUICK_SEEDS if args.quick else finding.seeds)
    print(f"[{format_seconds(time.monotonic() - begin)}] {name}: {finding.question}", flush=True)
    show(run(name, finding, lab, folder, seeds))
  print(f"look at {results.write_page(folder, results.read(folder))}")


def parse():
  parser = cli.make_parser("lab", __doc__)
  parser.add_argument(
    "findings", nargs="*", default=["all"], metavar="FINDING", help="names, files, or all"
  )
  parser.add_argument("--list", action="store_true", help="names all findings and ends")
  parser.add_argument(
    "--quick", action="store_true", help="half the steps, 2 seeds; `all` is then the first four"
  )
  parser.add_argument("--seeds", type=cli.at_least(1), help="each cell is trained with so many")
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/lab"))
  return parser.parse_args()


def names() -> list[str]:
  """Returns the findings that there are, in MM1's order."""
  found = [module.name for module in pkgutil.iter_modules(findings.__path__)]
  return sorted(found, key=lambda name: (*findings.ORDER, name).index(name))


def load(name: str) -> Finding:
  """Returns a finding by its name, or of a Python file that defines FINDING.

  Raises:
    ConfigError: there is none.
  """
  if name.endswith(".py"):
    path = pathlib.Path(name)
    if not path.is_file():
      raise ConfigError(f"there is no file {name}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "FINDING", None), Finding):
      raise ConfigError(f"{name} defines no FINDING, a lab.finding.Finding.")
    return module.FINDING
  if name not in names():
    raise ConfigError(f"there is no finding '{name}'; there are {', '.join(names())}.")
  return importlib.import_module(f"lab.findings.{name}").FINDING


def run(name: str, finding: Finding, lab: Lab, folder: pathlib.Path, seeds: int) -> results.Results:
  """Trains and measures a finding's cells, seed by seed, and writes what came out so far."""
  values = {cell: {measure: [] for measure in finding.measures} for cell in finding.cells}
  costs = {cell: [] for cell in finding.cells}
  for seed in range(seeds):
    for cell, of in finding.cells.items():
      for measure, found in lab.values(of, seed, finding.measures).items():
        values[cell][measure].append(found)
      costs[cell].append(lab.cost(of, seed))
      shown = {m: round(float(np.mean(v[-1])), 3) for m, v in values[cell].items()}
      print(f"  seed {seed}, {cell}: {shown}, {costs[cell][-1]:.0f} CPU s", flush=True)
    stacked = {c: {m: np.stack(v) for m, v in ms.items()} for c, ms in values.items()}
    collected = results.collect(finding, Table(stacked), costs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(collected, indent=1) + "\n")
    (folder / f"{name}.png").write_bytes(results.draw(finding.charts, collected))
  return collected


def show(collected: results.Results) -> None:
  print("\n".join(results.table_lines(collected)))
  print(f"{collected['title']}: {collected['verdict'].upper()}\n  {collected['why']}\n", flush=True)


if __name__ == "__main__":
  cli.run(main)
