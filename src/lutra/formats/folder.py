"""Which files of a folder make a checkpoint, and which of them may be touched.

An index can only name files of its own folder, a link that leaves the folder is refused, and a hub
id becomes the folder of a snapshot in the hub's cache.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lutra.errors import CheckpointError

_SIDE_SUFFIXES = {".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".py"}
_SIDE_STEMS = ("license", "notice", "copying", "use_policy", "use-policy")
_HUB_PATTERNS = [
    "*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja",
    "*.tiktoken", "*.bpe", "LICENSE*", "NOTICE*",
]  # fmt: skip
# Other forms of the same weights, which some repositories carry beside the usual one.
_HUB_IGNORED = ["original/*", "onnx/*", "consolidated*"]


@dataclass
class Weights:
    """The files that hold the weights, and for each the tensors that an index promises there."""

    folder: Path
    files: list[Path]
    promised: dict[str, str] = field(default_factory=dict)  # tensor name -> file name
    index: Path | None = None
    pickled: bool = False


def folder_of(src: str | Path) -> Path:
    path = Path(src).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is a file. Give the folder that holds config.json and the weights."
        )
    text = str(src)
    if isinstance(src, Path) or text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{path} does not exist. Give a checkpoint folder or a hub id.")
    return _fetch(text)


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=_HUB_IGNORED)
        )

    problem: Exception
    try:
        folder = fetch(_HUB_PATTERNS)
        if not any(folder.glob("*.safetensors")):
            folder = fetch(["pytorch_model*.bin", "pytorch_model.bin.index.json"])
        return folder
    except HFValidationError as error:
        raise CheckpointError(
            f"{hub_id!r} is neither a folder nor a hub id (organisation/name): {error}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        problem = error
    first_line = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    raise CheckpointError(
        f"{hub_id!r} is not a folder here and could not be fetched from the hub ({first_line}). "
        "Check the name and the connection, log in if the model is gated (`hf auth login`), "
        "or download it elsewhere and give its folder."
    ) from problem


def inside(folder: Path, path: Path) -> Path:
    """``path``, unless it is a link that leads out of ``folder``.

    In the hub's cache every file of ``models--X/snapshots/COMMIT`` is a link into
    ``models--X/blobs``; these are followed, and no others.
    """
    home = folder.resolve()
    real = path.resolve()
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the checkpoint's folder. Links out of the folder "
            "are not followed; put the file itself there if you trust it."
        )
    if real.exists() and not real.is_file():
        raise CheckpointError(f"{path} is not a regular file. Fetch the checkpoint again.")
    return path


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = inside(folder, folder / name)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can not be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object. Fetch it again.")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        if any(folder.glob("*.gguf")):
            raise CheckpointError(
                f"{folder} holds a GGUF file, which is not read here. "
                "Give the original safetensors checkpoint."
            )
        raise CheckpointError(
            f"{folder} has no config.json. Give the folder of a Hugging Face checkpoint."
        )
    return _read_json(folder, "config.json")


def find_weights(folder: Path) -> Weights:
    """The weights transformers would load: one file before an index, safetensors before bin."""
    for stem, suffix, pickled in (
        ("model", "safetensors", False),
        ("pytorch_model", "bin", True),
    ):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if os.path.lexists(single):
            return Weights(folder, [inside(folder, single)], pickled=pickled)
        if os.path.lexists(index):
            return _from_index(folder, index, pickled)
    others = sorted(f.name for f in folder.glob("*") if f.suffix in (".safetensors", ".bin"))
    hint = f" It has {', '.join(others[:4])}, but no index that names them." if others else ""
    raise CheckpointError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json.{hint} "
        "Is the download complete?"
    )


def _from_index(folder: Path, index: Path, pickled: bool) -> Weights:
    weight_map = _read_json(folder, index.name).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(f, str) and f for f in weight_map.values())
    ):
        raise CheckpointError(f'{index} has no "weight_map" from tensor to file. Fetch it again.')
    files = []
    for name in sorted(set(weight_map.values())):
        pure = PurePosixPath(name.replace("\\", "/"))
        drive = len(name) > 1 and name[1] == ":"
        if pure.is_absolute() or ".." in pure.parts or drive or "\0" in name:
            raise CheckpointError(
                f"{index} names {name!r}, which is outside the folder. "
                "Such an index is broken or hostile; get the checkpoint from its source."
            )
        path = folder / pure
        if not path.exists():
            tensors = sum(file == name for file in weight_map.values())
            raise CheckpointError(
                f"{path} is missing: {index.name} says that it holds {tensors} tensors. "
                "Complete the download."
            )
        files.append(inside(folder, path))
    return Weights(folder, files, weight_map, index, pickled)


def is_side_file(name: str) -> bool:
    lower = name.lower()
    if lower == "config.json" or lower.startswith(("readme", ".")):
        return False
    if ".index." in lower:
        return False
    return Path(lower).suffix in _SIDE_SUFFIXES or lower.startswith(_SIDE_STEMS)
