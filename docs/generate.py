# SPDX-License-Identifier: Apache-2.0
"""Writes the reference pages that are made of the code: `python -m docs.generate`.

- `reference/config.md`: every setting, from the dataclasses of `mm1_jax/config/` and their
  comments;
- `reference/metrics.md`: what a run logs, from `mm1_jax/legend.py`;
- `reference/cli.md`: commands and flags, from the parsers that answer --help;
- `reference/tasks.md`: benchmarks, from `mm1_jax/eval/tasks/`;
- `reference/imports.md`: the settings of open weights, from `mm1_jax/convert/settings.py`;
- `reference/api.md`: the classes that Python programs use, from their docstrings;
- in `reference/architecture.md` the fields of a batch, and the tree, from the first sentence of
  each file.

`tests/site_test.py` compares them with the code.
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import json
import pathlib
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

from mm1_jax import __main__ as front_door
from mm1_jax import cli, config, legend
from mm1_jax.batch import Batch
from mm1_jax.convert import settings
from mm1_jax.eval import tasks
from mm1_jax.eval.task import Task
from mm1_jax.eval.tasks import own
from mm1_jax.inference import beam, model, sampler
from mm1_jax.ranges import Range

ROOT = pathlib.Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
NOTICE = "<!-- Made by `python -m docs.generate`; change the code, not this page. -->\n"


def main() -> None:
  for path, text in pages().items():
    path.write_text(text)


def pages() -> dict[pathlib.Path, str]:
  """Returns the text of each page that is made of the code."""
  architecture = REFERENCE / "architecture.md"
  return {
    REFERENCE / "config.md": config_page(),
    REFERENCE / "metrics.md": metrics_page(),
    REFERENCE / "cli.md": cli_page(),
    REFERENCE / "tasks.md": tasks_page(),
    REFERENCE / "imports.md": imports_page(),
    REFERENCE / "api.md": api_page(),
    architecture: _fill(architecture.read_text(), {"batch": batch_table(), "tree": tree()}),
  }


def _fill(text: str, parts: dict[str, str]) -> str:
  """Returns a page with new text between `<!-- NAME -->` and `<!-- end of NAME -->`."""
  for name, part in parts.items():
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    text = f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"
  return text


# --- Tables ---


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """Returns a Markdown table."""
  header = list(header)
  lines = [header, ["---"] * len(header), *rows]
  return "".join(f"| {' | '.join(_cell(text) for text in line)} |\n" for line in lines)


def _cell(text: str) -> str:
  return " ".join(text.split()).replace("|", r"\|")


def _sentence(text: str) -> str:
  return text[:1].upper() + text[1:]


# --- Settings ---


def config_page() -> str:
  """Returns the page of all settings, group by group."""
  parts = [
    NOTICE,
    "# Settings\n",
    "A config is a `RunConfig`, built of these groups. Override any value on the command line, by\n"
    "its path: `--config.train.num_steps=20`, `--config.model.decoder.moe.capacity_factor=None`,\n"
    "`--config.optimizer.frozen=\"('vit',)\"`. What lies outside a range is refused, with the\n"
    "path, the value and the range; so are NaN and infinity. Whole numbers are below 2^31.\n\n"
    "`mm1_jax/config/` also has the rules between settings.\n",
  ]
  for path, group in _groups(config.RunConfig, ""):
    title = f"`{path}`" if path else "The run"
    rows = [_setting(group, field, path) for field in dataclasses.fields(group)]
    about = inspect.cleandoc(str(group.__doc__))
    settings = table(("setting", "type", "default", "range", "what it is"), rows)
    parts.append(f"## {title}\n\n{about}\n\n{settings}")
  return "\n".join(parts)


def _groups(group: type, path: str) -> Iterator[tuple[str, type]]:
  """Yields a group of settings and those in it, each with its path."""
  yield path, group
  for name, hint in config.field_types(group).items():
    for inner in (hint, *typing.get_args(hint)):
      if isinstance(inner, type) and dataclasses.is_dataclass(inner) and inner is not group:
        several = typing.get_origin(hint) is tuple
        if several and name == "eval_sources":  # as `sources`
          continue
        below = f"{path}.{name}".lstrip(".") + (".NAME" if name == "sources" else "")
        yield from _groups(inner, below)


def _setting(group: type, field: dataclasses.Field, path: str) -> tuple[str, ...]:
  hint = typing.get_type_hints(group, include_extras=True)[field.name]
  default = "" if field.default is dataclasses.MISSING else _default(field.default)
  comment = _sentence(_comments(group).get(field.name, ""))
  if _type(hint) == "group":
    comment = f"See `{f'{path}.{field.name}'.lstrip('.')}`."
  return f"`{field.name}`", _type(hint), default, _range(hint), comment


def _default(value: Any) -> str:
  if dataclasses.is_dataclass(value):
    return ""
  if value == config.LORA_MATRICES:
    return "all"
  return f"`{value!r}`"


def _type(hint: Any) -> str:
  """Returns a field's type in words."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    return _type(args[0])
  if origin is Literal:
    return ", ".join(f'`"{value}"`' for value in args)
  if origin in (types.UnionType, typing.Union):
    return ", or ".join("`None`" if a is type(None) else _type(a) for a in args)
  if origin is tuple and args[-1] is Ellipsis:
    return f"any number of {_type(args[0])}"
  if origin is tuple:
    return f"({', '.join(map(_type, args))})"
  return "group" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def _range(hint: Any) -> str:
  """Returns the range of a field's numbers, and what None does."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    return "; ".join(_bounds(args[1]))
  found = [text for arg in args if arg is not Ellipsis and (text := _range(arg))]
  return found[0] if found else ""


def _bounds(bounds: Range) -> Iterator[str]:
  words = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
  sides = [
    f"{word} {getattr(bounds, side):g}"
    for side, word in words.items()
    if abs(getattr(bounds, side)) < 2**31
  ]
  yield ", ".join(sides)
  if bounds.none:
    yield f"`None` {bounds.none}"


def _comments(group: type) -> dict[str, str]:
  """Returns what the source says of each field: the lines above it, and the end of its line."""
  source = textwrap.dedent(inspect.getsource(group))
  comments = {
    token.start[0]: token.string.lstrip("# ")
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  fields = [n for n in ast.parse(source).body[0].body if isinstance(n, ast.AnnAssign)]  # pyright: ignore
  lines = source.splitlines()
  found = {}
  for field in fields:
    first = field.lineno
    while lines[first - 2].strip().startswith("#"):
      first -= 1
    spoken = [comments[n] for n in range(first, (field.end_lineno or 0) + 1) if n in comments]
    found[ast.unparse(field.target)] = " ".join(spoken)
  return found


# --- Metrics ---


def metrics_page() -> str:
  """Returns the page of what a run logs."""

  def rows(metrics: Iterable[legend.Metric]) -> list[tuple[str, str, str]]:
    return [(f"`{m.name}`", m.unit, m.meaning) for m in metrics]

  header = ("name", "unit", "what it is")
  return "\n".join(
    [
      NOTICE,
      "# Metrics\n",
      "A run writes them to `metrics.jsonl` and `tensorboard/` in its workdir, every\n"
      "`train.log_every` steps. A value is a mean over the steps since the line before, unless it\n"
      "says otherwise. [Training](training.md#metrics-on-disk) has the form of the files.\n",
      "## Numbers\n",
      table(header, rows(legend.SCALARS)),
      "## Tables\n",
      "Written at evaluations and at the end.\n",
      table(header, rows(legend.TABLES)),
      "## In Python\n",
      "```python\nfrom mm1_jax.metrics import read_metrics, read_tables\n\n"
      'losses = read_metrics("runs/mm1_debug")["loss"]  # {step: value}\n'
      'load = read_tables("runs/mm1_debug").get("moe/load")  # {step: array of two dims}\n```\n',
    ]
  )


# --- Benchmarks ---

KINDS = {
  "captions": "Captions",
  "vqa": "Visual questions",
  "choices": "Multiple choice",
  "yes_no": "Yes or no",
  "documents": "Documents and charts",
  "pairs": "Pairs of pictures",
  "grounding": "Grounding",
  "judged": "Judged answers",
  "text": "Text",
}


def tasks_page() -> str:
  """Returns the page of benchmarks, kind by kind."""
  parts = [
    NOTICE,
    "# Benchmarks\n",
    "A task reads a benchmark's official files. Put them into a folder with their official\n"
    "names, pictures unpacked beside them; where names of several benchmarks collide, into a\n"
    "folder of the task's name within that. COCO's pictures may be shared: `val2014/` in either.\n"
    "The split in bold is scored unless another is named. Parquet needs the extra `eval`.\n",
  ]
  for kind in tasks.KINDS:
    name = kind.__name__.split(".")[-1]
    parts.append(f"## {KINDS[name]}\n\n{''.join(map(_task, kind.TASKS))}")
  parts.append(f"## Your own\n\n{_code_blocks(str(inspect.getdoc(own)))}")
  return "\n".join(parts)


def imports_page() -> str:
  """Returns the page of the settings of open weights, family by family."""
  parts = [
    NOTICE,
    "# Settings of open weights\n",
    "What `mm1 convert import` makes of each key of a `config.json`, for all keys of the config\n"
    "classes of `transformers`, and some that older files have. A value of another type, or one\n"
    "that our modules cannot express, is refused by the key's name. A key that is left out has\n"
    "its default. Keys that are not here are not read, and named.\n",
  ]
  for kind, keys in settings.TABLES.items():
    rows = [
      (
        f"`{key}`",
        "" if setting.default is None else f"`{json.dumps(setting.default)}`",
        setting.use,
      )
      for key, setting in sorted(keys.items())
    ]
    parts.append(f"## {kind}\n\n{table(('key', 'default', 'what becomes of it'), rows)}")
  return "\n".join(parts)


def _task(task: Task) -> str:
  splits = ", ".join(f"**{s}**" if s == task.split else s for s in task.splits)
  shots = f"; demonstrations of {task.demonstrations}" if task.demonstrations else ""
  answers = "yes" if task.submission else "no"
  rows = [
    ("splits", f"{splits}{shots}"),
    ("forms", ", ".join(f"`{name}`" for name in task.forms)),
    ("score", task.metric),
    ("answer file", answers),
    ("files", ", ".join(f"`{name}`" for name in task.files)),
    ("from", task.source),
  ]
  return f"### {task.title}\n\n{table((f'`{task.name}`', ''), rows)}\n"


def _code_blocks(text: str) -> str:
  """Returns a docstring whose indented lines are code."""
  return (
    re.sub(r"(?m)((?:^  .*\n)+)", lambda m: f"```text\n{textwrap.dedent(m[1])}```\n", text) + "\n"
  )


# --- Commands ---


class _Found(Exception):
  """Ends a program as soon as its parser has all of its flags."""

  def __init__(self, parser: cli.Parser):
    super().__init__()
    self.parser = parser


def cli_page() -> str:
  """Returns the page of all commands with their flags."""
  about = inspect.cleandoc(str(front_door.__doc__))
  commands = table(
    ("command", "module", "what it does"),
    ([f"[`mm1 {n}`](#mm1-{n})", f"`{m}`", text] for n, (m, text) in cli.PROGRAMS.items()),
  )
  with _as_console_command():
    parts = [_command(find_parser(name), level=2) for name in cli.PROGRAMS]
  return "\n".join([NOTICE, "# Commands\n", f"```text\n{about}\n```\n", commands, *parts])


@contextlib.contextmanager
def _as_console_command() -> Iterator[None]:
  """Makes programs spell themselves `mm1 NAME`, and stop where they would parse their flags."""
  name, parse = sys.argv[0], cli.Parser.parse_known_args

  def stop(self, *_, **__):
    raise _Found(self)

  sys.argv[0], cli.Parser.parse_known_args = cli.COMMAND, stop
  try:
    yield
  finally:
    sys.argv[0], cli.Parser.parse_known_args = name, parse


def find_parser(command: str) -> cli.Parser:
  """Returns the parser of a command, as its program makes it."""
  program = front_door._find(command)
  try:
    program([])
  except _Found as found:
    return found.parser
  raise AssertionError(f"mm1 {command} parses no flags")


def _command(parser: argparse.ArgumentParser, level: int) -> str:
  verbs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
  parts = [f"{'#' * level} {parser.prog}\n"]
  if parser.description:
    parts.append(f"```text\n{inspect.cleandoc(parser.description)}\n```\n")
  if rows := [_flag(action) for action in parser._actions if action.option_strings]:
    parts.append(table(("flag", "what it is"), rows[1:]) if len(rows) > 1 else "")  # but --help
  for verb in verbs:
    parts += [_command(one, level + 1) for one in verb.choices.values()]
  return "\n".join(parts)


def _flag(action: argparse.Action) -> tuple[str, str]:
  value = ""
  if action.nargs != 0:
    choices = ",".join(map(str, action.choices)) if action.choices else ""
    value = "=" + str(action.metavar or (f"{{{choices}}}" if choices else action.dest.upper()))
  needed = " (required)" if action.required else ""
  return f"`{action.option_strings[-1]}{value}`", f"{action.help or ''}{needed}".replace("%%", "%")


# --- Python ---


def api_page() -> str:
  """Returns the page of what Python programs use."""
  methods = ("load", "generate", "stream", "encode", "room")
  parts = [
    NOTICE,
    "# Python\n",
    "[Ask a model](../guides/ask.md) has examples.\n",
    f"## `mm1_jax.inference.model.Model`\n\n{_docstring(model.Model)}",
    *(_function(getattr(model.Model, name)) for name in methods),
    *(_fields(kind) for kind in (sampler.Sampling, beam.BeamSearch)),
  ]
  return "\n".join(parts)


def _function(function: Callable) -> str:
  node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
  assert isinstance(node, ast.FunctionDef)
  node.body, node.decorator_list = [ast.Expr(ast.Constant(...))], []
  head = ast.unparse(node).removesuffix("\n    ...").removeprefix("def ").removesuffix(":")
  head = re.sub(r"\((?:self|cls)(?:, )?", "(", head, count=1)
  name, inside, result = re.fullmatch(r"(\w+)\((.*)\)( -> .*)", head).groups()  # pyright: ignore
  inside = re.sub(r"(?<=[\w\]])=(?=\S)", " = ", inside)
  arguments = ",\n  ".join(re.split(r", (?![^\[]*\])", inside))
  code = f"```python\n{name}(\n  {arguments},\n){result}\n```".replace("'", "")
  return f"### `{name}`\n\n{code}\n\n{_docstring(function)}"


def _fields(kind: type) -> str:
  rows = [
    (f"`{name}`", f"`{default}`", _sentence(_comments(kind)[name]))
    for name, default in kind._field_defaults.items()  # pyright: ignore
  ]
  text = table(("field", "default", "what it is"), rows)
  return f"## `{kind.__module__}.{kind.__name__}`\n\n{_docstring(kind)}\n{text}"


def _docstring(thing: Any) -> str:
  """Returns a docstring as Markdown: sections become lists."""
  doc = str(inspect.getdoc(thing))
  first, *sections = re.split(r"^(Args|Raises|Returns|Attributes):\n", doc, flags=re.MULTILINE)
  text = first.rstrip() + "\n"
  for title, body in zip(sections[::2], sections[1::2], strict=True):
    items = re.sub(r"\n +", " ", textwrap.dedent(body)).strip().splitlines()
    items = [re.sub(r"^([\w, ]+):", r"- `\1`:", item) for item in items]
    lines = [textwrap.fill(item, 100, subsequent_indent="  ") for item in items]
    text += f"\n{title}:\n\n" + "\n".join(lines) + "\n"
  return text


# --- The architecture ---


def batch_table() -> str:
  """Returns the fields of a `Batch`, from their comments."""
  told = {
    name: re.fullmatch(r"(\w+\[.*?\]), (.*)", text) for name, text in _comments(Batch).items()
  }
  rows = [(f"`{name}`", f"`{m[1]}`", _sentence(m[2])) for name, m in told.items() if m]
  return table(("field", "type", "what it is"), rows)


FOLDERS = ("configs", "launch", "bench", "lab", "mm1_jax")


def tree() -> str:
  """Returns a list of all source files by folder, each with the first sentence of its docstring."""
  parts = []
  for top in FOLDERS:
    folders: dict[pathlib.Path, list[pathlib.Path]] = {}
    for path in sorted((ROOT / top).rglob("*.py")):
      folders.setdefault(path.parent, []).append(path)
    for folder, files in sorted(folders.items()):
      rows = [(f"`{p.name}`", text) for p in files if (text := _first_sentence(p))]
      if rows:
        title = folder.relative_to(ROOT).as_posix()
        parts.append(f"### `{title}/`\n\n{table(('file', 'what it is'), rows)}")
  return "\n".join(parts)


def _first_sentence(path: pathlib.Path) -> str:
  doc = ast.get_docstring(ast.parse(path.read_text())) or ""
  return " ".join(doc.split("\n\n")[0].split())


if __name__ == "__main__":
  main()
