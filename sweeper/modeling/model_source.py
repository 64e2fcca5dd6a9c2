"""Find the files of a base model in a folder, on the hub or in the hub's cache, and check them.

Reads configurations and hashes weights, but loads no model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from sweeper.builtin import stand_ins
from sweeper.builtin.embedded import BASE_DIR
from sweeper.builtin.stand_in_models import model_folder
from sweeper.config.settings import EMBEDDED, ModelSettings
from sweeper.core.errors import ModelError, first_line
from sweeper.core.input_digests import InputDigests
from sweeper.core.regular_files import irregular_in

CONFIG = ("config.json", "adapter_config.json")
MODEL = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of the files to fetch from a hub, in formats that cannot run code."""
NOT_THE_MODEL = ("*/*.safetensors", "*/*.json", "consolidated*")
"""Patterns of second copies of the weights that some repositories contain."""
NO_CODE = {"trust_remote_code": False}
"""Option for every from_pretrained. The default would ask at the terminal about running remote code."""
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of a configuration that change with a copy of the model, and change no computation here."""
CACHED = "models--"
"""Start of a repository's folder in the hub's cache."""
COMMIT = re.compile(r"[0-9a-f]{40}")
TEMPLATES = "additional_chat_templates"
"""Folder of a model's further chat templates, which its tokenizer reads."""
CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Endings of the names of classes that continue text."""
ENCODERS = frozenset(config.model_type for config in MODEL_FOR_MASKED_LM_MAPPING)
"""Types of models that were trained to fill gaps. Some of them can be told to decode."""
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt", "spiece*", "tekken.json")
"""Patterns of the files of a tokenizer, of which a folder needs one."""
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names of the number of layers in config.json."""
MAX_LAYERS = 10_000
"""Maximum layers where no weights say how many there are. The deepest models have some hundreds."""


@dataclass(frozen=True)
class ModelSource:
    """The files of one base model on this machine."""

    folder: Path
    commit: str | None
    """The hub's commit hash, or None for files that are neither from a hub nor from its cache."""


def find_source(settings: ModelSettings) -> ModelSource:
    """Return the base model's files. Files of a hub id are fetched into the hub's cache first.

    Raises:
        ModelError: base_model is neither a folder nor a hub id that can be fetched, or the files are an
            adapter, quantized, or not safetensors.
    """
    source = _locate(settings, MODEL)
    require_unquantized_base(source.folder, f"model.base_model={settings.base_model!r}")
    require_safetensors(source.folder, f"model.base_model={settings.base_model!r}")
    require_layers(source.folder, f"model.base_model={settings.base_model!r}")
    return source


def hub_name(settings: ModelSettings, folder: Path) -> str | None:
    """Return the hub id of a base whose files are in `folder`, or None for a base that has none.

    A folder in the layout of the hub's cache names its repository.
    """
    name = settings.base_model
    own = name == EMBEDDED or name.startswith(stand_ins.PREFIX)
    if not own and not Path(name).expanduser().exists():
        return name
    place = folder.resolve()
    cached = place.parent.parent.name if place.parent.name == "snapshots" else ""
    return cached[len(CACHED) :].replace("--", "/") if cached.startswith(CACHED) else None


def require_safetensors(folder: Path, where: str) -> None:
    """Refuse a folder without safetensors weights.

    Raises:
        ModelError: the folder has only weights in other formats, or none.
    """
    # transformers and PEFT would fall back to formats that can run code
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{where}: no *.safetensors weights in {folder}. Other formats can run code. "
            "Save the model again with save_pretrained"
        )


def require_layers(folder: Path, where: str) -> None:
    """Refuse a config.json that declares more layers than its weights can hold.

    transformers would build them all before it looks at the weights, which can take hours.

    Raises:
        ModelError: states both numbers.
    """
    config = PretrainedConfig.get_config_dict(folder)[0]
    nested = config.get("text_config")
    parts = [config, nested] if isinstance(nested, dict) else [config]
    found = [(name, part[name]) for part in parts for name in LAYERS if name in part]
    name, layers = max(found, key=lambda item: _as_count(item[1]), default=("", 0))
    tensors = _count_tensors(folder)
    # each layer has a tensor of its own at least
    most = MAX_LAYERS if tensors is None else tensors
    if _as_count(layers) > most:
        held = (
            f"at most {most:,} are supported" if tensors is None else f"its weights hold {most:,}"
        )
        raise ModelError(
            f"{where}: config.json declares {layers:,} layers ({name}), but {held}"
            f"{'' if tensors is None else ' tensors'}. Restore the config.json that was stored with "
            "the weights"
        )


