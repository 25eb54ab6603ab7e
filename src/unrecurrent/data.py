"""The files behind the tasks: list them, fetch them, check them (`unrecurrent data list|get|check`)."""

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from unrecurrent.digests import text_digest
from unrecurrent.download import Progress, Unreachable, download
from unrecurrent.errors import InputError
from unrecurrent.files import replacing
from unrecurrent.tasks import chorales, get_task, task_names
from unrecurrent.tasks.task import Source, data_folder

__all__ = ["DataFile", "Progress", "check", "fetch", "listing", "progress_bar"]

State = Literal["ready", "missing", "damaged"]


@dataclass(frozen=True)
class DataFile:
    """One file of a data set and what is known of it; `note` says in a sentence what is to be known, else empty."""

    task: str
    path: Path
    state: State
    licence: str
    home: str
    note: str = ""


def listing(folder: Path | None = None) -> list[DataFile]:
    """Return every file of every data set, there or not, without reading any.

    `folder` is the user's data folder (default: `UNRECURRENT_DATA`, else `data` in the user's cache folder).

    >>> [(file.task, file.state) for file in listing(Path("no such folder")) if file.task == "jsb"]
    [('jsb', 'missing')]
    """
    return [file for name in task_names() for file, _ in _files(name, folder)]


def check(name: str | None = None, folder: Path | None = None) -> list[DataFile]:
    """Return the files of one data set, or of all, after comparing their contents with the published checksums.

    Raises:
        InputError: an unknown name.

    >>> [file.state for file in check("jsb", Path("no such folder"))]
    ['missing']
    """
    names = task_names() if name is None else [_known(name)]
    root = data_folder(folder)
    return [_checked(file, source, root) for each in names for file, source in _files(each, folder)]


def fetch(name: str, folder: Path | None = None, progress: Progress | None = None) -> list[Path]:
    """Get the files of a data set from their public home, and return where they are.

    What has arrived of a file is kept in a `.part` file, which the next call continues; a file takes its name only
    when its SHA-256 is right. A file that is there already is checked, and never overwritten. The chorales need no
    network: they are parsed from the package music21 into the user's cache folder.

    Raises:
        InputError: an unknown name, no network (the message says where to put which file), a download broken off or
            changed, a full disk, or another file in the way.
    """
    if _known(name) == "chorales":
        chorales.load_rolls(show_progress=progress is not None)
        return [chorales.cache_path()]
    root = data_folder(folder)
    sources = get_task(name).sources
    lacking = [source for source in sources if not _is_there(root, source)]
    for url in dict.fromkeys(source.url for source in lacking):  # one archive may hold several files
        _get(url, [source for source in lacking if source.url == url], root, progress)
    return [root / source.path for source in sources]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Give a `progress` for `fetch` that draws one bar a file on the error stream."""
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TimeRemainingColumn(),
    )
    bars: dict[str, rich.TaskID] = {}
    with rich.Progress(*columns, console=Console(stderr=True)) as display:

        def advance(file: str, done: int, total: int | None) -> None:
            if file not in bars:
                bars[file] = display.add_task(file, total=total)
            display.update(bars[file], completed=done)

        yield advance


# --- what is there ----------------------------------------------------------------------------------------------


def _known(name: str) -> str:
    if name.startswith(("text:", "series:")):
        raise InputError(f"{name!r} is a file of your own: there is nothing to get or check")
    if get_task(name).generated:
        raise InputError(f"the sequences of {name!r} are drawn from a seed: there is nothing to get or check")
    return name


def _files(name: str, folder: Path | None) -> list[tuple[DataFile, Source | None]]:
    if name == "chorales":
        return [(_chorales_file(), None)]
    root = data_folder(folder)
    return [(_file(name, root, source), source) for source in get_task(name).sources]


def _file(name: str, root: Path, source: Source) -> DataFile:
    state: State = "ready" if len(source.found(root)) >= source.files else "missing"
    return DataFile(name, root / source.path, state, source.licence, source.url)


def _chorales_file() -> DataFile:
    licence, home = "music in the public domain, encodings as licensed in music21's corpus", "the package music21"
    try:
        path = chorales.cache_path()
    except InputError as error:
        return DataFile("chorales", Path("music21"), "missing", licence, home, str(error))
    return DataFile("chorales", path, "ready" if path.is_file() else "missing", licence, home)


def _checked(file: DataFile, source: Source | None, root: Path) -> DataFile:
    if file.state == "missing":
        return file
    try:
        state, note = _state_of_chorales(file.path) if source is None else _state_of(root, source)
    except InputError as error:
        state, note = "damaged", str(error)
    return replace(file, state=state, note=note)


def _state_of(root: Path, source: Source) -> tuple[State, str]:
    if _sha256(source, source.found(root)) == source.sha256:
        return "ready", ""
    path = root / source.path
    return "damaged", f"{path} is not the published file (its SHA-256 differs): move it away and get it again"


def _state_of_chorales(path: Path) -> tuple[State, str]:
    version, digest = chorales.PUBLISHED
    if chorales.read_cache(path).digest() == digest:
        return "ready", ""
    installed = chorales.music21_version()
    if installed != version:
        return "ready", f"these chorales come from music21 {installed}: published results were made with {version}"
    return "damaged", f"{path} does not hold the chorales of music21 {version}: delete that file and run again"


def _sha256(source: Source, paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the files of a source, as the source states it."""
    opened = {path.name: partial(_open, path) for path in paths}
    return _digest(source, opened)


