"""What the Trainer makes of rows with unequal numbers of targets: in one process, and in two."""

import gc
import json
import weakref
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from distributed import KINDS, Recording, train_one_step
from launching import found_by_two
from models import tiny
from test_transformers import Vocabulary, rows_of_unequal_size
from transformers import TrainingArguments

import flexmask.train
from flexmask import (
    ConversationError,
    OnePassCollator,
    OnePassTrainer,
    OnePassTrainingArguments,
    TokenTree,
    pack_stream,
)
from flexmask.collator import empty_batch
from flexmask.samplers import LevelSampler


def by_hand(loss_reduction, trained=4):
    """A step down the gradient of the mean loss over all targets of four rows or fewer, then that mean over three of them."""
    rows, collator, model = rows_of_unequal_size(loss_reduction), OnePassCollator(Vocabulary()), tiny("Qwen3")

    def mean_loss(rows):
        losses = []
        for row in rows:
            batch = collator([row])
            batch.pop("target_weight", None)
            logits, targets = model(**batch).logits[0], batch["labels"][0]
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            losses.append((each * torch.from_numpy(row.target_weight)).sum())
        return sum(losses) / sum(float(row.target_weight.sum()) for row in rows)

    mean_loss(rows[:trained]).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
        return mean_loss(rows[:3]).item(), {name: p.detach() for name, p in model.named_parameters()}


def check(result, by_hand):
    eval_loss, stepped = by_hand
    assert result["eval_loss"] == pytest.approx(eval_loss, rel=1e-5)
    for name, expected in stepped.items():
        torch.testing.assert_close(result["weights"][name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss_reduction, stream", [("token", False), ("turn", False), ("turn", True)])
def test_evaluation_and_a_step_are_means_over_targets(tmp_path, loss_reduction, stream):
    """The bug guarded: the Trainer's own eval_loss is the mean over rows. Of a stream the last step has fewer rows, whose
    gradients the library's own Trainer would add to those of the next step."""
    kind = "stream" if stream else "rows"
    found = train_one_step(str(tmp_path), accumulation=4, loss_reduction=loss_reduction, kind=kind)
    check(found, by_hand(loss_reduction))
    assert found.get("steps") == (5 if stream else None)


def test_evaluation_of_trees_and_what_is_refused(tmp_path):
    """The bug guarded: only a list of trees could be evaluated, and a batch of several rows was counted several times."""
    collator, model = OnePassCollator(Vocabulary()), tiny("Qwen3")
    rows = rows_of_unequal_size()
    arguments = OnePassTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    columns = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.to_dict().items()} for row in rows])
    found = {
        name: OnePassTrainer(model, arguments, eval_dataset=data, data_collator=collator).evaluate()["eval_loss"]
        for name, data in (("trees", rows), ("columns", columns))
    }
    assert found["trees"] == pytest.approx(found["columns"], rel=1e-6)
    with pytest.raises(ValueError, match="takes OnePassTrainingArguments"):
        OnePassTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True))
    weighted = rows_of_unequal_size("conversation")
    found = OnePassTrainer(model, arguments, eval_dataset=weighted, data_collator=collator).evaluate()["eval_loss"]
    each = [OnePassTrainer(model, arguments, eval_dataset=[r], data_collator=collator).evaluate() for r in weighted]
    assert found == pytest.approx(sum(e["eval_loss"] for e in each) / 4, rel=1e-5), "each conversation counts the same"
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match='attn_implementation="sdpa", expected "flexmask"'):
        OnePassTrainer(model, arguments)


def test_a_metric_of_ones_own_is_kept_and_a_step_of_prediction_needs_no_loop(tmp_path):
    """The bug guarded: every metric whose name ends in _loss became the evaluation loss."""
    rows, model = rows_of_unequal_size(), tiny("Qwen3")
    arguments = OnePassTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, prediction_loss_only=False)
    trainer = OnePassTrainer(
        model, arguments, eval_dataset=rows[:1], data_collator=OnePassCollator(Vocabulary()),
        compute_metrics=lambda prediction: {"other_loss": 123.0},
    )  # fmt: skip
    loss, *_ = trainer.prediction_step(model.eval(), OnePassCollator(Vocabulary())(rows[:1]), True)
    metrics = trainer.evaluate()
    assert metrics["eval_other_loss"] == 123 and metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-6)


def test_with_a_routers_loss_it_is_the_models_own(tmp_path):
    model = tiny("Qwen3Moe", output_router_logits=True, router_aux_loss_coef=0.5)
    arguments = OnePassTrainingArguments(str(tmp_path), use_cpu=True)
    batch = OnePassCollator(Vocabulary())(rows_of_unequal_size()[:1])
    found = OnePassTrainer(model, arguments).compute_loss(model.train(), dict(batch))
    expected = model(**batch)
    assert expected.aux_loss > 0 and torch.equal(found, expected.loss)


