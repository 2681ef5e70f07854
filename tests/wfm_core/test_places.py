import math

import torch
from torch.nn import functional as F

from wfm_core.models.places import CENTRE, OUT_DIM, SCALE, PlaceHead, loss_of_places


def test_the_loss_by_hand():
    said = torch.zeros(1, 1, 2, OUT_DIM)  # two cells
    said[0, 0, 1] = torch.tensor([3.0, 0.0, 0.0, 0.0, -2.0, 0.5, 0.0, 0.0])  # a gripper, and perhaps a thing
    gripper, thing = torch.tensor(CENTRE) + torch.tensor([0.1, 0.0, 0.0]), torch.tensor(CENTRE)
    positions = torch.stack([gripper, thing, thing])[None, None]
    cells = torch.tensor([[[1, 1, -1]]])  # the third is out of sight
    loss, error = loss_of_places(said, positions, cells)
    # Of four logits, 0 and 0 in the first cell and 3 and -2 in the second, those of the second should be true.
    presence = 2 * math.log(2) + math.log1p(math.exp(-3)) + math.log1p(math.exp(2))
    off = (1.0 - 0.01) + (0.5 - 0.01)
    assert math.isclose(loss.item(), (presence + off) / 2, rel_tol=1e-5)
    assert math.isclose(error.item(), (1.0 + 0.5) / 2 * SCALE, rel_tol=1e-5)


def test_two_things_in_one_cell_are_there_once():
    said, positions = torch.zeros(1, 1, 1, OUT_DIM), torch.tensor(CENTRE).expand(1, 1, 3, 3)
    loss, _ = loss_of_places(said, positions, torch.zeros(1, 1, 3, dtype=torch.int64))
    assert math.isclose(loss.item(), 2 * math.log(2) / 3, rel_tol=1e-5)


def test_nothing_known_costs_nothing():
    said = torch.randn(2, 3, 4, OUT_DIM, requires_grad=True)
    loss, error = loss_of_places(said, torch.full((2, 3, 2, 3), float("nan")), torch.full((2, 3, 2), -1))
    loss.backward()
    assert loss == 0 and error == 0 and not said.grad.any()


def test_most_cells_are_said_to_hold_nothing_at_first():
    head = PlaceHead(8, 4)
    said = F.linear(torch.zeros(8), head.weight, head.bias).view(4, OUT_DIM)
    assert (said[:, [0, 4]] == -4).all() and not (said[:, [1, 2, 3, 5, 6, 7]] == -4).any()
