"""Every benchmark runs in its smallest size, measures what it says, and the tables of the pages are those of the results."""

import contextlib
import functools
import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import yaml
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchEncoding

import flexmask.attention
from flexmask import Pass
from flexmask.attention import using_backend

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
with patch("torch.cuda.is_available", return_value=False):  # float32 on a CPU, whatever there is
    import accuracy
    import common
    import report
    import training
    from attention import check_equal
    from methods import GROUP_METHODS, MEMORY_METHODS, METHODS, packed_trees
    from peak_memory import needs_linux

SAME_LOSS = {
    "npass": "group",
    "groups": "group",
    "growth": "turns",
    "split": None,
    "memory": "group",
}  # rows that agree in this
NAMES = sorted(path.stem for path in (BENCHMARKS / "configs").glob("*.yaml"))
# What a row is about, as far as there is a table; `loss` is a number elsewhere, which no table shows.
IDENTITY = {
    "group", "method", "turns", "parts", "loss", "conversation", "length", "heads", "dtype", "attention", "visible",
    "visible of visited tiles", "conversations", "dataset", "max_tokens", "stage", "model", "head size", "kernel",
    "m, n, warps, stages",
    "pinned", "layer",
}  # fmt: skip
CONVERSATION = {"turns": [3, 3], "lengths": [30, 60, 20]}
COMPLETIONS = {"completions": 4, "lengths": [60, 30]}


@needs_linux
@pytest.mark.parametrize("name", NAMES)
def test_smallest_size(name, tmp_path, monkeypatch):
    argv = [str(BENCHMARKS / f"{name}.py"), "smoke", "--output_dir", str(tmp_path)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if name in ("memory", "split"):  # which divide by a peak, and here there is none: memory was taken before
        run = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=BENCHMARKS.parent)
        assert run.returncode == 0, run.stderr[-3000:]
    else:
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        runpy.run_path(argv[0], run_name="__main__")
    result = json.loads((tmp_path / f"{name}_smoke.json").read_text())
    assert result["rows"] and not [row for row in result["rows"] if "error" in row]
    assert {"command", "commit", "date", "machine", "versions", "settings", "seconds"} <= set(result)
    assert result["finished"]
    assert (tmp_path / f"{name}_smoke.png").stat().st_size
    if name == "loss_memory":
        assert [row["value"] for row in result["rows"]] == pytest.approx([result["rows"][0]["value"]] * 3, rel=1e-6)
    if name in SAME_LOSS:  # what is compared in speed trains the same
        losses = {}
        for row in result["rows"]:
            losses.setdefault(row.get(SAME_LOSS[name]), []).append(row["loss"])
        for of_one in losses.values():
            assert len(of_one) > 1 and of_one == pytest.approx([of_one[0]] * len(of_one), rel=1e-5)
    for table in [name, "headline", "side_by_side"] if name == "npass" else [name]:
        first, *others = result["rows"]
        failed = {key: first[key] for key in IDENTITY & set(first)} | {"error": "MemoryError: none left"}
        for rows in (
            result["rows"],
            [first],
            [failed],
            [failed, *others],
        ):  # whole, stopped after a row, with a failure
            head, *lines = report.TABLES[table](result | {"rows": rows})
            assert all(len(line) == len(head) for line in lines)
            if name == "npass" and rows == [first]:
                assert not lines, "one-pass, compared with nothing"
            else:
                assert lines or table in ("headline", "side_by_side")
            if rows[0] is failed and table in (
                "npass",
                "attention",
                "split",
                "memory",
                "groups",
                "loss_memory",
                "recurrence",
            ):
                assert report.MISSING in lines[0] and "" not in lines[0][1:]


def test_rows_of_a_dataset_in_a_process_of_its_own(monkeypatch, capsys):
    smoke = yaml.safe_load((BENCHMARKS / "configs" / "rows.yaml").read_text())["smoke"]
    [dataset] = smoke["datasets"].values()
    monkeypatch.setattr(sys, "argv", ["rows.py", json.dumps({**smoke, "dataset": dataset})])
    runpy.run_path(str(BENCHMARKS / "rows.py"), run_name="__main__")
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["tokens run"] < row["tokens"] and row["rows of a stream"]


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_tables_of_the_pages_are_those_of_the_results(page):
    """A figure in a table that no result file has."""
    text = page.read_text()
    assert report.render(text) == text, "run python benchmarks/report.py"
    assert len(re.findall(r"<!-- table: \S+ -->", text)) == len(report.MARKED.findall(text)) > 0


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_are_of_their_settings_and_of_a_commit(path):
    if path.stem.endswith("_smoke"):
        pytest.skip("a smoke result is not committed")
    name, size = next((n, path.stem.removeprefix(f"{n}_")) for n in NAMES if path.stem.startswith(f"{n}_"))
    result = json.loads(path.read_text())
    assert result["settings"] == yaml.safe_load((BENCHMARKS / "configs" / f"{name}.yaml").read_text())[size]
    assert re.fullmatch(r"[0-9a-f]{7,}", result["commit"])
    assert result["finished"] or size.startswith("gpu")  # whose time is limited; the caption of a table says so
    assert path.with_suffix(".png").exists()


