# SPDX-License-Identifier: Apache-2.0
"""An object store, kept in a folder."""

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
