"""Small files as people really have them, with what must become of each."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAPITALS = {
    **{"Austria": "Vienna", "Brazil": "Brasília", "Chile": "Santiago", "Denmark": "Copenhagen"},
    **{"Egypt": "Cairo", "Finland": "Helsinki", "Ghana": "Accra", "Hungary": "Budapest"},
    **{"India": "New Delhi", "Japan": "Tokyo", "Kenya": "Nairobi", "Latvia": "Riga"},
    **{"Mexico": "Mexico City", "Norway": "Oslo", "Oman": "Muscat", "Peru": "Lima"},
    **{"Qatar": "Doha", "Romania": "Bucharest", "Spain": "Madrid", "Turkey": "Ankara"},
}
ASKED = [f"What is the capital of {country}?" for country in CAPITALS]
TOLD = [f"{capital} is the capital of {country}." for country, capital in CAPITALS.items()]
PAIRS = list(zip(ASKED, TOLD, strict=True))
PLACES = list(CAPITALS.items())

Row = Mapping[str, Any]


@dataclass(frozen=True)
class OwnFile:
    """A file or folder, and what a new user must be told about it.

    Attributes:
        write: Function that writes the file into a folder and returns its path.
        format: Format that is recognised, or an empty text for a file that is refused.
        rows: Rows that are used.
        unread: Columns and keys that are named as unread.
        told: Parts of what is said about rows that were dropped or changed.
        refused: Parts of the refusal: what is wrong, and what to do.
        encoded: Parts of what `sweeper data` shows of the encoded rows.
        overrides: Settings that the user gives as well.
    """

    write: Callable[[Path], Path]
    format: str = ""
    rows: int = len(PAIRS)
    unread: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    encoded: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def _bytes(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _text(name: str, content: str, encoding: str = "utf-8") -> Callable[[Path], Path]:
    return _bytes(name, content.encode(encoding, "surrogatepass"))


def _dumped(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _lines(rows: Iterable[Any], name: str = "mine.jsonl") -> Callable[[Path], Path]:
    return _text(name, _dumped(rows))


def _table(
    rows: Sequence[Sequence[str]], name: str, separator: str = ",", encoding: str = "utf-8"
) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with (folder / name).open("w", encoding=encoding, newline="") as file:
            csv.writer(file, delimiter=separator).writerows(rows)
        return folder / name

    return write


def _parquet(rows: Sequence[Row], name: str = "mine.parquet") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), folder / name)
        return folder / name

    return write


def _folder(files: Mapping[str, str]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for name, content in files.items():
            path = folder / "mine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        return folder / "mine"

    return write


def _saved_to_disk(folder: Path) -> Path:
    import datasets

    rows = [{"question": asked, "answer": told} for asked, told in PAIRS]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "mine"))
    return folder / "mine"


def _of(asked: str = "question", told: str = "answer", **more: Any) -> list[dict[str, Any]]:
    return [{asked: question, told: answer, **more} for question, answer in PAIRS]


def _chat(*turns: Mapping[str, Any], column: str = "messages", **more: Any) -> list[dict[str, Any]]:
    """Rows of turns in whose texts ASKED and TOLD stand for the row's own question and answer."""
    rows = []
    for asked, told in PAIRS:
        text = json.dumps({column: turns, **more})
        text = text.replace("ASKED", asked).replace("TOLD", told)
        rows.append(json.loads(text))
    return rows


USER, ANSWER = {"role": "user", "content": "ASKED"}, {"role": "assistant", "content": "TOLD"}
HUMAN, GPT = {"from": "human", "value": "ASKED"}, {"from": "gpt", "value": "TOLD"}
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


def _calls(arguments: Any, role: str = "tool", **more: Any) -> list[dict[str, Any]]:
    call = {"id": "call00001", "type": "function", "function": {"name": "find"}}
    call["function"] = {"name": "find", "arguments": arguments}
    return _chat(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": role, "content": '{"found": "ASKED"}', "tool_call_id": "call00001"},
        ANSWER,
        tools=[TOOL],
        **more,
    )


