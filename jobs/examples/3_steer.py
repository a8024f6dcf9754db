"""Steer a generation along a feature's decoder direction, by a hook.

    python jobs/examples/3_steer.py [FOLDER] [MODEL] [FEATURE] [STRENGTH]

The recipe that circulates hands `fwd_hooks` to `generate`. With the libraries as they are nothing happens; here the
hooks are called at every token. `sae_core.analysis.steer` does the same and reports what it did.
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
PROMPT = "def read(path):\n    "

# %% A feature, and how strong it is where it is active of itself
tokens = model.to_tokens("class Shape:\n    def __init__(self, name):\n        self.")
_, cache = model.run_with_cache(tokens, names_filter=[hook_point])
strengths = sae.encode(cache[hook_point])[0, -1]
feature = int(sys.argv[3]) if len(sys.argv) > 3 else int(strengths.argmax())
strength = float(sys.argv[4]) if len(sys.argv) > 4 else float(strengths.max())

# %% The hook: a step along the feature's direction at every position
calls = 0


def steer(activations: torch.Tensor, hook) -> torch.Tensor:
    global calls
    calls += 1
    return activations + strength * sae.W_dec[feature]


# %% Without it, and with it
prompt = model.to_tokens(PROMPT)
plain = model.generate(prompt, max_new_tokens=20, do_sample=False, verbose=False)
steered = model.generate(prompt, max_new_tokens=20, do_sample=False, verbose=False, fwd_hooks=[(hook_point, steer)])
print(f"--- as it is\n{model.to_string(plain[0, 1:])}")
print(f"--- feature {feature} at {strength:.1f}; the hook was called {calls} times\n{model.to_string(steered[0, 1:])}")
assert calls > 0 and not torch.equal(plain, steered), "the generation was not steered"
