"""Resolve the modules that get an adapter from presets, names, regular expressions and layer ranges.

Presets choose by the role of a weight in its block, not by its own name. Works on names and classes
only, so on models on the meta device as well as on loaded ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

from sweeper.config.settings import LAYERS
from sweeper.core.errors import ModelError

Role = Literal["attention", "mlp", "mixer", "router", "tower", "other"]
"""Role of a linear weight: attention, per-token work, other mixing of tokens (Mamba, convolutions),
choosing (routers of experts, indexers), towers (other media than text, and attention to an encoder that
a causal language model has not), or work outside of the blocks."""
PRESETS = ("attention_qv", "attention", "mlp")
TRAINED_ROLES: frozenset[Role] = frozenset(("attention", "mlp", "mixer", "other"))
"""Roles that all-linear adapts. A router's choice has no useful gradient, and a tower sees no text."""
TOWER = re.compile(
    r"vision|visual|image|audio|speech|multi_?modal_?proj|encoder_attn|cross_?attn|cross_?attention"
)
ROUTER = re.compile(r"router|topk|indexer|^gate$|shared_expert_gate")
ROLES: Mapping[Role, re.Pattern[str]] = {
    "attention": re.compile(r"attention|attn|delta_?net|_att$"),
    "mlp": re.compile(r"mlp|moe|experts|ffn|feed_?forward"),
    "mixer": re.compile(r"mamba|mixer|ssm|conv|lru|temporal|recurrent|lstm"),
}
"""Words in the classes and names of a block's parts, by the role of what is inside."""
QUERY_VALUE = re.compile(
    r"(in_)?(proj(ect)?_)?w?(q|v|kv|qkv|qkvz|query|value|query_key_value)(_b|_gate)?"
    r"(_proj|_lin)?(_current|_delayed)?|c_attn"
)
"""Names of projections within an attention that give queries or values, alone or fused with others."""
ALL_LINEAR = "all-linear"
REGEX = "regex:"
"""Prefix of a regular expression over full module names. A misspelt name without it is an error."""


def role_of(path: Sequence[str]) -> Role:
    """Return the role of a weight in its block.

    Args:
        path: what leads to the weight, from the root, as words in lower case: names of modules, each
            with its class behind a space where the class is known. The last one is the weight itself.
    """
    words = [word for part in path for word in part.split()]
    if any(TOWER.search(word) for word in words):
        return "tower"
    if any(ROUTER.search(word) for word in words):
        return "router"
    block = next((n for n, part in enumerate(path) if part.split()[0].isdigit()), None)
    if block is None:
        return "other"
    for part in path[block + 1 : -1]:
        if "norm" in part:
            continue
        for word in reversed(part.split()):  # a class says more than a name (NemotronH: mixer)
            if role := next((role for role, words in ROLES.items() if words.search(word)), None):
                return role
    return "mlp"  # works on each token alone, directly in the block (OPT: fc1)


def roles_by_name(names: Sequence[str]) -> dict[str, Role]:
    """Return the roles of weights by their full names, where the classes are not known."""
    return {name: role_of(name.lower().split(".")) for name in names}


