"""Reading and writing checkpoints: the official layout by a name mapping, ours atomically, both strictly."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PhiConfig, PretrainedConfig, PreTrainedModel

from flashsloth.config import SIGLIP_SO400M, FlashSlothConfig

SIGLIP_SO400M_ID = "google/siglip-so400m-patch14-384"

# Official name -> ours, first match; the tower keeps the name its own hub checkpoint has.
_RENAMES = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "vision_tower.vision_model."),
    (r"^model\.mm_projector\.", "projector."),
    (r"^model\.pooling\.", "pooling."),
    (r"^model\.lqformer\.", "embedded_query."),
    (r"^model\.learnable_tokens\.", "learnable_tokens."),
    (r"^model\.(embed_tokens|layers|final_layernorm)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_SHOWN = 12  # names an error lists before it only counts


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of the official layout: one flat Phi configuration with ``mm_*`` keys."""
    return (
        config.get("model_type") == FlashSlothConfig.model_type
        and "text_config" not in config
        and any(key.startswith("mm_") for key in config)
    )


def convert_config(config: Mapping[str, Any], directory: str | os.PathLike[str] | None) -> dict[str, Any]:
    """An official ``config.json`` in the fields of :class:`FlashSlothConfig`.

    The vision tower is described by ``vision_tower/config.json`` in ``directory`` if it is there, else by
    ``mm_vision_tower``: a path, or a hub id of which the released one is built in.
    """
    for key, expected in (
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_vision_select_feature", "patch"),
        ("use_mm_proj", True),
    ):
        if config.get(key, expected) != expected:
            raise ValueError(f"config.json: {key}: expected {expected!r}, got {config[key]!r}")
    vision = _vision_config(config.get("mm_vision_tower"), directory)
    width = config.get("mm_hidden_size", vision["hidden_size"])
    if width != vision["hidden_size"]:
        raise ValueError(
            f"config.json: mm_hidden_size: expected {vision['hidden_size']}, the width of the vision tower, got {width}"
        )
    known = set(PhiConfig().to_dict()) | {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    skipped = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
    text = {key: value for key, value in config.items() if key in known - skipped}
    converted: dict[str, Any] = {
        "model_type": FlashSlothConfig.model_type,
        "vision_config": vision,
        "text_config": {"model_type": "phi", **text},
        "vision_select_layer": config.get("mm_vision_select_layer", -2),
        "image_aspect_ratio": config.get("image_aspect_ratio") or "square",
        "image_hd": bool(config.get("image_hd", False)),
    }
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None:
        converted["dtype"] = dtype
    return converted


def _vision_config(tower: str | None, directory: str | os.PathLike[str] | None) -> dict[str, Any]:
    root = Path(directory) if directory is not None else None
    places = [] if root is None else [root / "vision_tower" / "config.json"]
    if tower:
        places += [Path(tower) / "config.json"] if root is None else [root / tower / "config.json"]
        places.append(Path(tower) / "config.json")
    for place in places:
        if place.is_file():
            found = _read_json(place)
            found = found.get("vision_config", found)
            # SigLIP writes only what differs from its defaults.
            model_type = found.get("model_type", "siglip_vision_model")
            return {**AutoConfig.for_model(model_type).to_dict(), **found, "model_type": model_type}
    if tower is None:
        raise ValueError(
            "config.json: expected mm_vision_tower, or vision_tower/config.json in the directory, got neither"
        )
    if tower.rstrip("/") == SIGLIP_SO400M_ID or tower.rstrip("/").endswith("/" + SIGLIP_SO400M_ID.split("/")[1]):
        return dict(SIGLIP_SO400M)
    try:
        loaded = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"config.json: mm_vision_tower: expected a directory with config.json, a hub id that can be reached or "
            f"{SIGLIP_SO400M_ID!r}, got {tower!r}"
        ) from error
    return getattr(loaded, "vision_config", loaded).to_dict()


def rename(name: str) -> str:
    """The name in our layout of an official parameter name; other names stay."""
    for pattern, target in _RENAMES:
        renamed, hits = re.subn(pattern, target, name)
        if hits:
            return renamed
    return name


