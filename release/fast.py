"""A pytest plugin: of each test function only a few cases, spread evenly, and of drawn calls only a few examples.

Used as `pytest -p fast --cases 3`.
"""

from collections import defaultdict

import pytest
from hypothesis import settings

EXAMPLES = 5  # of a hypothesis test, for each case


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=3, help="cases of each test function")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        groups[item.nodeid.split("[")[0]].append(item)
    for item in items:
        if own := getattr(getattr(item, "obj", None), "_hypothesis_internal_use_settings", None):
            most_examples = min(own.max_examples, EXAMPLES * config.getoption("cases"))
            item.obj._hypothesis_internal_use_settings = settings(own, max_examples=most_examples)
    kept, most = set(), config.getoption("cases")
    for group in groups.values():
        step = max(1, (len(group) - 1) / max(1, most - 1))
        kept |= {group[min(round(i * step), len(group) - 1)] for i in range(min(most, len(group)))}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
