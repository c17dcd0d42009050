"""Tree batches in trainers that are not ours: right, or an error that says what to do."""

import datasets
import peft
import pytest
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from flexmask import ConversationError, OnePassCollator, OnePassTrainer, OnePassTrainingArguments, TokenTree, demo, pack
from flexmask.data import build_trees

CONVERSATIONS = demo.conversations(6)
TOKENIZER = demo.train_tokenizer(demo.texts(CONVERSATIONS))
LORA = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}


def run(folder, *, data=CONVERSATIONS, model=None, arguments=None, collator=None, trainer=Trainer, **options):
    """Two steps; the Trainer."""
    arguments = {
        "remove_unused_columns": False, "per_device_train_batch_size": 1, "max_steps": 2, "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", **(arguments or {}),
    }  # fmt: skip
    kind = OnePassTrainingArguments if trainer is OnePassTrainer else TrainingArguments
    made = trainer(
        model or demo.tiny_model(TOKENIZER), kind(str(folder), **arguments), train_dataset=data,
        data_collator=collator or OnePassCollator(TOKENIZER), **options,
    )  # fmt: skip
    made.train()
    return made


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(CONVERSATIONS)


@pytest.mark.parametrize(
    "options, message",
    [
        # Trained in silence with gradients off by 173% before.
        ({"arguments": {"label_smoothing_factor": 0.1}}, "labels are missing.* label_smoothing_factor"),
        ({"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()}, "labels are missing.* compute_loss_func"),
        ({"arguments": {"neftune_noise_alpha": 5.0}}, "NEFTune scales its noise by the length"),
        ({"arguments": {"remove_unused_columns": True}}, "remove_unused_columns=False"),
        ({"data": Stream()}, "dispatch_batches"),
        ({"model": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}, "without position_ids.* prompt tuning"),
        ({"model": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}, "without position_ids"),
        ({"model": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}, "past_key_values beside subtree_end"),
        ({"model": peft.LoraConfig(**LORA, alora_invocation_tokens=[3, 4])}, "alora_invocation_tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_would_train_something_else(tmp_path, options, message):
    if "model" in options:
        options = options | {"model": peft.get_peft_model(demo.tiny_model(TOKENIZER), options["model"])}
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"arguments": {"label_smoothing_factor": 0.1}},
        {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()},
    ],
    ids=["smoothing", "loss"],
)
def test_what_would_evaluate_something_else(tmp_path, options):
    """The bug guarded: without gradients nothing was said, and the loss was that of labels shifted by one token."""
    arguments = {"remove_unused_columns": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), **arguments, **options.pop("arguments", {}))
    collator = OnePassCollator(TOKENIZER)
    trainer = Trainer(
        demo.tiny_model(TOKENIZER), arguments, eval_dataset=CONVERSATIONS, data_collator=collator, **options
    )
    with pytest.raises(ValueError, match="labels are missing"):
        trainer.evaluate()


def test_adalora_has_a_loss_of_its_own(tmp_path):
    """Of the library's Trainer it is in the loss; ours would train without it."""
    config = peft.AdaLoraConfig(**LORA, total_step=10, tinit=1, tfinal=2)
    plain = run(tmp_path, model=demo.tiny_model(TOKENIZER)).state.log_history[0]["loss"]
    model = peft.get_peft_model(demo.tiny_model(TOKENIZER), config)
    assert run(tmp_path, model=model).state.log_history[0]["loss"] > plain + 0.1
    rows = pack(build_trees(CONVERSATIONS, TOKENIZER).trees, 4096)
    with pytest.raises(NotImplementedError, match="AdaLoRA adds a loss of its own"):
        run(tmp_path, data=rows, model=model, trainer=OnePassTrainer)


def test_a_tree_batch_needs_its_positions():
    """The bug guarded: without them a model counts places in the row."""
    batch = OnePassCollator(TOKENIZER)(CONVERSATIONS[:1])
    del batch["position_ids"]
    with pytest.raises(ValueError, match="without position_ids"):
        demo.tiny_model(TOKENIZER)(**batch)


# ------------------------------------------------------------------------------------------------------------------ TRL


def sft(folder, collator, peft_config=None, **arguments):
    from trl import SFTConfig, SFTTrainer

    arguments = {
        "remove_unused_columns": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True},
        "per_device_train_batch_size": 1, "max_steps": 2, "use_cpu": True, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-3,
        **arguments,
    }  # fmt: skip
    trainer = SFTTrainer(
        demo.tiny_model(TOKENIZER), SFTConfig(str(folder), **arguments), data_collator=collator, processing_class=TOKENIZER,
        train_dataset=datasets.Dataset.from_list(CONVERSATIONS), peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("lora", [False, True])
def test_trls_sft_trainer_takes_the_same_steps(tmp_path, lora, accumulated):
    """As the library's Trainer, whose loss the tree's is proven to be."""
    config = peft.LoraConfig(**LORA, r=4, lora_alpha=8) if lora else None
    found = sft(
        tmp_path, OnePassCollator(TOKENIZER, target_per_position=True), config, gradient_accumulation_steps=accumulated
    )
    torch.manual_seed(found.args.seed)
    model = demo.tiny_model(TOKENIZER)
    torch.manual_seed(found.args.seed)
    model = peft.get_peft_model(model, config) if lora else model
    expected = run(tmp_path, model=model, arguments={"gradient_accumulation_steps": accumulated, "learning_rate": 1e-3})
    for ours, theirs in zip(found.state.log_history[:2], expected.state.log_history[:2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert "mean_token_accuracy" in ours


def test_trls_sft_trainer_with_other_batches_or_losses(tmp_path):
    """The bug guarded: a size mismatch inside its loss."""
    with pytest.raises(ValueError, match=r"OnePassCollator\(…, target_per_position=True\)"):
        sft(tmp_path, OnePassCollator(TOKENIZER))
    with pytest.raises(ValueError, match="labels are missing"):
        sft(tmp_path, OnePassCollator(TOKENIZER, target_per_position=True), label_smoothing_factor=0.1)


def test_a_target_per_position():
    """Every target where it is predicted, and nothing that could be shifted."""
    tree = TokenTree.from_passes(demo_passes())
    batch = OnePassCollator(TOKENIZER, target_per_position=True)([tree])
    assert batch.keys() == {"input_ids", "position_ids", "subtree_end", "labels", "shift_labels"}
    assert (batch["labels"] == -100).all() and batch["labels"].shape == batch["input_ids"].shape
    places = (batch["shift_labels"][0] != -100).nonzero().flatten()
    assert sorted(tree.target_index.tolist()) == places.tolist()
    assert batch["shift_labels"][0, tree.target_index].tolist() == tree.target_ids.tolist()


def demo_passes():
    from flexmask import render_passes

    conversation = max(CONVERSATIONS, key=lambda c: len(c["messages"]))
    return render_passes(conversation["messages"], TOKENIZER)


def test_what_a_label_per_position_cannot_hold():
    from flexmask import Pass

    twice = TokenTree.from_passes([Pass([1, 2, 3], [0, 1, 1]), Pass([1, 4, 3], [0, 1, 1])])
    weighted = TokenTree.from_passes([Pass([1, 2, 3], [0, 1, 1], weight=0.5)])
    for tree, message in ((twice, "several targets"), (weighted, "targets have weights")):
        with pytest.raises(ValueError, match=message):
            OnePassCollator(TOKENIZER, target_per_position=True)([tree])


# ----------------------------------------------------------------------------------------------------------- OnePassTrainer


def one_pass(folder, data, model=None, **options):
    arguments = OnePassTrainingArguments(
        str(folder),
        max_steps=2,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-3,
    )
    trainer = OnePassTrainer(model or demo.tiny_model(TOKENIZER), arguments, train_dataset=data, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
def test_one_pass_trainer_takes_conversations(tmp_path, kind):
    """As users of SFTTrainer are used to: rendered, packed and told of; what comes out is what rows made ahead give."""
    data = datasets.Dataset.from_list(CONVERSATIONS)
    data = {"list": CONVERSATIONS, "dataset": data, "stream": data.to_iterable_dataset()}[kind]
    found = one_pass(tmp_path, data, processing_class=TOKENIZER)
    expected = one_pass(
        tmp_path, pack(build_trees(CONVERSATIONS, TOKENIZER).trees, 16384), data_collator=OnePassCollator(TOKENIZER)
    )
    for ours, theirs in zip(found.state.log_history[:2], expected.state.log_history[:2], strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])


def test_one_pass_trainer_renders_as_its_collator_says(tmp_path, capsys):
    collator = OnePassCollator(TOKENIZER, max_tokens=1500, loss_reduction="turn", train_on="last")
    trainer = one_pass(tmp_path, CONVERSATIONS, data_collator=collator, eval_dataset=CONVERSATIONS[:2])
    expected = pack(build_trees(CONVERSATIONS, TOKENIZER, loss_reduction="turn", train_on="last").trees, 1500)
    assert trainer.train_dataset.lengths.tolist() == expected.lengths.tolist() and len(trainer.eval_dataset)
    assert trainer.train_dataset[0].target_weight.tolist() == expected[0].target_weight.tolist()
    assert "nobody reads these keys of the records: answers (6)" in capsys.readouterr().out


def test_one_pass_trainer_takes_a_peft_config(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(**LORA, r=4, use_dora=True, use_rslora=True, modules_to_save=["norm"])
    trainer = one_pass(tmp_path, CONVERSATIONS, processing_class=TOKENIZER, peft_config=config)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)


def test_one_pass_trainer_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="needs a tokenizer: processing_class"):
        one_pass(tmp_path, CONVERSATIONS)


def test_a_pass_that_no_row_holds_is_not_to_be_packed():
    with pytest.raises(ValueError, match="the longest pass, which must fit into a row, has") as caught:
        OnePassCollator(TOKENIZER, max_tokens=50)(CONVERSATIONS[:1])
    assert "flexmask.pack" not in str(caught.value)


def test_a_collator_hands_no_option_of_ours_to_the_template():
    """The bug guarded: overlong="drop" was a variable of the template, and nothing was dropped."""
    with pytest.raises(ValueError, match=r"overlong is an option of flexmask\.data\.build_trees"):
        OnePassCollator(TOKENIZER, overlong="drop")


def test_tokens_beyond_the_embedding(tmp_path):
    """The bug guarded: an index out of range deep inside the model, or on a GPU an assertion that ends the process."""
    model = demo.tiny_model(TOKENIZER)
    model.resize_token_embeddings(len(TOKENIZER) - 100)
    with pytest.raises(ValueError, match=r"token id \d+ has no embedding, the model has"):
        run(tmp_path, model=model)


def test_what_is_logged(tmp_path):
    """Counted again from the rows themselves."""
    rows = pack(build_trees(CONVERSATIONS, TOKENIZER).trees, 1500)
    arguments = OnePassTrainingArguments(
        str(tmp_path), num_train_epochs=1, gradient_accumulation_steps=2, use_cpu=True, logging_steps=1, save_strategy="no",
        disable_tqdm=True, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer = OnePassTrainer(
        demo.tiny_model(TOKENIZER), arguments, train_dataset=rows, eval_dataset=rows,
        data_collator=OnePassCollator(TOKENIZER),
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 <= entry["padding"] < 0.1 and entry["sharing_ratio"] > 1 for entry in logs)
    assert all(entry["pass_tokens_per_second"] > entry["tokens_per_second"] > 0 for entry in logs)
    assert all(0 <= entry["mean_token_accuracy"] <= 1 and entry["peak_memory_gib"] > 0.1 for entry in logs)
    tokens, passes = sum(len(row) for row in rows), sum(int(row.pass_lengths.sum()) for row in rows)
    text = str(trainer.progress)
    assert text.startswith(
        f"trained {passes:,} tokens of passes as {tokens:,} tokens of rows: {passes / tokens:.2f} times"
    )


def test_accuracy_is_that_of_the_model(tmp_path):
    """Of a model that has learnt one row by heart, all; of all targets where there are few."""
    rows = pack(build_trees(CONVERSATIONS[:1], TOKENIZER).trees, 4096)
    seen = []
    model = demo.tiny_model(TOKENIZER)
    batch = OnePassCollator(TOKENIZER)([rows[0]])
    from flexmask import loss, tree_loss

    for chunk in (2**26, 7 * len(TOKENIZER)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss, "CHUNK_LOGITS", chunk)
            patch.setattr(loss, "OBSERVED", 5)
            tree_loss(model, batch, observe=lambda *of: seen.append(of))
    (logits, targets), (again, same) = seen
    places = [int(x) for x in torch.linspace(0, len(rows[0].target_ids) - 1, 5)]
    assert targets.tolist() == same.tolist() == rows[0].target_ids[places].tolist()
    inputs = {name: x for name, x in batch.items() if "labels" not in name}
    torch.testing.assert_close(logits, model(**inputs).logits[0, places].detach())
    torch.testing.assert_close(again, logits)
    assert not logits.requires_grad and not again.requires_grad


def test_a_label_per_token_is_not_for_flexmasks_losses(tmp_path):
    """The bug guarded: the loss was divided by the tokens of the row, padding included."""
    collator = OnePassCollator(TOKENIZER, target_per_position=True)
    with pytest.raises(ValueError, match="target_per_position is for trainers with a loss of their own"):
        one_pass(tmp_path, CONVERSATIONS, data_collator=collator)
    from flexmask import tree_logprobs, tree_loss

    for function in (tree_loss, tree_logprobs):
        with pytest.raises(ValueError, match="a label for every token"):
            function(demo.tiny_model(TOKENIZER), collator(CONVERSATIONS[:1]))


def test_a_collator_of_ones_own_is_called(tmp_path):
    """The bug guarded: what a subclass does in its calls was left out."""
    calls = []

    class Own(OnePassCollator):
        def __call__(self, examples):
            calls.append(len(examples))
            return super().__call__(examples)

    trainer = one_pass(tmp_path, CONVERSATIONS, data_collator=Own(TOKENIZER))
    assert set(calls) == {1} and "nothing was counted" in str(trainer.progress)


def test_workers_count_too_and_the_last_steps_count(tmp_path):
    """The bug guarded: of fewer steps than are logged nothing was told."""
    rows = pack(build_trees(CONVERSATIONS, TOKENIZER).trees, 1500)
    arguments = OnePassTrainingArguments(
        str(tmp_path), num_train_epochs=1, logging_steps=99, dataloader_num_workers=2, use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = OnePassTrainer(
        demo.tiny_model(TOKENIZER), arguments, train_dataset=rows, data_collator=OnePassCollator(TOKENIZER)
    )
    trainer.train()
    assert f"as {sum(len(row) for row in rows):,} tokens of rows" in str(trainer.progress)


def test_a_pass_that_the_model_does_not_take(tmp_path):
    model = demo.tiny_model(TOKENIZER)
    model.config.max_position_embeddings = 200
    with pytest.raises(ConversationError, match=r"conversation 0: .*max_length"):
        one_pass(tmp_path, CONVERSATIONS, model, processing_class=TOKENIZER)


def test_a_stream_to_evaluate_is_read_to_its_end(tmp_path):
    stream = datasets.Dataset.from_list(CONVERSATIONS[:3]).to_iterable_dataset()
    trainer = one_pass(tmp_path, CONVERSATIONS, processing_class=TOKENIZER, eval_dataset=stream)
    assert sum(len(row.pass_end) for row in trainer.eval_dataset) == sum(
        len(c["messages"]) // 2 for c in CONVERSATIONS[:3]
    )


def test_by_name_the_tokenizer_is_that_of_the_collator(tmp_path):
    """The bug guarded: another template was saved with the model than the one it was trained on."""
    folder = tmp_path / "model"
    demo.tiny_model(TOKENIZER).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    mine = AutoTokenizer.from_pretrained(folder)
    trainer = OnePassTrainer(
        str(folder), OnePassTrainingArguments(str(tmp_path / "out"), use_cpu=True), data_collator=OnePassCollator(mine)
    )
    assert trainer.processing_class is mine


def test_conversations_are_evaluated_as_their_rows(tmp_path):
    arguments = OnePassTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    model, collator = demo.tiny_model(TOKENIZER), OnePassCollator(TOKENIZER, 4096)
    rows = pack(build_trees(CONVERSATIONS, TOKENIZER).trees, 4096)
    ours, theirs = (
        OnePassTrainer(model, arguments, eval_dataset=data, data_collator=collator).evaluate()["eval_loss"]
        for data in (CONVERSATIONS, rows)
    )
    assert ours == pytest.approx(theirs, rel=1e-6)
