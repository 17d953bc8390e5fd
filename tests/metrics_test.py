# SPDX-License-Identifier: Apache-2.0
"""Metrics: what is written is read back, the timer."""

import errno
import json
import math
import os
import re
import resource
import signal
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX import event_file_writer, record_writer

from mm1_jax import metrics
from tests.helpers import bucket


class TestWriter:
  def test_reads_back_what_was_written(self, tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
      writer.write_scalars(1, {"loss": 2.5, "lr": np.float32(0.5)})
      writer.write_scalars(2, {"loss": jnp.float32(2.0)})
      writer.write_scalars(2, {"eval/loss/text": 3.0})
      writer.write_texts(2, {"answer": "<b>a cat</b>"})
      writer.write_images(2, {"batch": np.zeros((4, 5, 3), np.uint8)})
    assert metrics.read_metrics(tmp_path) == {
      "loss": {1: 2.5, 2: 2.0},
      "lr": {1: 0.5},
      "eval/loss/text": {2: 3.0},
    }
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))

  def test_lines_are_there_before_close(self, tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    writer.write_scalars(1, {"loss": 2.5})
    assert metrics.read_metrics(tmp_path) == {"loss": {1: 2.5}}
    writer.close()
    writer.close()

  def test_every_line_is_json_even_with_nan(self, tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
      writer.write_scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant):
      raise AssertionError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
      json.loads(line, parse_constant=refuse)
    values = metrics.read_metrics(tmp_path)
    assert math.isnan(values["a"][1])
    assert (values["b"][1], values["c"][1]) == (math.inf, -math.inf)

  def test_resuming_hides_what_came_after_the_checkpoint(self, tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
      for step in (10, 20, 30):
        writer.write_scalars(step, {"loss": step, "eval": step})
    with metrics.MetricWriter(tmp_path, start_step=20) as writer:
      writer.write_scalars(25, {"loss": 1})
    assert metrics.read_metrics(tmp_path) == {
      "loss": {10: 10, 20: 20, 25: 1},
      "eval": {10: 10, 20: 20},
    }

  def test_the_last_value_of_a_step_counts(self, tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
      writer.write_scalars(1, {"loss": 1})
      writer.write_scalars(1, {"loss": 2})
    assert metrics.read_metrics(tmp_path) == {"loss": {1: 2}}

  def test_a_line_cut_off_by_a_crash_is_left_out(self, tmp_path, caplog):
    with metrics.MetricWriter(tmp_path) as writer:
      writer.write_scalars(1, {"loss": 1})
    with (tmp_path / "metrics.jsonl").open("a") as f:
      f.write('{"step": 2, "val')
    with metrics.MetricWriter(tmp_path, start_step=1) as writer:
      writer.write_scalars(2, {"loss": 3})
    assert metrics.read_metrics(tmp_path) == {"loss": {1: 1, 2: 3}}
    assert "metrics.jsonl:3" in caplog.text

  def test_tables_are_read_back_by_steps(self, tmp_path):
    tables = np.random.default_rng(0).random((3, 2, 4))
    with metrics.MetricWriter(tmp_path) as writer:
      for step, table in zip((10, 20, 30), tables, strict=True):
        writer.write_tables(step, {"moe/load": table})
      writer.write_scalars(30, {"loss": 1})
    with metrics.MetricWriter(tmp_path, start_step=20):
      pass
    read = metrics.read_tables(tmp_path)["moe/load"]
    assert list(read) == [10, 20]
    np.testing.assert_allclose(list(read.values()), tables[:2], rtol=1e-4)
    assert metrics.read_metrics(tmp_path) == {}

  def test_only_process_0_writes(self, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.MetricWriter(tmp_path) as writer:
      writer.write_scalars(1, {"loss": 1})
      writer.write_images(1, {"batch": np.zeros((4, 5, 3), np.uint8)})
      writer.write_texts(1, {"a": "b"})
      writer.flush()
    assert list(tmp_path.iterdir()) == []

  def test_a_workdir_without_metrics_is_empty(self, tmp_path):
    assert metrics.read_metrics(tmp_path / "nothing") == {}


class Bucket(bucket.Bucket):
  """Whose objects are written once."""

  def _open(self, path, mode="rb", **kwargs):
    if "w" in mode and self.exists(path):
      raise OSError(f"{path}: mode {mode!r} of an object that is there")
    return super()._open(path, mode, **kwargs)


class Events:
  """TensorBoard's own files on gs:// need a client of Google's; here they are local."""

  @staticmethod
  def open(path):
    return open(Bucket._strip_protocol(path), "wb")

  @staticmethod
  def directory_check(path):
    os.makedirs(Bucket._strip_protocol(path), exist_ok=True)


@pytest.fixture
def on_gs(tmp_path, monkeypatch):
  """Returns a workdir on gs://."""
  monkeypatch.setitem(record_writer.REGISTERED_FACTORIES, "gs", Events)
  return bucket.mount(monkeypatch, tmp_path, Bucket)


class TestObjectStore:
  def test_each_flush_is_a_segment_that_is_written_once(self, on_gs, tmp_path):
    writer = metrics.MetricWriter(on_gs)
    writer.write_scalars(1, {"loss": 1})
    writer.write_tables(1, {"moe/load": np.ones((1, 2))})
    assert metrics.read_metrics(on_gs) == {}
    writer.flush()
    assert metrics.read_metrics(on_gs) == {"loss": {1: 1}}
    writer.flush()  # of nothing
    writer.write_scalars(2, {"loss": 2})
    writer.flush()
    writer.write_scalars(3, {"loss": 3})  # lost, as by kill -9
    with metrics.MetricWriter(on_gs, start_step=1) as writer:
      writer.write_scalars(2, {"loss": 4})
    assert metrics.read_metrics(on_gs) == {"loss": {1: 1, 2: 4}}
    assert list(metrics.read_tables(on_gs)["moe/load"]) == [1]
    names = sorted(path.name for path in (tmp_path / "bucket" / "run" / "metrics").iterdir())
    assert names == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]

  def test_a_file_that_is_there_is_older_than_all_segments(self, tmp_path, monkeypatch):
    """A workdir that goes to an object store and comes back."""
    with metrics.MetricWriter(tmp_path) as writer:
      writer.write_scalars(1, {"loss": 1})
      writer.write_scalars(2, {"loss": 2})
    with monkeypatch.context() as store:
      store.setattr(metrics, "can_append", lambda _: False)
      with metrics.MetricWriter(tmp_path, start_step=1) as writer:
        for step in (2, 3):
          writer.write_scalars(step, {"loss": 10 * step})
          writer.flush()
    writer = metrics.MetricWriter(tmp_path, start_step=2)
    writer.write_scalars(3, {"loss": 300})
    assert metrics.read_metrics(tmp_path) == {"loss": {1: 1, 2: 20, 3: 300}}
    writer.flush()
    writer.write_scalars(4, {"loss": 400})
    assert metrics.read_metrics(tmp_path) == {"loss": {1: 1, 2: 20, 3: 300, 4: 400}}
    writer.close()


FULL = OSError(errno.ENOSPC, "No space left on device")


class TestFaults:
  """A disk that is full or does not answer ends no run and holds none up."""

  @pytest.fixture
  def told(self, caplog):
    return lambda: [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

  def write_many(self, writer, steps: range) -> None:
    for step in steps:
      writer.write_scalars(step, {f"s{i}": 1.0 for i in range(20)})

  def test_a_board_whose_disk_is_full(self, tmp_path, monkeypatch, told):
    """A thread of the board's own library would die, and the tenth write after it never end."""

    class Full:
      def write(self, data):
        raise FULL

      flush = close = lambda self: None

    opened = event_file_writer.EventsWriter.__init__

    def fill(writer, *args):
      opened(writer, *args)
      writer._py_recordio_writer._writer = Full()

    monkeypatch.setattr(event_file_writer.EventsWriter, "__init__", fill)
    with metrics.MetricWriter(tmp_path) as writer:
      self.write_many(writer, range(1, 101))
      writer.flush()
    assert list(metrics.read_metrics(tmp_path)["s0"]) == [*range(1, 101)]
    first, last = told()
    assert "lack entries (OSError: [Errno 28] No space left on device)" in first
    assert "lack about 1999 entries" in last

  def test_a_board_whose_folder_cannot_be_made(self, tmp_path, told):
    (tmp_path / "tensorboard").write_text("a file")
    with metrics.MetricWriter(tmp_path) as writer:
      self.write_many(writer, range(1, 3))
    assert list(metrics.read_metrics(tmp_path)["s0"]) == [1, 2]
    assert "lack entries (NotADirectoryError: " in told()[0]

  def test_a_board_whose_disk_does_not_answer(self, tmp_path, monkeypatch, told):
    answers = threading.Event()
    monkeypatch.setattr(
      event_file_writer.EventsWriter, "write_event", lambda *_: answers.wait(60) and None
    )
    monkeypatch.setattr(metrics, "BOARD_CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(metrics, "BOARD_EVENTS", 50)
    with metrics.MetricWriter(tmp_path) as writer:
      self.write_many(writer, range(1, 101))
      writer.flush()
    assert list(metrics.read_metrics(tmp_path)["s0"]) == [*range(1, 101)]
    first, last = told()
    assert "lack entries (its disk does not answer)" in first
    assert re.search(r"lack about (19\d\d|2000) entries", last)
    answers.set()

  def test_what_cannot_be_drawn_is_left_out_alone(self, tmp_path, told):
    with metrics.MetricWriter(tmp_path) as writer:
      writer.write_tables(1, {"moe/load": np.full((1, 2), np.nan)})
      writer.write_scalars(2, {"loss": 1})
    assert told() == [f"TensorBoard's files in {tmp_path / 'tensorboard'} lack about 1 entries"]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()

  def test_lines_wait_for_room(self, tmp_path, told):
    """On a real file system that fills up: none is lost, and a part of one does no harm."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else it ends the process
    try:
      with metrics.MetricWriter(tmp_path) as writer:
        self.write_many(writer, range(1, 11))
        size = (tmp_path / metrics.FILE).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limit[1]))
        self.write_many(writer, range(11, 21))
        assert (tmp_path / metrics.FILE).stat().st_size == size + 100
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        self.write_many(writer, range(21, 31))
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limit)
      signal.signal(signal.SIGXFSZ, before)
    assert list(metrics.read_metrics(tmp_path)["s0"]) == [*range(1, 31)]
    (said,) = [text for text in told() if text.startswith("metrics wait")]
    assert "File too large" in said

  def test_what_waits_is_bounded_and_told(self, tmp_path, monkeypatch, told):
    monkeypatch.setattr(metrics, "HELD_BYTES", 5000)
    with metrics.MetricWriter(tmp_path) as writer:
      self.write_many(writer, range(1, 3))
      writer._path = tmp_path / "gone" / metrics.FILE
      self.write_many(writer, range(3, 100))
      assert len(writer._pending) < 6000
    assert list(metrics.read_metrics(tmp_path)["s0"]) == [1, 2]
    assert "97 lines of metrics could not be written" in told()[-1]


class TestEvents:
  def test_those_of_a_step_that_count(self, tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
      for step in (5, 10):
        writer.write_event(step, "evaluated", name="a", seconds=1.0)
    with metrics.MetricWriter(tmp_path, start_step=5) as writer:
      names = lambda step: [e["name"] for e in metrics.read_events(tmp_path, step)]
      assert names(5) == ["a"]
      assert names(10) == []  # taken back
      writer.write_event(10, "evaluated", name="b", seconds=1.0)
      assert names(10) == ["b"]


class TestLoad:
  def test_even(self):
    assert metrics.load_scalars(np.ones((2, 8))) == {
      "moe/load_min": 1,
      "moe/load_max": 1,
      "moe/load_entropy": pytest.approx(1),
      "moe/dead_experts": 0,
    }

  def test_by_hand(self):
    """A layer of one expert, and one of four experts with 1/2, 1/4, 1/4 and nothing."""
    load = np.array([[0, 4, 0, 0], [2, 1, 1, 0]])
    assert metrics.load_scalars(load) == {
      "moe/load_min": 0,
      "moe/load_max": 4,
      "moe/load_entropy": pytest.approx((0 + 1.5 / 2) / 2),  # bits
      "moe/dead_experts": 4,
    }

  def test_one_expert_is_even(self):
    assert metrics.load_scalars(np.ones((2, 1)))["moe/load_entropy"] == 1


class TestMfu:
  def test_known_kinds(self):
    chips = [types.SimpleNamespace(device_kind="TPU v5p")] * 4
    assert metrics.mfu(4 * 459e12, 2.0, chips) == pytest.approx(0.5)

  def test_unknown_kinds_have_none(self):
    assert metrics.mfu(1e12, 1.0) is None  # CPU


class TestTimer:
  def timer(self, **kwargs):
    self.now = 0.0
    return metrics.StepTimer(clock=lambda: self.now, **kwargs)

  def tick(self, timer, seconds, **kwargs):
    self.now += seconds
    timer.tick(**kwargs)

  def test_the_first_step_is_not_in_the_rate(self):
    timer = self.timer()
    assert timer.rates is None
    self.tick(timer, 90.0, tokens=1000)
    assert timer.rates is None
    self.tick(timer, 2.0, tokens=1000, images=8, data_wait=0.5)
    assert timer.rates == metrics.Rates(2.0, 500.0, 4.0, 0.25, None)

  def test_the_window_moves(self):
    timer = self.timer(window=2)
    for seconds in (1, 9, 3, 1):
      self.tick(timer, seconds, tokens=10)
    assert timer.rates is not None
    assert timer.rates.step_seconds == 2.0
    assert timer.rates.tokens_per_second == 5.0

  def test_excluded_time_does_not_count(self):
    timer = self.timer()
    self.tick(timer, 1.0)
    with timer.excluded():
      self.now += 60.0
    self.tick(timer, 1.0)
    assert timer.rates is not None
    assert timer.rates.step_seconds == 1.0

  def test_mfu_comes_with_known_devices(self):
    """Of the pictures that the window's steps had, on average."""
    chips = [types.SimpleNamespace(device_kind="TPU v5")]
    timer = self.timer(flops=lambda images: 459e12 * (1 + images / 8), devices=chips)
    self.tick(timer, 1.0, images=1000)
    self.tick(timer, 4.0, images=4)
    assert timer.rates is not None
    assert timer.rates.mfu == pytest.approx(1.5 / 4)
    self.tick(timer, 4.0, images=0)
    assert timer.rates.mfu == pytest.approx(1.25 / 4)
    assert timer.rates.scalars()["speed/mfu"] == pytest.approx(1.25 / 4)

  def test_scalars_leave_out_the_unknown(self):
    assert "speed/mfu" not in metrics.Rates(2.0, 500.0, 4.0, 0.25, None).scalars()


class TestProgressLine:
  def test_all_of_it(self):
    scalars = {"loss": 5.1234, "lr": 2.1e-4, "grad_norm": 0.912, "skipped": 0}
    rates = metrics.Rates(0.516, 15700.0, 61.2, 0.03, None)
    assert metrics.progress_line(40, 300, scalars, rates) == (
      "step    40/300 (13%) | loss 5.123 | lr 2.1e-04 | grad 0.91 | 0.52 s/step | 15.7k tok/s | "
      "61.2 img/s | MFU - | data wait 3% | skipped 0 | ETA 2m14s"
    )

  def test_before_the_first_rate(self):
    line = metrics.progress_line(1, 300, {"loss": math.nan}, None)
    assert line == "step     1/300 (0%) | loss nan | first step"

  def test_what_start_and_save_took(self):
    scalars = {"speed/start_seconds": 134.0, "speed/compile_seconds": 81.0}
    line = metrics.progress_line(1, 300, scalars, None)
    assert line == "step     1/300 (0%) | first step | start 2m14s, of it compiling 1m21s"
    line = metrics.progress_line(9, 300, {"speed/save_seconds": 0.456}, None)
    assert line == "step     9/300 (3%) | first step | save 0.46 s"

  @pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.7, "1m00s"), (134, "2m14s"), (11100, "3h05m"), (1e6, "11d13h")],
  )
  def test_durations(self, seconds, text):
    assert metrics.format_seconds(seconds) == text


def test_peak_memory_is_this_process_on_a_cpu():
  assert 0.05 < metrics.peak_memory_gib() < 1000
