# SPDX-License-Identifier: Apache-2.0
"""An object store, kept in a folder."""

import pathlib

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
  """Objects of gs://, as files in `folder`: they are written whole, and never grow."""

  protocol = "gs"
  cachable = False
  folder = ""

  @classmethod
  def _strip_protocol(cls, path):
    name = str(path).removeprefix("gs://").removeprefix(cls.folder).strip("/")
    return f"{cls.folder}/{name}"

  def _open(self, path, mode="rb", **kwargs):
    if "a" in mode or "+" in mode:
      raise OSError(f"{path}: mode {mode!r} of an object")
    return super()._open(path, mode, **kwargs)


def mount(
  monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, kind: type[Bucket] = Bucket
) -> str:
  """Keeps gs:// in a folder for a test; returns a workdir there."""
  monkeypatch.setattr(kind, "folder", str(folder))
  monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: kind(auto_mkdir=True))
  backend.fsspec_backend._get_filesystem.cache_clear()  # another test's
  return "gs://bucket/run"
