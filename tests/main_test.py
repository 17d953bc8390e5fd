# SPDX-License-Identifier: Apache-2.0
"""The command: what it says to a user's mistakes. One message, exit code 1, and no traceback.

One process imports everything and forks for each command: an import takes seconds, a fork does not.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

from mm1_jax import cli, inputs
from mm1_jax.config import ConfigError

pytestmark = pytest.mark.compiles

ROOT = pathlib.Path(__file__).parents[1]
DEBUG = "--config=configs/mm1_debug.py"

# Reads a list of command lines; the child of each becomes `python -m mm1_jax.main`.
FORKS = """
import json, os, runpy, sys
import mm1_jax.configs.mm1_debug, jax, mm1_jax.cli, mm1_jax.inputs, mm1_jax.train.loop
folder, commands = sys.argv[1], json.load(sys.stdin)
for name, args in commands.items():
  pid = os.fork()
  if pid == 0:
    for fd, stream in ((1, "out"), (2, "err")):
      os.dup2(os.open(f"{folder}/{name}.{stream}", os.O_WRONLY | os.O_CREAT), fd)
    sys.argv = ["main.py", *args]
    runpy.run_module("mm1_jax.main", run_name="__main__", alter_sys=True)
    sys.exit(0)
  code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  with open(f"{folder}/{name}.code", "w") as f:
    f.write(str(code))
