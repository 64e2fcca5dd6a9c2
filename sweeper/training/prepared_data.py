"""Prepare the data of a configuration for one base: splits, tokens, judges and the data card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from sweeper.config.settings import ROUGE_METRICS, DataSettings, TrialSettings
from sweeper.core.errors import DataError
from sweeper.core.input_digests import InputDigests
from sweeper.data.data_card import DataCard
from sweeper.data.encode import (
    EncodedSplit,
    OverLength,
    encode_evaluation,
    encode_prompts,
    encode_train,
)
from sweeper.data.examples import ChatMessage, DropCounts, Example, RawRow
from sweeper.data.general_text import general_rows
from sweeper.data.mixture import column
from sweeper.data.served_prompt import ServedPrompt, prompt_format, serve_prompts
from sweeper.data.splits import DataSplits, load_splits
from sweeper.data.token_cache import cache_folder, cached, fingerprint
from sweeper.data.tokens import EncodedPrompt, Tokens
from sweeper.evaluation.judge import HeldOutPrompts, ModelJudge, make_judge
from sweeper.evaluation.judge_digest import judge_digest
from sweeper.evaluation.sample_answers import require_unseen

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from sweeper.modeling.base_model import LoadedBase


@dataclass(frozen=True)
class PreparedData:
    """The data of a configuration, tokenized for one base."""

    splits: DataSplits
    train: EncodedSplit
    validation: EncodedSplit
    test: EncodedSplit | None
    """The test split, or None. Only winners are evaluated on it, after every search has ended."""
    tokenizer: PreTrainedTokenizerBase
    settings: DataSettings
    limit: int | None
    """Tokens that the model can attend to, or None if its configuration names no limit."""
    _general: dict[str, list[Tokens]] = field(default_factory=dict, repr=False, compare=False)
    """Windows of general text, by the settings of the general text as JSON."""
    _judged: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Digests of the judged rows, by base model and the settings of the evaluation as JSON."""

    @cached_property
    def card(self) -> DataCard:
        """The data card: sizes and lengths of the splits, and the number of dropped rows by reason."""
        splits = self.encoded
        return DataCard.of(splits, self.splits.drops, self.tokenizer, self.splits.source)

    @property
    def encoded(self) -> dict[str, EncodedSplit]:
        """The tokenized splits by name, those that there are."""
        found = {"train": self.train, "validation": self.validation}
        return found if self.test is None else {**found, "test": self.test}

    @property
    def dropped(self) -> dict[str, int]:
        """Dropped rows by reason, over all splits and stages."""
        return self._account.total

    @property
    def changed(self) -> dict[str, int]:
        """Rows that were kept, by what was changed in them, over all splits and stages."""
        return dict(self._account.changed)

    @property
    def _account(self) -> DropCounts:
        account = DropCounts()
        for drops in (self.splits.drops, *(found.drops for found in self.encoded.values())):
            account.add(drops)
        return account

    @cached_property
    def held_out(self) -> HeldOutPrompts | None:
        """The validation examples as prompts with reference answers, or None if there are none."""
        examples = self.splits.examples["validation"]
        return HeldOutPrompts.of(
            encode_prompts(examples, self.tokenizer, self.settings, skip_unusable=True)
        )

    @cached_property
    def served(self) -> ServedPrompt:
        """The template and the end tokens with which programs prompt a model trained on these data."""
        return serve_prompts(self.splits.examples["train"], self.tokenizer, self.settings)

    @cached_property
    def data_digest(self) -> str:
        """The sha256 over the examples of all splits."""
        return self.splits.digest

    def inputs(self, settings: TrialSettings, base: LoadedBase) -> InputDigests:
        """Return the digests of the data: their texts, and their rows as a model sees them.

        Raises:
            DataError: the template cannot render a prompt.
            ConfigError: a user-defined metric cannot be imported.
        """
        key = f"{base.digest} {base.config_digest} {settings.evaluation.model_dump_json()}"
        if key not in self._judged:
            judge = self.judge(settings, base)
            rows = self.validation.digest
            self._judged[key] = judge_digest(judge, rows, settings, base.model)
        return InputDigests(
            data=self.data_digest,
            judged=self._judged[key],
            trained=self.train.digest,
            test=None if self.test is None else self.test.digest,
        )

    def judge(self, settings: TrialSettings, base: LoadedBase) -> ModelJudge:
        """Return the judge of the whole validation split."""
        judge = make_judge(
            self.tokenizer,
            self.validation.rows,
            self.held_out if settings.evaluation.generation.num_examples else None,
            settings.evaluation,
            # Not the trial's seed: finalists repeated over seeds are evaluated on the same examples
            settings.data.split_seed,
            base.compute_dtype,
            settings.training.loss_chunk_size,
        )
        return replace(judge, groups=self._groups("validation"))

    def test_judge(self, settings: TrialSettings, base: LoadedBase) -> ModelJudge:
        """Return the judge on the test split: of the losses, and of answers if the objective needs them.

        Raises:
            DataError: the data have no test split.
        """
        if self.test is None:
            raise DataError("the data have no test split. Set data.test or data.test_ratio")
        judge = self._loss_judge(self.test.rows, settings, base)
        if settings.objective.metric in ROUGE_METRICS:
            examples = self.splits.examples["test"]
            prompts = HeldOutPrompts.of(encode_prompts(examples, self.tokenizer, self.settings))
            count = settings.evaluation.generation.num_examples
            held_out = prompts and prompts.sample(count, settings.data.split_seed)
            judge = replace(judge, held_out=held_out)
        return replace(judge, groups=self._groups("test"))

    def _groups(self, split: str) -> list[int]:
        """Return the group of each row of a held-out split, or nothing if rows are not grouped."""
        name, examples = self.settings.group_by, self.splits.examples.get(split, ())
        rows = self.encoded[split].rows if split in self.encoded else ()
        # Plain text is cut into blocks, and a row without a target is dropped: then rows and examples
        # do not correspond, and the report says that rows were drawn one by one.
        if name is None or len(rows) != len(examples):
            return []
        values = [str(column(example, name, "group_by")) for example in examples]
        numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
        return [numbers[value] for value in values]

    def general_rows(self, settings: TrialSettings) -> list[Tokens]:
        """Return the windows of general text, tokenized.

        Raises:
            DataError: no source is configured, or the source cannot be read or is too short.
        """
        general = settings.evaluation.general_text
        if general.source is None:
            raise DataError("no general text is configured. Set evaluation.general_text.source")
        key = general.model_dump_json()
        if key not in self._general:
            # A text that is part of the task's data measures no forgetting, so it is left out
            task = (example for found in self.splits.examples.values() for example in found)
            self._general[key] = general_rows(general, task, self.tokenizer, self.limit)
        return self._general[key]

    def general_judge(self, settings: TrialSettings, base: LoadedBase) -> ModelJudge:
        """Return the judge of the losses on general text.

        Raises:
            DataError: no source is configured, or the source cannot be read or is too short.
        """
        return self._loss_judge(self.general_rows(settings), settings, base)

    def _loss_judge(
        self, rows: list[Tokens], settings: TrialSettings, base: LoadedBase
    ) -> ModelJudge:
        return make_judge(
            self.tokenizer,
            rows,
            None,
            settings.evaluation,
            settings.data.split_seed,
            base.compute_dtype,
            settings.training.loss_chunk_size,
        )

    def prompts(self, settings: TrialSettings) -> list[EncodedPrompt]:
        """Return the qualitative prompts, rendered as the rows of the training and tokenized.

        Raises:
            DataError: one of them occurs in the training split.
        """
        prompts, trained = settings.evaluation.prompts, self.splits.examples["train"]
        require_unseen(prompts, (example.text for example in trained))
        row, asked_as = RawRow({}, "evaluation.prompts"), prompt_format(trained)
        examples = [
            Example(
                (ChatMessage("user", prompt.prompt), ChatMessage("assistant", "")), row, asked_as
            )
            for prompt in prompts
        ]
        return encode_prompts(examples, self.tokenizer, self.settings)


