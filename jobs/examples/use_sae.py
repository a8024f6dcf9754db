"""What a trained SAE says of a text: the strongest latents of the last token, and how well it reconstructs.

    python jobs/examples/use_sae.py FOLDER ["some text"]

FOLDER is what `penstock pull` wrote. The language model is the one that its cfg.json names.
"""

import sys

import torch

import sae_core
from penstock.models import load_model
from penstock.spec import ModelSpec


@torch.no_grad()
def main(folder: str, text: str = "def area(width, height):\n    return width *") -> None:
    sae = sae_core.SAE.load(folder)
    about = sae.cfg.metadata
    hook_point = about["hook_name"]
    processing = about.get("model_processing", "none")
    model = load_model(ModelSpec(name=about["model_name"], processing=processing), "cpu")
    tokens = model.to_tokens(text)
    _, cache = model.run_with_cache(tokens, names_filter=[hook_point])
    x = cache[hook_point][0]  # [positions, d_in]
    f = sae.encode(x)  # [positions, d_sae]
    x_hat = sae.decode(f)
    error = (x_hat - x)[1:].square().sum() / x[1:].square().sum()  # the first position is excluded, as in training
    print(f"{sae.cfg.architecture} at {hook_point}: L0 {(f[1:] != 0).sum(1).float().mean():.1f}, "
          f"error {error:.3f} of the activations' norm")  # fmt: skip
    for strength, latent in zip(*f[-1].topk(5), strict=True):
        logits = sae.W_dec[latent] @ model.W_U
        promoted = [model.tokenizer.decode([token]) for token in logits.topk(5).indices.tolist()]
        print(f"  latent {latent.item():5d}  strength {strength:7.2f}  promotes {promoted}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
