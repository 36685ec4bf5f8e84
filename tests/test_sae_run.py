"""``run.toml``: everything that was configured comes back, and what is wrong in it is said in one sentence."""

from pathlib import Path

import pytest

from activations.corpus import CorpusConfig
from activations.errors import InputError
from sae.config import SAEConfig, TrainConfig
from sae.run import read_run_config, write_run_config

CONFIG = TrainConfig(
    model="gpt2",
    hook_name="blocks.5.hook_mlp_out",
    corpus=CorpusConfig(packages=("numpy", "rich"), bos=True, packing="isolated", shuffle_seed=3),
    sae=SAEConfig(architecture="relu", d_sae=77, sparsity_weight=2.5),
    tokens=12_345,
    learning_rate=1e-3,
    preset="faithful",
    moments="8bit",
    ema=0.99,
    resample_every=5_000,
    log_to=("wandb",),
    seed=9,
)


@pytest.mark.parametrize("config", [TrainConfig(), CONFIG])
def test_a_configuration_comes_back_as_it_was(config: TrainConfig, tmp_path: Path) -> None:
    write_run_config(tmp_path, config)
    assert read_run_config(tmp_path) == config


@pytest.mark.parametrize(
    ("found", "replacement", "message"),
    [
        ("tokens = 12345", 'tokens = "many"', "tokens = 'many', and it must be a whole number."),
        ("tokens = 12345", "tokens = true", "tokens = True, and it must be a whole number."),
        ("learning_rate = 0.001", "learning_rate = []", "learning_rate = [], and it must be a number."),
        ("bos = true", "bos = 1", "bos = 1, and it must be true or false."),
        ("    \"rich\",\n", "    7,\n", "packages = ['numpy', 7], and it must be a list, each item text."),
        ('architecture = "relu"', 'architecture = "gelu"', "architecture = 'gelu', and it must be one of topk, "),
        ("seed = 9", "sead = 9", "an unknown key 'sead': did you mean seed?"),
        ("seed = 9", "qqq = 9", "an unknown key 'qqq': known are batch_tokens, buffer_tokens, "),
        ("sparsity_weight", "sparcity_weight", "an unknown key 'sparcity_weight': did you mean sparsity_weight?"),
        ("tokens = 12345", "sae = 3", None),
        ('model = "gpt2"', 'model = "gpt2', "is not valid TOML"),
        ("format_version = 1", "format_version = 99", "was written in format 99"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(found: str, replacement: str, message: str | None, tmp_path: Path) -> None:
    write_run_config(tmp_path, CONFIG)
    path = tmp_path / "run.toml"
    text = path.read_text()
    assert found in text
    text = text.replace(found, replacement)
    if message is None:  # a table's name given to a number
        text, message = text.split("[sae]")[0], "sae = 3, and it must be a table."
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_run_config(tmp_path)
    assert str(error.value).startswith(f"{path} ")
    assert message in str(error.value)


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_run_config(tmp_path)
    assert str(error.value) == f"{tmp_path} is not a run: it has no run.toml."
