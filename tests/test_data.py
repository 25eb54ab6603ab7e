"""Downloads resume, are verified, and never leave half a file under a whole file's name."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from unrecurrent import data
from unrecurrent.download import Unreachable, download
from unrecurrent.errors import InputError
from unrecurrent.tasks import chorales, jsb
from unrecurrent.tasks.digits import Digits
from unrecurrent.tasks.mnist import MNIST
from unrecurrent.tasks.ptb_char import PTBChar
from unrecurrent.tasks.task import Source

CONTENT = bytes(range(256)) * 4000  # a megabyte: several blocks


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Server:
    """A web server on this machine that serves `files` and can be told to misbehave."""

    files: dict[str, bytes]
    address: str = ""
    ranges: bool = True
    stop_after: int | None = None  # close the connection after so many bytes of a body
    asked: list[str | None] = field(default_factory=list)  # the Range header of every request

    def url(self, name: str) -> str:
        return f"http://{self.address}/{name}"


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server({"file.bin": CONTENT})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            state.asked.append(wanted)
            content = state.files.get(self.path.lstrip("/"))
            if content is None:
                self.send_error(404)
                return
            start = 0
            if wanted and state.ranges:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: state.stop_after])

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        state.address = f"127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


# --- one file ---------------------------------------------------------------------------------------------------


def test_a_download_arrives_whole_and_reports_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    download(server.url("file.bin"), tmp_path / "x.part", lambda *args: seen.append(args))
    assert (tmp_path / "x.part").read_bytes() == CONTENT
    assert seen[-1] == ("file.bin", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert len(seen) > 2


def test_a_broken_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    server.stop_after = 300_001
    with pytest.raises(InputError, match=r"broke off after 300,001 of 1,024,000 bytes: run again") as error:
        download(server.url("file.bin"), part)
    sentence(error)
    assert part.read_bytes() == CONTENT[:300_001]
    server.stop_after = None
    seen: list[int] = []
    download(server.url("file.bin"), part, lambda _, done, total: seen.append(done))
    assert server.asked == [None, "bytes=300001-"]
    assert part.read_bytes() == CONTENT
    assert min(seen) > 300_001


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    part.write_bytes(b"something else")
    server.ranges = False
    download(server.url("file.bin"), part)
    assert part.read_bytes() == CONTENT


def test_a_part_that_is_complete_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    part.write_bytes(CONTENT)
    download(server.url("file.bin"), part)
    assert server.asked == [f"bytes={len(CONTENT)}-"]
    assert part.read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_started_again(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    part.write_bytes(CONTENT + b"more")
    download(server.url("file.bin"), part)
    assert part.read_bytes() == CONTENT


def test_a_file_that_is_gone_is_unreachable(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="404"):
        download(server.url("gone.bin"), tmp_path / "x.part")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.RawIOBase):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda *_, **__: Full())
    with pytest.raises(InputError, match="No space left on device") as error:
        download(server.url("file.bin"), tmp_path / "x.part")
    sentence(error)


# --- data sets --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_jsb(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The task `jsb` with `CONTENT` as its published file, on the local server."""
    source = Source("polymusic/JSB_Chorales.mat", server.url("file.bin"), sha256(CONTENT), "none")
    monkeypatch.setattr(jsb, "SOURCE", source)
    return server


def test_get_then_list_and_check(tiny_jsb: Server, tmp_path: Path) -> None:
    def states() -> list[str]:
        listed = [file for file in data.listing(tmp_path) if file.task == "jsb"]
        return [file.state for file in [*listed, *data.check("jsb", tmp_path)]]

    assert states() == ["missing", "missing"]
    (path,) = data.fetch("jsb", tmp_path)
    assert path == tmp_path / "polymusic" / "JSB_Chorales.mat"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["JSB_Chorales.mat"]
    assert states() == ["ready", "ready"]
    data.fetch("jsb", tmp_path)
    assert len(tiny_jsb.asked) == 1  # what is there is not fetched again
    path.write_bytes(CONTENT[:-1])
    assert states() == ["ready", "damaged"]


def test_get_resumes_after_a_lost_connection(tiny_jsb: Server, tmp_path: Path) -> None:
    tiny_jsb.stop_after = 500_000
    with pytest.raises(InputError, match="broke off after 500,000"):
        data.fetch("jsb", tmp_path)
    assert [p.name for p in (tmp_path / "polymusic").iterdir()] == ["file.bin.part"]
    with pytest.raises(InputError, match="broke off after 1,000,000"):
        data.fetch("jsb", tmp_path)
    (path,) = data.fetch("jsb", tmp_path)
    assert path.read_bytes() == CONTENT
    assert tiny_jsb.asked == [None, "bytes=500000-", "bytes=1000000-"]


