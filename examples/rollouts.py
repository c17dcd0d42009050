"""Rollouts of several turns, trained as one tree: a policy gradient with the log-probabilities of every turn.

Each turn was sampled in a context of its own, without the reasoning of the turns before. So a rollout is several passes, and
those of all rollouts of a prompt begin alike. The tokens are those that were sampled; nothing is rendered or tokenised again.

python examples/rollouts.py    # a tiny random model on generated conversations, on a CPU, in seconds
"""

import torch

import flexmask
from flexmask import demo

ROLLOUTS, TURNS, STEPS = 4, 2, 3
conversations = demo.conversations(64)
tokenizer = demo.train_tokenizer(demo.texts(conversations))
model = demo.tiny_model(tokenizer)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)


def rollout(questions: list[dict], answers: list[int]) -> tuple[list[flexmask.Pass], float]:
    """Ask one question after the other; what was sampled, a pass for each turn, and the reward of all of it."""
    messages, passes, reward = [], [], 0.0
    for question, right in zip(questions, answers):
        messages.append(question)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            ids = model.generate(torch.tensor([prompt]), do_sample=True, max_new_tokens=24)[0, len(prompt) :].tolist()
        passes.append(flexmask.Pass(prompt + ids, [False] * len(prompt) + [True] * len(ids)))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        reasoning, _, content = text.rpartition("</think>")
        messages.append({"role": "assistant", "reasoning_content": reasoning, "content": content.strip()})
        reward += (demo.answer_of(content) == right) + 0.1 * any(c.isdigit() for c in content)
    return passes, reward


for step in range(STEPS):
    conversation = conversations[step]
    questions = [message for message in conversation["messages"] if message["role"] == "user"][:TURNS]
    found = [rollout(questions, conversation["answers"]) for _ in range(ROLLOUTS)]
    rewards = torch.tensor([reward for _, reward in found])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)

    tree = flexmask.TokenTree.from_passes([p for passes, _ in found for p in passes])
    logprobs = tree.per_pass(flexmask.tree_logprobs(model, tree))  # of the sampled tokens of each pass
    of_pass = [advantage for (passes, _), advantage in zip(found, advantages) for _ in passes]
    loss = -torch.stack([advantage * of.sum() for advantage, of in zip(of_pass, logprobs)]).sum() / sum(
        map(len, logprobs)
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(
        f"step {step}: reward {rewards.mean():.2f}, {tree.pass_lengths.sum():,} tokens of passes as {len(tree):,} of a tree"
    )
