"""Small tokenizers of the real kinds, and chat templates of model families as they publish them."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sweeper.data.examples import ChatMessage, Example, RawRow

CORPUS = (
    "### Instruction:\nWrite a summary of the text.\n\n### Input:\nA text.\n\n"
    "### Response:\nThe sum.\n\n"
    "user assistant system model You are a helpful assistant. What is 2+2=4? foobar foo bar\n\n\n"
)

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(open=true, last_query_index=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.open and message.role == 'user' %}"
    "{%- set ns.open = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role in ('user', 'system') %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- else %}{%- set reasoning = '' %}{%- set content = message.content %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query_index %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning + '\n</think>\n\n' + content }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set turns = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in turns %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if system is defined and turns[-1] == message or (system is defined and "
    "loop.index0 == turns|length - 2) %}"
    "{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] "
    "+ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ 'turn ' ~ messages|length ~ '\n' }}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ message.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'turn ?\n' }}{% endif %}"
)
UNTOLD = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

SPECIAL = (
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
)


def byte_level(
    *, adds: str = "", eos: str | None = "</s>", pad: str = "<pad>", **options: Any
) -> Any:
    """A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen); `adds` names what it puts around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 4 + ["foobar"] * 40, trainer)
    return _wrapped(tokenizer, adds, eos, pad, options)


def phi3(*, rstrip: bool) -> Any:
    """Phi-3's markers; those of Phi-3-medium and of the first Phi-3-mini swallow the blanks behind."""
    tokenizer = byte_level(chat_template=PHI3)
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    markers = [AddedToken(name, rstrip=rstrip, special=True) for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    return tokenizer


def metaspace(
    *, adds: str = "bos", eos: str | None = "</s>", pad: str = "</s>", **options: Any
) -> Any:
    """A SentencePiece-like BPE tokenizer that puts a space before every text (Llama 2)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS] * 4 + ["foobar"] * 40, trainer)
    return _wrapped(tokenizer, adds, eos, pad, options)


def _wrapped(
    tokenizer: Tokenizer, adds: str, eos: str | None, pad: str, options: dict[str, Any]
) -> PreTrainedTokenizerFast:
    around = {"bos": "<s> $A", "bos eos": "<s> $A </s>", "eos": "$A </s>"}
    if adds:
        names = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around[adds], special_tokens=names
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=pad, **options
    )
    wrapped.add_special_tokens(
        {"additional_special_tokens": [AddedToken(name, special=True) for name in SPECIAL[3:]]}
    )
    return wrapped


def talk(*contents: str, system: str = "", format_name: str = "messages") -> Example:
    """A conversation: user and assistant in turn."""
    turns = [
        ChatMessage("assistant" if index % 2 else "user", content)
        for index, content in enumerate(contents)
    ]
    start = [ChatMessage("system", system)] if system else []
    return Example((*start, *turns), RawRow({}, "talk:1"), format_name)


def task(instruction: str, given: str, output: str) -> Example:
    """An Alpaca example."""
    turns = (ChatMessage("user", instruction, given), ChatMessage("assistant", output))
    return Example(turns, RawRow({}, "task:1"), "alpaca")


def book(text: str) -> Example:
    """A plain text."""
    return Example((ChatMessage("assistant", text),), RawRow({}, "book:1"), "book")
