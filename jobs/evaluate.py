"""Evaluate a sweep's SAEs by another protocol: the entry point of `ray job submit`.

    ray job submit --address http://HEAD:8265 --working-dir . \\
        --runtime-env-json '{"env_vars": {"PENSTOCK_HOME": "/shared/penstock-home"}}' \\
        -- python jobs/evaluate.py gpt2-small-front --dataset wikitext --tokens 500k
"""

import sys
from pathlib import Path

# A job runs the code that it was submitted with, whatever is installed on the cluster.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / "platform"), str(_ROOT / "dashboards"), str(_ROOT)]

from penstock.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
