"""GRPO with TRL's own trainer; the prompt of a group, a conversation here, is computed once and not for each completion.

python examples/grpo.py    # a tiny random model on generated conversations, on a CPU, in seconds; pip install trl
"""

import datasets
from trl import GRPOConfig, GRPOTrainer

import flexmask
from flexmask import demo

conversations = demo.conversations(64)
tokenizer = demo.train_tokenizer(demo.texts(conversations))


def reward(completions: list, answers: list, **_) -> list[float]:
    """1 for the right number, and a little for any."""
    found = [demo.answer_of(completion[0]["content"]) for completion in completions]
    return [(number is not None) * 0.1 + (number == right[-1]) for number, right in zip(found, answers)]


trainer = GRPOTrainer(
    model=flexmask.share_prefixes(demo.tiny_model(tokenizer)),
    reward_funcs=reward,
    args=GRPOConfig(
        "runs/grpo",
        num_generations=8,
        per_device_train_batch_size=8,  # whole groups: what is in another batch cannot be shared
        gradient_accumulation_steps=2,
        steps_per_generation=1,  # or TRL shuffles groups over the accumulated batches, and little is shared
        max_completion_length=32,
        max_steps=4,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=datasets.Dataset.from_list(
        [{"prompt": c["messages"][:-1], "answers": c["answers"]} for c in conversations]
    ),
    processing_class=tokenizer,
)
trainer.train()
