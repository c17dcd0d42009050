"""DPO with TRL's own trainer; the conversation before the answers, and their common beginning, are computed once.

python examples/dpo.py    # a tiny random model on generated conversations, on a CPU, in seconds; pip install trl
"""

import datasets
from trl import DPOConfig, DPOTrainer

import flexmask
from flexmask import demo

conversations = demo.conversations(64)
tokenizer = demo.train_tokenizer(demo.texts(conversations))


def preference(conversation: dict) -> dict:
    """The last answer, against one that is off by ten."""
    *prompt, answer = conversation["messages"]
    right = demo.answer_of(answer["content"])
    wrong = answer["content"].replace(str(right), str(right + 10))
    return {"prompt": prompt, "chosen": [answer], "rejected": [answer | {"content": wrong}]}


trainer = DPOTrainer(
    model=flexmask.share_prefixes(demo.tiny_model(tokenizer)),
    ref_model=flexmask.share_prefixes(demo.tiny_model(tokenizer)),
    args=DPOConfig("runs/dpo", per_device_train_batch_size=4, max_steps=8, logging_steps=1, use_cpu=True, bf16=False),
    train_dataset=datasets.Dataset.from_list([preference(c) for c in conversations]),
    processing_class=tokenizer,
)
trainer.train()
