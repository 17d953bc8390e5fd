# SPDX-License-Identifier: Apache-2.0
"""The command: content in the order given, the answer alone on stdout, mistakes in one line."""

import pathlib
import subprocess
import sys

import pytest

from mm1_jax import cli
from mm1_jax.inference import generate
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.model import Model
from mm1_jax.inference.sampler import Sampling

pytestmark = pytest.mark.compiles

MODULE = [sys.executable, "-m", "mm1_jax.inference.generate"]


def test_content_keeps_its_order():
  args = generate.parse(["--checkpoint=x", "--image=a", "--prompt=A", "--image=b", "--prompt="])
  assert [str(item) for item in args.content] == ["a", "A", "b", ""]
  assert [isinstance(item, str) for item in args.content] == [False, True, False, True]


@pytest.mark.parametrize(
  ("flags", "chat"), [([], None), (["--chat"], True), (["--raw"], False)], ids=str
)
def test_chat_and_raw(flags: list[str], chat: bool | None):
  assert generate.parse(["--checkpoint=x", *flags]).chat is chat


def test_the_answer_is_alone_on_stdout(model, workdir, pictures):
  """The one test in a process of its own."""
  a, b = pictures
  content = [f"--image={a}", "--prompt=A cat.", f"--image={b}", "--prompt="]
  done = subprocess.run(
    [*MODULE, f"--checkpoint={workdir}", "--max-new-tokens=5", *content],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == model.generate([[a, "A cat.", b, ""]], max_new_tokens=5)[0] + "\n"
  assert "loaded" in done.stderr
  assert "WARNING" not in done.stderr


def test_settings_reach_the_model(model, workdir, capsys):
  cli.run(generate.main, [f"--checkpoint={workdir}", "--prompt=Hi", "--max-new-tokens=5", "--chat"])
  assert capsys.readouterr().out == model.generate([["Hi"]], max_new_tokens=5, chat=True)[0] + "\n"
  flags = ["--temperature=2", "--top-k=40", "--top-p=0.9", "--seed=3"]
  cli.run(generate.main, [f"--checkpoint={workdir}", "--prompt=Hi", "--max-new-tokens=5", *flags])
  drawn = model.generate([["Hi"]], max_new_tokens=5, sampling=Sampling(2.0, 40, 0.9), seed=3)
  assert capsys.readouterr().out == drawn[0] + "\n"
  flags = ["--num-beams=3", "--length-penalty=2"]
  cli.run(generate.main, [f"--checkpoint={workdir}", "--prompt=Hi", "--max-new-tokens=5", *flags])
  found = model.generate([["Hi"]], max_new_tokens=5, sampling=BeamSearch(3, 2.0))
  assert capsys.readouterr().out == found[0] + "\n"


def test_a_mistake_ends_the_program_with_one_line():
  done = subprocess.run(
    [*MODULE, "--checkpoint=nowhere", "--prompt=Hi"], capture_output=True, text=True, check=False
  )
  assert done.returncode == 1
  assert done.stdout == ""
  assert done.stderr.startswith("error: '")
  assert "nowhere' is not a run: it has no config.json." in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "error: there is nothing to answer; give --prompt=TEXT, --image=FILE, or both."),
    (["--image=/no/such.jpg"], "error: image '/no/such.jpg' cannot be read: No such file"),
    ([f"--image={__file__}"], f"error: image '{__file__}' cannot be used: unreadable image."),
    (["--prompt=" + "word " * 300], "but the model was trained on 192."),
    (["--prompt=a", "--top-p=2"], "error: top_p is 2.0; it must be above 0 and at most 1."),
    (["--prompt=a", "--num-beams=65"], "error: num_beams is 65; it must be from 2 to 64."),
    (
      ["--prompt=a", "--length-penalty=2"],
      "--length-penalty is of beams; give --num-beams=K, too.",
    ),
    (["--prompt=a", "--num-beams=2", "--top-k=3"], "--num-beams searches and draws nothing"),
    (["--prompt=a", "--tensor=9"], "error: tensor 9 needs 9 devices; there are 8."),
  ],
)
def test_each_mistake_has_its_message(workdir: pathlib.Path, capsys, flags, message: str):
  with pytest.raises(SystemExit) as exit:
    cli.run(generate.main, [f"--checkpoint={workdir}", *flags])
  assert isinstance(exit.value.code, str)  # Python prints it on stderr and exits with 1
  assert message in exit.value.code
  assert "\n" not in exit.value.code
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--input=a"], "error: --input and --output go together"),
    (["--input=a", "--output=b", "--prompt=x"], "error: give either --input, or --prompt"),
    (["--prompt=<image> what?"], "the text has 1 <image> slot, but there are 0 images"),
    (["--prompt=<image>", "--prompt=x"], "slots need all of the text in one --prompt"),
    (["--input=/no/such", "--output=b"], "error: '/no/such' cannot be read"),
  ],
)
def test_flags_that_do_not_go_together(workdir, flags, message):
  with pytest.raises(SystemExit) as exit:
    cli.run(generate.main, [f"--checkpoint={workdir}", *flags])
  assert message in str(exit.value.code)


def test_slots_put_pictures_into_the_text(model, workdir, pictures, capsys):
  flags = ["--prompt=Is <image>\nlike <image>?", *(f"--image={p}" for p in pictures)]
  cli.run(generate.main, [f"--checkpoint={workdir}", "--max-new-tokens=5", "--stop=#", *flags])
  a, b = pictures
  expected = model.generate([["Is ", a, "like ", b, "?"]], max_new_tokens=5, stop=["#"])
  assert capsys.readouterr().out == expected[0] + "\n"


def test_ctrl_c_ends_in_one_line(workdir, monkeypatch, capsys):
  def interrupt(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(Model, "generate", interrupt)
  with pytest.raises(SystemExit) as exit:
    cli.run(generate.main, [f"--checkpoint={workdir}", "--prompt=Hi"])
  assert exit.value.code == 130
  assert capsys.readouterr().err.endswith("stopped\n")


def test_help_has_an_example(capsys):
  with pytest.raises(SystemExit) as exit:
    cli.run(generate.main, ["--help"])
  assert exit.value.code == 0
  assert '--image=a.jpg --prompt="What is this?"' in capsys.readouterr().out
