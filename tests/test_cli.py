"""The command line from end to end, on the model and the conversations that need no download."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_verify import broken_attention, leaking
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState

from flexmask import demo
from flexmask.arguments import ModelArguments, OnePassTrainingArguments
from flexmask.cli import main
from flexmask.models import lora_config
from flexmask.trainer import StopOnNonFiniteLoss

TINY = ["--model_name_or_path", "flexmask/tiny-random"]
FAST = [
    "--use_cpu",
    "true",
    "--max_tokens",
    "2048",
    "--max_samples",
    "24",
    "--logging_steps",
    "1",
    "--disable_tqdm",
    "true",
]


def train(tmp_path, *flags, data="flexmask/generated", command="train"):
    folders = ["--output_dir", tmp_path / "out", "--dataset_cache_dir", tmp_path / "cache"]
    return main([command, *TINY, "--dataset_name", data, *FAST, *map(str, [*folders, *flags])])


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 4 steps with a checkpoint after 2; its output and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder, "--max_steps", 4, "--save_steps", 2, "--learning_rate", 0.01, "--compare", 1) == 0
    return folder / "out"


def test_train_leaves_what_it_says(trained):
    assert len(losses(trained)) == 4 and losses(trained)[-1] < losses(trained)[0]
    for name in ("mask.png", "loss.png", "model.safetensors", "tokenizer.json", "checkpoint-2", "checkpoint-4"):
        assert (trained / name).exists(), name


def test_saved_model_loads_in_plain_transformers(trained):
    assert "flexmask" not in (trained / "config.json").read_text()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert model.config._attn_implementation == "sdpa" and tokenizer.chat_template == demo.CHAT_TEMPLATE
    ids = torch.tensor([tokenizer.apply_chat_template(demo.conversations(1)[0]["messages"][:1])["input_ids"]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


def test_resume_goes_on_where_it_stopped(trained, tmp_path):
    flags = ["--max_steps", 4, "--learning_rate", 0.01, "--resume_from_checkpoint", trained / "checkpoint-2"]
    assert train(tmp_path, *flags) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(trained), rel=1e-3)


def test_config_file_and_flags_over_it(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: flexmask/tiny-random\ndataset_name: flexmask/generated\n"
        f"output_dir: {tmp_path / 'out'}\nmax_steps: 9\nuse_cpu: true\nmax_tokens: 2048\nmax_samples: 12\n"
        "logging_steps: 1\nreport_to: none\ndisable_tqdm: true\neval_strategy: 'no'\nwarmup_steps: 0\n"
    )
    assert main(["train", "--config", str(config), "--max_steps", "1", "--verify", "false"]) == 0
    assert len(losses(tmp_path / "out")) == 1
    assert "max loss diff" not in capsys.readouterr().out, "verification was switched off"


def test_lora(tmp_path):
    assert (
        train(tmp_path, "--max_steps", 2, "--use_peft", "true", "--lora_r", 4, "--gradient_checkpointing", "true") == 0
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert "Adapters for flexmask/tiny-random" in (tmp_path / "out" / "README.md").read_text()


def test_evaluation_and_accumulation(tmp_path):
    flags = ["--max_steps", 1, "--gradient_accumulation_steps", 2, "--eval_strategy", "steps", "--eval_steps", 1]
    assert train(tmp_path, *flags, "--eval_dataset_name", "flexmask/generated") == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history)


def test_all_linear_is_what_the_library_calls_it():
    """The bug guarded: in a list it was taken for a module of that name."""
    arguments = ModelArguments("model", use_peft=True, lora_target_modules=["all-linear"])
    assert lora_config(arguments).target_modules == "all-linear"
    arguments.lora_target_modules = ["q_proj"]
    assert lora_config(arguments).target_modules == {"q_proj"}


@pytest.mark.parametrize(
    "given, meant", [("false", None), (False, None), ("True", "last"), (True, "last"), ("last", "last")]
)
def test_resuming_or_not_is_said_in_any_form(tmp_path, given, meant):
    """The bug guarded: "false" was taken for a folder, after everything had been prepared."""
    arguments = OnePassTrainingArguments(str(tmp_path), use_cpu=True, resume_from_checkpoint=given)
    assert arguments.resume_from_checkpoint == meant


def test_a_mismatch_stops_before_training(tmp_path, monkeypatch, capsys):
    """Planted fault: branches see each other."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flexmask", broken_attention(leaking))
    assert train(tmp_path, "--max_steps", 1) == 1
    said = capsys.readouterr()
    assert "DIFFERENT LOSSES" in said.out and "nothing was trained" in said.err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops(tmp_path, capsys):
    assert train(tmp_path, "--max_steps", 8, "--learning_rate", 1e30, "--max_grad_norm", 0, "--verify", "false") == 2
    assert "at step" in capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in demo.conversations(8, turns=(2, 4))))
    return str(path)


