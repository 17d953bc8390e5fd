# SPDX-License-Identifier: Apache-2.0
"""Command lines: one spelling of flags, one message for a mistake, one command; --help is quick."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mm1_jax import cli
from mm1_jax.config import ConfigError, UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def parser() -> cli.Parser:
  parser = cli.Parser(prog="prog")
  parser.add_config()
  parser.add_argument("--max-new-tokens", type=int, default=1)
  parser.add_argument("--text")
  parser.add_argument("--wait", type=cli.at_least(5), default=9)
  return parser


@pytest.mark.parametrize(
  "flags",
  [
    ["--max-new-tokens=5"],
    ["--max_new_tokens=5"],
    ["--max-new-tokens", "5"],
    ["--max_new_tokens", "5"],
    ["--max_new-tokens=5"],
  ],
)
def test_flags_are_spelled_with_dashes_or_underscores(parser, flags):
  assert parser.parse_args(flags).max_new_tokens == 5


def test_values_stay_as_they_are(parser):
  assert parser.parse_args(["--text=--a_b=c_d"]).text == "--a_b=c_d"
  assert parser.parse_args(["--text", "a_b"]).text == "a_b"


@pytest.mark.parametrize(
  ("flags", "overrides"),
  [
    (["--config.train.num_steps=3"], (("train.num_steps", "3"),)),
    (["--config.train.num_steps", "3"], (("train.num_steps", "3"),)),
    (["-config.train.num_steps=3"], (("train.num_steps", "3"),)),
    (["--config.mesh.fsdp", "-1"], (("mesh.fsdp", "-1"),)),
    (["--config.name=a=b"], (("name", "a=b"),)),
    (["--config.name="], (("name", ""),)),
    (["--config.name=a\nb"], (("name", "a\nb"),)),
    (["--config.model.scan"], (("model.scan", "true"),)),
    (["--config.model.scan", "--text=x"], (("model.scan", "true"),)),
    (["--config.model.scan", "false"], (("model.scan", "false"),)),
    (
      ["--config.seed=1", "--text=x", "--config.seed=2"],
      (("seed", "1"), ("seed", "2")),
    ),
  ],
)
def test_overrides_are_taken_out_in_their_order(parser, flags, overrides):
  args = parser.parse_args(["--config=mm1_3b", *flags])
  assert (args.config, args.overrides) == ("mm1_3b", overrides)


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (
      ["--max-new-token=5"],
      r"no flag --max-new-token; did you mean --max-new-tokens\? See prog --h",
    ),
    (["--confg=x"], r"no flag --confg; did you mean --config\?"),
    (["--qqqqqq"], r"there is no flag --qqqqqq\. See prog --help"),
    (["--max=5"], r"there is no flag --max[;.]"),  # no abbreviations
    (["--train.num_steps=5"], r"did you mean --config\.train\.num_steps\?"),
    (["--max-new-tokens=many"], r"--max-new-tokens: invalid int value: 'many'\. See prog --help"),
    (["--max-new-tokens"], r"--max-new-tokens: expected one argument"),
    (["--wait=4"], r"--wait: 4 must be at least 5"),
    (["--wait=x"], r"--wait: invalid int value: 'x'"),
    (["stray", "-x"], r"unexpected arguments \['stray', '-x'\]; overrides look like --config\.key"),
    (["--config.train.num_steps"], r"--config\.train\.num_steps needs a value"),
    (["--config.train.num_steps", "--text=x"], r"--config\.train\.num_steps needs a value"),
  ],
)
def test_a_mistake_is_a_config_error(parser, flags, says):
  with pytest.raises(ConfigError, match=says):
    parser.parse_args(flags)


def test_a_mistyped_flag_is_told_before_what_is_required():
  parser = cli.Parser(prog="prog")
  parser.add_argument("--checkpoint", required=True)
  with pytest.raises(ConfigError, match=r"no flag --chekpoint; did you mean --checkpoint\?"):
    parser.parse_args(["--chekpoint=x"])
  with pytest.raises(ConfigError, match="required: --checkpoint"):
    parser.parse_args([])


def test_flags_of_a_verb_are_its_own():
  parser = cli.Parser(prog="prog")
  verb = parser.add_subparsers(required=True, metavar="VERB").add_parser("go")
  verb.add_argument("--far-away", type=int)
  verb.add_config(required=True)
  args = parser.parse_args(["go", "--far_away=3", "--config=x", "--config.name=y"])
  assert (args.far_away, args.config, args.overrides) == (3, "x", (("name", "y"),))
  with pytest.raises(ConfigError, match=r"no flag --far-awa; did you mean --far-away\? .* prog go"):
    parser.parse_args(["go", "--far-awa=3"])
  with pytest.raises(ConfigError, match="required: VERB"):
    parser.parse_args([])


def test_what_is_not_ours_can_be_passed_on():
  parser = cli.Parser(prog="prog")
  parser.passes_on = True
  parser.add_argument("--ours-too")
  args, others = parser.parse_known_args(["--ours_too=1", "--not_ours=2", "x"])
  assert (args.ours_too, others) == ("1", ["--not_ours=2", "x"])


def test_commands_are_spelled_as_they_were_called(monkeypatch):
  text = "python -m mm1_jax.main, python -m mm1_jax.data.build x, python -m mm1_jax.data.build.raw"
  assert cli.spelled(text) == text
  monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mm1"])
  assert cli.spelled(text) == "mm1 train, mm1 data x, python -m mm1_jax.data.build.raw"


def fail(error: type[BaseException]) -> None:
  raise error("wrong")


def test_a_users_mistake_ends_with_code_1_and_a_bug_with_its_traceback(capsys):
  with pytest.raises(SystemExit) as ended:
    cli.run(fail, UserError)
  assert ended.value.code == "error: wrong"  # which Python prints, and exits with 1
  with pytest.raises(SystemExit) as ended:
    cli.run(fail, KeyboardInterrupt)
  assert ended.value.code == 130
  with pytest.raises(ZeroDivisionError):
    cli.run(fail, ZeroDivisionError)


def write_to_a_full_disk(_: pathlib.Path) -> None:
  with open("/dev/full", "w") as file:
    file.write("x")


def make_a_folder_in_a_file(folder: pathlib.Path) -> None:
  (folder / "a").write_text("x")
  (folder / "a" / "run").mkdir(parents=True)


def make_a_folder_that_is_a_file(folder: pathlib.Path) -> None:
  (folder / "a").write_text("x")
  (folder / "a").mkdir(exist_ok=True)


def write_what_cannot_be_written(_: pathlib.Path) -> None:
  pathlib.Path("/sys/run").mkdir()


def write_through_a_library(folder: pathlib.Path) -> None:
  try:
    write_to_a_full_disk(folder)
  except OSError as e:
    raise RuntimeError("cannot save") from e


def write_through_a_library_in_cpp(_: pathlib.Path) -> None:
  raise ValueError('RESOURCE_EXHAUSTED: Error writing "/a/b": No space left on device')


@pytest.mark.parametrize(
  ("program", "says"),
  [
    (write_to_a_full_disk, "No space left on device; make room"),
    (make_a_folder_in_a_file, "/a/run': Not a directory; a file is where a folder is needed"),
    (make_a_folder_that_is_a_file, "/a': File exists; a file is where a folder is needed"),
    (write_what_cannot_be_written, "'/sys/run': "),
    (write_through_a_library, "No space left on device; make room"),
    (write_through_a_library_in_cpp, "No space left on device; make room"),
  ],
)
def test_a_place_that_cannot_be_written_is_one_line(program, says, tmp_path, capsys):
  with pytest.raises(SystemExit) as ended:
    cli.run(program, tmp_path)
  assert ended.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert says in line


def test_other_errors_of_the_system_keep_their_traceback():
  with pytest.raises(FileNotFoundError):
    cli.run(lambda: pathlib.Path("/gone/file").read_text())


def test_ctrl_c_within_a_library_is_ctrl_c(capsys):
  def program():
    try:
      raise KeyboardInterrupt
    except KeyboardInterrupt as e:
      raise RuntimeError("cancelled") from e

  with pytest.raises(SystemExit) as ended:
    cli.run(program)
  assert (ended.value.code, capsys.readouterr().err) == (130, "stopped by Ctrl-C\n")


def test_an_error_moves_no_cursor_and_has_an_end():
  def program():
    raise UserError("'\x1b[2J' is wrong" + "x" * 100_000)

  with pytest.raises(SystemExit) as ended:
    cli.run(program)
  assert str(ended.value.code).startswith(r"error: '\x1b[2J' is wrong")
  assert len(str(ended.value.code)) < 9_000


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.5, 1.5])
@pytest.mark.parametrize("module", ["mm1_jax.main", "mm1_jax.inference.chat"])
def test_ctrl_c_while_starting_is_one_line(module, seconds, tmp_path):
  """In any of the imports; before its own first line, Python itself has its way."""
  flags = ["--config=mm1_debug", f"--workdir={tmp_path}"]
  flags = flags if module == "mm1_jax.main" else [f"--checkpoint={tmp_path}"]
  code = f"print('begun', flush=True); import runpy; runpy.run_module('{module}', None, '__main__')"
  # Where the tests run in the background, SIGINT is ignored, and so it would be in the program.
  code = f"import sys; sys.argv[:1] = ['-m']; import mm1_jax; {code}"
  code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"
  with subprocess.Popen(
    [sys.executable, "-c", code, *flags],
    **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
  ) as process:
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
  assert "Traceback" not in said
  # 0: a training run's --stopped-code. 1: of the chat, which has found that there is no run; the
  # signal ends it as the system does where Python is already closing.
  others = (0,) if module == "mm1_jax.main" else (1, -signal.SIGINT)
  assert process.returncode in (130, *others)


# The door.


def mm1(*args: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
  env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
  return subprocess.run(
    [sys.executable, "-m", "mm1_jax", *args],
    **{"cwd": cwd, "env": env, "capture_output": True, "text": True, "timeout": 600},
    check=False,
  )


def test_help_names_all_commands_and_examples():
  result = mm1("--help")
  assert (result.returncode, result.stderr) == (0, "")
  for name in cli.PROGRAMS:
    assert f"\n  {name} " in result.stdout
  assert "mm1 train --config=mm1_debug\n" in result.stdout


@pytest.mark.parametrize(
  ("args", "says"),
  [
    ([], "error: mm1 has no command ''; the commands are train, plan, "),
    (["trian"], "error: mm1 has no command 'trian'; did you mean 'train'? See mm1 --help."),
    (["train"], "error: --config=FILE is needed"),
    (["train", "--wrkdir=x"], "did you mean --workdir? See mm1 train --help."),
    (["plan", "--topolgy=v5p-8"], "did you mean --topology? See mm1 plan --help."),
    (["data", "text", "--input=x"], "required: --output. See mm1 data text --help."),
    (["inspect", "--row=1"], "did you mean --rows? See mm1 inspect --help."),
    (["ask"], "required: --checkpoint. See mm1 ask --help."),
    (["chat", "--chekpoint=x"], "did you mean --checkpoint? See mm1 chat --help."),
    (["serve", "--checkpoint=x", "--prt=1"], "did you mean --port? See mm1 serve --help."),
    (["convert", "export", "--format=gguf"], "invalid choice: 'gguf'"),
    (["convert", "upcycle", "--checkpoint=x", "--out=y"], "required: --config"),
  ],
)
def test_a_mistake_is_one_line_and_code_1(args, says, tmp_path):
  result = mm1(*args, cwd=tmp_path)
  assert (result.returncode, result.stdout) == (1, "")
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ")
  assert says in line


# Prints which modules are imported by the help of a command.
HELP = """
import json, runpy, sys
sys.argv = ["mm1", *sys.argv[1:]]
try:
  runpy.run_module("mm1_jax", run_name="__main__", alter_sys=True)
