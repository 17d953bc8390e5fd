# SPDX-License-Identifier: Apache-2.0
"""A file of questions: every line gets an answer or a reason, once, however often it is stopped."""

import json

import pytest

from mm1_jax import cli
from mm1_jax.config import UserError
from mm1_jax.inference import generate, questions
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
    return tally, {row.pop("id"): row for row in written}

  return make


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
  assert len(output.read_text().splitlines()) == 8
  with output.open("a") as file:
    file.write('{"id": "8", "ans')  # as a crash leaves it
  tally, said = ask(rows, **settings)
  assert tally == (12, 1, 8)
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
