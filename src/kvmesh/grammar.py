"""Structured output: the grammars that a client may send, and what is wrong with one.

Knows no model, no token and no worker: whether a grammar can be used at all is the same everywhere. Router and workers
ask here, so that a client hears the same words from both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmesh.errors import Unavailable
from kvmesh.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_GRAMMAR_BYTES = 1 << 16


def problem(grammar: Grammar) -> str:
    """What is wrong with `grammar`, in one line; empty if nothing is. A huge grammar takes up to a second.

    Raises:
        Unavailable: the package llguidance is not installed.
    """
    if len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
        return f"must be of at most {MAX_GRAMMAR_BYTES} bytes"
    matcher = _matcher()
    try:
        message = matcher.validate_grammar(source(grammar))
    except ValueError as error:
        message = str(error)
    if not message or message.startswith("WARNING"):
        return ""
    return f"cannot be used: {' '.join(message.split())[:300]}"


def source(grammar: Grammar) -> str:
    """The grammar as llguidance reads it.

    Raises:
        ValueError: a schema that is not JSON.
        Unavailable: the package llguidance is not installed.
    """
    matcher = _matcher()
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return matcher.grammar_from_json_schema(grammar.text)
        case GrammarKind.REGEX:
            return matcher.grammar_from_regex(grammar.text)
        case GrammarKind.LARK:
            return matcher.grammar_from_lark(grammar.text)


def _matcher() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise Unavailable("structured output needs the package llguidance: pip install 'kvmesh[all]'") from error
    return LLMatcher
