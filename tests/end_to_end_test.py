# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the command on the shipped sample: killed, stopped, resumed, and fine-tuned.

However a run of ten steps is cut up, its losses and its last checkpoint are the same, bit for bit.
"""

import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from mm1_jax import legend
from mm1_jax.inference.model import Model
from mm1_jax.metrics import read_metrics, read_tables
from tests.checkpoint_test import flip

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
NUM_STEPS = 10
SMALL = {
  "model.vision.image_size": "(32, 32)",
  "model.vision.width": 32,
  "model.vision.depth": 1,
  "model.vision.mlp_dim": 32,
  "model.connector.kind": "average_pool",
  "model.connector.token_grid": "(2, 2)",
  "model.decoder.width": 32,
  "model.decoder.depth": 2,
  "model.decoder.head_dim": 8,
  "model.decoder.mlp_dim": 64,
  "data.batch_size": 4,
  "data.seq_len": 128,
  "data.images_per_row": 2,
  "data.window_rows": 32,
  "train.num_steps": NUM_STEPS,
  "train.log_every": 1,
  "train.eval_every": 5,
  "train.eval_batches": 1,
  "optimizer.warmup_steps": 2,
  "checkpoint.every": 5,
}

# The command itself, with a blow in the middle: at the batch of step AT, before it is trained on.
INTERRUPTED = """
import os, pathlib, runpy, signal, sys, time
import mm1_jax.train.loop as loop
how, at, workdir = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
device_batch, calls = loop.device_batch, []

def interrupt(batch, mesh):
  calls.append(None)
  # Evaluation puts batches on the mesh too; those of training are counted by their caller.
  if sys._getframe(1).f_code.co_name != "held_out_loss":
    interrupt.step += 1
    if interrupt.step == at:
      if how == "SIGKILL":
        while not (workdir / "checkpoints" / "5").exists():
          time.sleep(0.05)
      if how == "SIGINT":
        os.killpg(os.getpgid(0), signal.SIGINT)  # as a terminal's Ctrl-C does, workers included
      else:
        os.kill(os.getpid(), getattr(signal, how))
  return device_batch(batch, mesh)

interrupt.step = 0
loop.device_batch = interrupt
sys.argv = ["main.py", *sys.argv[4:]]
runpy.run_module("mm1_jax.main", run_name="__main__", alter_sys=True)
"""


def run(
  workdir: pathlib.Path,
  config: str = "mm1_debug.py:moe",
  *,
  interrupt: tuple[str, int] | None = None,
  **overrides,
) -> subprocess.CompletedProcess:
  """Runs the command on one device; `interrupt` is a signal and the step that it comes in."""
  values = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
  args = [f"--config=configs/{config}", f"--workdir={workdir}"]
  args += [f"--config.{name}={value}" for name, value in values.items()]
  program = ["-m", "mm1_jax.main"]
  if interrupt:
    program = ["-c", INTERRUPTED, interrupt[0], str(interrupt[1]), str(workdir)]
  flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
  return subprocess.run(
    [sys.executable, *program, *args],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
    start_new_session=True,
  )


def check_ok(result: subprocess.CompletedProcess) -> None:
  assert result.returncode == 0, result.stderr[-3000:]
  assert "Traceback" not in result.stderr


def saved_steps(workdir: pathlib.Path) -> list[int]:
  return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Returns all arrays of a checkpoint: params, optimizer state and counters."""
  import orbax.checkpoint as ocp

  found = {}
  for item in ("params", "train"):
    with ocp.PyTreeCheckpointer() as checkpointer:
      path = workdir / "checkpoints" / str(step) / item
      restored = checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=None))
      found |= {f"{item}.{name}": np.asarray(x) for name, x in restored.items()}
  return found


UNEQUAL = ("speed/", "memory/")  # names of metrics that are of the machine


