# SPDX-License-Identifier: Apache-2.0
"""Exports that JAX alone runs, and runs of params alone: they answer as the model does."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest

from mm1_jax import checkpoint
from mm1_jax.config import TilingConfig
from mm1_jax.convert import ConvertError
from mm1_jax.convert.export import exporter, manifest, stablehlo, stablehlo_run
from mm1_jax.convert.export.format import ExportOptions
from mm1_jax.convert.export.huggingface import pictures_mm1
from mm1_jax.convert.export.run_reader import RunReader
from mm1_jax.data.image import decode_image
from mm1_jax.inference.model import Model

pytestmark = pytest.mark.compiles

QUESTION = "What is this?"


def make_run(path: pathlib.Path, **settings) -> pathlib.Path:
  """Writes a run at step 1, and returns its folder."""
  from tests.helpers.runs import make_params, run_config, save_run

  run = run_config(**settings)
  save_run(path, run, make_params(run), steps=(1,))
  return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
  """A sparse run."""
  return make_run(tmp_path_factory.mktemp("export") / "run", moe=True)


def photo(kind: str, size=(90, 120)) -> bytes:
  """Returns a smooth picture, as photos are; noise would hide how a resize rounds."""
  rng = np.random.default_rng(0)
  small = PIL.Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
  data = io.BytesIO()
  small.resize(size[::-1], PIL.Image.Resampling.BICUBIC).save(data, kind)
  return data.getvalue()


@pytest.mark.parametrize(
  ("kind", "size", "most"),
  [
    ("PNG", (90, 120), 0),
    ("JPEG", (90, 120), 0),
    ("JPEG", (300, 400), 0),
    ("JPEG", (180, 240), 10),  # training reads 3/8 of it, where Pillow knows only halves
  ],
)
@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_standalone_pixels_are_those_of_training(kind, size, most, fit, tmp_path):
  file = tmp_path / "a"
  file.write_bytes(photo(kind, size))
  ours = decode_image(file.read_bytes(), size=(24, 32), fit=fit, max_pixels=10**9)
  theirs = pictures_mm1.Picture(file, 10**9).decode((24, 32), fit)
  assert np.abs(ours.astype(int) - theirs).max() <= most


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"moe": True}, {"num_kv_heads": 1}], ids=str)
def test_programs_answer_as_the_model_does(settings, tmp_path):
  run_folder = make_run(tmp_path / "run", **settings)
  out = tmp_path / "programs"
  compared = exporter.export(run_folder, out, "stablehlo", ExportOptions(dtype="float32"))
  assert "params equal" in compared
  assert {path.suffix for path in (out / "programs").iterdir()} == {".cpu", ".cuda", ".tpu"}
  manifest.check(out)
  pictures = [tmp_path / "a.png", tmp_path / "b.png"]
  for number, path in enumerate(pictures):
    path.write_bytes(photo("PNG", (16 + number * 20, 16)))
  # Elsewhere, and its code names nothing of ours.
  moved = shutil.move(out, tmp_path / "moved")
  command = [sys.executable, str(moved / "run.py"), f"--prompt={QUESTION}"]
  command += ["--max-new-tokens=8", *(f"--image={path}" for path in pictures)]
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
  assert ended.returncode == 0, ended.stderr
  assert not any("mm1_jax" in path.read_text() for path in moved.glob("*.py"))
  (expected,) = Model.load(run_folder).generate([[*pictures, QUESTION]], max_new_tokens=8)
  assert ended.stdout.rstrip("\n") == expected
  assert f"jax=={jax.__version__}" in (moved / "requirements.txt").read_text().splitlines()
  for program in (moved / "programs").iterdir():
    program.write_bytes(program.read_bytes()[:100])
  ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
  assert ended.returncode == 1
  assert f"was made by jax {jax.__version__} and cannot be read" in ended.stderr


@pytest.mark.parametrize("template", [None, "default", "vicuna", "chatml"])
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_a_question_is_read_as_in_training(template, num_images, run_folder, tmp_path):
  """With nothing but what is described in the export: no program, no param."""
  source = RunReader(run_folder)
  object.__setattr__(source.run.data, "chat", template is not None)
  object.__setattr__(source.run.data, "chat_template", template or "default")
  about = {**stablehlo._asked(source), "tokenizer": "tokenizer.model"}
  (tmp_path / stablehlo_run.DESCRIPTION).write_text(json.dumps(about))
  shutil.copyfile(source.run.data.tokenizer, tmp_path / "tokenizer.model")
  items = [{"image": b""}] * num_images + [{"text": QUESTION}]
  encoder = source.encoder()
  turn = {"role": "user", "content": items}
  expected = encoder.encode_prompt([turn]) if template else encoder.encode_prefix(items)
  assert stablehlo_run.Exported(tmp_path).prompt(num_images, QUESTION) == expected.ids


@pytest.mark.parametrize(
  ("name", "data"),
  [("missing", None), ("text", b"text"), ("cut.png", photo("PNG")[:200]), (".", None)],
)
def test_a_picture_that_cannot_be_read_is_one_line(name, data, tmp_path):
  if data is not None:
    (tmp_path / name).write_bytes(data)
  exported = object.__new__(stablehlo_run.Exported)
  exported.about = {"image_size": [16, 16], "image_fit": "squash", "max_pixels": 10**6}
  with pytest.raises(SystemExit, match=r"error: the picture '.*' cannot be read"):
    exported.pixels([tmp_path / name])


@pytest.mark.parametrize("num", ["0", "-1", "x"])
def test_no_new_tokens_are_refused(num, monkeypatch, capsys):
  """They used to be without end."""
  monkeypatch.setattr(sys, "argv", ["run.py", "--prompt=a", f"--max-new-tokens={num}"])
  with pytest.raises(SystemExit):
    stablehlo_run.main()
  assert "--max-new-tokens" in capsys.readouterr().err


def test_pictures_in_parts_are_refused(run_folder):
  source = RunReader(run_folder)
  object.__setattr__(source.run.data, "tiling", TilingConfig())
  with pytest.raises(ConvertError, match=r"data\.tiling.*stablehlo"):
    stablehlo.check(source, ExportOptions())


def test_prefills_fit_their_pictures(run_folder):
  """The longest first; no shape with so many pictures that there is no room for a word."""
  source = RunReader(run_folder)
  around = 3
  shapes = stablehlo._shapes(source, around)
  assert max(shapes) == (source.run.data.seq_len, 2)
  for positions, num in shapes:
    assert num * source.run.image_positions + around + stablehlo.WORD <= positions


@pytest.mark.slow
def test_params_alone_in_bfloat16(run_folder, tmp_path):
  out = tmp_path / "params"
  exporter.export(run_folder, out, "orbax", ExportOptions(dtype="bfloat16"))
  names = sorted(path.name for path in (out / "checkpoints" / "1").iterdir())
  assert names == ["checksums", "params"]
  manifest.check(out)
  run = checkpoint.read_run(out)
  assert run.train.init_from is None
  source = RunReader(run_folder)
  for (part, whole), (_, half) in zip(source.read(), RunReader(out).read(), strict=True):
    assert half.dtype.name == ("float32" if part.in_float32 else "bfloat16")
    np.testing.assert_array_equal(whole.astype(half.dtype), half, err_msg=part.path)
  # Both ways to use it.
  from tests.helpers.runs import make_params

  started = checkpoint.init_from(out, make_params(run))
  assert {x.dtype.name for x in jax.tree.leaves(started)} == {"float32"}
  (answer,) = Model.load(out).generate([["Once"]], max_new_tokens=4)
  assert isinstance(answer, str)


def test_what_changed_on_its_way_to_the_disk_is_found(run_folder, tmp_path, monkeypatch):
  read = exporter.orbax.checkpoint.restore_params
  monkeypatch.setattr(
    exporter.orbax.checkpoint, "restore_params", lambda *a: jax.tree.map(lambda x: x * 2, read(*a))
  )
  with pytest.raises(ConvertError, match="is not what was written"):
    exporter.export(run_folder, tmp_path / "wrong", "orbax", ExportOptions(dtype="float32"))
  assert not pathlib.Path(tmp_path / "wrong").exists()
