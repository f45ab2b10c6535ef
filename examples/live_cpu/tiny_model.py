"""A language model made on the spot: byte-level tokenizer, a few random layers, fixed by a seed. Nothing is downloaded.

    .venv-vllm/bin/python tiny_model.py FOLDER [--hidden 128] [--layers 6] [--context 4096] [--seed 0]

Runs in vLLM's environment, because it needs torch and transformers. What it writes is a plain Hugging Face folder
(Qwen2 layers), so vLLM serves it like any other. Its sentences mean nothing, but they are the same every time, which is
what a test of a gateway needs: weights are spread widely enough (``initializer_range`` 0.15, untied embeddings) that
different prompts get different answers, and only printable ASCII bytes have a row in the output layer, so that a greedy
answer is text and never ends early. It has more layers than it needs, because an engine that takes 2 ms for an
iteration outruns vLLM's own front end, which then accepts no connection for seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SPECIALS = ("<|begin|>", "<|end|>", "<|pad|>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
HEAD_DIM = 32  # the smallest that vLLM's CPU attention takes


def byte_tokenizer() -> Any:
    """One token per byte and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end, pad = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad, chat_template=CHAT_TEMPLATE
    )


def write_model(folder: Path, hidden: int = 128, layers: int = 6, context: int = 4096, seed: int = 0) -> None:
    """Write config.json, weights and tokenizer into ``folder``."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = byte_tokenizer()
    heads = hidden // HEAD_DIM
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 2, 1),
        max_position_embeddings=context,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    printable = torch.zeros(len(tokenizer), dtype=torch.bool)
    for symbol, index in tokenizer.get_vocab().items():
        printable[index] = (
            symbol not in SPECIALS and tokenizer.decode([index]).isascii() and tokenizer.decode([index]).isprintable()
        )
    with torch.no_grad():
        model.lm_head.weight[~printable] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "complete").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--hidden", type=int, default=128, help=f"width, a multiple of {2 * HEAD_DIM} (128)")
    parser.add_argument("--layers", type=int, default=6, help="number of layers (6)")
    parser.add_argument("--context", type=int, default=4096, help="longest context, tokens (4096)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    arguments = parser.parse_args()
    if arguments.hidden < 2 * HEAD_DIM or arguments.hidden % (2 * HEAD_DIM):
        parser.error(f"--hidden is {arguments.hidden}, a multiple of {2 * HEAD_DIM} is needed")
    write_model(arguments.folder, arguments.hidden, arguments.layers, arguments.context, arguments.seed)


if __name__ == "__main__":
    main()
