"""Frozen, validated settings of the whole configuration.

Defaults live in conf/*.yaml, once. This module only says what a setting may be. A missing key, an
unknown key, a wrong type and a value out of range are all found in one pass, before training
starts. Names are those of PEFT, transformers and Optuna wherever these have one.
"""

# One import place for all sections, so that callers need not know which file holds which.
from sweeper.config.added_settings import (
    changed_parts,
    kept_defaults,
    stored_settings,
    stored_text,
    with_names_of_today,
)
from sweeper.config.data_settings import (
    EMBEDDED,
    SPLIT_KEYS,
    CleaningSettings,
    DataSettings,
    DataSource,
    FormatName,
    sources,
)
from sweeper.config.evaluation_settings import (
    DIRECTIONS,
    LOSS_METRICS,
    ROUGE_METRICS,
    SCORED_METRICS,
    EvaluationSettings,
    GeneralTextSettings,
    Objective,
    QualitativePrompt,
    metric_words,
)
from sweeper.config.model_settings import (
    LAYERS,
    UNQUANTIZED,
    LoraAdapter,
    ModelSettings,
    NoAdapter,
    QuantizationSettings,
)
from sweeper.config.section import (
    Positive,
    SettingsSection,
    flatten,
    parse_duration,
)
from sweeper.config.study_settings import (
    ArmName,
    ArmSettings,
    BudgetSettings,
    FairnessRules,
    FinalistSettings,
    PlateauRule,
    PrunerSettings,
    RecipeSettings,
    SamplerSettings,
    StudyName,
    StudySettings,
    is_study_name,
    require_arm_name,
)
from sweeper.config.training_settings import TrainingSettings
from sweeper.config.trial_settings import (
    FakeTrainer,
    RunSettings,
    TrackingSettings,
    TrialSettings,
    WorkerSettings,
)
from sweeper.config.validation import describe, validate

__all__ = [
    "DIRECTIONS",
    "EMBEDDED",
    "LAYERS",
    "LOSS_METRICS",
    "ROUGE_METRICS",
    "SCORED_METRICS",
    "SPLIT_KEYS",
    "UNQUANTIZED",
    "ArmName",
    "ArmSettings",
    "BudgetSettings",
    "CleaningSettings",
    "DataSettings",
    "DataSource",
    "EvaluationSettings",
    "FairnessRules",
    "FakeTrainer",
    "FinalistSettings",
    "FormatName",
    "GeneralTextSettings",
    "LoraAdapter",
    "ModelSettings",
    "NoAdapter",
    "Objective",
    "PlateauRule",
    "Positive",
    "PrunerSettings",
    "QualitativePrompt",
    "QuantizationSettings",
    "RecipeSettings",
    "RunSettings",
    "SamplerSettings",
    "SettingsSection",
    "StudyName",
    "StudySettings",
    "TrackingSettings",
    "TrainingSettings",
    "TrialSettings",
    "WorkerSettings",
    "changed_parts",
    "describe",
    "flatten",
    "is_study_name",
    "kept_defaults",
    "metric_words",
    "parse_duration",
    "require_arm_name",
    "sources",
    "stored_settings",
    "stored_text",
    "validate",
    "with_names_of_today",
]
