# SPDX-License-Identifier: Apache-2.0
"""Inspecting data: the figures are right, every mistake in a batch is seen, texts stay texts."""

import html.parser
import json
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from mm1_jax.batch import Batch
from mm1_jax.config import (
  ConfigError,
  ConnectorConfig,
  ModelConfig,
  ReweightConfig,
  RunConfig,
  SourceConfig,
  TilingConfig,
  VisionConfig,
)
from mm1_jax.data import inspect
from mm1_jax.data.examples import Encoder
from mm1_jax.data.inspect import facts, picture, stream
from tests.helpers.records import SAMPLE, conversation, document

pytestmark = pytest.mark.compiles

ROOT = pathlib.Path(__file__).parents[2]
IMAGE_ID = 4


class Page(html.parser.HTMLParser):
  """Collects a page's tags, the addresses it refers to, and its text."""

  def __init__(self, path):
    super().__init__()
    self.source = path.read_text()
    self.tags, self.addresses, self.text = [], [], ""
    self.feed(self.source)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.addresses += [value for name, value in attrs if name in ("src", "href")]

  def handle_data(self, data):
    self.text += data


@pytest.fixture
def make_run(sample_data):
  """Makes a run of 16-pixel pictures that take four positions, and their delimiters two."""

  def make(*sources: SourceConfig, **changes) -> RunConfig:
    data = sample_data(**changes, **({"sources": sources} if sources else {}))
    vision = VisionConfig(image_size=(16, 16), patch_size=4, position_grid=(4, 4))
    connector = ConnectorConfig(token_grid=(2, 2))
    return RunConfig(name="tiny", model=ModelConfig(vision=vision, connector=connector), data=data)

  return make


# --- figures


@pytest.fixture
def literal(make_run, write, jpeg):
  """Every row: a caption of 8 positions, a text of 3, and one position of padding."""
  caption = [jpeg(50), "a"]  # <s> <image_start> 4 x <image> <image_end> a </s>
  text = ["a b"]  # <s> a b </s>
  return make_run(
    write("captions", [caption], weight=8.0),
    write("text", [text], weight=3.0),
    **{"seq_len": 12, "batch_size": 2, "images_per_row": 1, "window_rows": 4},
  )


def test_figures_by_hand(literal, tmp_path):
  drawing = inspect.draw_stream(literal, tmp_path, num_batches=3, num_rows=2)
  found = drawing.facts
  assert found["rows"] == 6
  assert found["positions"] == {
    "all": 72,
    "filled": 66,
    "filled_fraction": pytest.approx(11 / 12),
    "trained": 6 * (2 + 3),  # `a` and `</s>`; `a`, `b` and `</s>`
  }
  assert found["image_slots"] == {"all": 6, "used": 6, "used_fraction": 1.0}
  assert found["planned"] == {
    "rows": 6,
    "filled_fraction": pytest.approx(11 / 12),
    "used_fraction": 1.0,
  }
  assert found["segments_per_row"] == {"2": 6}
  assert found["sources"]["captions"] == {
    "asked_fraction": pytest.approx(8 / 11),
    "planned_fraction": pytest.approx(8 / 11),
    "asked_examples_fraction": pytest.approx(1 / 2),  # shares of positions, by lengths of 8 and 3
    "planned_examples_fraction": pytest.approx(1 / 2),
    "positions_fraction": pytest.approx(8 / 11),
    "positions": 48,
    "trained": 12,
    "pictures": 6,
    "segments": 6,
    "parts": 0,
    "lengths": {"min": 8, "median": 8, "max": 8},
    "dropped": {},
    "left_out_of_index": {},
  }
  assert drawing.failed == []
  never = [check["name"] for check in found["checks"] if not check["tested"]]
  assert never == ["empty slots are blank"]
  assert json.loads(drawing.figures.read_text()) == found
  page = Page(drawing.page)
  for text in ("91.7%", "100.0%", "72.7%", "27.3%", "All 15 checks passed", "step 2, row 1"):
    assert text in page.text