def test_overlong(tmp_path, data, capsys):
    assert train(tmp_path, "--max_length", 300, data=data) == 2
    error = capsys.readouterr().err
    assert "data.jsonl:" in error and "more than 300 (max_length" in error
    assert train(tmp_path, "--max_length", 300, "--overlong", "truncate", "--max_steps", 1, data=data) == 0
    assert "LOST to max_length" in capsys.readouterr().out
    assert train(tmp_path, "--max_length", 10, "--overlong", "drop", "--max_steps", 1, data=data) == 2
    assert "nothing is left to train on" in capsys.readouterr().err
    assert train(tmp_path, "--max_tokens", 256, data=data) == 2
    assert "more than 256 (max_tokens" in capsys.readouterr().err
    flags = ["--max_length", 60, "--overlong", "truncate", "--max_steps", 1, "--verify", "false", "--compare", 1]
    assert train(tmp_path, *flags, data=data) == 2  # before, and not after the training with a traceback
    assert "no conversation is whole, so that --compare has none" in capsys.readouterr().err


def test_verify_and_inspect(tmp_path, trained, data, capsys):
    assert main(["verify", data, "--model_name_or_path", str(trained), "--max_samples", "2"]) == 0
    assert "the same losses" in capsys.readouterr().out
    picture = tmp_path / "picture.png"
    assert main(["inspect", data, "--tokenizer", str(trained), "--index", "3", "--output", str(picture)]) == 0
    assert "visible pairs" in capsys.readouterr().out and picture.stat().st_size > 10_000
    assert main(["inspect", data, "--tokenizer", str(trained), "--index", "8"]) == 2
    assert "has 8 conversations" in capsys.readouterr().err


def test_inspect_tells_what_is_longer_than_the_model_takes(tmp_path, trained, capsys):
    """The bug guarded: only training said so."""
    path = tmp_path / "long.jsonl"
    long, short = demo.conversations(2)
    long["messages"][0]["content"] = "word " * 9000
    path.write_text("".join(json.dumps(c) + "\n" for c in (long, short)))
    flags = ["--tokenizer", str(trained), "--output", str(tmp_path / "mask.png"), "--html", str(tmp_path / "page.html")]
    for index, told in ((0, True), (1, False)):
        assert main(["inspect", str(path), *flags, "--index", str(index)]) == 0
        assert ("more tokens than the model takes, 8,192" in capsys.readouterr().out) == told
        assert (tmp_path / "page.html").read_text().count("more tokens than the model takes, 8,192") == 1


def test_inspect_tells_what_is_counted(tmp_path, trained, capsys):
    """The bug guarded: only the page and preparation said so."""
    path = tmp_path / "data.jsonl"
    record = demo.conversations(1)[0] | {"score": 3}
    record["messages"][-1]["content"] += "<|im_end|>"
    record["messages"][0]["reasonning"] = "T"
    path.write_text(json.dumps(record))
    assert main(["inspect", str(path), "--tokenizer", str(trained), "--output", str(tmp_path / "mask.png")]) == 0
    out = capsys.readouterr().out
    assert "trained messages whose text holds '<|im_end|>', where the model would end its turn: 1" in out
    assert "messages with a key 'reasonning', which the chat template does not write: 1" in out
    assert "nobody reads these keys of the record: answers, score" in out


def test_verify_exit_code_tells_a_mismatch(trained, data, monkeypatch, capsys):
    monkeypatch.setitem(AttentionInterface._global_mapping, "flexmask", broken_attention(leaking))
    assert main(["verify", data, "--model_name_or_path", str(trained), "--gradients", "false"]) == 1
    assert "DIFFERENT LOSSES" in capsys.readouterr().out


