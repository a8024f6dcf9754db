import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.placement import Cluster, Node, Request, Room, host_request, pack_request
from penstock.shares import Demand, Generosity, Share, fair_shares
from penstock.sharing import Sharing
from penstock.spec import ResourceSpec
from penstock.stream_state import BARRIER_SECONDS, StreamState
from penstock.trial import YIELD

EMPTY = Room(Cluster(()))


def demand(name, since=0.0, hosts=1, packs=4, resources=None, **state):
    resources = resources or ResourceSpec()
    host, pack = host_request(resources), pack_request(resources)
    return Demand(name, f"sweep {name}", since, hosts, host, packs, pack, **state)


def cluster_of(*cpus):
    return Cluster(tuple(Node({"CPU": count}) for count in cpus))


def shares_of(cluster, *demands):
    return {name: (share.hosts, share.packs) for name, share in fair_shares(cluster, demands).items()}


def test_one_sweep_has_everything():
    assert shares_of(cluster_of(6), demand("a")) == {"a": (1, 4)}
    assert shares_of(cluster_of(4), demand("a")) == {"a": (1, 3)}


def test_two_sweeps_have_half_each_and_the_first_the_odd_one():
    assert shares_of(cluster_of(6), demand("a"), demand("b", 1.0)) == {"a": (1, 2), "b": (1, 2)}
    assert shares_of(cluster_of(7), demand("a", 1.0), demand("b")) == {"a": (1, 2), "b": (1, 3)}


def test_what_one_does_not_want_goes_to_the_others():
    assert shares_of(cluster_of(9), demand("a"), demand("b", 1.0, packs=1), demand("c", 2.0, packs=9)) == {
        "a": (1, 3), "b": (1, 1), "c": (1, 2),
    }  # fmt: skip
    assert shares_of(cluster_of(6), demand("a"), demand("b", 1.0, packs=0)) == {"a": (1, 4), "b": (1, 0)}


def test_nobody_has_hosts_alone():
    """Two CPUs full of hosts of two sweeps would train nothing, for ever."""
    assert shares_of(cluster_of(2), demand("a"), demand("b", 1.0)) == {"a": (1, 1), "b": (0, 0)}
    assert shares_of(cluster_of(4), demand("a", hosts=3), demand("b", 1.0)) == {"a": (1, 1), "b": (1, 1)}
    assert shares_of(cluster_of(6), demand("a", hosts=3), demand("b", 1.0)) == {"a": (3, 1), "b": (1, 1)}


def test_a_sweep_that_does_not_fit_beside_the_others_keeps_nobody_behind_it_waiting():
    large = ResourceSpec(cpus_per_pack=5)
    assert shares_of(cluster_of(6), demand("a"), demand("b", 1.0, resources=large), demand("c", 2.0)) == {
        "a": (1, 2), "b": (0, 0), "c": (1, 2),
    }  # fmt: skip


def test_labels_divide_a_cluster():
    nodes = (Node({"CPU": 4}, {"zone": "a"}), Node({"CPU": 4}, {"zone": "b"}))
    in_a, in_b = (ResourceSpec(host_labels={"zone": zone}, pack_labels={"zone": zone}) for zone in "ab")
    found = shares_of(Cluster(nodes), demand("a", resources=in_a), demand("b", 1.0, resources=in_b), demand("c", 2.0))
    assert found == {"a": (1, 1), "b": (1, 2), "c": (1, 2)}  # c, which may go anywhere, came to the first nodes


