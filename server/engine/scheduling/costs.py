"""What a tenant's counter rises by, in units of one computed prompt token (docs/fairness.md).

Everything is charged when it is used, and once: a row that is cancelled keeps its charges, and a preempted
one is not charged for tokens that are computed again. Rejected draft tokens are the server's own risk.
"""

COMPUTED_TOKEN = 1.0
GENERATED_TOKEN = (
    2.0  # as in the paper; a token of a decode step takes two to three times a prompt token's time
)
CACHED_TOKEN = 1 / 16  # found in the prefix cache: it takes memory, and no time
BYTES_PER_TOKEN = (
    512 << 10
)  # of adapters that are loaded: what a disk reads while a CPU computes a prompt token


def load_cost(nbytes: int) -> float:
    """Cost of loading so many bytes of adapters into a slot."""
    return nbytes / BYTES_PER_TOKEN


def step_cost_bound(max_batch_tokens: int, max_seqs: int, max_context: int) -> float:
    """The most that one step charges, its loads of adapters left out.

    All its tokens as if they were generated, one more for each row whose prompt ends in it, and one whole
    prompt that was cached.
    """
    return GENERATED_TOKEN * (max_batch_tokens + max_seqs) + CACHED_TOKEN * max_context
