# SPDX-License-Identifier: Apache-2.0
"""A file of questions: every line gets an answer or a reason, once, however often it is stopped."""

import json
import shutil

import pytest

from mm1_jax import cli
from mm1_jax.config import UserError
from mm1_jax.inference import generate, questions
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.prompts import PromptError
from mm1_jax.inference.questions import answer_file
from mm1_jax.inference.sampler import GREEDY, Sampling

pytestmark = pytest.mark.compiles


@pytest.fixture
def ask(model, pictures, tmp_path):
  """Answers rows (or raw lines) in answers.jsonl; returns the tally and the answers by id."""

  def make(rows: list, **changes):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    output = tmp_path / "answers.jsonl"
    args = {"images": pictures[0].parent, "max_new_tokens": 4, "sampling": GREEDY, **changes}
    news: list[str] = []
    tally = answer_file(model, tmp_path / "questions.jsonl", output, tell=news.append, **args)
    assert news[-1].startswith(f"{tally.answered + tally.failed} of ") or not sum(tally[:2])
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({row["id"] for row in written}) == len(written)
    assert all(("asked" in row) == ("answer" in row) for row in written)
    make.news = news
    make.asked = {row["id"]: row.pop("asked", None) for row in written}
    return tally, {row.pop("id"): row for row in written}

  return make


ODD = {
  "half": {"id": "half", "prompt": "x\ud800"},
  "an id\ud800": {"id": "an id\ud800", "prompt": "x"},
  "NUL": {"id": "NUL", "prompt": "x", "images": ["a\0b.png"]},
  "half a name": {"id": "half a name", "prompt": "x", "images": ["\ud800.png"]},
  "folder": {"id": "folder", "prompt": "x", "images": ["."]},
  "long name": {"id": "long name", "prompt": "x", "images": ["x" * 5000]},
  "deep turns": {"id": "deep turns", "turns": [{"role": "user", "content": [[[["x"]]]]}]},
  "role": {"id": "role", "turns": [{"role": {"user": 1}, "content": "x"}]},
}


def test_answers_are_those_of_generate(ask, model, pictures):
  a, b = pictures
  turns = [
    {"role": "user", "content": "<image>What?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And <image>?"},
  ]
  tally, said = ask(
    [
      {"id": "one", "prompt": "What is <image>?", "images": ["a.png"]},
      {"prompt": "What?", "images": "b.png"},
      {"prompt": "Once upon"},
      {"id": 7, "turns": turns, "images": ["a.png", str(b)]},
    ]
  )
  filled = [
    {"role": "user", "content": [a, "What?"]},
    turns[1],
    {"role": "user", "content": ["And ", b, "?"]},
  ]
  expected = model.generate(
    [["What is ", a, "?"], [b, "What?"], ["Once upon"], filled], max_new_tokens=4
  )
  assert said == {
    id: {"answer": answer} for id, answer in zip(("one", "2", "3", "7"), expected, strict=True)
  }
  assert tally == (4, 0, 0)


def test_what_cannot_be_answered_says_why_and_stops_nothing(ask):
  tally, said = ask(
    [
      "{not json",
      {"prompt": "<image>"},
      {"prompt": "", "images": ["a.png"]},
      {"prompt": "x", "images": ["gone.png"]},
      {"prompt": ""},
      {"prompt": "word " * 300},
      {"prompt": "x", "images": ["a.png"] * 40},
      {"prompt": 3},
      {"prompt": "x", "turns": []},
      {"turns": []},
      {"turns": [{"role": "user", "content": "x"}], "images": ["a.png"]},
      {"turns": [{"role": "user"}]},
      {"prompt": "x", "images": [1]},
      [],
    ]
  )
  assert "answer" in said["3"]
  messages = {
    "1": "the line is not JSON",
    "2": "has 1 <image> slot, but there are 0 images",
    "4": "gone.png' cannot be read: No such file",
    "5": "the prompt is empty",
    "6": "the model was trained on 192",
    "7": "40 x 6 of them for images",
    "8": "'prompt' is 3",
    "9": "either 'prompt' or 'turns'",
    "10": "at least one turn",
    "11": "1 more images than <image> slots",
    "12": "a turn is {'role': 'user'}",
    "13": "'images' is [1]",
    "14": "must be an object",
  }
  for id, message in messages.items():
    assert message in said[id]["error"]
  assert tally == (1, 13, 0)