def test_what_is_dropped_and_cut_is_counted(make_run, write, jpeg, tmp_path):
  """One caption of two has no picture; a text of 30 positions is cut over rows of 8."""
  run = make_run(
    write("captions", [[b"no picture", "a"], [jpeg(50), "a"]], weight=8.0),
    write("text", [["a" + " b" * 28]], weight=8.0),
    write("chat", [conversation("1", ["a b" * 9], ["a"]), conversation("2", ["a"], ["b"])]),
    **{"seq_len": 14, "batch_size": 2, "images_per_row": 1, "window_rows": 8},
  )
  drawing = inspect.draw_stream(run, tmp_path, num_batches=8, num_rows=2)
  sources = drawing.facts["sources"]
  drops = sources["captions"]["dropped"]
  assert list(drops) == ["unreadable image"]
  assert drops["unreadable image"] + sources["captions"]["pictures"] >= 6
  assert sources["captions"]["segments"] == sources["captions"]["pictures"]
  assert sources["text"]["parts"] == sources["text"]["segments"] > 0
  assert sources["chat"]["left_out_of_index"] == {"conversation longer than the row": 1}
  assert drawing.failed == []
  page = Page(drawing.page)
  for text in ("unreadable image", "conversation longer than the row", "of its 30"):
    assert text in page.text


def test_groups_and_shares_that_change(make_run, tmp_path):
  def source(name: str, weight: float) -> SourceConfig:
    return SourceConfig(name, str(SAMPLE / "captions-heldout-*.arrayrecord"), weight)

  captions = SourceConfig("captions", weight=0.5, sources=(source("web", 3), source("vecap", 1)))
  change = ReweightConfig(step=2, weights=(("captions", 0.25), ("text", 0.75)))
  run = make_run(captions, source("text", 0.5), reweight=(change,), window_rows=8, seq_len=256)
  drawing = inspect.draw_stream(run, tmp_path, num_batches=4, num_rows=2)
  asked = {name: of["asked_fraction"] for name, of in drawing.facts["sources"].items()}
  assert asked == pytest.approx({"captions/web": 0.28125, "captions/vecap": 0.09375, "text": 0.625})
  assert drawing.failed == []
  page = inspect.draw_source(run, tmp_path, "captions/web", num_records=2).page
  assert page.name == "source-captions-web.html"


def test_weights_of_examples_are_shown_as_both_shares(make_run, write, jpeg, tmp_path):
  """Three captions of 8 positions to one text of 3, though there are as many of each."""
  run = make_run(
    write("captions", [[jpeg(50), "a"]] * 2, weight=0.75),
    write("text", [["a b"]] * 2, weight=0.25),
    **{"seq_len": 27, "batch_size": 2, "images_per_row": 3, "window_rows": 8},
    weight_by="examples",
  )
  drawing = inspect.draw_stream(run, tmp_path, num_batches=4, num_rows=2)
  found = drawing.facts["sources"]
  for name, positions, examples in (("captions", 24 / 27, 0.75), ("text", 3 / 27, 0.25)):
    for kind in ("asked", "planned"):
      assert found[name][f"{kind}_fraction"] == pytest.approx(positions)
      assert found[name][f"{kind}_examples_fraction"] == pytest.approx(examples)
  assert "The weights are shares of examples." in Page(drawing.page).text
  assert drawing.failed == []


def test_sub_images_count_in_the_length_of_an_example(make_run, write, jpeg, tmp_path):
  """A caption has five of 6 positions, `<s>` and a word: 32, beside a text of 3."""
  run = make_run(
    write("captions", [[jpeg(50), "a"]]),
    write("text", [["a b"]]),
    **{"seq_len": 70, "batch_size": 2, "images_per_row": 10, "window_rows": 8},
    weight_by="examples",
    tiling=TilingConfig(grid=(2, 2)),
  )
  found = inspect.draw_stream(run, tmp_path, num_batches=4, num_rows=2).facts["sources"]
  assert found["captions"]["asked_fraction"] == pytest.approx(32 / 35)
  assert found["captions"]["planned_examples_fraction"] == pytest.approx(0.5)


def test_a_later_step_is_the_one_that_training_gets(make_run, tmp_path):
  run = make_run(window_rows=16)  # two batches
  both = stream.read_stream(run, first_step=0, num_batches=4, num_rows=2)
  late = stream.read_stream(run, first_step=3, num_batches=1, num_rows=2)
  assert [row.name for row in late.drawn] == ["step 3, row 0", "step 3, row 1"]
  for a, b in zip(both.drawn[-2:], late.drawn, strict=True):
    for field in Batch._fields:
      np.testing.assert_array_equal(getattr(a.row, field), getattr(b.row, field))
    assert a.origins == b.origins
  assert not late.failed


