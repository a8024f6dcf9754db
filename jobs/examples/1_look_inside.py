"""Load a model and an SAE, encode a text, and see how much of it the features explain.

    python jobs/examples/1_look_inside.py [FOLDER] [MODEL]

FOLDER is any SAE folder; without it best-sae, which this writes after `make demo`:

    penstock pull demo --hook-point blocks.4.hook_resid_post --to best-sae

MODEL is the model it was trained on. The script is one that SAELens' users have, with its import line changed.
"""

# %% A model, and an SAE of one of its hook points
import sys

import torch

from penstock.compat import SAE, HookedSAETransformer

torch.set_grad_enabled(False)
FOLDER, MODEL = [*sys.argv[1:3], *("best-sae", "demo")[len(sys.argv[1:3]) :]]
model = HookedSAETransformer.from_pretrained_no_processing(MODEL)
sae = SAE.load_from_disk(FOLDER)
# One of the world's: sae, cfg, sparsity = SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
hook_point = sae.cfg.metadata.hook_name
print(f"{sae.cfg.d_sae} features of {hook_point}")

# %% The activations of a text, and its features
TEXT = "def area(width, height):\n    return width * height\n\nclass Shape:\n    def __init__(self):\n        self."
tokens = model.to_tokens(TEXT)
_, cache = model.run_with_cache(tokens, names_filter=[hook_point])
activations = cache[hook_point]  # [1, positions, d_in]
features = sae.encode(activations)  # [1, positions, d_sae]

# %% How many features are active at each position. The first was left out of training: leave it out here
active = (features > 0).sum(-1)[0]
print(f"active features a token: {active[1:].float().mean():.1f}, from {active[1:].min()} to {active[1:].max()}")

# %% The strongest features by position
for position, token in enumerate(model.to_str_tokens(TEXT)):
    if position > 0:
        strengths, latents = features[0, position].topk(3)
        shown = ", ".join(f"{latent} ({strength:.1f})" for strength, latent in zip(strengths, latents, strict=True))
        print(f"{token!r:>14}  {shown}")

# %% Back to activations, and what is lost
reconstructed = sae.decode(features)
error = (activations - reconstructed)[:, 1:]
spread = (activations - activations[:, 1:].mean(1, keepdim=True))[:, 1:]
explained = 1 - error.pow(2).sum() / spread.pow(2).sum()
print(f"mean squared error {error.pow(2).mean():.4f}, explained variance {explained:.3f}")

# %% The model with the reconstruction in place of its activations, and with the error added back
loss = model(tokens, return_type="loss")
spliced = model.run_with_saes(tokens, saes=[sae], return_type="loss")
exact = model.run_with_saes(tokens, saes=[sae], use_error_term=True, return_type="loss")
print(f"loss {loss:.4f}; with the reconstruction {spliced:.4f}; with the error term {exact:.4f}")
_, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
print("in the cache:", ", ".join(sorted(name for name in cache if name.startswith(f"{hook_point}.hook_sae"))))
