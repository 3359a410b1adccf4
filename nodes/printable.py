"""Text of strangers on a terminal: it can be read, and steers nothing. Knows no screen."""

import unicodedata

BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Turn around what stands beside them."""


def make_printable(text: str) -> str:
    """`text` without what would steer a terminal: control characters (but lines and tabs), and turned directions."""
    return "".join(
        "\ufffd" if character in BIDIRECTIONAL or _is_control(character) else character for character in text
    )


def _is_control(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) == "Cc"
