import pytest

from penstock.batches import Schedule
from penstock.errors import ModelError, SpecError
from penstock.models import ModelDescription, check_sites
from penstock.pack import PackMember
from penstock.plan import describe, members, memory_of_block, plan_packs, plan_saes, training_settings, warnings
from penstock.sites import Site, parse_array
from penstock.spec import parse_spec

READS, WRITES = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"
SITE = f"{{reads: {READS}, writes: {WRITES}}}"
MODEL = ModelDescription(
    "m", 2, 16, None, 100, 1000, "fingerprint", {READS: 16, "blocks.0.attn.hook_z": 32, WRITES: 8, "blocks.1.late": 8}
)
SPEC = """\
name: plan
hook_points: [HOOKS]
data: {block_tokens: 65536}
train: {tokens: 1M, batch_tokens: 1024}
saes:
  - ENTRY
baselines: {k: [4]}
"""
TOPK = "{architecture: topk, d_sae: 8x, k: 8}"


def spec_of(*hook_points, entry=TOPK, more=""):
    return parse_spec(SPEC.replace("HOOKS", ", ".join(hook_points)).replace("ENTRY", entry) + more)


def planned(*hook_points, **options):
    return plan_saes(spec_of(*hook_points, **options), MODEL, "tokens")


def test_the_id_of_an_sae_stays_what_it_was_in_the_first_release():
    model = ModelDescription("m", 1, 16, None, 100, 1000, "fingerprint", {WRITES: 16})
    saes = plan_saes(spec_of(WRITES), model, "tokens")
    assert [sae.sae_id for sae in saes] == ["595c0eeb5021", "36a7eaeaf9ee"]


def test_a_coefficient_keeps_the_id_that_it_had_before_there_was_a_target():
    entries = ("standard, d_sae: 8x, l1_coefficient: 1, l1_warm_up_steps: 100", "gated, d_sae: 8x, l1_coefficient: 1",
               "jumprelu, d_sae: 8x, target_l0: 8")  # fmt: skip
    model = ModelDescription("m", 1, 16, None, 100, 1000, "fingerprint", {WRITES: 16})
    ids = [plan_saes(spec_of(WRITES, entry=f"{{architecture: {one}}}"), model, "tokens")[0].sae_id for one in entries]
    assert ids == ["0bb94cf40547", "a813540b75ea", "6dc62696f5e1"]


def test_targets_are_an_axis_of_every_architecture_with_a_coefficient():
    for name in ("standard", "gated", "jumprelu"):
        saes = planned(WRITES, entry=f"{{architecture: {name}, d_sae: 8x, target_l0: [2, 5.5]}}")
        assert [sae.params.get("target_l0") for sae in saes] == [2, 5.5, None]  # the last is the baseline
        assert not any("coefficient" in shown for sae in saes[:2] for shown in sae.params if shown[:2] in ("l1", "l0"))
        assert warnings(spec_of(WRITES), saes) == []
    with pytest.raises(SpecError, match=r"saes\[0\]: target_l0 is 65: accepted is at most d_sae \(64\)"):
        planned(WRITES, entry="{architecture: gated, d_sae: 8x, target_l0: [20, 65]}")


def test_what_is_not_at_its_default_is_part_of_the_id():
    plain, skipping = planned(SITE)[0], planned(SITE, entry=TOPK.replace("k: 8", "k: 8, skip: true"))[0]
    cosine = plan_saes(parse_spec(SPEC.replace("HOOKS", SITE).replace("ENTRY", TOPK).replace("1024}", "1024, "
                       "lr_decay: cosine, encoder_dtype: bfloat16}")), MODEL, "tokens")[0]  # fmt: skip
    assert len({plain.sae_id, skipping.sae_id, cosine.sae_id}) == 3


def test_every_sae_and_the_frozen_decoder_are_trained_at_every_site():
    saes = planned(WRITES, SITE)
    label = f"{READS} -> {WRITES}"
    assert [(sae.hook_point, sae.d_in, sae.d_out, sae.settings.d_sae, sae.baseline) for sae in saes] == [
        (WRITES, 8, 8, 64, None), (WRITES, 8, 8, 64, "frozen_decoder"),
        (label, 16, 8, 128, None), (label, 16, 8, 128, "frozen_decoder"),
    ]  # fmt: skip
    assert (saes[2].reads, saes[2].writes) == (READS, WRITES)
    assert len({sae.sae_id for sae in saes}) == 4
    assert saes[2].params["d_out"] == 8 and "d_out" not in saes[0].params