def _open(path: Path) -> io.BufferedIOBase:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def _digest(source: Source, files: Mapping[str, Callable[[], io.BufferedIOBase]]) -> str:
    digests = {}
    for name, opening in files.items():
        with opening() as file:
            digests[name] = _digest_of_one(file, source.packed)
    if source.files == 1:
        return next(iter(digests.values()), "")
    return text_digest("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))


def _digest_of_one(file: io.BufferedIOBase, packed: bool) -> str:
    """Return the SHA-256 of a file, or of what is packed in it; no digest where nothing can be unpacked."""
    if not packed:
        return hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with gzip.GzipFile(fileobj=file) as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return ""


def _is_there(root: Path, source: Source) -> bool:
    path = root / source.path
    if len(source.found(root)) < source.files and not path.exists():
        return False
    if _sha256(source, source.found(root) or [path]) != source.sha256:
        raise InputError(f"{path} is not the published file (its SHA-256 differs): move it away and run again")
    return True


# --- getting ----------------------------------------------------------------------------------------------------


def _get(url: str, sources: Sequence[Source], root: Path, progress: Progress | None) -> None:
    """Download a file, or an archive that holds several, and put the files where the tasks look for them."""
    folder = (root / sources[0].path).parent
    if sources[0].by_hand:
        raise InputError(f"the file itself has no lasting address: find it on {url}; {_by_hand(sources, folder)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be made ({error.strerror}): name another by --data-dir"
        ) from error
    part = folder / f"{urlsplit(url).path.rsplit('/', 1)[-1]}.part"
    try:
        download(url, part, progress)
    except Unreachable as error:
        raise InputError(f"{error}: {_by_hand(sources, folder)}") from error
    if sources[0].member is None:
        _accept(part, root / sources[0].path, sources[0])
    else:
        _unpack(part, sources, root)


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(Path(source.path).name for source in sources)


def _by_hand(sources: Sequence[Source], folder: Path) -> str:
    what = _names(sources) + (" (in that archive)" if sources[0].member else "")
    return (
        f"get {what} in another way and put it into {folder}, or into {Path(sources[0].path).parent}"
        " below a folder that you name with --data-dir or UNRECURRENT_DATA"
    )


def _accept(part: Path, target: Path, source: Source) -> None:
    if _sha256(source, [part]) != source.sha256:
        part.unlink()
        raise InputError(
            f"what came from {source.url} is not the published file (its SHA-256 differs) and was thrown away:"
            f" run again, or put the right file at {target}"
        )
    os.replace(part, target)


def _unpack(archive: Path, sources: Sequence[Source], root: Path) -> None:
    contents = _members(archive, sources)
    for source in sources:
        if _digest(source, {name: partial(io.BytesIO, c) for name, c in contents[source].items()}) != source.sha256:
            archive.unlink()
            raise InputError(
                f"what came from {source.url} does not hold the published {Path(source.path).name} and was thrown away:"
                f" run again, or put the right file at {root / source.path}"
            )
    for source in sources:
        targets = {(root / source.path).parent / name: content for name, content in contents[source].items()}
        for target in (target for target in targets if not target.exists()):
            with replacing(target) as temporary:
                temporary.write_bytes(targets[target])
    archive.unlink()


def _members(archive: Path, sources: Sequence[Source]) -> dict[Source, dict[str, bytes]]:
    """Return what is wanted for each source, by the names the files will have.

    Paths in an archive are not trusted: a single file takes the name of its source, and of several only the last part
    of their names is kept.
    """
    found: dict[Source, dict[str, bytes]] = {source: {} for source in sources}
    try:
        for name, read in _zip_entries(archive) if zipfile.is_zipfile(archive) else _tar_entries(archive):
            for source in (s for s in sources if _is_member(name, s)):
                found[source][Path(name if source.files > 1 else source.path).name] = read()
        return found
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, LookupError, RuntimeError) as error:
        archive.unlink()
        raise InputError(f"the archive from {sources[0].url} is damaged and was thrown away: run again") from error


def _is_member(name: str, source: Source) -> bool:
    return name == source.member if source.files == 1 else fnmatchcase(name, str(source.member))


_Entries = Iterator[tuple[str, Callable[[], bytes]]]


def _tar_entries(archive: Path) -> _Entries:
    """Yield the name of each file in the archive and what reads it, to be called before the next one is asked for."""
    with tarfile.open(archive, "r:gz") as tar:
        for entry in tar:
            if entry.isreg():
                yield entry.name.removeprefix("./"), partial(_contents, tar, entry)


def _contents(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(entry)
    return file.read() if file is not None else b""


def _zip_entries(archive: Path) -> _Entries:
    with zipfile.ZipFile(archive) as packed:
        for name in packed.namelist():
            yield name, partial(packed.read, name)
