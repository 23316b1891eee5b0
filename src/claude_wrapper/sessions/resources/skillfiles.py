"""The files of a skill: one directory with a SKILL.md, checked and packed into an archive. Pure.

Nothing is ever written under the names that were sent before they have passed here: no absolute paths, no `..`, no
links, no two names that differ only in case, bounded in number and size.
"""

from __future__ import annotations

import io
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from claude_wrapper.errors import InvalidRequest, RequestTooLarge

MAX_FILES: Final = 500
MAX_BYTES: Final = 30 * 1024 * 1024
MAX_PATH: Final = 255
MAX_DEPTH: Final = 16
MANIFEST: Final = "SKILL.md"
MAX_DESCRIPTION: Final = 1024
_NAME: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\Z")
_KEY: Final = re.compile(r"([A-Za-z0-9_-]+):(?:[ \t]+(.*)|[ \t]*)\Z")
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the earliest time that an archive can hold: same files, same bytes
_UNIX: Final = 3


@dataclass(frozen=True, slots=True)
class SkillFiles:
    """A checked skill."""

    name: str
    description: str
    files: Mapping[str, bytes] = field(repr=False)
    """Contents by path below the skill's directory."""

    def archive(self) -> bytes:
        """A zip with the skill's name as its one directory."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(self.files):
                info = zipfile.ZipInfo(f"{self.name}/{path}", _EPOCH)
                info.create_system = _UNIX
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                packed.writestr(info, self.files[path])
        return out.getvalue()


def read_skill(uploads: Sequence[tuple[str, bytes]]) -> SkillFiles:
    """A skill out of uploaded files (names with paths), or out of one zip archive. Raises InvalidRequest."""
    if not uploads:
        raise InvalidRequest("is required: one directory with a SKILL.md", field="files")
    if len(uploads) == 1 and zipfile.is_zipfile(io.BytesIO(uploads[0][1])):
        uploads = _unpacked(uploads[0][1])
    if len(uploads) > MAX_FILES:
        raise InvalidRequest(f"at most {MAX_FILES} files", field="files")
    if sum(len(content) for _, content in uploads) > MAX_BYTES:
        raise RequestTooLarge(f"the files of a skill have at most {MAX_BYTES} bytes together")
    directory, files = _one_directory(uploads)
    if MANIFEST not in files:
        raise InvalidRequest(f"there is no {MANIFEST} at the top of {directory!r}", field="files")
    front = front_matter(files[MANIFEST])
    name = front.get("name", directory)
    if len(name) > 64 or not _NAME.match(name):
        raise InvalidRequest(
            "the skill's name must have at most 64 lower-case letters, digits and single hyphens",
            field=f"files.{MANIFEST}.name",
        )
    description = front.get("description", "").strip()
    if not 1 <= len(description) <= MAX_DESCRIPTION:
        raise InvalidRequest(
            f"the front matter must have a description of 1 to {MAX_DESCRIPTION} characters",
            field=f"files.{MANIFEST}.description",
        )
    return SkillFiles(name, description, files)


def front_matter(content: bytes) -> dict[str, str]:
    """The top-level text fields between the two `---` lines of a SKILL.md: plain, quoted, or a `|` or `>` block.

    Lists and maps are passed over: only name and description are read here. Raises InvalidRequest.
    """
    where = f"files.{MANIFEST}"
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InvalidRequest("must be UTF-8", field=where) from None
    if not lines or lines[0].rstrip() != "---":
        raise InvalidRequest("must begin with front matter: a line `---`", field=where)
    ends = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() in {"---", "..."}), None)
    if ends is None:
        raise InvalidRequest("the front matter does not end: a second line `---` is missing", field=where)
    fields: dict[str, str] = {}
    number = 1
    while number < ends:
        found = _KEY.match(lines[number].rstrip())
        number += 1
        block: list[str] = []
        while number < ends and (not lines[number].strip() or lines[number][0] in " \t-"):
            block.append(lines[number])
            number += 1
        if found is not None:
            fields[found[1]] = _scalar((found[2] or "").strip(), block)
    if any("\x00" in value for value in fields.values()):
        raise InvalidRequest("must not have NUL characters", field=where)
    return fields


def _scalar(first: str, block: Sequence[str]) -> str:
    if re.fullmatch(r"[|>][+-]?[1-9]?", first):
        indent = min((len(line) - len(line.lstrip()) for line in block if line.strip()), default=0)
        lines = [line[indent:].rstrip() for line in block]
        return "\n".join(lines).strip("\n") if first[0] == "|" else " ".join(" ".join(lines).split())
    whole = " ".join([first, *(line.strip() for line in block)]).strip()
    if len(whole) >= 2 and whole[0] == whole[-1] == '"':
        return whole[1:-1].replace('\\"', '"').replace("\\n", "\n").replace("\\\\", "\\")
    if len(whole) >= 2 and whole[0] == whole[-1] == "'":
        return whole[1:-1].replace("''", "'")
    return re.split(r"\s#", whole, maxsplit=1)[0].rstrip()


def _one_directory(uploads: Sequence[tuple[str, bytes]]) -> tuple[str, dict[str, bytes]]:
    files: dict[str, bytes] = {}
    seen: set[str] = set()
    top = ""
    for index, (raw, content) in enumerate(uploads):
        path = f"files[{index}]"
        parts = _parts(raw, path)
        if len(parts) < 2:
            raise InvalidRequest("must be inside of the skill's directory: name it `skill/SKILL.md`", field=path)
        top = top or parts[0]
        if parts[0] != top:
            raise InvalidRequest("all files must be inside of one directory", field=path)
        inner = "/".join(parts[1:])
        folded = unicodedata.normalize("NFC", inner).casefold()
        if folded in seen:
            raise InvalidRequest(f"{inner!r} is there twice", field=path)
        seen.add(folded)
        files[inner] = content
    for folded in seen:
        parents = folded.split("/")[:-1]
        if any("/".join(parents[:depth]) in seen for depth in range(1, len(parents) + 1)):
            raise InvalidRequest("a file stands where a directory is needed", field="files")
    return top, files


def _parts(raw: str, field_path: str) -> list[str]:
    parts = raw.split("/")
    bad = raw.startswith("/") or "\\" in raw or len(raw) > MAX_PATH or len(parts) > MAX_DEPTH
    bad = bad or any(part in {"", ".", ".."} or part != part.strip() for part in parts)
    if bad or not raw.isprintable() or ":" in raw or len(raw.encode()) > MAX_PATH:
        raise InvalidRequest("is not a plain relative path such as skill/SKILL.md", field=field_path)
    return parts


def _unpacked(content: bytes) -> list[tuple[str, bytes]]:
    files: list[tuple[str, bytes]] = []
    left = MAX_BYTES
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            members = [info for info in packed.infolist() if not info.is_dir()]
            if len(members) > MAX_FILES:
                raise InvalidRequest(f"at most {MAX_FILES} files", field="files")
            for info in members:
                kind = stat.S_IFMT(info.external_attr >> 16)
                if info.create_system == _UNIX and kind not in {0, stat.S_IFREG}:
                    raise InvalidRequest("the archive has a link or a special file", field="files")
                with packed.open(info) as member:
                    # The sizes that an archive states are not to be believed.
                    data = member.read(left + 1)
                left -= len(data)
                if left < 0:
                    raise RequestTooLarge(f"the files of a skill have at most {MAX_BYTES} bytes together")
                files.append((info.filename, data))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError, ValueError, zlib.error) as error:
        raise InvalidRequest(f"the archive cannot be read: {type(error).__name__}", field="files") from None
    return files