def test_memory_and_work_count_the_output_and_the_skip_connection():
    _, frozen = planned(SITE)
    skipping = planned(SITE, entry=TOPK.replace("k: 8", "k: 8, skip: true"))[0]
    assert frozen.n_products == (16 + 8) * 128 and skipping.n_products == (16 + 8) * 128 + 16 * 8
    assert frozen.memory_bytes == 16 * ((16 + 8) * 128 + 3 * 128 + 8)
    assert frozen.activation_bytes(10) == 160 * (128 + 16 + 8)


def test_a_pack_is_fed_what_its_site_reads_and_writes():
    spec = spec_of(WRITES, SITE)
    sae, transcoder = plan_packs(spec, plan_saes(spec, MODEL, "tokens"))
    assert sae.hook_points == (WRITES,) and transcoder.hook_points == (READS, WRITES)
    assert memory_of_block(spec, MODEL, [sae, transcoder]) == 512 * 127 * (16 + 8) * 4
    [member, _] = members(transcoder, {"code": "x"})
    assert isinstance(member, PackMember) and (member.reads, member.writes) == (READS, WRITES)
    assert member.metadata == {"code": "x", "hook_name": READS, "hook_name_out": WRITES}
    assert members(sae, {})[0].metadata == {"hook_name": WRITES}


def test_arrays_of_a_transcoder_are_others_only_where_outliers_are_replaced():
    site = Site(READS, WRITES)
    assert site.array(READS, None) == READS == Site(READS, READS).array(READS, 5.0)
    assert parse_array(site.array(READS, 5.0)) == (READS, (READS, WRITES))
    assert parse_array(READS) == (READS, (READS,))


def test_an_sae_of_all_heads_says_how_its_activations_come():
    spec = spec_of("blocks.0.attn.hook_z", f"{{reads: blocks.0.attn.hook_z, writes: {WRITES}}}")
    heads, transcoder = plan_packs(spec, plan_saes(spec, MODEL, "tokens"))
    assert members(heads, {})[0].reshape_activations == "hook_z"
    assert members(transcoder, {})[0].reshape_activations == "none"


@pytest.mark.parametrize(
    ("entry", "hook_point", "parts"),
    [
        ("{architecture: gated, d_sae: 8x, l1_coefficient: 1}", SITE,
         ["saes[0]", "gated cannot be a transcoder", f"{READS} -> {WRITES}", "accepted there: standard", "topk"]),
        (TOPK.replace("k: 8", "k: 8, skip: true"), WRITES, ["saes[0]", "skip: true", WRITES, "{reads: A, writes: B}"]),
        (TOPK.replace("k: 8", "k: 8, normalize_activations: layer_norm"), SITE,
         ["saes[0]", "normalize_activations: layer_norm", "accepted there: none"]),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_at_a_site_is_refused_by_name(entry, hook_point, parts):
    with pytest.raises(SpecError) as caught:
        planned(hook_point, entry=entry)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site(READS, "blocks.0.nothing"), "has no 'blocks.0.nothing'"),
        (Site("blocks.0.nothing", WRITES), "has no 'blocks.0.nothing'"),
        (Site(WRITES, READS), f"'{WRITES}' lies behind '{READS}'"),
    ],
)
def test_a_site_that_the_model_cannot_have_is_refused(site, message):
    check_sites(MODEL, [Site(READS, WRITES), Site(READS, READS)])
    with pytest.raises(ModelError, match="hook_points: ") as caught:
        check_sites(MODEL, [site])
    assert message in str(caught.value)


def test_the_plan_names_sites_and_warns_of_what_is_probably_not_meant():
    spec = spec_of(f"{{reads: {READS}, writes: blocks.1.late}}")
    saes = plan_saes(spec, MODEL, "tokens")
    text = describe(spec, MODEL, saes, plan_packs(spec, saes), 1, Schedule((1024,) * 976, 1024, 976), 0)
    assert f"{READS} -> blocks.1.late: 2 SAEs" in text and "reads one layer and writes another" in text
    half = spec.model_copy(update={"train": spec.train.model_copy(update={"encoder_dtype": "float16"})})
    assert "encoder_dtype float16" in " ".join(warnings(half, saes))


def test_the_way_the_lr_falls_and_the_encoders_type_reach_every_sae():
    train = spec_of(WRITES).train.model_copy(update={"lr_decay": "cosine", "encoder_dtype": "bfloat16"})
    assert (training_settings(train).lr_decay, training_settings(train).encoder_dtype) == ("cosine", "bfloat16")
