"""Who owns which block of the KV cache. Counts and lists only; the pages themselves are the model's.

A block holds the K/V of BLOCK tokens of one row, or of several rows that share a prefix. Full blocks are
named by a hash over everything before them, salted by tenant and adapter content; a freed block keeps its
name, and its contents, until somebody needs the space (least recently freed first).

    free, unnamed  ->  owned (refs >= 1)  ->  free, named  ->  owned again by a hit, or reused
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

BLOCK = 16

_encode = msgspec.msgpack.Encoder().encode


class BlockPool:
    def __init__(self, count: int, *, share_prefixes: bool = True) -> None:
        self.count = count
        self.share_prefixes = share_prefixes
        self.refs = [0] * count
        self.names: dict[int, bytes] = {}  # block -> hash
        self.named: dict[bytes, int] = {}  # hash -> block
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # next to reuse first
        self.queries = 0  # prompt tokens looked up
        self.hits = 0  # prompt tokens found

    @property
    def available(self) -> int:
        return len(self.free)

    @property
    def usage(self) -> float:
        return 1 - len(self.free) / self.count

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of one's own, or None and nothing changed."""
        if count > len(self.free):
            return None
        taken = []
        for _ in range(count):
            block, _nothing = self.free.popitem(last=False)
            self._forget(block)
            self.refs[block] = 1
            taken.append(block)
        return taken

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The longest known prefix, each block now owned once more."""
        found: list[int] = []
        for name in hashes:
            block = self.named.get(name)
            if block is None:
                break
            if self.refs[block] == 0:
                del self.free[block]
            self.refs[block] += 1
            found.append(block)
        return found

    def name(self, block: int, name: bytes) -> None:
        """Offer a full block to later rows. The first of two equal blocks keeps the name."""
        if self.share_prefixes and name not in self.named and block not in self.names:
            self.names[block] = name
            self.named[name] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back; the end of a prefix is reused before its beginning."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            assert self.refs[block] >= 0, f"block {block} was released twice"
            if self.refs[block] == 0:
                self.free[block] = None
                if block not in self.names:
                    self.free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        if name := self.names.pop(block, None):
            del self.named[name]


def block_hashes(salt: bytes, tokens: Sequence[int], known: list[bytes]) -> list[bytes]:
    """Extend `known` to the names of all full blocks of `tokens`; each covers all tokens before it."""
    for i in range(len(known), len(tokens) // BLOCK):
        previous = known[-1] if known else salt
        content = _encode(tokens[i * BLOCK : (i + 1) * BLOCK])
        known.append(
            blake2b(content, key=blake2b(previous, digest_size=32).digest(), digest_size=16).digest()
        )
    return known


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)
