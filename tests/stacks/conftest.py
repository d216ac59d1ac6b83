"""What other packages warn of, which they alone can mend. Everything else is an error, as usual."""

from pathlib import Path

import pytest

FOREIGN = [
    # Lightning asks torch for a class of old, and has advice for larger runs.
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:Be aware that when using .ckpt_path., callbacks",
    # Lightning schedules the learning rate after a step that a scaler has skipped, too.
    "ignore:Detected call of .lr_scheduler.step",
    # PEFT and TRL call something of transformers by its name of old.
    "ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for warning in FOREIGN:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture
def codes_of_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """States in 8 bits, where they are asked for, of the small models of these tests, too."""
    monkeypatch.setattr("fusedopt._codes.MIN_ELEMENTS", 1)
