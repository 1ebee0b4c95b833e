"""Groups of ranks that are not those of torch's default group, as torchft makes them: each rank says what it is."""

import torch
import torch.distributed as dist
from torch_ranks import begin, say

rank, size = begin()
mirrored = size - 1 - rank
store = dist.PrefixStore("apart", dist.distributed_c10d._get_default_store())
apart = dist.Backend._plugins["DETCOLL"].creator_fn(store, mirrored, size)
value = torch.tensor([rank])
apart.broadcast([value], dist.BroadcastOptions()).wait()
beside = dist.new_group([size - 1, 0])
other = torch.tensor([rank])
if rank in (0, size - 1):
    dist.broadcast(other, 0, beside)
say(rank, [apart.rank(), apart.size(), value.item(), other.item()])
apart.shutdown()
dist.destroy_process_group()
