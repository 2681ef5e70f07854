"""Training in several processes: accelerate starts and joins them, FSDP2 shares out what training must remember.

Each process keeps a part of every weight, gradient, moment and average, and gathers a block's weights while it computes
with them. accelerate refuses to shard on CPUs, so torch's `fully_shard`, to which it leaves the work on GPUs, is called
here: what is tested on a CPU is what runs on GPUs.

Source: Zhao et al., "PyTorch FSDP" (VLDB 2023).
"""

import atexit
import gc
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wfm_core.models.diffusion_blocks import DiffusionBlock
from wfm_core.models.transformer_blocks import Block


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together.

    Attributes:
        rank: which one this is.
        count: how many there are.
        device: on which this one computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    def share(self, model: nn.Module) -> None:
        """Move a model to the device and share out its weights, in place; it must be the same in every process."""
        model.to(self.device)
        if self.count == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(self.device.type, (self.count,))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "read")
        fully_shard(model, mesh=mesh)
        if self.device.type == "cpu":
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)  # gloo sums, but takes no means

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average numbers over the processes."""
        if self.count == 1:
            return dict(values)
        stacked = torch.stack([value.to(self.device, torch.float32) for value in values.values()])
        dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.count).unbind(), strict=True))

    @contextmanager
    def first(self) -> Generator[None]:
        """Let the first process do something before the others, which then find its files."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.rank == 0 and self.count > 1:
            dist.barrier()


@contextmanager
def joined_processes(device: str) -> Generator[Processes]:
    """Join the processes that `accelerate launch` started, each on a device of its own; alone if there are no others.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ImportError: there are others, but `accelerate` is not installed; says how to install it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=torch.device(device))
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError(
            "training in several processes needs accelerate: pip install 'worldsim[distributed]'"
        ) from error
    state = PartialState(cpu=device == "cpu")
    yield Processes(state.process_index, state.num_processes, torch.device(str(state.device)))
    state.wait_for_everyone()  # none may hang up on another
    state.destroy_process_group()
    # Sharded models hold the group in cycles; its threads must end before the interpreter does, or they abort it.
    atexit.register(gc.collect)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a deep network, which are alike; none of a network that has no such."""
    return [module for module in model.modules() if isinstance(module, Block | DiffusionBlock)]


def whole(value: Tensor) -> Tensor:
    """Gather a tensor that is shared out; all processes must call it."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def laid_out_as(value: Tensor, example: Tensor) -> Tensor:
    """Share out a whole tensor, the same in every process, as `example` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(example, DTensor) or value.shape != example.shape:
        return value
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)
