"""How ranks share a model: whole models (DDP) or parts (FSDP, HSDP), and when gradients travel."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from run.team import Team


def check_sharded(parallel: str, dtype: torch.dtype, sample_prompt: str) -> None:
    """Raises ValueError for what cannot be done where no rank has a whole model."""
    if dtype == torch.float16:
        raise ValueError(f"parallel={parallel} takes bfloat16 or float32; write --dtype=float32")
    if sample_prompt:
        raise ValueError(
            f"sample_prompt needs a whole model, which parallel={parallel} has nowhere; write "
            "--sample_prompt= and sample from the checkpoints"
        )


def replicate(model: nn.Module) -> nn.Module:
    """The model with rank 0's weights on all ranks, its gradients averaged by DDP."""
    net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # the tables of positions need not travel at each forward; torch 2.13 renamed the argument
    net.broadcast_buffers = False
    return net


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], team: Team, device: torch.device,
    dtype: torch.dtype, within_machines: bool,
) -> None:  # fmt: skip
    """Give each rank its part of rank 0's weights, in place: FSDP2, block by block.

    A block's weights are gathered when it computes, in `dtype`; what is kept, and gradients that
    ranks exchange, are float32. within_machines: each machine holds a whole model (HSDP).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = (team.ranks // team.local_ranks, team.local_ranks) if within_machines else (team.ranks,)
    mesh = init_device_mesh(device.type, size, mesh_dim_names=("replicas", "shards")[-len(size) :])
    # Inputs stay as they are: autocast and the residual stream choose their types. What is no
    # block's stays float32: embedding, last norm and head.
    low = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    for part, policy in [*((block, low) for block in blocks), (model, full)]:
        for p in part.parameters():
            if not hasattr(p, "full_tensor"):  # not yet sharded
                p.data = p.data.to(device)
                dist.broadcast(p.data, 0)
        fully_shard(part, mesh=mesh, mp_policy=policy)


def set_sync(net: nn.Module, last: bool, only: bool) -> None:
    """Before a micro-step: does its backward exchange gradients? Only a step's last one should.

    only: it is the step's only one. Otherwise weights that FSDP has gathered stay until the last
    backward is over: one gathering a step, whatever the number of micro-steps.
    """
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = last
    elif dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for part in net.modules():
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(last, recurse=False)
                part.set_reshard_after_backward(last, recurse=False)
                # the whole model's own weights are needed again as soon as forward ends
                part.set_reshard_after_forward(only and part is not net, recurse=False)


def share_optimizer(team: Team, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give all ranks the optimizer state that rank 0 has read: its `state_dict()` on the CPU.

    Only one tensor at a time is whole on the other ranks.
    """
    if team.alone:
        optimizer.load_state_dict(state)
        return
    known = {
        i: {name: (list(t.shape), str(t.dtype)[6:]) for name, t in tensors.items()}
        for i, tensors in state.get("state", {}).items()
    }
    known, groups = team.share((known, state.get("param_groups")))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    mine: dict[int, dict[str, Tensor]] = {}
    for i, tensors in known.items():
        p = params[int(i)]
        mine[int(i)] = {}
        for name, (shape, dtype) in tensors.items():
            full = torch.empty(shape, dtype=getattr(torch, dtype), device=p.device)
            if team.rank == 0:
                full.copy_(state["state"][int(i)][name])
            dist.broadcast(full, 0)
            mine[int(i)][name] = part_of(p, full) if full.shape == p.shape else full
    optimizer.load_state_dict({"state": mine, "param_groups": groups})


def part_of(param: Any, full: Tensor) -> Tensor:
    """A tensor of a parameter's shape as the parameter is: whole, or this rank's part of it.

    All ranks have the same one: nothing is exchanged.
    """
    if not hasattr(param, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