def test_bad_input_is_told_and_exits_with_2(tmp_path, trained, capsys):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": 3}]}\n')
    assert main(["inspect", str(tmp_path / "bad.jsonl"), "--tokenizer", str(trained)]) == 2
    assert "bad.jsonl:1: message 0 (user): content is int" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none.jsonl"), "--tokenizer", str(trained)]) == 2
    assert main([]) == 2 and main(["--help"]) == 0 and main(["fly"]) == 2


def test_prepared_ahead_from_several_files_with_some_held_out(tmp_path, data, monkeypatch, capsys):
    """`flexmask train` with the file of `flexmask prepare` finds everything; its comparison is with held-out conversations."""
    other = tmp_path / "other.json"
    other.write_text("".join(json.dumps({"chat": c["messages"]}) + "\n" for c in demo.conversations(6, seed=1)))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"dataset_name: [{data}, {{name: {other}, columns: {{messages: chat}}}}]\ndataset_weights: [1, 3]\n"
        "test_size: 4\neval_strategy: steps\neval_steps: 1\nmax_steps: 1\nbf16: true\n"
    )
    flags = [*TINY, "--config", str(config), *FAST, "--dataset_cache_dir", str(tmp_path / "cache")]
    flags += ["--output_dir", str(tmp_path / "out")]
    assert main(["prepare", *flags]) == 0
    prepared = capsys.readouterr().out
    assert "other.json: 6 conversations" in prepared and "4 trees are held out for evaluation" in prepared
    assert "other.json 75.0%" in prepared and prepared.count(" rows of at most 2048 tokens") == 2
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("flexmask.data.preparation._write", None)
    assert main(["train", *flags, "--compare", "1"]) == 0
    trained = capsys.readouterr().out
    assert prepared in trained and trained.count("the same losses") == 2
    assert train(tmp_path, "--streaming", "true", data=data, command="prepare") == 2
    assert "--streaming prepares nothing" in capsys.readouterr().err


def test_streaming(tmp_path, data, capsys):
    """Into a second epoch, with workers, evaluated on what is prepared; what was dropped is told at the end."""
    flags = ["--streaming", "true", "--max_steps", 4, "--dataloader_num_workers", 2, "--eval_dataset_name", data]
    flags += ["--eval_strategy", "steps", "--eval_steps", 4, "--compare", 1, "--max_length", 350, "--overlong", "drop"]
    flags += ["--reasoning_weight", 0.5]
    assert train(tmp_path, *flags, data=data) == 0
    said = capsys.readouterr().out
    assert f"{data}: 8 conversations, " in said and said.count("LOST to max_length") == 2
    [read] = re.findall(r"read while training, in every epoch anew: (\d+) conversations", said)
    assert int(read) > 8
    assert len(losses(tmp_path / "out")) == 4 and said.count("the same losses") == 2


def test_a_column_that_a_stream_seems_not_to_have(tmp_path, data, capsys):
    """Of a whole stream it is an error; of its beginning it is told before training. The bug guarded: only after it."""
    flags = ["--streaming", "true", "--max_steps", 1, "--columns", '{"tools": "my_tols"}']
    assert train(tmp_path, *flags, data=data) == 2
    assert "no record has the column 'my_tols'" in capsys.readouterr().err
    path = tmp_path / "long.jsonl"
    path.write_text(Path(data).read_text() * 9)
    assert train(tmp_path, *flags, "--max_samples", 99, data=str(path)) == 0
    said = capsys.readouterr().out
    assert said.index("none of the first 64 records has the column 'my_tols'") < said.index("before training")


