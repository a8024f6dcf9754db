import gc
import multiprocessing
import os
import pickle
import re
import resource
import time

import numpy as np
import pyarrow as pa
import pytest

import penstock.spool
from penstock.cli import main
from penstock.spool import Spool, SpoolError
from penstock.storage import Storage

ONE, OTHER, THIRD = "0123456789ab", "ba9876543210", "c0ffee000000"
EARLY, LATE = "blocks.1.hook_resid_post", "blocks.4.hook_mlp_out@blocks.4.ln2.hook_normalized+blocks.4.hook_mlp_out"


def block_of(number: int, tokens: int = 64, d: int = 16, dtype: type = np.float32) -> np.ndarray:
    return (np.random.default_rng(number).standard_normal((tokens, d)) * 100).astype(dtype)


def block_path(root, block: int = 0, array: str = EARLY, stream: str = ONE):
    return root / stream / array / f"{block:07d}.arrow"


def let_rest(root, stream: str, hours: float) -> None:
    """Make it as if a stream had not been used for so long."""
    past = time.time() - hours * 3600
    for path in (root / stream).rglob("*"):
        os.utime(path, (past, past))


def object_storage(name: str) -> Storage:
    """Arrow's file system in memory, reached as object storage is; unlike that it wants its folders made."""
    storage = Storage(f"mock:///{name}")
    for array in (EARLY, LATE):
        storage._fs.create_dir(storage.path(f"{ONE}/{array}"), recursive=True)
    return storage


@pytest.fixture(params=["disk", "object storage"])
def storage(request, tmp_path) -> Storage:
    return Storage(tmp_path) if request.param == "disk" else object_storage(tmp_path.name)


# ---- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "numpy_type"), [("float32", "f4"), ("float16", "f2"), ("bfloat16", "u2")])
@pytest.mark.parametrize("shape", [(64, 16), (1, 1), (0, 16)])
def test_a_block_is_read_as_it_was_written(storage, dtype, numpy_type, shape):
    stream = Spool(storage).stream(ONE)
    values = block_of(3, *shape, np.dtype(numpy_type).type)
    assert not stream.has(LATE, 7) and stream.blocks(LATE) == []
    assert stream.write(LATE, 7, values, dtype)
    read = stream.read(LATE, 7, dtype)
    assert read.dtype == values.dtype and read.shape == shape and read.tobytes() == values.tobytes()
    assert not read.flags.writeable
    assert stream.has(LATE, 7) and stream.blocks(LATE) == [7] and stream.blocks(EARLY) == []


def test_the_first_to_write_a_block_has_written_it(storage):
    stream = Spool(storage).stream(ONE)
    assert [stream.write(EARLY, block, block_of(block), "float32") for block in (4, 0, 4)] == [True, True, False]
    assert stream.blocks(EARLY) == [0, 4] and stream.full is None
    stream.remove(EARLY, 4)
    stream.remove(EARLY, 4)
    assert stream.blocks(EARLY) == [0]


def test_only_rows_that_lie_apart_in_memory_are_copied(tmp_path):
    stream = Spool(Storage(tmp_path)).stream(ONE)
    values = block_of(0, 1 << 15, 32)
    before = pa.default_memory_pool().max_memory()
    stream.write(EARLY, 0, values, "float32")
    read = stream.read(EARLY, 0)
    assert pa.default_memory_pool().max_memory() - before < 1 << 16
    np.testing.assert_array_equal(read, values)
    for number, apart in enumerate((values[:64, ::2], np.asfortranarray(values[:64])), 1):
        stream.write(EARLY, number, apart, "float32")
        np.testing.assert_array_equal(stream.read(EARLY, number), apart)


def test_a_stream_travels_by_pickle(tmp_path):
    stream = pickle.loads(pickle.dumps(Spool(Storage(tmp_path), limit_bytes=1 << 20).stream(ONE)))
    assert stream.write(EARLY, 0, block_of(0), "float32")
    again = pickle.loads(pickle.dumps(stream))
    np.testing.assert_array_equal(again.read(EARLY, 0), block_of(0))
    assert again.spool.limit_bytes == 1 << 20 and again.id == ONE