def spec(method, **options):
    what = CONVERSATION if method in METHODS | MEMORY_METHODS else COMPLETIONS
    return {"shape": "tiny", "conversations": 2, "max_tokens": 1024, "method": method, "repeats": 3} | what | options


@pytest.mark.parametrize(
    "methods", [METHODS, {**MEMORY_METHODS, "one-pass": None}, GROUP_METHODS], ids=["conversations", "memory", "groups"]
)
def test_all_methods_have_the_same_gradients(methods):
    """With weights so large that attention is far from uniform, and a wrong position or mask shows."""
    gradients = []
    for method in methods:
        step = training.TrainingStep(spec(method))
        with torch.no_grad():
            for weights in step.model.parameters():
                weights.mul_(8 if weights.ndim == 2 else 1)
        step.backward()
        gradients.append((step.losses[0], [weights.grad for weights in step.model.parameters()]))
    (loss, right), *others = gradients
    for other, found in others:
        assert other == pytest.approx(loss, rel=1e-5)
        for a, b in zip(found, right, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("method", [METHODS["N-pass, packed"], packed_trees])
def test_packed_passes_share_nothing(method):
    """The bug guarded: `pack` merges passes with a long common beginning, and N-pass would be one-pass."""
    common = np.arange(300)
    passes = [Pass(np.append(common, [last, last + 1]), np.arange(302) > 299) for last in (400, 410, 420)]
    work = method([passes[:2], passes[2:]], 512, 700)
    assert [batch["input_ids"].shape[1] for batch in work.batches] in ([604, 302], [640, 384])


def test_packed_passes_of_a_gpu(monkeypatch):
    """FlashAttention, of which there is the signature here and a stand-in, and our attention train as what a CPU does."""
    signature, calls = inspect.signature(varlen_attn), []

    def stand_in(*args, **options):
        of = signature.bind(*args, **options).arguments
        calls.append(of["max_q"])
        starts = of["cu_seq_q"]
        lengths = starts.diff().tolist()
        assert starts.dtype == of["cu_seq_k"].dtype == torch.int32 and of["window_size"] == (-1, 0)
        assert starts[0] == 0 and starts[-1] == len(of["query"]) and of["max_q"] == of["max_k"] == max(lengths)
        passes = zip(*(of[name].transpose(0, 1).split(lengths, 1) for name in ("query", "key", "value")))
        options = {"is_causal": True, "scale": of["scale"], "enable_gqa": of.get("enable_gqa", False)}
        attend = functools.partial(scaled_dot_product_attention, **options)
        return torch.cat([attend(*of_one) for of_one in passes], 1).transpose(0, 1)

    def gradients(method):
        step = training.TrainingStep(spec(method))
        step.backward()
        return step.losses[0], torch.cat([weights.grad.flatten() for weights in step.model.parameters()])

    loss, right = gradients("N-pass, packed")
    monkeypatch.setattr("methods.DEVICE", "cuda")
    monkeypatch.setattr("methods.varlen_attn", stand_in)
    monkeypatch.setitem(METHODS, "ours", packed_trees)
    for method in ("N-pass, packed", "ours"):
        other, found = gradients(method)
        assert other == pytest.approx(loss, rel=1e-5) and (found - right).norm() <= 1e-4 * right.norm()
    assert calls


def test_every_step_has_its_backend():
    """Chosen when it runs, not when it is made; the one of the process otherwise."""
    seen = []

    def see(*_):
        seen.append(flexmask.attention._override)
        raise StopIteration

    with using_backend("triton"):
        specs = [spec("one-pass", backend="blockwise"), spec("one-pass"), spec("one-pass", backend="flex")]
        steps = [training.TrainingStep(of) for of in specs]
        for step in steps:
            step.model.register_forward_pre_hook(see)
            with contextlib.suppress(StopIteration):
                step()
    assert seen == ["blockwise", "triton", "flex"]


def test_process_of_their_own():
    specs = [spec("one-pass", repeats=2), spec("N-pass, packed", repeats=2)]
    one, packed = common.in_own_process("training.py", "times", json.dumps(specs), CUDA_VISIBLE_DEVICES="")
    assert one["loss"] == pytest.approx(packed["loss"], rel=1e-5) and len(one["step"]["each"]) == 2


def test_times_are_taken_with_memory_kept_and_peaks_with_memory_given_back(monkeypatch):
    asked = []
    monkeypatch.setattr(training, "in_own_process", lambda *_, **environment: asked.append(environment))
    for what in ("times", "memory"):
        training._ask(what, [spec("one-pass", shape="tiny Qwen3.5")])
    assert asked == [common.KEEP, common.GIVE_BACK]


def test_checkpointing_changes_no_loss():
    for methods in (METHODS, GROUP_METHODS):
        losses = []
        for method in methods:
            for checkpointing in (False, True):
                step = training.TrainingStep(spec(method, checkpointing=checkpointing))
                step()
                losses.append(step.losses[0])
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


@pytest.mark.parametrize("method", METHODS | GROUP_METHODS)
def test_counted_flops_are_those_of_a_step(method):
    """Products with weights, forward and backward, as PyTorch counts them; what is padding is not counted by us in trees."""
    step = training.TrainingStep(spec(method))
    with FlopCounterMode(display=False) as counter:
        step()
    of_operators = counter.get_flop_counts()["Global"]
    seen = sum(n for operator, n in of_operators.items() if operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    costs = step.work.costs(step.model.config)
    padding = step.found()["tokens run"] / sum(cost.tokens for cost in costs)
    expected = sum(cost.linear_flops for cost in costs) * padding + sum(cost.loss_flops for cost in costs)
    assert 1 <= padding < 1.5 and expected == pytest.approx(seen, rel=1e-6)


def test_steps_take_turns(monkeypatch):
    calls = []

    class Step:
        def __init__(self, spec):
            self.name = spec["method"]
            if self.name == "broken":
                raise ValueError("no such method")

        def __call__(self):
            calls.append(self.name)

        def found(self):
            return {"tokens": 1}

    monkeypatch.setattr(training, "TrainingStep", Step)
    found = training._times([{"method": method, "repeats": 3} for method in ("a", "broken", "b")])
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]  # a warm-up first
    assert [len(row["step"]["each"]) if "step" in row else row["error"] for row in found] == [
        3,
        "ValueError: no such method",
        3,
    ]


@needs_linux
def test_peak_memory_is_that_of_the_call(tmp_path):
    """In a process whose own start, and whose parent, needed more."""
    script = tmp_path / "peak.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import torch\nfrom common import peak_memory\n"
        "torch.ones(2**26).sum()\nprint(peak_memory(lambda: torch.ones(2**24).sum()) / 2**20)"
    )
    assert 62 < common.in_own_process(str(script), **common.GIVE_BACK) < 68


