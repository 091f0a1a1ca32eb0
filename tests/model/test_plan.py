"""The memory plan: its counts are a real model's, its peaks those that were measured, its choice the recipe's."""

from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from test_packed import ALL, documents, make

from medlora.data.prompts import Example
from medlora.model.packed import pack, packed_loss, packing, split
from medlora.model.plan import (
    FLOPS,
    GIB,
    SHAPES,
    Plan,
    Shape,
    Work,
    base_bytes,
    capacity_of,
    choose,
    fall_back,
    plans,
    predict,
    table,
)
from medlora.recipe import Recipe, load_recipe

LLAMA = next(shape for shape in SHAPES if shape.name == "Llama-2-7B")
ALL_LINEAR = ("lora.target_modules=all-linear", "lora.lora_dropout=0", "lora.r=64")
EIGHT = (*ALL_LINEAR, "training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1")
FULL = Example("", [1] * 2048, [1] * 2048)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("llama2-medical", ("training.gradient_checkpointing=auto", *overrides))


def work(*overrides: str, tokens: int = 16384, longest: int = 2048) -> Work:
    return Work(recipe=recipe(*overrides), tokens=tokens, longest=longest)


@pytest.mark.parametrize("shape", [{}, {"head_dim": 24, "tie_word_embeddings": True}, {"num_key_value_heads": 4}])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], "all-linear"], ids=str)
def test_weights_are_counted_as_they_are(shape: dict[str, Any], targets: Any) -> None:
    model = make(targets, **shape)
    counted = Shape.of(model.config)
    assert counted.lora_weights(8, targets) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = {name: p.numel() for name, p in model.unload().named_parameters()}  # a tied head is listed once
    assert counted.linear_weights == sum(n for name, n in sizes.items() if name.endswith("_proj.weight"))
    assert counted.head_weights == sum(n for name, n in sizes.items() if "embed" in name or "head" in name)


@pytest.mark.parametrize(
    ("overrides", "tokens", "recompute", "keep", "measured"),
    [
        (ALL_LINEAR, 16384, "none", True, 73.6),
        (ALL_LINEAR, 16384, "none", False, 61.2),
        (ALL_LINEAR, 16384, "full", True, 25.3),
        (ALL_LINEAR, 16384, "full", False, 12.9),
        ((), 4096, "none", True, 28.9),
        (ALL_LINEAR[:1], 4096, "none", True, 32.6),
    ],
)
def test_peaks_are_those_measured_on_an_h200(
    overrides: tuple[str, ...], tokens: int, recompute: Any, keep: bool, measured: float
) -> None:
    """Settings A, B, C and D of bench/train_gpu.py, by bench/NOTES.md; the longest step of C and D was not recorded,
    and four rows of 1,024 tokens bound it."""
    plan = predict(LLAMA, work(*overrides, tokens=tokens, longest=1024), 1, recompute, keep, "adamw_torch_fused")
    assert plan.peak_bytes / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("rows", "recompute", "keep", "optim", "measured"),
    [
        (1, "none", True, "adamw_torch_fused", {"Llama-2-7B": 73.32, "Llama-3.1-8B": 76.67}),
        (1, "none", False, "adamw_torch_fused", {"Llama-2-7B": 61.25, "Llama-3.1-8B": 63.74}),
        (1, "selective", False, "adamw_torch_fused", {"Llama-2-7B": 32.43, "Llama-3.1-8B": 28.62}),
        (1, "full", False, "adamw_torch_fused", {"Llama-2-7B": 12.63, "Llama-3.1-8B": 14.63}),
        (1, "offload", False, "adamw_torch_fused", {"Llama-2-7B": 8.31, "Llama-3.1-8B": 9.58}),
        (2, "none", False, "adamw_torch_fused", {"Llama-2-7B": 34.33, "Llama-3.1-8B": 36.54}),
        (2, "selective", True, "adamw_torch_fused", {"Llama-2-7B": 31.99, "Llama-3.1-8B": 31.92}),
        (2, "offload", False, "adamw_8bit", {"Llama-2-7B": 6.69, "Llama-3.1-8B": 7.98}),
        (4, "full", False, "adamw_8bit", {"Llama-2-7B": 7.52, "Llama-3.1-8B": 9.54}),
        (8, "none", False, "paged_adamw_8bit", {"Llama-2-7B": 12.47, "Llama-3.1-8B": 14.59}),
    ],
)
def test_peaks_are_those_measured_on_h100s(
    rows: int, recompute: Any, keep: bool, optim: str, measured: dict[str, float]
) -> None:
    """What `bench/train_gpu.py --memory` found, by bench/NOTES.md."""
    asked = Work.of(recipe(*EIGHT), [FULL] * 16)
    for shape in SHAPES:
        if shape.name in measured:
            plan = predict(shape, asked, rows, recompute, keep, optim)
            assert plan.peak_bytes / GIB == pytest.approx(measured[shape.name], rel=0.025)


