"""From a generation request to prompt tokens and a token bound: the checks every LM shares."""

from __future__ import annotations

from nearfield.api.events import GenerateRequest
from nearfield.core.errors import BadRequest
from nearfield.serving.engines.text import TextModel

COMPLETION_MAX_TOKENS = 16
"""What /v1/completions answers when it names no max_tokens: OpenAI's own default."""


def prepare(
    text: TextModel,
    request: GenerateRequest,
    *,
    vocab_size: int,
    max_model_len: int,
    default_max_tokens: int,
) -> tuple[list[int], int]:
    """Tokenise a request and settle how many tokens it may produce per choice.

    Returns:
        (prompt token ids, most new tokens).

    Raises:
        BadRequest: empty or too long a prompt, tokens outside the vocabulary, more max_tokens
            than the context has room for, or messages that the chat template refuses.
    """
    field = "prompt" if request.messages is None else "messages"
    if request.messages is not None:
        prompt = text.chat(request.messages, request.tools, request.chat_template_kwargs)
        default = default_max_tokens
    else:
        default = COMPLETION_MAX_TOKENS
        if request.prompt is not None:
            prompt = text.encode(request.prompt, special=True)
        else:
            prompt = list(request.prompt_tokens or ())
            if any(not 0 <= token < vocab_size for token in prompt):
                raise BadRequest(
                    f"prompt holds a token outside of 0..{vocab_size - 1}.", param="prompt"
                )
    if not prompt:
        raise BadRequest("The prompt is empty: send at least one token.", param=field)
    room = max_model_len - len(prompt)
    if room < 1:
        raise BadRequest(
            f"The prompt is {len(prompt)} tokens long; this model's context is {max_model_len} "
            "tokens, prompt and answer together. Shorten the prompt.",
            param=field,
            code="context_length_exceeded",
        )
    wanted = request.sampling.max_tokens
    if wanted is not None and wanted > room:
        raise BadRequest(
            f"max_tokens is {wanted}, but {len(prompt)} prompt tokens leave {room} of the context "
            f"of {max_model_len}. Ask for at most {room}.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return prompt, min(default if wanted is None else wanted, room)
