"""Adapters and quantised models: trained, verified, merged; the card beside them; what is missing is told first."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexmask.arguments
from flexmask import demo, verify
from flexmask.arguments import ModelArguments
from flexmask.cli import main
from flexmask.models import load_model, merge

CONVERSATIONS = demo.conversations(3)
GENERATED = ["--dataset_name", "flexmask/generated", "--max_samples", "4", "--max_steps", "2", "--logging_steps", "1"]
QUIET = ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", "--learning_rate", "1e-2"]


def train(folder, *flags):
    flags = [
        *GENERATED,
        *QUIET,
        "--output_dir",
        str(folder),
        "--model_name_or_path",
        "flexmask/tiny-random",
        *map(str, flags),
    ]
    return main(["train", *flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain model on disk."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = demo.train_tokenizer(demo.texts(CONVERSATIONS))
    demo.tiny_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


ADAPTERS = {
    "lora": [],
    "dora, rslora, a whole module": ["--use_dora", "true", "--use_rslora", "true", "--lora_modules_to_save", "norm"],
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_is_what_was_trained(tmp_path, kind):
    """`flexmask train`, then `flexmask merge`: the logits of the model with adapters, from plain transformers."""
    from peft import PeftModel

    assert train(tmp_path / "adapter", "--use_peft", "true", *ADAPTERS[kind]) == 0
    assert main(["merge", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    base = demo.tiny_model(tokenizer)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, len(tokenizer), (1, 50)))
    before = base(input_ids=ids).logits
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
    found = merged(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.01, "the adapters were trained"
    assert tokenizer.chat_template


def test_merge_of_what_is_no_adapter(tmp_path, folder, capsys):
    for path, text in ((folder, "holds no adapter"), (str(tmp_path / "none"), "none: there is no such folder")):
        assert main(["merge", path, "--output_dir", str(tmp_path / "out")]) == 2
        assert text in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": None}))
    with pytest.raises(OSError, match="does not say which model"):
        merge(str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    "flags",
    [{"load_in_4bit": True}, {"load_in_4bit": True, "use_bnb_nested_quant": True}, {"load_in_8bit": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_models_are_verified(folder, flags, dtype):
    """The bug guarded: 8 bits failed, with the tolerance of float32, which their activations do not have."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional dependency (.ci/run installs it)")
    model, tokenizer = load_model(ModelArguments(folder, dtype=dtype, use_peft=True, **flags), ())
    assert model.get_base_model().is_quantized
    report = verify(model, tokenizer, CONVERSATIONS[:1])
    assert report and report.gradient_difference > 0
    coarsest = {"float32": torch.float32 if "load_in_4bit" in flags else torch.float16, "bfloat16": torch.bfloat16}
    assert report.dtype == coarsest[dtype]


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--load_in_4bit", "true"], "load_in_4bit needs use_peft"),
        (["--load_in_4bit", "true", "--load_in_8bit", "true"], "exclude each other"),
        (["--load_in_8bit", "true", "--use_peft", "true"], "needs a model from a folder or the hub"),
        (["--load_in_4bit", "true", "--bnb_4bit_quant_type", "int4"], "expected one of nf4, fp4"),
        (["--use_liger_kernel", "true"], "use_liger_kernel needs a GPU"),
        (["--fsdp", "true"], "fsdp needs several processes"),
        (["--report_to", "no_such_logger"], "report_to is no_such_logger: no_such_logger is not supported"),
        (["--neftune_noise_alpha", 5], "NEFTune scales its noise by the length of a sequence"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_first(tmp_path, monkeypatch, capsys, flags, text):
    """The bug guarded: found when the data had been prepared, with a traceback."""
    monkeypatch.setattr("flexmask.train.load_model", lambda *_: pytest.fail("the model is loaded"))
    assert train(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and text in error, error


@pytest.mark.parametrize(
    "library, flags",
    [
        ("peft", ["--use_peft", "true"]),
        ("bitsandbytes", ["--load_in_4bit", "true", "--use_peft", "true", "--model_name_or_path", "some/model"]),
    ],
)  # fmt: skip
def test_missing_libraries_are_told_first(tmp_path, monkeypatch, capsys, library, flags):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "flexmask.arguments.importlib.util.find_spec", lambda name: None if name == library else find(name)
    )
    assert train(tmp_path, *flags) == 2
    assert f"needs {library}, which is not installed: pip install {library}" in capsys.readouterr().err


def test_preparing_needs_no_libraries_of_the_model(tmp_path, monkeypatch):
    """The bug guarded: `flexmask prepare` asked for peft and bitsandbytes, which only training needs."""
    monkeypatch.setattr("flexmask.arguments.importlib.util.find_spec", lambda name: None)
    flags = [
        "--use_peft",
        "true",
        "--dataset_cache_dir",
        str(tmp_path / "cache"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert (
        main(["prepare", "--model_name_or_path", "flexmask/tiny-random", *GENERATED, "--disable_tqdm", "true", *flags])
        == 0
    )


def test_a_missing_optimiser_is_told_first(tmp_path, monkeypatch, capsys):
    def missing(args, model=None):
        raise ImportError("You need to install\n`bitsandbytes`")

    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", missing)
    assert train(tmp_path, "--optim", "adamw_bnb_8bit") == 2
    assert "optim is OptimizerNames.ADAMW_BNB: You need to install `bitsandbytes`" in capsys.readouterr().err


def test_adapters_keep_the_revision_of_their_model(folder):
    """The bug guarded: `flexmask merge` took the weights of another."""
    model, _ = load_model(ModelArguments(folder, model_revision="v2", use_peft=True), ())
    assert model.peft_config["default"].revision == "v2"


def test_no_hub_is_told_first(tmp_path, monkeypatch, capsys):
    def whoami(token=None):
        raise ConnectionError("name or service\nnot known")

    monkeypatch.setattr(flexmask.arguments, "whoami", whoami)
    assert train(tmp_path, "--push_to_hub", "true") == 2
    assert (
        "push_to_hub: the hub does not answer, or knows no user (name or service not known)" in capsys.readouterr().err
    )


@pytest.mark.parametrize("peft", [False, True])
def test_the_card_of_a_model(tmp_path, folder, capsys, peft):
    """Of full fine-tuning, too: data, savings, and the tables of verify as they were printed."""
    flags = ["--model_name_or_path", folder, "--compare", 1, "--eval_dataset_name", "flexmask/generated"]
    assert train(tmp_path, *flags, *(["--use_peft", "true"] if peft else [])) == 0
    said, card = capsys.readouterr().out, ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == ("peft" if peft else "transformers") and "flexmask" in card.data.tags
    assert (
        "generated: 4 conversations, " in card.text
        and "nobody reads these keys of the records: answers (4)" in card.text
    )
    tables = [block for block in card.text.split("```") if "conversation  passes" in block]
    assert len(tables) == 2 and all(table.removeprefix("text\n").strip() in said for table in tables)
    [saved] = [line for line in said.splitlines() if line.startswith("trained ")]
    assert saved in card.text
    # A file for evaluation and no strategy: at the end, once.
    assert "evaluated at the end (eval_strategy is no): eval_loss" in said and "last eval_loss" in card.text