def test_gradients_that_stay_are_counted_once() -> None:
    """Beside a further row, or beside a graph, or both."""
    trained = 4 * LLAMA.lora_weights(64, "all-linear")
    asked = short(*ALL_LINEAR, "training.max_steps=100000")
    whole, cut = (predict(LLAMA, asked, rows, "none", True, "adamw_torch_fused") for rows in (1, 2))
    assert whole.replay is not None and cut.replay is not None
    assert whole.replay.fixed_bytes - cut.replay.fixed_bytes == trained
    rest = [plan.peak_bytes - plan.row_tokens * plan.token_bytes for plan in (whole, cut)]
    assert rest[1] - rest[0] == pytest.approx(trained, rel=1e-3)


def test_the_fastest_that_fits_is_chosen() -> None:
    found = plans(LLAMA, work(*ALL_LINEAR, "training.per_device_train_batch_size=8"))
    assert [plan.seconds for plan in found] == sorted(plan.seconds for plan in found)
    chosen = [choose(found, int(gib * GIB)) for gib in (140, 70, 40, 20, 10)]
    assert [(plan.rows, plan.recompute, plan.kept) for plan in chosen[:2]] == [(1, "none", 32), (1, "none", 23)]
    assert choose(found, int(50 * GIB)).row_tokens > 16384 / 2 and choose(found, 140 * GIB).row_tokens == 16384
    for plan, gib in zip(chosen, (140, 70, 40, 20, 10), strict=True):
        assert plan.fits(gib * GIB)
        assert not any(p.fits(gib * GIB) and p.seconds < plan.seconds for p in found)
    least = choose(found, GIB)
    assert least.peak_bytes == min(plan.peak_bytes for plan in found) and "may not fit" in least.describe(GIB)


