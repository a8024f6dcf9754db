"""Language models of a few thousand weights and their tokenizer, written as Hugging Face folders."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 300
CONTEXT = 64
EOS = "<|endoftext|>"

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def make_model(kind: str) -> PreTrainedModel:
    """A model with weights, norms and biases all far from their initial values."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**_COMMON, n_positions=CONTEXT, n_embd=32, n_layer=3, n_head=4))
    elif kind == "llama":  # grouped queries: two heads share keys and values
        model = LlamaForCausalLM(
            LlamaConfig(**_COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=CONTEXT)
        )  # fmt: skip
    else:  # attention and MLP in parallel
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(**_COMMON, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                          max_position_embeddings=CONTEXT)
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def write_model(folder: Path, kind: str = "gpt2") -> Path:
    make_model(kind).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, **special_tokens: str) -> None:
    """A byte-level BPE tokenizer; its special tokens are BOS and EOS in one, unless told."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the water turns the wheel", "def turn(wheel): return wheel"] * 3, trainer)
    special_tokens = special_tokens or {"bos_token": EOS, "eos_token": EOS}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens).save_pretrained(folder)
