"""The blocks of the KV cache: reference counts, free list and prefix cache. The pages belong to the model.

A block holds the K/V of BLOCK tokens of one row, or of several rows that share a prefix. The name of a full
block is a hash over its tokens and all before them, salted by tenant and adapter content. A freed block keeps
its name and its contents until it is allocated again, least recently freed first.

    free, unnamed  ->  owned (refs >= 1)  ->  free, named  ->  owned again by a hit, or reused
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

BLOCK = 16

_encode = msgspec.msgpack.Encoder().encode


class BlockPool:
    """`count` blocks. `share_prefixes` enables the prefix cache."""

    def __init__(self, count: int, *, share_prefixes: bool = True) -> None:
        self.count = count
        self.share_prefixes = share_prefixes
        self.refs = [0] * count  # rows that own each block
        self.names: dict[int, bytes] = {}  # block -> hash
        self.named: dict[bytes, int] = {}  # hash -> block
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # in order of reuse
        self.queries = 0  # prompt tokens looked up
        self.hits = 0  # prompt tokens found

    @property
    def available(self) -> int:
        return len(self.free)

    @property
    def usage(self) -> float:
        return 1 - len(self.free) / self.count

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one owner; None, and nothing has changed, if fewer are free."""
        if count > len(self.free):
            return None
        allocated = []
        for _ in range(count):
            block, _ = self.free.popitem(last=False)
            self._forget(block)
            self.refs[block] = 1
            allocated.append(block)
        return allocated

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `hashes`; each gets one more owner."""
        matched: list[int] = []
        for name in hashes:
            block = self.named.get(name)
            if block is None:
                break
            if self.refs[block] == 0:
                del self.free[block]
            self.refs[block] += 1
            matched.append(block)
        return matched

    def name(self, block: int, name: bytes) -> None:
        """Put a full block into the prefix cache. Of two equal blocks the first one stays in it."""
        if self.share_prefixes and name not in self.named and block not in self.names:
            self.names[block] = name
            self.named[name] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one owner of each block. The end of a prefix is reused before its beginning."""
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
    """Extend `known` to the names of all full blocks of `tokens`, and return it."""
    for i in range(len(known), len(tokens) // BLOCK):
        previous = known[-1] if known else salt
        content = _encode(tokens[i * BLOCK : (i + 1) * BLOCK])
        known.append(
            blake2b(content, key=blake2b(previous, digest_size=32).digest(), digest_size=16).digest()
        )
    return known


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)
