"""Text to token ids and back, for one model.

The `tokenizers` library is the reference for both directions; two short cuts make the hot path cheap, each taken only
where it gives the same result:

* **Encoding** keeps a cache of pieces.  The text is cut between a visible ASCII character and a space with an ASCII
  letter behind it.  Every pre-tokenizer in :data:`CUTTABLE` ends a pre-token there, whatever comes before and after, so
  the ids of the whole are the ids of the pieces in a row (200 words: 50 us, against 750 us).
* **Decoding** of byte-level models is a table: the text of ids in a row is the UTF-8 decoding of their bytes in a row.
  Every other decoder goes through `tokenizers.DecodeStream`.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import orjson
import tokenizers
from tokenizers.decoders import DecodeStream

LONG_TEXT = 8 * 1024
"""Characters: longer text should be encoded in a thread (8 ms here), and does not go through the pieces."""
MAX_PIECES = 8192
"""Entries of the piece cache: some 3 MB when full; it then starts anew."""
MAX_ONCE = 4096
"""Pieces met once, which nobody may meet again."""
MAX_PIECE = 64
"""Characters: the last word of a prompt carries the template's closing, some 40 characters."""
MARK = " "
"""Stands for the text's beginning or end in a piece: a word of the text cannot contain it, so nothing is mistaken."""
LIBRARY_CACHE = 512
"""Words whose ids the library remembers itself. Its own bound is 10,000, and what a pre-tokenizer does not split is one
word: texts of up to 256 characters, some kilobytes each, 40 MB of what hardly ever comes again."""
MAX_MISSES = 32
"""New pieces that one text may add: with more, the whole text is encoded in one go."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CUTTABLE = frozenset({GPT2, LLAMA3, QWEN2})
SAMPLE = (
    "Hello, world! It's 12345 o'clock: a  b\n\n c.d; <x> don't   stop\tnow, Naïve café ✓ 你好 you. And then 'quoted'\n"
)

NOTHING = array("I"), array("I")
Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class TokenizerError(ValueError):
    """A tokenizer.json that cannot be used; the message is one sentence."""


class Detokenizer(Protocol):
    """The text of one sequence, token by token. The texts joined are the decoding of all ids, specials skipped."""

    @property
    def pending(self) -> bool:
        """Whether the next token's text depends on the tokens before it."""

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""

    def finish(self) -> str:
        """What is left at the end (U+FFFD for an incomplete character)."""


