"""Text to tokens and back, for a gateway that may hold no model weights. Knows no version, replica or socket."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from p2pfm.errors import OperatorError, Reject
from p2pfm.serving.session import Vocabulary


def read_vocabulary(config: Any, generation: Any, tokenizer: Any, num_virtual: int = 0) -> Vocabulary:
    """Sizes and end-of-text ids from a transformers config, its generation config (or None) and its tokenizer.

    `num_virtual`: positions of the context that the network's adapter takes (`AdapterConfig.num_virtual`).
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ends = {
        end
        for source in (getattr(generation, "eos_token_id", None), text.eos_token_id, tokenizer.eos_token_id)
        for end in (source if isinstance(source, list | tuple) else [source])
        if end is not None
    }
    return Vocabulary(int(text.vocab_size), frozenset(ends), int(text.max_position_embeddings) - num_virtual)


class TextCodec:
    """A backbone's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary) -> None:
        """`tokenizer`: of transformers; `vocabulary`: as `read_vocabulary` gives it."""
        self._tokenizer = tokenizer
        self.vocabulary = vocabulary

    @cached_property
    def _is_byte_level(self) -> bool:
        pieces = self._tokenizer.convert_ids_to_tokens(self._tokenizer.encode("a a", add_special_tokens=False))
        return any("\u0120" in piece for piece in pieces)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a plain text, with what the tokenizer puts at its beginning."""
        return tuple(self._tokenizer.encode(text))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Tokens of a conversation, by the backbone's chat template, up to where the assistant's answer begins.

        Raises:
            Reject: the template does not take these turns.
        """
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise Reject(f"expected turns that this model's chat template takes; it says: {error}") from error
        return self.encode_plain(text)

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, and nothing at its beginning; special tokens' names are they."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def get_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that `token` adds to a text: a character may need several tokens. A special token's name."""
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # the model has more ids than its tokenizer
            return b""
        if token in self._special:
            return piece.encode()
        if self._is_byte_level:
            return b"".join(BYTE_OF.get(character, character.encode()) for character in piece)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def _make_byte_alphabet() -> dict[str, bytes]:
    """How byte-level tokenizers (GPT-2's and most since) write a byte: itself where it can be seen, else shifted up."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in seen]
    shifted = {chr(0x100 + number): bytes([byte]) for number, byte in enumerate(hidden)}
    return {**{chr(byte): bytes([byte]) for byte in sorted(seen)}, **shifted}


BYTE_OF = _make_byte_alphabet()


def load_text_codec(backbone: str, num_virtual: int = 0) -> TextCodec:
    """The codec of the backbone in folder `backbone`, without its weights; `num_virtual` as in `read_vocabulary`.

    Raises:
        OperatorError: the folder holds no tokenizer or config.
    """
    # Imported here: a node without a backbone of transformers starts without them.
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone)
        config = AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise OperatorError(f"expected a backbone in {backbone}: {error}. Run `p2pfm models fetch` first") from error
    try:
        generation = GenerationConfig.from_pretrained(backbone)
    except OSError:  # optional: the config then names the end of text
        generation = None
    return TextCodec(tokenizer, read_vocabulary(config, generation, tokenizer, num_virtual))