"""


class Case(NamedTuple):
  args: list[str]  # WORK becomes a folder of the case's own
  says: list[str]  # in the error, which is one line


CASES = {
  "no_config": Case([], ["--config=FILE is needed"]),
  "missing_config": Case(["--config=configs/mm1_5b.py"], ["configs/mm1_5b.py"]),
  "config_raises": Case(
    ["--config=WORK/raises.py"], ["ZeroDivisionError: division by zero", "raises.py, line 2"]
  ),
  "config_is_no_python": Case(["--config=WORK/syntax.py"], ["SyntaxError: ", "syntax.py, line 1"]),
  "config_imports_nothing": Case(
    ["--config=WORK/imports.py"], ["no_such_module", "imports.py, line 1"]
  ),
  "config_without_get_config": Case(["--config=WORK/empty.py"], ["get_config"]),
  "bad_argument": Case([f"{DEBUG}:foo"], ["mm1_debug is 'dense' or 'moe', not 'foo'"]),
  "unknown_key": Case(
    [DEBUG, "--config.train.num_step=3"], ["train.num_step", "did you mean 'num_steps'?", "'seed'"]
  ),
  "unknown_group": Case(
    [DEBUG, "--config.trian.num_steps=3"], ["'trian'", "did you mean 'train'?", "'optimizer'"]
  ),
  "unknown_source": Case(
    [DEBUG, "--config.data.sources.txt.weight=3"], ["data.sources has no 'txt'", "mean 'text'?"]
  ),
  "wrong_type": Case([DEBUG, "--config.train.num_steps=many"], ["num_steps", "many"]),
  "wrong_value": Case(
    [DEBUG, "--config.optimizer.name=lion"], ["optimizer.name is 'lion'", "'adamw', 'adafactor'"]
  ),
  "out_of_range": Case(
    [DEBUG, "--config.optimizer.clip_norm=-1"],
    ["optimizer.clip_norm -1.0 must lie in (0, inf), or be None, which clips nothing."],
  ),
  "nan": Case([DEBUG, "--config.train.z_loss=nan"], ["train.z_loss nan must lie in [0, inf)"]),
  "none_is_taken": Case(
    [DEBUG, "--config.optimizer.clip_norm=None", "--config.model.image_group=0"],
    ["model.image_group 0 must lie in [1, 2147483648), or be None."],
  ),
  "none_is_no_number": Case([DEBUG, "--config.optimizer.b1=None"], ["b1 is None; it must be of"]),
  "none_of_an_unknown_key": Case(
    [DEBUG, "--config.train.init_form=None"], ["init_from", "init_form"]
  ),
  "unknown_flag": Case([DEBUG, "--wrkdir=x"], ["no flag --wrkdir; did you mean --workdir?"]),
  "no_number": Case([DEBUG, "--peer_timeout=soon"], ["--peer-timeout: invalid int value: 'soon'"]),
  "config_left_out": Case(
    [DEBUG, "--train.num_steps=3"], ["did you mean --config.train.num_steps?"]
  ),
  "no_value": Case([DEBUG, "--config.train.num_steps"], ["--config.train.num_steps needs a value"]),
  "stray_argument": Case([DEBUG, "train"], ["['train']", "--config.key=value"]),
  "does_not_fit": Case(
    [DEBUG, "--config.model.decoder.num_heads=3"], ["num_heads 3", "num_kv_heads 2"]
  ),
  "tokenizer_is_none": Case([DEBUG, "--config.data.tokenizer=WORK/empty.py"], ["data.tokenizer"]),
  "broken_shard": Case(
    [DEBUG, "--config.data.sources.text.path=WORK/broken.arrayrecord"],
    ["source 'text'", "not a whole ArrayRecord file"],
  ),
  "mesh": Case(
    [DEBUG, "--config.data.batch_size=12"],
    ["data.batch_size", "12 does not divide over", "= 8", "8 or 16 would fit"],
  ),
  "too_many_devices": Case([DEBUG, "--config.mesh.data=3"], ["3", "8 devices"]),
  "another_shape": Case(
    [DEBUG, "--config.model.decoder.mlp_dim=64"],
    ["of another model", "decoder.units.layers.0.mlp.down is (4, 384, 128), not (4, 64, 128)"],
  ),
  "another_function": Case(
    [DEBUG, "--config.model.decoder.rope_theta=5e5", "--config.model.vision.activation=gelu"],
    [
      "model.vision.activation: quick_gelu -> gelu; model.decoder.rope_theta: 10000.0 -> 500000.0",
      "Set them back, or start another workdir",
      "--config.train.init_from=",
    ],
  ),
  "finished": Case(
    [DEBUG, "--config.train.num_steps=3", "--config.model.dtype=bfloat16"],
    ["model.dtype: float32 -> bfloat16"],
  ),
  "another_source": Case(
    [
      DEBUG,
      "--config.model.decoder.norm_eps=0.1",
      "--config.train.init_from=WORK/../another_shape/run",
    ],
    [
      "model.decoder.norm_eps: 1e-05 -> 0.1",
      "--config.train.init_changes=\"('model.decoder.norm_eps',)\"",
    ],
  ),
  "another_mixture": Case(
    [DEBUG, "--config.data.seed=1"], ["seed: 0 then, 1 now", "train.init_from"]
  ),
}


# Cases of a run that is there already.
LEFT_ALONE = ["another_shape", "another_mixture", "another_function", "finished"]


def write_run(workdir: pathlib.Path) -> None:
  """Leaves a run of mm1_debug at step 3 there, its arrays all zeros; nothing is compiled."""
  import jax
  import numpy as np

  from mm1_jax import checkpoint
  from mm1_jax.config import RunConfig
  from mm1_jax.configs import mm1_debug
  from mm1_jax.data.pipeline import make_pipeline
  from mm1_jax.models.mm1 import MM1
  from mm1_jax.sharding import abstract_state, make_mesh
  from mm1_jax.train.step import init_state

  run = RunConfig.from_dict(mm1_debug.get_config().to_dict())
  state = abstract_state(lambda: init_state(MM1(jax.random.key(0), run.model), run), make_mesh(run))
  state = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), jax.devices()[0]), state
  )
  pipeline = make_pipeline(
    run.data,
    run.input_spec,
  )
  checkpoint.write_run_files(workdir, run)
  with checkpoint.Checkpointer(workdir, run.checkpoint) as checkpointer:
    train = state._replace(model=None)
    checkpointer.save(3, params=state.model, train=train, data=pipeline.state())
    checkpointer.wait()
  pipeline.close()


def write_files(work: pathlib.Path) -> None:
  work.mkdir()
  (work / "raises.py").write_text("def get_config():\n  return 1 / 0\n")
  (work / "syntax.py").write_text("def get_config(:\n")
  (work / "imports.py").write_text("import no_such_module\n")
  (work / "empty.py").write_text("")
  (work / "broken.arrayrecord").write_bytes(b"no records")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("main")
  for name in CASES:
    write_files(folder / name)
  write_run(folder / "another_shape" / "run")
  for name in LEFT_ALONE[1:]:
    shutil.copytree(folder / "another_shape" / "run", folder / name / "run")
  return folder


def run_all(folder: pathlib.Path, names) -> None:
  commands = {}
  for name in names:
    case = CASES[name]
    args = [arg.replace("WORK", str(folder / name)) for arg in case.args]
    commands[name] = [*args, f"--workdir={folder / name / 'run'}"]
  subprocess.run(
    [sys.executable, "-c", FORKS, str(folder)],
    input=json.dumps(commands),
    text=True,
    cwd=ROOT,
    check=True,
    timeout=600,
  )


@pytest.fixture(scope="module")
def results(folder) -> pathlib.Path:
  run_all(folder, CASES)
  return folder


def check(results: pathlib.Path, name: str) -> None:
  stdout, stderr = ((results / f"{name}.{stream}").read_text() for stream in ("out", "err"))
  assert int((results / f"{name}.code").read_text()) == 1, stderr
  assert "Traceback" not in stdout + stderr
  errors = [line for line in stderr.splitlines() if line.startswith("error:")]
  assert len(errors) == 1, stderr
  assert stderr.splitlines()[-1] == errors[0]
  for text in CASES[name].says:
    assert text in errors[0]


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_mistake_is_one_line(results, name):
  check(results, name)


def test_a_mistake_leaves_no_run(results):
  """Else the corrected command would find a half-made workdir."""
  for name in (
    "missing_config",
    "wrong_value",
    "tokenizer_is_none",
    "broken_shard",
    "mesh",
    "another_source",
  ):
    assert not (results / name / "run" / "config.json").exists(), name


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_mistake_leaves_the_run_as_it_is(results, name):
  """What is said to be wrong must not be written over what was right."""
  from mm1_jax import checkpoint
  from mm1_jax.config import RunConfig
  from mm1_jax.configs import mm1_debug

  workdir = results / name / "run"
  run = RunConfig.from_dict(mm1_debug.get_config().to_dict())
  found = checkpoint.read_run(workdir)
  assert dataclasses.replace(found.data, tokenizer=run.data.tokenizer) == run.data
  assert found.model == run.model
  assert (workdir / "checkpoints" / "3" / "params").exists()


def command(*args: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "mm1_jax.main", *args],
    cwd=cwd,
    env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )


def test_help_names_the_flags():
  result = command("--help")
  assert result.returncode == 0
  assert "python -m mm1_jax.main --config=configs/mm1_debug.py" in result.stdout
  for text in ("--config FILE", "--workdir FOLDER", "--config.train.num_steps=20", "gs:// path"):
    assert text in result.stdout
  assert not result.stderr


def test_the_module_itself_reports_a_mistake(tmp_path):
  """The forks above are what this is."""
  result = command(DEBUG, f"--workdir={tmp_path}", "--config.train.num_step=3")
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1].startswith("error: ")
  assert "num_step" in result.stderr
  assert "Traceback" not in result.stderr


MISSING = [
  "data.tokenizer 'data/tokenizer.model'",
  *(
    f"data.{kind}: source '{name}': no file matches data/{name}-{part}-*.arrayrecord"
    for kind, part in (("sources", "train"), ("eval_sources", "heldout"))
    for name in ("captions", "interleaved", "text")
  ),
]


@pytest.mark.parametrize(
  ("config", "topology"),
  [
    ("configs/mm1_30b_moe.py", "v5p-512"),
    ("mm1_30b_moe", "v5p-512"),
    ("mm1_30b_moe:v6e-256", "v6e-256"),
    ("mm1_proxy:9m", "v5p-128"),
  ],
)
def test_all_that_is_missing_is_told_at_once(tmp_path, config, topology):
  """In a folder with nothing in it; with the three commands to continue with, which are whole."""
  steps, nowhere = "--config.train.num_steps=20", "--config.train.init_from=no/run"
  result = command(f"--config={config}", steps, nowhere, cwd=tmp_path)
  assert result.returncode == 1
  assert "Traceback" not in result.stderr
  message = result.stderr[result.stderr.index("error: ") :]
  found = re.findall(r"^- (.*)$", message, re.MULTILINE)
  assert found[: len(MISSING)] == MISSING
  assert found[len(MISSING)].startswith("train.init_from: no checkpoint under")
  build, sample, plan = re.findall(r"python -m mm1_jax.[^`\n]*", message)
  assert build == "python -m mm1_jax.data.build --help"
  assert sample == f"python -m mm1_jax.main --config={config} --sample"
  assert plan == f"python -m mm1_jax.plan --config={config} {steps} {nowhere} --topology={topology}"
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("flag", "says"),
  [
    ("--config.data.tokenizer=none.model", "data.tokenizer 'none.model'"),
    ("--config.data.sources.text.path=text-*", "source 'text': no file matches text-*"),
    (
      "--config.data.eval_sources.text.path=x-*",
      "eval_sources: source 'text': no file matches x-*",
    ),
    ("--config.train.init_from=none", "train.init_from: no checkpoint under"),
  ],
)
def test_only_what_is_missing_is_told(flag, says, tmp_path):
  run = cli.load_config(arguments(DEBUG, flag))
  with pytest.raises(ConfigError) as error:
    inputs.check(run, tmp_path, build="", sample="", plan="")
  told = str(error.value).partition("Three ways")[0]
  assert says in told
  assert told.count("\n- ") == 1


def test_a_run_that_continues_does_not_need_what_it_started_from(tmp_path):
  run = cli.load_config(arguments(DEBUG, f"--config.train.init_from={tmp_path}/gone"))
  (tmp_path / "run/checkpoints/3/params").mkdir(parents=True)
  inputs.check(run, tmp_path / "run", build="", sample="", plan="")


def arguments(*flags: str) -> argparse.Namespace:
  parser = cli.Parser(prog="test")
  parser.add_config()
  return parser.parse_args([*flags])


@pytest.mark.parametrize(
  ("config", "sample"),
  [
    ("mm1_30b_moe", "mm1_debug:moe"),
    ("mm1_3b", "mm1_debug:dense"),
    ("mm1_sft:3b", "mm1_debug_sft:dense"),
    ("mm1_sft:30b_moe,lora", "mm1_debug_sft:moe,lora"),
    ("mm1_5_sft", "mm1_debug_sft:dense"),
  ],
)
def test_the_sample_has_a_model_of_the_same_kind(config, sample):
  run = cli.load_config(arguments(f"--config={config}"))
  assert inputs.sample_config(run) == sample
  tiny = cli.load_config(arguments(f"--config={sample}"))
  assert (tiny.model.decoder.moe is None) == (run.model.decoder.moe is None)
  assert (tiny.model.decoder.lora is None) == (run.model.decoder.lora is None)
  assert tiny.data.chat == run.data.chat


@pytest.mark.slow
def test_the_sample_is_trained_where_nothing_is_there(tmp_path):
  """Without --workdir, the run is in a folder of its config's name."""
  result = command(
    "--config=configs/mm1_30b_moe.py",
    "--sample",
    "--config.train.num_steps=2",
    "--config.train.eval_batches=1",
    cwd=tmp_path,
  )
  assert result.returncode == 0, result.stderr
  assert "training mm1_debug:moe in runs/mm1_debug_moe" in result.stderr
  assert (tmp_path / "runs/mm1_debug_moe/checkpoints/2/params").is_dir()
