# SPDX-License-Identifier: Apache-2.0
"""The Penn Treebank tokenizer of captions, after the Java program that coco-caption runs.

That is Stanford CoreNLP 3.4.1's PTBTokenizer with -lowerCase, and coco-caption's removal of
punctuation. Its rules are some 500 lines of automata; these are the ones that captions need, and
`python -m bench.metrics_peers` counts where the two differ.
"""

import re
import unicodedata

from mm1_jax.eval.metrics.limits import cut

# Brackets are removed under their names in capitals, but tokens are in lower case: they stay.
_REMOVED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {
  "(": "-lrb-",
  ")": "-rrb-",
  "[": "-lsb-",
  "]": "-rsb-",
  "{": "-lcb-",
  "}": "-rcb-",
}
_REPLACED = _BRACKETS | {
  "\u2018": "`",
  "\u201b": "`",
  "\u2019": "'",
  "\u201c": "``",
  "\xab": "``",
  "\u201d": "''",
  "\xbb": "''",
  '"': "''",
  "\xa2": "cents",
  "\xa3": "#",
  "\u20ac": "$",
  "\xbc": "1/4",
  "\xbd": "1/2",
  "\xbe": "3/4",
  "&lt;": "<",
  "&gt;": ">",
  "&amp;": "&",
  "&quot;": "''",
  "&apos;": "'",
  "&nbsp;": "",
}
# Words that keep their full stop, wherever they are.
_ABBREVIATIONS = """
  jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri mr mrs ms mmes
  messrs drs dr prof rev hon pres gov gen col lt sgt maj capt cpl sen rep reps sens adm st ste mt ft
  jr sr bros inc cos corp ltd co vs etc al seq sq bldg pl dept ave blvd rd ala ariz ark calif colo
  conn del fla ga ill ind kan ky la md mich minn mo mont neb nev okla ore pa penn tenn tex va vt
  wash wis wyo ph alex wm jos assn
"""
_WITH_STOP = set(_ABBREVIATIONS.split())
_BEFORE_DIGITS = {"no", "nos", "fig", "figs", "pp", "p"}
# A capital letter and a full stop are an initial, unless a word follows that begins a sentence.
_SENTENCE = re.compile(
  r"\s*(?:$|(?:A|About|According|After|An|As|At|But|He|Her|Here|However|If|In|It|Last|Many|More|Now"
  r"|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What"
  r"|When|While|Yet|You)\b)"
)
_A = r"[^\W_\xb2\xb3\xb9\xbc-\xbe\u2070-\u209f]"  # a letter or digit, not above or below the line
_TOKEN = re.compile(
  rf"""
  (?P<tag></?[A-Za-z!][^<>]*>)
  | (?P<address>https?://[^\s<>|()"]*[^\s<>|()".,;:!?']
      | [^\W_][^\s<>|()"@]{{0,99}}@\w+(?:[.-]\w+)*)
  | (?P<entity>&\#?\w{{1,9}};)
  | (?P<ellipsis>\.{{3}}|\u2026|(?:\.\ ){{2}}\.)
  | (?P<dash>-{{2,}}|[\u2013-\u2015])
  | (?P<marks>[?!]{{2,}})
  | (?P<name>[@\#][^\W\d_]\w*)
  | (?P<acronym>(?:[^\W\d_]\.)+[^\W\d_]\.(?!\w) | Ph\.D\. | [A-Z]+[&+][A-Z]+(?!\w) | C(?:\+\+|\#))
  | (?P<dollar>(?:[A-Z][A-Za-z]{{0,20}})?\$)
  | (?P<fraction>(?:\d{{1,4}}-)?\d{{1,4}}/\d{{1,4}}(?![\w/]))
  | (?P<paths>[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}){{1,2}}(?!\w))
  | (?P<number>(?:\+|(?<!\w)-|(?<!\w))(?:\d+(?:[.,:]\d+)+(?:-{_A}+)*
      | \d+(?![\w-]) | [.,]\d+(?:[.,:]\d+)*)
      | \.\d+(?:[.,:]\d+)*)
  | (?P<year>(?<!\w)['\u2019]\d\ds?(?!\w))
  | (?P<clitic>['\u2019](?:s|m|d|ll|re|ve)(?!\w))
  | (?P<word>{_A}(?:{_A}|_(?={_A})|-(?={_A})|['\u2019](?={_A})
      |(?<=[^\W\d_])\.(?=[^\W\d_]))*)
  | (?P<face>[:;=]-?[()\[\]DP](?!\w))
  | (?P<other>\S)
  """,
  re.VERBOSE,
)
_TWO_WORDS = re.compile(r"(can)(not)|(gon|wan)(na)|(got)(ta)|(gim|lem)(me)|(more)('n)|(y')(all)")
_CLITIC = re.compile(r"(n't|'(?:s|m|d|ll|re|ve))$")


def ptb_tokenize(text: str) -> list[str]:
  """Returns the tokens of a caption, in lower case and without punctuation.

  Only the first `limits.LONGEST` characters are read. A final full stop after one letter belongs to
  the letter or not in the Java program according to the next line of its file; here it does not.
  """
  tokens, end, text = [], 0, cut(text)
  while match := _TOKEN.search(text, end):
    token, end, kind = match[0], match.end(), match.lastgroup
    if kind == "word":
      if text[end : end + 1] == "." and _keeps_stop(token, text, end + 1):
        token, end = f"{token}.", end + 1
      tokens += _parts(token.lower())
    elif kind == "clitic":
      tokens.append(f"'{token[1:].lower()}")
    elif kind == "face":
      tokens.append("".join(_BRACKETS.get(c, c) if c in "()" else c for c in token.lower()))
    elif kind == "ellipsis" or kind == "dash":
      continue  # removed as punctuation
    elif kind != "other" or _is_known(token):
      tokens.append(_REPLACED.get(token, token.lower()))
  return [token for token in tokens if token and token not in _REMOVED]


def _is_known(character: str) -> bool:
  """Whether the Java program knows it: no control character, half a pair, or beyond 16 bits."""
  return unicodedata.category(character)[0] != "C" and character < "\U00010000"


def _keeps_stop(word: str, text: str, after: int) -> bool:
  """Whether the full stop in front of `text[after:]` belongs to the word."""
  if text[after : after + 1].isalnum():
    return False
  if len(word) == 1 and word.isascii() and word.isalpha():
    return not _SENTENCE.match(text, after)
  following = text[after : after + 2].strip()[:1]
  return word.lower() in _WITH_STOP or (word.lower() in _BEFORE_DIGITS and following.isdigit())


def _parts(word: str) -> list[str]:
  plain = word.replace("\u2019", "'")
  if two := _TWO_WORDS.fullmatch(plain):
    return [part for part in two.groups() if part]
  ends: list[str] = []
  while len(ends) < 2 and (clitic := _CLITIC.search(plain[-4:])):  # I'd've has two
    length = len(clitic[0])
    ends.insert(0, plain[-length:])
    word, plain = word[:-length], plain[:-length]
  return [word, *ends] if word else ends