def test_any_arrow_reader_can_read_a_block(tmp_path):
    Spool(Storage(tmp_path)).stream(ONE).write(EARLY, 2, block_of(2), "float32")
    table = pa.ipc.open_file(str(block_path(tmp_path, 2))).read_all()
    np.testing.assert_array_equal(np.array(table["activations"].to_pylist(), np.float32), block_of(2))
    assert table.schema.metadata.items() >= {
        b"format": b"1", b"stream": ONE.encode(), b"array": EARLY.encode(), b"block": b"2", b"dtype": b"float32",
    }.items()  # fmt: skip


def test_blocks_in_use_hold_no_file_open_and_outlive_their_removal(tmp_path):
    spool = Spool(Storage(tmp_path))
    stream = spool.stream(ONE)
    for block in range(8):
        stream.write(EARLY, block, block_of(block), "float32")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    held = [stream.read(EARLY, block) for block in range(8)]
    assert len(os.listdir("/proc/self/fd")) == before
    spool.prune()
    for block, values in enumerate(held):
        np.testing.assert_array_equal(values, block_of(block))


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """(stream, path, bytes of the file, where its activations lie) of a small block of 8 KiB."""
    stream = Spool(Storage(tmp_path)).stream(ONE)
    values = block_of(0, 128, 16)
    stream.write(EARLY, 0, values, "float32")
    path = block_path(tmp_path)
    data = path.read_bytes()
    return stream, path, data, range(start := data.index(values.tobytes()), start + values.nbytes)


def test_a_missing_block_is_named(tmp_path):
    with pytest.raises(SpoolError, match=re.escape(f"{block_path(tmp_path)} is missing")):
        Spool(Storage(tmp_path)).stream(ONE).read(EARLY, 0)
    assert list(tmp_path.iterdir()) == []


def test_every_cut_is_found(written):
    stream, path, data, _ = written
    ends = {*range(0, len(data), 97), *range(64), *range(len(data) - 700, len(data))}
    for end in sorted(ends):
        path.write_bytes(data[:end])
        with pytest.raises(SpoolError, match=re.escape(f"{path} is empty, cut off or damaged")):
            stream.read(EARLY, 0)


def test_every_flipped_bit_of_the_activations_is_found(written):
    stream, path, data, inside = written
    for bit in range(inside.start * 8, inside.stop * 8, 101):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(SpoolError, match=re.escape(f"{path} is damaged")):
            stream.read(EARLY, 0)


def test_no_flipped_bit_around_the_activations_gives_other_ones_or_ends_the_process(written):
    stream, path, data, inside = written
    expected, found = data[inside.start : inside.stop], 0
    outside = [*range(inside.start), *range(inside.stop, len(data))]
    for byte in outside:
        for bit in (byte % 8, (byte + 4) % 8):
            path.write_bytes(flipped(data, byte * 8 + bit))
            try:  # padding, and the copy of the schema that a reader of the footer does not look at, change nothing
                assert stream.read(EARLY, 0).tobytes() == expected
            except SpoolError as error:
                assert str(path) in str(error)
                found += 1
    assert found > len(outside) * 2 * 0.3


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_stretch_that_a_power_cut_left_as_zeros_is_found(written):
    stream, path, data, inside = written
    for start, stop in ((0, len(data)), (inside.start, inside.start + 512), (len(data) - 512, len(data))):
        path.write_bytes(data[:start] + bytes(stop - start) + data[stop:])
        with pytest.raises(SpoolError, match="damaged"):
            stream.read(EARLY, 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (dict(stream=ONE, array=EARLY, block=1), "its block is '1', not '0'"),
        (dict(stream=ONE, array=LATE, block=0), "of another block, or damaged: its array is"),
        (dict(stream=OTHER, array=EARLY, block=0), f"its stream is '{OTHER}', not '{ONE}'"),
    ],
)
def test_a_block_in_the_place_of_another_is_found(written, tmp_path, source, message):
    stream, path, _, _ = written
    stream.spool.stream(source["stream"]).write(source["array"], source["block"], block_of(0, 128, 16), "float32")
    block_path(tmp_path, **source).rename(path)
    with pytest.raises(SpoolError, match=re.escape(message)):
        stream.read(EARLY, 0)


