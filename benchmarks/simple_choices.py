"""What the field does without re-solving anything, to compare with: parts are chosen by a simple score and go.

Magnitude (the norms of a part's weights, as torch-pruning's default), activations (Minitron,
https://arxiv.org/abs/2407.14679) and fluctuation with the mean made good by a bias (FLAP, https://arxiv.org/abs/2312.11983).
Written for LLaMA-like models, every block on the statistics of the original.
"""

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import anatomy_of, blocks_of, read_weight
from pocketlm.model.surgery import keep_channels, keep_heads, key_value_heads, narrow_ends, narrow_stream, rebuilt
from pocketlm.model.sweep import rehearse, run_block

FFN, HEADS = "mlp_hidden", "attention_out"


@torch.no_grad()
def statistics(network: nn.Module, windows: Tensor) -> list[dict[str, tuple[Tensor, ...]]]:
    """Return per block and linear the mean, the mean magnitude, the mean square and the variance of what it reads."""
    start, found = rehearse(network, windows), []
    states = start.hidden
    for block, per_batch in zip(blocks_of(network), start.keywords, strict=True):
        sums: dict[str, list[Tensor]] = {}

        def listen(path: str, sums: dict = sums):  # noqa: ANN202
            def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].flatten(0, -2).float()
                new = [x.sum(0), x.abs().sum(0), x.square().sum(0)]
                sums[path] = [a + b for a, b in zip(sums[path], new, strict=True)] if path in sums else new

            return add

        paths = [edge.path for edge in anatomy_of(network).edges]
        handles = [block.get_submodule(path).register_forward_pre_hook(listen(path)) for path in paths]
        states = [run_block(block, x, extra) for x, extra in zip(states, per_batch, strict=True)]
        for handle in handles:
            handle.remove()
        means = {path: [total / windows.numel() for total in totals] for path, totals in sums.items()}
        found.append({path: (mean, size, square, square - mean**2) for path, (mean, size, square) in means.items()})
    return found


@torch.no_grad()
def narrow_inner(network: nn.Module, seen: list, method: str, space: str, keep: int) -> nn.Module:
    """Keep the `keep` best channels of the FFN, or heads of keys and values, of every block; change it in place."""
    anatomy, heads = anatomy_of(network), key_value_heads(network)
    (reader,) = anatomy.readers(space)
    for block, stats in zip(blocks_of(network), seen, strict=True):
        linear = block.get_submodule(reader)
        mean, size, square, variance = stats[reader]
        columns = read_weight(linear).square().sum(0)
        if method == "magnitude":
            writers = [
                e.path for e in anatomy.edges if e.writes == space or (space == HEADS and e.reads == "attention_in")
            ]
            rows = [read_weight(block.get_submodule(path)).square().sum(1) for path in writers]
            score = columns + sum(rows) if space == FFN else _per_head([columns, *rows], heads)
        else:
            score = {"activations": square if space == HEADS else size, "fluctuation": variance * columns}[method]
            score = score if space == FFN else _per_head([score], heads)
        kept = score.argsort(descending=True)[:keep].sort().values
        if method == "fluctuation":
            gone = torch.ones(len(score), dtype=torch.bool).index_fill(0, kept, False)
            gone = gone.repeat_interleave(len(mean) // len(score))
            bias = read_weight(linear)[:, gone] @ mean[gone]
        if space == FFN:
            keep_channels(block, network, space, kept)
        else:
            queries = torch.arange(network.config.num_attention_heads).view(heads, -1)[kept]
            keep_heads(block, network, kept.tolist(), queries.flatten().tolist())
        if method == "fluctuation":
            linear.bias = nn.Parameter(bias)
    return network


def _per_head(scores: list[Tensor], heads: int) -> Tensor:
    return sum(score.view(heads, -1).sum(1) for score in scores)


@torch.no_grad()
def narrow_hidden(network: nn.Module, seen: list, method: str, keep: int) -> nn.Module:
    """Keep the `keep` best channels of the residual stream; return a network of that width."""
    anatomy = anatomy_of(network)
    if method == "magnitude":
        score = network.get_input_embeddings().weight.square().sum(0)
        for block in blocks_of(network):
            for edge in anatomy.edges:
                weight = read_weight(block.get_submodule(edge.path)).square()
                score = score + (
                    weight.sum(1) if edge.writes == "residual" else weight.sum(0) * (edge.reads in anatomy.norms)
                )
    else:
        first = [anatomy.readers(space)[0] for space in anatomy.norms]
        score = sum(stats[path][1] for stats in seen for path in first)
    kept = score.argsort(descending=True)[:keep].sort().values
    basis = torch.eye(len(score))[:, kept]
    for block in blocks_of(network):
        narrow_stream(block, anatomy, basis)
    narrow_ends(network, basis)
    return rebuilt(network, {"hidden_size": keep})