def official_name(name: str) -> str:
    """Inverse of :func:`rename`, for a name of a model in memory or on disk."""
    inverse = (
        (r"^vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
        (r"^projector\.", "model.mm_projector."),
        (r"^embedded_query\.", "model.lqformer."),
        (r"^(pooling|learnable_tokens)\.", r"model.\1."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model."),
    )
    for pattern, target in inverse:
        renamed, hits = re.subn(pattern, target, name)
        if hits:
            return renamed
    return name


def load(
    cls: type[PreTrainedModel],
    from_pretrained: Callable[..., Any],
    path: str | os.PathLike[str] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load a model of class ``cls`` and fail on any name or shape that does not fit; see ``from_pretrained`` there."""
    if path is None:
        return from_pretrained(path, *args, **kwargs)
    directory = _official_directory(path, kwargs)
    if directory is not None:
        return _load_official(cls, from_pretrained, directory, *args, **kwargs)
    if os.path.isdir(path):
        read_tensors(Path(path) / kwargs.get("subfolder", ""), kwargs.get("variant"))  # maps the files, to check them
    with_info, ignore = kwargs.pop("output_loading_info", False), kwargs.pop("ignore_mismatched_sizes", False)
    # transformers raises without saying which shapes differ, so it is told to go on and its findings are read.
    model, info = from_pretrained(path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    _report_names(path, info["missing_keys"], info["unexpected_keys"])
    if not ignore:
        _report_shapes(path, {name: (expected, got) for name, got, expected in info["mismatched_keys"]})
    return (model, info) if with_info else model


def _official_directory(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path | None:
    """The local directory of an official checkpoint, fetched where ``path`` is a hub id; None for our layout."""
    if not os.path.isdir(path) and (os.path.isabs(path) or str(path).startswith(".") or str(path).count("/") > 1):
        raise FileNotFoundError(f"{path}: expected a directory with config.json, or a hub id, got neither")
    file = Path(path, kwargs.get("subfolder", ""), "config.json")
    if os.path.isdir(path) and not file.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint with config.json, got none")
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    raw, _ = PretrainedConfig.get_config_dict(path, subfolder=kwargs.get("subfolder", ""), **hub)
    if not is_official(raw):
        return None
    if os.path.isdir(path):
        return Path(path) / kwargs.get("subfolder", "")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.bin", "vision_tower/config.json"]
    return Path(snapshot_download(str(path), allow_patterns=patterns, **hub)) / kwargs.get("subfolder", "")


def _load_official(
    cls: type[PreTrainedModel], from_pretrained: Callable[..., Any], directory: Path, *args: Any, **kwargs: Any
) -> Any:
    for name in ("subfolder", *_HUB):
        kwargs.pop(name, None)
    config = kwargs.pop("config", None)
    if not isinstance(config, FlashSlothConfig):
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in _config_fields()}
        config = FlashSlothConfig.from_pretrained(directory, **fields)
    tensors = {rename(name): tensor for name, tensor in read_tensors(directory).items()}
    _check_names_and_shapes(cls, config, tensors, directory)
    # Mapped files: the model's tensors are the only copy in memory.
    loaded = from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.config.name_or_path = model.name_or_path = str(directory)
    return loaded


def _config_fields() -> set[str]:
    import inspect

    return set(inspect.signature(FlashSlothConfig.__init__).parameters) - {"self", "kwargs"}


def _check_names_and_shapes(
    cls: type[PreTrainedModel], config: FlashSlothConfig, tensors: Mapping[str, Tensor], directory: Path
) -> None:
    with torch.device("meta"):
        expected = {official_name(name): t.shape for name, t in cls(config).state_dict().items()}
    got = {official_name(name): tensor.shape for name, tensor in tensors.items()}
    _report_names(directory, expected.keys() - got.keys(), got.keys() - expected.keys())
    _report_shapes(directory, {name: (shape, got[name]) for name, shape in expected.items() if got[name] != shape})


def _report_names(path: str | os.PathLike[str], missing: Iterable[str], unexpected: Iterable[str]) -> None:
    found = [
        f"{kind} names: {_listed(sorted(names))}"
        for kind, names in (("missing", list(missing)), ("unexpected", list(unexpected)))
        if names
    ]
    if found:
        raise ValueError(f"{path}: expected exactly the parameters of the model, got {'; '.join(found)}")


def _report_shapes(path: str | os.PathLike[str], wrong: Mapping[str, tuple[Any, Any]]) -> None:
    if wrong:
        lines = [f"{name}: expected {tuple(want)}, got {tuple(got)}" for name, (want, got) in sorted(wrong.items())]
        raise ValueError(f"{path}: wrong shapes: {_listed(lines)}")


def _listed(items: list[str]) -> str:
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _shards(directory: Path, variant: str | None = None) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a directory and, if there is an index, the file of each name. All files exist."""
    for stem, ending in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        stem = stem if variant is None else f"{stem}.{variant}"
        single, index = directory / f"{stem}{ending}", directory / f"{stem}{ending}.index.json"
        if variant is not None:
            stem, suffix = stem.split(".", 1)
            index = directory / f"{stem}{ending}.index.{suffix}.json"
        if single.is_file():
            return [single], {}
        if not index.is_file():
            continue
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{index}: expected a weight_map of names to files, got {type(names).__name__}")
        files = sorted(set(names.values()))
        for file in files:
            if Path(file).name != file:
                raise ValueError(f"{index}: expected files in the same directory, got {file!r}")
        absent = [file for file in files if not (directory / file).is_file()]
        if absent:
            raise FileNotFoundError(f"{directory}: expected {len(files)} shards, missing {_listed(absent)}")
        return [directory / file for file in files], names
    raise FileNotFoundError(
        f"{directory}: expected model.safetensors or pytorch_model.bin, or one of their .index.json, got none"
    )


def read_tensors(directory: Path, variant: str | None = None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, mapped from its files where the format allows it."""
    return _read_shards(directory, variant, _read_safetensors)


def read_meta_tensors(directory: Path, variant: str | None = None) -> dict[str, Tensor]:
    """As :func:`read_tensors`, on the meta device: names, shapes and dtypes from the headers of the files."""
    found = _read_shards(directory, variant, _read_safetensors_header)
    return {name: tensor.to("meta") for name, tensor in found.items()}


def _read_shards(
    directory: Path, variant: str | None, read_safetensors: Callable[[Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
    files, index = _shards(directory, variant)
    tensors: dict[str, Tensor] = {}
    for file in files:
        read = read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file)
        twice = sorted(tensors.keys() & read.keys())
        if twice:
            raise ValueError(f"{file}: expected names no other shard has, got {_listed(twice)}")
        absent = sorted(name for name, where in index.items() if where == file.name and name not in read)
        if absent:
            raise ValueError(f"{file}: expected the names the index puts there, missing {_listed(absent)}")
        tensors.update(read)
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a complete safetensors file, got one that fails: {error}") from error


def _read_safetensors_header(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            return {
                name: torch.empty(one.get_shape(), dtype=_DTYPES[one.get_dtype()], device="meta")
                for name, one in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a complete safetensors file, got one that fails: {error}") from error
    except KeyError as error:
        raise ValueError(f"{file}: expected dtypes of {', '.join(_DTYPES)}, got {error.args[0]}") from error


def _read_bin(file: Path) -> dict[str, Tensor]:
    """Tensors and nothing else: ``weights_only`` refuses a pickle that would run code."""
    import zipfile

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: expected a pickle of tensors alone, got one that holds other objects or code; it was not run "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file}: expected a complete torch file, got one that fails: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ValueError(f"{file}: expected a dict of names to tensors, got {type(loaded).__name__}")
    return loaded


def _read_json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(read).__name__}")
    return read


def save(save_pretrained: Callable[..., Any], save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write with ``save_pretrained`` to a directory beside the target, then move the finished files into place.

    A failure on the way leaves the target as it was, and a model may be saved over the files it is mapped from.
    """
    target = Path(save_directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"save_directory: expected a directory, got the file {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", target.name)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_pretrained(partial, **kwargs)
        target.mkdir(exist_ok=True)
        written = {file.name for file in partial.iterdir()}
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, target / file.name)
        for file in target.iterdir():
            stale = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", file.name)
            if stale and file.name not in written:
                file.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)