@pytest.mark.parametrize(
    ("name", "keep", "held", "kept", "measured"),
    [("Llama-2-7B", False, 2, 1, 10.62), ("TinyLlama-1.1B", True, 1, 0, 4.48)],
)
def test_held_layers_are_gone_when_the_others_are_computed_again(
    name: str, keep: bool, held: int, kept: int, measured: float
) -> None:
    """Peaks of setting A on an H200, by step 34 of bench/NOTES.md."""
    shape = next(shape for shape in SHAPES if shape.name == name)
    asked = Work.of(recipe(*EIGHT, "base.double_quant=true"), [FULL] * 8)
    plan = predict(shape, asked, 1, "offload", keep, "adamw_torch_fused")
    needed = plan.peak_bytes + plan.row_tokens * (held * plan.held_bytes - plan.spare_bytes)
    assert plan.holding(int(needed) - GIB // 100).held == held - 1
    found = plan.holding(int(needed) + GIB // 100)
    assert found.held == held and found.peak_bytes == pytest.approx(needed)
    assert (found.peak_bytes + kept * plan.kept_bytes) / GIB == pytest.approx(measured, rel=0.015)


def test_the_last_layer_is_held_for_nothing_where_its_backward_pass_comes_next() -> None:
    full = predict(LLAMA, work(*ALL_LINEAR), 1, "full", False, "adamw_torch_fused")
    assert full.holding(full.peak_bytes).held == 1 and full.holding(full.peak_bytes).peak_bytes == full.peak_bytes
    second = int(full.row_tokens * (full.held_bytes - 2 * LLAMA.hidden))  # that one's input need not be kept either
    assert [full.holding(full.peak_bytes + second + more).held for more in (-9, 9)] == [1, 2]


def test_a_small_host_takes_fewer_inputs() -> None:
    found = {gib: plans(LLAMA, replace(work(*ALL_LINEAR), host=gib * GIB)) for gib in (64, 10, 1)}
    longest = {
        gib: max((p.row_tokens for p in all_ if p.recompute == "offload"), default=0) for gib, all_ in found.items()
    }
    assert longest == {64: 16384, 10: 8192, 1: 0}  # 63 inputs of 128 MiB and an embedding of 256 in half of 64, of 10
    assert all(any(p.recompute == "full" for p in all_) for all_ in found.values())
    grown = choose([p for p in found[10] if p.recompute == "offload"], 40 * GIB)
    assert grown.row_tokens == 8192


def test_memory_left_over_holds_layers() -> None:
    capacities = [int(gib * GIB) for gib in (8.6, 12, 16, 24)]
    offloading = predict(LLAMA, work(*ALL_LINEAR), 1, "offload", False, "adamw_torch_fused")
    found = [offloading]
    chosen = [choose(found, capacity) for capacity in capacities]
    held = [plan.held for plan in chosen]
    assert held[0] == 0 < held[1] < held[2] < held[3] < LLAMA.layers
    for plan, capacity in zip(chosen, capacities, strict=True):
        assert plan.fits(capacity) and plan.peak_bytes + plan.row_tokens * plan.held_bytes > capacity
    everything = choose(found, 140 * GIB)
    kept = predict(LLAMA, work(*ALL_LINEAR), 1, "none", True, "adamw_torch_fused").peak_bytes
    assert everything.held == everything.kept == LLAMA.layers and "but of the last 32" in everything.describe(140 * GIB)
    assert everything.peak_bytes == pytest.approx(kept, rel=0.05)
    asked = plans(LLAMA, work(*ALL_LINEAR, "training.gradient_checkpointing=true"))
    assert choose(asked, 140 * GIB).held == 0


@pytest.mark.parametrize("tokens", [16384, 2432])
@pytest.mark.parametrize("fp8", ["true", "false"])
def test_as_many_layers_are_kept_as_fit(tokens: int, fp8: str) -> None:
    """Between none and all of them, by equal steps, and as fast as it is many."""
    asked = replace(work(*ALL_LINEAR, f"training.fp8={fp8}", tokens=tokens), steps=(tokens,) * 3)
    none, whole = (predict(LLAMA, asked, 1, "none", keep, "adamw_torch_fused") for keep in (False, True))
    more = base_bytes(LLAMA, asked, "none", True) - base_bytes(LLAMA, asked, "none", False)
    buffers = 2 * LLAMA.linear_weights - more  # for what is not kept
    assert none.kept_bytes * LLAMA.layers == pytest.approx(
        whole.peak_bytes + buffers - none.peak_bytes, abs=LLAMA.layers
    )
    assert whole.kept == LLAMA.layers and whole.keeping(10**15) == whole
    for layers in (0, 1, 20, 32):
        some = none.keeping(none.peak_bytes + int((layers + 0.5) * none.kept_bytes))
        assert some.kept == layers and some.peak_bytes == none.peak_bytes + int(layers * none.kept_bytes)
        assert some.seconds == pytest.approx(none.seconds + layers / 32 * (whole.seconds - none.seconds))
    if none.replay and whole.replay:
        replayed = none.replaying(10**15).keeping(10**15)
        assert replayed.seconds == pytest.approx(whole.replaying(10**15).seconds) and replayed.seconds < whole.seconds
    assert choose([none, whole], 10**12) == whole.replaying(10**12)  # without the buffer for what is not
    launched = [replace(plan, replay=None) for plan in (none, whole)]
    chosen = choose(launched, none.peak_bytes + int(20.5 * none.kept_bytes))
    assert chosen.kept == 20 and "base kept dequantised in the last 20, " in chosen.describe(10**15)
    asked = work(*ALL_LINEAR, "training.gradient_checkpointing=true", tokens=tokens)
    assert not any(choose(plans(LLAMA, asked), gib * GIB).kept for gib in (16, 40, 140))


def test_a_whole_row_of_which_few_layers_are_not_kept_is_faster_than_two() -> None:
    shape = next(shape for shape in SHAPES if shape.name == "Llama-3.1-8B")
    asked = Work.of(recipe(*EIGHT), [FULL] * 8)
    chosen = choose(plans(shape, asked), int(75.5 * GIB))
    assert chosen.rows == 1 and chosen.recompute == "none" and 20 < chosen.kept < shape.layers


def test_rows_do_not_grow_where_no_step_needs_fewer_of_them() -> None:
    """And leave what they would take to weights that are kept."""
    rows = [FULL] * 24
    uniform = choose(plans(LLAMA, Work.of(recipe(*EIGHT), rows)), 24 * GIB)
    assert uniform.row_tokens == 4096 and uniform.kept > 5
    short = [Example("", [1] * 900, [1] * 900)]
    mixed = choose(plans(LLAMA, Work.of(recipe(*EIGHT), [*rows, *short * 8])), 24 * GIB)
    assert mixed.row_tokens > 4096


def test_seconds_are_those_of_an_average_step() -> None:
    """Not of the largest, which may be rare: one long row among short ones does not decide."""
    lengths = [100] * 396 + [4096] * 4
    asked = Work.of(recipe(*ALL_LINEAR), [Example("", [1] * n, [1] * n) for n in lengths])
    whole, cut = (predict(LLAMA, asked, rows, "none", True, "adamw_torch_fused") for rows in (1, 4))
    always = predict(LLAMA, work(*ALL_LINEAR, tokens=4 * 4096), 1, "none", True, "adamw_torch_fused")
    assert asked.tokens == 4 * 4096 and whole.row_tokens == 4 * cut.row_tokens
    assert whole.seconds == cut.seconds < 0.5 * always.seconds


def test_a_narrow_model_is_no_faster_than_what_lies_between_its_products() -> None:
    """So that no long row of it is cut and replayed, though launched it keeps a device busy."""
    asked = Work.of(recipe(*EIGHT), [FULL] * 800)
    chosen = choose(plans(SHAPES[1], asked), 75 * GIB)
    assert (chosen.rows, chosen.recompute, chosen.kept, chosen.replayed) == (1, "none", SHAPES[1].layers, 0)


STEPS = (900, 1100, 1500, 1700, 2300, 4096)


def short(*overrides: str, steps: tuple[int, ...] = STEPS, **more: Any) -> Work:
    return replace(work("training.max_steps=2000", *overrides, tokens=4096, longest=1024), steps=steps, **more)


def test_rows_that_the_host_cannot_keep_up_with_are_replayed() -> None:
    kept = predict(LLAMA, short(), 1, "none", True, "adamw_torch_fused")
    chosen = choose([kept], 140 * GIB)
    assert chosen.replayed == chosen.row_tokens == 4096 and ", as CUDA graphs, " in chosen.describe(0)
    assert 0 < chosen.peak_bytes - kept.peak_bytes < GIB
    assert choose([kept], kept.peak_bytes).replayed == 0
    assert choose([kept], chosen.peak_bytes) == chosen
    for other in (
        short(steps=(4000, 4096)),  # the device is the slower
        short(flops=FLOPS / 5),
        short("training.max_steps=20"),  # capturing would take longer than it saves
        short("training.cuda_graphs=false"),
        short(on_gpu=False),
    ):
        assert choose(plans(LLAMA, other), 140 * GIB).replayed == 0


def test_a_capture_takes_what_a_launch_does() -> None:
    """Of the longest row, and of the one length that comes up."""
    asked = {n: short(*ALL_LINEAR, f"training.max_steps={n}", steps=(128,)) for n in (100, 200)}
    found = {n: predict(LLAMA, each, 1, "none", True, "adamw_torch_fused") for n, each in asked.items()}
    paces = {n: plan.replay.pace.seconds for n, plan in found.items() if plan.replay}
    captured = 2 * found[100].seconds
    assert paces[100] - paces[200] == pytest.approx(captured / 100 - captured / 200)


def test_the_allocator_is_left_room() -> None:
    assert capacity_of(recipe(), 40 * GIB) == int(40 * GIB / 1.04)
    assert capacity_of(recipe(), 8 * GIB) == 7.5 * GIB and capacity_of(recipe(), GIB // 4) == 0
    assert capacity_of(recipe("training.max_memory=4.4"), 8 * GIB) == int(4.4 * GIB)


def test_a_shorter_run_captures_fewer_lengths() -> None:
    found = {
        steps: predict(SHAPES[0], short(f"training.max_steps={steps}"), 1, "none", True, "adamw_torch_fused").replay
        for steps in (5, 50, 5000)
    }
    assert found[5] is None and found[50] and found[5000] and found[50].parts < found[5000].parts


def test_a_step_that_is_not_cut_is_not_replayed_for_the_rows_it_might_have_had() -> None:
    for steps in range(10, 100, 10):
        asked = short(*ALL_LINEAR, f"training.max_steps={steps}")
        whole = [plan for plan in plans(LLAMA, asked) if plan.rows == 1]
        assert choose(plans(LLAMA, asked), 140 * GIB).replayed == choose(whole, 140 * GIB).replayed


def test_tiles_need_no_gradient_in_float32() -> None:
    asked = work(*ALL_LINEAR)
    tokens = [
        predict(LLAMA, each, 1, "offload", False, "adamw_8bit").token_bytes
        for each in (asked, replace(asked, tiled=False), replace(asked, alike=True))
    ]
    assert tokens[0] < tokens[1] == tokens[2]


def test_samples_of_one_length_are_cut_whole() -> None:
    rows = [FULL] * 41
    one = "training.per_device_train_batch_size=41", "training.gradient_accumulation_steps=1"
    asked = Work.of(recipe(*ALL_LINEAR, *one), rows)
    for cut in range(1, 9):
        plan, batch = predict(LLAMA, asked, cut, "none", False, "adamw_torch_fused"), pack(rows)
        assert len(split(batch, plan.row_tokens)) <= cut
    short = [Example("", [1] * 100, [1] * 100)]
    assert asked.alike and not Work.of(recipe(*ALL_LINEAR, *one), [*rows[1:], *short]).alike
    assert Work.of(recipe(*ALL_LINEAR, *one), [*rows, *short]).alike  # the largest step is


def test_what_goes_in_and_out_of_a_graph_is_counted_beside_the_room() -> None:
    asked = replace(short(*ALL_LINEAR), tokens=8192)
    plan = predict(LLAMA, asked, 1, "none", True, "adamw_torch_fused")
    assert plan.replay is not None and plan.replay.token_bytes == 2 * 2 * (2 * LLAMA.hidden + 128)


def test_a_prime_number_of_samples_can_be_cut() -> None:
    samples = "training.per_device_train_batch_size=41", "training.gradient_accumulation_steps=1"
    asked = work(*ALL_LINEAR, *samples, tokens=32_000, longest=1024)
    found = choose(plans(LLAMA, asked), 76 * GIB)
    assert (found.rows, found.recompute, found.kept) == (2, "none", 32)


def test_rows_grow_as_far_as_they_are_replayed() -> None:
    lean = short("training.optim=adamw_8bit")
    halved, whole = (predict(LLAMA, lean, rows, "offload", False, "adamw_8bit") for rows in (2, 1))
    tight = halved.peak_bytes + GIB // 4
    chosen = choose([halved, whole], tight)
    assert halved.row_tokens < chosen.row_tokens == chosen.replayed < 4096 and chosen.fits(tight)
    assert choose([halved], 140 * GIB).held > 0


@pytest.mark.parametrize("shape", SHAPES[:5], ids=lambda shape: shape.name)
def test_nothing_is_recomputed_where_memory_is_plenty(shape: Shape) -> None:
    for tokens in (64, 2048, 16384):
        plan = choose(plans(shape, work(tokens=tokens, longest=tokens)), 140 * GIB)
        assert (plan.rows, plan.recompute, plan.kept) == (1, "none", shape.layers)


def test_captures_do_not_make_recomputation_look_cheap() -> None:
    """Where they cost more than launching, replaying a way that launches more must not win by them."""
    for steps in (10, 30, 100, 300, 1000):
        plan = choose(plans(LLAMA, short(f"training.max_steps={steps}")), 140 * GIB)
        assert (plan.recompute, plan.kept) == ("none", LLAMA.layers)


def test_the_host_waits_longer_for_what_it_launches_more_of() -> None:
    """Dequantising, and an optimizer of small kernels for every matrix."""
    tiny = work(*ALL_LINEAR, tokens=128, longest=128)

    def seconds(keep: bool, optim: str, asked: Work = tiny) -> float:
        return predict(LLAMA, asked, 1, "none", keep, optim).seconds

    assert seconds(False, "adamw_torch_fused") == pytest.approx(1.4 * seconds(True, "adamw_torch_fused"))
    more = [seconds(True, o) - seconds(True, "adamw_torch_fused") for o in ("adamw_8bit", "paged_adamw_8bit")]
    assert more[0] == pytest.approx(448 * 5e-5) and more[0] < more[1]
    few = work("lora.target_modules=[q_proj, v_proj]", tokens=128, longest=128)
    assert seconds(True, "adamw_8bit", few) - seconds(True, "adamw_torch_fused", few) == pytest.approx(128 * 5e-5)


def test_no_plan_stands_there_twice() -> None:
    found = plans(LLAMA, Work.of(recipe(*EIGHT), [FULL] * 8))
    assert len({(plan.row_tokens, plan.way) for plan in found}) == len(found)


def test_the_recipe_has_the_last_word() -> None:
    assert {p.recompute for p in plans(LLAMA, work("training.gradient_checkpointing=false"))} == {"none"}
    asked = plans(LLAMA, work("training.gradient_checkpointing=true"))
    assert {p.recompute for p in asked} == {"full", "offload"} and not any(p.kept for p in asked)
    assert {p.optim for p in asked} == {"adamw_torch_fused"}
    assert len({p.optim for p in plans(LLAMA, work("training.optim=auto"))}) == 3
    assert {p.rows for p in asked} == {1, 2, 3, 4}


def test_falling_back_takes_less_each_time_and_keeps_the_optimizer() -> None:
    found = plans(LLAMA, work(*ALL_LINEAR, "training.optim=auto"))
    plan: Plan | None = choose(found, 140 * GIB)
    chain = []
    while plan:
        chain.append(plan)
        plan = fall_back(found, plan)
    assert len(chain) > 4 and len({p.optim for p in chain}) == 1
    assert all(after.peak_bytes < before.peak_bytes for before, after in pairwise(chain))
    assert all(after.peak_bytes <= 0.9 * before.peak_bytes for before, after in pairwise(chain[:-1]))
    short = plans(LLAMA, Work.of(recipe("training.max_steps=100"), [Example("", [0] * 200, [0] * 200)] * 8))
    first = choose(short, 12 * GIB)
    second = fall_back(short, first)
    assert second and first.replayed and second.replayed and 0.8 * first.peak_bytes < second.peak_bytes
    assert chain[-1].peak_bytes == min(p.peak_bytes for p in found if p.optim == chain[0].optim)


def test_the_largest_step_is_made_of_the_longest_rows() -> None:
    rows = [Example("", [0] * n, [0] * n) for n in (5, 40, 12, 33, 9)]
    measured = Work.of(recipe(), rows)
    assert (measured.tokens, measured.longest, measured.samples) == (40 + 33 + 12 + 9, 40, 4)
    assert Work.of(recipe()).tokens == 4 * 1024


def test_each_way_of_less_memory_takes_less() -> None:
    asked = work(*ALL_LINEAR)

    def peak(rows: int, recompute: Any, keep: bool, optim: str = "adamw_torch_fused") -> int:
        return predict(LLAMA, asked, rows, recompute, keep, optim).peak_bytes

    ways = [(1, "none", True), (1, "none", False), (1, "selective", False), (1, "full", False), (1, "offload", False)]
    ways += [(2, "offload", False)]
    peaks = [peak(*way) for way in ways]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    states = [peak(1, "full", False, optim) for optim in ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")]
    assert states == sorted(states, reverse=True)


def test_the_table_grows_with_the_model() -> None:
    on_gpu = [peak for _, peak, _ in table(24 * GIB, width=2, on_gpu=True)]
    assert on_gpu == sorted(on_gpu)
    assert [fits for *_, fits in table(24 * GIB, width=2, on_gpu=True)].count(True) == 7
    assert all(cpu > gpu for (_, cpu, _), gpu in zip(table(0, width=4, on_gpu=False), on_gpu, strict=True))


def test_split_rows_hold_the_same_documents() -> None:
    batch = pack(documents((9, 17, 5, 12)))

    def held(batch: Any) -> list[tuple[list[list[int]], int]]:
        """What each document holds of ids, labels and positions, and how many are labelled."""
        names, spans = ("input_ids", "labels", "position_ids"), list(pairwise(batch["borders"]))
        tokens = [[batch[name][0, i:j].tolist() for name in names] for i, j in spans]
        return sorted(zip(tokens, batch["labelled"], strict=True))

    for limit, rows in ((43, 1), (22, 2), (17, 3), (16, 4), (1, 4)):
        parts = split(batch, limit)
        assert len(parts) == rows
        assert sorted(chain(*map(held, parts))) == held(batch)
    assert [part["borders"] for part in split(batch, 22)] == [[0, 17, 22], [0, 12, 21]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload"])
def test_on_a_gpu_the_activations_are_as_predicted(recompute: Any) -> None:
    """Two depths: their difference is what layers keep, and nothing else."""
    peaks, predicted = [], []
    for layers in (4, 12):
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
        model = make(ALL, num_hidden_layers=layers, max_position_embeddings=2048, **sizes).cuda()
        for parameter in model.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
        batch = pack(documents((2048,) * 4))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with packing(model, True, recompute=recompute):
            packed_loss(model, batch)[0].backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        model.zero_grad(set_to_none=True)
        asked = Work(recipe=recipe(*ALL_LINEAR, "lora.r=8"), tokens=8192, longest=2048)
        shape = Shape.of(model.config)
        plan = predict(shape, asked, 1, recompute, False, "paged_adamw_8bit")
        predicted.append(plan.peak_bytes - 4 * shape.lora_weights(8, "all-linear"))
        del model
    base = 0.5625 * 8 * Shape.of(make(ALL, num_hidden_layers=1, **sizes).config).linear_weights
    assert peaks[1] - peaks[0] == pytest.approx(predicted[1] - predicted[0] - base, rel=0.1, abs=2e7)
