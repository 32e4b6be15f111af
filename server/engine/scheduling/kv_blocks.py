"""The blocks of the KV cache: reference counts, free list and prefix cache. The pages belong to the model.

A block holds the K/V of BLOCK tokens of one row, or of several rows that share a prefix. A full block is
found in the prefix cache by a hash over its tokens and all before them, salted by tenant and adapter content.
A freed block stays in the prefix cache until it is allocated again, least recently freed first.

    free, not cached  ->  owned (refs >= 1)  ->  free, cached  ->  owned again by a hit, or reused
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
        self.hash_of: dict[int, bytes] = {}  # by block, of cached ones
        self.block_of: dict[bytes, int] = {}  # by hash: the prefix cache
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
        for hash_ in hashes:
            block = self.block_of.get(hash_)
            if block is None:
                break
            if self.refs[block] == 0:
                del self.free[block]
            self.refs[block] += 1
            matched.append(block)
        return matched

    def cache(self, block: int, hash_: bytes) -> None:
        """Put a full block into the prefix cache. Of two equal blocks the first one stays in it."""
        if self.share_prefixes and hash_ not in self.block_of and block not in self.hash_of:
            self.hash_of[block] = hash_
            self.block_of[hash_] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one owner of each block. The end of a prefix is reused before its beginning."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            assert self.refs[block] >= 0, f"block {block} was released twice"
            if self.refs[block] == 0:
                self.free[block] = None
                if block not in self.hash_of:
                    self.free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        if hash_ := self.hash_of.pop(block, None):
            del self.block_of[hash_]


def block_hashes(salt: bytes, tokens: Sequence[int], known: list[bytes]) -> list[bytes]:
    """Extend `known` to the hashes of all full blocks of `tokens`, and return it."""
    for i in range(len(known), len(tokens) // BLOCK):
        previous = known[-1] if known else salt
        content = _encode(tokens[i * BLOCK : (i + 1) * BLOCK])
        known.append(
            blake2b(content, key=blake2b(previous, digest_size=32).digest(), digest_size=16).digest()
        )
    return known


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)
