"""Tiny random models of the families that the exactness tests run on, and float64 that stays float64."""

import torch
import transformers
from torch.overrides import TorchFunctionMode

COMMON = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # large, so that attention matters and a wrong mask shows
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ALTERNATING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES = {
    "Llama": {},
    "Qwen3": {},
    "Qwen3Moe": EXPERTS,
    "Mistral": {"sliding_window": 24},
    "Gemma2": {**ALTERNATING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "Gemma3": {**ALTERNATING, "query_pre_attn_scalar": 8},
    "GptOss": {**ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Phi3": {"sliding_window": None, "original_max_position_embeddings": 4096},
}


def tiny(family: str, dtype=torch.float32, seed=0, **overrides):
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(**COMMON | FAMILIES[family] | overrides)
    torch.manual_seed(seed)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model = model_class._from_config(config, attn_implementation="flexmask")
    if "num_experts_per_tok" in FAMILIES[family]:
        model.set_experts_implementation("eager")  # the grouped product does not take float64
    if family == "GptOss":
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
    return model.to(dtype).eval()


def reference_attention(family: str) -> str:
    """The library's own attention that can do what the family needs."""
    return "eager" if family in ("Gemma2", "GptOss") else "sdpa"


class KeepFloat64(TorchFunctionMode):
    """Norms and softmaxes of the library compute in float32 even in a float64 model; here they do not.

    Without this a float64 comparison sees float32 rounding, and nothing below 1e-8.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        narrow = func is torch.Tensor.float or (
            func is torch.Tensor.to and (torch.float32 in args or kwargs.get("dtype") is torch.float32)
        )
        narrow = narrow or (func is torch.Tensor.type and args[1:] == (torch.float32,))
        if narrow and args[0].dtype == torch.float64:
            layout = {name: value for name, value in kwargs.items() if name == "memory_format"}
            return args[0].to(torch.float64, **layout)
        if func is torch.nn.functional.softmax and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64 if args[0].dtype == torch.float64 else torch.float32
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__) and args[0].dtype != args[1].dtype:
            args = tuple(x.double() for x in args)  # rotary: frequencies kept wide, times positions made float32
        return func(*args, **kwargs)
