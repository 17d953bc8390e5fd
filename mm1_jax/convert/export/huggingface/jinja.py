# SPDX-License-Identifier: Apache-2.0
"""Our chat templates as Jinja, for programs that render a conversation to one text.

Ids made of that text may differ from training's where two pieces of text meet, and what a user
types may look like a control symbol; the processor's `apply_chat_template` has neither problem.
"""

import json

from mm1_jax.data.sources import ROLES
from mm1_jax.data.template import ChatTemplate
from mm1_jax.data.tokenizer import IMAGE

# {role: {before, space, end, after}}; the space joins a text, not a picture.
_TEMPLATE = """\
{{%- set markup = {markup} -%}}
{bos}{default_system}{{%- for message in messages -%}}
{{%- set m = markup[message['role']] -%}}
{{{{- m['before'] -}}}}
{{%- if message['content'] is string -%}}
{{{{- m['space'] + message['content'] -}}}}
{{%- else -%}}
{{%- for item in message['content'] -%}}
{{%- if item['type'] == 'text' -%}}
{{{{- (m['space'] if loop.first else '') + item['text'] -}}}}
{{%- else -%}}
{{{{- '{image}' -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{{{- m['end'] -}}}}
{{%- if message['role'] != 'assistant' or not loop.last -%}}
{{{{- m['after'] -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- markup['assistant']['before'] -}}}}
{{%- endif -%}}
"""


def to_jinja(template: ChatTemplate, picture: str = IMAGE) -> str:
  """Returns the template as Jinja, with `picture` in the place of each picture."""
  markup = {}
  for role in ROLES:
    own = template.markup(role)
    before = own.before.removesuffix(" ")
    markup[role] = {"before": before, "space": own.before[len(before) :]}
    markup[role] |= {"end": own.end, "after": own.after}
  default = ""
  if template.default_system:
    system = template.system
    text = json.dumps(system.before + template.default_system + system.after)
    default = f"{{%- if messages[0]['role'] != 'system' -%}}{{{{- {text} -}}}}{{%- endif -%}}\n"
  return _TEMPLATE.format(
    markup=json.dumps(markup),
    bos="{{- bos_token -}}\n" if template.bos else "",
    default_system=default,
    image=picture,
  )
