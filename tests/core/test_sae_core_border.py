import subprocess
import sys


def test_importing_sae_core_loads_no_platform_and_no_model_library():
    code = (
        "import sys, sae_core\n"
        "heavy = {'ray', 'mlflow', 'transformer_lens', 'transformers', 'datasets', 'pandas', 'penstock', 'sae_lens'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
