"""PyTorch's data-parallel training in two processes: DistributedDataParallel and FSDP2."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from imagelora import attach, load
from test_imagelora import EARLY, TEXT, attach_trained, logits_of, loss_of, prompt, tiny_vlm


def train_a_step(user, adapter, *batches):
    """On the mean of the losses of these batches."""
    loss = sum(loss_of(user, batch) for batch in batches) / len(batches)
    loss.backward()
    torch.optim.SGD(adapter.parameters(), lr=0.01).step()


def shard(model, **options):
    for module in (*model.language_model.layers, model):
        fully_shard(module, **options)
    assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return model


def loaded_after_save(adapter, path):
    adapter.save(path)
    return [*load(tiny_vlm(), path).parameters()]


def train_as_one(rank, path, mesh):
    text = prompt(TEXT)
    expected = tiny_vlm()
    expected_adapter = attach_trained(expected)
    before = [parameter.detach().clone() for parameter in expected_adapter.parameters()]
    train_a_step(expected, expected_adapter, EARLY, text)
    for wrap in (nn.parallel.DistributedDataParallel, partial(shard, mesh=mesh)):
        model = tiny_vlm()
        adapter = attach_trained(model)
        user = wrap(model)
        train_a_step(user, adapter, EARLY if rank == 0 else text)
        torch.testing.assert_close(logits_of(user, EARLY), logits_of(expected, EARLY))
        torch.testing.assert_close(loaded_after_save(adapter, path), [*expected_adapter.parameters()])
    with pytest.raises(ValueError, match="attach first, then shard"):
        attach(adapter.detach())

    model = tiny_vlm()
    adapter = attach_trained(model)
    shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    logits_of(model, text)  # leaves copies in 16 bits in adapter.parameters()
    torch.testing.assert_close(loaded_after_save(adapter, path), before, rtol=0, atol=0)


def in_two_processes(rank: int, folder: Path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    train_as_one(rank, folder / f"{rank}.pt", mesh)
    dist.barrier()  # so that neither leaves while the other still talks to it
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    """One of them has no image. A file holds all weights in float32."""
    torch.multiprocessing.spawn(in_two_processes, (tmp_path,), nprocs=2)
