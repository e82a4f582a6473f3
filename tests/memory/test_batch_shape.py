"""A batch whose shape costs much is noted with the remedy."""

from types import SimpleNamespace

import numpy as np
import pytest

from qriemann.memory.dry_run import much_padding, packing_mask, padding_share


def arguments(**changes):
    usual = {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 8, "max_length": 2048}
    others = {"gradient_accumulation_steps": 2, "padding_free": False, "train_sampling_strategy": "random"}
    return SimpleNamespace(**{**usual, **others, **changes})


def test_a_packed_batch_whose_mask_is_large_is_noted_with_the_remedy():
    def defects(attention="sdpa", **changes):
        return [str(defect) for defect in packing_mask(arguments(**changes), attention)]

    (line,) = defects()
    # Two bytes for each of 16,384 squared pairs.
    assert "16384 x 16384 pairs under a mask of 0.50 GiB" in line
    assert "per_device_train_batch_size: 1 and gradient_accumulation_steps: 16" in line
    for changes in ({"packing": False}, {"packing_strategy": "wrapped"}, {"per_device_train_batch_size": 1}):
        assert not defects(**changes)
    assert not defects("flash_attention_2")


def test_the_share_of_padding_is_that_of_many_random_orders():
    lengths = np.random.default_rng(1).integers(1, 100, 4000)
    # The largest of 4 uniform numbers has mean 4/5 of the range, one of them 1/2.
    assert padding_share(lengths, 4) == pytest.approx(1 - (1 / 2) / (4 / 5), abs=0.01)
    assert padding_share([7] * 10, 4) == 0
    assert padding_share(lengths, 1) == 0


def test_rows_of_very_different_lengths_are_noted_once():
    def defects(lengths, **changes):
        return [str(defect) for defect in much_padding(arguments(**{"packing": False, **changes}), lengths)]

    uneven = [10, 1000] * 50
    (line,) = defects(uneven)
    assert "group_by_length" in line
    # Cut to 10 tokens the rows are alike.
    assert not defects(uneven, max_length=10)
    assert not defects([100, 110] * 50)
    for changes in (
        {"packing": True},
        {"per_device_train_batch_size": 1},
        {"train_sampling_strategy": "group_by_length"},
    ):
        assert not defects(uneven, **changes)
