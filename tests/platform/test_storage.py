import pytest

from penstock.errors import CheckpointError
from penstock.storage import Storage


def test_a_folder_counts_only_with_its_manifest(tmp_path):
    storage = Storage(tmp_path)
    storage.write("x/a.bin", b"1")
    assert not storage.is_committed("x")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        storage.read_folder("x")
    storage.commit_folder("x", {"a.bin": b"12", "b.bin": b"3"})
    assert storage.read_folder("x") == {"a.bin": b"12", "b.bin": b"3"}


@pytest.mark.parametrize("damage", [b"", b"13", None])
def test_a_truncated_changed_or_missing_file_is_found(tmp_path, damage):
    storage = Storage(tmp_path)
    storage.commit_folder("x", {"a.bin": b"12"})
    if damage is None:
        (tmp_path / "x/a.bin").unlink()
    else:
        (tmp_path / "x/a.bin").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        storage.read_folder("x")


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    storage = Storage(tmp_path)
    storage.write("a.json", b"old")
    with pytest.raises(TypeError):
        storage.write("a.json", "not bytes")
    assert storage.read("a.json") == b"old"
    assert storage.names("") == ["a.json"]


def test_the_same_files_by_uri(tmp_path):
    Storage(tmp_path).write("f/a", b"1")
    by_uri = Storage(f"file://{tmp_path}")
    assert by_uri.read("f/a") == b"1"
    by_uri.at("f").write("b", b"2")
    assert Storage(tmp_path).names("f") == ["a", "b"]
    by_uri.delete("f")
    assert Storage(tmp_path).names("f") == []