def prepare(
    settings: DataSettings, base: LoadedBase, over_length: OverLength = "refuse"
) -> PreparedData:
    """Read, clean, split, render and tokenize data. Tokens come from the cache if they are in it.

    Args:
        settings: Data settings.
        base: Base model with its tokenizer.
        over_length: What happens to judged rows longer than the model's positions.

    Raises:
        DataError: a source is missing or broken, or no usable row is left.
    """
    return prepare_rows(settings, base.tokenizer, positions(base.model.config), over_length)


def prepare_rows(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    over_length: OverLength,
) -> PreparedData:
    """Prepare data as `prepare` does, for a tokenizer and a number of positions, without a model."""
    splits = load_splits(settings)
    examples = splits.examples

    def through_cache(
        name: str, build: Callable[[], EncodedSplit], block_length: int | None
    ) -> EncodedSplit:
        options: dict[str, int | str | None] = {
            "split": name,
            "limit": limit,
            "block_length": block_length,
        }
        if block_length is not None:
            options["over_length"] = over_length
        # The key holds the contents of the examples, not file names or times, which say less
        key = fingerprint(examples[name], tokenizer, settings, **options)
        return cached(key, build, cache_folder())

    train = through_cache(
        "train", lambda: encode_train(examples["train"], tokenizer, settings, limit), None
    )
    block = train.max_length

    def held_out(name: str) -> EncodedSplit:
        return through_cache(
            name,
            lambda: encode_evaluation(
                examples[name], tokenizer, settings, limit, block, over_length
            ),
            block,
        )

    # The test split too: a row that does not fit the model must be found before the search, not after
    test = held_out("test") if examples.get("test") else None
    return PreparedData(splits, train, held_out("validation"), test, tokenizer, settings, limit)


def positions(config: PretrainedConfig) -> int | None:
    """Return the number of tokens a model can attend to, or None if its configuration names none."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)
