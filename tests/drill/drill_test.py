# SPDX-License-Identifier: Apache-2.0
"""The drill itself: what it must notice, on small programs; and, slow, its quick part."""

import functools
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.drill import __main__ as command
from tests.drill import fuzz, runs
from tests.drill.core import REFUSED, Expected, Fault, Lab, NotRun, Outcome, Scene, inject, judge
from tests.drill.process import ROOT, Ended, Process, lives

GOOD_END = Ended(0, "trained\n", 1.0, 0.1)
REFUSAL = Ended(1, "training\nerror: the disk is full\n", 1.0, 0.1)


@pytest.fixture
def lab(tmp_path) -> Lab:
  return Lab(tmp_path / "lab")


def program(scene: Scene, text: str) -> Process:
  """Starts a small program."""
  (scene.folder / "program.py").write_text(text)
  return scene.start("program", cwd=scene.folder, env={"PYTHONPATH": str(scene.folder)})


def outcome(ended: Ended, **expected) -> list[Outcome]:
  return [kind for kind, _ in judge(ended, Expected(**expected))]


def test_what_ends_as_expected_is_good():
  assert outcome(GOOD_END, says="trained") == []
  assert outcome(REFUSAL, codes=(REFUSED,), says="disk is full") == []


@pytest.mark.parametrize(
  ("ended", "expected", "kind"),
  [
    (GOOD_END._replace(code=None), {}, Outcome.HUNG),
    (GOOD_END._replace(seconds=61), {}, Outcome.HUNG),
    (GOOD_END._replace(code=-9), {}, Outcome.WRONG),
    (GOOD_END, {"says": "saved"}, Outcome.WRONG),
    (GOOD_END._replace(peak_gb=2), {"most_gb": 1}, Outcome.WRONG),
    (REFUSAL, {}, Outcome.WRONG),
    # The pattern is looked for in the error's line alone.
    (REFUSAL, {"codes": (1,), "says": "training"}, Outcome.WRONG),
    (REFUSAL._replace(text="disk is full\n"), {"codes": (1,)}, Outcome.WRONG),
    (REFUSAL._replace(text="error: a\nerror: b\n"), {"codes": (1,)}, Outcome.WRONG),
    (
      REFUSAL._replace(text="Traceback (most recent call last):\n  ...\nOSError: full\n"),
      {"codes": (1,)},
      Outcome.TRACEBACK,
    ),
  ],
)
def test_each_bad_end_is_noticed(ended, expected, kind):
  assert outcome(ended, **expected) == [kind]


def test_a_program_is_struck_at_its_moment(lab):
  def strike(scene: Scene) -> None:
    text = (
      "import signal, sys, time\n"
      "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
      "print('step 1')\ntime.sleep(60)\n"
    )
    process = program(scene, text)
    process.wait_for("^step 1$")
    process.strike(signal.SIGTERM)
    ended = scene.finish(process, Expected((75,), within=30))
    assert ended.seconds < 30

  row = inject(Fault("a/b", strike), lab, seed=0)
  assert (row.outcome, row.message, row.lost) == (Outcome.GOOD, "step 1", "-")
  assert row.seconds is not None


def test_what_outlives_its_bound_is_killed_with_all_that_it_started(lab):
  children = []

  def strike(scene: Scene) -> None:
    text = (
      "import subprocess, sys, time\n"
      "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
      "print('ready')\ntime.sleep(600)\n"
    )
    process = program(scene, text)
    process.wait_for("ready")
    children.extend(process.children())
    process.strike(signal.SIGCONT)
    scene.finish(process, Expected(within=0.5))

  row = inject(Fault("a/b", strike), lab, seed=0)
  assert row.outcome is Outcome.HUNG
  assert len(children) == 1
  deadline = time.monotonic() + 10
  while lives(children[0]) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not lives(children[0])


def test_a_missed_moment_is_tried_again_with_other_dice(lab):
  rolled = []

  def strike(scene: Scene) -> None:
    rolled.append(scene.dice.random())
    program(scene, "print('too soon')").wait_for("never said")

  row = inject(Fault("a/b", strike), lab, seed=3)
  assert row.outcome is Outcome.MISSED
  assert row.outcome.fails
  assert "too soon" in row.message
  assert len(set(rolled)) == len(rolled) > 1


def test_the_dice_are_those_of_the_seed_and_the_fault(tmp_path):
  rolled: list[float] = []

  def strike(scene: Scene) -> None:
    rolled.append(scene.dice.random())

  for i, (name, seed) in enumerate([("a/b", 0), ("a/b", 0), ("a/c", 0), ("a/b", 1)]):
    inject(Fault(name, strike), Lab(tmp_path / str(i)), seed)
  assert rolled[0] == rolled[1]
  assert len(set(rolled)) == 3