def test_a_block_of_another_dtype_is_found(written):
    stream = written[0]
    with pytest.raises(SpoolError, match="of another dtype, or is damaged: 'float32'; accepted: bfloat16"):
        stream.read(EARLY, 0, "bfloat16")


@pytest.mark.parametrize("change", ["dtype", "shape", "checksum", "column", "batches", "nulls", "no metadata", "text"])
def test_a_foreign_file_is_found(written, change):
    stream, path, _, _ = written
    batch = pa.ipc.open_file(path.read_bytes()).get_batch(0)
    metadata = dict(batch.schema.metadata)
    column, name, times = batch.column(0), "activations", 1
    if change == "dtype":
        metadata[b"dtype"] = b"float16"
    elif change == "shape":
        metadata[b"shape"] = b"64,32"
    elif change == "checksum":
        metadata[b"xxh3_128"] = b"0" * 32
    elif change == "column":
        name = "x"
    elif change == "batches":
        times = 2
    elif change == "nulls":
        column = pa.array([None, *column.to_pylist()[1:]], column.type)
    elif change == "no metadata":
        metadata = None
    schema = pa.schema([pa.field(name, column.type)], metadata)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for _ in range(times):
            writer.write_batch(pa.RecordBatch.from_arrays([column], schema=schema))
    if change == "text":
        path.write_text("not a block\n" * 100)
    with pytest.raises(SpoolError, match=re.escape(str(path))):
        stream.read(EARLY, 0)


