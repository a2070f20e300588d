"""A pytest plugin: of each test function only a few of its cases, spread evenly. `pytest -p fast --cases 3`."""

from collections import defaultdict

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=3, help="cases of each test function")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        groups[item.nodeid.split("[")[0]].append(item)
    kept, most = set(), config.getoption("cases")
    for group in groups.values():
        step = max(1, (len(group) - 1) / max(1, most - 1))
        kept |= {group[min(round(i * step), len(group) - 1)] for i in range(min(most, len(group)))}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
