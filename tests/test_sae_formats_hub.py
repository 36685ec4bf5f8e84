"""SAEs on the hub: names, what is downloaded, what is uploaded, on a fake hub made of local folders."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from fixtures.exchange import random_sae
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from activations.errors import InputError
from app.cli import convert as convert_verb
from app.cli import push as push_verb
from sae.formats import hub as hub_module
from sae.formats.convert import WRITERS
from sae.formats.hub import push
from sae.model import SparseAutoencoder

FOREIGN = Path(__file__).parent / "fixtures" / "saelens" / "foreign"
COMMIT = "c0ffee"


class Hub:
    """A hub of local folders: ``repositories / org / name``; remembers what it was asked."""

    def __init__(self, repositories: Path, cache: Path) -> None:
        self.repositories, self.cache = repositories, cache
        self.downloaded: list[str] = []
        self.revisions: list[str | None] = []
        self.uploaded: dict[str, bytes] = {}
        self.made: dict[str, Any] = {}
        self.error: Exception | None = None

    def model_info(
        self, name: str, *, revision: str | None = None, timeout: float | None = None
    ) -> SimpleNamespace:
        self.revisions.append(revision)
        if self.error is not None:
            raise self.error
        if not (self.repositories / name).is_dir():
            raise RepositoryNotFoundError("no such repository", response=response(404))
        if revision not in (None, "v2"):
            raise RevisionNotFoundError("no such revision", response=response(404))
        return SimpleNamespace(sha=COMMIT)

    def snapshot_download(self, name: str, **arguments: Any) -> str:
        target = self.cache / name / "snapshots" / COMMIT
        if arguments["local_files_only"]:
            if not target.is_dir():
                raise LocalEntryNotFoundError("not there")
            return str(target)
        assert arguments["revision"] == COMMIT
        target.mkdir(parents=True, exist_ok=True)
        files = [
            str(p.relative_to(self.repositories / name))
            for p in (self.repositories / name).rglob("*")
            if p.is_file()
        ]
        wanted = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=arguments["allow_patterns"])
        for file in wanted:
            self.downloaded.append(file)
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repositories / name / file, target / file)
        return str(target)

    def whoami(self) -> dict[str, str]:
        if self.error is not None:
            raise self.error
        return {"name": "someone"}

    def create_repo(self, name: str, **arguments: Any) -> str:
        self.made = {"name": name, **arguments}
        return f"https://hub.example/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert repo_id == self.made["name"]
        assert not self.uploaded  # one commit
        self.uploaded = {p.name: p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}


def response(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "hub", tmp_path / "cache")
    for name in ("gemma-scope-2b-pt-res", "gemma-scope-2-1b-pt"):
        shutil.copytree(FOREIGN / name, fake.repositories / "google" / name)
    shutil.copytree(
        FOREIGN / "Llama3_1-8B-Base-LXR-8x", fake.repositories / "fnlp" / "Llama3_1-8B-Base-LXR-8x"
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def refusal(name: str) -> str:
    with pytest.raises(InputError) as caught:
        SparseAutoencoder.load(name)
    return str(caught.value)


def test_a_folder_of_a_repository(hub: Hub) -> None:
    path = "layer_1/width_16k/average_l0_4"
    sae = SparseAutoencoder.load(f"hf:google/gemma-scope-2b-pt-res/{path}")
    assert sae.hash == SparseAutoencoder.load(FOREIGN / "gemma-scope-2b-pt-res" / path).hash
    assert sae.hook_name == "blocks.1.hook_resid_post"  # said by the names alone, which the cache keeps
    assert hub.downloaded == [f"{path}/params.npz"]
    assert hub.revisions == [None]


def test_a_file_of_a_repository_and_its_configuration(hub: Hub) -> None:
    folder = "Llama3_1-8B-Base-L1R-8x"
    for name in (folder, f"{folder}/", f"{folder}/checkpoints/final.safetensors"):
        SparseAutoencoder.load(f"hf:fnlp/Llama3_1-8B-Base-LXR-8x/{name}")
    assert sorted(set(hub.downloaded)) == [
        f"{folder}/checkpoints/final.safetensors",
        f"{folder}/hyperparams.json",
    ]


def test_a_whole_repository_at_a_revision(hub: Hub) -> None:
    random_sae("topk").save(hub.repositories / "me" / "mine")
    assert SparseAutoencoder.load("hf:me/mine@v2").config.k == 4
    assert hub.revisions == ["v2"]
    assert sorted(hub.downloaded) == ["cfg.json", "sae_weights.safetensors"]
    assert refusal("hf:me/mine@v3") == (
        "hf:me/mine@v3 is no name of the hub, or names a revision that its repository does not have."
    )


def test_what_is_not_there(hub: Hub) -> None:
    assert refusal("hf:me/none/x") == "The Hugging Face hub has no repository me/none, or not for you."
    assert refusal("hf:google/gemma-scope-2b-pt-res/layer_9") == (
        "hf:google/gemma-scope-2b-pt-res/layer_9 holds no SAE: the repository has no weights by a known name at"
        " layer_9."
    )
    assert (
        refusal("hf:google")
        == "hf:google is no name of the hub: those are hf:org/repo/path, with @revision if it matters."
    )


def test_offline_the_cache_serves(hub: Hub) -> None:
    name = "hf:google/gemma-scope-2-1b-pt/resid_post/layer_1_width_16k_l0_small"
    wanted = SparseAutoencoder.load(name).hash
    hub.error = OSError("no network")
    assert SparseAutoencoder.load(name).hash == wanted
    assert refusal("hf:me/mine") == (
        "hf:me/mine is not in the local cache, and the Hugging Face hub cannot be reached: download it where there is a"
        " connection, and give the path of its folder."
    )


def test_a_connection_that_breaks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> str:
        raise httpx.ReadError("connection reset.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    name = "hf:google/gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_4"
    assert refusal(name) == f"{name} cannot be downloaded (connection reset): try again."


def test_a_hub_that_never_answers_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_module.SECONDS <= 6  # so that with the imports a command fails within ten
    monkeypatch.setattr(hub_module, "SECONDS", 0.2)
    monkeypatch.setattr(hub, "model_info", lambda *_, **__: time.sleep(30))
    monkeypatch.setattr(hub, "whoami", lambda: time.sleep(30))
    start = time.monotonic()
    assert "the Hugging Face hub cannot be reached" in refusal("hf:me/mine")
    random_sae("topk").save(hub.cache / "sae")
    with pytest.raises(InputError) as caught:
        push(hub.cache / "sae", "me/mine")
    assert str(caught.value) == (
        "me/mine was not uploaded (no answer within 0.2 seconds): check the connection and your rights there, and try"
        " again."
    )
    assert time.monotonic() - start < 10


# ---- uploading

EVALUATION = {
    "split": "test",
    "tokens": 100_000,
    "l0": 31.87,
    "explained_variance": 0.8123,
    "ce_loss_recovered": 0.95,
    "alive_fraction": None,
    "controls": {},
}


ADVICE = ": check the connection and your rights there, and try again."


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as far as pushing looks at it, and things that must not be uploaded."""
    folder = tmp_path / "run"
    random_sae("topk").save(folder / "sae")
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "labels.sqlite").write_text("private")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.safetensors").write_text("large")
    return folder