def test_what_would_never_be_called_is_refused(tmp_path):
    class Doubled(OnePassTrainer):
        def compute_loss(self, *args, **options):
            return 2 * super().compute_loss(*args, **options)

    def arguments(**more):
        return OnePassTrainingArguments(str(tmp_path), use_cpu=True, **more)

    model = tiny("Qwen3")
    with pytest.raises(ValueError, match="compute_metrics would not be called"):
        OnePassTrainer(model, arguments(), compute_metrics=lambda prediction: {})
    assert Doubled(model, arguments())
    with pytest.raises(ValueError, match=r"Doubled\.compute_loss would not be called"):
        Doubled(model, arguments(tokens_in_memory=0))
    with pytest.raises(ValueError, match="model is NoneType, expected a Hugging Face model"):
        OnePassTrainer(None, arguments(), model_init=lambda: model)
    for dataset, message in (
        (datasets.DatasetDict(train=[]), r"one of its splits \(train\)"),
        ([], "a dataset is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            OnePassTrainer(model, arguments(), OnePassCollator(Vocabulary()), train_dataset=dataset)


def test_a_routers_loss_under_reentrant_checkpointing_is_refused(tmp_path):
    model = tiny("Qwen3Moe", output_router_logits=True)
    for reentrant in (True, False):
        how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        arguments = OnePassTrainingArguments(str(tmp_path), use_cpu=True, **how)
        if not reentrant:
            assert OnePassTrainer(model, arguments)
            continue
        with pytest.raises(ValueError, match="a router's loss has no gradients under reentrant checkpointing"):
            OnePassTrainer(model, arguments)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_padding_does_not_count_in_a_routers_loss(family):
    """Up to 127 places of a row, or as many as max_tokens has. The library leaves padding out, too."""
    model = tiny(family, output_router_logits=True, router_aux_loss_coef=0.5)
    losses, found = [], []
    for multiple in (1, 128, 1024):
        batch = OnePassCollator(Vocabulary(), pad_to_multiple_of=multiple)(rows_of_unequal_size()[:1])
        output = model(**batch)
        output.loss.backward()
        losses.append((output.loss.item(), output.aux_loss.item()))
        found.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    for other, gradients in zip(losses[1:], found[1:]):
        assert other == pytest.approx(losses[0], rel=1e-6)
        for name, g in found[0].items():
            torch.testing.assert_close(gradients[name], g, rtol=1e-4, atol=1e-6)


def test_with_a_routers_loss_weights_are_refused(tmp_path):
    """Of a conversation that is there twice, too. The bug guarded: the error said to use the Trainer that it came from."""
    model = tiny("Qwen3Moe", output_router_logits=True, router_aux_loss_coef=0.5)
    trainer = OnePassTrainer(model, OnePassTrainingArguments(str(tmp_path), use_cpu=True))
    row = TokenTree.merge([rows_of_unequal_size()[0]] * 2)
    with pytest.raises(ConversationError, match=r"output_router_logits: .* knows no weights"):
        trainer.compute_loss(model.train(), OnePassCollator(Vocabulary())([row]))


def test_a_batch_of_no_weight_with_a_routers_loss_gives_no_gradient(tmp_path):
    """What a rank trains on that has run out of a stream; the model's own loss would refuse weights."""
    model = tiny("Qwen3Moe", output_router_logits=True, router_aux_loss_coef=0.5)
    trainer = OnePassTrainer(model, OnePassTrainingArguments(str(tmp_path), use_cpu=True))
    loss = trainer.compute_loss(model.train(), empty_batch(), num_items_in_batch=torch.tensor(3.0))
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return found_by_two(tmp_path_factory, "distributed")


@pytest.mark.parametrize("loss_reduction, kind", KINDS)
def test_two_processes_are_as_one(of_two, loss_reduction, kind):
    """Of three rows and of a stream too, in which one process has fewer rows: the other must not wait for it forever, and no
    row counts twice. The bug guarded: Accelerate gave the first rows again where the last ones did not suffice for all."""
    result = of_two[loss_reduction, kind]
    assert result["processes"] == 2
    check(result, by_hand(loss_reduction, trained=3 if kind == "three" else 4))
    if kind in ("three", "stream"):
        assert result["steps"] == 5
    if kind == "three":  # two steps an epoch, the fifth of two rows
        times = Counter(map(tuple, result["seen"]))
        expected = [tuple(row.target_ids.tolist()) for row in rows_of_unequal_size()[:3]]
        assert times.total() == 8 and times.keys() == set(expected) and min(times.values()) == 2


@pytest.mark.parametrize("rows, ranks", [(1, 2), (7, 2), (1000, 8), (1024, 8)])
def test_ranks_take_rows_of_about_the_same_cost(rows, ranks):
    """Every row once in an epoch, in another order in the next; what is taken together costs about the same, and whichever of it
    is largest is on any rank."""
    costs = np.random.default_rng(0).lognormal(sigma=0.5, size=rows)
    sampler = LevelSampler(costs, ranks, seed=3)
    first = list(sampler)
    assert (
        sorted(first) == list(range(rows))
        and len(sampler) == rows
        and list(LevelSampler(costs, ranks, seed=3)) == first
    )
    if rows < 1000:
        return
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(rows))
    whole = rows // ranks * ranks
    taken = costs[first[:whole]].reshape(-1, ranks)
    random = np.random.default_rng(1).permutation(costs)[:whole].reshape(-1, ranks)
    waiting, waiting_at_random = ((x.max(1) * ranks).sum() / x.sum() - 1 for x in (taken, random))
    assert waiting < 0.15 * waiting_at_random
    assert np.unique(taken.argmax(1)).size == ranks
    assert abs(np.corrcoef(taken.mean(1)[:-1], taken.mean(1)[1:])[0, 1]) < 0.3, (
        "small and large steps come in any order"
    )


def trained_rows(folder, steps, monkeypatch, save_steps=0, resume=None, **options):
    """The rows that each step of a stream trains, and how often batches were asked for."""
    rows = rows_of_unequal_size()
    monkeypatch.setattr(Vocabulary, "save_pretrained", lambda *_, **__: None, raising=False)
    saving = {"save_strategy": "steps", "save_steps": save_steps} if save_steps else {"save_strategy": "no"}
    arguments = OnePassTrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=0.1,
        optim="sgd",
        use_cpu=True,
        disable_tqdm=True,
        **saving,
        **options,
    )
    asked = []

    class Asking(Recording):
        def get_batch_samples(self, *given):
            asked.append(1)
            return super().get_batch_samples(*given)

    train = pack_stream(rows, max(map(len, rows)))
    trainer = Asking(tiny("Qwen3"), arguments, train_dataset=train, data_collator=OnePassCollator(Vocabulary()))
    trainer.train(resume_from_checkpoint=resume)
    return trainer.seen, len(asked)