@pytest.mark.parametrize(("asked", "read"), [(1, 1), (3, 4), (8, 8), (99, 8)])
def test_rows_that_are_read_divide_the_batch(make_run, asked, read):
  assert stream.read_stream(make_run(), first_step=0, num_batches=1, num_rows=asked).rows == read


# --- checks


def change_loss_on_padding(batch):
  r, s = np.argwhere(batch.segment_ids == 0)[0]
  batch.loss_mask[r, s] = 1


def change_loss_on_a_picture(batch):
  r, s = np.argwhere(batch.targets == IMAGE_ID)[0]
  batch.loss_mask[r, s] = 1


def change_no_loss(batch):
  batch.loss_mask[:] = 0


def change_loss_that_is_no_number(batch):
  r, s = np.argwhere(batch.loss_mask == 1)[0]
  batch.loss_mask[r, s] = np.nan


def change_a_picture_is_missing(batch):
  r, n = np.argwhere(batch.image_mask)[0]
  batch.image_mask[r, n] = False


def change_two_pictures_are_swapped(batch):
  r = np.flatnonzero(batch.image_mask.sum(axis=1) > 1)[0]
  batch.images[r, [0, 1]] = batch.images[r, [1, 0]]


def change_a_picture_in_an_empty_slot(batch):
  r, n = np.argwhere(~batch.image_mask)[0]
  batch.images[r, n] = 9


def change_positions_go_on(batch):
  batch.positions[:] = np.arange(batch.positions.shape[1])


def change_segments_are_merged(batch):
  batch.segment_ids[batch.segment_ids == 2] = 1


def change_targets_are_the_inputs(batch):
  batch.targets[:] = batch.tokens


def change_a_source_is_wrong(batch):
  batch.source_ids[batch.segment_ids == 1] += 1


def change_a_source_does_not_exist(batch):
  batch.source_ids[batch.segment_ids == 1] = 3


def change_an_id_is_too_large(batch):
  r, s = np.argwhere(batch.loss_mask == 1)[0]
  batch.targets[r, s] = 4096


def change_a_run_is_one_short(batch):
  r, s = np.argwhere(batch.tokens == IMAGE_ID)[0]
  batch.tokens[r, s] = 9


MISTAKES = {
  change_loss_on_padding: {"no loss on padding"},
  change_loss_on_a_picture: {"no loss on pictures", "every segment is"},
  change_no_loss: {"every segment is"},
  change_loss_that_is_no_number: {"the loss mask is 0 or 1", "every segment is"},
  change_a_picture_is_missing: {"every picture has its run", "every segment is"},
  change_two_pictures_are_swapped: {"every segment is"},
  change_a_picture_in_an_empty_slot: {"empty slots are blank"},
  change_positions_go_on: {"positions restart"},
  change_segments_are_merged: {"segments are", "positions restart", "targets are"},
  change_targets_are_the_inputs: {"targets are", "every segment is"},
  change_a_source_is_wrong: {"every segment is"},
  change_a_source_does_not_exist: {"a segment is of one source", "every segment is"},
  change_an_id_is_too_large: {"tokens and targets are in", "targets are", "every segment is"},
  change_a_run_is_one_short: {"every picture has its run", "runs of <image>", "every segment is"},
}


class Changed:
  """A pipeline that yields changed batches."""

  def __init__(self, pipeline, change):
    self._pipeline, self._change = pipeline, change

  def __next__(self):
    batch, stats = next(self._pipeline)
    self._change(batch)
    return batch, stats

  def __getattr__(self, name):
    return getattr(self._pipeline, name)


@pytest.fixture
def spoil(monkeypatch):
  """Changes all batches that are read from now on."""

  def spoil(change) -> None:
    make_pipeline = stream.make_pipeline
    monkeypatch.setattr(
      stream, "make_pipeline", lambda *args, **kw: Changed(make_pipeline(*args, **kw), change)
    )

  return spoil