def test_whatever_one_line_raises_is_that_lines_error(ask):
  """Most ended the job, with up to 64 good answers unwritten."""
  good = [{"id": f"good {i}", "prompt": f"{i} and"} for i in range(3)]
  _, expected = ask(good)
  deep = '{"prompt": ' + "[" * 50_000
  tally, said = ask([good[0], *ODD.values(), good[1], deep, good[2]])
  assert {id: said[id] for id in expected} == expected
  assert "answer" in said["half"]  # U+FFFD is read
  assert "answer" in said["an id\ud800"]
  messages = {
    "NUL": "cannot be read: ValueError: embedded null byte",
    "half a name": "cannot be read: UnicodeEncodeError",
    "folder": "cannot be read: Is a directory",
    "long name": "cannot be read: File name too long",
    "deep turns": "a turn is",
    "role": "a turn is",
    str(len(ODD) + 3): "the line is JSON nested too deeply",
  }
  for id, message in messages.items():
    assert message in said[id]["error"]
  assert tally == (2, len(messages), 3)


@pytest.mark.parametrize("where", ["encode", "generate"])
def test_a_fault_of_ours_at_one_line_is_that_lines_error(ask, model, monkeypatch, where):
  rows = [{"id": str(i), "prompt": f"{i} and"} for i in range(6)]
  _, expected = ask(rows)
  bad = model.encode(["3 and"]).ids
  real = getattr(model, where)

  def fail(what, **how):
    asked = [what] if where == "encode" else [request.ids for request in what]
    if ["3 and"] in asked or bad in asked:
      raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return real(what, **how)

  monkeypatch.setattr(model, where, fail)
  tally, said = ask([{**row, "prompt": row["prompt"]} for row in rows], sampling=Sampling(0.5))
  assert tally == (5, 1, 0)
  assert said["3"] == {"error": "RuntimeError: RESOURCE_EXHAUSTED: out of memory"}
  monkeypatch.undo()
  tally, said = ask(rows)
  assert tally[1] == 0
  assert said == expected


def test_a_setting_out_of_range_is_no_lines_error(ask):
  for changes in (
    {"max_new_tokens": 0},
    {"sampling": Sampling(-1)},
    {"batch_size": 0},
    {"stop": "a"},
  ):
    with pytest.raises(PromptError, match="it must be"):
      ask([{"prompt": "a"}], **changes)


def test_lines_that_are_inserted_moved_or_edited_get_their_own_answers(ask, tmp_path):
  """Kept under the number of its line, "AAA"'s answer was given for "NEW"."""
  rows = [{"prompt": name} for name in ("AAA", "BBB", "CCC", "DDD")]
  how = {"sampling": Sampling(2.0), "max_new_tokens": 6}
  _, said = ask(rows, **how)
  own = {row["prompt"]: said[str(i)] for i, row in enumerate(rows, start=1)}
  assert len({answer["answer"] for answer in own.values()}) == 4
  order = ["NEW", "CCC", "AAA", "BBB", "AAA"]
  tally, said = ask([{"prompt": name} for name in order], **how)
  assert tally == (2, 0, 3)
  assert [said[str(i)] for i in (2, 3, 4)] == [own[name] for name in order[1:4]]
  assert said["5"] != own["AAA"]  # the second of two is drawn for itself
  (tmp_path / "answers.jsonl").unlink()
  assert ask([{"prompt": name} for name in order], **how)[1] == said


def test_an_edited_line_is_asked_again_and_the_old_answer_is_put_aside(ask, tmp_path):
  rows = [
    {"id": "a", "prompt": "one"},
    {"id": "b", "prompt": "two"},
    {"id": "c", "prompt": "three"},
  ]
  _, first = ask(rows)
  rows[1]["prompt"], rows[2] = "something else", {"id": "d", "prompt": "four"}
  tally, said = ask(rows)
  assert tally == (2, 0, 1)
  assert said["a"] == first["a"]
  assert said["c"] == first["c"]  # of another file of questions, for all we know
  assert said["b"] != first["b"]
  (old,) = map(json.loads, (tmp_path / "answers.jsonl.replaced").read_text().splitlines())
  assert (old["id"], old["answer"]) == ("b", first["b"]["answer"])
  assert any("1 answers in " in line and "1 with another question" in line for line in ask.news)


