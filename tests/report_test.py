# SPDX-License-Identifier: Apache-2.0
"""Reports: everything asked for is drawn, text from the model stays text."""

import html.parser
import json
import math
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mm1_jax import metrics, report


class Page(html.parser.HTMLParser):
  """Collects a page's tags, the addresses it refers to, and its text."""

  def __init__(self, text: str):
    super().__init__()
    self.tags, self.addresses, self.text = [], [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.addresses += [value for name, value in attrs if name in ("src", "href")]

  def handle_data(self, data):
    self.text += data


def picture(color=(200, 30, 30)) -> np.ndarray:
  return np.full((24, 32, 3), color, np.uint8)


def write_stage(workdir, *, sources=("captions", "text"), experts=4, steps=range(1, 40)):
  with metrics.MetricWriter(workdir) as writer:
    for step in steps:
      scalars = {"loss": 5 - step / 20, "lr": 1e-4, "grad_norm/vit": 1 / step}
      scalars |= {f"loss/{source}": math.nan if step == 3 else 5 - step / 20 for source in sources}
      writer.write_scalars(step, scalars)
      if experts and step % 10 == 0:
        writer.write_tables(step, {"moe/load": np.ones((2, experts))})
    writer.write_scalars(20, {f"eval/loss/{source}": 4.5 for source in sources})


class TestLosses:
  def test_sources_of_groups_have_their_own_curves(self, tmp_path):
    write_stage(tmp_path / "run", sources=("captions/world", "captions/sample", "text"), experts=0)
    run = metrics.read_metrics(tmp_path / "run")
    figure = Figure()
    ax = figure.subplots()
    report._draw_loss(figure, ax, run)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["captions/sample", "captions/world", "text", "held out"]
    smooth = [line for line in ax.get_lines() if line.get_label() in labels[:3]]
    assert all(len(line.get_xdata()) > 30 for line in smooth)


class TestGoodput:
  def test_where_the_time_went_over_all_commands(self, tmp_path):
    lines = [
      (0, 0, {"resumed": True, "launched": 0}),
      (60, 1, {"event": "first step"}),
      (100, 10, {"event": "saved", "seconds": 10}),
      (120, 20, {"values": {"loss": 1.0}}),
      (180, 10, {"resumed": True, "launched": 150}),
      (200, 11, {"event": "first step"}),
      (200, 20, {"values": {"loss": 1.0}}),
    ]
    text = "".join(json.dumps({"time": t, "step": s, **rest}) + "\n" for t, s, rest in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    _, path = report.write_report(tmp_path / "out", {"run": tmp_path})
    page = Page(path.read_text()).text
    for part in ("15%", "3m20s", "30s (15%)", "1m50s (55%)", "10s (5%)", "20s (10%)"):
      assert part in page


class TestBenchmarks:
  def test_the_first_metric_of_each_is_drawn_with_its_error(self, tmp_path):
    write_stage(tmp_path / "run", experts=0)
    with metrics.MetricWriter(tmp_path / "run", start_step=39) as writer:
      for step, value in ((10, 0.2), (20, 0.4)):
        scalars = {"pope/f1": value, "pope/f1/standard_error": 0.1, "pope/accuracy": 0.5}
        scalars |= {"coco/cider_ptb": 100 * value, "coco/cider_ptb/standard_error": 3.0}
        writer.write_scalars(step, {f"eval_tasks/{name}": x for name, x in scalars.items()})
    run = metrics.read_metrics(tmp_path / "run")
    assert report._task_keys(run) == ["eval_tasks/pope/f1", "eval_tasks/coco/cider_ptb"]
    figure = Figure()
    report._draw_tasks(figure, figure.subplots(), run)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
      "pope/f1",
      "coco/cider_ptb",
    ]
    assert left.get_ylim()[1] < 1 < right.get_ylim()[1]
    (bars,) = left.containers
    for (low, high), value in zip(bars.lines[2][0].get_segments(), (0.2, 0.4), strict=True):
      assert (low[1], high[1]) == pytest.approx((value - 0.1, value + 0.1))
    _, page = report.write_report(tmp_path / "out", {"run": tmp_path / "run"})
    assert Page(page.read_text()).tags.count("img") == 3


class TestWriteReport:
  def test_two_stages_and_their_answers(self, tmp_path):
    write_stage(tmp_path / "a")
    write_stage(tmp_path / "b", sources=("instructions",), experts=2)
    answers = [report.Answer(picture(), "What is it?", f"thing {i}", "a red box") for i in range(9)]
    stages = {"pretrain": tmp_path / "a", "sft": tmp_path / "b"}
    png, page = report.write_report(tmp_path / "out", stages, answers)
    with Image.open(png) as image:
      assert image.size[0] > 1000
      assert np.std(np.asarray(image.convert("L"))) > 5
    parsed = Page(page.read_text())
    for text in ("pretrain", "sft", "captions", "instructions", "thing 8", "a red box", "4.500"):
      assert text in parsed.text
    assert parsed.tags.count("img") == 2 * 3 + 9

  def test_the_page_is_self_contained(self, tmp_path):
    write_stage(tmp_path / "a")
    answer = report.Answer(picture(), "?", "a", "b")
    _, page = report.write_report(tmp_path, {"pretrain": tmp_path / "a"}, [answer])
    parsed = Page(page.read_text())
    assert "script" not in parsed.tags
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)

  def test_what_the_model_says_is_only_text(self, tmp_path):
    write_stage(tmp_path / "a")
    said = "<script>alert(1)</script><img src=http://x> & $\\frac{$ \x00\x1b[31m"
    answer = report.Answer(picture(), "<b>", said, '"><i>')
    _, page = report.write_report(tmp_path, {"<u>": tmp_path / "a"}, [answer])
    text = page.read_text()
    parsed = Page(text)
    assert not {"script", "b", "i", "u"} & set(parsed.tags)
    assert parsed.tags.count("img") == 4
    assert "<script>alert(1)</script>" in parsed.text
    assert "\x00" not in text
    assert "\x1b" not in text

  @pytest.mark.parametrize("steps", [range(1, 2), range(0)], ids=["one step", "nothing"])
  def test_a_short_run_still_gives_a_report(self, tmp_path, steps):
    write_stage(tmp_path / "a", steps=steps)
    png, page = report.write_report(tmp_path, {"pretrain": tmp_path / "a"})
    assert png.exists()
    assert "pretrain" in page.read_text()

  def test_a_stage_that_never_ran(self, tmp_path):
    write_stage(tmp_path / "a")
    stages = {"pretrain": tmp_path / "a", "sft": tmp_path / "none"}
    png, _ = report.write_report(tmp_path, stages)
    assert png.exists()

  def test_dense_models_have_no_expert_panel(self, tmp_path):
    with metrics.MetricWriter(tmp_path / "a") as writer:
      writer.write_scalars(1, {"loss": 3.0})
      writer.write_scalars(2, {"loss": 2.0})
    _, page = report.write_report(tmp_path, {"pretrain": tmp_path / "a"})
    assert re.findall(r'alt="([^"]*)"', page.read_text()) == ["pretrain: loss"]

  def test_curves_of_accuracy(self, tmp_path):
    write_stage(tmp_path / "a")
    accuracy = {"pretrain": {"number": {10: 0.1, 20: 0.5}, "colour": {10: 0.9, 20: 1.0}}}
    _, page = report.write_report(tmp_path, {"pretrain": tmp_path / "a"}, accuracy=accuracy)
    assert "pretrain: answers" in page.read_text()


def test_a_grid_tells_right_from_wrong(tmp_path):
  answers = [report.Answer(picture((90, 90, 90)), "What $is$ it?", s, "7") for s in ("7", "9")]
  colors = []
  for answer in answers:
    (tmp_path / "grid.png").write_bytes(report.draw_grid([answer]))
    with Image.open(tmp_path / "grid.png") as image:
      pixels = np.asarray(image.convert("RGB"), np.int32)
    colors.append((pixels[..., 0] - pixels[..., 1]).max() > 100)
  assert colors == [False, True], "only the wrong answer is red"
