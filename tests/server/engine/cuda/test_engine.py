"""The engine as it runs on a GPU, whole: on one if there is one, else on the CPU under Triton's interpreter.

Its tokens must be those of the CPU's own paths, whatever the rows' adapters are.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.kernels import token_blocks as gpu
from server.messages import AdapterRef, Generate, Sampling, Use
from tests.fixtures.engine import Driver, Stand, run
from tests.fixtures.gpu import DEVICE, needs_triton, record_by_repeating
from tests.server.engine.scores import ScoringDriver
from tests.server.engine.test_mixed_methods import kinds

pytestmark = [
    needs_triton,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # numpy's, whose 1 / inf is 0, too
]


Pair = Callable[..., tuple[Stand, Stand]]


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where engines of a kind note that their base is exact: only the first checks it, which takes long."""
    root = tmp_path_factory.mktemp("exact")

    def get(kind: str) -> Path:
        (root / kind).mkdir(exist_ok=True)
        return root / kind

    return get


@pytest.fixture
def on_gpu(
    tiny_models: Callable[[str], Path], tmp_path: Path, passed: Callable[[str], Path]
) -> Iterator[Pair]:
    """Two engines over the same model: one as on a GPU, one as on a CPU. `fused`: norms and rotary, too."""
    stands: list[Stand] = []

    def build(family: str, *, fused: bool = False) -> tuple[Stand, Stand]:
        common = {"dtype": "float32", "max_batch_tokens": 48}
        (tmp_path / "gpu" / "cache").mkdir(parents=True)
        (tmp_path / "gpu" / "cache" / "exact").symlink_to(passed(f"{family} {fused}"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "uses_triton", lambda device: True)
            if not fused and DEVICE.type == "cpu":  # programs for single tokens, which take milliseconds
                patch.setattr("server.engine.served_model.fuse_norms", lambda model: 0)
                patch.setattr("server.engine.served_model.fuse_rotary", lambda model: 0)
            ours = Stand(tiny_models(family), tmp_path / "gpu", 0, device=DEVICE.type, **common)
        if DEVICE.type == "cpu":
            ours.engine.model.graphs.record = record_by_repeating
        plain = Stand(tiny_models(family), tmp_path / "cpu", 0, device="cpu", **common)
        stands.extend([ours, plain])
        assert ours.engine.base.digest == plain.engine.base.digest
        return ours, plain

    yield build
    for each in stands:
        each.engine.close()


def command(s: Stand, i: int, adapter: AdapterRef | None, *, tokens: int = 4, **more: object) -> Generate:
    prompt = s.prompt(i, 17 if i == 2 else 3 + i % 3)  # the interpreter takes milliseconds for a program
    sampling = Sampling(max_tokens=tokens, temperature=0.0, seed=i, ignore_eos=True)
    return Generate(f"row-{i}", "tenant", prompt, sampling, adapter, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "llama",
            ("lora", "dora", "lora-norms", "bottleneck", "prefix", "prompt", "bitfit", "ia3", "ln_tuning"),
        ),
        ("gpt2", ("dora", "bitfit", "bottleneck")),
        ("gemma2", ("lora", "bottleneck", "ln_tuning")),
    ],
)
def test_rows_of_all_kinds_and_of_none(on_gpu: Pair, family: str, names: tuple[str, ...]) -> None:
    ours, plain = on_gpu(family, fused=family == "llama")
    found = [kinds(s, names) for s in (ours, plain)]
    mine, theirs = (
        [command(s, i, ref) for i, ref in enumerate([*(own[name] for name in names), None])]
        for s, own in zip((ours, plain), found, strict=True)
    )
    expected = run(plain.engine, theirs)
    assert len({tuple(done.tokens) for done in expected}) == len(expected), "rows are too alike"
    driver = Driver(ours.engine)
    for i, each in enumerate(mine):  # the second half joins while others decode
        driver.submit(each)
        if i == len(mine) // 2:
            driver.step()
    driver.finish(600)
    for done, other in zip(driver.rows.values(), expected, strict=True):
        assert done.error is None
        assert done.tokens == other.tokens
    assert ours.engine.model.digest() == ours.engine.base.digest


