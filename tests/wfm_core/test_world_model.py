import torch

from wfm_core.world_model import merge_rows, repeat_rows


def state(offset: float) -> dict:
    return {"a": torch.arange(3.0) + offset, "b": torch.arange(12).view(3, 2, 2) + int(offset)}


def test_repeated_rows_stand_next_to_each_other():
    repeated = repeat_rows(state(0), 2)
    assert repeated["a"].tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(repeated["b"][3], state(0)["b"][1])


def test_merging_takes_masked_rows_from_the_new_state_and_leaves_its_inputs():
    old, new = state(0), state(100)
    old["a"][0] = float("nan")
    merged = merge_rows(torch.tensor([False, True, False]), new, old)
    assert merged["a"][0].isnan() and merged["a"][1:].tolist() == [101, 2]
    assert merged["b"][:, 0, 0].tolist() == [0, 104, 8]
    assert old["a"][1] == 1 and new["a"][0] == 100