@pytest.mark.parametrize("change", MISTAKES, ids=lambda change: change.__name__[7:])
def test_a_mistake_is_found(change, make_run, spoil):
  spoil(change)
  run = make_run(window_rows=8, seq_len=400)  # some of it is padding
  found = stream.read_stream(run, first_step=0, num_batches=1, num_rows=8)
  for beginning in MISTAKES[change]:
    assert any(name.startswith(beginning) for name in found.failed), found.failed
  places = [place for check in found.checks for place in check.places]
  assert places
  assert all(place.startswith("step 0, row ") for place in places)


def test_padded_pictures_are_compared_as_padded(make_run):
  run = make_run(window_rows=8, image_fit="pad")
  assert stream.read_stream(run, first_step=0, num_batches=1, num_rows=8).failed == []


def test_the_segment_with_another_picture_is_named(make_run, spoil, tmp_path):
  spoil(change_two_pictures_are_swapped)
  drawing = inspect.draw_stream(make_run(window_rows=8), tmp_path, num_batches=1)
  (check,) = [check for check in drawing.facts["checks"] if check["failed"]]
  assert check["failed"] == 2
  assert all(place.endswith(": pictures") for place in check["places"])
  assert Page(drawing.page).text.count("not as in the record: pictures") == 2


def test_a_mistake_is_red(make_run, spoil, tmp_path):
  def draw() -> tuple[int, Page]:
    drawing = inspect.draw_stream(run, tmp_path, num_batches=1, num_rows=8)
    colors = PIL.Image.open(drawing.picture).convert("RGB").getcolors(1 << 24)
    return sum(n for n, color in colors if color == (0xC0, 0x26, 0x0B)), Page(drawing.page)

  run = make_run(window_rows=8, seq_len=400)
  pixels, page = draw()
  assert pixels == 0
  assert "All 15 checks passed" in page.text
  assert "FAIL" not in page.text
  spoil(lambda batch: batch.loss_mask.fill(1))
  pixels, page = draw()
  assert pixels > 4500  # the words above the row alone are 2800
  assert 'fill="#c0260b"' in page.source
  assert "3 of 15 checks failed" in page.text
  assert page.text.count("FAIL") == 3


# --- pages


EVIL = "<script>alert(1)</script><img src=http://x> & </style>\x00\x1b[31m"


