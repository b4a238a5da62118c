"""Where a model's files are: a directory, a GGUF file, or the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from streamserve.errors import ModelLoadError
from streamserve.models.gguf.container import find_gguf, first_part, gguf_file

LoadFormat = Literal["auto", "safetensors", "pt", "gguf", "dummy"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# As llama.cpp and vLLM name one file of many: owner/name:Q4_K_M.
_GGUF_ID = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]+)")
_DEFAULT_KIND = "Q4_K_M"
# Other frameworks' weights and training leftovers stay where they are.
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")

Download = Callable[..., Path]
"""Of a repository the files of some patterns: where they are then."""


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    load_format: LoadFormat = "auto",
    local_files_only: bool = False,
    token: str | bool | None = None,
    with_code: bool = False,
) -> Path:
    """Where ``model`` is: a directory, a GGUF file, or a hub id, downloaded into the hub's cache.

    ``owner/name:Q4_K_M`` is a GGUF file of a repository that has several. ``token`` is the hub's,
    ``True`` for the one that was saved at login. ``with_code`` brings the checkpoint's own code
    along. Raises ModelLoadError that says what was tried.
    """
    directory = Path(model).expanduser()
    if directory.exists():
        return _local(directory, load_format)
    looks_local = model.startswith(("/", ".", "~"))
    gguf = _GGUF_ID.fullmatch(model)
    if looks_local or not (gguf or _HUB_ID.fullmatch(model)):
        what = "file" if model.endswith(".gguf") else "directory"
        raise ModelLoadError(
            f"model {model!r}: there is no such {what} ({directory.absolute()})"
            + ("" if looks_local else ", and it is no hub id (owner/name, owner/name:Q4_K_M)")
        )
    if gguf and load_format not in ("auto", "gguf", "dummy"):
        raise ModelLoadError(f"model {model!r} is a GGUF file, which is not read as {load_format}")
    repository, kind = (gguf[1], gguf[2]) if gguf else (model, _DEFAULT_KIND)
    # Importing the hub client costs half a second, which a local model need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def download(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=[*patterns],
                ignore_patterns=["consolidated*", "original/*"],
                local_files_only=local_files_only,
                token=token,
            )
        )

    try:
        if gguf or load_format == "gguf":
            return _gguf(download, repository, kind)
        return _directory(download, load_format, with_code=with_code)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"model {model!r}: there is no such directory ({directory.absolute()}), and the hub "
            f"did not give it: {type(error).__name__}: {error}"
        ) from error


def _directory(download: Download, load_format: LoadFormat, *, with_code: bool) -> Path:
    weights = {"pt": ("pytorch_model*.bin*",), "dummy": ()}.get(load_format, ("*.safetensors*",))
    others = (*_HUB_FILES, *(("*.py",) if with_code else ()))
    path = download(*others, *weights)
    if load_format == "auto" and not any(path.glob("*.safetensors")):
        path = download(*others, "pytorch_model*.bin*")
    return path


def _gguf(download: Download, repository: str, kind: str) -> Path:
    """The file of ``kind``, or its first part: its name ends in it, or its folder is called so."""
    spellings = sorted({kind, kind.upper(), kind.lower()})
    ends = (".gguf", "-?????-of-?????.gguf")
    path = download(
        *(f"*[-._/]{name}{end}" for name in spellings for end in ends),
        *(f"{name}{end}" for name in spellings for end in ends),
        *(f"*{name}/*.gguf" for name in spellings),
    )
    there = sorted(path.rglob("*.gguf"))
    name = re.escape(kind)
    pattern = re.compile(
        rf"(?:^|[-._/]){name}(?:-\d{{5}}-of-\d{{5}})?\.gguf$|(?:^|/){name}/[^/]+$", re.IGNORECASE
    )
    found = {
        first_part(file)
        for file in there
        if pattern.search(file.relative_to(path).as_posix())
        and not file.name.startswith("mmproj")  # what looks at pictures
    }
    if len(found) > 1:  # ``UD-Q4_K_M`` is a mixture of another name
        found = {file for file in found if f"ud-{kind}".lower() not in file.name.lower()} or found
    if len(found) == 1:
        return found.pop()
    if found:
        names = ", ".join(sorted(str(file.relative_to(path)) for file in found))
        raise ModelLoadError(f"{repository} has several GGUF files of kind {kind}: {names}")
    names = ", ".join(str(file.relative_to(path)) for file in there) or "none at all"
    raise ModelLoadError(
        f"{repository}: there is no GGUF file of kind {kind} on the hub, or, without a connection, "
        f"in its cache ({path}), which has {names}"
    )


def _local(path: Path, load_format: LoadFormat) -> Path:
    file = gguf_file(path) if load_format != "gguf" else find_gguf(path)
    if file is not None and load_format in ("auto", "gguf", "dummy"):
        return file
    if path.is_dir() and load_format != "gguf":
        return path
    what = "holds no GGUF file"
    if path.is_file():
        what = "is no GGUF file: checkpoints of other formats are given by their directory"
    if file is not None:
        what = f"is a GGUF file, which is not read as {load_format}"
    raise ModelLoadError(f"{path} {what}")