def test_damage_in_object_storage_is_found():
    storage = object_storage("damaged")
    stream = Spool(storage).stream(ONE)
    stream.write(EARLY, 0, block_of(0), "float32")
    name = f"{ONE}/{EARLY}/0000000.arrow"
    data = storage.read(name)
    for damaged in (b"", data[:-1], data[: len(data) // 2], flipped(data, len(data) * 4)):
        storage.write(name, damaged)
        with pytest.raises(SpoolError, match="damaged"):
            stream.read(EARLY, 0)
    stream.remove(EARLY, 0)
    with pytest.raises(SpoolError, match="is missing"):
        stream.read(EARLY, 0)


# ---- several processes ----------------------------------------------------------------------------------------------

BLOCKS, SHARED = 12, (4096, 64)


def write_all(root: str, results) -> None:
    stream = Spool(Storage(root), limit_bytes=1 << 30).stream(ONE)
    results.put(sum(stream.write(EARLY, block, block_of(block, *SHARED), "float32") for block in range(BLOCKS)))


def read_all(root: str, ready, results) -> None:
    """Read every block until it is there; the number of times it was not, or what was wrong with it."""
    stream = Spool(Storage(root)).stream(ONE)
    expected = [block_of(block, *SHARED) for block in range(BLOCKS)]
    missing, deadline = 0, time.monotonic() + 30
    ready.set()
    for block in range(BLOCKS):
        while time.monotonic() < deadline:
            try:
                values = stream.read(EARLY, block)
            except SpoolError as error:
                if "is missing" not in str(error):
                    results.put(str(error))
                    return
                missing += 1
                time.sleep(0.0005)
                continue
            if not np.array_equal(values, expected[block]):
                results.put(f"block {block} is wrong")
                return
            break
    results.put(missing if time.monotonic() < deadline else "never there")


def test_a_reader_beside_two_writers_sees_whole_blocks_or_none(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, wrote, read = context.Event(), context.Queue(), context.Queue()
    reader = context.Process(target=read_all, args=(str(tmp_path), ready, read))
    writers = [context.Process(target=write_all, args=(str(tmp_path), wrote)) for _ in range(2)]
    try:
        reader.start()
        assert ready.wait(60)
        for process in writers:
            process.start()
        missing = read.get(timeout=90)
        assert isinstance(missing, int) and missing > 0, missing
        assert BLOCKS <= sum(wrote.get(timeout=90) for _ in writers) <= 2 * BLOCKS
    finally:
        for process in (reader, *writers):
            process.join(10)
            process.kill()
    assert [path.name for path in sorted(block_path(tmp_path).parent.iterdir())] == [
        f"{block:07d}.arrow" for block in range(BLOCKS)
    ]


# ---- room -----------------------------------------------------------------------------------------------------------

BLOCK_BYTES = 1 << 16  # of block_of(_, 256, 64), and a file has about 750 more


def fill(spool: Spool, stream_id: str, blocks: int) -> int:
    stream = spool.stream(stream_id)
    return sum(stream.write(EARLY, block, block_of(block, 256, 64), "float32") for block in range(blocks))


def test_streams_that_nobody_uses_make_room_the_least_recently_used_first(tmp_path):
    spool = Spool(Storage(tmp_path), limit_bytes=5 * BLOCK_BYTES)
    assert fill(spool, ONE, 2) == 2 and fill(spool, OTHER, 2) == 2
    let_rest(tmp_path, ONE, hours=2)
    let_rest(tmp_path, OTHER, hours=3)
    spool.stream(ONE).remove(LATE, 0)  # nothing; it makes the process look again
    assert fill(spool, THIRD, 2) == 2
    assert {info.id: info.blocks for info in spool.streams()} == {THIRD: 2, ONE: 2}


def test_a_stream_in_use_is_never_removed_for_room(tmp_path):
    spool = Spool(Storage(tmp_path), limit_bytes=9 * BLOCK_BYTES // 2)
    fill(spool, ONE, 4)
    stream = spool.stream(OTHER)
    for _ in range(2):
        assert not stream.write(EARLY, 0, block_of(0, 256, 64), "float32")
        assert "is full: it holds 0.00 of 0.00 GB" in stream.full
    assert fill(spool, ONE, 5) == 0  # nor its own blocks for the next
    assert [(info.id, info.blocks) for info in spool.streams() if info.blocks] == [(ONE, 4)]


def test_nothing_is_removed_where_that_would_not_be_enough(tmp_path):
    spool = Spool(Storage(tmp_path), limit_bytes=5 * BLOCK_BYTES)
    fill(spool, ONE, 3)
    fill(spool, OTHER, 1)
    let_rest(tmp_path, OTHER, hours=2)
    penstock.spool._usage(spool.storage).forget()
    assert not spool.stream(THIRD).write(EARLY, 0, block_of(0, 1024, 64), "float32")
    assert {info.id for info in spool.streams() if info.blocks} == {ONE, OTHER}


def test_a_stream_that_comes_into_use_after_the_measurement_stays(tmp_path):
    spool = Spool(Storage(tmp_path), limit_bytes=3 * BLOCK_BYTES)
    fill(spool, ONE, 2)
    let_rest(tmp_path, ONE, hours=2)
    usage = penstock.spool._usage(spool.storage)
    usage._measure(spool.storage)
    usage._due = time.monotonic() + 60
    spool.stream(ONE).touch()
    assert fill(spool, OTHER, 2) == 0
    assert spool.stream(ONE).blocks(EARLY) == [0, 1]


def test_the_spool_is_not_measured_at_every_block(tmp_path, monkeypatch):
    measured, scan = [], penstock.spool._scan
    monkeypatch.setattr(penstock.spool, "_MEASURE_SECONDS", 3600)
    monkeypatch.setattr(penstock.spool, "_scan", lambda storage: measured.append(1) or scan(storage))
    spool = Spool(Storage(tmp_path), limit_bytes=10 * BLOCK_BYTES)
    assert fill(pickle.loads(pickle.dumps(spool)), ONE, 20) == 10
    assert fill(spool, OTHER, 3) == 0
    assert len(measured) == 1


@pytest.fixture
def file_limit():
    """Files of this process end at 32 KiB, as on a disk that fills up while a block is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, file_limit):
    stream = Spool(Storage(tmp_path)).stream(ONE)
    assert not stream.write(EARLY, 0, block_of(0, 256, 64), "float32")
    assert stream.full == f"{block_path(tmp_path)} cannot be written: File too large"
    assert list(block_path(tmp_path).parent.iterdir()) == [] and not stream.has(EARLY, 0)
    assert stream.write(EARLY, 0, block_of(0), "float32") and stream.full is None


def test_the_last_of_the_disk_is_left_to_others(tmp_path, monkeypatch):
    monkeypatch.setattr(penstock.spool, "_SPARE_BYTES", 1 << 60)
    stream = Spool(Storage(tmp_path)).stream(ONE)
    assert not stream.write(EARLY, 0, block_of(0), "float32")
    assert stream.full.startswith(f"the disk of spool '{tmp_path}' is full")


def test_a_spool_that_cannot_be_written_to_is_full(tmp_path):
    (tmp_path / ONE).write_text("a file in the place of a stream")
    stream = Spool(Storage(tmp_path)).stream(ONE)
    stream.describe({"model": "gpt2"})
    stream.touch()
    assert not stream.write(EARLY, 0, block_of(0), "float32") and stream.full
    assert not stream.has(EARLY, 0) and stream.blocks(EARLY) == []


# ---- streams --------------------------------------------------------------------------------------------------------


def test_streams_are_listed_with_what_was_said_of_them(storage):
    spool = Spool(storage)
    assert spool.streams() == []
    stream = spool.stream(ONE)
    stream.describe({"model": "gpt2", "n_blocks": 3})
    stream.describe({"model": "another"})
    for array, block in ((EARLY, 0), (EARLY, 1), (LATE, 0)):
        stream.write(array, block, block_of(block), "float32")
    (info,) = spool.streams()
    assert (info.id, info.about, info.arrays, info.blocks) == (ONE, {"model": "gpt2", "n_blocks": 3}, (EARLY, LATE), 3)
    assert 3 * block_of(0).nbytes < info.bytes < 3 * block_of(0).nbytes + 6000
    assert abs(info.used - time.time()) < 10


def test_prune_removes_the_least_recently_used_first(tmp_path):
    spool = Spool(Storage(tmp_path))
    for age, stream_id in enumerate((ONE, OTHER, THIRD)):
        fill(spool, stream_id, 1)
        let_rest(tmp_path, stream_id, hours=10 - age)
    assert spool.prune(3 * BLOCK_BYTES + 5000) == []
    assert spool.prune(unused_seconds=11 * 3600) == []
    assert [info.id for info in spool.removable(keep={OTHER})] == [ONE, THIRD]
    assert [info.id for info in spool.prune(2 * BLOCK_BYTES + 5000)] == [ONE]
    assert [info.id for info in spool.prune(keep={OTHER}, unused_seconds=3600)] == [THIRD]
    assert [info.id for info in spool.prune()] == [OTHER]
    assert list(tmp_path.iterdir()) == []


def test_prune_in_object_storage():
    spool = Spool(object_storage("pruned"))
    fill(spool, ONE, 1)
    assert [info.id for info in spool.prune()] == [ONE]
    assert spool.streams() == [] and not spool.stream(ONE).has(EARLY, 0)


def test_what_is_no_stream_is_neither_listed_nor_removed(tmp_path):
    for name in ("manifest.json", f"{ONE}/final/cfg.json", f"{OTHER}/attempt.json", "tokens/used", f"x{ONE}/used"):
        Storage(tmp_path).write(name, b"1")
    spool = Spool(Storage(tmp_path))
    assert spool.streams() == [] and spool.prune() == []
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 5


def test_describing_a_stream_removes_what_killed_writers_left(tmp_path):
    stream = Spool(Storage(tmp_path)).stream(ONE)
    stream.write(EARLY, 0, block_of(0), "float32")
    left, fresh = (block_path(tmp_path).with_suffix(f".arrow.0000000{n}.tmp") for n in range(2))
    left.write_bytes(b"1" * 5000)
    let_rest(tmp_path, ONE, hours=2)
    fresh.write_bytes(b"1" * 5000)
    assert stream.blocks(EARLY) == [0] and stream.spool.streams()[0].bytes > 10_000
    stream.describe({})
    assert not left.exists() and fresh.exists() and stream.has(EARLY, 0)


def test_reading_says_that_a_stream_is_in_use(tmp_path):
    spool = Spool(Storage(tmp_path))
    fill(spool, ONE, 1)
    let_rest(tmp_path, ONE, hours=5)
    spool.stream(ONE).read(EARLY, 0)
    assert abs(spool.streams()[0].used - time.time()) < 10


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home whose spool has two streams, one of them not used for three days."""
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path))
    spool = Spool(Storage(tmp_path / "spool"))
    for stream_id, model in ((ONE, "gpt2"), (OTHER, "pythia-70m")):
        spool.stream(stream_id).describe({"model": model, "dataset": "demo"})
        fill(spool, stream_id, 2)
    let_rest(tmp_path / "spool", ONE, hours=72)
    return tmp_path


def test_list_shows_the_streams_of_the_home_or_of_a_folder(home, capsys):
    for arguments in (
        ["spool", "list"],
        ["spool", "list", str(home / "spool")],
        ["spool", "list", f"file://{home}/spool"],
    ):
        assert main(arguments) == 0
        head, _, newest, oldest, blank, total = capsys.readouterr().out.splitlines()
        assert re.split("  +", head) == ["stream", "model", "dataset", "hook points", "blocks", "size", "last used"]
        assert re.split("  +", newest)[:6] == [OTHER, "pythia-70m", "demo", EARLY, "2", "0.1 MB"]
        assert oldest.startswith(ONE) and oldest.endswith("UTC") and blank == ""
        assert total.startswith("2 streams, 0.3 MB in ") and total.endswith(f"{home}/spool")


def test_prune_says_what_would_go_and_removes_it_with_yes(home, capsys):
    command = ["spool", "prune", "--older-than", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert ONE in out and OTHER not in out and "1 stream, 0.1 MB would be removed from" in out and "--yes" in out
    assert (home / "spool" / ONE).exists()
    assert main([*command, "--yes"]) == 0
    out = capsys.readouterr().out
    assert "1 stream, 0.1 MB removed from" in out and "--yes" not in out
    assert [path.name for path in (home / "spool").iterdir()] == [OTHER]
    assert main([*command, "--yes"]) == 0
    assert capsys.readouterr().out == f"0 streams, 0.0 MB removed from {home}/spool\n"


@pytest.mark.parametrize(("option", "left"), [(["--keep", "0.0002"], OTHER), (["--stream", OTHER[:3]], ONE)])
def test_prune_keeps_so_much_or_removes_one_stream(home, option, left):
    assert main(["spool", "prune", *option, "--yes"]) == 0
    assert [path.name for path in (home / "spool").iterdir()] == [left]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--stream", "ffff"], "--stream 'ffff' names 0 streams of"),
        (["prune", "--stream", ""], f"it holds {OTHER}, {ONE}"),
        (["list", "{home}/no"], "/no' is no such folder; accepted: the folder or URI of a spool"),
        (["list", "{home}/file"], "/file' is no such folder"),
        (["list", "nosuch://x"], "storage 'nosuch://x' cannot be used"),
    ],
)
def test_what_a_user_got_wrong_is_one_message(home, capsys, arguments, message):
    (home / "file").touch()
    assert main(["spool", *(argument.format(home=home) for argument in arguments)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("penstock: ") and message in error
    assert len(list((home / "spool").iterdir())) == 2
