"""Nothing that the released sae_lens can be asked for is unknown to `penstock.compat`."""

import dataclasses

import pytest

pytestmark = [
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore"),
]
sae_lens = pytest.importorskip("sae_lens")

from sae_lens.loading import pretrained_saes_directory  # noqa: E402

from penstock import compat  # noqa: E402

TRAINED = ["Standard", "Gated", "TopK", "BatchTopK", "MatryoshkaBatchTopK", "JumpReLU"]


def fields(kind) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(kind)}


def test_every_field_of_the_runners_configuration_is_mapped_or_refused():
    theirs = fields(sae_lens.LanguageModelSAERunnerConfig).keys() - {"sae", "logger"}
    assert theirs and theirs <= compat.KEYWORDS.keys()


def test_every_field_of_the_loggers_configuration_is_mapped_or_refused():
    theirs = fields(sae_lens.LoggingConfig).keys()
    assert theirs == set(compat.LoggingConfig.names) and theirs <= compat.KEYWORDS.keys()


@pytest.mark.parametrize("name", TRAINED)
def test_every_field_of_an_saes_configuration_is_mapped_or_refused(name):
    theirs, ours = getattr(sae_lens, f"{name}TrainingSAEConfig"), getattr(compat, f"{name}TrainingSAEConfig")
    assert fields(theirs).keys() == set(ours.shared + ours.own)
    assert fields(theirs).keys() <= compat.KEYWORDS.keys()
    assert theirs.architecture() == ours.architecture


def test_defaults_are_those_of_sae_lens_where_a_keyword_makes_no_difference():
    """Only what differs from SAELens' default is said: the defaults have to be its own."""
    for kind in (sae_lens.LanguageModelSAERunnerConfig, sae_lens.LoggingConfig):
        for name, field in fields(kind).items():
            keyword = compat.KEYWORDS.get(name)
            known = field.default is not dataclasses.MISSING and not name.startswith("sae_lens")
            if keyword is not None and known and keyword.treatment in ("no difference", "limited"):
                assert keyword.default == field.default, name


@pytest.mark.parametrize("name", sorted(set(sae_lens.__all__)))
def test_every_name_of_sae_lens_is_here_or_says_what_is(name):
    if name in compat.NOT_HERE:
        with pytest.raises(ImportError, match=f"no {name}: "):
            getattr(compat, name)
    else:
        assert getattr(compat, name) is not None


def test_the_directory_is_that_of_sae_lens():
    theirs, ours = pretrained_saes_directory.get_pretrained_saes_directory(), compat.get_pretrained_saes_directory()
    assert len(ours) > 150 and ours.keys() <= theirs.keys()
    for name, release in ours.items():
        for field in ("release", "repo_id", "model", "saes_map"):
            assert getattr(release, field) == getattr(theirs[name], field), (name, field)
    ours, theirs = vars(ours["gpt2-small-res-jb"]), vars(theirs["gpt2-small-res-jb"])
    assert ours.keys() == theirs.keys()
    assert ours == {**theirs, "conversion_func": "sae_lens"}