def _sharegpt_calls(tools: Any) -> list[dict[str, Any]]:
    call = json.dumps({"name": "find", "arguments": {"place": "here"}})
    rows = _chat(HUMAN, {"from": "function_call", "value": "CALL"}, GPT, column="conversations")
    for row in rows:
        row["conversations"][1]["value"] = call
        row["conversations"].insert(2, {"from": "observation", "value": "found"})
        row |= {"system": "Use the tools.", "tools": tools}
    return rows


MANY = [(f"{asked} ({n})", f"{told} ({n})") for n in range(8) for asked, told in PAIRS]
"""160 rows, of which one may be unusable."""


def _one_of_many(bad: Row | str) -> Callable[[Path], Path]:
    lines = [json.dumps({"question": asked, "answer": told}) for asked, told in MANY]
    lines.insert(7, bad if isinstance(bad, str) else json.dumps(bad))
    return _text("mine.jsonl", "\n".join(lines) + "\n")


def _squad(share: int) -> list[dict[str, Any]]:
    """SQuAD v2: each `share`-th question has no answer."""
    return [
        {
            "id": str(n),
            "title": "Capitals",
            "context": f"{told} It is large.",
            "question": asked,
            "answers": {"text": [told], "answer_start": [0]}
            if n % share
            else {"text": [], "answer_start": []},
        }
        for n, (asked, told) in enumerate(PAIRS)
    ]


FOREIGN = [
    ("Wie heißt die Hauptstadt?", "Sie heißt „Wien“ – naß & schön."),
    ("ما هي عاصمة مصر؟", "القاهرة هي عاصمة مصر."),
    ("日本的首都是哪里？", "日本的首都是东京。"),
    ("Kapital 🇳🇴?", "Oslo 👩‍👩‍👧‍👦 ✅"),
    ("Capitale de l’Égypte ?", "Le Caire\u00a0!"),
]

