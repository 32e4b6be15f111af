"""What is worked out from a layout is what looking at each piece gives."""

import torch

from server.adapters.methods.affine_bank import pack_deltas, table_row
from server.adapters.methods.affine_layout import MAX_LAYOUTS, AffineDelta, LoadedSlot, SlotLayouts
from server.adapters.methods.token_spans import BIAS, MATRICES, SCALE
from server.kernels.cpu.grouped_affine import COLUMNS
from server.kernels.site_table import SiteTable

NAMES = ["q", "k", "v", "norm", "down"]


def deltas() -> list[AffineDelta]:
    return [
        AffineDelta("v", a=torch.randn(3, 8), b=torch.randn(3, 6), bias=torch.randn(6)),
        AffineDelta("norm", bias=torch.randn(8)),
        AffineDelta("q", a=torch.randn(2, 8), b=torch.randn(2, 5), factor=0.5),
        AffineDelta("down", gain=torch.randn(7), bias=torch.randn(7)),
    ]


def test_a_table_of_addresses() -> None:
    table = SiteTable(NAMES, 2, COLUMNS, torch.device("cpu"))
    packed = pack_deltas(deltas(), torch.float32)
    layout = SlotLayouts(table).of(packed.layout, 4)
    loaded = LoadedSlot(packed.flat, layout, aligned=False)
    expected = torch.zeros(len(NAMES), COLUMNS, dtype=torch.int64)
    for name, delta in loaded.deltas.items():
        expected[NAMES.index(name)] = torch.tensor(table_row(delta))
    assert torch.equal(layout.rows(packed.flat.data_ptr()), expected)
    assert layout.rank == 3
    assert layout.ways == {"v": MATRICES, "norm": BIAS, "q": MATRICES, "down": SCALE}
    assert table.among(layout.mask) == ["q", "v", "norm", "down"]
    assert table.among(layout.biased) == ["norm"]


def test_one_for_all_that_were_made_alike() -> None:
    layouts = SlotLayouts(SiteTable(NAMES, 2, COLUMNS, torch.device("cpu")))
    first, second = (pack_deltas(deltas(), torch.float32) for _ in range(2))
    assert layouts.of(first.layout, 4) is layouts.of(first.layout, 4)
    assert layouts.of(second.layout, 4) is not layouts.of(first.layout, 4)  # parse_cache.py makes them one


def test_layouts_that_come_once_do_not_displace_one_that_is_asked_for() -> None:
    layouts = SlotLayouts(SiteTable(NAMES, 2, COLUMNS, torch.device("cpu")))
    shared = pack_deltas(deltas(), torch.float32).layout
    kept = layouts.of(shared, 4)
    for _ in range(3 * MAX_LAYOUTS):
        own = pack_deltas(deltas(), torch.float32).layout
        assert layouts.of(own, 4).pieces is own
        assert layouts.of(shared, 4) is kept
