"""Parameters that are sharded by rows get the same bits from any number of processes."""

from pathlib import Path

import pytest

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from support import sharded  # noqa: E402


@pytest.mark.cpu_only
@pytest.mark.unsanitized  # what each process steps are ordinary tensors
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_bits_do_not_depend_on_the_number_of_processes(world: int, tmp_path: Path) -> None:
    """With rows of even and of odd length, uneven and empty shards, in every setting: stochastic
    rounding draws by an element's place in the whole tensor.
    """
    alone = sharded.bits_of_all(mesh=None)
    for rank in sharded.evaluate_on_ranks(tmp_path / "ranks", world, "bits_of_all(mesh)"):
        assert rank == alone