def test_recorded_steps_serve_whoever_comes(on_gpu: Pair) -> None:
    """Rows come and go, adapters change places, batches grow and shrink: replays, and the same tokens."""
    ours, plain = on_gpu("llama")
    graphs = ours.engine.model.graphs

    def commands(s: Stand) -> list[Generate]:
        some = kinds(s, ("bottleneck", "prefix", "dora"))
        used = [s.adapter("wide", 1, r=24), None, some["bottleneck"], some["prefix"], some["dora"]]
        return [command(s, i, ref, tokens=5 + i % 3) for i, ref in enumerate(used)]

    expected = run(plain.engine, commands(plain))
    mine = commands(ours)
    first = run(ours.engine, [mine[1], mine[3]])
    alone = graphs.replays
    assert alone, "no step of the base's was replayed"
    assert not next(iter(graphs.recorded)).traces, "rows of the base pay for adapters"
    together = run(ours.engine, [mine[0], mine[2], mine[4]])
    for done, i in zip([*first, *together], [1, 3, 0, 2, 4], strict=True):
        assert done.error is None
        assert done.tokens == expected[i].tokens, mine[i].adapter
    assert graphs.replays > alone
    (mixed,) = [variant for variant in graphs.recorded if len(variant.traces) == 2]  # linears, sub-blocks
    assert mixed.rows == 4
    assert max(trace.ranks for _, trace in mixed.traces) == 32


def test_a_recorded_step_reads_its_tables_alone(on_gpu: Pair) -> None:
    """Replays for more rows than there are, with blocks and slots that it has not seen when recorded."""
    ours, plain = on_gpu("llama")
    adapters = [[s.adapter(f"a{i}", i) for i in (1, 2, 5)] for s in (ours, plain)]
    for turn in range(2):
        mine = [command(ours, 7 * turn + i, adapters[0][(turn + i) % 3], tokens=6) for i in range(3)]
        theirs = [command(plain, 7 * turn + i, adapters[1][(turn + i) % 3], tokens=6) for i in range(3)]
        found, expected = run(ours.engine, mine), run(plain.engine, theirs)
        assert [done.tokens for done in found] == [done.tokens for done in expected]
    assert ours.engine.model.graphs.replays >= 5
    assert all(variant.rows == 4 for variant in ours.engine.model.graphs.recorded)


