# SPDX-License-Identifier: Apache-2.0
"""What the command lines share: flags, loading of configs, one line for a user's mistake, logging.

Exit codes, of every command: 0 when it is done, or for --help; 1 for a user's mistake, and for a
disk that is full or cannot be written; 130 for Ctrl-C; 141 where what reads its output has ended;
`--stopped-code` of a training run that a signal (SIGTERM, SIGHUP or Ctrl-C) stopped.
"""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import errno
import faulthandler
import io
import logging as std_logging
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import flags, logging

from mm1_jax import interrupts, untrusted
from mm1_jax.config import ConfigError, RunConfig, UserError
from mm1_jax.config_files import ConfigFile
from mm1_jax.overrides import Override, is_switch

COMMAND = interrupts.COMMAND
# What `mm1 NAME` runs, the same as `python -m MODULE`, and what it does.
PROGRAMS = {
  "train": ("mm1_jax.main", "trains a model: pre-training, fine-tuning"),
  "plan": ("mm1_jax.plan", "compiles a run for a TPU slice that is not there: memory, time, cost"),
  "data": ("mm1_jax.data.build", "turns raw files into shards of records"),
  "inspect": ("mm1_jax.data.inspect", "draws the data of a run, and checks it"),
  "ask": (
    "mm1_jax.inference.generate",
    "asks a model about pictures, once or many times",
  ),
  "chat": ("mm1_jax.inference.chat", "talks with a model in the terminal"),
  "serve": ("mm1_jax.inference.app", "talks with a model on a web page"),
  "eval": ("mm1_jax.eval", "evaluates a model on benchmarks, with errors and controls"),
  "convert": ("mm1_jax.convert", "imports open weights; exports, merges and upcycles runs"),
}
_OVERRIDE = re.compile(r"--?config\.(?P<key>[^=]+)(=(?P<value>.*))?", re.DOTALL)


def spelled(text: str) -> str:
  """Returns a text with its commands as the user spells them: `python -m MODULE`, or `mm1 NAME`."""
  if pathlib.Path(sys.argv[0]).stem != COMMAND:
    return text
  names = {module: name for name, (module, _) in PROGRAMS.items()}
  return re.sub(
    r"python -m (mm1_jax[\w.]*\w)",
    lambda match: f"{COMMAND} {names[match[1]]}" if match[1] in names else match[0],
    text,
  )


def make_parser(module: str, doc: str | None) -> "Parser":
  """Returns the parser of a program's flags; `doc`, with examples, is shown by --help."""
  return Parser(prog=spelled(f"python -m {module}"), description=spelled(doc or ""))


