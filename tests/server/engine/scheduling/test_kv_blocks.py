import pytest

from server.engine.scheduling.kv_blocks import BLOCK, BlockPool, block_hashes


def named(pool: BlockPool, tokens: list[int], salt: bytes = b"a") -> list[int]:
    """A row's blocks, computed and offered."""
    names = block_hashes(salt, tokens, [])
    blocks = pool.allocate(len(names))
    assert blocks is not None
    for block, name in zip(blocks, names, strict=True):
        pool.cache(block, name)
    return blocks


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(5) is None
    assert pool.available == 4
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    pool.release(blocks)
    assert pool.available == 4


def test_a_freed_prefix_is_found_again_and_shared() -> None:
    pool = BlockPool(8)
    tokens = list(range(3 * BLOCK))
    blocks = named(pool, tokens)
    names = block_hashes(b"a", tokens, [])
    assert pool.match(names) == blocks  # while owned: shared
    pool.release(blocks)
    pool.release(blocks)
    assert pool.available == 8
    assert pool.match(names) == blocks  # while free: revived
    assert pool.available == 5


def test_names_depend_on_salt_and_on_everything_before() -> None:
    tokens = list(range(3 * BLOCK))
    ours = block_hashes(b"a", tokens, [])
    assert set(ours).isdisjoint(block_hashes(b"b", tokens, []))
    other = block_hashes(b"a", [99, *tokens[1:]], [])
    assert set(ours).isdisjoint(other)
    assert block_hashes(b"a", tokens, ours[:1]) == ours


def test_reuse_forgets_the_end_of_a_prefix_before_its_beginning() -> None:
    pool = BlockPool(3)
    tokens = list(range(3 * BLOCK))
    pool.release(named(pool, tokens))
    assert pool.allocate(1) is not None
    assert len(pool.match(block_hashes(b"a", tokens, []))) == 2


def test_unnamed_blocks_are_reused_before_named_ones() -> None:
    pool = BlockPool(4)
    tokens = list(range(2 * BLOCK))
    prefix = named(pool, tokens)
    own = pool.allocate(2)
    assert own is not None
    pool.release(prefix)
    pool.release(own)
    assert pool.allocate(2) is not None
    assert len(pool.match(block_hashes(b"a", tokens, []))) == 2


def test_sharing_can_be_off() -> None:
    pool = BlockPool(4, share_prefixes=False)
    tokens = list(range(2 * BLOCK))
    pool.release(named(pool, tokens))
    assert pool.match(block_hashes(b"a", tokens, [])) == []


def test_a_double_release_is_our_bug() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)