def test_another_file_at_the_home_is_thrown_away(tiny_jsb: Server, tmp_path: Path) -> None:
    tiny_jsb.files["file.bin"] = CONTENT[:-1] + b"!"
    with pytest.raises(InputError, match="not the published file") as error:
        data.fetch("jsb", tmp_path)
    assert str(tmp_path / "polymusic" / "JSB_Chorales.mat") in sentence(error)
    assert list((tmp_path / "polymusic").iterdir()) == []


def test_a_part_of_another_file_does_not_stay_in_the_way(tiny_jsb: Server, tmp_path: Path) -> None:
    (tmp_path / "polymusic").mkdir()
    (tmp_path / "polymusic" / "file.bin.part").write_bytes(b"<html>")
    with pytest.raises(InputError, match="thrown away: run again"):
        data.fetch("jsb", tmp_path)
    (path,) = data.fetch("jsb", tmp_path)
    assert path.read_bytes() == CONTENT


def test_a_file_of_the_users_is_never_overwritten(tiny_jsb: Server, tmp_path: Path) -> None:
    path = tmp_path / "polymusic" / "JSB_Chorales.mat"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="move it away") as error:
        data.fetch("jsb", tmp_path)
    assert str(path) in sentence(error)
    assert path.read_bytes() == b"mine"
    assert tiny_jsb.asked == []


def test_without_network_the_message_says_where_to_put_which_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = Source("polymusic/JSB_Chorales.mat", "http://127.0.0.1:1/JSB_Chorales.mat", "", "none")
    monkeypatch.setattr(jsb, "SOURCE", nowhere)
    with pytest.raises(InputError, match="no connection") as error:
        data.fetch("jsb", tmp_path)
    for word in ("JSB_Chorales.mat", str(tmp_path / "polymusic"), "--data-dir", "UNRECURRENT_DATA"):
        assert word in sentence(error)


def test_a_folder_that_cannot_be_made_is_one_sentence(tiny_jsb: Server, tmp_path: Path) -> None:
    (tmp_path / "polymusic").write_text("a file")
    with pytest.raises(InputError, match="cannot be made") as error:
        data.fetch("jsb", tmp_path)
    sentence(error)


# --- several files in one archive -------------------------------------------------------------------------------

TEXTS = {split: f"{split} \n".encode() * 2000 for split in ("train", "valid", "test")}