class Parser(argparse.ArgumentParser):
  """Flags of a program. A mistake is a ConfigError, with the flag that was probably meant.

  `--max-new-tokens` may be spelled `--max_new_tokens`; nothing is abbreviated.
  """

  def __init__(self, **kwargs: Any):
    super().__init__(
      allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
    )
    self.passes_on = False  # unknown flags are returned, for another program
    self._takes_config = False

  def add_config(self, *, required: bool = False) -> None:
    """Adds `--config` and its overrides, for `load_config`."""
    self._takes_config = True
    self.add_argument(
      "--config",
      metavar="FILE",
      required=required,
      help="a config by path or name, such as configs/mm1_3b.py, mm1_30b_moe:v5p-512 or "
      "mm1_proxy:85m; --config.KEY=VALUE overrides any of its values",
    )

  def parse_known_args(self, args=None, namespace=None):  # pyright: ignore
    """Returns the flags' values, and what is left: nothing, unless this parser `passes_on`."""
    args = list(sys.argv[1:] if args is None else args)
    if self._subparsers is None:  # else a verb's parser reads the flags after it
      args, overrides = self._split(args)
      if self._takes_config:
        self.set_defaults(overrides=overrides)
    namespace, rest = super().parse_known_args(args, namespace)
    if rest and not self.passes_on:
      hint = "; overrides look like --config.key=value" if self._takes_config else ""
      self.error(f"unexpected arguments {rest}{hint}")
    return namespace, rest

  def error(self, message: str) -> NoReturn:
    """Raises a ConfigError instead of printing the usage."""
    raise ConfigError(f"{message}. See {self.prog} --help.")

  def _split(self, args: list[str]) -> tuple[list[str], tuple[Override, ...]]:
    """Returns the flags, each spelled as it was added, and the overrides."""
    kept, overrides = [], []
    waiting = collections.deque(args)
    while waiting and waiting[0] != "--":
      arg = waiting.popleft()
      if self._takes_config and (match := _OVERRIDE.fullmatch(arg)):
        overrides.append((match["key"], self._value(match, waiting)))
      else:
        kept.append(self._spelled_as_added(arg) if arg.startswith("--") else arg)
    return [*kept, *waiting], tuple(overrides)

  def _value(self, match: re.Match[str], waiting: collections.deque[str]) -> str:
    """Returns the text of an override: after `=`, or the next argument, or "true" of a bool."""
    if match["value"] is not None:
      return match["value"]
    if waiting and not waiting[0].startswith("--"):
      return waiting.popleft()
    if not is_switch(match["key"]):
      self.error(f"--config.{match['key']} needs a value")
    return "true"

  def _spelled_as_added(self, arg: str) -> str:
    name, equals, value = arg.partition("=")
    known = self._option_string_actions
    dashed = name.replace("_", "-")
    found = name if name in known else dashed
    if found in known or self.passes_on:
      return f"{found}{equals}{value}" if found in known else arg
    group = name.removeprefix("--").partition(".")[0]
    if self._takes_config and group in (f.name for f in dataclasses.fields(RunConfig)):
      near = [f"--config.{name.removeprefix('--')}"]
    else:
      near = difflib.get_close_matches(dashed, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ConfigError(f"there is no flag {name}{hint} See {self.prog} --help.")


def load_config(args: argparse.Namespace, topology: str | None = None) -> RunConfig:
  """Returns the run that `--config` and its overrides describe.

  Args:
    args: of a parser with `add_config`.
    topology: name of a TPU slice; the config's preset for it is taken, if it has one.

  Raises:
    ConfigError: there is no config, the file cannot be run, or its values do not fit.
  """
  if args.config is None:
    raise ConfigError("--config=FILE is needed, such as configs/mm1_debug.py; see --help.")
  given = ConfigFile.find(args.config)
  file = given.on_slice(topology) if topology else given
  if file != given:
    logging.info("with the preset of %s for %s", args.config, topology)
  return file.build(args.overrides)


def ways_on(args: argparse.Namespace) -> dict[str, str]:
  """Returns the commands that `inputs.check` names: `build`, `sample` and `plan`, of this run."""
  config = f"--config={shlex.quote(args.config)}"
  overrides = [shlex.quote(f"--config.{key}={text}") for key, text in args.overrides]
  slice_name = ConfigFile.find(args.config).planned_slice
  plan = config, *overrides, f"--topology={slice_name}"
  return {
    "build": spelled("python -m mm1_jax.data.build --help"),
    "sample": spelled(f"python -m mm1_jax.main {config} --sample"),
    "plan": spelled(f"python -m mm1_jax.plan {' '.join(plan)}"),
  }


def at_least(least: int) -> Callable[[str], int]:
  """Returns what reads a whole number of a flag, no smaller than `least`."""

  def read(text: str) -> int:
    if int(text) < least:
      raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
    return int(text)

  read.__name__ = "int"  # as argparse calls it in messages
  return read


def run(program: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
  """Runs a program; what its user can mend ends it with one line, and the code above."""
  interrupts.watch()
  _read_and_print_all()
  show_story()
  if not faulthandler.is_enabled():
    faulthandler.enable()  # where a crash in native code was
  try:
    program(*args, **kwargs)
    sys.stdout.flush()
  except UserError as e:
    sys.exit(f"error: {_line(e)}")
  except KeyboardInterrupt:
    _end(interrupts.LINE, interrupts.CODE)
  except BrokenPipeError:  # what read the output has ended, as in `mm1 --help | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    sys.exit(141)
  except Exception as e:
    if "KeyboardInterrupt" in _kinds(e):
      _end(interrupts.LINE, interrupts.CODE)
    if message := _of_the_disk(e):
      _end(f"error: {message}", 1)
    raise


def _read_and_print_all() -> None:
  """Lets a terminal of any encoding be read and written: what it cannot show is written out.

  What is not in the encoding of stdin is kept, as in arguments, for `untrusted.mended`.
  """
  for stream, errors in (
    (sys.stdin, "surrogateescape"),
    (sys.stdout, "backslashreplace"),
    (sys.stderr, "backslashreplace"),
  ):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors=errors)


# What a user can mend at a file or a disk, and how. Other errors of the system are bugs, or tell
# more by their traceback.
_MEND = {
  errno.EACCES: "let this user write and read there, or name another place",
  errno.EPERM: "let this user write and read there, or name another place",
  errno.EROFS: "name a place that can be written",
  errno.ENOSPC: "make room there, or name another place",
  errno.EDQUOT: "make room within the quota, or name another place",
  errno.ENOTDIR: "a file is where a folder is needed; name another place",
  errno.EISDIR: "a folder is where a file is needed; name another place",
  errno.EEXIST: "a file is where a folder is needed; name another place",
  errno.ENAMETOOLONG: "give it a shorter name",
  errno.ELOOP: "its links lead in a circle; correct them",
}


_SPOKEN_OF = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


def _of_the_disk(error: BaseException) -> str:
  """Returns what to say about a place that cannot be written or read, "" for other errors."""
  for cause in _causes(error):
    if isinstance(cause, OSError) and cause.errno in _MEND:
      place = f"'{cause.filename}': " if cause.filename else ""
      return _line(f"{place}{cause.strerror}; {_MEND[cause.errno]}.")
    # Libraries in other languages have the system's words for it, and no number.
    for number in _SPOKEN_OF:
      if not isinstance(cause, OSError) and os.strerror(number) in str(cause):
        text = " ".join(str(cause).split())[:_LONGEST_CAUSE]
        return _line(f"{text}; {_MEND[number]}.")
  return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  seen: list[BaseException] = []
  while error is not None and error not in seen:
    seen.append(error)
    yield error
    error = error.__cause__ or error.__context__


def _kinds(error: BaseException) -> set[str]:
  return {type(cause).__name__ for cause in _causes(error)}


_LONGEST_CAUSE, _LONGEST_LINE = 500, 8_000


def _line(message: object) -> str:
  """Returns a message as a terminal may show it: it may quote what a stranger wrote."""
  text = untrusted.visible(str(message))
  left_out = len(text) - _LONGEST_LINE
  if left_out <= 0:
    return text
  half = _LONGEST_LINE // 2
  return f"{text[:half]} ... {left_out:,} characters not shown ... {text[-half:]}"


def _end(line: str, code: int) -> NoReturn:
  with contextlib.suppress(OSError):  # stderr may be on the disk that is full
    print(line, file=sys.stderr, flush=True)
  sys.exit(code)


def show_story() -> None:
  """Logs what this package says, bare; of the libraries, errors only."""
  # absl warns of logs before that, and Grain's worker processes read flags of absl's.
  flags.FLAGS.mark_as_parsed()
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(_Visible())
  handler.addFilter(_is_ours)


class _Visible(std_logging.Formatter):
  """The bare message; a file's name or a caption in it moves no cursor."""

  def format(self, record: std_logging.LogRecord) -> str:
    return untrusted.visible(super().format(record))


def _is_ours(record: std_logging.LogRecord) -> bool:
  ours = record.pathname.startswith(os.path.dirname(__file__))
  return ours or record.levelno >= std_logging.ERROR
