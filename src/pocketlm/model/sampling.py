"""Text that a model writes itself: the calibration data that is always at hand and always in its own voice."""

import torch

from pocketlm.model.language_model import LanguageModel

ANSWER_TOKENS = 72
QUESTION_TOKENS = 24
TEMPERATURE = 0.8  # at 1, small models drift into noise
MARK = "\x02"  # stands for the user's words while the template is cut around them


def sample_documents(model: LanguageModel, count: int, seed: int) -> list[str]:
    """Let a model write `count` documents.

    A chat model first writes the user's turn after the template's opening, then answers it (the idea of Magpie,
    https://arxiv.org/abs/2406.08464). A base model writes on from its beginning-of-text token.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not model.is_chat:
            return _continue(model, [""] * count, ANSWER_TOKENS)
        prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
        opening = prompt.partition(MARK)[0]
        questions = _continue(model, [opening] * count, QUESTION_TOKENS)
        chats = [
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": question.strip() or "Hello"}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for question in questions
        ]
        answers = _continue(model, chats, ANSWER_TOKENS)
    return [chat + answer for chat, answer in zip(chats, answers, strict=True)]


@torch.no_grad()
def _continue(model: LanguageModel, prompts: list[str], tokens: int) -> list[str]:
    """Sample a continuation of each prompt up to the end of turn or `tokens`."""
    tokenizer, network = model.tokenizer, model.network
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id or 0
    ids = [tokenizer(prompt, add_special_tokens=False).input_ids or [begin] for prompt in prompts]
    width = max(map(len, ids))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else begin
    room = getattr(network.config, "max_position_embeddings", width + tokens)
    if width >= room:
        return ["" for _ in prompts]
    batch = torch.tensor([[padding] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    # Not under autocast: one token at a time, converting the weights would cost more than multiplying by them.
    written = network.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=min(tokens, room - width),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        pad_token_id=padding,
    )
    return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in written]
