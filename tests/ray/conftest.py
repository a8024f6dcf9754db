"""One Ray head for all tests in this folder: a process of its own, as a user starts it."""

import os
import secrets

import pytest

from ray_head import SECRETS, SPEC, penstock, read_authentication_again, running_head


@pytest.fixture(scope="session")
def token():
    """Ray asks for this token, in this process and in all that it starts, as on a cluster of penstock's launchers."""
    fresh = secrets.token_hex(32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", fresh)
        patch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        read_authentication_again()
        yield fresh
    read_authentication_again()


@pytest.fixture(scope="session")
def planted():
    """Secrets that lie in the environment of the head's processes, and others in that of who submits: none of them may
    come to light anywhere."""
    return {where: {name: f"{where}-{secrets.token_hex(16)}" for name in SECRETS} for where in ("head", "submitter")}


@pytest.fixture(scope="session")
def head(token, planted, tmp_path_factory):
    """One head for all tests: see `running_head`. The planted secrets lie in its environment."""
    with running_head(tmp_path_factory.mktemp("head") / "log", **planted["head"]) as head:
        yield head


@pytest.fixture
def write_spec(tmp_path):
    """Write the small spec, with replacements, and return its path."""

    def write(tokens="16k", checkpoints="1", replace=()):
        text = SPEC.replace("TOKENS", tokens).replace("CHECKPOINTS", checkpoints)
        for old, new in replace:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def submitted(head, planted, tmp_path_factory):
    """A finished sweep, submitted with `penstock submit --follow`, its blocks in a spool beside its home: (home, spec,
    what was printed)."""
    folder = tmp_path_factory.mktemp("submitted")
    spec = folder / "small.yaml"
    text = SPEC.replace("TOKENS", "16k").replace("CHECKPOINTS", "1")
    spec.write_text(text.replace("block_tokens", f"spool: {folder / 'spool'}, block_tokens"))
    home = folder / "home"
    environment = {**os.environ, **planted["submitter"]}
    done = penstock("submit", spec, "--address", head.jobs, "--follow", home=home, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return home, spec, done.stdout
