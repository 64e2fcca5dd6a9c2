"""Hints for overrides that Hydra, PEFT or Optuna users write and this program spells differently.

Knows names and spellings only. Which keys and choices exist is given by the caller, who composes.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from sweeper.config.grammar import read_override
from sweeper.config.space import word

SWEEPER = "hydra.sweeper."
SHORT_KEYS = ("n_trials", "n_jobs", "study_name", "protocol")
"""Keys of `hydra.sweeper` that need no prefix on the command line."""
SHORT_SECTIONS = ("sampler", "pruner", "finalists", "budget", "baseline", "verdict")
"""Sections of `hydra.sweeper` whose keys need no prefix on the command line."""
STUDY_GROUPS = ("sampler", "pruner", "finalists")
"""Groups that only a study reads."""
ADDED_GROUPS = ("experiment", "stand_in")
"""Groups without a default. Hydra wants a + before them, and here they work without it, too."""

ALIASES = {
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "batch_size": "training.per_device_train_batch_size",
    "train_batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "evaluation.per_device_eval_batch_size",
    "max_eval_samples": "evaluation.look_rows",
    "grad_accum": "training.gradient_accumulation_steps",
    "warmup": "training.warmup_ratio",
    "scheduler": "training.lr_scheduler_type",
    "lr_scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "clip_grad_norm": "training.max_grad_norm",
    "gradient_checkpointing": "training.activation_checkpointing",
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout",
    "target_module": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "val": "data.validation",
    "eval_dataset": "data.validation",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "chat_template": "data.template",
    "model_name": "model.base_model",
    "model_name_or_path": "model.base_model",
    "model_id": "model.base_model",
    "pretrained_model_name_or_path": "model.base_model",
    "torch_dtype": "model.dtype",
    "mlflow_uri": "tracking.uri",
    "tracking_uri": "tracking.uri",
    "gpus": "n_jobs",
    "num_gpus": "n_jobs",
    "devices": "n_jobs",
    "max_trials": "n_trials",
    "num_trials": "n_trials",
    "num_samples": "n_trials",
    "name": "study_name",
    "timeout": "budget.wall_clock",
    "metric": "objective.metric",
    "direction": "objective.direction",
    "out_dir": "output_dir",
}
"""Words of other programs for a setting, by the last part of their key."""

CHOICE_ALIASES = {
    ("sampler", "cmaes"): "sampler=optuna sampler.class_name=CmaEsSampler",
    ("sampler", "nsgaii"): "sampler=optuna sampler.class_name=NSGAIISampler",
    ("sampler", "qmc"): "sampler=optuna sampler.class_name=QMCSampler",
    # Optuna's TPESampler includes MOTPE
    ("sampler", "motpe"): "sampler=tpe",
    ("pruner", "hyperband"): "pruner=optuna pruner.class_name=HyperbandPruner",
    # Optuna's SuccessiveHalvingPruner is the asynchronous kind
    ("pruner", "asha"): "pruner=successive_halving",
    ("adapter", "qlora"): "adapter=lora quantization=nf4",
    ("adapter", "dora"): "adapter=lora adapter.use_dora=true",
    ("adapter", "full"): "adapter=none quantization=none",
    ("quantization", "4bit"): "quantization=nf4",
    ("quantization", "int4"): "quantization=nf4",
    ("quantization", "8bit"): "quantization=int8",
    ("quantization", "bf16"): "quantization=none",
}
"""Other programs' words for a choice of a group."""

KEY_OF_GROUP = {
    "model": "model.base_model",
    "data": "data.train",
    "tracking": "tracking.uri",
    "objective": "objective.metric",
    "workers": "n_jobs",
}
"""The setting that a value given to a group was most likely meant for."""
LOOK_OF_GROUP = {"tracking": "/", "objective": "/", "workers": r"^\d+$"}
"""The pattern of values that are meant for that setting, where not every value can be."""

FOREIGN_FUNCTIONS = {
    "uniform": "interval(LOW, HIGH)",
    "quniform": "range(START, STOP, STEP)",
    "loguniform": "tag(log, interval(LOW, HIGH))",
    "log_uniform": "tag(log, interval(LOW, HIGH))",
    "randint": "int(interval(LOW, HIGH))",
    "categorical": "choice(A, B)",
    "log": "tag(log, interval(LOW, HIGH))",
}
"""Other programs' functions of a search space, and the words here."""

HYDRA_FUNCTIONS = (
    *("choice", "range", "interval", "tag", "int", "float", "str", "bool", "json_str"),
    *("sort", "shuffle", "glob", "extend_list"),
)

SECONDARY = ("space.", "stand_in.", "workers.fake.")
"""Sections whose keys repeat other sections' names and are seldom meant."""

_KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@-]*")
_CALL = re.compile(r"([A-Za-z_]\w*)\(")


