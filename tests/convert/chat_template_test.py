# SPDX-License-Identifier: Apache-2.0
"""Chat templates of other models, Jinja programs as they are published, in our form."""

import pytest

from mm1_jax.convert import chat
from mm1_jax.convert.export.huggingface.jinja import to_jinja
from mm1_jax.data.template import load_template

BOS, EOS = "<s>", "</s>"
TURN = "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n'"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = "{% for message in messages %}{{ " + TURN + " }}{% endfor %}" + ASK
QWEN = (
  "{%- if messages[0].role != 'system' %}\n"
  "{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n{%- endif %}\n"
  "{%- for message in messages %}\n{{- " + TURN + " }}\n{%- endfor %}\n" + ASK
)
LLAMA3 = (
  "{{ bos_token }}{% for m in messages %}"
  "{{ '<|h|>' + m.role + '<|e|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
  "{% if add_generation_prompt %}<|h|>assistant<|e|>{{ '\\n\\n' }}{% endif %}"
)
LLAMA31 = (
  "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
  "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
  "{{- '<|h|>system<|e|>\\n\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot|>' }}"
  "{%- for m in messages %}{{- '<|h|>' + m.role + '<|e|>\\n\\n' + m.content + '<|eot|>' }}"
  "{%- endfor %}{%- if add_generation_prompt %}{{- '<|h|>assistant<|e|>\\n\\n' }}{%- endif %}"
)
MISTRAL = (
  "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
  "' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}"
  "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA2 = (
  "{% for m in messages %}{% if m.role == 'user' %}"
  "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
  "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINK = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if loop.last and m.role == "
  "'assistant' %}<think></think>{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}" + ASK
)
WHOLE = {
  "chatml": CHATML,
  "qwen": QWEN,
  "llama3": LLAMA3,
  **{f"ours {name}": to_jinja(load_template(name)) for name in ("default", "vicuna", "llama3")},
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_our_form_can_say_writes_the_same_texts(name):
  template, lost = chat.translate(WHOLE[name], BOS, EOS)
  assert template is not None, lost
  assert lost == ""
  assert template.bos == ("qwen" not in name and "chatml" not in name)
  assert template.assistant.end in ("</s>", "<|im_end|>", "<|eot|>", "<|eot_id|>")


def test_what_is_written_is_that_of_the_program():
  template, _ = chat.translate(QWEN, BOS, EOS)
  assert template is not None
  turns = [{"role": "user", "content": "Hi."}]
  assert chat.written(template, turns, True, BOS) == (
    "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  assert template.default_system == "You are Qwen."


@pytest.mark.parametrize("program", [LLAMA31, MISTRAL, LLAMA2], ids=["date", "none", "llama2"])
def test_a_system_turn_that_differs_is_told(program):
  template, lost = chat.translate(program, BOS, EOS)
  assert template is not None
  assert "system turn" in lost


@pytest.mark.parametrize(
  "program",
  [
    THINK,
    "{% for %}",
    "hello",
    "",
    "{{ messages.__class__.__mro__ }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "x" * (chat.MAX_CHARS + 1),
  ],
  ids=["think", "broken", "text", "empty", "escape", "loop", "long"],
)
def test_another_program_is_told(program):
  template, lost = chat.translate(program, BOS, EOS)
  assert template is None
  assert lost


def test_a_program_without_an_end_is_stopped(monkeypatch):
  monkeypatch.setattr(chat, "SECONDS", 5)
  loop = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
  template, lost = chat.translate(loop, BOS, EOS)
  assert template is None
  assert "did not end" in lost