def test_a_stream_takes_a_tokenizer_with_a_token_that_is_not_used(tmp_path, trained, data):
    """As without a stream. The bug guarded: it was refused for a token without an embedding that no record has."""
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.add_tokens(["<unused>"])
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint*"))
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--streaming", "true", "--max_steps", 1, "--verify", "false"]
    assert train(tmp_path, *flags, "--model_name_or_path", tmp_path / "model", data=data) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_in_a_stream_ends_in_one_line(tmp_path, data, workers, capsys):
    """The bug guarded: an error in a worker came with the traceback of the worker around it."""
    path = tmp_path / "long.jsonl"
    path.write_text(Path(data).read_text() * 9 + '{"messages": []}\n')
    flags = ["--streaming", "true", "--max_steps", 99, "--dataloader_num_workers", workers, "--max_samples", 99]
    assert train(tmp_path, *flags, "--verify", "false", data=str(path)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"flexmask train: {path}:73: the conversation is empty"


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--no_such_option", 1], "unknown arguments --no_such_option 1"),
        (["--max_step", 1], "unknown arguments --max_step 1"),
        (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--per_device_train_batch_size", 4], "a batch is one packed row"),
        (["--label_smoothing_factor", 0.1], "label_smoothing_factor is 0.1, expected 0"),
        (["--train_sampling_strategy", "group_by_length"], "must not be group_by_length"),
        (["--dataloader_drop_last", "true"], "dataloader_drop_last must be false"),
        (["--remove_unused_columns", "true"], "remove_unused_columns must be false"),
        (["--chat_template_kwargs", "{enable_thinking: 1}"], "expected a JSON object"),
        (["--chat_template_kwargs", "[1]"], "expected a JSON object"),
        (["--chat_template_path", "none.jinja"], "none.jinja"),
        (["--reasoning_format", "<think>"], "must contain '{reasoning}' exactly once"),
        (["--end_of_turn", "the end"], "which is not one token"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--config"], "argument --config: expected one argument"),
        (["--eval_strategy", "steps"], "eval_strategy is steps, which needs eval_dataset_name or test_size"),
        (["--dataset_weights", 1, 2], "dataset_weights has 2 numbers for 1 datasets"),
        (["--columns", "chat"], "columns is 'chat', expected a JSON object"),
        (["--test_size", 0], "test_size is 0.0, expected a part between 0 and 1, or a whole number"),
        (["--test_size", 99], "test_size is 99, but there are only 24 conversations"),
        (["--streaming", "true"], "a stream has no length, so that --streaming needs --max_steps"),
        (["--train_on", "first"], "train_on is 'first', expected one of all, last"),
        (["--empty_reasoning", "x"], "empty_reasoning is 'x', expected one of prompt, keep, drop, error"),
        (["--unwritten_tools", "x"], "unwritten_tools is 'x', expected one of error, drop"),
        (["--reasoning_weight", -1], "reasoning_weight is -1.0, expected a number that is not negative"),
        (["--dtype", "bfloat17"], "dtype is 'bfloat17', expected one of auto, float32"),
        (["--model_name_or_path", "."], ".: holds no tokenizer"),
        (["--overlong", "foo"], "overlong is 'foo', expected one of error, drop, truncate"),
        (
            ["--chat_template_kwargs", '{"train_on": "last"}'],
            "chat_template_kwargs has 'train_on', which is an option",
        ),
        (
            ["--chat_template_kwargs", '{"max_length": 5}'],
            "chat_template_kwargs has 'max_length', which is an option",
        ),
        (["--compare", -1], "compare is -1, expected 0 or more"),
        (["--resume_from_checkpoint", "none"], "resume_from_checkpoint is none, where there is no checkpoint"),
        (["--max_length", 0], "max_length is 0, expected at least 1"),
        (["--max_samples", -1], "max_samples is -1, expected at least 1"),
        (["--config", "bad.yaml"], "bad.yaml: is not YAML"),
        (["--config", "list.yaml"], "expected `name: value` lines, got list"),
        (["--config", "date.yaml"], "a.jsonl is a file, which has no split '2024-01-01'"),
        (
            ["--config", "key.yaml"],
            "columns is no JSON (keys must be str, int, float, bool or None, not datetime.date); put",
        ),
        (["--dataset_train_split", "train[:9]", "--dataset_name", "a.jsonl"], "which has no split 'train[:9]'"),
        (["--dataset_name", '{"name": "w.jsonl", "weight": "2"}'], "the weight of w.jsonl is '2', expected a number"),
        (["--config", "unknown.yaml"], "unknown arguments --no_such_option 1"),
        (["--model_name_or_path", "./none"], "./none: there is no such folder"),
    ],
)
def test_bad_arguments_end_in_one_line(tmp_path, monkeypatch, capsys, flags, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "date.yaml").write_text("eval_dataset_name: [{name: a.jsonl, split: 2024-01-01}]\n")
    (tmp_path / "key.yaml").write_text("columns: {2024-01-01: chat}\n")
    (tmp_path / "unknown.yaml").write_text("no_such_option: 1\n")
    assert train(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and text in error, error


def test_verify_and_inspect_refuse_unknown_flags_too(data, capsys):
    for command in ("verify", "inspect"):
        assert main([command, data, "--model_name_or_path", "x", "--tokenizer", "x", "--indx", "1"]) == 2
        assert "unknown arguments" in capsys.readouterr().err


def test_a_mismatch_after_training_is_an_exit_code_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(AttentionInterface._global_mapping, "flexmask", broken_attention(leaking))
    assert train(tmp_path, "--max_steps", 1, "--verify", "false", "--compare", 1) == 1
    assert "DIFFERENT LOSSES" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists(), "the model is saved all the same"


def test_what_is_compared_is_what_is_trained(tmp_path, capsys):
    """The bug guarded: the table before training showed a conversation that had been dropped."""
    long, *short = demo.conversations(9, turns=(2, 2))
    long["messages"][0]["content"] = "word " * 400
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in [long, *short]))
    flags = ["--max_length", 600, "--overlong", "drop", "--max_steps", 1, "--compare", 2]
    assert train(tmp_path, *flags, data=str(path)) == 0
    out = capsys.readouterr().out
    assert "1 conversations dropped" in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit() and "x" in line and " s / " in line]
    assert len(rows) == 6 and all(int(row[-12]) < 1200 for row in rows), rows


