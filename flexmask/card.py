"""The model card of a training: what it was trained on, what that saved, and what was verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData


def write_card(
    folder: Path, *, base_model: str | None, datasets: Sequence[str], adapters: bool, sections: Mapping[str, str]
) -> None:
    """Write README.md into the folder of a model, over what is there.

    Args:
        base_model: hub name or folder of the model that training began with, if it has one.
        datasets: hub names.
        adapters: whether the folder holds adapters, not a whole model.
        sections: title -> text in fixed width, empty ones are left out.
    """
    is_local = base_model is None or Path(base_model).exists()
    data = ModelCardData(
        base_model=None if is_local else base_model,
        datasets=list(datasets) or None,
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        tags=["flexmask", "sft"],
    )
    versions = {name: version(name) for name in ("flexmask", "torch", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    sections = dict(sections) | {"Versions": ", ".join(f"{name} {of}" for name, of in versions.items()) + f"; {device}"}
    text = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {folder.resolve().name}\n",
        f"{'Adapters for' if adapters else 'Fine-tuned from'} {base_model or 'a model without a name'}, trained with flexmask: "
        "every turn of a conversation in the context in which it is generated, without the reasoning of earlier turns where the "
        "chat template leaves that out, in one pass per conversation.\n",
        *(f"## {title}\n```text\n{content}\n```\n" for title, content in sections.items() if content),
    ]
    ModelCard("\n".join(text)).save(folder / "README.md")