def in_full(override: str) -> str:
    """Return an override with its short key in full, `~/` expanded and whole mappings allowed.

    `n_trials=3` is `hydra.sweeper.n_trials=3`, `experiment=e` is `+experiment=e`, and
    `data.columns={a: b}` is `++data.columns={a: b}`, because Hydra lets a mapping gain keys only so.
    """
    mark, key, rest = split_override(override)
    if not mark and key in ADDED_GROUPS:
        mark = "+"
    if is_short(key):
        key = SWEEPER + key
    text = _with_home(f"{mark}{key}{rest}")
    if not mark and "." in key and (not key.startswith("hydra.") or key.startswith(SWEEPER)):
        found = read_override(text) if rest.startswith("={") else None
        text = f"++{text}" if found is not None and isinstance(found.value(), dict) else text
    return text


def split_override(override: str) -> tuple[str, str, str]:
    """Return an override's mark (+, ++, ~ or nothing), its key, and the rest from the = on."""
    bare = override.lstrip("+~")
    key, equals, value = bare.partition("=")
    return override[: len(override) - len(bare)], key, equals + value


def is_short(key: str) -> bool:
    """Return True for a key of `hydra.sweeper` that is written without that prefix."""
    return key in SHORT_KEYS or key.startswith(tuple(f"{name}." for name in SHORT_SECTIONS))


def shortened(key: str) -> str:
    """Return a key as a person would type it: without `hydra.sweeper.` where that is optional."""
    short = key.removeprefix(SWEEPER)
    return short if is_short(short) else key


def needs_study(override: str) -> str | None:
    """Return why an override means nothing to a single trial, or None."""
    _, key, _ = split_override(override)
    if key.startswith(SWEEPER) or key in STUDY_GROUPS:
        shown = override.replace(SWEEPER, "", 1) if shortened(key) != key else override
        return (
            f"{shown}: {shortened(key)} is a setting of a study, and this command trains a single "
            "trial. Add -m to run a study"
        )
    return None


def is_override(text: str) -> bool:
    """Return True for an argument of the form KEY=VALUE or ~KEY."""
    return text.startswith("~") or ("=" in text and not text.startswith("="))


def refused_words(words: Sequence[str], experiments: Sequence[str]) -> list[str]:
    """Return what to type in the place of arguments that are no overrides."""
    named = [word for word in words if word in experiments]
    problems = [f"{name}: is an experiment. Choose it with +experiment={name}" for name in named]
    if others := [word for word in words if word not in named]:
        problems.append(
            f"{' '.join(others) or repr('')}: is not of the form KEY=VALUE. Write no space around "
            "the =, and quote a value that contains spaces: 'data.train=\"my file.jsonl\"'"
        )
    return problems


def moved(override: str) -> str | None:
    """Return where a setting is that Hydra's own sweepers keep elsewhere, or None."""
    mark, key, rest = split_override(override)
    value = rest[1:]
    answer: str | None = None
    if key == "hydra/sweeper" and value != "study":
        answer = "-m always runs a study of this program, with Optuna inside. Remove it"
    elif key.startswith("hydra/sweeper/"):
        answer = _hydra_group(key.rpartition("/")[2], value)
    elif key == "hydra/launcher" and value != "basic":
        answer = (
            "trials are started by this program's workers, not by a launcher. For several devices "
            "write n_jobs=4, for a cluster workers=ray (docs/cluster.md)"
        )
    elif key.startswith("hydra.launcher."):
        answer = "this program uses no launcher. For several devices write n_jobs=4"
    elif key == f"{SWEEPER}direction":
        answer = f"the direction belongs to the objective. Write objective.direction={value}"
    elif key.startswith(f"{SWEEPER}params."):
        own = key.removeprefix(f"{SWEEPER}params.")
        answer = f"a key is searched under its own name. Write {shell_word(f'{own}={value}')} -m"
    elif key == f"{SWEEPER}arms" and value.strip() == "{}" and not mark.startswith("~"):
        answer = (
            "is merged with the experiment's arms, so nothing changes. Leave an arm out by its name: "
            f"{shell_word(f'~{SWEEPER}arms.full')}"
        )
    return None if answer is None else f"{override}: {answer}"


def _hydra_group(name: str, value: str) -> str:
    if (name, value) in CHOICE_ALIASES:
        return f"write {CHOICE_ALIASES[name, value]}"
    if name in STUDY_GROUPS:
        return f"here that group is called {name}. Write {name}={value}"
    return "no such group"


