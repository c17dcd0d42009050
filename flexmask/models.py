"""Models, tokenizers and configurations as the arguments name them; adapters around them, and merged into them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import demo
from .arguments import TINY_MODEL, ModelArguments
from .integrations.transformers import NAME, check_config


def load_model(args: ModelArguments, conversations: Iterable[dict]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM with tree attention and its tokenizer; with LoRA adapters around it if asked for.

    Raises:
        NotImplementedError: the architecture is not supported.
        ConversationError: a library that is asked for is not installed.
        OSError: there is no such model or tokenizer.
    """
    args.check_environment()
    if args.model_name_or_path == TINY_MODEL:
        tokenizer = load_tokenizer(TINY_MODEL, conversations)
        model = demo.tiny_model(tokenizer)
        model.name_or_path = TINY_MODEL  # adapters keep it
    else:
        options = hub_options(args)
        tokenizer = load_tokenizer(args.model_name_or_path, conversations, **options)
        if args.is_quantised:
            options |= {"quantization_config": _quantisation(args), "device_map": {"": PartialState().device}}
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=args.dtype, attn_implementation=NAME, **options
        )
    check_config(model.config)
    if args.use_peft:
        # Adapters keep which model they are for.
        model = with_adapter(model, lora_config(args), None if args.model_revision == "main" else args.model_revision)
    return model, tokenizer


def _quantisation(args: ModelArguments) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=None if args.dtype == "auto" else args.dtype,
    )


def lora_config(args: ModelArguments):
    """The `peft.LoraConfig` that the arguments describe."""
    from peft import LoraConfig  # optional dependency

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if args.lora_target_modules in (None, ["all-linear"]) else args.lora_target_modules,
        modules_to_save=args.lora_modules_to_save,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        task_type="CAUSAL_LM",
    )


def with_adapter(model: PreTrainedModel, config, revision: str | None = None):
    """The model, of a revision on the hub, with an adapter of a `peft.PeftConfig` around it."""
    from peft import get_peft_model

    model.enable_input_require_grads()  # gradient checkpointing needs an input that has one
    return get_peft_model(model, config, revision=revision)


def hub_options(args: ModelArguments) -> dict:
    """What tells the hub's models of the same name apart."""
    return {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}


def load_tokenizer(name: str, conversations: Iterable[dict], **options) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the hub; that of the tiny model is trained on the first conversations.

    Raises:
        OSError: telling a folder that does not exist from a hub that is not there.
    """
    if name == TINY_MODEL:
        return demo.train_tokenizer(demo.texts(islice(conversations, 512)))
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise _not_there(name, f"holds no tokenizer: {' '.join(str(error).split())}", error) from error


def _not_there(name: str, lacks: str, error: Exception) -> OSError:
    """Of a folder what it lacks, of anything else that the hub did not give it."""
    if Path(name).exists():
        return OSError(f"{name}: {lacks}")
    return OSError(f"{name}: there is no such folder, and loading it from the hub failed: {error}")


def load_config(name: str, tokenizer: PreTrainedTokenizerBase, **options) -> PreTrainedConfig:
    """The configuration of the model that a tokenizer belongs to.

    Raises:
        OSError: there is none beside the tokenizer. ValueError: it is unknown to transformers.
    """
    return demo.tiny_model(tokenizer).config if name == TINY_MODEL else AutoConfig.from_pretrained(name, **options)


def merge(adapter: str, output_dir: str | Path, dtype: str = "auto", trust_remote_code: bool = False) -> None:
    """Write an adapter that was trained, and the model that it was trained on, as one plain model with its tokenizer.

    The weights are added to those of the model as the hub has it: one that was trained on in 4 or 8 bits was rounded there.

    Args:
        adapter: a folder that training wrote, or a hub name.
        output_dir: where the model goes.
        dtype: of its weights; auto: as they are stored.

    Raises:
        OSError: there is no adapter, or not its model.
    """
    from peft import PeftConfig, PeftModel

    if not Path(adapter).exists() and adapter.count("/") != 1:  # the hub's names are user/name
        raise OSError(f"{adapter}: there is no such folder")
    try:
        config = PeftConfig.from_pretrained(adapter)
    except ValueError as error:
        raise _not_there(
            adapter, "holds no adapter; without --use_peft training writes a plain model", error
        ) from error
    base = config.base_model_name_or_path
    if base is None:
        raise OSError(
            f"{adapter}: does not say which model it was trained on (base_model_name_or_path in adapter_config.json)"
        )
    tokenizer = load_tokenizer(adapter, (), trust_remote_code=trust_remote_code)
    if base == TINY_MODEL:
        model = demo.tiny_model(tokenizer)
    else:
        options = {"revision": config.revision or "main", "trust_remote_code": trust_remote_code}
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