def test_another_picture_of_the_same_name_is_another_question(ask, pictures, tmp_path):
  shutil.copy(pictures[0], tmp_path / "x.png")
  rows = [{"id": "a", "prompt": "x", "images": ["x.png"]}, {"id": "b", "prompt": "y"}]
  _, first = ask(rows, images=tmp_path)
  assert ask(rows, images=tmp_path)[0] == (0, 0, 2)
  shutil.copy(pictures[1], tmp_path / "x.png")
  tally, said = ask(rows, images=tmp_path)
  assert tally == (1, 0, 1)
  assert (said["a"] != first["a"], said["b"]) == (True, first["b"])


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"max_new_tokens": 5}, "2 with another max_new_tokens (4, now 5)"),
    ({"sampling": Sampling(0.7)}, "2 with another temperature (0.0, now 0.7)"),
    ({"sampling": BeamSearch(2, 1.0)}, "2 with another num_beams (None, now 2)"),
    ({"stop": ["#"]}, "2 with another stop ([], now ['#'])"),
    ({"chat": True}, "2 with another chat (False, now True)"),
  ],
)
def test_changed_settings_are_told_and_all_are_asked_again(ask, changes, says):
  rows = [{"prompt": "one"}, {"prompt": "two"}]
  _, first = ask(rows)
  assert ask(rows, seed=7)[0] == (0, 0, 2)  # nothing is drawn
  assert not any("are not those" in line for line in ask.news)
  tally, _ = ask(rows, **changes)
  assert tally == (2, 0, 0)
  assert any(says in line for line in ask.news), ask.news
  tally, said = ask(rows)
  assert (tally, said) == ((2, 0, 0), first)


def test_answers_of_another_model_are_told(ask, model, monkeypatch):
  rows = [{"prompt": "one"}]
  ask(rows)
  assert ask.asked["1"]["model"] == model.digest != ""
  monkeypatch.setattr(model, "digest", "another")
  assert ask(rows)[0] == (1, 0, 0)
  assert any("1 with another model" in line for line in ask.news)


def test_answers_with_no_record_of_what_was_asked_are_put_aside(ask, tmp_path):
  (tmp_path / "answers.jsonl").write_text('{"id": "1", "answer": "AAA"}\n')
  tally, said = ask([{"prompt": "NEW"}])
  assert tally == (1, 0, 0)
  assert said["1"] != {"answer": "AAA"}
  assert any("1 with no record of what was asked" in line for line in ask.news)


def test_the_same_command_continues_where_it_was_stopped(ask, model, monkeypatch, tmp_path):
  rows = [{"id": str(i), "prompt": f"{i} and"} for i in range(20)] + [{"prompt": "<image>"}]
  settings = {"batch_size": 2, "sampling": Sampling(temperature=1.0), "seed": 3}
  _, whole = ask(rows, **settings)
  output = tmp_path / "answers.jsonl"
  output.unlink()
  calls, real = [], model.generate

  def stop_at_second(*args, **kwargs):
    calls.append(args)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  monkeypatch.setattr(questions, "BATCHES_AT_ONCE", 4)
  monkeypatch.setattr(model, "generate", stop_at_second)
  with pytest.raises(KeyboardInterrupt):
    ask(rows, **settings)
  assert len(output.read_text().splitlines()) == 2  # as they come: the first batch
  with output.open("a") as file:
    file.write('{"id": "19", "ans')  # as a crash leaves it
  tally, said = ask(rows, **settings)
  assert tally == (18, 1, 2)
  assert said == whole
  tally, said = ask(rows, **settings)  # nothing left but what failed
  assert tally == (0, 1, 20)
  assert said == whole


def test_a_file_that_cannot_be_used(ask, tmp_path):
  with pytest.raises(UserError, match=r"questions.jsonl' has the id '1' in lines 1 and 3"):
    ask([{"prompt": "a"}, {"prompt": "b"}, {"id": 1, "prompt": "c"}])
  with pytest.raises(UserError, match="has no question"):
    ask(["", " "])
  (tmp_path / "answers.jsonl").write_text('{"precious": "data"}\n')
  with pytest.raises(UserError, match=r"is there, but is not a file of answers"):
    ask([{"prompt": "a"}])
  assert (tmp_path / "answers.jsonl").read_text() == '{"precious": "data"}\n'


def test_the_command(workdir, pictures, tmp_path, capsys):
  lines = [{"prompt": "What?", "images": ["a.png"]}, {"prompt": "<image>"}]
  (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
  flags = [f"--checkpoint={workdir}", f"--input={tmp_path}/q.jsonl", f"--output={tmp_path}/a.jsonl"]
  flags += [f"--images={pictures[0].parent}", "--max-new-tokens=4"]
  with pytest.raises(SystemExit) as exit:
    cli.run(generate.main, flags)
  assert "1 of 2 questions could not be answered" in str(exit.value.code)
  assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert "2 of 2 done, 1 failed" in err
