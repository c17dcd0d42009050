"""Two processes against one: every way of spreading a model or a row over them, by itself and through the Trainer."""

import hybrids
import pytest
import torch
from launching import found_by_two
from models import tiny
from ranks import SHARED
from test_branches import ROWS, same, whole
from test_transformers import Vocabulary
from trainer_modes import CHUNK, MODES, WRAPPERS, train

from flexmask import tree_loss
from flexmask.collator import to_batch
from flexmask.integrations.transformers import check_in_parts
from flexmask.integrations.ulysses import RankShare, share_row
from flexmask.loss import target_weight


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return found_by_two(tmp_path_factory, "ranks")


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_branch_by_branch_with_different_pieces(of_two, wrapper, steps):
    """Rows of one and of many pieces, one step or two accumulated, against both rows in one process."""
    model = tiny("Qwen3", torch.float64)
    batches = [to_batch(ROWS[name]) for name in ("forest", "turns")]
    total = sum(target_weight(batch).sum() for batch in batches)
    loss = sum(tree_loss(model, batch, total) for batch in batches)
    loss.backward()
    same(of_two[wrapper, steps], (loss.detach(), {n: steps * p.grad for n, p in model.named_parameters()}), 1e-6, 1e-6)


def test_tensor_parallel(of_two):
    same(of_two["tensor parallel"], whole(tiny("Qwen3"), to_batch(ROWS["forest"])), 1e-6, 1e-5)


@pytest.mark.parametrize("case", [*SHARED, "fsdp2, shared"])
def test_a_row_on_two_ranks(of_two, case):
    family, changes, _ = SHARED.get(case, SHARED["flash"])
    same(of_two[case], whole(tiny(family, **changes), to_batch(ROWS["forest"], pad_to_multiple_of=8)), 1e-6, 1e-5)


def test_flex_on_two_ranks(of_two):
    expected = tree_loss(tiny("Qwen3", head_dim=16), to_batch(ROWS["forest"]))
    torch.testing.assert_close(of_two["flex"], expected.detach(), rtol=1e-6, atol=0)


def test_memory_of_a_rank_is_about_half(of_two):
    shared, whole_row = of_two["peaks"]
    assert shared < 0.6 * whole_row


@pytest.fixture(scope="module")
def of_modes(tmp_path_factory):
    return found_by_two(tmp_path_factory, "trainer_modes")


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """By rows in a random order, and by a stream of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vocabulary, "save_pretrained", lambda *_, **__: None, raising=False)
        return {mode: train(tmp_path_factory.mktemp("one"), mode, ranks=1) for mode in ("ddp", "streamed")}


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_trainer_in_every_mode(of_modes, of_one, mode, resumed):
    """Two steps on rows of unequal size, and the second of them again from what was saved after the first."""
    found, of_one = of_modes[mode, resumed], of_one["streamed" if mode.endswith("streamed") else "ddp"]
    if resumed:
        assert found["evaluated"] == pytest.approx(of_one["evaluated"], rel=1e-6)
    assert found["wrapped"] == WRAPPERS[mode.partition(",")[0]]
    if mode.endswith(("logits in chunks", "fused loss")):
        assert found["logits"] <= CHUNK
    for name, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
        assert found[name].keys() == of_one[name].keys() == {1, 2}
        assert found[name] == pytest.approx(of_one[name], rel=tolerance)
    assert found["weights"].keys() == of_one["weights"].keys()
    for name, weight in of_one["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)


class Share(RankShare):
    """Of so many ranks, without a group."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks = rank, ranks


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shares_of_a_row(ranks, monkeypatch):
    """Every token and every target on one rank, each beside the same ends; a rank without targets has one of no weight."""
    batch = to_batch(ROWS["turns"], pad_to_multiple_of=1)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr("flexmask.integrations.ulysses.RankShare", lambda group, rank=rank: Share(rank, ranks))
        shares.append(share_row(batch, None))
    length = len(ROWS["turns"])
    for name in ("input_ids", "position_ids"):
        assert torch.equal(torch.cat([share[name] for share in shares], 1)[:, :length], batch[name])
    own = shares[0]["input_ids"].shape[1]
    assert all(share["subtree_end"].shape == (1, own * ranks) and own * ranks % 128 == 0 for share in shares)
    assert torch.equal(shares[0]["subtree_end"][:, :length], batch["subtree_end"])
    pairs = [
        (int(index) + rank * own, int(target))
        for rank, share in enumerate(shares)
        for index, target, weight in zip(
            share["logits_to_keep"], share["shift_labels"][0], share["target_weight"][0], strict=True
        )
        if weight
    ]
    assert sorted(pairs) == sorted(
        zip(batch["logits_to_keep"].tolist(), batch["shift_labels"][0].tolist(), strict=True)
    )
    assert all(len(share["logits_to_keep"]) for share in shares)


@pytest.mark.parametrize("heads, kv_heads, ranks", [(4, 2, 3), (6, 4, 4), (8, 3, 2)])
def test_heads_that_cannot_be_shared_out(heads, kv_heads, ranks):
    q, k = torch.zeros(1, heads, 4, 8), torch.zeros(1, kv_heads, 4, 8)
    with pytest.raises(
        NotImplementedError, match=f"{heads} heads of queries and {kv_heads} of keys .* to {ranks} ranks"
    ):
        Share(0, ranks).to_heads(q, k, k)


@pytest.mark.parametrize("heads, kv_heads, ranks", [(8, 2, 2), (8, 2, 4), (8, 1, 8), (12, 3, 2), (6, 6, 3)])
def test_each_query_head_finds_its_keys(heads, kv_heads, ranks, monkeypatch):
    """On a rank, queries of head h read the keys of head h · kv_heads / heads of the model."""
    monkeypatch.setattr("flexmask.integrations.ulysses._Exchange.apply", lambda x, share, _: share.own(x))
    q = torch.arange(heads).view(1, -1, 1, 1).expand(1, heads, 4, 8)
    k = torch.arange(kv_heads).view(1, -1, 1, 1).expand(1, kv_heads, 4, 8)
    found = []
    for rank in range(ranks):
        queries, keys, _ = Share(rank, ranks).to_heads(q, k, k)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        found += zip(queries[0, :, 0, 0].tolist(), keys[0, :, 0, 0].tolist(), strict=True)
    assert found == [(h, h * kv_heads // heads) for h in range(heads)]


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(NotImplementedError, match=r"recurrent or convolutional .* Leave sequence_parallel_size out"):
        check_in_parts(hybrids.tiny("qwen3_5_text", vocab_size=512).config, "sequence_parallel_size")
