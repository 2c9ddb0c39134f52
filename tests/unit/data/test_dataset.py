"""A prepared dataset with damaged bytes."""

import pytest

from samray.data.dataset import ImageRecord, Instance
from samray.errors import DatasetError


@pytest.mark.parametrize("counts", [b"", b"oooooooo0", b"\xff", b"01"])
def test_a_damaged_mask_is_an_error_and_no_write_out_of_bounds(counts: bytes) -> None:
    instance = Instance("cat", (0.0, 0.0, 1.0, 1.0), 1, counts)
    record = ImageRecord("photo.jpg", "photo.jpg", "0", (4, 5), (instance,), 0, 0)
    with pytest.raises(DatasetError, match=r"photo\.jpg: .* prepare it again"):
        record.decode(instance)
