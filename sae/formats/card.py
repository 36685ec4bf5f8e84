"""The model card of an uploaded SAE: what it is, where it belongs, how well it does."""

from collections.abc import Mapping
from typing import Any

from sae.model import SparseAutoencoder

_FIGURES = {
    "l0": "L0 (features per token)",
    "explained_variance": "explained variance",
    "ce_loss_recovered": "CE loss recovered (against zero ablation)",
    "ce_loss_recovered_mean": "CE loss recovered (against mean ablation)",
    "cosine": "cosine of input and reconstruction",
    "alive_fraction": "features that fire",
}


def model_card(sae: SparseAutoencoder, repository: str, evaluation: Mapping[str, Any]) -> str:
    """A README in Markdown, with the hub's header.

    Args:
        repository: ``org/name``, for the example. evaluation: the content of ``evaluation.json``, or nothing.
    """
    said = sae.metadata
    model = said.get("model_name")
    kind = "transcoder" if sae.config.transcoder else "sparse autoencoder"
    header = ["library_name: saescope", "tags:", "- sparse-autoencoder", "- interpretability", "- saelens"]
    if isinstance(model, str) and "/" in model:
        header.insert(1, f"base_model: {model}")
    rows = {
        "architecture": sae.config.architecture
        + (", with a skip connection" if sae.W_skip is not None else ""),
        "model": model,
        "reads": said.get("hook_name"),
        "writes": said.get("hook_name_out") if sae.config.transcoder else None,
        "width of the activations": sae.d_in if sae.d_in == sae.d_out else f"{sae.d_in} → {sae.d_out}",
        "features": f"{sae.d_sae:,}",
        "k": sae.config.k if sae.config.architecture == "topk" else None,
        "sequence length": said.get("context_size"),
    }
    lines = ["---", *header, "---", "", f"# {repository.rpartition('/')[2]}", "", f"A {kind}.", ""]
    lines += _table(("", ""), {name: value for name, value in rows.items() if value is not None})
    figures = {
        label: f"{evaluation[name]:.4g}"
        for name, label in _FIGURES.items()
        if isinstance(evaluation.get(name), int | float)
    }
    if figures:
        tokens = f"{evaluation['tokens']:,} " if isinstance(evaluation.get("tokens"), int) else ""
        split = evaluation.get("split", "held-out")
        lines += ["", f"Measured on {tokens}tokens of the {split} split:", ""]
        lines += _table(("metric", "value"), figures)
    lines += [
        "",
        "```python",
        "from sae.model import SparseAutoencoder",
        "",
        f'sae = SparseAutoencoder.load("hf:{repository}")',
        "```",
        "",
        "The files are in SAELens' format (`cfg.json`, `sae_weights.safetensors`).",
        "",
    ]
    return "\n".join(lines)


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    return [
        f"| {head[0]} | {head[1]} |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
