# SPDX-License-Identifier: Apache-2.0
"""The page: the worst items first, all that is left out is counted, and text stays text."""

import html.parser
import math
import re

import numpy as np
import pytest
from etils import epath

from mm1_jax.eval import page
from mm1_jax.eval.metrics.statistics import Estimate
from mm1_jax.eval.replies import Answered
from mm1_jax.eval.task import Form, Item, Likelihood, Scores
from tests.helpers.evaluations import make_result, make_task, png, said, values_of


class Page(html.parser.HTMLParser):
  """A page's tags, addresses and text."""

  def __init__(self, text: str):
    super().__init__()
    self.source, self.tags, self.addresses, self.text = text, [], [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.addresses += [value for name, value in attrs if name in ("src", "href")]
    self.text += " "

  def handle_data(self, data):
    if self.tags[-1:] != ["style"]:
      self.text += data


@pytest.fixture
def written(tmp_path):
  def write(*of):
    path = epath.Path(tmp_path) / "results.html"
    page.write_page(path, of, values_of(of))
    return Page(path.read_text())

  return write


def order(shown: Page) -> list[str]:
  """Returns the ids of the items that were right or wrong."""
  return re.findall(r"<p>(\w+) <span", shown.source)


class TestItems:
  def test_wrong_before_right_then_by_score(self, written):
    scores = Scores(
      {"m": Estimate(0.5, 0.1, 5)},
      np.array([0.9, 0.5, 0.1, math.nan, 0.2]),
      np.array([True, False, True, False, False]),
    )
    shown = written(make_result(said(["x"] * 5), scores=scores))
    assert order(shown) == ["4", "1", "3", "2", "0"]
    assert "2 right · 3 wrong" in shown.text
    assert shown.text.count("✗ wrong") == 3
    assert shown.text.count("✓ right") == 2

  def test_more_than_the_page_holds_are_counted(self, written, monkeypatch):
    monkeypatch.setattr(page, "MOST_ITEMS", 3)
    shown = written(make_result(said(["red", "no", "red", "no", "red"])))
    assert "The worst 3 of 5 items" in shown.text
    assert "items/colors-val-mm1-0shot.jsonl" in shown.addresses
    assert order(shown) == ["1", "3", "0"]

  def test_question_answer_and_truth(self, written):
    item = Item("a", "Which colour?", answers=("red", "crimson", "red"), details={"kind": "hue"})
    shown = written(make_result([Answered(item, (), "dark red")]))
    for text in ("Which colour?", "dark red", "crimson", "kind: hue"):
      assert text in shown.text
    assert "red <small>&times; 2" in shown.source

  def test_an_empty_answer_and_an_unpublished_truth(self, written):
    task = make_task(score=None)
    shown = written(make_result([Answered(Item("a"), (), "")], task=task))
    assert "(nothing)" in shown.text
    assert "not published" in shown.text

  def test_choices_with_their_likelihoods(self, written):
    item = Item("a", "?", answers=("two",), choices=("one", "two"), right=1)
    reply = (Likelihood(-1.25, False, 3), Likelihood(-2.5, False, 4))
    scores = Scores({"acc": Estimate(0, 0, 1)}, np.zeros(1), np.zeros(1, bool))
    shown = written(make_result([Answered(item, (), reply)], scores=scores))
    assert re.search(r"<td><td class=left>one<td><b>-1.250</b><td>3", shown.source)
    assert re.search(r"✓</span><td class=left>two<td>-2.500<td>4", shown.source)

  def test_continuations_that_are_no_choices(self, written):
    form = Form(prompt=lambda item: [item.question], options=lambda item: [(["a"], " last word")])
    scores = Scores({"acc": Estimate(0, 0, 1)}, np.zeros(1))
    reply = (Likelihood(-1.25, True, 2),)
    task = make_task(forms={"mm1": form})
    shown = written(make_result([Answered(Item("a"), (), reply)], scores=scores, task=task))
    assert "last word" in shown.text
    assert "-1.250" in shown.text

  def test_dropped_items_have_their_reasons(self, written, monkeypatch):
    monkeypatch.setattr(page, "MOST_DROPPED", 2)
    shown = written(make_result(said(["red", None, None, None])))
    assert "3 items could not be asked" in shown.text
    assert shown.text.count("why") == 3  # and the table's head
    assert "and 1 more" in shown.text
    assert "(3 dropped)" in shown.text

  def test_a_control_says_what_was_shown(self, written):
    own, blind = make_result(said(["red"])), make_result(said(["no"]), control="blind")
    shown = written(own, blind)
    assert "the model was shown no pictures" in shown.text
    assert "own - blind" in shown.text

  def test_demonstrations_are_folded(self, written):
    demonstrations = (
      Item("d1", "first?", (png(),), ("blue",)),
      Item("d2", "second?", (), ("green",)),
    )
    shown = written(
      make_result([Answered(Item("a", answers=("red",)), demonstrations, "red")], shots=2)
    )
    assert shown.tags.count("details") == 2  # and the settings
    for text in ("2 demonstrations", "first?", "blue", "second?", "green"):
      assert text in shown.text

  def test_official_answer_files_are_linked(self, written, tmp_path):
    place = tmp_path / "submissions" / "colors-val-mm1-0shot"
    place.mkdir(parents=True)
    (place / "my answers.json").write_text("[]")
    shown = written(make_result(said(["red"])))
    assert "submissions/colors-val-mm1-0shot/my%20answers.json" in shown.addresses


class TestPictures:
  def ask(self, *pictures, id="a", demonstrations=()):
    return Answered(Item(id, "?", pictures, ("red",)), demonstrations, "red")

  def test_each_is_kept_once(self, written):
    same, other = png(), png((0, 0, 250))
    shown = Item("d", "?", (same,), ("red",))
    answered = [self.ask(same, id="a"), self.ask(same, other, id="b", demonstrations=(shown,))]
    one, two = make_result(answered), make_result(answered, control="blind")
    found = written(one, two)
    assert found.source.count("data:image/jpeg;base64,") == 2
    assert len(re.findall(r'class="picture p\d+"', found.source)) == 8
    assert "width: 40px; aspect-ratio: 40 / 20" in found.source

  def test_they_are_small(self, written):
    found = written(make_result([self.ask(png(size=(3000, 1500)))]))
    assert "width: 224px; aspect-ratio: 224 / 112" in found.source
    assert re.search(r"\.small \.p0 { width: 96px; }", found.source)
    assert len(found.source) < 20_000

  def test_a_file(self, written, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    found = written(make_result([self.ask(epath.Path(tmp_path) / "a.png")]))
    assert 'aria-label="a.png"' in found.source

  def test_a_damaged_or_missing_one_shows_its_problem(self, written, tmp_path):
    pictures = (png()[:60], b"", b"GIF89a nonsense", epath.Path(tmp_path) / "gone<b>.jpg")
    found = written(make_result([self.ask(*pictures)]))
    for text in ("truncated", "empty image", "unreadable", "cannot be read (FileNotFoundError)"):
      assert text in found.text
    assert "gone<b>.jpg" in found.text
    assert "b" not in found.tags
    assert "data:" not in found.source.split("</style>")[1]

  def test_more_than_the_page_holds(self, written, monkeypatch):
    monkeypatch.setattr(page, "MOST_THUMBNAILS", 1)
    monkeypatch.setattr(page, "MOST_PICTURES", 2)
    pictures = [png((i, 0, 0)) for i in range(5)]
    found = written(make_result([self.ask(*pictures)]))
    assert found.source.count("data:image/jpeg") == 1
    assert "the page is full" in found.text
    assert "and 3 pictures more" in found.text


class TestHostileText:
  TEXT = "<script>alert(1)</script><img src=http://x onerror=y>\x00\x1b[31m\u202e'\"&amp;"

  def test_it_is_only_text(self, written):
    task = make_task(
      self.TEXT, title=self.TEXT, metric=self.TEXT, splits=(self.TEXT,), split=self.TEXT
    )
    demonstration = Item(self.TEXT, self.TEXT, (), (self.TEXT,))
    item = Item(
      *(self.TEXT, self.TEXT, (), (self.TEXT,), (self.TEXT, "x")),
      right=0,
      details={self.TEXT: self.TEXT},
    )
    scores = Scores({self.TEXT: Estimate(0.5, 0.1, 1)}, np.zeros(1), None, {self.TEXT: 1})
    answered = [
      Answered(item, (demonstration,), self.TEXT),
      Answered(Item("dropped" + self.TEXT), (), None, self.TEXT),
    ]
    shown = written(make_result(answered, scores=scores, task=task))
    assert not {"script", "img"} & set(shown.tags)
    assert shown.text.count("<script>alert(1)</script>") > 12
    assert not {"\x00", "\x1b", "\u202e"} & set(shown.source)

  def test_nothing_comes_from_outside(self, written):
    shown = written(make_result(said([self.TEXT])))
    assert {a for a in shown.addresses if not a.startswith(("#", "items/"))} == set()
    assert "default-src 'none'" in shown.source

  def test_ten_megabytes_are_cut_and_the_cut_is_told(self, written):
    shown = written(make_result(said(["<" * 10_000_000])))
    assert "9,998,200 characters not shown" in shown.text
    assert len(shown.source) < 40_000


def test_bars_begin_at_zero_and_show_the_error():
  top = {"cider": 200.0}
  bar = page._bar("accuracy", {"mean": 0.5, "standard_error": 0.1}, {})
  assert '<rect width="70.0"' in bar
  assert "M56.0 4.0v8M84.0 4.0v8M56.0 8.0H84.0" in bar
  bar = page._bar("cider", {"mean": 50.0, "standard_error": None}, top)
  assert '<rect width="35.0"' in bar
  assert "<path" not in bar
  assert page._bar("m", {"mean": None, "standard_error": None}, {}) == ""
