# SPDX-License-Identifier: Apache-2.0
"""A killed build continues where it was; workers change nothing; other flags are refused."""

import gzip
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mm1_jax.config import ConfigError, SourceConfig
from mm1_jax.data.build.__main__ import main
from mm1_jax.data.build.raw_sample import read, write_webdataset
from mm1_jax.data.sources import DataError, Source

NUM_ROWS = 60


def write_rows(path: pathlib.Path, start: int = 0, num: int = NUM_ROWS) -> None:
  rows = [{"text": f"row {start + i}"} for i in range(num)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def flags(tmp_path):
  write_rows(tmp_path / "a.jsonl")
  return ["text", f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/out", "--rows_per_shard=10"]


def shards(prefix: pathlib.Path) -> dict[str, tuple[str, int]]:
  """Hash and time of the shards by name."""
  return {
    path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
    for path in sorted(prefix.parent.glob(f"{prefix.name}-*.arrayrecord"))
  }


def hashes(prefix: pathlib.Path) -> dict[str, str]:
  return {name: found[0] for name, found in shards(prefix).items()}


def test_finished_shards_are_left_alone(flags, tmp_path):
  """Also after a crash between a shard and its sidecar, and in the middle of a shard."""
  main(flags)
  prefix = tmp_path / "out"
  before, manifest = shards(prefix), (tmp_path / "out-manifest.json").read_bytes()
  assert len(before) == 6
  main(flags)
  assert shards(prefix) == before
  (tmp_path / "out.build" / "00002-of-00006.json").unlink()
  os.truncate(tmp_path / "out-00004-of-00006.arrayrecord", 5)
  (tmp_path / "out.build" / "00004-of-00006.json").unlink()
  (tmp_path / "out-00005-of-00006.arrayrecord").unlink()
  os.truncate(tmp_path / "out-00001-of-00006.arrayrecord", 70_000)
  (tmp_path / "out.build" / ".tmp-left").write_bytes(b"half a shard")
  main(flags)
  after = shards(prefix)
  assert hashes(prefix) == {name: found[0] for name, found in before.items()}
  same = [name for name in before if after[name] == before[name]]
  assert [name.split("-")[1] for name in same] == ["00000", "00003"]
  assert (tmp_path / "out-manifest.json").read_bytes() == manifest
  assert not list((tmp_path / "out.build").glob(".tmp*"))


def test_a_flipped_bit_of_a_finished_shard_is_seen(flags, tmp_path, caplog):
  """The size is the same, and it would be read without an error at most places."""
  main(flags)
  before = shards(tmp_path / "out")
  shard = tmp_path / "out-00003-of-00006.arrayrecord"
  data = bytearray(shard.read_bytes())
  data[len(data) // 2] ^= 1
  shard.write_bytes(data)
  main(flags)
  assert hashes(tmp_path / "out") == {name: found[0] for name, found in before.items()}
  assert f"{shard} is not what was built: its sha256 differs: it is built again" in caplog.text
  after = shards(tmp_path / "out")
  assert [name for name in before if after[name] != before[name]] == [shard.name]


def test_other_flags_or_inputs_are_refused(flags, tmp_path):
  main(flags)
  before = shards(tmp_path / "out")
  with pytest.raises(DataError, match=r"out-00000-of.* was built with --max_chars=10000000, and n"):
    main([*flags, "--max_chars=7"])
  os.utime(tmp_path / "a.jsonl", (1, 1))
  with pytest.raises(DataError, match=r"built from other input than .*a\.jsonl now is"):
    main(flags)
  write_rows(tmp_path / "b.jsonl", start=100)
  with pytest.raises(DataError, match=r"out-00000-of-00006\.arrayrecord is none of the 12 shards"):
    main(flags)
  assert shards(tmp_path / "out") == before
  main([*flags, "--overwrite"])
  assert len(shards(tmp_path / "out")) == 12
  main(flags)  # and is now what these flags mean


def test_an_overwrite_that_is_killed(flags, tmp_path, monkeypatch):
  """Killed after a new shard, before its sidecar: the old sidecar does not count for it."""
  from mm1_jax.data.build import shards as module

  main(flags)
  before = hashes(tmp_path / "out")
  with monkeypatch.context() as patch:
    patch.setattr(module, "sidecar_path", lambda *_: f"{tmp_path}/gone/sidecar.json")
    with pytest.raises(Exception, match="gone"):
      main([*flags, "--source=another", "--overwrite"])
  halfway = hashes(tmp_path / "out")
  assert halfway != before
  sizes = {path.stat().st_size for path in tmp_path.glob("out-*.arrayrecord")}
  assert len(sizes) == 1
  main(flags)
  assert hashes(tmp_path / "out") == before


def test_prefixes_that_begin_alike(flags, tmp_path, capsys):
  main([flag.replace("/out", "/out-more") for flag in flags])
  before = shards(tmp_path / "out-more")
  main([*flags, "--overwrite", "--rows_per_shard=30"])
  assert shards(tmp_path / "out-more") == before
  path = f"{tmp_path}/out-?????-of-?????.arrayrecord"
  assert f".path='{path}'" in capsys.readouterr().out
  assert len(Source(SourceConfig("out", path))) == NUM_ROWS


def test_same_input_same_bytes(flags, tmp_path):
  with (tmp_path / "a.jsonl").open("a") as file:
    file.write("{\n")
  main(flags)
  main([flag.replace("/out", "/again") for flag in flags])
  again = {n.replace("again", "out"): h for n, h in hashes(tmp_path / "again").items()}
  assert again == hashes(tmp_path / "out")
  dead = (tmp_path / "out-dead.jsonl.gz").read_bytes()
  assert dead == (tmp_path / "again-dead.jsonl.gz").read_bytes()
  assert dead[4:8] == bytes(4)  # gzip's time


def test_nothing_left_and_too_much_bad(flags, tmp_path, capsys):
  with (tmp_path / "a.jsonl").open("a") as file:
    file.write("{\n" * 40)
  with pytest.raises(DataError, match=r"40 of 100 rows cannot be used, more than .*=0\.3 allows"):
    main([*flags, "--max_bad_fraction=0.3"])
  assert json.loads((tmp_path / "out-manifest.json").read_text())["bad"] == {"not JSON": 40}
  assert "bad                       40  not JSON" in capsys.readouterr().out
  main([*flags, "--max_bad_fraction=0.4"])  # without a shard being built again
  with pytest.raises(DataError, match=r"none of 100 rows is left: bad .* filtered .*text too long"):
    main([*flags, "--max_chars=2", "--overwrite"])


def test_unknown_flags_and_no_store(flags, tmp_path):
  with pytest.raises(ConfigError, match="--max_chrs=5 is a flag neither of this format nor of Be"):
    main([*flags, "--max_chrs=5"])
  with pytest.raises(ConfigError, match="stray is a flag neither"):
    main([*flags, "stray"])
  main([*flags, "--direct_num_workers", "1"])  # Beam's, in two words
  rest = [f"--input={tmp_path}/a.jsonl", f"--images={tmp_path}/none", f"--output={tmp_path}/l"]
  with pytest.raises(DataError, match=r"--images=.*/none is no folder"):
    main(["llava", *rest])
  with pytest.raises(DataError, match=r"tokenizer.*cannot be read"):
    main([*flags, "--tokenizer=none.model"])


def run(*args: str, **options) -> subprocess.Popen:
  command = [sys.executable, "-m", "mm1_jax.data.build", *args]
  return subprocess.Popen(command, text=True, stdout=-1, stderr=-1, **options)


def test_the_command(flags, tmp_path):
  """--help needs no Beam; without Beam there is one line; a mistake is one line too."""
  (tmp_path / "no_beam" / "apache_beam").mkdir(parents=True)
  (tmp_path / "no_beam" / "apache_beam" / "__init__.py").write_text("raise ImportError")
  path = {**os.environ, "PYTHONPATH": f"{tmp_path}/no_beam:{os.getcwd()}"}
  helped = run("--help", env=path)
  wrong = run(*flags[:1], f"--input={tmp_path}/none", f"--output={tmp_path}/out")
  out, _ = helped.communicate(timeout=600)
  assert helped.returncode == 0
  for format in ("webdataset", "coco", "llava", "obelics", "mmc4", "text", "tfds"):
    assert f"python -m mm1_jax.data.build {format} --input=" in out
  _, err = wrong.communicate(timeout=600)
  assert wrong.returncode == 1
  assert err.startswith("error: --input=")
  assert err.count("\n") == 1


@pytest.mark.slow
def test_workers_change_nothing(flags, tmp_path):
  main(flags)
  parallel = [flag.replace("/out", "/two") for flag in flags]
  process = run(*parallel, "--direct_num_workers=2", "--direct_running_mode=multi_processing")
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  assert "kept                      60" in out
  assert list(hashes(tmp_path / "two").values()) == list(hashes(tmp_path / "out").values())
  manifests = [json.loads((tmp_path / f"{n}-manifest.json").read_text()) for n in ("out", "two")]
  for manifest in manifests:
    for shard in manifest["shards"]:
      del shard["file"]
  assert manifests[0] == manifests[1]


@pytest.mark.slow
def test_killed_in_the_middle(tmp_path):
  """kill -9 once shards are there: they stay, the others are built, all is as without the kill."""
  write_webdataset(tmp_path / "raw", read("captions", 1500))
  flags = ["webdataset", f"--input={tmp_path}/raw/*.tar", "--max_aspect=5"]
  process = run(*flags, f"--output={tmp_path}/killed/out")
  deadline = time.time() + 600
  while len(shards(tmp_path / "killed" / "out")) < 10:
    assert process.poll() is None, process.communicate()
    assert time.time() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  before = shards(tmp_path / "killed" / "out")
  done = {p.stem for p in (tmp_path / "killed" / "out.build").glob("*-of-*.json")}
  assert 9 <= len(done) < 60
  for prefix in ("killed", "whole"):
    again = run(*flags, f"--output={tmp_path}/{prefix}/out")
    _, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
  after = shards(tmp_path / "killed" / "out")
  for name in before:
    if name.removeprefix("out-").removesuffix(".arrayrecord") in done:
      assert after[name] == before[name]
  assert hashes(tmp_path / "killed" / "out") == hashes(tmp_path / "whole" / "out")
  manifests = [(tmp_path / p / "out-manifest.json").read_bytes() for p in ("killed", "whole")]
  assert manifests[0] == manifests[1]


@pytest.mark.long
def test_memory_is_bounded(tmp_path):
  """250 MB of rows in one gzipped file, one of them of 10 MB: far less is held."""
  line = json.dumps({"text": "word " * 20_000}) + "\n"
  with gzip.open(tmp_path / "a.jsonl.gz", "wt", compresslevel=1) as file:
    for i in range(2500):
      file.write(line.replace("word", f"w{i}"))
    file.write(json.dumps({"text": "x" * 10_000_000}) + "\n")
  (tmp_path / "small.jsonl").write_text(line)

  def peak(pattern: str) -> int:
    process = run("text", f"--input={tmp_path}/{pattern}", f"--output={tmp_path}/{pattern}.out")
    most = 0
    while process.poll() is None:
      try:
        most = max(most, psutil.Process(process.pid).memory_info().rss)
      except psutil.Error:
        break
      time.sleep(0.02)
    assert process.wait() == 0, process.communicate()
    return most

  more = peak("a.jsonl.gz") - peak("small.jsonl")
  assert more < 100e6, f"{more / 1e6:.0f} MB more than for one row"
