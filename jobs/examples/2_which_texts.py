"""Which texts activate a feature: its strongest places in some documents, with what stands around them.

    python jobs/examples/2_which_texts.py [FOLDER] [MODEL] [FEATURE]

FEATURE is one of those that are active in the text of `1_look_inside.py`; the strongest there unless given. For all
features of an SAE at once, over as many tokens as you like: `penstock features`.
"""

# %% A model and an SAE
import inspect
import json
import sys
import textwrap

import torch

from penstock.compat import SAE, HookedSAETransformer

torch.set_grad_enabled(False)
FOLDER, MODEL = [*sys.argv[1:3], *("best-sae", "demo")[len(sys.argv[1:3]) :]]
model = HookedSAETransformer.from_pretrained_no_processing(MODEL)
sae = SAE.load_from_disk(FOLDER)
hook_point = sae.cfg.metadata.hook_name


def encode(text: str) -> torch.Tensor:
    """Features [positions, d_sae] of a text; the first position, left out of training, is 0."""
    _, cache = model.run_with_cache(model.to_tokens(text), names_filter=[hook_point])
    features = sae.encode(cache[hook_point])[0]
    features[0] = 0
    return features


# %% The feature to look at
if len(sys.argv) > 3:
    feature = int(sys.argv[3])
else:
    feature = int(encode("class Shape:\n    def __init__(self, name):\n        self.")[-1].argmax())

# %% Its strongest places in some source files
texts = [inspect.getsource(module) for module in (json, textwrap, inspect)]
places = []
for text in texts:
    for start in range(0, 12_000, 400):
        piece = text[start : start + 400]
        if not piece:
            break
        strengths = encode(piece)[:, feature]
        position = int(strengths.argmax())
        words = model.to_str_tokens(piece)
        around = "".join(words[max(1, position - 8) : position]), words[position], "".join(words[position + 1 :][:4])
        places.append((float(strengths[position]), around))

# %% The ten strongest, the token it fires on in brackets
places.sort(key=lambda place: -place[0])
print(f"feature {feature} is active in {sum(strength > 0 for strength, _ in places)} of {len(places)} pieces")
for strength, (before, token, after) in places[:10]:
    print(f"{strength:6.2f}  {(before + '[' + token + ']' + after)!r}")