def _raise(error: Exception, _scene: Scene) -> None:
  raise error


@pytest.mark.parametrize(
  ("error", "kind"),
  [(NotRun("no mounts"), Outcome.NOT_RUN), (KeyError("a bug of the fault"), Outcome.WRONG)],
)
def test_what_cannot_run_is_told_apart_from_what_is_broken(lab, error, kind):
  row = inject(Fault("a/b", functools.partial(_raise, error)), lab, seed=0)
  assert row.outcome is kind
  assert row.outcome.fails == (kind is Outcome.WRONG)


def test_what_is_lost_counts_before_what_is_said_wrong(lab):
  def strike(scene: Scene) -> None:
    scene.add(Outcome.WRONG, "exit code 3")
    scene.keeps(["params x is not the reference's"])
    scene.keeps([])  # of another run, which kept all

  row = inject(Fault("a/b", strike), lab, seed=0)
  assert (row.outcome, row.lost) == (Outcome.LOST, "yes")
  assert row.message == "params x is not the reference's; exit code 3"


def test_states_are_compared_whole():
  wanted = {"params a": "1", "train b": "2", "metric loss": "3"}
  assert runs.names_that_differ(wanted, dict(wanted)) == []
  assert runs.names_that_differ(wanted, wanted | {"train b": "9"}) == [
    "train b is not the reference's"
  ]
  missing = {"params a": "1", "train b": "2"}
  assert runs.names_that_differ(wanted, missing) == ["metric loss is not the reference's"]
  assert runs.names_that_differ(wanted, missing, besides="metric") == []
  assert runs.names_that_differ({}, {str(i): "" for i in range(9)})[-1] == "and 6 more"


def test_there_are_many_faults_of_every_subject():
  faults = command.all_faults()
  names = [fault.name for fault in faults]
  assert len(set(names)) == len(names) >= 60
  subjects = {subject.__name__.rpartition(".")[2] for subject in command.SUBJECTS}
  assert {name.split("/")[0] for name in names} == subjects
  modules = {path.stem for path in pathlib.Path(__file__).parent.glob("*.py")}
  assert subjects < modules
  quick = command.chosen(faults, [], quick=True)
  assert {fault.name.split("/")[0] for fault in quick} == subjects
  assert len(quick) < len(faults) / 2


def test_faults_are_chosen_by_subject_and_by_name():
  faults = command.all_faults()
  some = command.chosen(faults, ["signals", "kills/first-save"], quick=False)
  assert {fault.name.split("/")[0] for fault in some} == {"signals", "kills"}
  assert sum(fault.name.startswith("kills") for fault in some) == 1
  with pytest.raises(SystemExit, match="no fault or subject 'signal'"):
    command.chosen(faults, ["signal"], quick=False)


@pytest.mark.parametrize(("code", "lost"), [(0, 0), (3, 1)])
def test_the_table_and_the_exit_code(tmp_path, monkeypatch, capsys, code, lost):
  def strike(scene: Scene) -> None:
    scene.finish(program(scene, f"print('ending')\nraise SystemExit({code})"), Expected())

  both = [Fault("kills/one", strike, turn="x"), Fault("kills/two", lambda scene: None, turn="x")]
  monkeypatch.setattr(command, "all_faults", lambda: both)
  assert command.main([f"--out={tmp_path}", "--seed=5", "--lanes=2"]) == lost
  text, values = (
    (tmp_path / "drill.txt").read_text(),
    json.loads((tmp_path / "drill.json").read_text()),
  )
  assert [row["fault"] for row in values["rows"]] == ["kills/one", "kills/two"]
  assert values["rows"][0]["outcome"] == ("good" if code == 0 else "WRONG")
  assert "2 faults in " in text
  assert "seed 5" in text
  assert "kills/one" in capsys.readouterr().out
  # What is needed to see why stays; the rest goes.
  assert [path.name for path in (tmp_path / "work" / "faults").iterdir()] == ["kills-one"] * lost


def test_mutations_differ_and_repeat():
  def some(seed: int) -> list[bytes]:
    made = fuzz.mutations(b'{"a": {"b": [1, 2, "c"]}, "d": null}', random.Random(seed))
    return [next(made) for _ in range(100)]

  assert some(0) == some(0) != some(1)
  assert len(set(some(0))) > 50


@pytest.mark.long
def test_no_quick_fault_harms(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "tests.drill", "--quick", f"--out={tmp_path}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
