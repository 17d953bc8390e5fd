# SPDX-License-Identifier: Apache-2.0
"""The launch scripts: linted, and run against fakes of gcloud, sbatch and kubectl.

No cloud is here, so what can be shown is which commands are given, word for word, and that the
manifests are what their API takes. The notebook is run whole, on the CPU.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
MAIN = ["--config=configs/mm1_3b.py", "--config.data.sources.text.path=gs://b/a b-*.arrayrecord"]
POD = ["pod", "--zone=us-east5-a"]
TPU = {
  "create one": (["create", *POD, "--type=v5litepod-16"], []),
  "create more": (["create", *POD, "--type=v5p-128", "--slices=2", "--spot", "--project=p"], []),
  "status": (["status", *POD], []),
  "run": (["run", *POD], MAIN),
  "logs": (["logs", *POD], []),
  "stop": (["stop", *POD], []),
  "delete": (["delete", *POD], []),
}


@pytest.fixture
def bench(tmp_path):
  """Runs a command with gcloud, sbatch and kubectl that write down what they are given."""
  tools = tmp_path / "bin"
  tools.mkdir()
  for name in ("gcloud", "sbatch", "kubectl"):
    tool = tools / name
    tool.write_text(
      f"#!{sys.executable}\nimport json, sys\n"
      f"with open({str(tmp_path / 'given')!r}, 'a') as f:\n"
      f"  stdin = '' if '{name}' == 'gcloud' else sys.stdin.read()\n"
      f"  f.write(json.dumps(['{name}', *sys.argv[1:], stdin]) + '\\n')\n"
    )
    tool.chmod(0o755)
  env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}

  def run(*command: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
      command, cwd=ROOT, env=env, input=stdin, capture_output=True, text=True, timeout=600
    )

  def given() -> list[list[str]]:
    path = tmp_path / "given"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]

  run.given = given
  return run


def after_dashes(args: list[str]) -> list[str]:
  return ["--", *args] if args else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
  shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
  if not shellcheck.exists() and not (shellcheck := shutil.which("shellcheck")):
    pytest.skip("shellcheck is not installed")
  result = subprocess.run([shellcheck, script], capture_output=True, text=True, timeout=600)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ["launch/tpu_vm.sh", "launch/slurm.sh"])
def test_help(bench, script):
  result = bench(script, "--help")
  assert result.returncode == 0
  assert f"{script} " in result.stdout
  assert "--dry-run" in result.stdout


@pytest.mark.parametrize("name", TPU)
def test_tpu_vm_does_what_the_dry_run_prints(bench, name):
  args, main = TPU[name]
  real = bench("launch/tpu_vm.sh", *args, *after_dashes(main))
  assert real.returncode == 0, real.stderr
  commands = bench.given()
  assert commands
  dry = bench("launch/tpu_vm.sh", *args, "--dry-run", *after_dashes(main))
  assert dry.returncode == 0, dry.stderr
  assert not bench.given()
  assert bench("bash", "-c", dry.stdout).returncode == 0
  assert bench.given() == commands


def test_tpu_vm_commands(bench):
  def gcloud(name: str) -> list[str]:
    args, main = TPU[name]
    bench("launch/tpu_vm.sh", *args, *after_dashes(main))
    (command,) = bench.given()
    return command[1:-1]

  one, more = gcloud("create one"), gcloud("create more")
  queued = ["alpha", "compute", "tpus", "queued-resources"]
  assert one == [
    *queued,
    *("create", "pod", "--zone=us-east5-a", "--accelerator-type=v5litepod-16"),
    *("--runtime-version=v2-alpha-tpuv5-lite", "--node-id=pod"),
  ]
  assert {"--node-count=2", "--node-prefix=pod", "--spot", "--project=p"} <= set(more)
  assert not any("--node-id" in word for word in more)
  run = gcloud("run")
  assert {"--node=all", "--worker=all"} <= set(run)
  # What a host's shell makes of it: the program's own words, with nothing expanded.
  (remote,) = [word.removeprefix("--command=") for word in run if word.startswith("--command")]
  words = remote.replace(".venv/bin/python -u -m mm1_jax.main", "printf '%s\\n'")
  words = words.split("cd mm1_jax; nohup ")[1].split(" > ~")[0]
  said = bench("bash", "-c", words)
  assert said.stdout.splitlines() == MAIN


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["create"], "needs a NAME"),
    (["create", "pod"], "--zone is needed"),
    (["create", *POD], "create needs --type"),
    (["create", *POD, "--type=tpu7x-16"], "no runtime is known for --type='tpu7x-16'"),
    (["create", *POD, "--type=v4-8", "--slices=two"], "--slices='two'"),
    (["run", *POD], "run needs the flags"),
    (["fly", *POD], "unknown action 'fly'"),
    (["run", *POD, "--sport"], "unknown option '--sport'"),
  ],
)
def test_tpu_vm_mistakes(bench, args, says):
  result = bench("launch/tpu_vm.sh", *args)
  assert result.returncode == 1
  assert says in result.stderr
  assert not bench.given()


def test_slurm(bench, tmp_path):
  """The job's script is run too, with an srun that ends like a run that was stopped."""
  args = ["--nodes=4", "--gpus=8", "--time=24:00:00"]
  assert bench("launch/slurm.sh", *args, "--", *MAIN).returncode == 0
  ((tool, *words, script),) = bench.given()
  assert tool == "sbatch"
  assert {"--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=24:00:00"} <= set(words)
  dry = bench("launch/slurm.sh", *args, "--dry-run", "--", *MAIN)
  assert bench("bash", "-c", dry.stdout).returncode == 0
  assert bench.given() == [[tool, *words, script]]
  for code, requeued in ((0, False), (1, False), (75, True)):
    said = tmp_path / f"said{code}"
    job = f"srun() {{ printf '%s\\n' \"$@\" > {said}; return {code}; }}\nSLURM_JOB_ID=7\n{script}"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "$@" > {said}.requeue\n')
    scontrol.chmod(0o755)
    result = bench("bash", "-c", job)
    assert said.read_text().splitlines()[-len(MAIN) :] == MAIN
    assert (tmp_path / f"said{code}.requeue").exists() == requeued
    assert result.returncode == (0 if requeued else code)
  assert (tmp_path / "said75.requeue").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
  "args", [["--nodes=4"], ["--nodes=x", "--gpus=1"], ["--nodes=1", "--gpus=1"]]
)
def test_slurm_mistakes(bench, args):
  result = bench("launch/slurm.sh", *args)
  assert result.returncode == 1
  assert result.stderr.startswith("error: ")
  assert not bench.given()


