# SPDX-License-Identifier: Apache-2.0
"""Metrics: what is written is read back, FLOPs counted by hand and by the compiler, the timer."""

import dataclasses
import json
import math
import os
import types

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from tensorboardX import record_writer

from mm1_jax import metrics
from mm1_jax.config import (
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  RunConfig,
  VisionConfig,
)
from mm1_jax.models import mm1
from mm1_jax.sharding import LAYOUT, abstract_state, make_mesh

TINY = RunConfig(
  model=ModelConfig(
    vision=VisionConfig(
      image_size=(4, 4), patch_size=2, width=8, depth=3, num_heads=2, mlp_dim=16, feature_layer=-2
    ),
    connector=ConnectorConfig(token_grid=(1, 2), hidden=4, depth=1, mlp_depth=2),
    decoder=DecoderConfig(
      vocab_size=32,
      width=8,
      depth=4,
      num_heads=4,
      num_kv_heads=2,
      head_dim=4,
      mlp_dim=10,
      moe=MoEConfig(num_experts=6, every=2, top_k=2),
    ),
  ),
  data=DataConfig(seq_len=16, batch_size=3, images_per_row=2),
)


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


class Bucket(LocalFileSystem):
  """An object store, kept in a folder: objects are written once, and never grow."""

  protocol = "gs"
  cachable = False
  folder = ""

  @classmethod
  def _strip_protocol(cls, path):
    name = str(path).removeprefix("gs://").removeprefix(cls.folder).strip("/")
    return f"{cls.folder}/{name}"

  def _open(self, path, mode="rb", **kwargs):
    if "a" in mode or "+" in mode or ("w" in mode and self.exists(path)):
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
def bucket(tmp_path, monkeypatch):
  """Returns a workdir on gs://."""
  monkeypatch.setattr(Bucket, "folder", str(tmp_path))
  monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: Bucket(auto_mkdir=True))
  monkeypatch.setitem(record_writer.REGISTERED_FACTORIES, "gs", Events)
  return "gs://bucket/run"


class TestObjectStore:
  def test_each_flush_is_a_segment_that_is_written_once(self, bucket, tmp_path):
    writer = metrics.MetricWriter(bucket)
    writer.write_scalars(1, {"loss": 1})
    writer.write_tables(1, {"moe/load": np.ones((1, 2))})
    assert metrics.read_metrics(bucket) == {}
    writer.flush()
    assert metrics.read_metrics(bucket) == {"loss": {1: 1}}
    writer.flush()  # of nothing
    writer.write_scalars(2, {"loss": 2})
    writer.flush()
    writer.write_scalars(3, {"loss": 3})  # lost, as by kill -9
    with metrics.MetricWriter(bucket, start_step=1) as writer:
      writer.write_scalars(2, {"loss": 4})
    assert metrics.read_metrics(bucket) == {"loss": {1: 1, 2: 4}}
    assert list(metrics.read_tables(bucket)["moe/load"]) == [1]
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


class TestLoad:
  def test_even(self):
    assert metrics.load_scalars(np.ones((2, 8))) == {
      "moe/load_min": 1,
      "moe/load_max": 1,
      "moe/load_entropy": pytest.approx(1),
      "moe/dead_experts": 0,
    }

  def test_by_hand(self):
    """A layer of one expert, and one whose four experts have 1/2, 1/4, 1/4 and nothing."""
    load = np.array([[0, 4, 0, 0], [2, 1, 1, 0]])
    assert metrics.load_scalars(load) == {
      "moe/load_min": 0,
      "moe/load_max": 4,
      "moe/load_entropy": pytest.approx((0 + 1.5 / 2) / 2),  # bits
      "moe/dead_experts": 4,
    }

  def test_one_expert_is_even(self):
    assert metrics.load_scalars(np.ones((2, 1)))["moe/load_entropy"] == 1


