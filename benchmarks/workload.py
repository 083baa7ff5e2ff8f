"""What every side is asked: sentences, prompts, and the small language model that answers.

Everything is seeded: two runs, and all sides of one, get the same bytes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

MAX_TOKENS = 200
"""Every answer of the generate suite is exactly this long."""
KEY_ID, SECRET = "benchbench22", "0123456789" * 4 + "abc"
KEY = f"nf_{KEY_ID}_{SECRET}"
"""What clients authenticate with where somebody asks for it."""

_SUBJECTS = [
    "the ferry", "a tired engineer", "our neighbour", "the northern region",
    "every second replica", "the old library", "a careful reader", "the morning train",
    "their new router", "the orchestra",
]  # fmt: skip
_VERBS = [
    "crosses", "measures", "forgets", "repairs", "describes", "follows", "replaces",
    "remembers", "counts", "answers",
]  # fmt: skip
_OBJECTS = [
    "the long bridge", "a broken clock", "seventeen letters", "the price of rain",
    "an empty harbour", "the last request", "two quiet streets", "a map of the city",
    "the winter schedule", "its own shadow",
]  # fmt: skip
_TAILS = [
    "before the shop opens", "without asking anybody", "because the river is high",
    "in less than an hour", "while the others are asleep", "on the first day of March",
    "with unusual patience", "as far as we know", "near the border",
    "although nobody had planned it", "and writes it down", "for the third time this year",
]  # fmt: skip


def sentences(count: int = 2048, seed: int = 7) -> list[str]:
    """Distinct English sentences of 3 to 40 words, all lengths about equally often."""
    chosen = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        wanted = chosen.randint(3, 40)
        words: list[str] = []
        while len(words) < wanted:
            words += f"{chosen.choice(_SUBJECTS)} {chosen.choice(_VERBS)}".split()
            words += f"{chosen.choice(_OBJECTS)} {chosen.choice(_TAILS)}".split()
        made[" ".join(words[:wanted]).capitalize() + "."] = None
    return list(made)


def prompts(count: int = 64, seed: int = 11) -> list[str]:
    """Distinct user messages. The model's tokens are characters, so 20 to 200 of them are as
    many tokens (and three more that the chat template adds)."""
    chosen = random.Random(seed)
    stock = " ".join(sentences(count, seed))
    made = []
    for _ in range(count):
        length = chosen.randint(20, 200) - 3
        start = chosen.randrange(len(stock) - length)
        made.append(stock[start : start + length])
    return made


def write_language_model(directory: Path) -> None:
    """A Llama of 256 x 4 with random weights that never ends an answer by itself.

    All its tokens are printable ASCII, so every side can show every token at once; the head's
    rows of the special tokens are zero, so a greedy decoder never chooses them and every answer
    has exactly `MAX_TOKENS` tokens on every side.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [first.upper() + second.upper() for first in letters for second in letters[:6]]
    vocabulary = {text: index for index, text in enumerate([*characters, *pairs])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[0], pad_token=special[0]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|user|>{{ message.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    first_special = len(vocabulary)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=704,
            vocab_size=first_special + len(special),
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=first_special,
            pad_token_id=first_special,
            initializer_range=0.3,
        )
    )
    with torch.no_grad():
        model.lm_head.weight[first_special:] = 0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_encoder_graph(weights: Path, file: Path) -> None:
    """MiniLM as torch exports it, for the peers marked "+ ORT": `ids` and `mask`, int64 [batch,
    width], to hidden states; ONNX Runtime fuses what it recognises."""
    import torch
    from transformers import AutoModel

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(weights, attn_implementation="eager").eval()

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.model(input_ids=ids, attention_mask=mask)[0]
            return hidden

    sample = torch.ones((2, 8), dtype=torch.long)
    sizes = {0: "batch", 1: "width"}
    torch.onnx.export(
        Hidden(),
        (sample, sample),
        str(file),
        input_names=["ids", "mask"],
        output_names=["hidden"],
        dynamic_axes={"ids": sizes, "mask": sizes, "hidden": sizes},
        opset_version=17,
        dynamo=False,
    )


def encoder_directory() -> Path:
    """Where nearfield finds MiniLM: what all peers are given."""
    from nearfield.core.spec import EmbedEngine, ModelSpec
    from nearfield.weights.resolve import resolve

    found = resolve(ModelSpec(model="embed", engine=EmbedEngine(), source="builtin://minilm"))
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what the sides load.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    write_encoder_graph(encoder_directory(), directory / "minilm.onnx")
    write_language_model(directory / "lm")


if __name__ == "__main__":
    main()
