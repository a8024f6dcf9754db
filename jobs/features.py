"""Make dashboards of an SAE's latents: the entry point of `ray job submit`.

    ray job submit --address http://HEAD:8265 --working-dir . \\
        --runtime-env-json '{"env_vars": {"PENSTOCK_HOME": "/shared/penstock-home"}}' \\
        -- python jobs/features.py gpt2-small-front --hook-point blocks.4.hook_resid_post --tokens 10M --workers 8
"""

import sys
from pathlib import Path

# A job runs the code that it was submitted with, whatever is installed on the cluster.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / "platform"), str(_ROOT / "dashboards"), str(_ROOT)]

from penstock.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["features", *sys.argv[1:]]))