def assert_same_run(
  actual: pathlib.Path, expected: pathlib.Path, *, others: tuple[str, ...] = ()
) -> None:
  """All but metrics of the machine, and those that only the actual run has: `others`."""
  a, b = arrays(actual, NUM_STEPS), arrays(expected, NUM_STEPS)
  assert a.keys() == b.keys()
  for name, value in b.items():
    assert a[name].tobytes() == value.tobytes(), name
  a, b = read_metrics(actual), read_metrics(expected)
  names = {name for name in b if not name.startswith(UNEQUAL)}
  assert names == {name for name in a if not name.startswith((*UNEQUAL, *others))}
  assert len(b["loss"]) == NUM_STEPS
  for name in names:
    assert a[name] == b[name], name
  states = [
    (w / "checkpoints" / str(NUM_STEPS) / "data" / "metadata").read_text()
    for w in (actual, expected)
  ]
  assert states[0] == states[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight") / "run"
  result = run(workdir)
  check_ok(result)
  return workdir, result


def test_killed_and_resumed_is_the_same_run(straight, tmp_path):
  """kill -9 in step 8: the checkpoint of step 5 is whole, and steps 6 and 7 are taken again."""
  result = run(tmp_path, interrupt=("SIGKILL", 8))
  assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
  assert saved_steps(tmp_path) == [5]
  assert max(read_metrics(tmp_path)["loss"]) >= 6
  result = run(tmp_path)
  check_ok(result)
  assert "resuming at step 5" in result.stderr
  assert_same_run(tmp_path, straight[0])


@pytest.mark.parametrize(("name", "workers"), [("SIGTERM", 0), ("SIGINT", 2)])
def test_stopped_and_resumed_is_the_same_run(straight, tmp_path, name, workers):
  """The step is finished and saved, wherever it falls; Ctrl-C reaches the data workers as well."""
  result = run(tmp_path, interrupt=(name, 3), data__num_workers=workers)
  # Interrupted workers may still say so on stderr; the run itself still saves.
  assert result.returncode == 0, result.stderr[-3000:]
  assert f"stopped by {name}; saved at step 3, run again to continue" in result.stderr
  assert saved_steps(tmp_path) == [3]
  assert max(read_metrics(tmp_path)["loss"]) == 3
  result = run(tmp_path, data__num_workers=workers)
  check_ok(result)
  assert_same_run(tmp_path, straight[0])


def test_a_damaged_checkpoint_is_gone_back_from_to_the_same_run(straight, tmp_path):
  """One bit of one array of the newest step; in the files all is sound."""
  workdir = pathlib.Path(shutil.copytree(straight[0], tmp_path / "run"))
  flip("params", "decoder.embedding", 77, 30)(workdir / "checkpoints" / str(NUM_STEPS))
  result = run(workdir)
  check_ok(result)
  aside = workdir / "checkpoints" / f"{NUM_STEPS}.damaged"
  assert f"step {NUM_STEPS} is left out and now {aside}" in result.stderr
  assert "checksums differ of decoder.embedding" in result.stderr
  assert "resuming at step 5" in result.stderr
  assert_same_run(workdir, straight[0])


def test_a_finished_run_has_nothing_to_do(straight, tmp_path):
  before = read_metrics(straight[0])
  check_ok(run(straight[0]))
  assert read_metrics(straight[0]) == before
  assert saved_steps(straight[0]) == [5, 10]


def test_another_seed_is_another_run(straight, tmp_path):
  """Else the comparisons above would hold for any run."""
  check_ok(run(tmp_path, train__seed=1))
  assert read_metrics(tmp_path)["loss"] != read_metrics(straight[0])["loss"]


def test_benchmarks_inside_a_run_change_nothing_of_it(straight, tmp_path):
  """Scored at steps 4 and 8 and at the end, from the run's own mesh and params."""
  sample = ROOT / "mm1_jax" / "data" / "sample"
  of_captions = {"task": "records:captions", "data": sample, "every": 4, "limit": 3, "form": "nats"}
  result = run(tmp_path, **{f"eval_tasks__named__{k}": v for k, v in of_captions.items()})
  check_ok(result)
  scores = read_metrics(tmp_path)["eval_tasks/named/nats_per_token"]
  assert [*scores] == [4, 8, NUM_STEPS]
  assert scores[NUM_STEPS] < scores[4] < np.log(5000)
  errors = read_metrics(tmp_path)["eval_tasks/named/nats_per_token/standard_error"]
  assert all(error > 0 for error in errors.values())
  line = re.search(r"step 8 \| eval_tasks/named/nats_per_token ([\d.]+) ± [\d.]+", result.stderr)
  assert line
  assert float(line[1]) == pytest.approx(scores[8], abs=1e-4)
  assert legend.pattern("eval_tasks/named/nats_per_token") == "eval_tasks/{task}/{metric}"
  assert_same_run(tmp_path, straight[0], others=("eval_tasks/",))


def test_a_run_is_evaluated_on_the_sample(straight, tmp_path):
  """As docs/guides/evaluate.md has it."""
  result = subprocess.run(
    [sys.executable, "-m", "mm1_jax.eval", f"--checkpoint={straight[0]}", "--sample", "--limit=3",
     f"--out={tmp_path}"],
    cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert [line.split()[4] for line in lines if line.startswith("records:")] == [
    "own",
    "other",
    "blind",
  ]
  assert "own - other" in result.stdout
  for name in ("results.json", "results.md", "results.html", "items"):
    assert (tmp_path / name).exists()


@pytest.mark.parametrize(
  ("key", "value", "says"),
  [
    ("task", "records:gone", "no file matches"),
    ("task", "coca", "no task 'coca'; near it: coco"),
    ("limit", "0", "eval_tasks.named: limit 0 must lie in"),
    ("task", "mm_vet", "has no score here"),
  ],
)
def test_a_benchmark_that_cannot_be_is_told_before_the_first_step(tmp_path, key, value, says):
  result = run(tmp_path, **{f"eval_tasks__named__{key}": value})
  assert result.returncode == 1
  assert says in result.stderr
  assert "Traceback" not in result.stderr
  assert not (tmp_path / "checkpoints").exists()


def test_what_a_run_writes(straight):
  workdir, result = straight
  metrics = read_metrics(workdir)
  steps = list(range(1, NUM_STEPS + 1))
  every_step = [
    *("loss", "z_loss", "lr", "grad_norm", "skipped", "skipped_in_a_row"),
    *(f"{name}/{part}" for name in ("lr", "grad_norm") for part in ("vit", "connector", "decoder")),
    *("moe/balance_loss", "moe/router_z_loss", "moe/dropped"),
    *("moe/load_min", "moe/load_max", "moe/load_entropy", "moe/dead_experts"),
    *("data/padded_fraction", "data/empty_slot_fraction", "data/dropped", "memory/peak_gib"),
  ]
  for name in every_step:
    assert list(metrics[name]) == steps, name
    assert np.isfinite(list(metrics[name].values())).all(), name
  # Batches this small may have fewer than two pictures, which differ in nothing.
  assert set(metrics["image_spread"]) <= set(steps)
  known = {metric.name for metric in legend.SCALARS}
  # A CPU has no MFU, and this run no benchmarks.
  left_out = {"speed/mfu", "eval_tasks/{task}/{metric}"}
  assert {legend.pattern(name) for name in metrics} == known - left_out
  tables = read_tables(workdir)["moe/load"]  # means since the one before, like those of the lines
  assert list(tables) == [5, 10]
  for table in tables.values():
    assert table.shape == (1, 8)
    assert table.sum() == pytest.approx(8, rel=1e-4)
  assert max(metrics["moe/load_max"].values()) >= tables[5].max() >= 1
  # A text of the sample is longer than its share of so short a run, and comes later.
  for source in ("captions", "interleaved"):
    assert metrics[f"loss/{source}"], source
    assert list(metrics[f"eval/loss/{source}"]) == [5, 10], source
  for name in ("step_seconds", "tokens_per_second", "images_per_second", "data_wait"):
    assert list(metrics[f"speed/{name}"]) == steps[1:], name
  assert list(metrics["speed/start_seconds"]) == list(metrics["speed/compile_seconds"]) == [1]
  assert metrics["speed/start_seconds"][1] > metrics["speed/compile_seconds"][1] > 0
  assert list(metrics["speed/save_seconds"]) == [6]  # of the save at step 5
  assert metrics["loss"][10] < metrics["loss"][1]
  assert metrics["skipped"][10] == 0
  lines = [line for line in result.stdout.splitlines() if line.startswith("step")]
  assert len(lines) == NUM_STEPS
  assert "10/10 (100%)" in lines[-1]
  assert [" | start " in line for line in lines] == [True] + [False] * 9
  assert [i for i, line in enumerate(lines, start=1) if " | save " in line] == [6]


def test_what_lies_beside_the_metrics(straight):
  workdir, _ = straight
  assert {"config.json", "tokenizer.model", "metrics.jsonl", "tensorboard", "checkpoints"} <= {
    p.name for p in workdir.iterdir()
  }
  assert saved_steps(workdir) == [5, 10]
  assert not [p for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name]
  picture = np.asarray(PIL.Image.open(workdir / "first_batch.png"))
  assert min(picture.shape[:2]) > 100


def events(workdir: pathlib.Path):
  """Yields the events of a workdir's TensorBoard files, each record's checksum left alone."""
  from tensorboardX.proto import event_pb2

  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")  # then 4 bytes of checksum, record, 4 more
      yield event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]


def test_tensorboard_can_read_it(straight):
  losses, pictures = {}, {}
  for event in events(straight[0]):
    for value in event.summary.value:
      if value.tag == "loss":
        losses[event.step] = value.simple_value
      elif value.HasField("image"):
        pictures[value.tag, event.step] = value.image.encoded_image_string
  assert losses == pytest.approx(read_metrics(straight[0])["loss"], rel=1e-6)
  assert list(pictures) == [("first_batch", 0)]
  picture = np.asarray(PIL.Image.open(io.BytesIO(pictures["first_batch", 0])))
  assert min(picture.shape[:2]) > 100
  assert picture.std() > 10


def test_fine_tuning_takes_the_pretrained_params(straight, tmp_path):
  result = run(
    tmp_path,
    "mm1_debug_sft.py:moe",
    train__init_from=straight[0],
    train__num_steps=2,
    train__eval_every=2,
    optimizer__learning_rate=0.0,
  )
  check_ok(result)
  (line,) = [line for line in result.stderr.splitlines() if ": loaded " in line]
  pretrained = arrays(straight[0], NUM_STEPS)
  params = {name: x for name, x in pretrained.items() if name.startswith("params.")}
  assert f"{straight[0]}/checkpoints/10/params': loaded {len(params)} params" in line
  assert line.endswith("resized: none; new adapters: 0")
  # At a rate of 0 they are still the same: nothing was initialised over them.
  tuned = arrays(tmp_path, 2)
  for name, value in params.items():
    assert tuned[name].tobytes() == value.tobytes(), name
  # And the optimizer starts anew: Adafactor's, after two steps.
  assert not any(".mu." in name for name in tuned)
  assert tuned["train.guard.accepted"] == 2
  metrics = read_metrics(tmp_path)
  assert list(metrics["loss/sft"]) == [1, 2]
  assert list(metrics["eval/loss/sft"]) == [2]


@pytest.mark.parametrize(
  ("start", "rate", "every"),
  [(0, 1e30, 5), (0, 50.0, 1), (NUM_STEPS, 1e30, 1), (NUM_STEPS, 50.0, 5)],
)
def test_an_absurd_rate_leaves_a_checkpoint_that_trains(straight, tmp_path, rate, every, start):
  """From the start, and when a healthy run is resumed; with `every` 1, the ruin is saved too.

  Its params are finite at a rate of 50, as is their loss, of hundreds of nats.
  """
  workdir = tmp_path / "run"
  if start:
    shutil.copytree(straight[0], workdir)
  settings = {"train__num_steps": 30, "checkpoint__keep": 1, "checkpoint__every": every}
  result = run(workdir, **settings, optimizer__learning_rate=rate)
  assert result.returncode == 1, result.stderr[-3000:]
  error = result.stderr.splitlines()[-1]
  assert "10 steps in a row, up to step" in error
  # The first step of a run has a rate of 0: of its params a step is accepted.
  good = start or (1 if every == 1 else None)
  if good is None:
    assert "No checkpoint was saved" in error
  else:
    assert f"The last good checkpoint is that of step {good};" in error
    assert saved_steps(workdir)[-1] == good
    aside = workdir / "checkpoints" / f"{good + 1}.refused"
    assert aside.exists() == (every == 1) == (str(aside) in error)
  result = run(workdir, **settings, optimizer__learning_rate=1e-3)
  check_ok(result)
  assert ("resuming at step" in result.stderr) == (good is not None)
  if good is not None:
    assert (
      f"changed since the last start: optimizer.learning_rate: {rate} -> 0.001" in result.stderr
    )
  metrics = read_metrics(workdir)
  assert metrics["skipped"][30] == 0
  assert metrics["loss"][30] < metrics["loss"][(good or 0) + 1] < 10
  assert all(np.isfinite(x).all() for x in arrays(workdir, 30).values())


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
  """A run of which every second step or so is refused, once spikes are looked for."""
  workdir = tmp_path_factory.mktemp("skipping") / "run"
  check_ok(run(workdir, **SKIPPING))
  return workdir


SKIPPING = {
  "train__num_steps": 34,
  "train__spike_factor": 1.02,
  "optimizer__learning_rate": 1e-6,  # norms stay as high as they are at first
  "checkpoint__every": 1,
  "checkpoint__keep": 99,
}


def test_nothing_is_saved_after_a_refused_step(skipping):
  in_a_row = read_metrics(skipping)["skipped_in_a_row"]
  assert 0 < sum(map(bool, in_a_row.values())) < 14
  assert saved_steps(skipping) == [step for step, num in in_a_row.items() if not num]


def test_a_run_ends_with_an_accepted_step(skipping, tmp_path):
  in_a_row = read_metrics(skipping)["skipped_in_a_row"]
  at = next(step for step in sorted(in_a_row) if in_a_row[step])
  result = run(tmp_path, **{**SKIPPING, "train__num_steps": at, "checkpoint__every": 100})
  check_ok(result)
  in_a_row = read_metrics(tmp_path)["skipped_in_a_row"]
  assert in_a_row[at] == 1
  assert max(in_a_row) > at
  assert not in_a_row[max(in_a_row)]
  assert saved_steps(tmp_path) == [max(in_a_row)]
  assert "ETA -" not in result.stdout


def test_a_run_that_is_stopped_after_a_refused_step_is_the_same_in_the_end(skipping, tmp_path):
  in_a_row = read_metrics(skipping)["skipped_in_a_row"]
  at = next(step for step in sorted(in_a_row) if in_a_row[step] == 1)
  result = run(tmp_path, **SKIPPING, interrupt=("SIGTERM", at))
  assert result.returncode == 0, result.stderr[-3000:]
  assert f"saved at step {at - 1}, run again to continue" in result.stderr
  assert f"are not saved: the last one, {at}, was skipped" in result.stderr
  assert saved_steps(tmp_path)[-1] == at - 1
  check_ok(run(tmp_path, **SKIPPING))
  last = saved_steps(skipping)[-1]
  a, b = arrays(tmp_path, last), arrays(skipping, last)
  assert {name: x.tobytes() for name, x in a.items()} == {n: x.tobytes() for n, x in b.items()}


# Adapters start at nothing, on a model that has seen ten batches: they need a high rate.
@pytest.mark.parametrize(("spec", "rate"), [("moe", 3e-3), ("moe,lora", 3e-2)])
def test_fine_tuning_of_a_sparse_model_learns_and_answers(straight, tmp_path, spec, rate):
  """With adapters too: held-out loss falls, the router has its losses, and the run can be asked."""
  num_steps = 30
  result = run(
    tmp_path,
    f"mm1_debug_sft.py:{spec}",
    train__init_from=straight[0],
    train__num_steps=num_steps,
    train__eval_every=5,
    checkpoint__every=num_steps,
    optimizer__learning_rate=rate,
  )
  check_ok(result)
  metrics = read_metrics(tmp_path)
  held_out = metrics["eval/loss/sft"]  # of the same batch
  assert held_out[num_steps] < held_out[5] - 0.01
  for name in ("moe/balance_loss", "moe/router_z_loss"):
    assert min(metrics[name].values()) > 0
  before, after = arrays(straight[0], NUM_STEPS), arrays(tmp_path, num_steps)
  decoder = [name for name in before if name.startswith("params.decoder.units.")]
  kept = {name for name in decoder if np.array_equal(before[name], after[name])}
  assert kept == (set(decoder) if "lora" in spec else set())
  adapters = [name for name in after if ".lora." in name and name.endswith(".b")]
  assert all(np.any(after[name]) for name in adapters)
  assert bool(adapters) == ("lora" in spec)
  model = Model.load(tmp_path)
  assert model.chat
  assert all(isinstance(x, str) for x in model.generate([["Hi"], ["What?"]], max_new_tokens=4))