# What of the JobSet, Job and Pod APIs is used; what is not named is refused, as kubectl's strict
# validation does.
def _only(properties: dict, *required: str) -> dict:
  return {
    "type": "object",
    "properties": properties,
    "required": list(required or properties),
    "additionalProperties": False,
  }


def _list(items: dict) -> dict:
  return {"type": "array", "minItems": 1, "items": items}


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = _only(
  {
    "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    "image": TEXT,
    "command": _list(TEXT),
    "ports": _list(_only({"containerPort": COUNT | {"maximum": 65535}})),
    "resources": _only({"limits": _only({"google.com/tpu": COUNT})}),
  }
)
POD_SPEC = _only(
  {
    "restartPolicy": {"enum": ["Never", "OnFailure"]},
    "nodeSelector": TEXTS,
    "hostNetwork": {"type": "boolean"},
    "dnsPolicy": {"enum": ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]},
    "terminationGracePeriodSeconds": COUNT,
    "tolerations": _list(
      _only(
        {
          "key": TEXT,
          "operator": {"enum": ["Equal", "Exists"]},
          "value": TEXT,
          "effect": {"enum": ["NoSchedule", "NoExecute", "PreferNoSchedule"]},
        }
      )
    ),
    "containers": _list(CONTAINER),
  },
  "restartPolicy",
  "containers",
)
JOB_SPEC = _only(
  {
    "parallelism": COUNT,
    "completions": COUNT,
    "backoffLimit": {"const": 0},
    "template": _only({"spec": POD_SPEC}),
  }
)
JOB_SET = _only(
  {
    "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
    "kind": {"const": "JobSet"},
    "metadata": _only({"name": TEXT, "annotations": TEXTS}),
    "spec": _only(
      {
        "failurePolicy": _only({"maxRestarts": {"type": "integer", "minimum": 0}}),
        "replicatedJobs": _list(
          _only({"name": TEXT, "replicas": COUNT, "template": _only({"spec": JOB_SPEC})})
        ),
      }
    ),
  }
)
GKE = [sys.executable, "-m", "launch.gke", "--name=mm1", "--image=example/mm1"]