def test_a_run_is_pushed_with_its_card(hub: Hub, run: Path, tmp_path: Path) -> None:
    assert push(run, "me/mine", private=True) == "https://hub.example/me/mine"
    assert hub.made == {"name": "me/mine", "private": True, "exist_ok": True}
    assert sorted(hub.uploaded) == ["README.md", "cfg.json", "evaluation.json", "sae_weights.safetensors"]
    assert hub.uploaded["sae_weights.safetensors"] == (run / "sae" / "sae_weights.safetensors").read_bytes()
    assert json.loads(hub.uploaded["evaluation.json"]) == EVALUATION
    card = hub.uploaded["README.md"].decode()
    for line in (
        "| architecture | topk |",
        "| model | builtin |",
        "| reads | blocks.1.hook_resid_post |",
        "| features | 24 |",
        "| k | 4 |",
        "Measured on 100,000 tokens of the test split:",
        "| L0 (features per token) | 31.87 |",
        "| explained variance | 0.8123 |",
        "| CE loss recovered (against zero ablation) | 0.95 |",
        'sae = SparseAutoencoder.load("hf:me/mine")',
    ):
        assert line in card.splitlines()
    assert "features that fire" not in card  # it was not measured


def test_what_was_pushed_is_loaded_by_its_name(hub: Hub, run: Path) -> None:
    push(run, "me/mine")
    for name, data in hub.uploaded.items():
        (hub.repositories / "me" / "mine").mkdir(parents=True, exist_ok=True)
        (hub.repositories / "me" / "mine" / name).write_bytes(data)
    assert SparseAutoencoder.load("hf:me/mine").hash == SparseAutoencoder.load(run / "sae").hash


