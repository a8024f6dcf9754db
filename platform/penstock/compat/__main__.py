"""Print what becomes of every keyword of SAELens' training configuration."""

from penstock.compat.keywords import as_text

print(as_text())
