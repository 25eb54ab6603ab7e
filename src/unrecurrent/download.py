"""Download a file over HTTP so that an interrupted download goes on where it stopped."""

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from unrecurrent.errors import InputError

#: called with the name of a file, the bytes done, and the total where the server tells it
Progress = Callable[[str, int, int | None], None]

#: seconds without an answer before the connection counts as lost
TIMEOUT = 30.0
_BLOCK = 1 << 18


class Unreachable(InputError):
    """The file cannot be had from its home: no network, no such server, no such file."""


class _BrokenOff(Exception):
    """The connection was lost while the body was read."""


def download(url: str, part: Path, progress: Progress | None = None) -> None:
    """Download `url` into `part`; if `part` is there already, ask only for the bytes that follow.

    Raises:
        Unreachable: no network, or the server answers with an error.
        InputError: the connection was lost on the way, or the disk is full. What has arrived stays in `part`.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            if have and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return _nothing_follows(url, part, have, error.headers.get("Content-Range", ""), progress)
            raise Unreachable(f"{url} cannot be had (the server answers {error.code} {error.reason})") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise Unreachable(f"{url} cannot be had (no connection: {reason})") from error
    with answer:
        _receive(answer, url, part, _start(answer, have), progress)


def _start(answer: http.client.HTTPResponse, have: int) -> int:
    """Return the position in the file of the first byte that will come: 0 where the server ignores ranges."""
    sent = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    resumes = answer.status == HTTPStatus.PARTIAL_CONTENT and sent is not None and int(sent[1]) == have
    return have if resumes else 0


def _nothing_follows(url: str, part: Path, have: int, content_range: str, progress: Progress | None) -> None:
    """`part` is as long as the file, so that it is done, or longer, so that it is something else: start again."""
    if content_range != f"bytes */{have}":
        part.unlink()
        download(url, part, progress)


def _receive(answer: http.client.HTTPResponse, url: str, part: Path, start: int, progress: Progress | None) -> None:
    length = answer.headers.get("Content-Length")
    total = start + int(length) if length is not None and length.isdigit() else None
    name, done = urlsplit(url).path.rsplit("/", 1)[-1], start
    try:
        with part.open("ab" if start else "wb") as file:
            for block in _blocks(answer):
                file.write(block)
                done += len(block)
                if progress is not None:
                    progress(name, done, total)
    except _BrokenOff as error:
        raise _broken(url, done, total) from error
    except OSError as error:
        raise InputError(
            f"{part} cannot be written ({error.strerror or error}): mend that and run again, which goes on from there"
        ) from error
    if total is not None and done < total:
        raise _broken(url, done, total)


def _blocks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            block = answer.read(_BLOCK)
        except (http.client.HTTPException, OSError) as error:
            raise _BrokenOff from error
        if not block:
            return
        yield block


def _broken(url: str, done: int, total: int | None) -> InputError:
    of = f" of {total:,}" if total is not None else ""
    return InputError(f"the download of {url} broke off after {done:,}{of} bytes: run again to go on from there")
