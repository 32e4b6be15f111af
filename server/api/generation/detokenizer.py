"""Incremental detokenisation: the text of tokens as they arrive."""

import codecs

from server.base_model.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


def detokenizer(tokenizer: Tokenizer, *, special: bool = False, markers: bool = False) -> "Detokenizer":
    """A new Detokenizer for one choice, which shows special tokens: all (`special`), or those that mark calls
    (`markers`).
    """
    if special:
        pieces = tokenizer.all_pieces
    else:
        pieces = tokenizer.pieces_with_markers if markers else tokenizer.pieces
    return (_ByteLevel if tokenizer.byte_level else _ByteFallback)(pieces)


class Detokenizer:
    """Tokens in, text out, each token decoded once; the texts joined are the decoding of all tokens.

    The text continues a prompt, so a leading space is kept; tokenizers strip it for SentencePiece models.
    """

    def __init__(self, pieces: list[bytes | str]) -> None:
        self._pieces = pieces

    def push(self, token: int) -> str:
        """The text that is complete now; "" within a character and for a special token that is not shown."""
        piece = self._pieces[token] if 0 <= token < len(self._pieces) else b""
        return self._add(piece) if piece else ""

    def flush(self) -> str:
        """The remaining text; an incomplete character becomes U+FFFD."""
        raise NotImplementedError

    def _add(self, piece: bytes | str) -> str:
        raise NotImplementedError


class _ByteLevel(Detokenizer):
    """Every piece is bytes of one UTF-8 stream."""

    def __init__(self, pieces: list[bytes | str]) -> None:
        super().__init__(pieces)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def _add(self, piece: bytes | str) -> str:
        return self._decoder.decode(piece if isinstance(piece, bytes) else piece.encode())

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteFallback(Detokenizer):
    """Pieces are text; a run of byte tokens is a string if it is UTF-8, else U+FFFD for each byte.

    That is known only at the end of a run, so its bytes are buffered until then.
    """

    def __init__(self, pieces: list[bytes | str]) -> None:
        super().__init__(pieces)
        self._run = bytearray()

    def _add(self, piece: bytes | str) -> str:
        if isinstance(piece, bytes):
            self._run += piece
            return ""
        return self.flush() + piece

    def flush(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)