def random_case(draw_int, n_sweeps):
    nodes = [Node({"CPU": draw_int(0, 6), "GPU": draw_int(0, 2)}) for _ in range(draw_int(1, 3))]
    demands = [
        demand(
            f"s{index}", since=float(draw_int(0, 3)), hosts=draw_int(0, 3), packs=draw_int(0, 5),
            resources=ResourceSpec(cpus_per_host=draw_int(0, 2), cpus_per_pack=draw_int(1, 3),
                                   gpus_per_pack=[0, 0, 0.5, 1][draw_int(0, 3)]),
        )
        for index in range(n_sweeps)
    ]  # fmt: skip
    return Cluster(tuple(nodes)), demands


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_shares_fit_are_fair_and_do_not_depend_on_who_asks(data, n_sweeps):
    cluster, demands = random_case(lambda low, high: data.draw(st.integers(low, high)), n_sweeps)
    shares = fair_shares(cluster, demands)
    assert fair_shares(cluster, demands[::-1]) == shares
    order = sorted(demands, key=lambda one: (one.since, one.sweep_id))
    room = Room(cluster)
    least = [request for one in order if shares[one.sweep_id] != Share() for request in
             [one.host] * min(1, one.hosts) + [one.pack] * min(1, one.packs)]  # fmt: skip
    assert room.take_all(*least)
    for one in demands:
        share = shares[one.sweep_id]
        assert share.hosts <= one.hosts and share.packs <= one.packs
        # Either both of the least, or neither.
        assert (share.hosts > 0) == (one.hosts > 0) or share == Share()
        assert (share.packs > 0) == (one.packs > 0) or share == Share()
    total = {name: sum(node.resources[name] for node in cluster.nodes) for name in ("CPU", "GPU")}
    for name, there in total.items():
        taken = sum(shares[one.sweep_id].hosts * one.host.resources[name] for one in demands)
        taken += sum(shares[one.sweep_id].packs * one.pack.resources[name] for one in demands)
        assert taken <= there + 1e-6
    first = order[0]
    alone = fair_shares(cluster, [first])[first.sweep_id]
    assert (shares[first.sweep_id] == Share()) == (alone == Share())  # who began first always works


@pytest.mark.parametrize("n_sweeps", [2, 3])
def test_of_equal_packs_nobody_has_two_more_than_one_that_wants_more(n_sweeps):
    for cpus, *packs in itertools.product(range(2 * n_sweeps, 12), *[range(5)] * n_sweeps):
        demands = [demand(str(index), float(index), packs=count) for index, count in enumerate(packs)]
        shares = fair_shares(cluster_of(cpus), demands)
        given = {one.sweep_id: shares[one.sweep_id].packs for one in demands}
        short = [given[one.sweep_id] for one in demands if given[one.sweep_id] < one.packs]
        assert not short or max(given.values()) - min(short) <= 1
        assert sum(given.values()) == min(sum(packs), cpus - n_sweeps)  # nothing is left lying


def test_one_more_sweep_takes_nothing_that_need_not_go():
    """Who has an even share keeps it while others come and go with less."""
    before = fair_shares(cluster_of(8), [demand("a"), demand("b", 1.0)])
    after = fair_shares(cluster_of(8), [demand("a"), demand("b", 1.0), demand("c", 2.0, packs=0)])
    assert before["b"].packs == 3 and after["b"].packs == 2 and after["a"].packs == 3  # c's host has its room


def test_a_demand_is_the_same_after_it_was_told():
    one = demand("a", resources=ResourceSpec(pack_labels={"zone": "a"}, host_resources={"slot": 1}), short_since=3.0)
    assert Demand.from_json({**one.to_json(), "of a later release": 1}) == one
    with pytest.raises(KeyError):
        Demand.from_json({"sweep_id": "a"})


# ---- giving back ----


def generous(now, packs, share, other, room=EMPTY, state=None, seconds=100.0):
    state = state or Generosity(seconds, dict.fromkeys(packs, 0.0))
    shares = {"mine": Share(1, share), other.sweep_id: Share(1, 2)}
    return state.to_yield(now, shares["mine"], packs, [other], shares, room)[0]


WAITING = demand("other", hosts=1, packs=2, hosts_up=1, running=0, short_since=900.0)


def test_packs_beyond_the_share_are_given_back_to_one_that_waits():
    state = Generosity(100.0, {"a": 0.0, "b": 10.0, "c": 5.0, "d": 1.0})
    assert generous(1000.0, ["a", "b", "c", "d"], 2, WAITING, state=state) == ["b", "c"]  # that began last


