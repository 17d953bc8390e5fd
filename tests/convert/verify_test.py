# SPDX-License-Identifier: Apache-2.0
"""`convert verify`: what was written is told from what was not, and each fault has its line."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from mm1_jax.checkpoint import DamagedError
from mm1_jax.convert import ConvertError
from mm1_jax.convert.__main__ import main
from mm1_jax.convert.export.run_reader import RunReader
from mm1_jax.data.build.__main__ import main as build
from tests.checkpoint_test import change_data_state, flip, truncate
from tests.helpers import runs

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("verified") / "run"
  run = runs.run_config()
  runs.save_run(workdir, run, runs.make_params(run), (3, 5))
  return workdir


@pytest.fixture
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def verify(capsys, *paths: pathlib.Path) -> tuple[list[str], str]:
  """Returns the lines that the command prints, and the error it ends with, '' if none."""
  error = ""
  try:
    main(["verify", *map(str, paths)])
  except ConvertError as e:
    error = str(e)
  return capsys.readouterr().out.splitlines(), error


def test_a_sound_run(saved, capsys):
  lines, error = verify(capsys, saved)
  assert error == ""
  assert len(lines) == 2
  assert all(line.startswith("step ") and line.endswith(" GB: as written") for line in lines)


FAULTS = [
  (flip("params", "decoder.head", 11, 1), "params': decoder.head is not what was saved"),
  (flip("train", "step", 0, 0), "train': step is not what was saved"),
  (truncate, "cannot be read"),
  (change_data_state, "data' is not what was saved"),
  (lambda step: shutil.rmtree(step / "train"), "train' is missing"),
]


@pytest.mark.parametrize(("damage", "said"), FAULTS)
def test_a_fault_of_a_run_is_named(copy, capsys, damage, said):
  step = copy / "checkpoints" / "5"
  if damage is change_data_state:
    (step / "data" / "metadata").write_text('{"batch": 5}')
  else:
    damage(step)
  lines, error = verify(capsys, copy)
  assert lines[0].endswith("as written")
  assert lines[1].endswith("FAULTS")
  assert any(str(step) in line and said in line for line in lines[2:]), lines
  assert f"{len(lines) - 2} fault" in error
  assert verify(capsys, step)[0] == lines[1:]


def test_a_changed_tokenizer_is_named(copy, capsys):
  path = copy / "tokenizer.model"
  path.write_bytes(path.read_bytes()[:-1] + b"?")
  lines, error = verify(capsys, copy)
  assert f"'{path}' is not what it was when step 5 was saved" in "\n".join(lines)
  assert error.startswith("2 faults")


def test_no_export_is_made_of_damaged_params(copy):
  """Also where little is read at once."""
  flip("params", "decoder.head", 11, 1)(copy / "checkpoints" / "5")
  with pytest.raises(DamagedError, match=r"checksums differ of decoder\.head\."):
    list(RunReader(copy).read())
  read = {part.path: value for part, value in RunReader(copy / "checkpoints" / "3").read()}
  assert np.isfinite(read["decoder.head"]).all()


def test_built_data(tmp_path, capsys):
  (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(40)))
  build(["text", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out", "--rows_per_shard=10"])
  capsys.readouterr()
  for path in (tmp_path, tmp_path / "out", tmp_path / "out-manifest.json"):
    lines, error = verify(capsys, path)
    assert error == ""
    assert lines == [f"data '{tmp_path}/out-manifest.json': 4 shards: as written"]
  shards = sorted(tmp_path.glob("*.arrayrecord"))
  data = bytearray(shards[1].read_bytes())
  data[len(data) // 2] ^= 8
  shards[1].write_bytes(data)
  shards[2].unlink()
  lines, error = verify(capsys, tmp_path)
  assert lines[1] == f"  '{shards[1]}' is damaged: its sha256 differs"
  assert lines[2].startswith(f"  '{shards[2]}' cannot be read: ")
  assert error == "2 faults, see above."


def test_an_export(saved, tmp_path, capsys):
  out = tmp_path / "out"
  main(["export", f"--checkpoint={saved}", "--format=safetensors", f"--out={out}"])
  capsys.readouterr()
  lines, error = verify(capsys, out, saved)
  assert error == ""
  assert lines[0].startswith(f"export '{out}': ")
  weights = out / "model.safetensors"
  data = bytearray(weights.read_bytes())
  data[-5] ^= 1
  weights.write_bytes(data)
  (out / "new.txt").write_text("?")
  assert verify(capsys, out)[0][1:] == [
    f"  '{weights}' is damaged: its sha256 differs",
    f"  '{out}/new.txt' is not in its manifest.json",
  ]
  (out / "manifest.json").write_text(json.dumps({"files": 3})[:-1])
  assert "manifest.json' is not JSON" in verify(capsys, out)[1]


def test_what_there_is_nothing_to_compare_with(tmp_path, capsys):
  assert "there is nothing to compare it with" in verify(capsys, tmp_path)[1]
  assert "there is nothing to compare it with" in verify(capsys, tmp_path / "nowhere")[1]
