import math

import torch

from wfm_core.models.places import HEIGHT, OUT_DIM, PlaceHead, loss_of_places


def test_the_loss_by_hand():
    said = torch.zeros(1, 1, 1, 2, OUT_DIM)  # two cells side by side
    said[..., 1, :] = torch.tensor([3.0, 0.25, 0.0, 0.0, -2.0, 0.0, 0.0, 0.5])  # a gripper, and perhaps a thing
    gripper, thing, unseen = [0.75, 0.5, 0.0], [0.8, 0.5, HEIGHT], [1.2, 0.5, 0.0]
    loss, distance = loss_of_places(said, torch.tensor([[[gripper, thing, unseen]]]))
    # Of four logits, 0 and 0 in the first cell and 3 and -2 in the second, those of the second should be true.
    presence = 2 * math.log(2) + math.log1p(math.exp(-3)) + math.log1p(math.exp(2))
    off = (0.25 - 0.01) + (0.1 - 0.01) + (0.5 - 0.01)
    assert math.isclose(loss.item(), (presence + off) / 2, rel_tol=1e-5)
    assert math.isclose(distance.item(), (0.25 + 0.1) / 2, rel_tol=1e-5)


def test_two_things_in_one_cell_are_there_once():
    loss, _ = loss_of_places(torch.zeros(1, 1, 1, 1, OUT_DIM), torch.tensor([0.5, 0.5, 0.0]).expand(1, 1, 3, 3))
    assert math.isclose(loss.item(), 2 * math.log(2) / 3, rel_tol=1e-5)


def test_nothing_known_costs_nothing():
    said = torch.randn(2, 3, 2, 2, OUT_DIM, requires_grad=True)
    loss, distance = loss_of_places(said, torch.full((2, 3, 2, 3), float("nan")))
    loss.backward()
    assert loss == 0 and distance == 0 and not said.grad.any()


def test_most_cells_are_said_to_hold_nothing_at_first():
    head = PlaceHead(8, 4)
    said = head(torch.randn(8)).view(4, OUT_DIM)
    assert (said[:, [0, 4]] == -4).all() and not said[:, [1, 2, 3, 5, 6, 7]].any()
