"""The real engine as a function from tokens to logits, so that quality is measured on the file that ships."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from pocketlm.errors import BadInputError, OutOfResourcesError, PocketlmError
from pocketlm.run import llamacpp
from pocketlm.run.header import check_cache, check_is_gguf

if TYPE_CHECKING:  # importing torch takes longer than timing a small model
    from torch import Tensor

# The engine keeps the logits of one batch: 512 of them take 100 MB at 49,152 words, 540 MB at 262,144.
_LARGEST_BATCH = 512


class Engine:
    """A GGUF file loaded by llama.cpp on the CPU, as a context manager; for one thread at a time.

    Attributes:
        vocabulary_size: The width of the logits.
        version: The engine's version, for reports.
    """

    def __init__(self, path: str | Path, threads: int | None = None, context: int = 2048, cache: str = "f16") -> None:
        """Load `path`.

        Args:
            path: A GGUF file (the first part of a split one).
            threads: CPU threads; those of torch if None.
            context: Longest window in tokens.
            cache: How keys and values are cached: f16, q8_0 or q4_0.

        Raises:
            BadInputError: The file is missing, damaged, or of an architecture that the engine does not know, or `cache`
                has blocks that do not divide its heads.
            OutOfResourcesError: The context does not fit into memory.
        """
        self._llama = llamacpp.library()
        llamacpp.silence(self._llama)
        llamacpp.take_errors()
        self.path = Path(path)
        self.version = llamacpp.version()
        check_is_gguf(self.path)
        if cache != "f16":
            check_cache(self.path, cache)
        # An empty list of devices keeps every layer on the CPU in builds that know a GPU too.
        no_devices = (ctypes.c_void_p * 1)(None)
        model_parameters = self._llama.llama_model_default_params()
        model_parameters.devices = ctypes.addressof(no_devices)
        self._context = None
        self._model = self._llama.llama_model_load_from_file(str(self.path).encode(), model_parameters)
        if not self._model:
            raise BadInputError(
                f"The engine cannot load {self.path}: {llamacpp.take_errors() or 'it does not say why'}. "
                "The file is damaged, or newer than the engine"
            )
        self._vocabulary = self._llama.llama_model_get_vocab(self._model)
        self.vocabulary_size: int = self._llama.llama_vocab_n_tokens(self._vocabulary)
        context_parameters = self._llama.llama_context_default_params()
        context_parameters.n_ctx = context
        if cache != "f16":
            llamacpp.set_cache_type(context_parameters, cache)
        self._batch = min(context, _LARGEST_BATCH)
        context_parameters.n_batch = context_parameters.n_ubatch = self._batch
        self._context = self._llama.llama_init_from_model(self._model, context_parameters)
        if not self._context:
            self.close()
            raise OutOfResourcesError(
                f"The engine cannot make a context of {context} tokens for {self.path}: "
                f"{llamacpp.take_errors() or 'probably too little memory'}. Try a shorter context"
            )
        if threads is None:
            import torch

            threads = torch.get_num_threads()
        self._llama.llama_set_n_threads(self._context, threads, threads)
        self.context: int = context
        self._used = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory; the engine cannot be used after."""
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None

    def logits(self, tokens: Sequence[int]) -> "Tensor":
        """Return the logits at every position of one window that starts from an empty context.

        Args:
            tokens: Token ids, at most `context` of them. Nothing is put in front.

        Returns:
            float32, (tokens, vocabulary).

        Raises:
            BadInputError: No tokens, more than fit, or one outside the vocabulary.
            PocketlmError: The engine fails on them.
        """
        import torch

        self.forget()
        logits = self._room(len(tokens))
        self._decode(tokens, logits)
        return torch.from_numpy(logits)

    def forget(self) -> None:
        """Empty the context."""
        self._used = 0
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def append(self, tokens: Sequence[int]) -> "Tensor":
        """Append tokens to the context and return the logits after the last of them, as generating does.

        Args:
            tokens: Token ids, at least one.

        Returns:
            float32, (vocabulary,).

        Raises:
            BadInputError: No tokens, more than fit, or one outside the vocabulary.
            PocketlmError: The engine fails on them.
        """
        import torch

        return torch.from_numpy(self._append(tokens))

    def follow(self, tokens: Sequence[int]) -> int:
        """Append tokens to the context and return the likeliest next one.

        Args:
            tokens: Token ids, at least one.

        Raises:
            BadInputError: No tokens, more than fit, or one outside the vocabulary.
            PocketlmError: The engine fails on them.
        """
        return int(self._append(tokens).argmax())

    def continuations(self, prompt: Sequence[int], endings: Sequence[Sequence[int]]) -> list["Tensor"]:
        """Return the logits that each ending of a prompt is judged by; the prompt is read once, from an empty context.

        Args:
            prompt: Token ids, at least one.
            endings: Token ids of each, at least one.

        Returns:
            For each ending float32, (its tokens, vocabulary): those before its first token, before its second, ...

        Raises:
            BadInputError: No tokens, more than fit, or one outside the vocabulary.
            PocketlmError: The engine fails on them.
        """
        import torch

        self.forget()
        first, found = self._append(prompt), []
        for ending in endings:
            logits = self._room(len(ending))
            logits[0] = first
            if len(ending) > 1:
                self._decode(ending[:-1], logits[1:])
            self._rewind(len(prompt))
            found.append(torch.from_numpy(logits))
        return found

    def generate(self, prompt: Sequence[int], most: int, enough: Callable[[list[int]], bool]) -> list[int]:
        """Return what follows a prompt, the likeliest token each time.

        Args:
            prompt: Token ids, at least one.
            most: Tokens at most; as many as fit the context where that is less.
            enough: Whether to stop behind these tokens, before the model ends its turn.

        Raises:
            BadInputError: No tokens, more than fit, or one outside the vocabulary.
            PocketlmError: The engine fails on them.
        """
        self.forget()
        token, said = self.follow(prompt), []
        while not self.ends_generation(token):
            said.append(token)
            if len(said) >= min(most, self.context - len(prompt)) or enough(said):
                break
            token = self.follow([token])
        return said

    def _room(self, positions: int) -> np.ndarray:
        return np.empty((positions, self.vocabulary_size), np.float32)

    def _append(self, tokens: Sequence[int]) -> np.ndarray:
        logits = self._room(1)
        self._decode(tokens, logits)
        return logits[0]

    def _rewind(self, count: int) -> None:
        """Forget all but the first `count` tokens; llama.cpp keeps all of a sliding window's for this (`swa_full`)."""
        memory = self._llama.llama_get_memory(self._context)
        if not self._llama.llama_memory_seq_rm(memory, 0, count, -1):
            raise PocketlmError(f"The engine cannot go back in {self.path}: its memory is not one of keys and values")
        self._used = count

    def _decode(self, tokens: Sequence[int], logits: np.ndarray) -> None:
        """Append `tokens` and fill `logits`, (wanted, vocabulary), with those of the last ones."""
        count, wanted = len(tokens), len(logits)
        # The engine ends the process on what is refused here.
        if not 0 < count <= self.context - self._used:
            raise BadInputError(
                f"{count} tokens do not fit the context: {self._used} of {self.context} positions are taken"
            )
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < self.vocabulary_size:
                raise BadInputError(
                    f"Token {token} is outside the vocabulary of {self.vocabulary_size}: "
                    "were the tokens made with this model's tokenizer?"
                )
        self._used += count
        for start in range(0, count, self._batch):
            stop = min(start + self._batch, count)
            # Rows of `logits` before and after this batch.
            first, last = (max(0, wanted - count + at) for at in (start, stop))
            self._decode_batch(tokens[start:stop], logits[first:last])

    def _decode_batch(self, tokens: Sequence[int], logits: np.ndarray) -> None:
        count, wanted = len(tokens), len(logits)
        batch = llamacpp.Batch(
            n_tokens=count,
            token=(ctypes.c_int32 * count)(*tokens),
            logits=(ctypes.c_int8 * count)(*[0] * (count - wanted), *[1] * wanted),
        )
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise PocketlmError(
                f"The engine failed on {self.path} with status {status}: "
                f"{llamacpp.take_errors() or 'it does not say why'}"
            )
        if wanted:
            source = self._llama.llama_get_logits(self._context)
            ctypes.memmove(logits.ctypes.data, source, logits.nbytes)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Split `text` into token ids with the tokenizer inside the file, adding no start or end token.

        Args:
            text: Any text.
            special: Whether `<|im_start|>` and the like are control tokens rather than characters.
        """
        data = text.encode()
        capacity = len(data) + 8
        while True:
            ids = (ctypes.c_int32 * capacity)()
            found = self._llama.llama_tokenize(self._vocabulary, data, len(data), ids, capacity, False, special)
            if found >= 0:
                return ids[:found]
            capacity = -found  # the engine says how many it needs

    def ends_generation(self, token: int) -> bool:
        """Whether the engine stops generating at `token`."""
        return self._llama.llama_vocab_is_eog(self._vocabulary, token)