def test_a_killed_process_ran_out_of_memory(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(MemoryError, match="was killed"):
        common.in_own_process(str(script))


def test_answers_end_where_the_turn_does():
    """However long the longest answer of the batch is, to which the others are padded with the same token."""
    end, seven = 1, 57
    tokenizer = SimpleNamespace(
        pad_token_id=end,
        pad=lambda batch, return_tensors: BatchEncoding(
            {"input_ids": torch.tensor([[end] * (4 - len(ids)) + ids for ids in batch["input_ids"]])}
        ),
        batch_decode=lambda of: ["<think></think>" + "".join(map(chr, ids)) for ids in of],
    )
    context, answered = [9, 9], [seven, end]
    of_one = Pass(np.array(context + answered), np.array([False, False, True, True]))
    other = Pass(np.array([9, 9, 9, seven + 1, end]), np.array([False] * 3 + [True] * 2))
    found = []
    for longest in ([8, 8, end], [8, 8, 8, 8, end]):
        model = Mock()
        made = torch.tensor([answered + [end] * (len(longest) - 2), longest])
        model.generate = lambda input_ids, made=made, **_: torch.cat([input_ids, made], 1)
        settings = SimpleNamespace(generate_batch=2, max_new_tokens=9)
        answers, right = accuracy.answer(model, tokenizer, [[of_one, other]], settings)
        assert answers[1] == longest and right == [[True, False]]
        found.append(answers[0])
    assert found == [answered, answered]


@needs_linux
def test_steps_of_a_gpu():
    """What it does there, on what there is."""
    found = training._on_the_gpu(spec("one-pass"))
    assert found["peak MiB"] >= 0  # none, where a CPU uses again what others freed
    assert len(found["step"]["each"]) == 3 and found["tokens/s"] > 0


def test_interrupted_results_say_so(tmp_path):
    def fill():
        bench.add(row=1)
        raise KeyboardInterrupt

    bench = common.Benchmark("npass", "", ["smoke", "--output_dir", str(tmp_path)])
    bench.run(fill, lambda axis: None)
    result = json.loads(bench.path.read_text())
    assert result["rows"] == [{"row": 1}] and not result["finished"]


@pytest.mark.parametrize("name", ["accuracy", "preprocessing"])
def test_missing_data_is_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        common.Benchmark(name, "", ["cpu"])
    assert re.search("not in this folder: .*data/mathchat_followup.jsonl.*README.md, Data", capsys.readouterr().err)
    (tmp_path / "data" / "smollm2").mkdir(parents=True)
    (tmp_path / "data" / "mathchat_followup.jsonl").touch()
    common.Benchmark(name, "", ["cpu"])


def test_other_attention_is_refused():
    right = [torch.ones(3)] * 4
    check_equal([x + 1e-5 for x in right], right, torch.float32)
    with pytest.raises(ValueError, match="dv differs from that of blockwise by"):
        check_equal([*right[:3], right[3] + 1e-3], right, torch.float32)


def test_headline_by_hand():
    """Ratios are of rounds: 8/2, 6/2, 5/1; the best N-pass is the one that one-pass is least faster than."""

    def row(method, *seconds):
        step, first = common.spread(list(seconds)), common.spread([2, 2, 1])
        faster = common.ratio(step, first)
        return {
            "group": "g", "method": method, "tokens": 1000, "tokens run": 500, "step": step, "predicted": 2,
            "one-pass is faster by": faster,
        }  # fmt: skip

    rows = [row("one-pass", 2, 2, 1), row("N-pass, sequences", 8, 6, 5), row("N-pass, padded batches", 9, 9, 9)]
    rows += [row("N-pass, packed", 3, 4, 3), {"group": "g", "method": "N-pass, other", "error": "OutOfMemoryError: x"}]
    methods = [of["method"] for of in rows]
    _, *found = report.headline({"rows": rows, "methods": methods})
    expected = ["g", "1,000 → 500", "6.0 s", "3.0 s (packed; N-pass, other failed)", "2.0 s"]
    assert found == [[*expected, "4.00× (3.00 to 5.00), 2.00× (1.50 to 3.00)", "2.00×, 2.00×"]]
    assert len(report.headline({"rows": rows[:-1], "methods": methods})) == 1, "a group that was not finished"


def test_gpu_benchmarks_take_eight_minutes():
    runs = re.search(r"for run in (.*?);", (BENCHMARKS.parent / "Makefile").read_text(), re.DOTALL)[1]
    names, sizes, seconds = zip(*(run.split() for run in re.findall('"(.*?)"', runs)))
    assert set(names) == set(NAMES) - {"preprocessing", "accuracy", "rows", "split"} and sum(map(int, seconds)) <= 480
    for name, size in zip(names, sizes):
        assert size in yaml.safe_load((BENCHMARKS / "configs" / f"{name}.yaml").read_text())


def test_sizes_in_one_table(tmp_path, monkeypatch):
    """Their rows one after the other; in the caption once what is the same, and what is not for each."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(report, "HERE", tmp_path)
    same = {"settings": {}, "machine": "a GPU", "date": "2026-01-01"}
    for size, ms, finished, more in (("x", 0.12345, False, {"liger-kernel": "1"}), ("y", 1234.5, True, {})):
        row = {"head size": 64, "kernel": size, "m, n, warps, stages": "(1, 2)", "pinned": True}
        row["time"] = common.spread([ms / 1e3])
        result = same | {
            "command": f"run {size}",
            "finished": finished,
            "versions": {"torch": "2", "cuda": "13"} | more,
        }
        (tmp_path / "results" / f"kernel_configs_{size}.json").write_text(json.dumps(result | {"rows": [row]}))
    mark = "<!-- table: kernel_configs_x+y -->\n"
    _, _, x, y, _, caption, _ = report.render(f"{mark}<!-- end -->").removeprefix(mark).split("\n")
    assert (x, y) == ("| x | 64 | 1, 2 | pinned | 0.123 ms |", "| y | 64 | 1, 2 | pinned | 1,234 ms |")
    notes = "with liger-kernel 1, stopped before the end"
    assert caption == f"*a GPU; torch 2; 2026-01-01; `run x` ({notes}), `run y`*"


def test_side_by_side_by_hand():
    def row(method, seconds):
        of = {"group": "g", "method": method, "tokens": 1000, "tokens run": 500, "peak MiB": 2560.0}
        return of | {"step": common.spread([seconds]), "one-pass is faster by": common.spread([seconds / 2])}

    rows = [row("one-pass", 2), {"group": "g", "method": "N-pass, padded batches", "error": "OutOfMemoryError: x"}]
    assert len(report.side_by_side({"rows": rows})) == 1, "nothing to compare with"
    _, found = report.side_by_side({"rows": [*rows, row("N-pass, packed", 5)]})
    measured = ["2.00 s, 1.00×, 2.5 GiB", "5.00 s, 2.50×, 2.5 GiB"]
    assert found == ["g", "1,000 → 500", *measured, *[report.MISSING] * 3]
