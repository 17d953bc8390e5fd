# SPDX-License-Identifier: Apache-2.0
"""Findings: each is whole and short, its runs can be made, and a contrast of one's own runs."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from lab import base, publish, results
from lab.__main__ import load, names
from lab.rules import Table, Word
from mm1_jax import checkpoint
from mm1_jax.config import ConfigError
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("name", names())
def test_a_finding_is_whole(name):
  finding = load(name)
  for run in finding.cells.values():
    run.run_config()
  for chart in finding.charts:
    assert chart.measure in finding.measures
    assert {*chart.cells} <= {*finding.cells}
  assert len((ROOT / "lab" / "findings" / f"{name}.py").read_text().splitlines()) < 150
  assert all((finding.title, finding.paper, finding.question, finding.rule))


@functools.cache
def shapes(config: tuple[tuple[str, str], ...]) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a run's params by name."""
  cfg = base.config(1, config)
  with jax.set_mesh(make_mesh(cfg, jax.devices()[:1])):
    model = jax.eval_shape(lambda: MM1(jax.random.key(0), cfg.model))
  return {name: x.shape for name, x in checkpoint.to_names(model).items()}


@pytest.mark.parametrize("name", names())
def test_every_run_fits_the_run_that_it_starts_from(name):
  for run in load(name).cells.values():
    while run.start is not None:
      before, after = (
        {
          param: shape
          for param, shape in shapes(tuple(of.config.items())).items()
          if param.split(".")[0] not in run.fresh and param not in checkpoint.GRIDS
        }
        for of in (run.start, run)
      )
      assert before == after
      run = run.start


@pytest.mark.parametrize("name", names())
def test_a_rule_decides_and_needs_more_than_one_seed(name):
  finding = load(name)
  rng = np.random.default_rng(0)
  table = {
    cell: {measure: rng.random((2, 20)) for measure in finding.measures} for cell in finding.cells
  }
  two = results.judge(finding, Table(table))
  assert isinstance(two.word, Word)
  assert two.why
  first = {c: {m: v[:1] for m, v in measured.items()} for c, measured in table.items()}
  assert results.judge(finding, Table(first)).word is Word.UNDECIDED


def test_a_result_has_its_figures_its_picture_and_its_page(tmp_path):
  finding = load("connectors")
  rng = np.random.default_rng(0)
  items = rng.random((1, 50)) < 0.7
  same = {cell: {"digits": items + rng.normal(0, 0.001, (3, 50))} for cell in finding.cells}
  collected = results.collect(finding, Table(same), {cell: [1.0] * 3 for cell in same})
  assert collected["verdict"] == "reproduced"
  assert collected["cells"]["linear"]["measures"]["digits"]["mean"] == pytest.approx(
    items.mean(), abs=0.01
  )
  (tmp_path / "connectors.json").write_text(json.dumps(collected))
  (tmp_path / "connectors.png").write_bytes(results.draw(finding.charts, collected))
  page = results.write_page(tmp_path, results.read(tmp_path)).read_text()
  assert "kind hardly matters" in page
  assert "reproduced" in page
  assert "data:image/png" in page


def test_the_notes_are_made_from_the_results():
  collected = results.read(publish.KEPT)
  assert (publish.NOTES / "findings.md").read_text() == publish.page(collected)
  for name, of in collected.items():
    assert (publish.NOTES / "findings" / f"{name}.png").exists()
    finding = load(name)
    assert (finding.title, finding.rule, finding.paper) == (of["title"], of["rule"], of["paper"])
    assert [*finding.cells] == [*of["cells"]]


@pytest.mark.parametrize(
  ("name", "says"),
  [("resolutions", "there is no finding 'resolutions'"), ("no.py", "there is no file no.py")],
)
def test_a_wrong_name_is_one_clear_error(name, says):
  with pytest.raises(ConfigError, match=says):
    load(name)


def test_the_guides_contrast_is_one_and_has_thirty_lines(tmp_path):
  guide = (ROOT / "docs" / "guides" / "lab.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
  assert len(code.splitlines()) <= 30
  (tmp_path / "mine.py").write_text(code)
  finding = load(str(tmp_path / "mine.py"))
  for run in finding.cells.values():
    run.run_config()
  values = {
    "patches of 8": {"digits": np.zeros((2, 9))},
    "patches of 4": {"digits": np.ones((2, 9))},
  }
  assert finding.decide(Table(values)).word is Word.REPRODUCED


OWN = """
from lab import measures
from lab.documents import Named
from lab.finding import Chart, Finding
from lab.rules import all_above
from lab.runs import Run

CELLS = {
  "few steps": Run(((1.0, Named()),), 2, {"data.batch_size": "1"}),
  "more steps": Run(((1.0, Named()),), 4, {"data.batch_size": "1"}),
}
FINDING = Finding(
  title="More steps are better",
  paper="None.",
  question="Do four steps name more than two?",
  cells=CELLS,
  measures={"kind": measures.kind},
  rule="Reproduced if four steps are above two by 2 standard errors.",
  decide=lambda table: all_above({"4 - 2": table.difference("more steps", "few steps", "kind")}),
  charts=(Chart("kind", tuple(CELLS), "right kind", chance=1 / 8),),
)
"""


@pytest.mark.slow
def test_a_contrast_of_ones_own_runs_from_a_file(tmp_path):
  assert len(OWN.splitlines()) <= 30
  (tmp_path / "own.py").write_text(OWN)
  command = [sys.executable, "-m", "lab", str(tmp_path / "own.py"), "--seeds=2"]
  done = subprocess.run(
    [*command, f"--workdir={tmp_path / 'lab'}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert "More steps are better:" in done.stdout
  collected = json.loads((tmp_path / "lab" / "results" / "own.json").read_text())
  assert collected["seeds"] == 2
  assert (tmp_path / "lab" / "results" / "own.png").stat().st_size > 1000
  assert "Traceback" not in done.stderr
