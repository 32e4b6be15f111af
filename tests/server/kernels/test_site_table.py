import torch

from server.kernels.site_table import SiteTable


def test_a_slot_tells_what_it_touches() -> None:
    table = SiteTable(["a", "b", "c"], 2, 2, torch.device("cpu"))
    table.put(2, {"c": [5, 6], "a": [1, 2]}, 8)
    assert table.rows[2].tolist() == [[1, 2], [0, 0], [5, 6]]
    assert table.among(table.masks[2]) == ["a", "c"]
    assert table.ranks == [0, 0, 8]
    table.clear(2)
    assert not table.rows.any()
    assert table.masks == [0, 0, 0]
