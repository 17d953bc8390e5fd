# SPDX-License-Identifier: Apache-2.0
"""`manifest.json`: what an export was made of, and the hash of each of its files."""

import datetime
import hashlib
import json
import pathlib
from importlib import metadata
from typing import Any

from mm1_jax import untrusted
from mm1_jax.convert import ConvertError

MANIFEST = "manifest.json"


def write(folder: pathlib.Path, facts: dict[str, Any]) -> None:
  """Writes the manifest of a finished export; `facts` come before the hashes."""
  made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  files = {str(path.relative_to(folder)): _facts(path) for path in _files(folder)}
  text = {"mm1_jax": metadata.version("mm1_jax"), "made": made, **facts, "files": files}
  (folder / MANIFEST).write_text(json.dumps(text, indent=2) + "\n")


def check(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the manifest of an export after checking that its files are those that were written.

  Raises:
    ConvertError: naming the first file that is missing, was added, or was changed.
  """
  if not (folder / MANIFEST).exists():
    raise ConvertError(f"'{folder}' is no finished export: it has no {MANIFEST}.")
  manifest = untrusted.read_object(folder / MANIFEST, ConvertError)
  listed = manifest.get("files")
  if not isinstance(listed, dict):
    raise ConvertError(
      f"'{folder / MANIFEST}' is damaged: its 'files' are {untrusted.shown(listed)}."
    )
  here = {str(path.relative_to(folder)): path for path in _files(folder)}
  for name in sorted(here.keys() | listed.keys()):
    if name not in here:
      raise ConvertError(f"'{folder}' lacks '{name}', which its {MANIFEST} lists.")
    if name not in listed:
      raise ConvertError(f"'{folder}' has '{name}', which its {MANIFEST} does not list.")
    if _facts(here[name]) != listed[name]:
      raise ConvertError(f"'{folder / name}' is not the file that was exported: its hash differs.")
  return manifest


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def _facts(path: pathlib.Path) -> dict[str, Any]:
  with path.open("rb") as file:
    return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
