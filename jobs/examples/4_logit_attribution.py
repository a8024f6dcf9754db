"""Direct logit attribution: which features push the model toward a token.

    python jobs/examples/4_logit_attribution.py [FOLDER] [MODEL]

By hand, for one hook point, as far as the path straight to the logits goes. What happens in the layers between, several
hook points and the error term: `sae_core.analysis.attribute`.
"""

# %% A model and an SAE
import sys

import torch

from penstock.compat import SAE, HookedSAETransformer

torch.set_grad_enabled(False)
FOLDER, MODEL = [*sys.argv[1:3], *("best-sae", "demo")[len(sys.argv[1:3]) :]]
model = HookedSAETransformer.from_pretrained_no_processing(MODEL)
sae = SAE.load_from_disk(FOLDER)
hook_point = sae.cfg.metadata.hook_name

# %% What the model says next
TEXT = "class Shape:\n    def __init__(self, name):\n        self"
logits, cache = model.run_with_cache(model.to_tokens(TEXT), names_filter=[hook_point, "ln_final.hook_scale"])
token = int(logits[0, -1].argmax())
print(f"after {TEXT[-12:]!r} comes {model.to_string([token])!r}, logit {logits[0, -1, token]:.2f}")

# %% The token's direction in the residual stream, ahead of the final norm, against the mean of all tokens
scale = cache["ln_final.hook_scale"][0, -1]
direction = (model.W_U[:, token] - model.W_U.mean(1)) * model.ln_final.w / scale
direction = direction - direction.mean()  # the norm takes out the mean

# %% What each feature adds along it
features = sae.encode(cache[hook_point])[0, -1]
contributions = features * (sae.W_dec @ direction)
for contribution, latent in zip(*contributions.topk(5), strict=True):
    promoted = [model.to_string([other]) for other in (sae.W_dec[latent] @ model.W_U).topk(5).indices.tolist()]
    print(f"feature {latent:5d}  strength {features[latent]:6.2f}  adds {contribution:6.2f}  promotes {promoted}")
total = cache[hook_point][0, -1] @ direction
print(f"all features together {contributions.sum():.2f}, of {total:.2f} that the activation has")
