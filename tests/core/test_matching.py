import math

import pytest
import torch

from sae_core import ConfigError, matching
from sae_core.matching import directions, found_again, hungarian, live, match


def random_directions(n, d, seed=0):
    return directions(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def test_a_hand_made_pair_of_dictionaries():
    a = directions(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    b = directions(torch.tensor([[0.0, -1.0], [1.0, 1.0], [4.0, 0.0]]))
    ab, ba = match(a, b)
    assert ab.nearest.tolist() == [2, 1]
    assert ab.cosine.tolist() == pytest.approx([1, math.sqrt(0.5)])
    assert ba.nearest.tolist() == [0, 0, 0]  # of two at the same distance, the first
    assert ba.cosine.tolist() == pytest.approx([0, math.sqrt(0.5), 1])
    assert ab.mutual.tolist() == [True, False] and ba.mutual.tolist() == [False, False, True]
    assert ab.found(0.7).tolist() == [True, False]


def test_a_permuted_copy_is_the_same_dictionary():
    a = random_directions(300, 32)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    ab, ba = match(a, directions(a[order] * 7))
    assert ab.found().all() and ba.found().all()
    assert torch.equal(order[ab.nearest], torch.arange(300)) and torch.allclose(ab.cosine, torch.ones(300))
    of_a, of_b, cosines = hungarian(a, a[order])
    assert torch.equal(order[of_b], of_a) and torch.allclose(cosines, torch.ones(300))


def test_random_dictionaries_share_nothing_and_meet_by_chance():
    n, d = 1000, 200
    ab, _ = match(random_directions(n, d), random_directions(n, d, seed=1))
    assert not ab.found().any()
    assert float(ab.cosine.mean()) == pytest.approx(math.sqrt(2 * math.log(n) / d), rel=0.15)


def test_with_half_of_the_features_replaced_half_are_found_again():
    a = random_directions(400, 64)
    b = torch.cat([a[:200], random_directions(200, 64, seed=1)])
    for one, other in ((a, b), (b, a)):
        assert float(match(one, other)[0].found().float().mean()) == 0.5
    cosines = hungarian(a, b)[2]
    assert float((cosines > 0.7).float().mean()) == 0.5


def test_a_wider_dictionary_has_the_narrow_one_in_it_and_not_the_other_way_round():
    a = random_directions(100, 64)
    ab, ba = match(a, torch.cat([random_directions(300, 64, seed=1), a]))
    assert ab.found().all() and float(ba.found().float().mean()) == 0.25
    assert len(hungarian(a, torch.cat([a, a]))[0]) == 100


def test_a_feature_that_is_there_twice_is_in_one_pair():
    a = random_directions(10, 64)
    ab, ba = match(a, torch.cat([a, a]))
    assert int(ab.found().sum()) == int(ba.found().sum()) == 10
    assert torch.allclose(ba.cosine, torch.ones(20))


def test_tiles_change_nothing(monkeypatch):
    a, b = random_directions(70, 16), random_directions(90, 16, seed=1)
    whole = match(a, b)
    monkeypatch.setattr(matching, "_TILE", 90 * 8)
    for one, other in zip(whole, match(a, b), strict=True):
        assert torch.equal(one.nearest, other.nearest) and torch.equal(one.mutual, other.mutual)
        assert torch.allclose(one.cosine, other.cosine)


def test_a_sample_is_a_part_of_the_whole_answer():
    a = random_directions(500, 32)
    b = torch.cat([directions(a[:250] + 0.1 * random_directions(250, 32, seed=2)), random_directions(250, 32, seed=1)])
    whole = found_again(a, b)
    assert 0.4 < float(whole.float().mean()) < 0.55
    asked = torch.linspace(0, 499, 50).round().long()
    assert torch.equal(found_again(a, b, most=50), whole[asked])
    assert torch.equal(found_again(a, b, most=500), whole)


def test_a_row_of_zeros_is_like_nothing():
    a = directions(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    ab, _ = match(a, directions(torch.eye(2)))
    assert ab.cosine.tolist() == [0, 1] and not ab.found()[0]


def test_the_hungarian_method_takes_the_greatest_sum_not_the_nearest():
    # Row 0 is nearest to 0, but then row 1, that has nothing but 0, would be left with a cosine of 0.
    a, b = directions(torch.tensor([[1.0, 0.9], [1.0, 0.0]])), torch.eye(2)
    of_a, of_b, _ = hungarian(a, b)
    assert dict(zip(of_a.tolist(), of_b.tolist(), strict=True)) == {0: 1, 1: 0}
    assert match(a, b)[0].nearest.tolist() == [0, 0]


def test_live_latents_are_those_that_ever_fired():
    assert live(3, None).all()
    assert live(3, torch.tensor([-10.0, -8.9, -1.0])).tolist() == [False, True, True]


def test_what_cannot_be_compared_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"shapes \[4, 3\] and \[4, 5\]; accepted: \[n, d\] of one d"):
        match(torch.ones(4, 3), torch.ones(4, 5))
    with pytest.raises(ConfigError, match="n at least 1"):
        match(torch.ones(0, 3), torch.ones(4, 3))
    monkeypatch.setattr(matching, "HUNGARIAN_LATENTS", 3)
    with pytest.raises(ConfigError, match="the Hungarian method on 4 and 2 latents; accepted: at most 3"):
        hungarian(torch.ones(4, 3), torch.ones(2, 3))
