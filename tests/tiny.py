"""Tiny random models, one per family, each with a real tokenizer trained in this process; no network."""

import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from pocketlm.model.gguf_tokenizer import merges_by_score

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2")
# As the families' own tokenizer.json files have them.
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA_WORDS.replace("{1,3}", "")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Start, end of text, and the other special tokens of each family; the last one ends a turn.
SPECIALS = {
    "llama": ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
    "qwen2": ("<|endoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "gemma3_text": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "gpt2": ("<|endoftext|>", "<|endoftext|>"),
}
SENTENCEPIECE = ("mistral", "gemma3_text")
PIECES = 380  # tokens learnt from text, bytes included


def tiny_folder(family: str, path: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny model of `family` as a Hugging Face folder: hidden 64, 3 blocks (Gemma 3: 7), FFN 128.

    `changes` go to the config. Weights are scaled so that the most likely token leads clearly.
    """
    tokenizer = tiny_tokenizer(family)
    config = tiny_config(family, len(tokenizer), **changes)
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                centre = 0.0 if name.endswith("bias") or family == "gemma3_text" else 1.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
            else:
                outer = name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight", "wpe.weight"))
                parameter.copy_(torch.randn_like(parameter) * (0.5 if outer else 0.15))
        if family == "gemma3_text":  # it multiplies embeddings by 8 on the way in: the blocks must still matter
            network.model.embed_tokens.weight /= 8
            network.model.norm.weight += 7
    start, end, *others = SPECIALS[family]
    ids = tokenizer.convert_tokens_to_ids
    turn_ends = [ids(others[-1]), ids(end)] if others and family != "mistral" else [ids(end)]
    network.generation_config = GenerationConfig(bos_token_id=ids(start), eos_token_id=turn_ends)
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_config(family: str, tokens: int, **changes: Any) -> Any:
    """Return the config of a tiny model; the embedding is padded to a multiple of 32 rows."""
    vocabulary = -(-tokens // 32) * 32
    if family == "gpt2":
        shape = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 128, "n_positions": 256}
        ids = {"bos_token_id": None, "eos_token_id": None}  # its defaults lie outside a small vocabulary
        return AutoConfig.for_model(family, **(shape | ids | {"vocab_size": vocabulary} | changes))
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 7 if family == "gemma3_text" else 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "vocab_size": vocabulary,
        "tie_word_embeddings": family in ("llama", "qwen3", "gemma3_text"),
    }
    if family == "gemma3_text":
        shape |= {"query_pre_attn_scalar": 16, "sliding_window": 8}
    elif family == "mistral":
        shape |= {"sliding_window": None}
    return AutoConfig.for_model(family, **(shape | changes))


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the family's kind with a few hundred tokens."""
    core = Tokenizer.from_str(_sentencepiece(family) if family in SENTENCEPIECE else _byte_level(family))
    start, end, *others = SPECIALS[family]
    unknown = {"unk_token": "<unk>"} if family in SENTENCEPIECE else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=start,
        eos_token=others[-1] if family in ("llama", "qwen2", "qwen3") else end,
        pad_token=end,
        add_bos_token=family in ("llama", "mistral", "gemma3_text"),
        add_eos_token=False,
        chat_template=CHAT_TEMPLATE if family == "llama" else None,
        clean_up_tokenization_spaces=False,
        **unknown,
    )


@cache
def _text() -> list[str]:
    return [text for _, text in sorted(topics.items())][:12]


@cache
def _byte_level(family: str) -> str:
    core = Tokenizer(models.BPE(ignore_merges=family == "llama"))
    words = {"llama": LLAMA_WORDS, "qwen2": QWEN_WORDS, "qwen3": QWEN_WORDS}.get(family)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    steps = [pre_tokenizers.Split(Regex(words), "isolated"), byte_level] if words else []
    core.pre_tokenizer = pre_tokenizers.Sequence(steps) if words else byte_level
    core.decoder = decoders.ByteLevel()
    if family.startswith("qwen"):
        core.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(_text(), trainer)
    core.add_special_tokens([AddedToken(token, normalized=False) for token in dict.fromkeys(SPECIALS[family])])
    return core.to_str()


@cache
def _sentencepiece(family: str) -> str:
    """SentencePiece's BPE: every way to form a token is a merge, what is left falls back to bytes."""
    spaces = normalizers.Replace(" ", "\u2581")
    prefixed = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
    learner = Tokenizer(models.BPE())
    learner.normalizer = spaces
    learner.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    learner.train_from_iterator(_text(), trainers.BpeTrainer(vocab_size=PIECES - 256, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    formed = ["".join(merge) for merge in learnt["merges"]]
    pieces = sorted(set(learnt["vocab"]) - set(formed)) + formed
    tokens = ["<unk>", *SPECIALS[family], *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = merges_by_score({piece: -float(rank) for rank, piece in enumerate(pieces)})
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = prefixed if family == "mistral" else spaces
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if family == "mistral" else parts)
    core.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", *SPECIALS[family])])
    return core.to_str()