def archive(texts: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in {"../../evil": b"evil", **{f"./dir/{k}.txt": v for k, v in texts.items()}}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def tiny_ptb(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    server.files["all.tgz"] = archive(TEXTS)
    sources = tuple(
        Source(f"ptb-char/{split}.txt", server.url("all.tgz"), sha256(text), "none", member=f"dir/{split}.txt")
        for split, text in TEXTS.items()
    )
    monkeypatch.setattr(PTBChar, "sources", sources)
    return server


def test_one_archive_brings_all_its_files_and_nothing_else(tiny_ptb: Server, tmp_path: Path) -> None:
    paths = data.fetch("ptb-char", tmp_path / "data")
    assert [path.read_bytes() for path in paths] == list(TEXTS.values())
    assert len(tiny_ptb.asked) == 1
    everything = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert everything == ["data/ptb-char/test.txt", "data/ptb-char/train.txt", "data/ptb-char/valid.txt"]


def test_a_zip_is_an_archive_too(tiny_ptb: Server, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, content in {"../../evil": b"evil", **{f"dir/{k}.txt": v for k, v in TEXTS.items()}}.items():
            file.writestr(name, content)
    tiny_ptb.files["all.tgz"] = packed.getvalue()
    paths = data.fetch("ptb-char", tmp_path / "data")
    assert [path.read_bytes() for path in paths] == list(TEXTS.values())
    assert not list(tmp_path.rglob("evil"))


def test_what_has_no_address_of_its_own_is_got_by_hand(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"find it on https://www\.nonlinearbenchmark\.org") as error:
        data.fetch("tanks", tmp_path)
    assert str(tmp_path / "sysid") in sentence(error)


def test_only_what_is_lacking_is_written(tiny_ptb: Server, tmp_path: Path) -> None:
    first = data.fetch("ptb-char", tmp_path)
    first[1].unlink()
    stamp = first[0].stat().st_mtime_ns
    data.fetch("ptb-char", tmp_path)
    assert first[1].read_bytes() == TEXTS["valid"]
    assert first[0].stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>sorry</html>", "is damaged"),
        (archive(TEXTS)[:-200], "is damaged"),
        (gzip.compress(b"no archive" * 100), "is damaged"),
        (archive(TEXTS | {"valid": b"other"}), "does not hold the published valid.txt"),
        (archive({"train": TEXTS["train"]}), "does not hold the published valid.txt"),
    ],
    ids=["page", "cut", "no archive", "another text", "text missing"],
)
def test_a_damaged_archive_is_thrown_away(content: bytes, words: str, tiny_ptb: Server, tmp_path: Path) -> None:
    tiny_ptb.files["all.tgz"] = content
    with pytest.raises(InputError, match=words) as error:
        data.fetch("ptb-char", tmp_path)
    assert "thrown away" in sentence(error)
    assert list((tmp_path / "ptb-char").iterdir()) == []


@pytest.fixture
def tiny_digits(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Three recordings of one speaker, and another speaker's, in a zip."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name in ("0_jackson_1.wav", "0_jackson_0.wav", "1_jackson_0.wav", "0_theo_0.wav"):
            file.writestr(f"all/recordings/{name}", name.encode())
    server.files["all.zip"] = packed.getvalue()
    names = ("0_jackson_0.wav", "0_jackson_1.wav", "1_jackson_0.wav")
    printed = "".join(f"{sha256(name.encode())}  {name}\n" for name in names)  # as sha256sum does
    member = "all/recordings/*_jackson_*.wav"
    source = Source(
        "digits/*_jackson_*.wav", server.url("all.zip"), sha256(printed.encode()), "none", member=member, files=3
    )
    monkeypatch.setattr(Digits, "sources", (source,))
    return server


def test_many_files_of_one_source_come_and_are_checked_together(tiny_digits: Server, tmp_path: Path) -> None:
    assert [file.state for file in data.check("digits", tmp_path)] == ["missing"]
    data.fetch("digits", tmp_path)
    found = sorted(path.name for path in (tmp_path / "digits").iterdir())
    assert found == ["0_jackson_0.wav", "0_jackson_1.wav", "1_jackson_0.wav"]
    (checked,) = data.check("digits", tmp_path)
    assert (checked.state, checked.path) == ("ready", tmp_path / "digits" / "*_jackson_*.wav")
    data.fetch("digits", tmp_path)
    assert len(tiny_digits.asked) == 1
    (tmp_path / "digits" / "0_jackson_1.wav").write_bytes(b"other")
    assert data.check("digits", tmp_path)[0].state == "damaged"
    with pytest.raises(InputError, match="move it away and run again"):
        data.fetch("digits", tmp_path)
    (tmp_path / "digits" / "0_jackson_1.wav").unlink()
    assert [file.state for file in data.listing(tmp_path) if file.task == "digits"] == ["missing"]
    data.fetch("digits", tmp_path)
    assert data.check("digits", tmp_path)[0].state == "ready"


def test_a_packed_file_is_known_by_what_is_in_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["x.gz"] = gzip.compress(CONTENT, compresslevel=1)
    source = Source("mnist/x.gz", server.url("x.gz"), sha256(CONTENT), "none", packed=True)
    monkeypatch.setattr(MNIST, "sources", (source,))
    (path,) = data.fetch("mnist", tmp_path)
    path.write_bytes(gzip.compress(CONTENT, compresslevel=9))
    assert data.check("mnist", tmp_path)[0].state == "ready"
    path.write_bytes(path.read_bytes()[:-9])
    assert data.check("mnist", tmp_path)[0].state == "damaged"


# --- names, the chorales, the real files ------------------------------------------------------------------------


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'jsb'"):
        data.fetch("jbs", tmp_path)
    with pytest.raises(InputError, match="did you mean 'jsb'"):
        data.check("jbs", tmp_path)
    with pytest.raises(InputError, match="file of your own"):
        data.fetch("text:novel.txt", tmp_path)


def test_the_chorales_are_parsed_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNRECURRENT_CACHE", str(tmp_path))
    monkeypatch.setattr(chorales, "music21_version", lambda: "0.test")
    rolls = chorales.Rolls(("bwv1", "bwv2"), (chorales.to_roll([(60, 0, 3)]), chorales.to_roll([(62, 0, 4)])))
    monkeypatch.setattr(chorales, "parse_corpus", lambda *, show_progress: rolls)
    assert data.check("chorales")[0].state == "missing"
    (path,) = data.fetch("chorales")
    assert path.parent == tmp_path
    (checked,) = data.check("chorales")
    assert (checked.state, checked.path) == ("ready", path)
    assert "music21 0.test" in checked.note
    monkeypatch.setattr(chorales, "PUBLISHED", ("0.test", "another digest"))
    assert data.check("chorales")[0].state == "damaged"
    path.write_bytes(b"broken")
    (checked,) = data.check("chorales")
    assert checked.state == "damaged"
    assert "delete that file" in checked.note


def test_the_bar_accepts_what_fetch_reports(capsys: pytest.CaptureFixture[str]) -> None:
    with data.progress_bar() as progress:
        progress("a.bin", 10, 100)
        progress("a.bin", 100, 100)
        progress("b.bin", 5, None)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "a.bin" in shown.err
    assert "b.bin" in shown.err


@pytest.mark.parametrize("name", ["jsb", "nottingham", "musedata", "piano", "ptb-char"])
def test_the_published_checksums_are_those_of_the_standard_files(name: str, data_dir: Path) -> None:
    checked = data.check(name, data_dir)
    if any(file.state == "missing" for file in checked):
        pytest.skip(f"{checked[0].path.parent.name} is not in the data folder")
    assert [(file.state, file.note) for file in checked] == [("ready", "")] * len(checked)
