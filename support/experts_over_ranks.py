"""
Experts over ranks (--shard=ep): each of R ranks owns E/R experts of a bank, and tokens go to them.

    rank 0 owns experts 0 1, its tokens chose 0 0 1 3 3 3    ->  computes 0 0 1 | 1
    rank 1 owns experts 2 3, its tokens chose 1 2 2 2 3 3    ->  computes 3 3 3 | 2 2 2 3 3

Where fsdp brings every expert's weights to every rank, here only activations travel: each layer
sends N rows of D numbers there and back, forward and backward, however large the experts are. No
rank ever holds another's experts; all that is no expert is left to fsdp (support/machine.py).

Letters: T tokens of this rank, K choices, N = T*K rows that it sends, M rows that it receives, D
width, F expert width, E experts in all, R ranks.
"""

import copy
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor import DTensor, Shard

from support.ops import sort_by_expert, undo_order


def check(config, n_ranks):
    """ValueError where a model's experts cannot be dealt out evenly."""
    n = config.n_experts
    if config.expert == "neuron":
        raise ValueError("shard=ep moves tokens, and expert=neuron gathers rows: use shard=fsdp")
    if not n or n % n_ranks:
        problem = f"{n} cannot be shared by {n_ranks} ranks" if n else f"{config.flavour} has none"
        raise ValueError(f"shard=ep deals out experts, and {problem}: use shard=fsdp, or change "
                         "n_experts or the number of ranks")


def spread(bank, mesh):
    """Keep this rank's share of a bank's experts, and have its forward pass send tokens around.

    The parameters become DTensors: (E/R, ...) here, (E, ...) to optimizers, norms and checkpoints.
    """
    for name, whole in list(bank.named_parameters()):
        mine = whole.detach().chunk(mesh.size())[mesh.get_local_rank()]
        mine = mine.clone()  # (E/R, ...); the whole is freed
        mine = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
        setattr(bank, name, torch.nn.Parameter(mine))
    bank.forward = partial(forward, bank, mesh.get_group())
    bank.open = partial(open_pool, bank)


def open_pool(bank, n_layers, x, top_k):
    """As ExpertBank.open; how many rows each layer will receive is not known yet."""
    uses = type(bank).open(own_share(bank), n_layers, x, top_k=None)
    return [partial(bank.forward, experts=use) for use in uses]


def forward(bank, group, x, routing, keep_activations=False, experts=None):
    """What the bank computes where it has all experts: x (T, D) -> y (T, D), activations or None.
    experts: this rank's, if the bank is a pool that was opened."""
    experts = experts or own_share(bank)
    (t, k), n_ranks, n_experts = routing.ids.shape, dist.get_world_size(group), len(bank.w_in)
    # 1. Sort the N assignments by expert, and so by owner; tell each owner what it will get.
    order, ends = sort_by_expert(routing.ids, n_experts)
    counts = ends.diff(prepend=ends.new_zeros(1))  # (E,) rows for each expert
    arriving = collectives.wait_tensor(collectives.all_to_all_single(counts, None, None, group))
    sizes = torch.stack((counts, arriving)).view(2, n_ranks, -1).sum(-1)  # (2, R)
    sent, received = rows_by_rank(sizes)
    # 2. Rows and their gates travel to the owners.
    there = partial(collectives.all_to_all_single_autograd, output_split_sizes=received,
                    input_split_sizes=sent, group=group)
    back = partial(collectives.all_to_all_single_autograd, output_split_sizes=sent,
                   input_split_sizes=received, group=group)
    rows = there(working(x).index_select(0, order // k))  # (N, D) -> (M, D)
    gates = there(routing.weights.reshape(-1, 1).index_select(0, order))  # (N, 1) -> (M, 1)
    # 3. They arrive by rank, then by expert; to the bank's own code each is a token with K = 1.
    per_rank = n_experts // n_ranks
    mine = torch.arange(per_rank, device=x.device).repeat(n_ranks)  # (R * E/R,)
    ids = mine.repeat_interleave(arriving, output_size=sum(received))[:, None]  # (M, 1)
    y, activations = experts(rows, routing._replace(weights=gates, ids=ids), keep_activations)
    # 4. Results return to the order of the tokens, whose K choices are added up.
    y = undo_order(back(y), order).view(t, k, -1).sum(1, dtype=y.dtype)  # (M, D) -> (T, D)
    if keep_activations:  # (M, 1, F) -> (T, K, F)
        activations = undo_order(back(activations.squeeze(1)), order).view(t, k, -1)
    return y, activations


def rows_by_rank(sizes):
    """(2, R) -> how many rows go to each rank, and how many come: numbers that the host must know,
    so that a layer waits for its routing."""
    return sizes.tolist()


def own_share(bank):
    """The bank as this rank has it: its parameters (E/R, ...) are plain tensors."""
    own = copy.copy(bank)
    del own.forward, own.open  # the class's are back
    own._parameters = {name: p.to_local() for name, p in bank.named_parameters()}
    return own


def working(x):
    """x in autocast's dtype, where that is on: half the bytes to send."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def average_gradients(banks, n_ranks):
    """An expert's gradient is a sum over all ranks' tokens; of all else fsdp gives the mean."""
    for bank in banks:
        for p in bank.parameters():
            p.grad /= n_ranks
