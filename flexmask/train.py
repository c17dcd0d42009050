"""`flexmask train` and `flexmask prepare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from matplotlib.figure import Figure
from transformers import AutoConfig, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .arguments import (
    LAST_CHECKPOINT,
    TINY_MODEL,
    DataArguments,
    ModelArguments,
    OnePassTrainingArguments,
    TemplateArguments,
)
from .collator import OnePassCollator
from .data import Counts
from .inspect import draw_mask
from .integrations.transformers import check_embedded
from .loading import Loader, Part, first_conversations
from .messages import Conversation, ConversationError
from .models import hub_options, load_config, load_model, load_tokenizer
from .trainer import OnePassTrainer, StopOnNonFiniteLoss, check_parts, last_checkpoint
from .verify import Report, verify


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    template_args: TemplateArguments,
    args: OnePassTrainingArguments,
) -> Trainer:
    """Load, verify, train, save. Returns the Trainer, whose `state.log_history` holds the losses.

    Raises:
        ConversationError: the data cannot be used as it is.
        NotImplementedError: the architecture is not supported.
        MismatchError: one-pass losses are not those of N passes on the first conversation.
    """
    args.check_environment()
    set_seed(args.seed)
    evaluates = bool(data_args.eval_dataset_name or data_args.test_size)
    if args.eval_strategy != "no" and not evaluates:
        raise ConversationError(
            f"eval_strategy is {args.eval_strategy.value}, which needs eval_dataset_name or test_size"
        )
    if data_args.streaming and args.max_steps < 1:
        raise ConversationError("a stream has no length, so that --streaming needs --max_steps")
    in_parts = args.tokens_in_memory is not None or args.sequence_parallel_size > 1
    if in_parts and model_args.model_name_or_path != TINY_MODEL:  # before anything large is loaded
        check_parts(AutoConfig.from_pretrained(model_args.model_name_or_path, **hub_options(model_args)), args)
    tell = partial(print, flush=True) if args.process_index == 0 else lambda *_: None
    datasets = data_args.train_datasets()
    names = ", ".join(dataset.name for dataset in datasets)
    eval_names = [dataset.name for dataset in data_args.eval_datasets()]
    model, tokenizer = load_model(model_args, first_conversations(datasets, args.seed))
    options = template_args.options()
    if options["chat_template"]:
        tokenizer.chat_template = options["chat_template"]  # saved with the model
    loader = Loader(
        data_args, tokenizer, options, model.config, seed=args.seed, progress=not args.disable_tqdm, tell=tell
    )
    if data_args.streaming:
        rows, trees, whole = loader.stream()
        check_embedded(model, max(int(tree.input_ids.max()) for tree in trees))  # and later ones batch by batch
        eval_parts = loader.eval()
    else:
        parts, eval_parts = loader.train_and_eval()
        trees, rows = loader.rows(parts)
        whole = _whole(parts, max(2, data_args.compare))
        check_embedded(model, max(part.prepared.largest_token for part in parts + eval_parts))
    eval_rows = loader.rows(eval_parts)[1] if evaluates else None
    compared = (_whole(eval_parts, data_args.compare) if evaluates else whole)[: data_args.compare]
    for option, found, without in (("compare", compared, "leave it out"), ("verify", whole, "--verify false")):
        if getattr(data_args, option) and not found:
            raise ConversationError(
                f"no conversation is whole, so that --{option} has none to compare with N passes ({without})"
            )

    trainer = OnePassTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=OnePassCollator(tokenizer, data_args.max_tokens),
        processing_class=tokenizer,
        callbacks=[StopOnNonFiniteLoss()],
    )
    trainer.card_datasets = [dataset.name for dataset in datasets if dataset.is_hub]
    if not data_args.streaming:
        of_each = (f"{Path(part.source.name).name}: {part.prepared}" for part in parts)
        trainer.card_sections["Data"] = "\n".join(of_each)
    if data_args.compare and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConversationError(
            "--compare needs the trained model whole, and FSDP or DeepSpeed have it spread over devices; leave it out, and run "
            "`flexmask verify` on what was saved"
        )
    if data_args.verify:
        tell("comparing two conversations with N passes, which may take minutes on a CPU (--verify false does not) …")
        report = _verify(trainer, tokenizer, whole[:2], options)  # two, so that packing is compared too
        trainer.card_sections["Verified before training, on the first conversations"] = str(report)
        tell(f"before training, {names}:\n{report}")
        if not report:
            raise MismatchError(
                "the one-pass losses of this model are not those of N passes (table above), so training would "
                "be wrong; nothing was trained. --verify false trains all the same"
            )
    trainer.train(resume_from_checkpoint=_checkpoint(args, tell))
    trainer.save_model()  # before anything else can fail
    tell(trainer.progress)
    if evaluates and args.eval_strategy == "no":  # at least once
        metrics = trainer.evaluate()
        tell(f"evaluated at the end (eval_strategy is no): eval_loss {metrics['eval_loss']:.4f}")
    trainer.save_state()
    if data_args.streaming:
        is_first = args.process_index % args.sequence_parallel_size == 0  # of those that have rows together
        counted = sum(gather_object([rows.counted if is_first else Counter()]), Counter())
        tell(f"read while training, in every epoch anew: {Counts.of(counted)}")

    folder = Path(args.output_dir)
    if trainer.is_world_process_zero():
        draw_mask(max(trees[:100], key=lambda tree: tree.num_passes), folder / "mask.png")
        draw_losses(trainer.state.log_history, folder / "loss.png")
        if data_args.compare:
            # Accelerate leaves its autocast around the model's forward.
            trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            report = verify(trained, tokenizer, compared, **options)
            trainer.card_sections["Verified after training"] = str(report)
            print(f"after training, {', '.join(eval_names) or names}:\n{report}")
        trainer.create_model_card()
        print(f"model: {folder}\nmask picture: {folder / 'mask.png'}\nloss curve: {folder / 'loss.png'}", flush=True)
    if args.push_to_hub:
        trainer.push_to_hub()  # with the card as it is now
    if trainer.is_world_process_zero() and data_args.compare and not report:
        raise MismatchError("the one-pass losses of the trained model are not those of N passes (table above)")
    return trainer


def prepare_datasets(
    model_args: ModelArguments,
    data_args: DataArguments,
    template_args: TemplateArguments,
    args: OnePassTrainingArguments,
) -> None:
    """What `train` with the same arguments finds prepared.

    Raises:
        ConversationError: the data cannot be used as it is.
    """
    if data_args.streaming:
        raise ConversationError("--streaming prepares nothing; leave it out, or train")
    conversations = first_conversations(data_args.train_datasets(), args.seed)
    options, template = hub_options(model_args), template_args.options()
    tokenizer = load_tokenizer(model_args.model_name_or_path, conversations, **options)
    if template["chat_template"]:
        tokenizer.chat_template = template["chat_template"]
    config = load_config(model_args.model_name_or_path, tokenizer, **options)
    loader = Loader(data_args, tokenizer, template, config, seed=args.seed, progress=not args.disable_tqdm)
    for parts in loader.train_and_eval():
        if parts:
            loader.rows(parts)


def _checkpoint(args: OnePassTrainingArguments, tell: Callable[[str], object]) -> str | None:
    """What to resume from: what is named, or the last that is whole, if there is one."""
    if args.resume_from_checkpoint != LAST_CHECKPOINT:
        return args.resume_from_checkpoint
    # That of rank 0, since not all of them need have its disk.
    [(found, unfinished)] = broadcast_object_list([last_checkpoint(args.output_dir)])
    for path in unfinished:
        tell(f"{path} was not written to its end, so it is not used")
    tell(f"resuming from {found}" if found else f"there is no checkpoint in {args.output_dir}, so training begins anew")
    return found and str(found)


def _verify(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, conversations: list[dict], options: dict) -> Report:
    """`verify` before the training, when FSDP and DeepSpeed have not yet taken the model; only ZeRO 3 has, when it was loaded.
    What they will spread over devices is verified by rank 0, on its device; without gradients if they do not fit there."""
    model = trainer.model
    if is_deepspeed_zero3_enabled():
        import deepspeed  # or it would not be enabled

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return verify(model, tokenizer, conversations, **options)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return verify(model, tokenizer, conversations, **options)
    outcome: list = [None]
    if trainer.is_world_process_zero():
        before = next(model.parameters()).device
        try:
            model.to(trainer.args.device)
            with suppress(torch.OutOfMemoryError):
                outcome = [verify(model, tokenizer, conversations, **options)]
            if outcome == [None]:  # not while the error is handled, which keeps what did not fit
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                outcome = [verify(model, tokenizer, conversations, gradients=False, **options)]
        except Exception as error:  # the others wait for it
            outcome = [error]
        model.to(before)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    [outcome] = broadcast_object_list(outcome)
    if isinstance(outcome, torch.OutOfMemoryError):
        raise ConversationError(
            f"the model does not fit on one device, where it is compared with N passes before it is spread: {outcome}; verify a "
            "smaller model of its kind, and train with --verify false"
        )
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class MismatchError(RuntimeError):
    """One-pass losses are not those of N passes."""


def _whole(parts: Sequence[Part], count: int) -> list[Conversation]:
    """Conversations of which nothing is lost."""
    return list(islice(chain.from_iterable(part.whole() for part in parts), count))


def draw_losses(log_history: list[dict], path: str | Path) -> None:
    """A PNG of the training loss, and of the evaluation loss if there is one, over steps."""
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if points:
            axes.plot(*zip(*points), label=label, marker=".")
            axes.legend()
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
