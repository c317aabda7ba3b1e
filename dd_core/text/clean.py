"""Cleaning of captions for T5, as LlamaGen's text models had them cleaned in training.

A caption of the web is full of things that no picture shows: links, file names, sizes, offers, ids. Each
rule below is a pattern and what stands in its place; they run in order, twice, because one rule
may uncover another's match. `ftfy` mends broken encodings where it is installed (the extra `t5`).
"""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from importlib.util import find_spec
from urllib.parse import unquote_plus

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d\u1806\u2043"
_MARKS = r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~\)\(\]\[\}\{\|\\/\*]"

# In front of the mending of encodings.
_FIRST = (
    (r"<person>", "person"),
    # A link ends where its path does: what follows a question mark stays, as in the reference.
    (r"\b(?:https?:(?:/{1,3}|[a-z0-9%])|[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)\b/?)[\w./:%-]*", ""),
    (r"\bwww\.[\w./:%-]*", ""),
)
_SECOND = (
    (r"@[\w\d]+\b", ""),
    # Scripts of China, Japan and Korea, block by block.
    (r"[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+", ""),
    (f"[{_DASHES}]+", "-"),
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (r"\S+\.(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (_MARKS + "+", " "),
    (r"\s+\.\s+", " "),
)
_MANY_JOINTS = re.compile(r"[-_]")
_LAST = (
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-z]+\d+[a-z]+\b", ""),
    (r"\b\d+[a-z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d+[a-z]+\d+[a-z]+\d+\b|\b[a-z]+\d+[a-z]+\d*\b|\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", " "),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_ENDS = ((r"^[\"'](.+)[\"']$", r"\1"), (r"^['_,\-:;]", ""), (r"['_,\-:+]$", ""), (r"^\.\S+$", ""))


class _Text(HTMLParser):
    """The text of a caption without its tags."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def parse_marked_section(self, i: int, report: int = 1) -> int:  # noqa: ARG002
        """`<![`, behind which Python's parser raises AssertionError for what it does not know: a comment up
        to `>`, as browsers have it; −1 where none comes.
        """
        return self.rawdata.find(">", i) + 1 or -1


def clean_caption(text: str) -> str:
    """The caption as T5 is to read it; may be empty."""
    return clean_once(clean_once(text))


def clean_once(text: str) -> str:
    """One of the two passes of `clean_caption`."""
    text = _rules(unquote_plus(text).strip().lower(), _FIRST)
    parser = _Text()
    parser.feed(text)
    parser.close()
    text = _rules("".join(parser.parts), _SECOND)
    if len(_MANY_JOINTS.findall(text)) > 3:
        text = _MANY_JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(_mended(text))).strip()
    return _rules(_rules(text, _LAST).strip(), _ENDS).strip()


def _rules(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, instead in rules:
        text = re.sub(pattern, instead, text)
    return text


def _mended(text: str) -> str:
    if find_spec("ftfy") is None:
        return text
    import ftfy

    mended: str = ftfy.fix_text(text)
    return mended