def test_texts_of_all_kinds_stay_texts(make_run, write, jpeg, tmp_path):
  marked = {**document(f"{EVIL}", jpeg(99), EVIL), "license": EVIL, "credit": EVIL, "source": EVIL}
  records = [
    marked,
    document("rtl", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627", jpeg(9)),
    document("typed", "<image> </s> \u2581 \U0001f468\u200d\U0001f469"),
    document("picture", jpeg(3)),
    document("two", jpeg(5), jpeg(6), "a\n\n  b"),
    conversation("chat", [jpeg(7), "what?"], ["that", jpeg(8)], ["and?"], ["<b>no</b>"]),
    document("unreadable", b"GIF89a", "a"),
    document("long", "word " * 380),
  ]
  sources = [write(f"one{i}", [record]) for i, record in enumerate(records)]
  rows = {"seq_len": 128, "batch_size": 4, "images_per_row": 4, "window_rows": 24}
  run = make_run(*sources, **rows, max_drop_fraction=1.0)
  packed = inspect.draw_stream(run, tmp_path, num_batches=6, num_rows=4)
  raw = inspect.draw_source(run, tmp_path, write("all", records))
  assert packed.failed == []
  assert raw.facts["kinds"] == {"document": 7, "conversation": 1}
  assert raw.facts["left_out"] == {"unreadable image": 1}
  for drawing in (packed, raw):
    page = Page(drawing.page)
    assert not {"script"} & set(page.tags)
    assert page.tags.count("b") < 200
    assert "<script>alert(1)</script><img src=http://x> & </style>" in page.text
    assert "<b>no</b>" in page.text
    assert "\u05e9\u05dc\u05d5\u05dd" in page.text
    assert not {"\x00", "\x1b"} & set(page.source)
    assert all(a.startswith(("data:image/", "#r")) for a in page.addresses)
    with PIL.Image.open(drawing.picture) as drawn:
      assert drawn.width > 1000
  assert "100 characters not shown" in Page(raw.page).text
  assert "left out: unreadable image" in Page(raw.page).text


def test_the_links_of_a_page_lead_somewhere(make_run, tmp_path):
  page = Page(inspect.draw_stream(make_run(), tmp_path, num_batches=1).page)
  links = [a for a in page.addresses if a.startswith("#")]
  assert len(links) > 10
  assert all(f'id="{link[1:]}"' in page.source for link in links)


def test_more_rows_than_are_drawn_are_said(make_run, tmp_path):
  drawing = inspect.draw_stream(make_run(), tmp_path, num_batches=5, num_rows=8)
  assert drawing.facts["rows"] == 40
  page = Page(drawing.page)
  assert "40 in all. The first 24 of them are drawn." in page.text
  assert page.text.count("positions filled, ") == 24


def test_a_notebook_shows_the_page(make_run, tmp_path):
  drawing = inspect.draw_stream(make_run(), tmp_path, num_batches=1, num_rows=1)
  frame = drawing._repr_html_()
  assert html.unescape(frame.split('srcdoc="')[1].split('" style=')[0]) == drawing.page.read_text()


def test_rows_without_pictures_and_many_sources(make_run, write, tmp_path):
  sources = [write(f"group/{i}".replace("/", "-"), [[f"text {i} "]]) for i in range(12)]
  run = make_run(*sources, seq_len=24, batch_size=4, images_per_row=0, window_rows=16)
  drawing = inspect.draw_stream(run, tmp_path, num_batches=2)
  assert drawing.failed == []
  assert drawing.facts["image_slots"] == {"all": 0, "used": 0, "used_fraction": 0.0}
  assert "no slots" in Page(drawing.page).text


# --- records


def test_records_of_held_out_sources_and_of_paths(make_run, tmp_path):
  eval_sources = (SourceConfig("text", str(SAMPLE / "text-heldout-*.arrayrecord")),)
  run = make_run(eval_sources=eval_sources)
  held_out = inspect.draw_source(run, tmp_path, "eval_sources.text", num_records=5)
  assert held_out.page.name == "source-eval_sources.text.html"
  assert len(held_out.facts["records"]) == 5
  shards = SourceConfig("mine/x", str(SAMPLE / "sft-heldout-*.arrayrecord"))
  one = inspect.draw_source(run, tmp_path, shards, num_records=2, seed=1)
  assert one.page.name == "source-mine-x.html"
  other = inspect.draw_source(run, tmp_path, shards, num_records=2, seed=2)
  assert one.facts["records"] != other.facts["records"]


def test_a_record_by_hand(make_run, write, tmp_path, jpeg):
  run = make_run(write("mine", [[jpeg(5, (12, 30)), "a b"]]))
  found = inspect.draw_source(run, tmp_path, "mine").facts
  assert found["positions"] == {"sum": 9, "median": 9, "max": 9, "longer_than_a_row": 0}
  assert found["trained"] == 3
  page = Page(tmp_path / "source-mine.html")
  assert "30 by 12 JPEG, " in page.text
  assert "6 positions" in page.text


def test_mistakes_of_the_caller(make_run, tmp_path):
  run = make_run()
  with pytest.raises(ConfigError, match="no source 'nope'; the config has captions, interleaved"):
    inspect.draw_source(run, tmp_path, "nope")
  with pytest.raises(ConfigError, match="num_batches is 0"):
    inspect.draw_stream(run, tmp_path, num_batches=0)
  with pytest.raises(ConfigError, match="first_step is -1"):
    inspect.draw_stream(run, tmp_path, first_step=-1)


# --- one row at a time


def row(tokens, segment_ids, num_slots=2) -> Batch:
  tokens, segment_ids = np.array(tokens, np.int32), np.array(segment_ids, np.int32)
  zeros = np.zeros_like(tokens)
  images = np.zeros((num_slots, 2, 2, 3), np.uint8)
  mask = np.zeros(num_slots, bool)
  return Batch(tokens, zeros, zeros.astype(np.float32), zeros, segment_ids, zeros, images, mask)


def test_runs_find_their_segment(tokenizer):
  encoder = Encoder(tokenizer, 2)
  found = facts.segments_of(row([1, 5, 4, 4, 6, 5, 4, 4, 6, 0], [1] * 5 + [2] * 4 + [0]), encoder)
  assert [(s.number, s.start, s.stop) for s in found] == [(1, 0, 5), (2, 5, 9)]
  assert [s.runs for s in found] == [(facts.Run(2, 4, 0),), (facts.Run(6, 8, 1),)]


def test_words_are_marked_where_the_position_before_has_loss(tokenizer):
  (a,), (b,) = tokenizer.encode("a"), tokenizer.encode(" b")
  one = row([1, a, 5, 4, 4, 6], [1] * 6)
  one.targets[:] = [a, 5, 4, 4, 6, b]
  one.loss_mask[:] = [1, 0, 0, 0, 0, 1]
  encoder = Encoder(tokenizer, 2)
  (segment,) = facts.segments_of(one, encoder)
  assert facts.words_of(one, segment, encoder) == [
    facts.Words("<s>", True, False),
    facts.Words("a", False, True),
    facts.Words("<image_start>", True, False),
    facts.Run(3, 5, 0),
    facts.Words("<image_end>", True, False),
    facts.Words(" b", False, True),
  ]


def test_pictures_of_a_batch(make_run, tokenizer):
  drawn = stream.read_stream(make_run(), first_step=0, num_batches=1, num_rows=4)
  batch = picture.stack([row.row for row in drawn.drawn])
  draw = lambda b, n: picture.draw_batch(b, drawn.encoder, ["a"], num_rows=n)
  one, three = draw(batch, 1), draw(batch, 3)
  assert one.dtype == np.uint8
  assert one.shape[1:] == three.shape[1:]
  assert three.shape[0] > 2 * one.shape[0]
  batch.images[:] = (255, 0, 255)
  assert np.sum(np.all(draw(batch, 1) == (255, 0, 255), axis=-1)) > 1000
  batch.segment_ids[:], batch.image_mask[:] = 0, False
  assert draw(batch, 1).shape == one.shape
  batch.segment_ids[:] = np.arange(1, 513)
  assert draw(batch, 1).shape == one.shape


# --- the command


# Imports once and forks for each command line; the child becomes the command.
FORKS = """
import json, os, runpy, sys
import mm1_jax.cli, mm1_jax.data.inspect.draw
folder, commands = sys.argv[1], json.load(sys.stdin)
for name, args in commands.items():
  pid = os.fork()
  if pid == 0:
    for fd in (1, 2):
      os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.argv = ["inspect", *args]
    runpy.run_module("mm1_jax.data.inspect", run_name="__main__", alter_sys=True)
    sys.exit(0)
  with open(f"{folder}/codes", "a") as f:
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=f)
"""


@pytest.mark.slow
def test_the_command(tmp_path):
  config, output = "--config=configs/mm1_debug.py", f"--output={tmp_path}/out"
  path = f"--path={SAMPLE}/text-heldout-*.arrayrecord"
  commands = {
    "stream": [config, output, "--steps=3:5", "--rows=2", "--config.data.window_rows=16"],
    "records": [config, output, path, "--records=3"],
    "unknown source": [config, output, "--source=nope"],
    "no step": [config, output, "--steps=5:5"],
    "no config": [output],
    "help": ["--help"],
  }
  subprocess.run(
    [sys.executable, "-W", "ignore", "-c", FORKS, str(tmp_path)],
    input=json.dumps(commands),
    text=True,
    cwd=ROOT,
    check=True,
    timeout=600,
  )
  said = {name: (tmp_path / name).read_text() for name in commands}
  assert (tmp_path / "codes").read_text().split() == ["0", "0", "1", "1", "1", "0"], said
  assert not [name for name, text in said.items() if "Traceback" in text]
  assert "pass  positions restart at 0" in said["stream"]
  assert json.loads((tmp_path / "out/stream.json").read_text())["steps"] == [3, 5]
  assert len(json.loads((tmp_path / "out/source-text-heldout.json").read_text())["records"]) == 3
  assert "error: no source 'nope'; the config has captions," in said["unknown source"]
  assert "error: --steps=5:5" in said["no step"]
  assert "error: --config=FILE is needed" in said["no config"]
  assert "--source=eval_sources.captions" in said["help"]
  assert "--config FILE" in said["help"]
