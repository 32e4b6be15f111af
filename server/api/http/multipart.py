"""A multipart form, streamed into a folder: every count and size is capped while it arrives.

A file's name is shown or compared with a list, and never becomes a path.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from anyio.to_thread import run_sync
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from server.api.http.json_body import arriving_within, declared_length, refuse_encoding
from server.errors import InvalidField, InvalidRequest, TooLarge, UnsupportedMedia, shown

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 4096
MAX_OVERHEAD_BYTES = 65_536  # of boundaries and part headers, beside the files
BATCH_BYTES = 262_144  # parsed, hashed and written in one call on a thread


def _keep_all(_name: str) -> bool:
    return True


@dataclass(frozen=True)
class Form:
    """What a form may hold. `keep(file name)`: whether to store a file or to drop it; it may raise."""

    fields: tuple[str, ...]
    file: str  # the name of the parts that carry files
    max_bytes: int  # of all files together
    max_files: int = 1
    keep: Callable[[str], bool] = _keep_all

    @property
    def max_parts(self) -> int:
        return self.max_files + len(self.fields)


@dataclass
class StoredFile:
    path: Path
    bytes: int = 0
    sha256: str = ""


@dataclass
class Upload:
    """What a form held: texts by field, files by their names, and the names of dropped files."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def required(self, name: str) -> str:
        """The field's text. Raises InvalidField."""
        if name not in self.fields:
            raise InvalidField(f"{name} is required.", param=name, code="missing_field")
        return self.fields[name]


async def receive_form(request: Request, folder: Path, form: Form, seconds: float) -> Upload:
    """Read the body into `folder`, in `seconds` at most. Raises 400 (also for a cut body), 413, 415 or 504,
    and reads no further.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise UnsupportedMedia("Content-Type must be multipart/form-data with a boundary.")
    refuse_encoding(request)
    limit = form.max_bytes + MAX_OVERHEAD_BYTES
    too_large = TooLarge(f"The upload is larger than {form.max_bytes} bytes.", param=form.file)
    if declared_length(request) > limit:
        raise too_large
    receiver = _Receiver(folder, form)
    try:
        parser = MultipartParser(options[b"boundary"], receiver.callbacks())
        received, batch = 0, bytearray()
        async with arriving_within(seconds):
            async for chunk in request.stream():
                received += len(chunk)
                if received > limit:
                    raise too_large
                batch += chunk
                if len(batch) >= BATCH_BYTES:
                    await run_sync(parser.write, bytes(batch))
                    batch.clear()
        await run_sync(parser.write, bytes(batch))
    except FormParserError:
        raise InvalidRequest("The body is not well-formed multipart/form-data.") from None
    finally:
        receiver.close()
    if not receiver.ended:
        raise InvalidRequest("The body ends before its last boundary.")
    return receiver.upload


class _Receiver:
    """The parser's callbacks. The current part is a field, a file, or a file that is dropped."""

    def __init__(self, folder: Path, form: Form) -> None:
        self.upload = Upload()
        self.ended = False
        self._folder = folder
        self._form = form
        self._parts = 0
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._field: tuple[str, bytearray] | None = None
        self._file: tuple[StoredFile, BinaryIO] | None = None
        self._hash = hashlib.sha256()

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def close(self) -> None:
        if self._file is not None:
            self._file[1].close()
            self._file = None

    def _finish(self) -> None:
        self.ended = True

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._form.max_parts:
            raise InvalidField(
                f"An upload must have at most {self._form.max_parts} parts.", param=self._form.file
            )
        self._disposition = b""

    def _header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _open(self) -> None:
        """The part's headers are complete: open it as a field or a file. Raises InvalidField."""
        _, options = parse_options_header(self._disposition)
        field_name = options.get(b"name", b"").decode("utf-8", "replace")
        if field_name in self._form.fields and b"filename" not in options:
            if field_name in self.upload.fields:
                raise InvalidField(f"{field_name} came twice.", param=field_name)
            self._field = (field_name, bytearray())
        elif field_name == self._form.file and b"filename" in options:
            self._open_file(options[b"filename"].decode("utf-8", "replace"))
        else:
            raise InvalidField(
                f"{shown(field_name)} is not a part of this upload: send the file {self._form.file} and the "
                f"fields {', '.join(self._form.fields) or 'none'}.",
                code="unknown_field",
            )

    def _open_file(self, name: str) -> None:
        if not self._form.keep(name):
            self.upload.dropped.append(name)
            return
        if name in self.upload.files:
            raise InvalidField(f"The file {shown(name)} came twice.", param=self._form.file)
        if len(self.upload.files) == self._form.max_files:
            raise InvalidField(
                f"An upload must have at most {self._form.max_files} files.", param=self._form.file
            )
        stored = StoredFile(self._folder / f"{len(self.upload.files)}.part")
        self.upload.files[name] = stored
        self._hash = hashlib.sha256()
        self._file = (stored, stored.path.open("xb"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            stored, file = self._file
            piece = memoryview(data)[start:end]
            file.write(piece)
            self._hash.update(piece)
            stored.bytes += len(piece)
        elif self._field is not None:
            self._field[1].extend(data[start:end])
            if len(self._field[1]) > MAX_FIELD_BYTES:
                name = self._field[0]
                raise InvalidField(f"{name} must have at most {MAX_FIELD_BYTES} bytes.", param=name)

    def _end(self) -> None:
        if self._file is not None:
            self._file[0].sha256 = self._hash.hexdigest()
            self.close()
        elif self._field is not None:
            name, value = self._field
            self._field = None
            try:
                self.upload.fields[name] = value.decode()
            except UnicodeDecodeError:
                raise InvalidField(f"{name} is not UTF-8.", param=name) from None
