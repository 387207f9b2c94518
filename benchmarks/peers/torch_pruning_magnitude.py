"""Make every FFN of a model narrower with torch-pruning: the channels of the least magnitude go.

Run it with the Python of an environment that has torch-pruning (see README.md):

    python torch_pruning_magnitude.py --model HF_FOLDER --ffn 1152 --out OUT

Channels are scored by torch-pruning's default, the norms of all weights that go with a channel (gate, up and down),
block by block, so that the result is a stock shape. OUT is a Hugging Face folder.
"""

import argparse
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Prune and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ffn", type=int, required=True, help="channels that are kept in every block")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import torch
    import torch_pruning
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    model.config.use_cache = False
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, {"input_ids": torch.arange(8)[None]}, output_transform=lambda out: out.logits
    )
    importance = torch_pruning.importance.GroupMagnitudeImportance()
    for block in model.model.layers:
        root, cut = block.mlp.gate_proj, torch_pruning.prune_linear_out_channels
        scores = importance(graph.get_pruning_group(root, cut, idxs=list(range(root.out_features))))
        gone = scores.argsort()[: root.out_features - args.ffn].tolist()
        graph.get_pruning_group(root, cut, idxs=gone).prune()
    model.config.intermediate_size = args.ffn
    model.config.use_cache = True
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(f"torch-pruning {version('torch-pruning')}: {args.ffn} channels, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