def unknown_key(key: str, keys: Iterable[str]) -> str:
    """Return what to type in the place of a key that does not exist.

    Args:
        key: the dotted key that was typed.
        keys: all dotted keys that exist.
    """
    known = [shortened(name) for name in keys]
    found = _similar(shortened(key), known)
    if found:
        return f"did you mean {' or '.join(found)}? (all settings: python -m sweeper --cfg job)"
    parent = key.rpartition(".")[0]
    siblings = sorted(_children(parent, known))
    if not siblings:
        parent, siblings = "", sorted(_children("", known))
    return f"valid keys of {parent or 'the top level'}: {', '.join(siblings)}"


def _similar(key: str, known: Sequence[str]) -> list[str]:
    """Return the existing keys that a wrong key most likely stands for, at most three."""
    parent, _, last = key.rpartition(".")
    if (alias := ALIASES.get(last)) in known:
        return [str(alias)]
    primary = [name for name in known if not name.startswith(SECONDARY)]
    same = [name for name in primary if name.rpartition(".")[2] == last]
    if 0 < len(same) <= 3:
        return same
    close = difflib.get_close_matches(last, _children(parent, known), n=1)
    if close and parent:
        return [f"{parent}.{close[0]}"]
    if whole := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
        return whole
    if close:
        return close
    # reversed, so that the first of several keys with one name is kept
    leaves = {name.rpartition(".")[2]: name for name in reversed(primary)}
    return [leaves[name] for name in difflib.get_close_matches(last, leaves, n=1, cutoff=0.8)]


def _children(parent: str, known: Iterable[str]) -> set[str]:
    """Return the names directly below a dotted parent. `hydra` itself has none for users."""
    prefix = f"{parent}." if parent else ""
    below = {name[len(prefix) :].split(".")[0] for name in known if name.startswith(prefix)}
    return below - {"hydra", ""}


def unknown_choice(group: str, value: str, choices: Sequence[str]) -> str:
    """Return what to type in the place of a choice that a group does not have."""
    hint = ""
    if alias := CHOICE_ALIASES.get((group, value.lower())):
        hint = f"write {alias}; "
    elif close := difflib.get_close_matches(value, choices, n=1):
        hint = f"did you mean {group}={close[0]}? "
    elif group in KEY_OF_GROUP and re.search(LOOK_OF_GROUP.get(group, ""), value):
        hint = f"did you mean {shell_word(f'{KEY_OF_GROUP[group]}={value}')}? "
    return f"no such choice; {hint}available: {', '.join(choices)}"


def unreadable(override: str) -> str:
    """Return how to write an override that Hydra's grammar cannot read."""
    mark, key, rest = split_override(override)
    value = rest[1:]
    if _KEY.fullmatch(f"{mark}{key}") is None or not rest:
        return f"{override or repr(override)}: is not of the form KEY=VALUE"
    call = _CALL.match(value)
    if call and call[1] in FOREIGN_FUNCTIONS:
        words = FOREIGN_FUNCTIONS[call[1]]
        return f"{override}: there is no {call[1]}(…). Write '{key}={words}'"
    if call and call[1] in HYDRA_FUNCTIONS:
        return f"{override}: cannot be read. Check the commas and brackets of {call[1]}(…)"
    if value.startswith(("[", "{")) and value[-1] not in "]}":
        return (
            f"{override}: a bracket is not closed. If the value contains spaces, put single quotes "
            "around the whole: 'data.columns={instruction: question}'"
        )
    if value.startswith(("[", "{")):
        return (
            f"{override}: cannot be read as a {'list' if value[0] == '[' else 'mapping'}. Put double "
            "quotes around items with special characters: 'data.train=[\"a#1.jsonl\", b.jsonl]'"
        )
    special = sorted(set(re.sub(r"[\w./@+-]", "", value)))
    return (
        f"{override}: Hydra's grammar does not allow {' '.join(special) or 'this value'} here "
        f"without quotes. Write {quoted(mark + key, value)}"
    )


def quoted(key: str, value: str) -> str:
    """Return `key=value` as typed in a shell so that Hydra takes the value as plain text."""
    text = f'{key}="{value}"'
    override = read_override(text)
    plain = override is not None and override.value() == value
    if plain and "'" not in value:
        return f"'{text}'"  # a shell leaves everything between single quotes alone
    if plain and not set(value) & set('$`"\\!'):
        return f'"{key}=\\"{value}\\""'
    return shlex.quote(f"{key}={word(value)}")


def shell_word(override: str) -> str:
    """Return an override as typed in a shell: quoted where the shell would change it."""
    return shlex.quote(override)


def _with_home(override: str) -> str:
    """Return an override with `~/` at the start of a value or item expanded.

    A shell expands `~` only at the start of a word, so KEY=~/x arrives as it was typed. Hydra's
    grammar refuses such a text. One that Hydra reads (a quoted ~) is left alone.
    """
    if "~/" not in override or read_override(override) is not None:
        return override
    home = str(Path.home())
    return re.sub(r"(?<=[=\[{,:\s])~(?=/)", lambda _: home, override)