def test_steps_begun_ahead_serve_those_that_stay(on_gpu: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a token ends, that come later, that are drawn with penalties and tell logprobs: as if no step
    began before the tokens of the one before it were known.
    """
    monkeypatch.setattr("server.engine.cuda.cuda_graphs.RECORD_AFTER", 1)
    ours, plain = on_gpu("llama")

    def commands(s: Stand, stop: int | None) -> list[Generate]:
        knobs: list[dict[str, Any]] = [
            {"stop_token_ids": (stop,)} if stop is not None else {},
            {"temperature": 0.8, "presence_penalty": 0.7, "logprobs": 2},
            {"temperature": 0.7, "top_p": 0.8, "min_tokens": 3},
            {"logit_bias": {3: 4.0}},
        ]
        adapters = [None, s.adapter("a1", 1), None, s.adapter("a2", 2)]
        made = []
        for i, (own, ref) in enumerate(zip(knobs, adapters, strict=True)):
            sampling = Sampling(
                **({"max_tokens": 9, "temperature": 0.0, "ignore_eos": True, "seed": i} | own)
            )
            made.append(Generate(f"row-{i}", "tenant", s.prompt(i, 5), sampling, ref))
        return made

    alone = run(plain.engine, commands(plain, None)[:1])[0].tokens
    stop = next(token for i, token in enumerate(alone) if i >= 5 and token not in alone[:i])
    expected = run(plain.engine, commands(plain, stop))
    driver = Driver(ours.engine)
    for i, each in enumerate(commands(ours, stop)):
        driver.submit(each)
        if i == 1:
            for _ in range(3):
                driver.step()
    driver.submit(command(ours, 4, None, tokens=9))
    for _ in range(3):
        driver.step()
    driver.cancel("row-4")
    driver.finish(600)
    for done, other in zip(driver.rows.values(), expected, strict=False):
        assert (done.error, done.finish, done.tokens) == (None, other.finish, other.tokens)
        assert [p.logprob for p in done.logprobs] == pytest.approx(
            [p.logprob for p in other.logprobs], abs=1e-4
        )
    ahead = ours.engine.model.lookahead
    assert ahead.taken >= 15, "steps wait for each other"
    assert ahead.wasted == 2, "who ends by a token or is cancelled is computed once more, and nobody else"
    assert plain.engine.model.lookahead.taken == 0
    assert ours.engine.blocks.refs == [0] * len(ours.engine.blocks.refs)


def test_prompts_are_scored_beside_replayed_steps(on_gpu: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that ask for prompt logprobs come while steps of others are begun ahead."""
    monkeypatch.setattr("server.engine.cuda.cuda_graphs.RECORD_AFTER", 1)
    scores, tokens = [], []
    for s in on_gpu("llama"):
        refs = [None, s.adapter("a1", 1), kinds(s, ["bottleneck"])["bottleneck"]]
        driver = ScoringDriver(s.engine)
        driver.submit(command(s, 1, None, tokens=12))
        for _ in range(3):
            driver.step()
        for i, ref in enumerate(refs):
            sampling = Sampling(max_tokens=2, temperature=0.0, prompt_logprobs=2, ignore_eos=True, seed=0)
            driver.submit(Generate(f"score-{i}", "tenant", s.prompt(i, 20), sampling, ref))
        driver.finish(600)
        scores.append([driver.scores[f"score-{i}"] for i in range(len(refs))])
        tokens.append(driver.rows["row-1"].tokens)
    assert tokens[0] == tokens[1]
    for found, expected in zip(*scores, strict=True):
        assert len(found.logprobs) == 19
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert found.ranks == expected.ranks


def test_steps_ahead_where_memory_is_short(on_gpu: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lose their blocks, or get none for the token to come, say what they would have said."""
    monkeypatch.setattr("server.engine.cuda.cuda_graphs.RECORD_AFTER", 1)
    ours, plain = on_gpu("llama")

    def commands(s: Stand) -> list[Generate]:
        sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
        return [Generate(f"row-{i}", "tenant", s.prompt(i, 12), sampling) for i in range(2)]

    expected = run(plain.engine, commands(plain))
    blocks = ours.engine.blocks
    held = blocks.allocate(len(blocks.free) - 3)  # two rows of 20 tokens want four
    assert held
    found = run(ours.engine, commands(ours))
    assert [done.tokens for done in found] == [done.tokens for done in expected]
    assert ours.engine.scheduler.preemptions > 0
    assert ours.engine.model.lookahead.taken >= 8
    blocks.release(held)


def test_sums_of_adapters_take_the_plain_path(on_gpu: Pair) -> None:
    results = []
    for s in on_gpu("llama"):
        uses = (Use(s.adapter("a1", 1), 0.7), Use(s.adapter("a2", 2), -0.5))
        summed = command(s, 1, None, tokens=6, adapters=uses)
        results.append([done.tokens for done in run(s.engine, [summed, command(s, 2, uses[0].adapter)])])
        assert s.engine.model.graphs.replays == 0
    assert results[0] == results[1]


def test_a_model_that_cannot_be_recorded_runs_all_the_same(
    on_gpu: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    ours, plain = on_gpu("llama")

    def refuse(call: Callable[[], torch.Tensor]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    ours.engine.model.graphs.record = refuse  # type: ignore[assignment]
    found = run(ours.engine, [command(ours, 1, None, tokens=5)])
    assert found[0].tokens == run(plain.engine, [command(plain, 1, None, tokens=5)])[0].tokens
    assert ours.engine.model.graphs.off
    assert "not permitted" in caplog.text
