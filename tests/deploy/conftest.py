"""Options of the live test, by hand: pytest tests/deploy --load-seconds 120 --plots docs/dashboards"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--load-seconds", type=float, help="how long the live test's tenants work")
    parser.addoption("--plots", metavar="FOLDER", help="draw what the live test's Prometheus recorded")