def _as_count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _count_tensors(folder: Path) -> int | None:
    """Return the number of a model's tensors, or None if it is unknown."""
    try:
        for index in folder.glob("*.safetensors.index.json"):
            return len(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        # one of several shards says nothing: a download may have been interrupted
        whole = (path for path in folder.glob("*.safetensors") if "-of-" not in path.name)
        return max(map(_tensors_of, whole), default=None)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None  # the loader says what is wrong with the file


def _tensors_of(path: Path) -> int:
    with safe_open(path, framework="numpy") as weights:
        return len(weights.keys())


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """Return the configuration of a base model. Only config.json is fetched for a hub id.

    Raises:
        ModelError: see `find_source`, or transformers does not support the configuration.
    """
    return load_config_and_digest(settings)[0]


def load_config_and_digest(settings: ModelSettings) -> tuple[PretrainedConfig, str]:
    """Return the configuration of a base model and its digest. See `load_config`."""
    source = _locate(settings, CONFIG)
    require_unquantized_base(source.folder, f"model.base_model={settings.base_model!r}")
    require_layers(source.folder, f"model.base_model={settings.base_model!r}")
    try:
        config = AutoConfig.from_pretrained(source.folder, **NO_CODE)
        digest = config_digest(source.folder)
    except Exception as error:  # a file of somebody else may contradict itself in any way
        raise ModelError(in_full(f"model.base_model={settings.base_model!r}", error)) from error
    require_causal_class(config, f"model.base_model={settings.base_model!r}")
    return config, digest


def require_causal_class(config: PretrainedConfig, where: str) -> None:
    """Refuse a model whose class cannot continue text.

    Raises:
        ModelError: says what the model is, and what to choose instead.
    """
    kind, stored = config.model_type, ", ".join(config.architectures or ())
    named = f"{kind} ({stored})" if stored else kind
    advice = "Choose a model whose config.json names a class that ends in ForCausalLM"
    decodes = any(name.endswith(CAUSAL) for name in config.architectures or ())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{where}: {named} is no causal language model of transformers. {advice}")
    if getattr(config, "is_encoder_decoder", False) and not decodes:
        raise ModelError(
            f"{where}: {named} is an encoder with a decoder. Without its encoder it would not be the "
            f"model that was stored. {advice}"
        )
    if getattr(config, "is_decoder", None) is False and not decodes and kind in ENCODERS:
        raise ModelError(
            f"{where}: {named} is an encoder, which reads text in both directions and cannot continue "
            f"it. {advice}"
        )


def one_line(where: str, error: BaseException) -> str:
    """Return the first line of a library's error, prefixed with the setting or file it concerns."""
    return f"{where}: {first_line(error)}"


def in_full(where: str, error: BaseException) -> str:
    """Return a library's whole error in one line, where nothing better is known than its own words."""
    return f"{where}: {' '.join(str(error).split()) or type(error).__name__}"


def weights_digest(folder: Path) -> str:
    """Return the sha256 over the safetensors files of a folder, in the order of their names.

    Raises:
        ModelError: a file cannot be read.
    """
    try:
        return _digest(tuple(map(_state, sorted(folder.glob("*.safetensors")))))
    except OSError as error:
        raise ModelError(f"{folder}: {error}") from error


FileState = tuple[Path, int, int, int, int]


def _state(path: Path) -> FileState:
    # Size and time of modification stay if `cp -p` or `rsync -t` replaces a file
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns


@lru_cache(maxsize=8)
def _digest(files: tuple[FileState, ...]) -> str:
    # Cached, because hashing takes a second per GiB and each load asks for the digest
    digest = hashlib.sha256()
    for path, *_ in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def config_digest(folder: Path) -> str:
    """Return the sha256 of a base model's configuration.

    Raises:
        ModelError: config.json cannot be read.
    """
    path = folder / "config.json"
    try:
        config = _lasting(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(one_line(str(path), error)) from error
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _lasting(value: object) -> object:
    """Return a configuration without VOLATILE keys, also in the configurations of its parts."""
    if not isinstance(value, Mapping):
        return value
    return {key: _lasting(each) for key, each in value.items() if key not in VOLATILE}


def load_tokenizer(folder: Path, where: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder.

    Raises:
        ModelError: the folder has none, or its files are broken.
    """
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise ModelError(
            f"{where}: {folder} contains no tokenizer. Copy the tokenizer's files (tokenizer.json, "
            "tokenizer_config.json) from the model that its weights were trained from"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except Exception as error:  # the tokenizers library raises bare Exceptions on broken files
        raise ModelError(in_full(where, error)) from error
    return tokenizer


def read_base_files(settings: ModelSettings) -> InputDigests:
    """Return the digests of a base model's weights and configuration.

    Raises:
        ModelError: see `find_source`, or a file of the model or its tokenizer cannot be read.
    """
    folder = find_source(settings).folder
    load_tokenizer(folder, f"model.base_model={settings.base_model!r}")
    return InputDigests(base=weights_digest(folder), config=config_digest(folder))


def weights_bytes(folder: Path) -> int:
    """Return the total bytes of the safetensors files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _locate(settings: ModelSettings, patterns: Sequence[str]) -> ModelSource:
    if settings.base_model == EMBEDDED:
        return ModelSource(BASE_DIR, None)
    if settings.base_model.startswith(stand_ins.PREFIX):
        return ModelSource(model_folder(settings.base_model), None)
    path = Path(settings.base_model).expanduser()
    if not path.is_dir():
        return _from_hub(settings, patterns)
    folder = path if (path / "config.json").exists() else _snapshot(path, settings)
    if problem := irregular_in(folder, (TEMPLATES,)):
        raise ModelError(f"model.base_model={settings.base_model!r}: {problem}")
    # In the hub cache's layout the folder's name is the commit
    in_cache = folder.resolve().parent.name == "snapshots"
    return ModelSource(folder, folder.resolve().name if in_cache else None)


def _snapshot(path: Path, settings: ModelSettings) -> Path:
    """Return the revision's folder if `path` has the hub cache's layout (models--…), else `path`."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    commits = sorted(folder.name for folder in snapshots.iterdir() if folder.is_dir())
    wanted = settings.revision or "main"
    ref = path / "refs" / wanted
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else wanted
    if commit not in commits and settings.revision is None and len(commits) == 1:
        commit = commits[0]
    if commit not in commits:
        raise ModelError(
            f"model.revision={settings.revision!r}: {path} does not contain this revision. "
            f"Its revisions are {', '.join(commits) or 'none'}"
        )
    return snapshots / commit


def _from_hub(settings: ModelSettings, patterns: Sequence[str]) -> ModelSource:
    name = settings.base_model
    try:
        fetched = Path(
            snapshot_download(
                name,
                revision=settings.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(NOT_THE_MODEL),
            )
        )
    except (
        Exception
    ) as error:  # huggingface_hub, its HTTP client or the OS: the files are unavailable
        raise ModelError(f"model.base_model={name!r} {_fetch_problem(error, settings)}") from error
    return ModelSource(fetched, fetched.name if COMMIT.fullmatch(fetched.name) else None)


def _fetch_problem(error: Exception, settings: ModelSettings) -> str:
    """Return why a hub id cannot be fetched, and what to do."""
    name = settings.base_model
    match error:
        case GatedRepoError():
            return (
                f"is gated. Accept its licence at https://huggingface.co/{name} with your account, "
                "then set HF_TOKEN to a token of that account "
                "(https://huggingface.co/settings/tokens)"
            )
        case RevisionNotFoundError():
            return f"has no revision {settings.revision!r}. Set a branch, a tag or a commit"
        case RepositoryNotFoundError():
            return (
                "is neither a local folder nor a model on the hub. Check the spelling at "
                f"https://huggingface.co/{name}, and set HF_TOKEN if the model is private"
            )
        case HFValidationError():
            return (
                "is neither a local folder nor a hub id (organisation/name). "
                "Set the folder that contains config.json and *.safetensors"
            )
        case LocalEntryNotFoundError():
            return (
                "is not a local folder and not in the hub's cache on this machine, and the hub "
                "cannot be reached (no network, or HF_HUB_OFFLINE is set). On a machine with a "
                f"network, run `sweeper prefetch model.base_model={name}` and share its cache "
                "(HF_HOME), or set a folder: model.base_model=/path/to/folder"
            )
        case _:
            return (
                f"could not be fetched from the hub ({type(error).__name__}: {first_line(error)})"
            )


def require_object(path: Path, where: str) -> None:
    """Refuse a JSON file that holds anything but an object, or nests deeper than Python can read.

    Raises:
        ModelError: names the file and what it holds.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(one_line(f"{where}: {path.name} cannot be read", error)) from None
    if not isinstance(found, dict):
        raise ModelError(
            f"{where}: {path.name} holds a {type(found).__name__} instead of an object"
        )


def require_unquantized_base(folder: Path, where: str) -> None:
    """Refuse a folder that holds an adapter, quantized weights or no model.

    Quantized weights cannot be trained or merged into.

    Args:
        folder: the folder to check.
        where: the setting or file that names the folder, for the message.

    Raises:
        ModelError: states what the folder holds and what to do.
    """
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ModelError(
                f"{where} is an adapter, not a base model. Merge it into its base first, "
                "or set the base itself"
            )
        raise ModelError(f"{where}: no config.json in {folder}")
    if (folder / "adapter_config.json").exists():
        # transformers would load the adapter's base, with the adapter on it, in place of these weights
        raise ModelError(
            f"{where}: {folder} contains adapter_config.json beside config.json, so transformers would "
            "load the adapter and its base. Move the adapter's files to a folder of their own, or set "
            "the base itself"
        )
    require_object(folder / "config.json", where)
    try:
        config = PretrainedConfig.get_config_dict(folder)[0]
    except (OSError, ValueError) as error:
        raise ModelError(one_line(where, error)) from error
    if quantized := config.get("quantization_config"):
        known = isinstance(quantized, dict)
        method = quantized.get("quant_method", "unknown method") if known else "unknown method"
        raise ModelError(
            f"{where} is already quantized ({method}). Set the unquantized checkpoint. "
            "quantization=nf4, fp4 or int8 quantizes weights while they are loaded"
        )