OWN_FILES: dict[str, OwnFile] = {
    # Exports of other trainers
    "unsloth_sharegpt": OwnFile(
        _lines(_chat(HUMAN, GPT, column="conversations", source="web", score=5.2)),
        "sharegpt",
        unread=("source", "score"),
    ),
    "axolotl_training_flags": OwnFile(
        _lines(
            _chat(
                USER,
                {"role": "assistant", "content": "WRONG", "training": False},
                {"role": "user", "content": "Really?"},
                {**ANSWER, "training": True},
            )
        ),
        "messages",
        encoded=("WRONG<|im_end|>", "«{told}<|im_end|>"),
    ),
    "axolotl_training_detail": OwnFile(
        _lines(_chat(USER, {**ANSWER, "training_detail": [{"begin_offset": 0}]})),
        refused=("messages[].training_detail", "data.ignore_columns="),
    ),
    "axolotl_segments": OwnFile(
        _lines([{"segments": [{"label": True, "text": told}]} for told in TOLD]),
        refused=("no known format has the columns segments", "Map your columns"),
    ),
    "llama_factory_alpaca_json": OwnFile(
        _text(
            "mine.json",
            json.dumps(
                [
                    {
                        **{"instruction": asked, "input": "", "output": told},
                        **{"system": "Be brief.", "history": [["Hello?", "Hello."]]},
                    }
                    for asked, told in PAIRS
                ]
            ),
        ),
        "alpaca",
        encoded=("Be brief.", "Hello?"),
    ),
    "llama_factory_tools_as_text": OwnFile(
        _lines(_sharegpt_calls(json.dumps([TOOL["function"]]))),
        "sharegpt",
        encoded=('«(find {"place": "here"})<|im_end|>', "Use the tools."),
    ),
    "llama_factory_ranking": OwnFile(
        _lines(
            _chat(HUMAN, column="conversations", chosen=GPT, rejected={"from": "gpt", "value": "?"})
        ),
        refused=(
            "chosen/rejected is preference data",
            "data.format=chat_completion 'data.columns={prompt: conversations, completion: chosen}'",
        ),
    ),
    "llama_factory_ranking_as_the_hint_says": OwnFile(
        _lines(
            _chat(HUMAN, column="conversations", chosen=GPT, rejected={"from": "gpt", "value": "?"})
        ),
        "chat_completion",
        unread=("rejected",),
        overrides=(
            "data.format=chat_completion",
            "data.columns={prompt: conversations, completion: chosen}",
        ),
    ),
    "openai_tools": OwnFile(
        _lines(_calls('{"place": "here"}', parallel_tool_calls=False)),
        "messages",
        unread=("parallel_tool_calls",),
        encoded=('«(find {"place": "here"})<|im_end|>',),
    ),
    "openai_preferences": OwnFile(
        _lines(
            [
                {
                    "input": {"messages": [{"role": "user", "content": asked}]},
                    "preferred_output": [{"role": "assistant", "content": told}],
                    "non_preferred_output": [{"role": "assistant", "content": "?"}],
                }
                for asked, told in PAIRS
            ]
        ),
        refused=(
            "preferred_output/non_preferred_output is preference data",
            "'data.columns={prompt: input, completion: preferred_output}'",
        ),
    ),
    "openai_preferences_as_the_hint_says": OwnFile(
        _lines(
            [
                {
                    "input": {"messages": [{"role": "user", "content": asked}]},
                    "preferred_output": [{"role": "assistant", "content": told}],
                    "non_preferred_output": [{"role": "assistant", "content": "?"}],
                }
                for asked, told in PAIRS
            ]
        ),
        "chat_completion",
        unread=("non_preferred_output",),
        overrides=("data.columns={prompt: input, completion: preferred_output}",),
    ),
    "openai_weights": OwnFile(
        _lines(
            _chat(
                USER,
                {"role": "assistant", "content": "WRONG", "weight": 0},
                {"role": "user", "content": "Really?"},
                {**ANSWER, "weight": 1},
            )
        ),
        "messages",
        encoded=("WRONG<|im_end|>", "«{told}<|im_end|>"),
    ),
    "trl_kto": OwnFile(
        _lines(_of("prompt", "completion", label=True)),
        refused=("does not read label", "data.ignore_columns=[label]"),
    ),
    "rl_prompts_with_response": OwnFile(
        _lines([{"prompt": [{"role": "user", "content": a}], "response": t} for a, t in PAIRS]),
        "chat_completion",
    ),
    "hh_transcripts": OwnFile(
        _lines(
            [
                {"chosen": f"\n\nHuman: {a}\n\nAssistant: {t}", "rejected": f"\n\nHuman: {a}"}
                for a, t in PAIRS
            ]
        ),
        refused=("preference data", "'data.columns={text: chosen}'"),
    ),
    "ultrafeedback": OwnFile(
        _lines(_chat(USER, ANSWER, prompt="ASKED", chosen=[USER, ANSWER], rejected=[USER, ANSWER])),
        refused=("does not read", "rejected", "data.ignore_columns="),
    ),
    # Published layouts
    "dolly": OwnFile(
        _lines(_of("instruction", "response", context="Of Europe.", category="qa")),
        "alpaca",
        unread=("category",),
        encoded=("Of Europe.",),
    ),
    "squad_v2": OwnFile(
        _lines(_squad(5)),
        refused=("4 of 20 rows cannot be used", "answers holds no text", "data.max_bad_fraction"),
    ),
    "squad_v2_tolerated": OwnFile(
        _lines(_squad(5)),
        "question_answer",
        rows=16,
        unread=("id", "title"),
        told=("answers holds no text",),
        overrides=("data.max_bad_fraction=0.3",),
    ),
    "squad_as_published": OwnFile(
        _text("mine.json", json.dumps({"version": "2.0", "data": [{"paragraphs": []}] * 3})),
        refused=("no known format has the columns paragraphs",),
    ),
    "mmlu": OwnFile(
        _parquet(_of(choices=["Rome", "Vienna"], answer=1, subject="geography")),
        refused=("does not read choices", "write them into the question", "ignore_columns=["),
    ),
    "choices_in_letters": OwnFile(
        _table(
            [["question", "A", "B", "answer"], *([a, "Rome", "Vienna", "B"] for a in ASKED)],
            "mine.csv",
        ),
        refused=("does not read A, B", "write them into the question"),
    ),
    "boolq": OwnFile(
        _lines([{"question": a, "passage": t, "answer": True} for a, t in PAIRS]),
        refused=("does not read passage", "'data.columns={context: passage}'"),
    ),
    "boolq_as_the_hint_says": OwnFile(
        _lines([{"question": a, "passage": t, "answer": True} for a, t in PAIRS]),
        "question_answer",
        overrides=("data.columns={context: passage}",),
        encoded=("«true",),
    ),
    "self_instruct": OwnFile(
        _lines([{"instruction": a, "instances": [{"input": "", "output": t}]} for a, t in PAIRS]),
        refused=("no known format has the columns instruction, instances",),
    ),
    "wildchat": OwnFile(
        _parquet(
            _chat(
                {**USER, "language": "English", "toxic": False, "turn_identifier": 1},
                {**ANSWER, "language": "English", "toxic": False, "turn_identifier": 1},
                column="conversation",
                model="gpt-4",
                redacted=False,
            )
        ),
        "sharegpt",
        unread=(
            *("model", "redacted", "conversation[].language", "conversation[].toxic"),
            "conversation[].turn_identifier",
        ),
    ),
    "daily_dialog": OwnFile(
        _lines([{"dialog": [a, t, "Thanks.", "Sure."], "act": [1, 2]} for a, t in PAIRS]),
        "sharegpt",
        unread=("act",),
    ),
    "speakers_with_names": OwnFile(
        _lines(
            [
                {"dialogue": [{"speaker": "Anna", "text": a}, {"speaker": "Ben", "text": t}]}
                for a, t in PAIRS
            ]
        ),
        refused=("20 of 20 rows cannot be used", "unknown role 'Anna'"),
    ),
    "pretokenized": OwnFile(
        _parquet([{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [1, 2]}] * 3),
        refused=("no known format has the columns input_ids, attention_mask, labels",),
    ),
    # Files of spreadsheets and of pandas
    "semicolons_and_line_breaks": OwnFile(
        _table(
            [["Frage", "Antwort"], *([f"{a}\nBitte;", f"{t}\n\n1,5"] for a, t in PAIRS)],
            "mine.csv",
            ";",
        ),
        "question_answer",
        told=("columns separated by ';'",),
        overrides=("data.columns={question: Frage, answer: Antwort}",),
    ),
    "excel_separator_line": OwnFile(
        _text(
            "mine.csv",
            "sep=;\r\n" + "".join(f"{a};{t}\r\n" for a, t in [("question", "answer"), *PAIRS]),
        ),
        "question_answer",
    ),
    "excel_utf16": OwnFile(
        _table([["question", "answer"], *PAIRS], "mine.csv", "\t", "utf-16"),
        refused=("UTF-16", "Convert the file to UTF-8"),
    ),
    "excel_latin1": OwnFile(
        _table(
            [["question", "answer"], *([a, f"{t} Schön!"] for a, t in PAIRS)],
            "mine.csv",
            encoding="latin-1",
        ),
        refused=("20 × invalid UTF-8", "iconv -f WINDOWS-1252 -t UTF-8"),
    ),
    "excel_byte_order_mark": OwnFile(
        _table([["question", "answer"], *PAIRS], "mine.csv", encoding="utf-8-sig"),
        "question_answer",
    ),
    "tab_separated": OwnFile(
        _table([["question", "answer"], *PAIRS], "mine.tsv", "\t"), "question_answer"
    ),
    "pandas_index": OwnFile(
        _table(
            [["", "question", "answer"], *([str(n), *p] for n, p in enumerate(PAIRS))], "mine.csv"
        ),
        "question_answer",
        unread=("''",),
    ),
    "pandas_by_columns": OwnFile(
        _text(
            "mine.json",
            json.dumps({"question": dict(enumerate(ASKED)), "answer": dict(enumerate(TOLD))}),
        ),
        refused=("a dict, not a list of rows", "question, answer", "orient='records'"),
    ),
    "turns_in_a_table": OwnFile(
        _table(
            [
                ["id", "messages"],
                *(
                    [str(n), json.dumps(row["messages"])]
                    for n, row in enumerate(_chat(USER, ANSWER))
                ),
            ],
            "mine.csv",
        ),
        "messages",
        unread=("id",),
    ),
    "turns_in_python_notation": OwnFile(
        _table(
            [["messages"], *([str(row["messages"])] for row in _chat(USER, ANSWER))], "mine.csv"
        ),
        refused=("messages is a text that is not JSON",),
    ),
    "nan_answers": OwnFile(
        _parquet(
            [
                {"question": a, "answer": float("nan") if n == 7 else 1.5 * n}
                for n, (a, _) in enumerate(MANY)
            ]
        ),
        "question_answer",
        rows=len(MANY) - 1,
        told=("answer is NaN",),
    ),
    # JSON in other shapes
    "rows_under_a_key": OwnFile(
        _text("mine.json", json.dumps({"version": 3, "data": _of()})),
        "question_answer",
        told=("rows taken from the key 'data'",),
    ),
    "splits_under_keys": OwnFile(
        _text("mine.json", json.dumps({"train": _of(), "test": _of()[:3]})),
        refused=("a dict, not a list of rows", "Store each of train, test in a file of its own"),
    ),
    "mixed_schemas": OwnFile(
        _lines([*_of("instruction", "output")[:15], *_chat(USER, ANSWER)[15:]]),
        refused=("5 of 20 rows", "columns of the format messages, not of alpaca", "another file"),
    ),
    "windows_line_ends": OwnFile(
        _text("mine.jsonl", _dumped(_of()).replace("\n", "\r\n"), "utf-8-sig"), "question_answer"
    ),
    "gzipped": OwnFile(
        _bytes("mine.jsonl.gz", gzip.compress(_dumped(_of()).encode())), "question_answer"
    ),
    "zstandard": OwnFile(
        _bytes("mine.jsonl.zst", b"\x28\xb5\x2f\xfd"),
        refused=("unknown file ending .zst", "Use .jsonl"),
    ),
    "saved_to_disk": OwnFile(_saved_to_disk, refused=("save_to_disk", "to_parquet")),
    # Folders
    "folder_of_texts": OwnFile(
        _folder(
            {
                "README.md": "# About",
                "a.md": " ".join(TOLD),
                "sub/b.txt": " ".join(ASKED),
                "picture.png": "none",
            }
        ),
        "book",
        rows=4,
        told=("README.md describes the folder",),
    ),
    "folder_with_splits": OwnFile(
        _folder(
            {
                "train.jsonl": _dumped(_of()[:14]),
                "dev.jsonl": _dumped(_of()[14:17]),
                "test.jsonl": _dumped(_of()[17:]),
            }
        ),
        "question_answer",
        told=("validation rows from the folder's own", "test rows from the folder's own"),
    ),
    # What is inside the texts
    "answers_of_any_type": OwnFile(
        _lines(
            [{"question": a, "answer": [True, 7, 0.5, None][n % 3]} for n, a in enumerate(ASKED)]
        ),
        "question_answer",
    ),
    "empty_answers": OwnFile(
        _lines([{"question": a, "answer": t if n % 2 else " "} for n, (a, t) in enumerate(PAIRS)]),
        refused=("10 of 20 rows", "answer is empty"),
    ),
    "one_null_byte": OwnFile(
        _one_of_many({"question": "Null?", "answer": "a\x00b"}),
        "question_answer",
        rows=len(MANY),
        told=("control characters",),
    ),
    "one_half_surrogate": OwnFile(
        _one_of_many('{"question": "Half?", "answer": "\\ud83d"}'),
        "question_answer",
        rows=len(MANY),
        told=("half a surrogate pair",),
    ),
    "null_byte_in_json_in_json": OwnFile(
        _lines(_sharegpt_calls('[{"name": "find\\u0000"}]')),
        refused=("control characters",),
    ),
    "html_and_jinja": OwnFile(
        _lines(
            [
                {"question": f"{a} &amp;lt;b&gt;", "answer": f"{t} {{{{ x }}}}{{% if y %}}"}
                for a, t in PAIRS
            ]
        ),
        "question_answer",
        encoded=("&amp;lt;b&gt;", "{{ x }}{% if y %}"),
    ),
    "control_tokens": OwnFile(
        _lines(_chat({"role": "user", "content": "ASKED <|im_end|> </s>"}, ANSWER)),
        "messages",
        encoded=("control tokens in the text, encoded as text",),
    ),
    "many_scripts": OwnFile(
        _lines([{"question": f"{n}. {a}", "answer": t} for n in range(4) for a, t in FOREIGN]),
        "question_answer",
        encoded=("«",),
    ),
    "very_long_row": OwnFile(
        _one_of_many({"question": "Long?", "answer": "word " * 20_000}),
        "question_answer",
        rows=len(MANY) + 1,
        encoded=("longer than",),
    ),
    "same_prompts": OwnFile(
        _lines([*_of(), *_of(), *[{"question": a, "answer": f"Not {t}"} for a, t in PAIRS]]),
        "question_answer",
        rows=40,
        told=("duplicate", "near leak"),
    ),
    # Chats
    "reasoning": OwnFile(
        _lines(_chat(USER, {**ANSWER, "reasoning_content": "I know it."})),
        "messages",
        encoded=("«[I know it.]",),
    ),
    "names_and_moods": OwnFile(
        _lines(_chat({**USER, "name": "Anna", "mood": "sad"}, ANSWER)),
        "messages",
        unread=("messages[].mood",),
        encoded=("name of a turn not printed",),
    ),
    "image_parts": OwnFile(
        _lines(
            _chat(
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a.png"},
                        {"type": "text", "text": "ASKED"},
                    ],
                },
                ANSWER,
            )
        ),
        refused=("a part of the user turn is image, not text",),
    ),
    "llava": OwnFile(
        _lines(_chat(HUMAN, GPT, column="conversations", image="a.png")),
        refused=("does not read image", "data.ignore_columns=[image]"),
    ),
    "text_parts_of_parquet": OwnFile(
        _parquet(
            _chat(
                {"role": "user", "content": [{"type": "text", "text": "ASKED", "image": None}]},
                {"role": "assistant", "content": [{"type": "text", "text": "TOLD", "image": None}]},
            )
        ),
        "messages",
    ),
    "tools_of_parquet": OwnFile(
        _parquet(_calls({"place": "here"})),
        "messages",
        encoded=('«(find {"place": "here"})<|im_end|>',),
    ),
    **{
        f"tool_role_{role}": OwnFile(_lines(_calls({"place": "here"}, role)), "messages")
        for role in ("function", "observation", "ipython")
    },
    "last_question_open": OwnFile(
        _lines(_chat(USER, ANSWER, {"role": "user", "content": "Thanks!"})),
        "messages",
        told=("turns after the last trained answer left out",),
    ),
    "system_prompt_column": OwnFile(
        _lines(_of("question", "response", system_prompt="Be brief.", id="a1")),
        "question_answer",
        unread=("id",),
        encoded=("Be brief.",),
    ),
    # Texts and labels
    "web_texts": OwnFile(
        _lines([{"text": t, "url": f"https://x/{n}", "date": "2024"} for n, t in enumerate(TOLD)]),
        "text",
        unread=("url", "date"),
    ),
    "text_and_intent": OwnFile(
        _table([["text", "intent"], *([a, "geo"] for a in ASKED)], "mine.csv"),
        refused=("does not read intent", "'data.columns={question: text, answer: intent}'"),
    ),
    "sentence_and_label": OwnFile(
        _lines([{"sentence": a, "label": n % 2} for n, a in enumerate(ASKED)]),
        refused=("no known format has the columns sentence, label", "Map your columns"),
    ),
    "sentence_and_label_mapped": OwnFile(
        _lines([{"sentence": a, "label": n % 2} for n, a in enumerate(ASKED)]),
        "question_answer",
        overrides=("data.columns={question: sentence, answer: label}",),
        encoded=("«1",),
    ),
    "metadata_of_parquet": OwnFile(
        _parquet(_of("instruction", "output", meta={"lang": "en", "tags": ["a"]}, id=3)),
        "alpaca",
        unread=("meta", "id"),
    ),
}
