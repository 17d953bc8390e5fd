# SPDX-License-Identifier: Apache-2.0
"""Shards on gs:// are read in place, from a server with the protocol of Google's."""

import http.server
import pathlib
import re
import threading
import urllib.parse

import pytest

from mm1_jax.config import SourceConfig
from mm1_jax.data import sources
from mm1_jax.data.sources import DataError, Source
from tests.helpers.records import SAMPLE, sample_source


class Bucket(http.server.BaseHTTPRequestHandler):
  """Serves ranges of the sample's files."""

  protocol_version = "HTTP/1.1"
  served: list[int] = []  # noqa: RUF012

  def do_GET(self):
    path = pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlparse(self.path).path))
    data = (SAMPLE / path.name).read_bytes()
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"]).groups()
    begin = int(first) if first else max(0, len(data) - int(last))
    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
    self.send_response(206)
    self.send_header("Content-Range", f"bytes {begin}-{end}/{len(data)}")
    self.send_header("Content-Length", str(end - begin + 1))
    self.send_header("x-goog-generation", "1")
    self.end_headers()
    self.served.append(end - begin + 1)
    try:
      self.wfile.write(data[begin : end + 1])
    except ConnectionError:
      self.close_connection = True  # the client has had what it wanted

  def log_message(self, *_):
    pass


class Server(http.server.ThreadingHTTPServer):
  def handle_error(self, request, client_address):
    """The client hangs up on ranges that it has had enough of."""


@pytest.fixture
def bucket(monkeypatch):
  server = Server(("127.0.0.1", 0), Bucket)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  endpoint = f"http://127.0.0.1:{server.server_port}"
  monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", endpoint)
  yield "gs://bucket"
  server.shutdown()
  server.server_close()


def test_records_on_gs_are_those_on_disk(bucket, monkeypatch):
  local = Source(sample_source("text"))
  names = [pathlib.Path(path).name for path in local.paths]
  # Listing a bucket is gcsfs's part, which the tests do without.
  monkeypatch.setattr(sources, "expand", lambda _: tuple(f"{bucket}/{name}" for name in names))
  remote = Source(SourceConfig("text", f"{bucket}/text-train-*.arrayrecord"))
  assert len(remote) == len(local)
  for i in (0, 5, len(local) - 1):
    assert remote[i] == local[i]
  assert Bucket.served


def test_what_is_missing_to_list_a_bucket_is_told(monkeypatch):
  def glob(*_):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr(type(sources.epath.Path("gs://bucket")), "glob", glob)
  with pytest.raises(DataError, match=r"source 'text': .*pip install gcsfs"):
    Source(SourceConfig("text", "gs://bucket/text-train-*.arrayrecord"))