def test_template_flags_reach_training_verification_and_inspection(tmp_path, trained, data, capsys):
    """A template without an end-of-turn token: without --end_of_turn the tokenizer's eos stands in for it."""
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content and loop.last %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    flags = ["--chat_template_path", str(template), "--end_of_turn", "<|im_end|>"]
    picture = ["--output", str(tmp_path / "mask.png")]
    assert main(["inspect", data, "--tokenizer", str(trained), *picture]) == 0
    plain = capsys.readouterr().out
    assert main(["inspect", data, "--tokenizer", str(trained), *picture, *flags]) == 0
    assert capsys.readouterr().out != plain
    verify = ["verify", data, "--model_name_or_path", str(trained), "--max_samples", "1", "--gradients", "false"]
    assert main(verify) == 0
    plain = capsys.readouterr().out.splitlines()[2].split()
    assert main([*verify, *flags]) == 0
    with_template = capsys.readouterr().out.splitlines()[2].split()
    assert plain[3] != with_template[3], "other tokens"
    assert train(tmp_path, "--max_steps", 1, *flags, data=data) == 0
    assert "user: " in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template or (
        AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template.read_text()
    )


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_comparison_after_training_in_16_bits(tmp_path, precision, capsys):
    """The bug guarded: accelerate's autocast around the forward made a right model look wrong."""
    flags = [precision, "true", "--max_steps", 1, "--compare", 1, "--eval_dataset_name", "flexmask/generated"]
    assert train(tmp_path, *flags) == 0
    out = capsys.readouterr().out
    assert out.count("the same losses") == 2 and "DIFFERENT" not in out
    assert "after training, flexmask/generated:" in out and "float32 on cpu" in out


def test_an_infinite_gradient_is_the_scalers_business_in_float16(tmp_path):
    for fp16 in (True, False):
        args = OnePassTrainingArguments(str(tmp_path), fp16=fp16, use_cpu=True)
        state, control = TrainerState(), TrainerControl()
        if fp16:
            StopOnNonFiniteLoss().on_log(args, state, control, logs={"loss": 1.0, "grad_norm": math.inf})
            continue
        with pytest.raises(FloatingPointError, match="grad_norm is inf at step 0"):
            StopOnNonFiniteLoss().on_log(args, state, control, logs={"loss": 1.0, "grad_norm": math.inf})


def test_names_that_need_no_download_serve_every_command(tmp_path, capsys):
    """The bug guarded: inspect and verify looked for the generated conversations on the hub."""
    picture = tmp_path / "mask.png"
    assert main(["inspect", "flexmask/generated", "--tokenizer", "flexmask/tiny-random", "--output", str(picture)]) == 0
    assert picture.exists()
    assert main(["verify", "flexmask/generated", *TINY, "--max_samples", "2"]) == 0
