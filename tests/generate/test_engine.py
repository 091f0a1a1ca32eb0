"""The engine against Transformers' own generate and forward pass, on a toy model in float32."""

import copy
import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from medlora.errors import ModelError
from medlora.generate.batch import Batch
from medlora.generate.cache import Cache
from medlora.generate.decoder import Decoder, Pass, Span
from medlora.generate.engine import Engine
from medlora.generate.request import Request, Token
from medlora.generate.sampling import Sampling
from medlora.generate.weights import Choice, Half, Unknown
from medlora.model.adapter import only_to_answer

ADAPTERS = (None, "all", "some")


@pytest.fixture(scope="module")
def engine(toy_model: Any) -> Engine:
    return Engine(toy_model, rows=8)


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def chosen(model: Any, adapter: str | None) -> Any:
    if adapter is None:
        return model.disable_adapter()
    model.set_adapter(adapter)
    return nullcontext()


def ids_of(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def theirs(model: Any, ids: list[int], adapter: str | None, tokens: int, **options: Any) -> list[int]:
    with chosen(model, adapter), torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=tokens,
            do_sample=False, use_cache=True, **options,
        )  # fmt: skip
    return list(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_greedy_tokens_are_those_of_transformers(toy_model: Any, engine: Engine, adapter: str, length: int) -> None:
    ids = prompt(length, length)
    request = Request(ids, Sampling(max_new_tokens=40), adapter, frozenset({2}))
    ours = ids_of(engine.generate([request])[0])
    assert ours == theirs(toy_model, ids, adapter, 40)
    assert ids_of(engine.generate([request])[0]) == ours  # now with the prompt's blocks from the cache


def test_greedy_tokens_of_qwen2(toy_qwen2: Any) -> None:
    ids = prompt(70, 70)
    for adapter in ("all", None):
        request = Request(ids, Sampling(max_new_tokens=20), adapter, frozenset({2}))
        assert ids_of(Engine(toy_qwen2).generate([request])[0]) == theirs(toy_qwen2, ids, adapter, 20)


def test_a_row_may_end_while_a_step_beyond_it_is_under_way(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU steps are launched ahead of what is read."""
    ids = [prompt(seed, 20) for seed in range(12)]  # more than the engine's seats
    settings = Sampling(max_new_tokens=9)
    alone = [ids_of(engine.generate([Request(each, settings, "all")])[0]) for each in ids]
    monkeypatch.setattr(Batch, "ahead", True)
    ends = [frozenset({tokens[i % 5 + 1]}) for i, tokens in enumerate(alone)]
    found = engine.generate([Request(each, settings, "all", end) for each, end in zip(ids, ends, strict=True)])
    for tokens, whole, end in zip(found, alone, ends, strict=True):
        assert ids_of(tokens) == whole[: next(i for i, token in enumerate(whole) if token in end) + 1]


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_that_arrive_while_others_run_are_as_alone_and_unwanted_ones_leave(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    settings = Sampling(max_new_tokens=12, temperature=0.9, seed=3)
    requests = [Request(prompt(seed, 10 + seed), settings, "all" if seed % 2 else None) for seed in range(14)]
    alone = [ids_of(engine.generate([request])[0]) for request in requests]
    monkeypatch.setattr(Batch, "ahead", ahead)
    rows = [engine.row(index, request) for index, request in enumerate(requests)]
    left, found, asked = list(rows), [list[int]() for _ in rows], []

    def arrivals(idle: bool) -> list[Any]:
        asked.append(idle)
        if len(asked) == 4:
            rows[0].done = True  # at work
            rows[13].done = True  # not even there yet
        come, left[:] = left[:2], left[2:]
        return come

    for token in engine.serve(arrivals):
        found[token.request].append(token.id)
    assert 0 < len(found[0]) < 12 and found[0] == alone[0][: len(found[0])] and not found[13]
    assert rows[13].seat == -1 < rows[12].seat
    assert found[1:13] == alone[1:13]
    assert asked[0] and asked[-1] and not any(asked[1:7])


def test_a_penalty_is_that_of_transformers(toy_model: Any, engine: Engine) -> None:
    ids, settings = prompt(1, 30), Sampling(max_new_tokens=40, repetition_penalty=1.3)
    plain = theirs(toy_model, ids, "all", 40)
    target = theirs(toy_model, ids, "all", 40, repetition_penalty=1.3)
    assert ids_of(engine.generate([Request(ids, settings, "all", frozenset({2}))])[0]) == target != plain


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logits_agree_at_every_position_in_prefill_and_in_decode(toy_model: Any, adapter: str | None) -> None:
    decoder = Decoder(toy_model)
    decoder.refresh()
    cache = Cache(2, decoder.heads[1:], decoder.dtype, decoder.device, 2**24)
    ids, slot = prompt(5, 150), -1 if adapter is None else decoder.adapters.index(adapter)
    held = cache.take(ids, len(ids), slot)
    assert held
    with torch.inference_mode():
        found = []
        for start, stop in ((0, 70), (70, 140), *((i, i + 1) for i in range(140, 150))):
            span = Span(held.blocks, start, stop - start)
            found.append(decoder.head(decoder(torch.tensor(ids[start:stop]), Pass(decoder, [span], [slot]), cache)))
        with chosen(toy_model, adapter):
            target = toy_model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.cat(found), target, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="this CPU has no FBGEMM")
def test_few_rows_on_a_cpu_in_bfloat16_are_as_near_to_float32_as_transformers(toy_model: Any) -> None:
    model = copy.deepcopy(toy_model).bfloat16()
    decoder, ids = Decoder(model), prompt(5, 90)
    assert decoder.for_steps and all(p.for_steps for p in decoder.projections)
    slot = decoder.adapters.index("all")
    for _ in range(2):
        decoder.refresh()
        cache = Cache(2, decoder.heads[1:], decoder.dtype, decoder.device, 2**24)
        held = cache.take(ids, len(ids), slot)
        assert held
        model.set_adapter("all")
        with torch.inference_mode():
            found = []
            for start, stop in ((0, 70), (70, 78), *((i, i + 1) for i in range(78, 90))):
                this = Pass(decoder, [Span(held.blocks, start, stop - start)], [slot], step=start > 0)
                found.append(decoder.logits(decoder(torch.tensor(ids[start:stop]), this, cache)))
            real = copy.deepcopy(model).float()(input_ids=torch.tensor([ids])).logits[0, 70:]
            target = model(input_ids=torch.tensor([ids])).logits[0, 70:]
        assert (torch.cat(found)[70:] - real).norm() < 1.5 * (target - real).norm()
        with torch.no_grad():
            for _, master in decoder.projections[0].copies:  # trained on
                master.mul_(-2)


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="this CPU has no FBGEMM")
def test_company_changes_no_answer_of_a_cpu_in_bfloat16(toy_model: Any) -> None:
    engine = Engine(copy.deepcopy(toy_model).bfloat16(), draft=False)
    requests = [Request(prompt(seed, 20), Sampling(max_new_tokens=40), "all") for seed in range(16)]
    alone = [ids_of(engine.generate([request])[0]) for request in requests]
    engine.cache.forget()
    assert [ids_of(tokens) for tokens in engine.generate(requests)] == alone


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="this CPU has no FBGEMM")
def test_a_row_s_product_in_bfloat16_is_the_same_in_any_company(toy_model: Any) -> None:
    decoder = Decoder(copy.deepcopy(toy_model).bfloat16())
    decoder.refresh()
    slot = decoder.adapters.index("all")
    with torch.inference_mode():
        for product in decoder.projections[:4]:
            x = torch.randn(60, product.a.shape[2]).bfloat16()
            for rows in (1, 3, 5):  # of a float32 product these come out another way than sixty
                choices = [Choice([slot] * n, torch.full((n,), slot), step=True) for n in (rows, 60)]
                apart = [product(part, choices[0]) for part in x.split(rows)]
                assert torch.equal(torch.cat(apart), product(x, choices[1]))


def test_a_hundred_mixed_prompts_give_each_what_it_gets_alone(engine: Engine) -> None:
    rng = random.Random(0)
    shared = prompt(99, 130)
    requests = []
    for i in range(100):
        ids = (shared if i % 3 == 0 else []) + prompt(i, rng.randint(1, 90))
        settings = Sampling(
            max_new_tokens=rng.randint(1, 30), temperature=rng.choice([0.0, 0.0, 0.8]), top_k=rng.choice([None, 20]),
            top_p=rng.choice([1.0, 0.9]), repetition_penalty=rng.choice([1.0, 1.2]), seed=i,
        )  # fmt: skip
        requests.append(Request(ids, settings, rng.choice(ADAPTERS), frozenset({2})))
    together = engine.generate(requests)
    engine.cache.forget()
    alone = [engine.generate([request])[0] for request in requests]
    assert [ids_of(tokens) for tokens in together] == [ids_of(tokens) for tokens in alone]
    assert all(tokens[-1].last and not any(token.last for token in tokens[:-1]) for tokens in together)


def test_rows_that_end_make_room_and_every_block_comes_back(toy_model: Any) -> None:
    whole = Engine(toy_model, rows=3)
    small = Engine(toy_model, rows=3, cache_bytes=7 * 2 * 2 * 64 * 2 * 8 * 4)  # six blocks and the idle one
    requests = [Request(prompt(i, 100), Sampling(max_new_tokens=20)) for i in range(7)]
    assert [ids_of(t) for t in small.generate(requests)] == [ids_of(t) for t in whole.generate(requests)]
    assert len(small.cache.users) <= small.cache.limit == 7
    assert not any(small.cache.users)
    assert sorted([*small.cache.free, *small.cache.idle]) == list(range(1, len(small.cache.users)))


def test_a_shared_prefix_is_computed_once(toy_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, passed = Engine(toy_model), list[int]()
    call = Decoder.__call__

    def counting(self: Decoder, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        passed.append(len(tokens))
        return call(self, tokens, *rest)

    monkeypatch.setattr(Decoder, "__call__", counting)
    shared = prompt(7, 128)
    requests = [Request(shared + prompt(i, 10), Sampling(max_new_tokens=1), "all") for i in range(20)]
    engine.generate(requests)
    assert passed == [128 + 20 * 10]
    engine.generate([Request(shared + prompt(50, 10), Sampling(max_new_tokens=1))])
    assert passed[1:] == [138], "the untuned model must not read the adapter's keys"


def test_a_prompt_in_parts_gives_what_it_gives_at_once(
    toy_model: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(prompt(i, 20 + 45 * i), Sampling(max_new_tokens=20), "all") for i in range(4)]
    whole = [ids_of(tokens) for tokens in engine.generate(requests)]
    monkeypatch.setattr("medlora.generate.batch.CHUNK", 50)
    monkeypatch.setattr("medlora.generate.batch.LONG_CHUNK", 30)
    assert [ids_of(tokens) for tokens in Engine(toy_model).generate(requests)] == whole


def test_adapters_that_only_answer_are_held_once(toy_model: Any) -> None:
    model = only_to_answer(copy.deepcopy(toy_model))
    request = Request(prompt(6, 30), Sampling(max_new_tokens=20), "all")
    for _ in range(2):
        engine = Engine(model)
        (to, master), *_ = engine.decoder.layers[1].down.copies
        assert to.data_ptr() == master.data_ptr()
        assert ids_of(engine.generate([request])[0]) == theirs(toy_model, list(request.ids), "all", 20)
    before = ids_of(engine.generate([request])[0])
    with torch.no_grad():
        master.add_(1.0)
    assert ids_of(engine.generate([request])[0]) == theirs(model, list(request.ids), "all", 20) != before


def test_training_an_adapter_further_is_noticed(toy_model: Any, engine: Engine) -> None:
    ids = prompt(4, 80)
    weight = next(p for n, p in toy_model.named_parameters() if "lora_B.all" in n)
    before = weight.detach().clone()
    request = Request(ids, Sampling(max_new_tokens=20), "all", frozenset({2}))
    engine.generate([request])
    try:
        with torch.no_grad():
            weight.add_(1.0)
        assert ids_of(engine.generate([request])[0]) == theirs(toy_model, ids, "all", 20)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_log_probabilities_are_those_of_the_model(toy_model: Any, engine: Engine) -> None:
    ids = prompt(8, 20)
    tokens = engine.generate([
        Request(ids, Sampling(max_new_tokens=5, temperature=1.0, top_k=3, seed=1, logprobs=4)),
        Request(prompt(9, 20), Sampling(max_new_tokens=5)),
    ])  # fmt: skip
    assert tokens[1][0].logprob is None and not tokens[1][0].top
    with toy_model.disable_adapter(), torch.inference_mode():
        logits = toy_model(input_ids=torch.tensor([ids + ids_of(tokens[0])])).logits[0, len(ids) - 1 : -1]
    target = logits.log_softmax(-1)
    values, likeliest = target.topk(4)
    for i, token in enumerate(tokens[0]):
        assert token.logprob == pytest.approx(float(target[i, token.id]), abs=1e-4)
        assert [j for j, _ in token.top] == likeliest[i].tolist()
        assert [p for _, p in token.top] == pytest.approx(values[i].tolist(), abs=1e-4)


def test_an_answer_left_early_leaves_nothing_behind(toy_model: Any) -> None:
    engine = Engine(toy_model)
    stream = engine.stream([Request(prompt(1, 70), Sampling(max_new_tokens=50))])
    next(stream)
    stream.close()
    assert not any(engine.cache.users)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "leaves no answer"),
        (Request(prompt(1, 512)), "leaves no answer within 512"),
        (Request([5], adapter="none such"), "there is all, some"),
        (Request(prompt(1, 200), Sampling(max_new_tokens=200)), "do not fit the memory"),
    ],
)
def test_what_cannot_be_answered_is_refused(toy_model: Any, request_: Request, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Engine(toy_model, cache_bytes=5 * 2 * 2 * 64 * 2 * 8 * 4).generate([request_])


def test_models_that_it_does_not_know_are_refused_with_the_reason() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(Unknown, match="gpt2 is not of the LLaMA family"):
        Engine(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=9)))
    with pytest.raises(Unknown, match="gelu"):
        Engine(LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_act="gelu", **small)))


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="this CPU has no FBGEMM")
def test_half_precision_holds_only_what_it_can() -> None:
    from medlora.generate.weights import weight_of

    linear = torch.nn.Linear(96, 40, bias=True)
    assert not isinstance(weight_of([linear], torch.float32), Half)
    linear.weight.data = linear.weight.data.bfloat16().float()
    x = torch.randn(3, 96)
    packed = weight_of([linear], torch.float32)
    assert isinstance(packed, Half)
    torch.testing.assert_close(packed(x), linear(x).detach(), rtol=1e-5, atol=1e-5)
