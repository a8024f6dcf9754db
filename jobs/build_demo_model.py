"""Make the demo language model: a GPT-2 of about 1.7M parameters on the source of the Python standard library.

    python jobs/build_demo_model.py --to platform/penstock/demo [--tokens 24000000] [--threads 2]

It sees documents of the `train` split only, and prints its loss on the `report` split beside that of a unigram and
of a bigram model (interpolated with the unigram, the weight chosen in the bigram's favour on the report split itself).
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from penstock import demo
from penstock.splits import document_hash, split_of

VOCAB = 4096
CONTEXT = 256
EOS = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_ids(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    eos = tokenizer.token_to_id(EOS)
    parts = [[eos, *encoding.ids] for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def ngram_losses(train: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """Cross-entropy in nats a token of a unigram and of an interpolated bigram model."""
    unigram = np.bincount(train, minlength=VOCAB) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(train[:-1] * VOCAB + train[1:], minlength=VOCAB * VOCAB).astype(np.float64)
    pairs = pairs.reshape(VOCAB, VOCAB)
    conditional = pairs / np.maximum(pairs.sum(1, keepdims=True), 1)
    previous, following = held_out[:-1], held_out[1:]
    unigram_loss = -np.log(unigram[following]).mean()
    bigram_loss = min(
        -np.log(weight * conditional[previous, following] + (1 - weight) * unigram[following]).mean()
        for weight in (0.5, 0.7, 0.8, 0.85, 0.9, 0.95)
    )
    return float(unigram_loss), float(bigram_loss)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, ids: np.ndarray, context: int) -> float:
    rows = torch.from_numpy(ids[: len(ids) // context * context].reshape(-1, context))
    losses = [model(batch, labels=batch).loss.item() * len(batch) for batch in rows.split(32)]
    return sum(losses) / len(rows)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts: dict[str, list[str]] = {"train": [], "search": [], "report": []}
    for text in demo.documents():
        texts[split_of(document_hash(text))].append(text)
    tokenizer = train_tokenizer(texts["train"])
    ids = {split: as_ids(tokenizer, texts[split]) for split in texts}
    print({split: len(part) for split, part in ids.items()}, flush=True)
    unigram, bigram = ngram_losses(ids["train"], ids["report"])
    print(f"report split, nats a token: unigram {unigram:.4f}, bigram {bigram:.4f}", flush=True)

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=128, n_layer=6, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    corpus = torch.from_numpy(ids["train"])
    n_steps = args.tokens // (args.batch_rows * CONTEXT)
    started, running = time.time(), None
    for step in range(n_steps):
        warm_up, progress = min(1.0, (step + 1) / 100), step / n_steps
        for group in optimiser.param_groups:
            group["lr"] = args.lr * warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        starts = torch.randint(len(corpus) - CONTEXT, (args.batch_rows,))
        batch = torch.stack([corpus[s : s + CONTEXT] for s in starts.tolist()]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=args.bf16):
            loss = model(batch, labels=batch).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == n_steps - 1:
            print(f"step {step}/{n_steps} loss {running:.4f} {time.time() - started:.0f} s", flush=True)

    model = model.half().float().eval().cpu()  # what is measured is what is saved
    result = {
        "report_loss": {"unigram": unigram, "bigram": bigram, "model": held_out_loss(model, ids["report"], CONTEXT)},
        "report_loss_context_128": held_out_loss(model, ids["report"], 128),
        "unit": "nats a token",
        "train_tokens_seen": n_steps * args.batch_rows * CONTEXT,
        "train_tokens_in_corpus": len(ids["train"]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(result, indent=1), flush=True)
    args.to.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.to)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS, model_max_length=CONTEXT
    ).save_pretrained(args.to)
    (args.to / "training.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--tokens", type=int, default=24_000_000, help="training tokens")
    parser.add_argument("--batch-rows", type=int, default=16, help=f"rows of {CONTEXT} tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    train(parser.parse_args())
