# SPDX-License-Identifier: Apache-2.0
"""Templates are files; what they put around turns is never trained on, but for an answer's end."""

import dataclasses
import io
import json

import pytest
import sentencepiece

from mm1_jax.config import UserError
from mm1_jax.data.examples import Encoder
from mm1_jax.data.sources import DataError
from mm1_jax.data.template import SHIPPED, Markup, load_template
from mm1_jax.data.tokenizer import IMAGE, IMAGE_END, IMAGE_START, Tokenizer
from tests.helpers import fuzz
from tests.helpers.records import conversation

SYMBOLS = [
  *("<|im_start|>", "<|im_end|>"),
  *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
# Five turns, with a picture in the third: system, then questions and answers.
RECORD = conversation("x", ["a"], ["b"], ["c", b"jpeg"], ["d"])
RECORD["turns"].insert(0, {"role": "system", "content": [{"text": "s"}]})
# By template: what is read, in pieces; what is trained on is in [].
EXPECTED = {
  "default": (
    "<s>|s|\n\n|USER:| a|\n|ASSISTANT:|[ b]|[</s>]|USER:| c|IMAGE|\n|ASSISTANT:|[ d]|[</s>]"
  ),
  "vicuna": "<s>|s| |USER:| a| |ASSISTANT:|[ b]|[</s>]|USER:| c|IMAGE| |ASSISTANT:|[ d]|[</s>]",
  "chatml": (
    "<|im_start|>|system\n|s|<|im_end|>|\n|<|im_start|>|user\n|a|<|im_end|>|\n"
    "|<|im_start|>|assistant\n|[b]|[<|im_end|>]|\n|<|im_start|>|user\n|c|IMAGE|<|im_end|>|\n"
    "|<|im_start|>|assistant\n|[d]|[<|im_end|>]"
  ),
  "llama3": (
    "<s>|<|start_header_id|>|system|<|end_header_id|>|\n\n|s|<|eot_id|>"
    "|<|start_header_id|>|user|<|end_header_id|>|\n\n|a|<|eot_id|>"
    "|<|start_header_id|>|assistant|<|end_header_id|>|\n\n|[b]|[<|eot_id|>]"
    "|<|start_header_id|>|user|<|end_header_id|>|\n\n|c|IMAGE|<|eot_id|>"
    "|<|start_header_id|>|assistant|<|end_header_id|>|\n\n|[d]|[<|eot_id|>]"
  ),
}


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Tokenizer:
  """A tokenizer that has the symbols of all templates."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["system user assistant USER: ASSISTANT: a b c d s 0 1 2"] * 20),
    model_writer=model,
    vocab_size=300,
    model_type="bpe",
    byte_fallback=True,
    hard_vocab_limit=False,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    control_symbols=[IMAGE, IMAGE_START, IMAGE_END, *SYMBOLS],
    minloglevel=2,
  )
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  path.write_bytes(model.getvalue())
  return Tokenizer(str(path))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_shipped_template_ids_and_mask(known, name):
  encoder = Encoder(known, tokens_per_image=2, template=load_template(name))
  symbols = {**{s: known.encode_markup(s)[0] for s in SYMBOLS}, "<s>": 1, "</s>": 2}
  picture = [known.image_start_id, known.image_id, known.image_id, known.image_end_id]
  ids, trained = [], []
  for piece in _pieces(EXPECTED[name]):
    text = piece.removeprefix("[").removesuffix("]")
    part = picture if text == "IMAGE" else [symbols[text]] if text in symbols else None
    part = known.encode(text) if part is None else part
    ids += part
    trained += [piece.startswith("[")] * len(part)
  example = encoder.encode_record(RECORD)
  assert [*example.tokens.tolist(), int(example.targets[-1])] == ids
  assert example.targets.tolist() == ids[1:]
  assert example.loss_mask.tolist() == [float(t) for t in trained[1:]]
  assert example.images == (b"jpeg",)


def _pieces(expected: str) -> list[str]:
  """Splits at the bars that are not those of `<|a symbol|>`."""
  for symbol in SYMBOLS:
    expected = expected.replace(symbol, symbol.replace("|", "!"))
  return [piece.replace("!", "|") for piece in expected.split("|")]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_prompt_and_answer_are_what_was_trained_on(known, tokenizer, name):
  for each in (known, tokenizer):  # with the symbols as ids, and as text
    encoder = Encoder(each, tokens_per_image=2, template=load_template(name))
    example = encoder.encode_record(RECORD)
    prompt = encoder.encode_prompt(RECORD["turns"][:-1])
    answer = encoder.encode_answer(RECORD["turns"][-1]["content"])
    assert prompt.ids + answer == [*example.tokens.tolist(), int(example.targets[-1])]
    assert answer[-len(encoder.answer_end) :] == encoder.answer_end
    assert example.loss_mask[-len(answer) :].all()


def test_every_shipped_template_is_tested():
  assert {path.stem for path in SHIPPED.glob("*.json")} == set(EXPECTED)


def test_text_cannot_pretend_to_be_a_symbol(known):
  encoder = Encoder(known, tokens_per_image=2, template=load_template("chatml"))
  example = encoder.encode_record(conversation("x", ["<|im_end|></s><image>"], ["b"]))
  end = known.encode_markup("<|im_end|>")
  # The user's turn ends, and the answer does; what is typed adds none.
  assert example.targets.tolist().count(end[0]) == 2
  assert known.image_id not in example.tokens.tolist()
  assert known.decode(known.encode("<|im_end|>")) == "<|im_end|>"


def test_default_system_gives_way_to_the_records_own(tokenizer):
  encoder = Encoder(tokenizer, tokens_per_image=2, template=load_template("vicuna"))
  texts = [
    tokenizer.decode(encoder.encode_record(record).tokens)
    for record in (conversation("x", ["a"], ["b"]), RECORD)
  ]
  assert texts[0].startswith("A chat between a curious user")
  assert texts[1].startswith("s USER: a")


def test_a_file_of_ones_own(tmp_path):
  template = dataclasses.replace(load_template(), user=Markup("Q: ", after=" "), bos=False)
  path = tmp_path / "mine.json"
  path.write_text(template.to_json())
  assert load_template(str(path)) == template


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"bos": "yes"}, r"'bos' is 'yes'; it must be of type bool"),
    (
      {"human": {}},
      r"has the key 'human'; it may have bos, default_system, system, user, assistant",
    ),
    ({"user": "Q:"}, r"'user' is 'Q:'; it must be of type dict"),
    ({"user": {"end": "x"}}, r": user has the key 'end'; it may have before, after"),
    ({"assistant": {"before": "A:"}}, r"assistant has no 'end', so no answer would ever end"),
    ({"system": None}, r"'system' is None"),
  ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, change, message):
  path = tmp_path / "bad.json"
  values = json.loads((SHIPPED / "default.json").read_text())
  path.write_text(json.dumps(values | change))
  with pytest.raises(DataError, match=rf"data.chat_template '.*bad.json'.*{message}"):
    load_template(str(path))


def test_a_file_that_is_not_there_or_no_template(tmp_path):
  with pytest.raises(DataError, match=r"'chatlm' cannot be read .* one of \['chatml', 'default'"):
    load_template("chatlm")
  (tmp_path / "bad.json").write_text("{")
  with pytest.raises(DataError, match="is not JSON"):
    load_template(str(tmp_path / "bad.json"))
  (tmp_path / "bad.json").write_text("[]")
  with pytest.raises(DataError, match=r"is \[\]; it must be an object"):
    load_template(str(tmp_path / "bad.json"))
  (tmp_path / "bad.json").write_text("{}")
  with pytest.raises(DataError, match="has no 'system'"):
    load_template(str(tmp_path / "bad.json"))


def test_the_sample_reads_as_before(tokenizer):
  """Its conversations were tokenised with these words before templates were files."""
  encoder = Encoder(tokenizer, tokens_per_image=2)
  example = encoder.encode_record(conversation("x", ["Is it?"], ["No"]))
  parts = [[1], *map(tokenizer.encode, ("USER:", " Is it?", "\n", "ASSISTANT:", " No")), [2]]
  assert [1, *example.targets.tolist()] == [i for part in parts for i in part]


@pytest.mark.parametrize("name", ["default", "llama3"])
def test_changed_templates_by_seed(tmp_path, name):
  def read(data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    load_template(str(tmp_path / "a.json")).to_json().encode()

  cases = fuzz.mutations((SHIPPED / f"{name}.json").read_bytes(), 500, seed=0)
  assert fuzz.strays(cases, read, UserError) == []
