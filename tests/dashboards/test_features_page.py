"""What a feature browser's page and server hold and refuse, without a browser."""

import base64
import gzip
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from penstock.errors import CheckpointError, SweepError
from penstock.feature_server import serve
from penstock_dashboards.features import write_page
from sample_features import DEAD, HOSTILE, WORDS, write_features

LATENTS = 100  # two chunks of the page
TOP, EACH = 6, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_features(tmp_path_factory.mktemp("features") / "made", LATENTS, top=TOP, per_quantile=EACH)


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory) -> str:
    return write_page(folder, tmp_path_factory.mktemp("page") / "p.html").read_text(encoding="utf-8")


def block(page: str, name: str) -> bytes:
    found = re.search(rf'<script type="application/octet-stream" id="{name}">([A-Za-z0-9+/=]*)</script>', page)
    return base64.b64decode(found[1], validate=True)


def unpacked(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A block, read as its description says and not as the code that writes it does."""
    plain = gzip.decompress(data)
    [length] = struct.unpack("<I", plain[:4])
    header, rest = json.loads(plain[4 : 4 + length]), plain[4 + length :]
    arrays = {}
    for name, kind, count in header["arrays"]:
        size = int(kind[1])
        planes = np.frombuffer(rest[: size * count], np.uint8).reshape(size, count)
        arrays[name], rest = np.ascontiguousarray(planes.T).view(f"<{kind}")[:, 0], rest[size * count :]
    assert not rest
    return header, arrays


def data_of(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_index_holds_every_latent_and_the_tokens_around_its_peaks(folder, page):
    header, index = unpacked(block(page, "index"))
    latents = pq.read_table(folder / "latents.parquet").to_pydict()
    assert index["latent"].tolist() == list(range(LATENTS)) and index["fired"].tolist() == latents["fired"]
    np.testing.assert_allclose(index["firing_rate"], latents["firing_rate"], rtol=1e-6)
    np.testing.assert_array_equal(index["max_activation"], np.float32(latents["max_activation"]))
    texts = header["texts"]
    assert sorted(texts) == sorted(pq.read_table(folder / "vocabulary.parquet")["text"].to_pylist())
    alive = [latent for latent in range(LATENTS) if latent % DEAD != DEAD - 1]
    assert index["near_counts"].tolist() == [TOP if latent in alive else 0 for latent in range(LATENTS)]
    assert set(index["near_lengths"]) == {7} and set(index["near_peaks"]) == {4}
    peaks = [texts[token] for token in index["near_tokens"].reshape(-1, TOP, 7)[:, 0, 4]]
    assert peaks == [WORDS[latent % len(WORDS)] for latent in alive]
    promoted = [texts[token] for token in index["top_tokens"].reshape(-1, 10)[:, 0]]
    assert promoted == [WORDS[latent % len(WORDS)] for latent in range(LATENTS)]


def test_the_chunks_hold_every_example_to_the_precision_that_is_shown(folder, page):
    header, _ = unpacked(block(page, "index"))
    chunks = [unpacked(block(page, f"chunk-{number}"))[1] for number in range(2)]
    assert "chunk-2" not in page
    whole = pq.read_table(folder / "examples.parquet").to_pydict()
    every = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    assert every["lengths"].sum() == sum(map(len, whole["tokens"]))
    texts = pq.read_table(folder / "vocabulary.parquet")["text"].to_pylist()
    flat = [texts[token] for window in whole["tokens"] for token in window]
    assert [header["texts"][token] for token in every["tokens"]] == flat
    assert every["row"].tolist() == whole["row"] and every["position"].tolist() == whole["position"]
    assert every["peak"].tolist() == whole["peak"]
    assert every["group"].tolist() == [0 if name == "top" else int(name[1]) for name in whole["group"]]
    np.testing.assert_allclose(every["activation"], whole["activation"], rtol=2**-14)
    most = pq.read_table(folder / "latents.parquet")["max_activation"].to_numpy()[np.array(whole["latent"])]
    values, lengths = np.concatenate(whole["activations"]), every["lengths"]
    shown = every["activations"] / 255 * np.repeat(most, lengths)
    np.testing.assert_allclose(shown, values, atol=most.max() / 255)
    assert ((every["activations"] > 0) == (values > 0)).all()
    latents = pq.read_table(folder / "latents.parquet").to_pydict()
    for name in ("histogram", "neighbours", "top_logits", "bottom_logits", "neighbour_cosines"):
        np.testing.assert_allclose(every[name], np.concatenate(latents[name]), rtol=2**-12, err_msg=name)


def test_nothing_of_the_corpus_stands_in_the_markup(page):
    outside = re.sub(r"<script.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not any(text in outside for text in HOSTILE if len(text) > 1)
    assert "http://" not in outside and "https://" not in outside and " src=" not in outside
    assert not re.search(r"\$[a-z_]+", outside)


def test_names_of_an_sae_are_text(tmp_path):
    nasty = "</script><img src=x onerror=hacked()>\ud800\u2028"
    written = write_features(tmp_path / "f", 4, neuronpedia_id="x/../y", sae={"id": nasty, "folder": nasty,
                             "metadata": {"hook_name": nasty, "model_name": nasty}})  # fmt: skip
    page = write_page(written, tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<img" not in page and data_of(page)["neuronpedia"] is None
    assert data_of(page)["sae"]["id"] == nasty.replace("\ud800", "?")


def test_a_page_that_would_be_too_large_keeps_fewer_examples_and_says_so(folder, page, tmp_path):
    limit = len(page.encode()) - 30_000
    smaller = write_page(folder, tmp_path / "p.html", limit=limit).read_text(encoding="utf-8")
    kept = data_of(smaller)["kept"]
    assert "kept" not in data_of(page)
    assert len(smaller.encode()) <= limit and 1 <= kept["top"] <= TOP and kept["each"] < EACH
    _, chunk = unpacked(block(smaller, "chunk-0"))
    assert set(chunk["example_counts"]) == {0, kept["top"] + 5 * kept["each"]}
    least = write_page(folder, tmp_path / "p.html", limit=1).read_text(encoding="utf-8")
    assert data_of(least)["kept"] == {"top": 1, "each": 0}


@pytest.mark.parametrize(("latents", "fires"), [(1, True), (1, False), (70, False)])
def test_an_sae_of_one_latent_or_of_dead_ones_has_a_page(tmp_path, latents, fires):
    written = write_features(tmp_path / "f", latents, fires=fires)
    page = write_page(written, tmp_path / "p.html").read_text(encoding="utf-8")
    assert unpacked(block(page, "index"))[1]["latent"].size == latents


def test_what_cannot_be_read_or_written_is_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="nothing-here"):
        write_page(tmp_path / "nothing-here", tmp_path / "p.html")
    (tmp_path / "file").touch()
    with pytest.raises(SweepError, match="cannot be written"):
        write_page(folder, tmp_path / "file" / "p.html")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


# ---- the server -----------------------------------------------------------------------------------------------------


def get(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


@pytest.fixture(scope="module")
def address(folder):
    with serve(folder) as address:
        yield address


def test_the_server_has_the_page_and_each_latents_examples(folder, page, address):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    with urllib.request.urlopen(address) as answer:
        served = answer.read().decode()
    assert data_of(served)["served"] and "chunk-0" not in served and "connect-src 'self'" in served
    assert "connect-src" not in page
    status, body, headers = get(address, "/examples/70")
    _, one = unpacked(body)
    assert status == 200 and one["example_counts"].tolist() == [TOP + 5 * EACH]
    whole = pq.read_table(folder / "examples.parquet", filters=[("latent", "==", 70)])
    assert one["row"].tolist() == whole["row"].to_pylist()
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["X-Content-Type-Options"] == "nosniff"
    _, dead = unpacked(get(address, f"/examples/{DEAD - 1}")[1])
    assert dead["example_counts"].tolist() == [0] and dead["lengths"].size == 0


OTHER_PATHS = ("/examples/100", "/examples/-1", "/examples/x", "/about.json", "/../about.json", "//etc/passwd", "*",
               "/examples/../../etc/passwd", "/examples/99999999999")  # fmt: skip


@pytest.mark.parametrize("path", OTHER_PATHS)
def test_no_other_path_is_answered(address, path):
    status, body, _ = get(address, path)
    assert status == 404 and len(body) < 100


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil", ""])
def test_another_hosts_name_is_refused(address, host):
    assert get(address, "/", Host=host)[0] == 421


def test_names_of_this_machine_are_answered(address):
    for host in ("127.0.0.1", "localhost:9999", "LOCALHOST"):
        assert get(address, "/", "HEAD", Host=host)[:2] == (200, b"")
    assert get(address, "/", "POST")[0] == 501


def test_a_port_that_is_taken_or_impossible_is_named(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SweepError, match=f"port {port}"), serve(folder, port):
            pass
    with pytest.raises(SweepError, match="port 70000"), serve(folder, 70000):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_stops_when_it_is_asked_to(folder, number):
    code = f"from penstock.feature_server import serve_until_interrupted as run; run({str(folder)!r})"
    process = subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        assert get(address, "/")[0] == 200
        os.kill(process.pid, number)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()