@pytest.mark.parametrize("why", ["nothing beyond", "nobody waits", "only just", "room is free", "the last", "young"])
def test_nothing_is_given_back_without_need(why):
    packs, share, other, room, state = ["a", "b"], 1, WAITING, EMPTY, None
    if why == "nothing beyond":
        share = 2
    elif why == "nobody waits":
        other = replace(other, short_since=None)
    elif why == "only just":
        other = replace(other, short_since=980.0)
    elif why == "room is free":
        room = Room(cluster_of(2))
    elif why == "the last":
        packs, share = ["a"], 0
    else:
        state = Generosity(100.0, {"a": 950.0, "b": 950.0})
    assert generous(1000.0, packs, share, other, room, state) == []


def test_a_host_that_waits_is_given_room_too():
    lacks_host = replace(WAITING, running=2, hosts_up=0)
    assert generous(1000.0, ["a", "b"], 1, lacks_host) == ["a"] or generous(1000.0, ["a", "b"], 1, lacks_host) == ["b"]


def test_packs_are_given_back_once_in_a_while_and_never_all():
    """A year of sweeps that come and go at random: yields of one driver are apart, and one pack stays."""
    random_ = random.Random(0)
    state, packs, yields, now = Generosity(180.0), ["p0", "p1", "p2", "p3"], [], 0.0
    for _ in range(3000):
        now += random_.uniform(1.0, 30.0)
        other = replace(WAITING, short_since=now - 60.0 if random_.random() < 0.5 else None)
        given = generous(now, packs, random_.choice([0, 1, 2, 4]), other, state=state)
        if given:
            yields.append(now)
            assert len(given) < len(packs)
            packs = [pack for pack in packs if pack not in given]
        elif len(packs) < 4 and random_.random() < 0.1:
            packs.append(f"p{now:.0f}")
    gaps = [after - before for before, after in itertools.pairwise(yields)]
    assert len(yields) > 20 and min(gaps) >= 180.0


# ---- a driver's part ----


class Known(Sharing):
    """The driver's part, with what the other sweeps want given."""

    others, cluster = (), Cluster(())

    def _others(self):
        self._names = tuple(one.name for one in self.others)
        return list(self.others)

    def _shares(self, mine, others):
        return fair_shares(self.cluster, [mine, *others])

    def _free(self):
        return self.cluster, [Node({}) for _ in self.cluster.nodes]


class Told:
    """Takes every remote call, and keeps the last one's arguments by its name."""

    def __init__(self):
        self.heard = {}

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *given: self.heard.__setitem__(name, given))


class Hosts:
    """What a driver has of its model hosts and its stream."""

    def __init__(self):
        self.wanted, self.hosts_up, self.at_most, self.stream, self.halted = 0, [], None, Told(), []

    def limit(self, at_most):
        self.at_most = at_most

    def halt_packs(self, packs, why):
        self.halted += packs
        return why == YIELD


def a_driver(yield_after_seconds=0):
    spec = SimpleNamespace(name="mine", resources=ResourceSpec(yield_after_seconds=yield_after_seconds))
    said = []
    sharing, hosts = Known(spec, 5.0, fleet := Hosts(), said.append), fleet
    trials = SimpleNamespace(at_most=math.inf, left=4, waiting=["c", "d"], is_full=True)
    return sharing, hosts, trials, said


def at_work(*packs):
    return {"packs": {pack: {"status": "live"} for pack in packs}}


def test_a_sweep_alone_keeps_to_nothing():
    sharing, hosts, trials, said = a_driver()
    assert sharing.begin(slots=3) == 3 and hosts.at_most is None
    sharing.demand("mine", packs=4)
    sharing.look(trials, at_work("a", "b"), now=True)
    assert trials.at_most == math.inf and said == [] and sharing.report == {"slots": None, "sweeps": []}
    [told] = hosts.stream.heard["set_demand"]
    assert (told["packs"], told["running"]) == (4, 2)