def test_an_sae_of_another_format_is_pushed_in_ours(hub: Hub, tmp_path: Path) -> None:
    sae = random_sae("topk", "skip")
    sae.metadata["model_name"] = "org/model"
    WRITERS["sparsify"](sae, tmp_path / "theirs")
    push(tmp_path / "theirs", "me/mine")
    card = hub.uploaded["README.md"].decode().splitlines()
    assert sorted(hub.uploaded) == ["README.md", "cfg.json", "sae_weights.safetensors"]
    assert {"base_model: org/model", "A transcoder.", "| writes | blocks.2.hook_resid_post |"} <= set(card)
    assert "Measured" not in "".join(card)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            LocalTokenNotFoundError("none"),
            "Nobody is logged in to the Hugging Face hub here: run 'hf auth login' first.",
        ),
        (httpx.ConnectError("no network"), f"me/mine was not uploaded (no network){ADVICE}"),
        (
            HfHubHTTPError("403 Forbidden.\nmore", response=response(403)),
            f"me/mine was not uploaded (403 Forbidden){ADVICE}",
        ),
    ],
    ids=["nobody", "offline", "forbidden"],
)
def test_a_push_that_fails(error: Exception, sentence: str, hub: Hub, run: Path) -> None:
    hub.error = error
    with pytest.raises(InputError) as caught:
        push(run, "me/mine")
    assert str(caught.value) == sentence
    assert hub.uploaded == {}


@pytest.mark.parametrize("name", ["bad name!", "a/b/c", ""])
def test_the_name_of_a_repository_is_looked_at_first(name: str, hub: Hub, tmp_path: Path) -> None:
    hub.error = LocalTokenNotFoundError("none")
    with pytest.raises(InputError) as caught:
        push(tmp_path / "nothing here", name)
    assert str(caught.value) == f"{name!r} is no name for a repository: give org/name."


# ---- the verbs


def test_the_verbs(hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_verb.main([str(run), str(tmp_path / "theirs"), "--to", "dictionary_learning"])
    assert "dictionary_learning" in capsys.readouterr().out
    assert SparseAutoencoder.load(tmp_path / "theirs").hash == SparseAutoencoder.load(run / "sae").hash
    convert_verb.main(
        ["hf:google/gemma-scope-2-1b-pt/transcoder/layer_1_width_16k_l0_small", str(tmp_path / "ours")]
    )
    assert "jumprelu transcoder" in capsys.readouterr().out
    assert SparseAutoencoder.load(tmp_path / "ours").config.transcoder
    push_verb.main([str(run), "me/mine"])
    assert "https://hub.example/me/mine" in capsys.readouterr().out
    assert torch.equal(torch.tensor(sorted(map(len, hub.uploaded))), torch.tensor([8, 9, 15, 23]))