@pytest.mark.parametrize("saved", [2, 3, 4])
def test_a_stream_is_resumed_where_it_was(tmp_path, monkeypatch, saved):
    """The bug guarded: beyond the first epoch (here of three rows) it began again, because the library takes the stream to be as
    long as the training. Also where more steps are asked for than at first, and from a checkpoint of a resumed training."""
    every, _ = trained_rows(tmp_path / "a", 9, monkeypatch)
    before, _ = trained_rows(tmp_path / "b", 7, monkeypatch, save_steps=saved)
    assert before == every[:7]
    checkpoint = str(tmp_path / "b" / f"checkpoint-{saved}")
    after, _ = trained_rows(tmp_path / "b", 9, monkeypatch, save_steps=saved, resume=checkpoint)
    assert after == every[saved:]
    checkpoint = str(tmp_path / "b" / f"checkpoint-{2 * saved}")
    assert trained_rows(tmp_path / "b", 9, monkeypatch, resume=checkpoint)[0] == every[2 * saved :]


def test_a_stream_that_cannot_be_resumed_where_it_was_is_refused(tmp_path, monkeypatch):
    trained_rows(tmp_path, 4, monkeypatch, save_steps=4)
    resume = str(tmp_path / "checkpoint-4")
    with pytest.raises(
        ConversationError, match=r"was saved with gradient_accumulation_steps 1, so .*--ignore_data_skip"
    ):
        trained_rows(tmp_path, 6, monkeypatch, resume=resume, gradient_accumulation_steps=2)
    anew, _ = trained_rows(tmp_path, 6, monkeypatch, resume=resume, ignore_data_skip=True)
    assert anew == trained_rows(tmp_path / "other", 2, monkeypatch)[0]
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"stateful_callbacks": {}}))
    with pytest.raises(ConversationError, match="does not say where in the stream it was saved"):
        trained_rows(tmp_path, 6, monkeypatch, resume=resume)


def test_the_end_of_a_stream_costs_one_look(tmp_path, monkeypatch):
    """The bug guarded: the library asked for batches until it had asked as often as there are steps in the training."""
    seen, asked = trained_rows(tmp_path, 30, monkeypatch)
    assert len(seen) == 30 and asked == 30 + 9


def test_the_mean_over_all_ranks_cannot_be_switched_off(tmp_path, monkeypatch):
    """A rank without a row would divide by nothing."""
    monkeypatch.setattr(OnePassTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="average_tokens_across_devices must be true"):
        OnePassTrainingArguments(str(tmp_path), use_cpu=True, average_tokens_across_devices=False)


def test_verification_that_does_not_fit_is_let_go_of_before_it_is_tried_without_gradients(monkeypatch):
    """The bug guarded: it was tried again while the error was handled, which kept the gradients and activations of the first."""
    kept = []

    def verify(model, *_, gradients=True):
        if gradients:
            activations = torch.empty(1)
            kept.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("of memory")
        gc.collect()
        return f"without gradients, {kept[0]() is None}"

    monkeypatch.setattr(flexmask.train, "verify", verify)
    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1), is_fsdp_enabled=True, is_deepspeed_enabled=False, is_world_process_zero=lambda: True,
        args=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    assert flexmask.train._verify(trainer, None, [], {}) == "without gradients, True"