def test_who_comes_later_asks_for_no_host_before_there_is_room_and_has_all_when_the_first_ends():
    sharing, hosts, trials, said = a_driver()
    sharing.cluster, sharing.others = cluster_of(6), [demand("first")]
    assert sharing.begin(slots=5) == 2 and hosts.at_most == 0
    assert said == ["other sweeps are at work on this cluster: sweep first; it is shared with them"]
    sharing.others = []  # it ends before the second has looked again
    sharing.look(trials, at_work(), now=True)
    assert hosts.at_most is None and trials.at_most == math.inf
    assert said[-1] == "the cluster is no longer shared with other sweeps"


def test_a_sweep_keeps_to_its_share_and_gives_back_what_is_beyond():
    sharing, hosts, trials, said = a_driver()
    sharing.cluster = cluster_of(6)
    sharing.demand("mine", packs=4)
    sharing.others = [demand("other", since=9.0, short_since=1.0)]
    sharing.look(trials, at_work("a", "b", "e"), now=True)
    assert trials.at_most == 2 and hosts.at_most == 1 and len(hosts.halted) == 1
    assert said == ["sharing the cluster with sweep sweep other: 2 of 4 packs at once",
                    f"sweep sweep other waits for its share: 1 pack(s) are saved, end, and go on when there is room "
                    f"again: {hosts.halted[0]}"]  # fmt: skip
    assert hosts.stream.heard["postpone"] == (["c", "d"],)
    assert sharing.report == {"slots": 2, "sweeps": ["sweep other"]}


def test_a_sweep_for_which_there_is_no_room_gives_its_hosts_up_unless_a_pack_is_at_work():
    """Two that began at the same time may have taken everything for hosts: the later one lets go."""
    sharing, hosts, trials, said = a_driver()
    sharing.cluster, sharing.others = cluster_of(2), [demand("first")]
    sharing.demand("mine", packs=4)
    sharing.look(trials, at_work(), now=True)
    assert hosts.at_most == 0 and trials.at_most == 0 and said[-1].startswith("waiting for sweep sweep first: beside")
    sharing.look(trials, at_work("a"), now=True)
    assert hosts.at_most == 1 and hosts.halted == []
    sharing.look(None, at_work(), now=True)  # its SAEs are evaluated
    assert hosts.at_most == 1


# ---- waves ----


def test_packs_that_do_not_start_now_hold_nobody_up():
    state = StreamState(10, window=2)
    state.expect({"a": ("x",), "b": ("x",)}, 0, {})
    state.open_cohort(0, 0.0)
    state.host_up("h")
    state.attach("a", ("x",), 0, 0.0)

    def read(block):
        if (work := state.next_work()) is None:
            return False
        state.produced(work, {name: "o" for name in work.arrays})
        if state.take("a", block, 1.0) is None:
            return False
        state.acknowledge("a", block, 1.0)
        return True

    assert read(0) and read(1) and not read(2)  # b is waited for, until the barrier ends
    state.postpone(["b", "unknown"])
    assert all(read(block) for block in range(2, 10))
    state.attach("b", ("x",), 0, BARRIER_SECONDS * 3)  # it comes all the same, and begins where it stands
    work = state.next_work()
    assert work is not None and work.block == 0


def test_packs_of_waves_to_come_are_waited_for_as_before():
    state = StreamState(10, window=2)
    state.expect({"a": ("x",)}, 0, {})
    state.expect({"b": ("x",)}, 1, {})
    state.open_cohort(0, 0.0)
    state.postpone(["b"])
    assert state.members["b"].status == "expected"


def test_a_request_is_named_by_the_fields_of_the_spec():
    request = Request("pack", {"CPU": 1, "slot": 1})
    assert request.field_of("CPU") == "resources.cpus_per_pack"
    assert request.field_of("slot") == "resources.pack_resources"