except SystemExit as e:
  assert not e.code, e.code
print("\\n" + json.dumps(sorted(sys.modules)))
"""
SLOW = {
  "jax",
  "numpy",
  "flax",
  "orbax",
  "matplotlib",
  "PIL",
  "grain",
  "clu",
  "gradio",
  "sentencepiece",
}


@pytest.mark.parametrize("args", [[], *([name] for name in cli.PROGRAMS), ["convert", "export"]])
def test_help_imports_nothing_slow_and_spells_the_command(args):
  """Each of these libraries takes 0.1 to 1 s of CPU to import; --help is asked for in passing."""
  done = subprocess.run(
    [sys.executable, "-c", HELP, *args, "--help"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
    check=True,
  )
  text, _, modules = done.stdout.strip().rpartition("\n")
  assert not SLOW & set(json.loads(modules))
  assert " ".join(["mm1", *args]) in text
  assert not done.stderr


def test_a_terminal_of_another_encoding_ends_nothing():
  """Latin-1 is typed where ASCII is expected, and what ASCII cannot show is printed."""
  code = "from mm1_jax import cli; cli.run(lambda: print(ascii(input()), '\U0001f600'))"
  done = subprocess.run(
    [sys.executable, "-c", code],
    input=b"caf\xe9\n",
    capture_output=True,
    check=True,
    cwd=ROOT,
    env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
  )
  assert done.stdout == b"'caf\\udce9' \\U0001f600\n"


def test_a_reader_that_ends_early_is_no_traceback():
  """As in `mm1 --help | head -1`."""
  read, write = os.pipe()
  os.close(read)
  command = [sys.executable, "-m", "mm1_jax", "--help"]
  done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
  os.close(write)
  assert (done.returncode, done.stderr) == (141, "")
