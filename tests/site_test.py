# SPDX-License-Identifier: Apache-2.0
"""The docs tell what the code does: pages made of it are current, messages and commands exist."""

import ast
import functools
import html
import pathlib
import re
import shlex

import pytest

from docs import generate
from mm1_jax import cli, legend
from mm1_jax.config import ConfigError
from mm1_jax.config_files import ConfigFile

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@functools.cache
def made() -> dict[pathlib.Path, str]:
  return generate.pages()


@pytest.mark.parametrize(
  "name", ["config", "metrics", "cli", "tasks", "imports", "api", "architecture"]
)
def test_pages_made_of_the_code_are_current(name):
  path = generate.REFERENCE / f"{name}.md"
  assert path.read_text() == made()[path], "run `python -m docs.generate`, and commit"


def test_every_setting_is_described():
  rows = [line for line in made()[generate.REFERENCE / "config.md"].splitlines() if "| `" in line]
  assert len(rows) > 100
  assert [row for row in rows if row.endswith("|  |")] == []


def test_every_command_is_on_the_page():
  page = made()[generate.REFERENCE / "cli.md"]
  for name in cli.PROGRAMS:
    assert f"\n## mm1 {name}\n" in page
  assert "\n### mm1 convert export\n" in page
  assert "| `--workdir=FOLDER` |" in page


@pytest.mark.parametrize(
  ("name", "pattern"),
  [
    ("loss", "loss"),
    ("loss/captions/web", "loss/{source}"),
    ("grad_norm/vit", "grad_norm/{part}"),
    ("losses", None),
    ("xloss/text", None),
  ],
)
def test_a_name_is_found_in_the_legend(name, pattern):
  assert legend.pattern(name) == pattern


def walks() -> list[str]:
  """Returns what architecture.md names on the ways to the loss and to a batch, as `file.name`."""
  text = (generate.REFERENCE / "architecture.md").read_text()
  ways = text[text.index("## From the command line") : text.index("## `Batch`")]
  return re.findall(r"`(\w+\.\w+)`", ways)


@pytest.mark.parametrize("step", walks())
def test_the_walks_name_what_there_is(step):
  file, name = step.split(".")
  found = (path.read_text() for path in (ROOT / "mm1_jax").rglob(f"{file}.py"))
  assert any(re.search(rf"^(def|class) {name}\b", text, re.MULTILINE) for text in found)


# --- Messages ---


@functools.cache
def messages() -> list[str]:
  """Returns all texts of the package but docstrings; what is filled in is a zero byte."""
  texts = []
  for path in (ROOT / "mm1_jax").rglob("*.py"):
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
      if isinstance(node, ast.JoinedStr):
        parts = [str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values]
        texts.append("".join(parts))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
        texts.append(re.sub(r"%\.?\d*[a-z]", "\0", node.value))
  return texts


def is_said(heading: str) -> bool:
  """Returns whether one text of the package has the parts of a heading, in order."""
  parts = [part.strip() for part in heading.split("...") if part.strip()]
  pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
  return any(pattern.search(text) for text in messages())


def headings() -> list[str]:
  text = (ROOT / "docs" / "troubleshooting.md").read_text()
  return [html.unescape(heading) for heading in re.findall(r"^### (.*)", text, re.MULTILINE)]


SYMPTOMS = {
  "The device is out of memory",
  "The loss does not fall",
  "The devices wait for data",
}


def test_headings_of_troubleshooting_are_messages():
  assert len(headings()) > 30
  assert [h for h in headings() if h not in SYMPTOMS and not is_said(h)] == []


def test_a_message_that_is_nowhere_in_the_code_is_found():
  assert not is_said("mesh ... needs ... bananas")
  assert not is_said("devices; there are ... mesh")


# --- Commands ---


def commands() -> list[tuple[str, str]]:
  """Returns the `mm1` commands in blocks of README and docs, each with its page."""
  found = []
  for page in (ROOT / "README.md", *PAGES):
    for language, body in BLOCK.findall(page.read_text()):
      if language in ("", "sh"):
        lines = body.replace("\\\n", " ").splitlines()
        found += [(page.name, line) for line in lines if line.startswith("mm1 ")]
  return found


def test_pages_have_commands():
  assert len(commands()) > 30


@pytest.mark.parametrize(("page", "command"), commands())
def test_flags_and_configs_of_commands_exist(page, command):
  _, name, *args = shlex.split(command, comments=True)
  with generate._as_console_command():
    parser = generate.find_parser(name)
  if verbs := [a for a in parser._actions if hasattr(a, "choices") and isinstance(a.choices, dict)]:
    parser = verbs[0].choices[args.pop(0)]
  flags, overrides = parser._split([arg for arg in args if arg != "..."])
  known = parser._option_string_actions
  for flag in flags:
    assert not flag.startswith("--") or flag.split("=")[0] in known, (page, flag)
  if spec := next((f.split("=")[1] for f in flags if f.startswith("--config=")), None):
    config = ConfigFile.find(spec)
    if not spec.startswith("from_weights"):  # reads a run that is not there
      config.build(overrides)


# --- Figures ---


def results() -> list[tuple[str, str]]:
  """Returns the figures of README's results, each with the page that it is from."""
  text = (ROOT / "README.md").read_text()
  table = text[text.index("## Results") : text.index("## Docs")]
  return re.findall(r"^\| .*? \| ([^|]*\d[^|]*) \| \[\w+\]\((.*?)\) \|$", table, re.MULTILINE)


def test_results_are_those_of_the_notes():
  assert len(results()) > 5
  for figures, page in results():
    text = (ROOT / page).read_text()
    for figure in re.findall(r"\d[\d.e+-]*\d|\d", figures):
      assert figure in text, (figures, page)


# --- Form ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_no_longer_than_an_editor_shows(page):
  text = BLOCK.sub("", page.read_text())
  assert [line for line in text.splitlines() if len(line) > 120 and line[0] not in "|#"] == []


def test_links_of_the_readme_lead_somewhere():
  """Those of the docs are checked by `make docs`."""
  text = (ROOT / "README.md").read_text()
  links = re.findall(r"\]\((?!http)(.*?)\)|src=\"(.*?)\"", text)
  assert len(links) > 20
  assert [link for pair in links for link in pair if link and not (ROOT / link).exists()] == []


def test_no_mistake_is_passed_over():
  with pytest.raises(ConfigError, match="there is no flag --confg"), generate._as_console_command():
    generate.find_parser("train")._split(["--confg=mm1_debug"])