class TestModelFlops:
  def test_tiny_model_by_hand(self):
    # ViT: 4 patches and the class token, 2 of 3 blocks run, 6 slots.
    vit = 2 * 4 * 12 * 8 + 2 * (8 * 5 * 64 + 4 * 25 * 8 + 4 * 5 * 8 * 16)
    # C-Abstractor: 8 -> 4 channels on 4 positions with a shortcut, 4 -> 4 on 2, 4 -> 8 -> 8.
    first = 4 * 2 * (8 * 4 + 9 * 4 + 4 * 4 + 8 * 4) + 2 * 2 * (4 * 2)
    second = 2 * 2 * (4 * 4 + 9 * 4 + 4 * 4) + 2 * 2 * (4 * 1)
    connector = first + second + 2 * 2 * (4 * 8 + 8 * 8)
    # Decoder: 2 dense and 2 sparse layers, 48 positions.
    projections = 2 * (8 * 16 + 2 * 8 * 8 + 16 * 8)
    swiglu = 3 * 2 * 8 * 10
    assert metrics.model_flops(TINY, 6) == {
      "vit": 3 * 6 * vit,
      "connector": 3 * 6 * connector,
      "decoder/dense": 3 * 48 * (4 * projections + 2 * swiglu),
      "decoder/attention": 3 * 3 * 4 * (2 * 2 * 16 * 16 * 16) // 2,
      "decoder/experts": 3 * 48 * 2 * (2 * 8 * 6 + 2 * swiglu),
      "head": 3 * 48 * 2 * 8 * 32,
      "total": sum(v for k, v in metrics.model_flops(TINY, 6).items() if k != "total"),
    }

  def test_pictures_count_and_empty_slots_do_not(self):
    assert metrics.image_slots(TINY) == 6
    full, some, none = (metrics.model_flops(TINY, num) for num in (6, 1.5, 0))
    for part in ("vit", "connector"):
      assert some[part] == full[part] / 4
      assert none[part] == 0
    assert some["decoder/dense"] == none["decoder/dense"] == full["decoder/dense"] > 0
    assert none["total"] == full["total"] - full["vit"] - full["connector"]

  @pytest.mark.parametrize(
    ("frozen", "factors"),
    [
      ((), (3, 3, 3)),
      (("vit",), (1, 3, 3)),
      (("vit", "connector"), (1, 1, 3)),
      (("vit", "decoder"), (1, 3, 2)),  # gradients pass through the decoder to the connector
      (("connector", "decoder"), (3, 2, 2)),
    ],
  )
  def test_frozen_parts(self, frozen, factors):
    trained = metrics.model_flops(TINY, 6)
    optimizer = OptimizerConfig(frozen=frozen)
    some = metrics.model_flops(dataclasses.replace(TINY, optimizer=optimizer), 6)
    names = ("vit", "connector", "head")
    assert tuple(3 * some[name] // trained[name] for name in names) == factors
    assert 3 * some["decoder/experts"] == factors[2] * trained["decoder/experts"]

  def test_dense_decoder_is_6_flops_a_parameter_and_position(self):
    run = RunConfig()  # mm1_3b: 2.7e9 parameters, of them 49152 * 3072 in the tied embedding
    flops = metrics.model_flops(run, 0)
    positions = run.data.batch_size * run.data.seq_len
    counted = flops["decoder/dense"] + flops["head"]
    assert counted == pytest.approx(6 * 2.7e9 * positions, rel=0.03)
    assert flops["decoder/experts"] == 0

  @pytest.mark.parametrize("kind", ["c_abstractor", "average_pool", "attention_pool", "mlp"])
  def test_images_agree_with_the_compilers_count(self, kind):
    tokens = (9, 9) if kind == "mlp" else (4, 4)
    run = RunConfig(
      model=ModelConfig(
        vision=VisionConfig(
          image_size=(126, 126), width=512, depth=2, num_heads=8, mlp_dim=2048, patch_size=14
        ),
        connector=ConnectorConfig(kind=kind, token_grid=tokens, hidden=768, depth=2),
        decoder=DecoderConfig(width=512, depth=1, num_heads=4, num_kv_heads=2, vocab_size=64),
        dtype="float32",
        scan=False,
        remat="none",
      ),
      data=DataConfig(batch_size=8, images_per_row=1, seq_len=128),
    )
    with jax.set_mesh(make_mesh(run)):
      model = jax.eval_shape(lambda key: mm1.MM1(key, run.model), jax.random.key(0))
      images = jax.ShapeDtypeStruct((8, 1, 126, 126, 3), jnp.uint8)
      lowered = jax.jit(mm1.MM1.embed_image).lower(model, images)
    forward = metrics.model_flops(run, 8)
    ours = (forward["vit"] + forward["connector"]) / 3
    assert ours == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)

  def test_training_the_decoder_agrees_with_the_compilers_count(self):
    run = RunConfig(
      model=ModelConfig(
        connector=ConnectorConfig(token_grid=(4, 4)),
        decoder=DecoderConfig(width=512, depth=2, num_heads=8, num_kv_heads=2, vocab_size=2048),
        dtype="float32",
        scan=False,
        remat="none",
      ),
      # No whole parts of rows, see `models.blocked`: they leave out what this counts.
      data=DataConfig(batch_size=8, images_per_row=0, seq_len=510),
    )

    def loss(model, x, ids):
      hidden = model.decoder(x, ids, ids).hidden
      return jnp.sum(model.decoder.logits(hidden))

    # Compiled: before that, XLA counts nothing within a `shard_map`.
    mesh = make_mesh(run, jax.devices()[:1])
    with jax.set_mesh(mesh):
      model = abstract_state(lambda: mm1.MM1(jax.random.key(0), run.model), mesh)
      x = jax.ShapeDtypeStruct((8, 510, 512), jnp.float32, sharding=LAYOUT.act_b)
      ids = jax.ShapeDtypeStruct((8, 510), jnp.int32, sharding=LAYOUT.act_b)
      lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(model, x, ids)
      options = {"xla_backend_optimization_level": 0}  # quick to compile
      counted = lowered.compile(compiler_options=options).cost_analysis()["flops"]
    ours = metrics.model_flops(run, 0)
    whole_square = ours["total"] + ours["decoder/attention"]  # it does not see the causal half
    assert whole_square == pytest.approx(counted, rel=0.05)

  def test_linear_connector_is_one_matmul(self):
    connector = ConnectorConfig(kind="linear", token_grid=(2, 2))
    model = dataclasses.replace(TINY.model, connector=connector)
    flops = metrics.model_flops(dataclasses.replace(TINY, model=model), 6)
    assert flops["connector"] == 3 * 6 * (2 * 4 * 8 * 8)


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