def pods(job_set: dict) -> dict:
  return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_gke_manifests():
  import jsonschema

  from launch import gke
  from mm1_jax.plan.topology import find_topology

  def make(slice_name: str, num_slices: int = 1, **kwargs) -> dict:
    options = {"image": "i", "spot": False, "max_restarts": 3, "args": ["--x=1"]} | kwargs
    made = gke.manifest("mm1", find_topology(slice_name, num_slices), **options)
    jsonschema.validate(made, JOB_SET)
    return made

  for name, accelerator, torus, hosts, chips in (
    ("v4-16", "tpu-v4-podslice", "2x2x2", 2, 4),
    ("v5e-256", "tpu-v5-lite-podslice", "16x16", 64, 4),
    ("v5p-128", "tpu-v5p-slice", "4x4x4", 16, 4),
    ("v6e-64", "tpu-v6e-slice", "8x8", 16, 4),
    ("tpu7x-128", "tpu7x", "4x4x4", 16, 4),
    ("v6e-1", "tpu-v6e-slice", "1x1", 1, 1),
  ):
    job = pods(make(name))
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
      "cloud.google.com/gke-tpu-accelerator": accelerator,
      "cloud.google.com/gke-tpu-topology": torus,
    }
    assert job["parallelism"] == job["completions"] == hosts
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
  spot = make("v5p-128", 2, spot=True)
  assert spot["spec"]["replicatedJobs"][0]["replicas"] == 2
  assert pods(spot)["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  broken = make("v5p-128")
  pods(broken)["restartPolicies"] = "Never"
  with pytest.raises(jsonschema.ValidationError, match="restartPolicies"):
    jsonschema.validate(broken, JOB_SET)


def test_gke_applies_what_the_dry_run_prints(bench):
  args = ["--slice=v5p-128", "--num-slices=2", "--spot"]
  real = bench(*GKE, *args, "--", *MAIN)
  assert real.returncode == 0, real.stderr
  ((tool, *words, text),) = bench.given()
  assert (tool, words) == ("kubectl", ["apply", "-f", "-"])
  command = pods(yaml.safe_load(text))["template"]["spec"]["containers"][0]["command"]
  assert command == ["python", "-u", "-m", "mm1_jax.main", "--stopped-code=75", *MAIN]
  dry = bench(*GKE, *args, "--dry-run", "--", *MAIN)
  assert not bench.given()
  assert bench("bash", "-c", dry.stdout).returncode == 0
  assert bench.given() == [[tool, *words, text]]


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["--slice=v5p-127"], "there is no TPU slice 'v5p-127'"),
    (["--slice=v5p-8", "--num-slices=2"], "has one host"),
    (["--slice=v5p-128", "--name=MM1"], "--name 'MM1' must be of a-z"),
    (["--slice=v5p-128", f"--name={'m' * 60}"], "be at most 46 long"),
  ],
)
def test_gke_mistakes(monkeypatch, args, says):
  from launch import gke
  from mm1_jax.config import ConfigError

  monkeypatch.setattr(sys, "argv", [*GKE[2:], *args, "--", "--x=1"])
  with pytest.raises(ConfigError, match=says):
    gke.main()


NOTEBOOK = ROOT / "launch" / "colab.ipynb"


def test_the_notebook_is_stored_without_outputs():
  cells = json.loads(NOTEBOOK.read_text())["cells"]
  assert not [c for c in cells if c.get("outputs") or c.get("execution_count")]


@pytest.mark.long
def test_the_notebook_runs_top_to_bottom(tmp_path, monkeypatch):
  """A few steps of it, in a copy of the checkout: it trains, draws, and answers."""
  import nbclient
  import nbformat

  for name in ("mm1_jax", "configs", "launch"):
    (tmp_path / name).symlink_to(ROOT / name)
  for name, value in (
    ("PRETRAIN_STEPS", "4"),
    ("SFT_STEPS", "2"),
    ("XLA_FLAGS", "--xla_force_host_platform_device_count=1"),
    ("PATH", f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"),
    ("PYTHONPATH", str(tmp_path)),
  ):
    monkeypatch.setenv(name, value)
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  resources = {"metadata": {"path": str(tmp_path)}}
  done = nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
  outputs = [o for cell in done.cells if cell.cell_type == "code" for o in cell.outputs]
  texts = "".join(o.text for o in outputs if o.output_type == "stream")
  assert "4/4 (100%)" in texts
  assert "done: look at" in texts
  pictures = [o for o in outputs if o.output_type == "execute_result"]
  assert ["image/png" in o.data or "image/jpeg" in o.data for o in pictures] == [True] * 3
  answer = next(o.text for o in done.cells[11].outputs if o.get("name") == "stdout")
  assert len(answer) > len("\n")  # after so few steps it may be spaces
