"""One process of several that observe two frames between them; the first saves the sums."""

import os

import numpy as np
import torch
import torch.distributed as dist
from pytorch_quantization.nn import TensorQuantizer

from lean.observer import Observers, install_observers

FRAMES = 2


def observe(rank: int, world: int) -> Observers:
    """Collect this process's share of the frames in two quantizers."""
    quantizers = {name: TensorQuantizer(if_quant=False, if_calib=True) for name in ("a", "b")}
    observers = install_observers(quantizers)
    for index in range(rank, FRAMES, world):
        frame = torch.from_numpy(np.random.default_rng(index).standard_normal((50, 60)).astype(np.float32))
        quantizers["a"](frame)
        quantizers["b"](frame.relu() ** 2 * 10)
    return observers


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD"])
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=world)
    observers = observe(rank, world)
    own = observers.statistics()
    sums = observers.statistics(summed=True)
    assert observers.statistics() == own, "summing changed a process's own statistics"
    if rank == 0:
        np.savez(os.environ["RESULT"], **{f"{q}/{k}": a for q, h in sums.items() for k, a in h.to_dict().items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
