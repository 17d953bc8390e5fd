# SPDX-License-Identifier: Apache-2.0
"""One run owns a workdir: across processes, hosts, crashes and object stores."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import psutil
import pytest

from mm1_jax import distributed
from mm1_jax.train import owner
from mm1_jax.train.owner import Lock, Owner, WorkdirInUse, owning
from tests.helpers import bucket

OTHER_HOST = dataclasses.replace(Owner.me(), host="elsewhere", place="another boot", pid=7)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """All waits are shorter, in proportion."""
  monkeypatch.setattr(owner, "BEAT_SECONDS", 0.1)
  monkeypatch.setattr(owner, "STALE_SECONDS", 0.8)
  monkeypatch.setattr(owner, "SETTLE_SECONDS", 0.3)
  monkeypatch.setattr(owner, "WATCH_SECONDS", 0.05)


@pytest.fixture(params=["local", "gs"])
def workdir(request, tmp_path, monkeypatch):
  if request.param == "local":
    return str(tmp_path / "run")
  return bucket.mount(monkeypatch, tmp_path)


def file_of(tmp_path: pathlib.Path, workdir: str) -> pathlib.Path:
  return tmp_path / workdir.removeprefix("gs://") / owner.OWNER


def write(path: pathlib.Path, who: Owner, *, beats: int = 0, beat: float | None = None) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  values = dataclasses.asdict(who) | {"beats": beats, "beat": time.time() if beat is None else beat}
  path.write_text(json.dumps(values))


def test_the_second_is_refused_and_told_who_has_it(workdir, tmp_path):
  with owning(workdir):
    with pytest.raises(WorkdirInUse) as error, owning(workdir):
      pass
    for part in (str(os.getpid()), Owner.me().host, "since 20", "kill", "--workdir", owner.OWNER):
      assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert file_of(tmp_path, workdir).exists()
  assert not file_of(tmp_path, workdir).exists()
  with owning(workdir):
    pass


def test_it_is_given_back_after_an_error(workdir, tmp_path):
  with pytest.raises(ZeroDivisionError), owning(workdir):
    raise ZeroDivisionError
  assert not file_of(tmp_path, workdir).exists()


def test_of_a_killed_process_of_this_host_it_is_taken_at_once(workdir, tmp_path):
  dead = subprocess.run(
    [sys.executable, "-c", "import os; print(os.getpid())"],
    capture_output=True,
    text=True,
    check=True,
  )
  write(file_of(tmp_path, workdir), dataclasses.replace(Owner.me(), pid=int(dead.stdout)))
  begin = time.monotonic()
  with owning(workdir):
    assert time.monotonic() - begin < 0.7


def test_another_process_may_have_the_number_of_a_killed_one(workdir, tmp_path):
  me = Owner.me()
  write(file_of(tmp_path, workdir), dataclasses.replace(me, begun=me.begun - 1000, token="x"))
  with owning(workdir):
    pass


def test_a_process_of_this_host_that_stands_still_has_it(workdir, tmp_path):
  """However old its last beat is."""
  with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as sleeper:
    process = psutil.Process(sleeper.pid)
    who = dataclasses.replace(Owner.me(), pid=process.pid, begun=process.create_time())
    process.suspend()
    write(file_of(tmp_path, workdir), who, beat=0.0)
    with pytest.raises(WorkdirInUse, match=f"process {process.pid} on "), owning(workdir):
      pass
    process.kill()


def test_of_a_host_that_beats_it_is_not_taken(workdir, tmp_path):
  path, done = file_of(tmp_path, workdir), threading.Event()
  write(path, OTHER_HOST)

  def beat() -> None:
    for beats in range(1000):
      if done.wait(0.2):
        return
      new = path.with_name("new")
      write(new, OTHER_HOST, beats=beats)
      new.replace(path)

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(WorkdirInUse, match="process 7 on elsewhere"), owning(workdir):
      pass
  finally:
    done.set()
    thread.join()


@pytest.mark.parametrize("age", [0.0, -3600.0])
def test_of_a_host_that_is_gone_it_is_taken_whatever_its_clock_said(workdir, tmp_path, age):
  write(file_of(tmp_path, workdir), OTHER_HOST, beat=time.time() - age)
  begin = time.monotonic()
  with owning(workdir):
    assert time.monotonic() - begin >= 0.8
    assert json.loads(file_of(tmp_path, workdir).read_text())["pid"] == os.getpid()


def test_what_is_old_is_not_watched(workdir, tmp_path):
  write(file_of(tmp_path, workdir), OTHER_HOST, beat=time.time() - 3600)
  begin = time.monotonic()
  with owning(workdir):
    assert time.monotonic() - begin < 0.7


@pytest.mark.parametrize("text", ["", "{", '{"pid": 1}', "[]", '{"pid": "x", "beat": "y"}', "\0"])
def test_a_damaged_file_is_watched_like_a_hosts(workdir, tmp_path, text):
  path = file_of(tmp_path, workdir)
  path.parent.mkdir(parents=True)
  path.write_text(text)
  with owning(workdir):
    assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("found", [None, OTHER_HOST], ids=["free", "of a host that is gone"])
def test_of_eight_at_once_one_gets_it(workdir, tmp_path, found):
  if found:
    write(file_of(tmp_path, workdir), found, beat=0.0)
  got, refused, begin, end = [], [], threading.Barrier(8), threading.Barrier(8)

  def take() -> None:
    lock = Lock(owner.epath.Path(workdir) / owner.OWNER)
    begin.wait()
    try:
      lock.take()
      got.append(lock)
    except WorkdirInUse:
      refused.append(lock)
    finally:
      end.wait()
    lock.give_back()

  threads = [threading.Thread(target=take) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(got), len(refused)) == (1, 7)
  assert not file_of(tmp_path, workdir).exists()


def test_a_run_that_was_taken_for_dead_ends(workdir, tmp_path):
  with owning(workdir) as lock:
    lock.check()
    write(file_of(tmp_path, workdir), OTHER_HOST)
    deadline = time.monotonic() + 10
    while lock.lost is None and time.monotonic() < deadline:
      time.sleep(0.02)
    with pytest.raises(WorkdirInUse, match=r"taken .* over: process 7 on elsewhere"):
      lock.check()
  assert file_of(tmp_path, workdir).exists()  # the other's


def test_it_beats(workdir, tmp_path):
  with owning(workdir):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
      if json.loads(file_of(tmp_path, workdir).read_text() or "{}").get("beats", 0) >= 2:
        return
      time.sleep(0.02)
  pytest.fail("no beat in 10 s")


def test_a_process_that_ends_itself_gives_it_back(workdir, tmp_path):
  with owning(workdir):
    distributed._make_last_calls()
    assert not file_of(tmp_path, workdir).exists()


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(WorkdirInUse, match="cannot be written") as error, owning(tmp_path / "file"):
    pass
  assert len(str(error.value).splitlines()) == 1
