"""What other packages warn of, which they alone can mend. Everything else is an error, as usual."""

from pathlib import Path

import pytest

FOREIGN = [
    # PEFT asks transformers for an attribute of old.
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for warning in FOREIGN:
                item.add_marker(pytest.mark.filterwarnings(warning))