def resolve_targets(
    target_modules: str | Sequence[str],
    names: Sequence[str],
    layers_to_transform: str | Sequence[int] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> str | list[str]:
    """Return the value for PEFT's `target_modules`: all-linear, name endings, or full names.

    Args:
        target_modules: a preset (attention_qv, attention, mlp, all-linear), `regex:` and a pattern that
            matches a full module name, one module name, or several names.
        names: full names of the model's linear modules, and of its experts' stacked weights.
        layers_to_transform: layers that get an adapter: indices, "0-11" (both ends included), "last-8",
            or None for all.
        roles: role of each name, or None to take it from the name.

    Raises:
        ModelError: nothing matches. The message lists the presets and the endings that exist.
    """
    # PEFT's own layers_to_transform refuses all-linear and regular expressions, so layers become names
    everywhere, known = names, roles_by_name(names) if roles is None else roles
    if layers_to_transform is not None:
        layers = set(resolve_layers(layers_to_transform, names))
        names = [name for name in names if layer_of(name) in layers]
    if isinstance(target_modules, str) and target_modules.startswith(REGEX):
        return _matching(target_modules, names)
    if isinstance(target_modules, str) and target_modules in (*PRESETS, ALL_LINEAR):
        wanted = _preset(target_modules, names, known)
        if wanted == list(everywhere) and target_modules == ALL_LINEAR:
            return ALL_LINEAR
        return _endings_of(wanted, everywhere) or wanted
    endings = _endings(target_modules, names)
    if layers_to_transform is None:
        return endings
    return [name for name in names if any(_ends_with(name, ending) for ending in endings)]


def reached(resolved: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names that a value of `resolve_targets` reaches."""
    if resolved == ALL_LINEAR:
        return list(names)
    return [name for name in names if any(_ends_with(name, ending) for ending in resolved)]


def equal_presets(names: Sequence[str], roles: Mapping[str, Role] | None = None) -> dict[str, str]:
    """Return each preset that reaches the same weights as an earlier one, with the earlier one's name.

    Args:
        names: see `resolve_targets`.
        roles: see `resolve_targets`.
    """
    known = roles_by_name(names) if roles is None else roles
    first: dict[tuple[str, ...], str] = {}
    equal: dict[str, str] = {}
    for preset in (*PRESETS, ALL_LINEAR):
        # a base may lack the modules of a preset
        with suppress(ModelError):
            found = tuple(_preset(preset, names, known))
            if first.setdefault(found, preset) != preset:
                equal[preset] = first[found]
    return equal


def _preset(preset: str, names: Sequence[str], roles: Mapping[str, Role]) -> list[str]:
    if preset == ALL_LINEAR:
        found = [name for name in names if roles[name] in TRAINED_ROLES]
    else:
        role = "mlp" if preset == "mlp" else "attention"
        found = [name for name in names if roles[name] == role]
    if preset == "attention_qv":
        found = [name for name in found if _gives_queries_or_values(name)]
    if not found:
        raise _no_such_module(preset, f"in the role of {preset}", names)
    return found


def _gives_queries_or_values(name: str) -> bool:
    *_, parent, leaf = f".{name}".lower().split(".")
    return QUERY_VALUE.fullmatch(parent if leaf == "linear" else leaf) is not None


def _endings_of(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return endings that select exactly the wanted names, or [] if two words do not suffice."""
    for words in (1, 2):
        endings = list(dict.fromkeys(".".join(name.split(".")[-words:]) for name in wanted))
        # A number alone is the name of a block as well (Gemma 3n: altup_projections.0 and layers.0)
        if any(ending.isdigit() for ending in endings):
            continue
        if reached(endings, names) == list(wanted):
            return endings
    return []


def _endings(target_modules: str | Sequence[str], names: Sequence[str]) -> list[str]:
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    found = [ending for ending in wanted if any(_ends_with(name, ending) for name in names)]
    missing = [ending for ending in wanted if ending not in found]
    if missing:
        raise _no_such_module(target_modules, ", ".join(missing), names)
    return found


def _matching(target_modules: str, names: Sequence[str]) -> list[str]:
    pattern = target_modules.removeprefix(REGEX)
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ModelError(
            f"adapter.target_modules={target_modules!r}: {pattern!r} is not a regular expression: "
            f"{error}"
        ) from error
    if not found:
        example = f" (a full name is {names[0]})" if names else ""
        raise _no_such_module(target_modules, f"like {pattern}{example}", names)
    return found


def resolve_layers(layers: str | Sequence[int], names: Sequence[str]) -> list[int]:
    """Return the layer indices of a range in this model.

    Raises:
        ModelError: a layer does not exist.
    """
    existing = sorted({layer for name in names if (layer := layer_of(name)) is not None})
    wanted = _layers(layers, existing)
    missing = [layer for layer in wanted if layer not in existing]
    if missing or not wanted:
        valid = f"layers 0 to {existing[-1]}" if existing else "no numbered layers"
        raise ModelError(f"adapter.layers_to_transform={layers!r}: the model has {valid}")
    return wanted


def _layers(layers: str | Sequence[int], existing: Sequence[int]) -> list[int]:
    if not isinstance(layers, str):
        return list(layers)
    match = LAYERS.fullmatch(layers)
    assert match is not None, "the settings' validation refuses other texts"
    if count := match["count"]:
        # More layers than exist become indices that do not exist, which resolve_layers refuses
        missing = range(int(count) - len(existing))
        return [*existing[-int(count) :], *(existing[-1] + 1 + extra for extra in missing)]
    return list(range(int(match["first"]), int(match["last"]) + 1))


def layer_of(name: str) -> int | None:
    """Return the index of a module's layer, or None: the first number in its name, as in PEFT."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def require_matches(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that each of PEFT's pattern keys (a name's ending, or a regex over it) matches a module.

    Raises:
        ModelError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            raise _no_such_module({pattern}, pattern, names, key)


def _no_such_module(
    value: object, wanted: str, names: Sequence[str], key: str = "target_modules"
) -> ModelError:
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    presets = f". Presets: {', '.join([*PRESETS, ALL_LINEAR])}" if key == "target_modules" else ""
    return ModelError(
        f"adapter.{key}={value!r}: the model has no module named {wanted}. "
        f"Its linear modules are {', '.join(endings)}{presets}"
    )


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)