class Tokenizer:
    """Loading holds the GIL (35 ms for a small vocabulary, up to a second for the largest): once a model."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises TokenizerError."""
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(tokenizer_json)
            settings: dict[str, Any] = json.loads(tokenizer_json)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            raise TokenizerError(f"the model's tokenizer cannot be used: {str(error)[:256]}") from error
        resize = getattr(self._inner.model, "_resize_cache", None)  # BPE and Unigram have one
        if resize is not None:
            resize(LIBRARY_CACHE)
        self._inner.no_truncation()
        self._inner.no_padding()
        self.vocabulary: int = self._inner.get_vocab_size(with_added_tokens=True)
        added = self._inner.get_added_tokens_decoder()
        self._special = {token for token, entry in added.items() if entry.special}
        self._pieces: dict[str, bytes] = {}
        self._once: set[str] = set()
        """Pieces met once."""
        self._cuttable = _is_cuttable(settings, added.values()) and self._cuts_sample()
        self._around = (
            self._ids_around() if self._cuttable and _adds_around(settings.get("post_processor") or {}) else None
        )
        """What ``special`` puts before and behind a text's ids, where it does no more than that."""
        self._bytes_of = _byte_decoder(settings)
        self.escaped: dict[int, bytes] = {}
        """JSON-escaped text, without quotes, of ids seen so far that are whole characters; byte-level models only."""
        self._raw: dict[int, bytes] = {}

    # ---- encoding

    def encode(self, text: str, special: bool) -> array[int]:
        """Token ids (u32). ``special`` adds what the model's post-processor adds, such as a leading BOS.

        Any thread may call it; the library lets go of the GIL.
        """
        around = self._around if special else NOTHING
        if not self._cuttable or around is None or len(text) > LONG_TEXT:
            return self._encode_whole(text, special)
        before, behind = around
        return before + self._encode_pieces(text) + behind

    def _encode_whole(self, text: str, special: bool) -> array[int]:
        return array("I", self._inner.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def _encode_pieces(self, text: str) -> array[int]:
        words = text.split(" ")
        words[0] = MARK + words[0]
        words[-1] += MARK
        found = list(map(self._pieces.get, words))
        missing = found.count(None)
        if missing > MAX_MISSES:
            self._learn_some(words, found)
            return self._encode_whole(text, False)
        if missing:
            self._complete(words, found)
        ids = array("I")
        ids.frombytes(b"".join(found))  # type: ignore[arg-type]
        return ids

    def _complete(self, words: list[str], found: list[bytes | None]) -> None:
        """Encode what is missing, together with the words that no cut parts it from."""
        position = 0
        while None in found:
            position = found.index(None, position)
            start, end = position, position + 1
            while start > 0 and not _is_cut(words[start - 1], words[start]):
                start -= 1
            while end < len(words) and not _is_cut(words[end - 1], words[end]):
                end += 1
            found[start:end] = [self._piece(" ".join(words[start:end])), *[b""] * (end - start - 1)]
            position = end

    def _piece(self, piece: str) -> bytes:
        """The ids of words between two cuts, with the space before them, or a mark for an end of the text."""
        ids = self._pieces.get(piece)
        if ids is None:
            text = piece[1:] if piece[0] == MARK else " " + piece
            ids = self._encode_whole(text.removesuffix(MARK), False).tobytes()
            if len(piece) <= MAX_PIECE:
                self._keep(piece, ids)
        return ids

    def _keep(self, piece: str, ids: bytes) -> None:
        """From its second time on: numbers and names that come once would else push the words out."""
        if piece not in self._once:
            if len(self._once) >= MAX_ONCE:
                self._once.clear()
            self._once.add(piece)
            return
        self._once.discard(piece)
        if len(self._pieces) >= MAX_PIECES:
            self._pieces.clear()
        self._pieces[piece] = ids

    def _learn_some(self, words: list[str], found: list[bytes | None]) -> None:
        """A text of many new words is encoded as a whole; a few of them are there the next time."""
        for word in [word for word, ids in zip(words, found, strict=True) if ids is None][-MAX_MISSES:]:
            if _is_cut("x", word) and _is_cut(word, "x"):
                self._piece(word)

    def _cuts_sample(self) -> bool:
        same = self._encode_pieces(SAMPLE) == self._encode_whole(SAMPLE, False)
        self._once.clear()
        return same

    def _ids_around(self) -> tuple[array[int], array[int]] | None:
        plain, whole = self._encode_whole(SAMPLE, False), self._encode_whole(SAMPLE, True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return None

    # ---- decoding

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of all ids, specials skipped."""
        if self._bytes_of is not None:
            return b"".join(map(self.raw, tokens)).decode("utf-8", "replace")
        return self._inner.decode(list(tokens), skip_special_tokens=True)

    def is_special(self, token: int) -> bool:
        return token in self._special

    def detokenizer(self) -> Detokenizer:
        return StreamDetokenizer(self._inner) if self._bytes_of is None else ByteDetokenizer(self)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id by itself, specials by their name; empty for an id that is not in the vocabulary."""
        name = self._inner.id_to_token(token)
        if name is None:
            return b""
        if self._bytes_of is None or token in self._special:
            return name.encode() if token in self._special else self._inner.decode([token]).encode()
        return self._bytes_of(name)

    def raw(self, token: int) -> bytes:
        """Byte-level models: what the id adds to the text's bytes; specials add none. Fills :attr:`escaped` too."""
        found = self._raw.get(token)
        if found is None:
            found = self._raw[token] = b"" if token in self._special else self.token_bytes(token)
            with contextlib.suppress(UnicodeDecodeError):  # part of a character: only its neighbours tell
                self.escaped[token] = orjson.dumps(found.decode())[1:-1]
        return found


class ByteDetokenizer:
    """For byte-level models; ``pending`` says that the bytes so far end within a character."""

    __slots__ = ("_raw", "_utf8", "pending")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._raw = tokenizer.raw
        self._utf8: codecs.IncrementalDecoder | None = None
        """Made when first needed: most texts have no character that is cut between tokens."""
        self.pending = False

    def push(self, token: int) -> str:
        data = self._raw(token)
        if self._utf8 is None:
            try:
                return data.decode()
            except UnicodeDecodeError:
                self._utf8 = Utf8Decoder("replace")
        text = self._utf8.decode(data)
        self.pending = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        self.pending = False
        return "" if self._utf8 is None else self._utf8.decode(b"", final=True)


class StreamDetokenizer:
    """For every other decoder. ``pending`` is always true: no table can tell a token's text without its neighbours."""

    __slots__ = ("_emitted", "_ids", "_inner", "_stream")
    pending = True

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._emitted = 0

    def push(self, token: int) -> str:
        self._ids.append(token)
        try:
            text = self._stream.step(self._inner, token) or ""
        except Exception:  # it gives up when a decoder rewrites earlier text: then the whole says what is new
            return self.finish()
        self._emitted += len(text)
        return text

    def finish(self) -> str:
        whole = self._inner.decode(self._ids, skip_special_tokens=True)
        text, self._emitted = whole[self._emitted :], max(self._emitted, len(whole))
        return text


def _is_cut(before: str, after: str) -> bool:
    """Whether the space between two words is a cut. Only words with one on both sides are looked up by themselves."""
    return "!" <= before[-1:] <= "~" and after[:1].isascii() and after[:1].isalpha()


def _is_cuttable(settings: dict[str, Any], added: Any) -> bool:
    """Whether cutting as :func:`_is_cut` says leaves the ids unchanged, told from the tokenizer's declared parts."""
    if (settings.get("model") or {}).get("type") != "BPE" or (settings.get("normalizer") or {}).get(
        "type", "NFC"
    ) != "NFC":
        return False
    if any(entry.lstrip or entry.rstrip or entry.single_word or " " in entry.content for entry in added):
        return False
    if (settings["model"]).get("dropout"):
        return False
    step = settings.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    splits = [_splits_at_cut(step) for step in steps]
    return None not in splits and any(splits)


def _adds_around(step: dict[str, Any]) -> bool:
    """Whether a post-processor leaves the text's ids in a row, with the same ones before and behind every text."""
    kind = step.get("type")
    if kind == "Sequence":
        return all(map(_adds_around, step["processors"]))
    if kind == "TemplateProcessing":
        return sum("Sequence" in piece for piece in step["single"]) == 1
    return kind in (None, "ByteLevel")


def _splits_at_cut(step: dict[str, Any]) -> bool | None:
    """True: ends a pre-token at every cut; False: keeps what is; None: not known to be independent of the context."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return None if step.get("add_prefix_space", True) else bool(step.get("use_regex", True))
    if kind == "Split":
        plain = step.get("behavior") == "Isolated" and not step.get("invert")
        return True if plain and (step.get("pattern") or {}).get("Regex") in CUTTABLE else None
    return False if kind == "Digits" else None


def _byte_decoder(settings: dict[str, Any]) -> Callable[[str], bytes] | None:
    """What a vocabulary entry adds to the text's bytes, if the decoder is byte-level; else None."""
    if (settings.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    table = {char: byte for byte, char in enumerate(byte_chars())}

    def to_bytes(name: str) -> bytes:
        try:
            return bytes([table[char] for char in name])
        except KeyError:  # an added token, written as it is
            return name.encode()

    return to_bytes


def byte_chars() -> list[str]:
    """GPT-2's printable stand-ins: the character for each byte value 0 .. 255."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = (chr(256 + count) for count in range(256))
    return [chr(byte) if byte in plain else next(rest) for byte in range(256)]
